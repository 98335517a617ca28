"""What the command line draws: tables, coloured tokens, the progress of a run. Everything goes through one console."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from softprompt.evaluation import Evaluation, Result
    from softprompt.evaluation import Progress as Asked
    from softprompt.events import Event, Started
    from softprompt.generation import Piece
    from softprompt.inspection import Inspection
    from softprompt.metrics import Estimate, Verdict
    from softprompt.plan import Plan
    from softprompt.show import Shown, Summary

console = Console(highlight=False, soft_wrap=True)


def size(num_bytes: float) -> str:
    """Bytes for people: 1.3 GB, 131 kB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def draw_run(events: "Iterable[Event]", log_every: int) -> None:
    """Follows a run to its end: a bar with loss, tokens per second and time left, and a line for what matters."""
    from softprompt.events import Evaluated, Finished, Found, Saved, Searching, Started, Step

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("loading", total=None, now="")
        window: list[Step] = []
        for event in events:
            match event:
                case Searching():
                    progress.update(bar, description="finding the rate", total=event.num_steps, completed=event.step)
                case Found():
                    tried = ", ".join(f"{rate} {loss:.4f}" for rate, loss in event.losses.items())
                    console.print(f"optim.relative_lr = {event.relative_lr}: the lowest loss of those tried: {tried}")
                case Started():
                    _draw_started(event)
                    progress.update(bar, description="training", total=event.num_steps, completed=event.first_step)
                case Step():
                    window = [*window, event][-log_every:]
                    loss = sum(step.loss for step in window) / len(window)
                    speed = sum(step.num_tokens for step in window) / sum(step.seconds for step in window)
                    progress.update(bar, completed=event.step, now=f"loss {loss:.4f}  {speed:,.0f} tokens/s")
                    if event.step % log_every == 0:
                        console.print(
                            f"step {event.step:>5}  loss {loss:.4f}  lr {event.lr:.2e}  grad {event.grad_norm:.2e}  {speed:,.0f} tokens/s"
                        )
                case Evaluated():
                    console.print(f"step {event.step:>5}  [bold]held-out loss {event.loss:.4f}[/]")
                case Saved():
                    progress.update(bar, completed=event.step)
                case Finished():
                    progress.remove_task(bar)
                    _draw_result(event.result)


def _draw_started(started: "Started") -> None:
    from softprompt.plan import trainable_line

    console.print(
        f"[bold]{escape(str(started.run))}[/]: {started.num_steps} steps over {started.num_train} rows, {started.num_eval} held out"
    )
    if started.num_rejected:
        console.print(f"{started.num_rejected} rows rejected, listed in {escape(str(started.run / 'rejected.jsonl'))}")
    if not started.num_eval:
        console.print("[yellow]no held-out rows: set data.eval or data.eval_fraction to know whether the prompt helps[/]")
    if started.first_step:
        console.print(f"resumed after step {started.first_step}")
    for name, note in started.notes.items():
        console.print(escape(note if len(started.notes) == 1 else f"{name}: {note}"))
    console.print(f"{trainable_line(started.num_trainable, started.num_parameters)} || embedding rows' RMS: {started.row_rms:.3g}")


def _draw_result(result: "dict[str, Any]") -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    names = {
        "steps": "steps",
        "train_loss": "mean loss",
        "eval_loss_before": "held-out loss before",
        "eval_loss_after": "held-out loss after",
        "seconds": "seconds",
        "samples_per_second": "samples/s",
    }
    for key, name in names.items():
        value = result[key]
        table.add_row(
            name, "-" if value is None else f"{value:.4f}" if "loss" in key else f"{value:.4g}" if isinstance(value, float) else str(value)
        )
    table.add_row("peak memory", size(float(str(result["peak_bytes"]))))
    table.add_row("prompt", escape(str(result["prompt"])))
    console.print(table)
    if len(result["prompts"]) > 1:
        _draw_bank(result["prompts"])
    draw_findings({name: found["findings"] for name, found in result["prompts"].items() if found["findings"]})


def draw_findings(findings: "dict[str, list[str]]") -> None:
    """What the doctor says, prompt by prompt."""
    for name, said in findings.items():
        heading = "" if len(findings) == 1 else f"[bold]{escape(name)}[/]: "
        for finding in said:
            console.print(f"{heading}[yellow]{escape(finding)}[/]")
        if not said:
            console.print(f"{heading}nothing to find fault with")


