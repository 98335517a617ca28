"""Prompts at work: an evaluation, an inspection, answers as they come."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from softprompt.screen.console import beside, console

if TYPE_CHECKING:
    from pathlib import Path

    from softprompt.answering import Answered
    from softprompt.evaluation import Advanced
    from softprompt.inspection import Inspection
    from softprompt.metrics import Estimate
    from softprompt.recycle import Moved
    from softprompt.results import Evaluation


def follow_evaluation(events: "Iterable[Advanced | Evaluation]") -> "Evaluation":
    """A bar with the rows done and the time left; returns the evaluation that ends it."""
    from softprompt.results import Evaluation

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=None)
        for event in events:
            if isinstance(event, Evaluation):
                return event
            progress.update(bar, description=event.doing, total=event.total, completed=event.done)
    raise AssertionError("an evaluation ends with its result")


def follow_answers(states: "Iterable[Answered]", out: "Path", every: float = 10.0) -> None:
    """A bar with the answers that are there and the time left; where nobody looks at a terminal, a line every so many seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began, due, first, done, total = time.monotonic(), 0.0, 0, 0, -1
    with Progress(*columns, console=beside, transient=True, disable=not beside.is_terminal) as progress:
        bar = progress.add_task("answering", total=None)
        for state in states:
            now = time.monotonic() - began
            first = state.done if total < 0 else first
            done, total = state.done, state.total
            progress.update(bar, total=total, completed=done)
            if done < total and now >= due and not beside.is_terminal:
                _beside(f"{done} of {total} answered{_left(state, first, now)}")
                due = now + every
    _beside(f"{out} is finished: {total} answers" if first == total else f"{done} of {total} answered")


def _beside(text: str) -> None:
    beside.print(text, markup=False)


def _left(state: "Answered", first: int, seconds: float) -> str:
    """What the rows to go will take if they go on like those since the first state."""
    if state.done == first:
        return ""
    return f", {timedelta(seconds=round(seconds * (state.total - state.done) / (state.done - first)))} left"


def draw_evaluation(evaluation: "Evaluation") -> None:
    """The contestants side by side, then what the differences can tell. The score that decides is shown with its interval."""
    from softprompt.metrics import UNTRAINED, below_teacher, called, sentence

    results, decides = evaluation.contestants, evaluation.metric
    names = list(dict.fromkeys(metric for result in results.values() for metric in result.scores))
    if len(names) > 3:  # it says what the loss says, and there is little room; beside a teacher, the divergence says it
        beside_teacher = ("loss", "bits_per_byte") if "divergence" in names else ()
        names = [name for name in names if name not in ("perplexity", *beside_teacher)]
    table = Table(title=f"{evaluation.num_rows} rows, {evaluation.num_supervised:,} supervised tokens", title_justify="left")
    for heading in ("contestant", "tokens", *(name.replace("_per_", "/").replace("_", " ") for name in names)):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for name, result in results.items():
        cells = [_estimate(metric, result.scores.get(metric), metric == decides) for metric in names]
        table.add_row(called(name, result.num_shots), f"+{result.tokens:.0f}" if round(result.tokens) else "0", *cells)
    console.print(table)
    for one in evaluation.verdicts:
        if one.first not in UNTRAINED:
            names = [called(side, results[side].num_shots) for side in (one.first, one.second)]
            said = Text(sentence(one, names, [results[side][one.metric] for side in (one.first, one.second)]))
            said.highlight_words([one.outcome], "bold")
            console.print(said)
    if "teacher" in results:
        times = (f"{called(name, one.num_shots)} {one.milliseconds:.0f}" for name, one in results.items() if one.milliseconds is not None)
        console.print(f"milliseconds to read what stands before a request: {', '.join(times)}", markup=False)
    for name, scores in evaluation.lost.items():
        console.print(f"{called(name)}: {below_teacher(scores)}", markup=False)
    for name, result in results.items():
        if result.num_unended:
            console.print(
                f"[yellow]{result.num_unended} answers of {called(name, result.num_shots)} did not end within the tokens allowed[/]"
            )
    if evaluation.num_rejected:
        console.print(f"{evaluation.num_rejected} rows could not be used")
    if evaluation.folder:
        console.print(f"written to {escape(str(evaluation.folder))}")


