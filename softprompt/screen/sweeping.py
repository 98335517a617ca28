"""A sweep while it goes on, and its end."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from softprompt.report import minutes
from softprompt.report.sweeps import scored, setting
from softprompt.screen.console import console

if TYPE_CHECKING:
    from softprompt.sweep.best import Outcome
    from softprompt.sweep.folder import Sweep
    from softprompt.sweep.running import Progress
    from softprompt.sweep.study import Seen

MOST = 15  # trials that are shown while it goes on
EVERY = 30.0  # seconds between two lines, where nobody looks


def draw_sweep(sweep: "Sweep", looks: "Iterable[Progress]") -> None:
    """Follows a sweep to its end: a table that is drawn again and again, or, in a file, a line now and then."""
    console.print(f"[bold]{escape(str(sweep.path))}[/]: {len(sweep.spec.trials)} trials in {len(sweep.banks)} runs", highlight=False)
    told = -EVERY
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for look in looks:
            if console.is_terminal:
                live.update(Group(trial_table(sweep.keys, look.trials, MOST), Text(state_line(look))), refresh=True)
            elif look.seconds - told >= EVERY:
                console.print(state_line(look), markup=False)
                told = look.seconds


def state_line(look: "Progress") -> str:
    """Where a sweep stands, in a line."""
    states = [one.state for one in look.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    left = "" if look.left is None else f", {minutes(look.left)} left"
    losses = [(one.loss, one.number) for one in look.trials if one.state == "finished" and one.loss is not None]
    best = f"; best so far {min(losses)[0]:.4f}, trial {min(losses)[1]}" if losses else ""
    return f"{look.share:.0%} of the steps after {minutes(look.seconds)}{left}: {counts}{best}"


def trial_table(keys: "Iterable[str]", trials: "Iterable[Seen]", most: int | None = None) -> Table:
    """The trials, the best first, then those that run."""
    table = Table(title="trials", title_justify="left")
    for name in ("trial", *keys, "held-out loss", "step", "state"):
        table.add_column(escape(name), justify="left" if name == "state" else "right")
    rank = {"finished": 0, "running": 1, "pruned": 2, "failed": 3, "waiting": 4}
    order = sorted(trials, key=lambda one: (rank[one.state], one.loss if one.loss is not None else float("inf"), one.number))
    for place, one in enumerate(order[:most]):
        loss = "-" if one.loss is None else f"{one.loss:.4f}"
        style = "bold" if place == 0 and one.state == "finished" else None
        values = (escape(setting(value)) for value in one.values.values())
        table.add_row(str(one.number), *values, loss, "-" if one.step is None else str(one.step), one.state, style=style)
    if most is not None and len(order) > most:
        table.caption = f"and {len(order) - most} more"
    return table


def draw_outcome(sweep: "Sweep", outcome: "Outcome") -> None:
    """All trials, and what the best prompt is worth."""
    console.print(trial_table(sweep.keys, outcome.trials))
    for one in outcome.trials:
        if one.note:
            console.print(f"trial {one.number} failed: {one.note}", markup=False)
    settings = ", ".join(f"{key} = {setting(value)}" for key, value in outcome.best.values.items())
    console.print(f"[bold]best: trial {outcome.best.number}[/], held-out loss {outcome.best.loss:.4f}: {escape(settings)}")
    judged = outcome.judged
    told = ", ".join(f"{metric.replace('_', ' ')} {scored(metric, score)}" for metric, score in judged["scores"].items() if metric in SHOWN)
    console.print(f"on {judged['rows']} rows that did not choose it: {told}; bare base: loss {judged['base']['loss']:.4f}")
    if outcome.importance:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in outcome.importance.items())
        console.print(f"what decides: {shares}", markup=False)
    console.print(f"prompt: {outcome.prompt}", markup=False)
    console.print(f"report: {outcome.report}", markup=False)


SHOWN = ("loss", "accuracy")