def _draw_bank(prompts: "dict[str, dict[str, float | str | None]]") -> None:
    table = Table(title="prompts of the bank", title_justify="left")
    for name in ("prompt", "mean loss", "held-out before", "after"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for name, found in prompts.items():
        losses = [found[key] for key in ("train_loss", "eval_loss_before", "eval_loss_after")]
        table.add_row(name, *("-" if loss is None else f"{loss:.4f}" for loss in losses))
    console.print(table)


def follow_evaluation(events: "Iterable[Asked | Evaluation]") -> "Evaluation":
    """A bar with the rows done and the time left; returns the evaluation that ends it."""
    from softprompt.evaluation import Evaluation

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("scoring", total=None)
        for event in events:
            if isinstance(event, Evaluation):
                return event
            progress.update(bar, description=event.doing, total=event.total, completed=event.done)
    raise AssertionError("an evaluation ends with its result")


def draw_evaluation(evaluation: "Evaluation") -> None:
    """The contestants side by side, then what the differences can tell. The score that decides is shown with its interval."""
    results, decides = evaluation.contestants, evaluation.metric
    names = list(dict.fromkeys(metric for result in results.values() for metric in result.scores))
    if len(names) > 3:  # it says what the loss says, and there is little room
        names = [name for name in names if name != "perplexity"]
    table = Table(title=f"{evaluation.num_rows} rows, {evaluation.num_supervised:,} supervised tokens", title_justify="left")
    for heading in ("contestant", "tokens", *(name.replace("_per_", "/").replace("_", " ") for name in names)):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for name, result in results.items():
        cells = [_estimate(metric, result.scores.get(metric), metric == decides) for metric in names]
        table.add_row(called(name, result.num_shots), f"+{result.tokens:.0f}" if round(result.tokens) else "0", *cells)
    console.print(table)
    for one in evaluation.verdicts:
        if one.first not in ("text", "few-shot"):
            console.print(sentence(one, results))
    for name, result in results.items():
        if result.num_unended:
            console.print(
                f"[yellow]{result.num_unended} answers of {called(name, result.num_shots)} did not end: raise --max-new-tokens[/]"
            )
    if evaluation.num_rejected:
        console.print(f"{evaluation.num_rejected} rows could not be used")
    if evaluation.folder:
        console.print(f"written to {escape(str(evaluation.folder))}")


def called(name: str, num_shots: int = 0) -> str:
    """A contestant's name for people."""
    known = {"base": "bare base", "text": "text prompt", "prompt": "soft prompt", "few-shot": f"{num_shots} examples"}
    return known.get(name, name)


def _estimate(metric: str, one: "Estimate | None", with_interval: bool) -> str:
    if one is None:
        return "-"
    if percent(metric):
        return f"{one.value:.1%}" + (f" ({100 * one.low:.1f} to {100 * one.high:.1f})" if with_interval else "")
    return f"{one.value:.4f}" + (f" ({one.low:.3f} to {one.high:.3f})" if with_interval else "")


def percent(metric: str) -> bool:
    """Whether a metric is a share, shown in per cent."""
    from softprompt.metrics import METRICS

    return metric in METRICS and METRICS[metric].percent


def sentence(verdict: "Verdict", results: "Mapping[str, Result]") -> str:
    """A verdict in words."""
    first, second = (called(name, results[name].num_shots) for name in (verdict.first, verdict.second))
    values = [results[name].scores[verdict.metric].value for name in (verdict.first, verdict.second)]
    shares = percent(verdict.metric)
    shown = [f"{value:.1%}" if shares else f"{value:.4f}" for value in values]
    change, low, high = (f"{100 * end:+.1f}" if shares else f"{end:+.4f}" for end in (verdict.difference, verdict.low, verdict.high))
    measured = f"{verdict.metric.replace('_', ' ')} {shown[0]} against {shown[1]}, {change}{' points' if shares else ''} ({low} to {high})"
    if verdict.outcome != "cannot tell":
        return f"{first} is [bold]{verdict.outcome}[/] than {second}: {measured}"
    told = "" if verdict.rows_needed is None else f"; about {verdict.rows_needed:,} rows would tell"
    return f"{first} against {second}: cannot tell with {verdict.num_rows} rows: {measured}{told}"


def draw_inspection(inspection: "Inspection") -> None:
    """A prompt row by row, then what can be said of all."""
    from softprompt.inspection import CAUTION

    card = inspection.card
    what = "keys and values of every layer" if card.method == "prefix" else "rows"
    console.print(f"[bold]{card.num_virtual_tokens} virtual tokens[/] ({what}, {card.position}) for {escape(card.base.name)}")
    table = Table(title="row by row", title_justify="left")
    shown = {"row": True, "size": True, "drift": any(row.drift is not None for row in inspection.rows)}
    shown |= {"worth": inspection.loss is not None, "nearest tokens": card.method == "prompt"}
    for heading in (heading for heading, on in shown.items() if on):
        table.add_column(heading, justify="left" if heading == "nearest tokens" else "right")
    for index, row in enumerate(inspection.rows):
        near = "  ".join(f"{token!r} {cosine:.2f}" for token, cosine in row.near)
        cells = {
            "row": str(index),
            "size": f"{row.size:.2f}",
            "drift": "-" if row.drift is None else f"{row.drift:.2f}",
            "worth": "-" if row.worth is None else f"{row.worth:+.4f}",
            "nearest tokens": escape(near),
        }
        table.add_row(*(cells[heading] for heading, on in shown.items() if on))
    console.print(table)
    console.print("size and drift: RMS, as a share of that of the base's embedding rows; worth: what the loss rises by without the row")
    if card.method == "prompt":
        console.print(CAUTION)
    if inspection.alike is not None:
        console.print(f"cosine between two rows: {inspection.alike[0]:.2f} in the mean, {inspection.alike[1]:.2f} at most")
    if inspection.loss is None:
        console.print("what each row is worth is measured on held-out rows: give --data FILE")
        return
    console.print(f"held-out loss {inspection.loss:.4f} on {inspection.num_rows} rows, {inspection.bare_loss:.4f} without the prompt")
    if inspection.expendable:
        rows, left = ", ".join(map(str, inspection.expendable)), card.num_virtual_tokens - len(inspection.expendable)
        console.print(
            f"worth less than 1% of the gain, each alone: rows {rows}; softprompt prune --keep {max(1, left)} measures them together"
        )


def draw_rows(shown: "Shown", num_rows: int) -> None:
    """Rows token by token, the supervised ones coloured, then a summary of each split."""
    from softprompt.show import summarize

    for row in shown.train.encoded[:num_rows]:
        facts = shown.row(row)
        cut = f", {row.num_cut} cut away" if row.num_cut else ""
        console.print(f"[bold]{escape(row.source)}[/]: {len(facts['input_ids'])} tokens, {row.num_supervised} supervised{cut}")
        console.print(_coloured(shown, facts["input_ids"], facts["labels"]))
        console.print(Text("labels: " + repr(facts["supervised_text"]), style="dim"))
        console.print()
    draw_summary("train", summarize(shown.train, shown.encoder))
    if shown.held is not None:
        draw_summary("held out", summarize(shown.held, shown.encoder))
    rejected = shown.train.rejected + (shown.held.rejected if shown.held else ())
    for item in rejected[:10]:
        console.print(f"[yellow]rejected[/] {escape(item.source)}: {escape(item.reason)}")
    if len(rejected) > 10:
        console.print(f"[yellow]and {len(rejected) - 10} more[/]")


def _coloured(shown: "Shown", ids: Sequence[int], labels: Sequence[int]) -> Text:
    """Neighbouring tokens of one kind are decoded together, so that characters of several tokens stay whole."""
    text = Text()
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == -100) != (labels[start] == -100):
            style = "dim" if labels[start] == -100 else "bold green"
            text.append(shown.encoder.tokenizer.decode(ids[start:end]), style=style)
            start = end
    return text