def _estimate(metric: str, one: "Estimate | None", with_interval: bool) -> str:
    from softprompt.metrics import percent

    if one is None:
        return "-"
    if percent(metric):
        return f"{one.value:.1%}" + (f" ({100 * one.low:.1f} to {100 * one.high:.1f})" if with_interval else "")
    return f"{one.value:.4f}" + (f" ({one.low:.3f} to {one.high:.3f})" if with_interval else "")


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


def draw_moved(moved: "Moved", tolerance: float) -> None:
    """What a prompt has lost on another base, and what is done about it."""
    card, rows = moved.prompt.card, len(moved.held.encoded)
    console.print(
        f"held-out loss {moved.loss_new_base:.4f} on {moved.base.name}, {moved.bare_loss:.4f} without the prompt ({rows} rows)",
        markup=False,
    )
    if moved.loss_old_base is None:
        console.print(
            f"on {card.base.name}, which it was trained on, the loss cannot be had: {moved.unknown}; so it is trained", markup=False
        )
        return
    lost = moved.loss_new_base - moved.loss_old_base
    then = f"more than {tolerance}: it is trained" if moved.has_lost(tolerance) else f"not more than {tolerance}: it stays as it is"
    console.print(f"on {card.base.name}, which it was trained on: {moved.loss_old_base:.4f}; it has lost {lost:+.4f}, {then}", markup=False)


def draw_recycled(moved: "Moved", out: "Path", steps: int, loss_after: float) -> None:
    """How it ended."""
    if steps:
        console.print(f"held-out loss {moved.loss_new_base:.4f} before these {steps} steps, {loss_after:.4f} after them")
    if loss_after > moved.loss_new_base:
        console.print("[yellow]they have not helped: lower optim.relative_lr, or take the prompt as it is with a larger --tolerance[/]")
    console.print(f"written to {out}", markup=False)


class Said(Protocol):
    """The next piece of answer number `row`, `last` where it is complete."""

    @property
    def row(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def last(self) -> bool: ...


def draw_stream(pieces: Iterable[Said], headings: Sequence[str]) -> list[str]:
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


def draw_exported(exported: "Mapping[str, Any]") -> None:
    """What an export wrote: each prompt's tokens or file, what was compared, what to know."""
    console.print(f"written to {exported['out']}", markup=False)
    for name, facts in exported["prompts"].items():
        console.print(f"  {name}: {_where(facts)}", markup=False)
    for what, error in exported["checked"].items():
        console.print(f"read back: {what.replace('_', ' ')} {error:.1e}", markup=False)
    for note in exported["notes"]:
        console.print(note, markup=False)


def _where(facts: "Mapping[str, Any]") -> str:
    """What a prompt has become."""
    if "tokens" in facts:
        return f"{facts['tokens'][0]} … {facts['tokens'][-1]}"
    size = f"{facts['positions']} positions" if "positions" in facts else f"{facts['shape'][0]} rows of {facts['shape'][1]}"
    return f"{facts['file']}, {size}"


def draw_attached(attached: "Mapping[str, Any]") -> None:
    """Where prompts lie in a server, what was compared, and the two requests for each."""
    for name, facts in attached["prompts"].items():
        console.print(f"{name}: {attached['slots']}/{_where(facts)}, in slot {facts['request']['id_slot']}", markup=False)
        for what, error in facts["checked"].items():
            console.print(f"  {what.replace('_', ' ')}: off by {error:.1e}", markup=False)
        slot = facts["request"]["id_slot"]
        for path, body in ((f"/slots/{slot}?action=restore", facts["restore"]), ("/completion", facts["request"])):
            shown = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
            console.print(f"curl '{attached['server'].rstrip('/')}{path}' -d '{shown}'", markup=False, soft_wrap=True)
    console.print("an answer whose timings.cache_n is below the prompt's positions is not the prompt's: restore the slot, and ask again")
