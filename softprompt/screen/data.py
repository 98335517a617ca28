"""The data as the model sees it, and what is wrong with it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from softprompt.screen.console import console

if TYPE_CHECKING:
    from softprompt.rows import Summary
    from softprompt.show import Shown

LISTED = 3  # rows of each finding; --json has all
NAMES = {"train": "train", "eval": "held out"}


def draw_rows(shown: "Shown", num_rows: int) -> None:
    """Rows token by token, the supervised ones coloured, then a summary of each split, then the findings."""
    for row in shown.train.encoded[:num_rows]:
        facts = shown.row(row)
        cut = f", {row.num_cut} cut away" if row.num_cut else ""
        console.print(f"[bold]{escape(row.source)}[/]: {len(facts['input_ids'])} tokens, {row.num_supervised} supervised{cut}")
        console.print(Text.assemble(*((text, "bold green" if on else "dim") for text, on in shown.pieces(row))))
        console.print(Text("labels: " + repr(facts["supervised_text"]), style="dim"))
        console.print()
    for name, summary in shown.summaries.items():
        draw_summary(NAMES[name], summary)
    draw_shares("label", {NAMES[name]: summary.labels for name, summary in shown.summaries.items()})
    draw_shares(
        "script", {f"{NAMES[name]}, {part}": own for name, summary in shown.summaries.items() for part, own in summary.scripts.items()}
    )
    draw_said(shown)


def draw_summary(name: str, summary: "Summary") -> None:
    """One split in a line or two."""
    line = f"[bold]{name}[/]: {summary.num_rows} rows, {summary.num_supervised:,} supervised tokens"
    line += f", {summary.num_cut} rows cut, {summary.num_rejected} rejected"
    if summary.lengths and summary.supervised:
        lengths, supervised = summary.lengths, summary.supervised
        line += f"; length {lengths.smallest} to {lengths.largest} (median {lengths.median:g})"
        line += f", supervised {supervised.smallest} to {supervised.largest} (median {supervised.median:g})"
    console.print(line)


def draw_shares(heading: str, counts: Mapping[str, Mapping[str, int]]) -> None:
    """How many rows are of each kind, a column for each part of the data; nothing where there are no kinds."""
    kinds = list(dict.fromkeys(kind for own in counts.values() for kind in own))
    if not kinds:
        return
    table = Table()
    table.add_column(heading)
    for name in counts:
        table.add_column(name, justify="right")
    for kind in kinds:
        cells = (f"{own.get(kind, 0):,} ({own.get(kind, 0) / max(1, sum(own.values())):.1%})" for own in counts.values())
        table.add_row(escape(kind), *cells)
    console.print(table)


def draw_said(shown: "Shown") -> None:
    """The findings, each with its first rows."""
    from softprompt.show.words import said_of

    found = said_of(shown)
    for said in found:
        console.print(f"[yellow]{escape(said.sentence)}[/]")
        for row in said.rows[:LISTED]:
            console.print(f"  {escape(row)}")
        if len(said.rows) > LISTED:
            console.print(f"  and {len(said.rows) - LISTED:,} more")
    if not found:
        console.print("nothing to find fault with: no row twice or nearly so, in both splits, contradictory, empty or cut")
