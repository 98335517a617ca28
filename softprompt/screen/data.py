"""The data as the model sees it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from softprompt.screen.console import console

if TYPE_CHECKING:
    from softprompt.show import Shown, Summary


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
