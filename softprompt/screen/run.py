"""A run while it goes on, its end, its findings; and what a run will need."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from softprompt.screen.console import beside, console, size

if TYPE_CHECKING:
    from softprompt.events import Event, Preparing, Started
    from softprompt.plan import Plan

Value = TypeVar("Value")


def draw_run(events: "Iterable[Event]", log_every: int) -> None:
    """Follows a run to its end, as `drawn` shows it."""
    for _ in drawn(events, log_every):
        pass


def drawn(events: "Iterable[Event]", log_every: int) -> "Iterator[Event]":
    """The events as they are, once they are shown: a bar with loss, tokens per second and time left, and a line for what matters."""
    from softprompt.events import Evaluated, Finished, Found, Preparing, Saved, Searching, Started, Step, Studying, Warned

    with Progress(*bar_columns(), console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("loading", total=None, now="")
        window: list[Step] = []
        num_prompts = 1
        for event in events:
            match event:
                case Preparing():
                    show_reading(progress, bar, event)
                case Studying():
                    if event.note:
                        console.print(escape(event.note))
                    progress.update(bar, description=event.doing, total=event.total, completed=event.done)
                case Searching():
                    progress.update(bar, description="finding the rate", total=event.num_steps, completed=event.step)
                case Found():
                    tried = ", ".join(f"{rate} {loss:.4f}" for rate, loss in event.losses.items())
                    console.print(f"optim.relative_lr = {event.relative_lr}: the lowest loss of those tried: {tried}")
                case Started():
                    _draw_started(event)
                    num_prompts = len(event.notes)
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
                case Warned():
                    whose = _whose(event.prompts, num_prompts)
                    console.print(f"step {event.step:>5}  {whose}[yellow]{escape(event.finding)}[/]")
                case Saved():
                    progress.update(bar, completed=event.step)
                case Finished():
                    progress.remove_task(bar)
                    _draw_result(event.result)
            yield event


def bar_columns() -> "tuple[ProgressColumn, ...]":
    """Description, bar, how many of how many, what is now, time left."""
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn()


def follow_reading(events: "Generator[Preparing, None, Value]") -> "Value":
    """Shows how far the reading of rows is, on standard error; what the events return."""
    with Progress(*bar_columns(), console=beside, transient=True, disable=not beside.is_terminal) as progress:
        bar = progress.add_task("reading rows", total=None, now="")
        while True:
            try:
                show_reading(progress, bar, next(events))
            except StopIteration as end:
                found: Value = end.value
                return found


def show_reading(progress: Progress, bar: TaskID, event: "Preparing") -> None:
    now = f"{event.num_rows / max(event.seconds, 1e-9):,.0f} rows/s"
    progress.update(bar, description="reading rows", total=event.total, completed=event.num_rows, now=now)


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
    if distilled := result.get("distilled"):
        table.add_row("tokens of the teacher's text", f"{distilled['teacher_tokens']:,} into {distilled['positions']} positions")
        for name, key in (("KL to the teacher", "kl"), ("same likeliest token", "same_first")):
            table.add_row(f"{name}, base alone and prompt", f"{distilled[f'{key}_before']:.4f}  {distilled[f'{key}_after']:.4f}")
    table.add_row("peak memory", size(float(str(result["peak_bytes"]))))
    table.add_row("prompt", escape(str(result["prompt"])))
    console.print(table)
    if len(result["prompts"]) > 1:
        _draw_bank(result["prompts"])
    if any(found["findings"] for found in result["prompts"].values()):
        draw_findings({name: found["findings"] for name, found in result["prompts"].items()})


def draw_findings(findings: "dict[str, list[str]]") -> None:
    """What the doctor says, each finding once."""
    of_whom: dict[str, list[str]] = {}
    for name, said in findings.items():
        for finding in said:
            of_whom.setdefault(finding, []).append(name)
    for finding, names in of_whom.items():
        console.print(f"{_whose(names, len(findings))}[yellow]{escape(finding)}[/]")
    if sound := [name for name, said in findings.items() if not said]:
        console.print(f"{_whose(sound, len(findings))}nothing to find fault with")


def _whose(names: "Sequence[str]", num_prompts: int) -> str:
    """The prompts that a line is about, where it is not about all of the run."""
    return "" if len(names) == num_prompts else f"[bold]{escape(', '.join(names))}[/]: "


def _draw_bank(prompts: "dict[str, dict[str, float | str | None]]") -> None:
    table = Table(title="prompts of the bank", title_justify="left")
    for name in ("prompt", "mean loss", "held-out before", "after"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for name, found in prompts.items():
        losses = [found[key] for key in ("train_loss", "eval_loss_before", "eval_loss_after")]
        table.add_row(name, *("-" if loss is None else f"{loss:.4f}" for loss in losses))
    console.print(table)


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
    _draw_weights(plan)


def _draw_weights(plan: "Plan") -> None:
    """Whether other precisions would fit, and what a GGUF file becomes."""
    if plan.weights_in:
        table = Table(title=f"weights in memory, {size(plan.free)} of which are free", title_justify="left")
        table.add_column("in")
        table.add_column("bytes", justify="right")
        table.add_column("a step")
        rest = plan.memory.total - plan.memory.weights
        for name, value in plan.weights_in.items():
            table.add_row(name, size(value), "fits" if value + rest <= plan.free else "does not fit")
        console.print(table)
    if plan.unpacking is not None:
        done = "lies in the cache" if plan.unpacking.done else "is written to the cache by the first run, which holds all of it once"
        console.print(f"GGUF file of {size(plan.unpacking.file)}, unpacked {size(plan.unpacking.folder)} in {plan.dtype}: {done}.")
        console.print(f"In int8 or nf4: model.name={plan.unpacking.where} model.quantization=nf4", soft_wrap=True)