def draw_summary(name: str, summary: "Summary") -> None:
    """One split in a line or two."""
    line = f"[bold]{name}[/]: {summary.num_rows} rows, {summary.num_supervised:,} supervised tokens"
    line += f", {summary.num_cut} rows cut, {summary.num_rejected} rejected"
    if summary.lengths and summary.supervised:
        lengths, supervised = summary.lengths, summary.supervised
        line += f"; length {lengths.smallest} to {lengths.largest} (median {lengths.median:g})"
        line += f", supervised {supervised.smallest} to {supervised.largest} (median {supervised.median:g})"
    console.print(line)


def draw_plan(plan: "Plan") -> None:
    """Architecture, parameters and memory by part."""
    console.print(
        f"[bold]{plan.architecture}[/]: {plan.num_layers} layers, hidden size {plan.hidden_size}, {plan.num_heads or 'no'} heads, "
        f"vocabulary {plan.vocabulary:,}, context {plan.context_length or 'not stated'}"
    )
    console.print(f"{plan.num_virtual_tokens} virtual tokens; {plan.trainable_line}")
    table = Table(title="memory of a training step", title_justify="left")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    memory = plan.memory
    parts = {
        f"weights ({plan.dtype})": memory.weights,
        "activations": memory.activations,
        "prompt and its gradient": memory.prompt,
        "optimizer": memory.optimizer,
        "together": memory.total,
        "full fine-tuning in fp32, without activations": plan.full_finetuning_bytes,
    }
    for name, value in parts.items():
        table.add_row(name, size(value), end_section=name == "optimizer")
    console.print(table)


def draw_stream(pieces: "Iterable[Piece]", headings: Sequence[str]) -> list[str]:
    """Answers in the order of the texts: the first unfinished one as it comes, later ones as soon as it is their turn."""
    answers = [""] * len(headings)
    done = [False] * len(headings)
    current = printed = 0
    _heading(headings, 0)
    for piece in pieces:
        answers[piece.row] += piece.text
        done[piece.row] = piece.last
        while True:
            console.print(answers[current][printed:], end="", markup=False)
            printed = len(answers[current])
            if not done[current] or current + 1 == len(headings):
                break
            console.print()
            current, printed = current + 1, 0
            _heading(headings, current)
    console.print()
    return answers


def _heading(headings: Sequence[str], index: int) -> None:
    if len(headings) > 1:
        console.print(f"[bold cyan]{escape(headings[index])}[/]")
