"""Charts as SVG that takes colours and fonts from the page: matplotlib draws, the page's style sheet decides how it looks.

No text of the user stands in a chart: names are in legends made of HTML, where every script has its font.
"""

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from softprompt.extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SERIES = 6  # colours in the style sheet; further lines are told apart by their dashes
DASHES = ("", "6 2.5", "1.5 2", "6 2 1.5 2")
INKS = {"ink": "#010101", "muted": "#020202", "rule": "#030303", "band": "#040404"}  # stand-ins, one for each of the sheet's variables
INKS |= {f"series-{number}": f"#0{number}0f0f" for number in range(SERIES)}
WIDTH, HEIGHT, LARGEST = 5.0, 2.9, 6.8  # inches; rem of the page that an inch fills at most
BINS = 40  # bars of a histogram at most
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "softprompt",
    "font.family": "DejaVu Sans",  # measured with; shown in the page's own
    "font.size": 9.5,
    "text.color": INKS["muted"],
    "axes.edgecolor": INKS["rule"],
    "axes.labelcolor": INKS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INKS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.formatter.limits": (-3, 4),
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Line:
    """A line of a chart. `number` gives its colour and dashes; `faint` what stands behind another one; `dots` few values that were
    measured one by one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    number: int = 0
    faint: bool = False
    dots: bool = False


def thinned(line: Line, most: int) -> tuple[Line, int]:
    """The line with `most` points or so: of each stretch of it the lowest and the highest, and its two ends. Also says how many points
    are a stretch: 1 where all of them are drawn."""
    if len(line.x) <= most:
        return line, 1
    long = -(-2 * len(line.x) // most)
    shown, value = {0, len(line.x) - 1}, line.y.__getitem__
    for start in range(0, len(line.x), long):
        stretch = range(start, min(start + long, len(line.x)))
        shown |= {min(stretch, key=value), max(stretch, key=value)}
    order = sorted(shown)
    return replace(line, x=[line.x[at] for at in order], y=[line.y[at] for at in order]), long


def lines(title: str, series: Sequence[Line], *, x: str = "step", log: bool = False, band: Sequence[float] = ()) -> Markup:
    """Lines over `x`; `band` is a low, a usual and a high value to compare with."""
    figure, axes = _figure()
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if band:
        axes.axhspan(band[0], band[2], color=INKS["band"], linewidth=0)
        axes.axhline(band[1], color=INKS["muted"], linewidth=0.9)
    for one in series:
        style: dict[str, Any] = {"color": INKS[f"series-{one.number % SERIES}"], "linewidth": 0.8 if one.faint else 1.5}
        style |= {"alpha": 0.5} if one.faint else {}
        dashes = DASHES[one.number // SERIES % len(DASHES)] if one.number >= SERIES else ""
        style |= {"dashes": [float(length) / style["linewidth"] for length in dashes.split()]} if dashes else {}
        style |= {"marker": "o", "markersize": 3.2} if one.dots or len(one.x) == 1 else {}
        axes.plot(one.x, one.y, **style)
    if log and all(value > 0 for one in series for value in one.y):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if max((one.x[-1] for one in series if one.x), default=0) >= 10_000:  # in full, with room between them
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(x)
    axes.margins(x=0.02)
    told = [f"{one.name} from {one.y[0]:.3g} to {one.y[-1]:.3g}" for one in series if one.y]
    return _svg(figure, f"{title}: {'; '.join(told)}")


def histogram(title: str, counts: Sequence[tuple[int, int]]) -> Markup:
    """How many rows have each length in tokens."""
    figure, axes = _figure(height=1.9)
    lengths, rows = zip(*counts, strict=True)
    wide = -(-(max(lengths) - min(lengths) + 1) // BINS)
    edges = [edge - 0.5 for edge in range(min(lengths), max(lengths) + wide + 1, wide)]
    axes.hist(lengths, bins=edges, weights=rows, color=INKS["series-0"])
    axes.set_xlabel("tokens of a row")
    axes.grid(axis="x", visible=False)
    _whole_numbers(axes.yaxis)
    return _svg(figure, f"{title}: {sum(rows)} rows of {min(lengths)} to {max(lengths)} tokens")


def reliability(title: str, series: Sequence[Line]) -> Markup:
    """Accuracy over confidence, beside the diagonal where both are the same."""
    figure, axes = _figure(width=3.4, height=3.2)
    axes.plot([0, 1], [0, 1], color=INKS["muted"], linewidth=0.8, dashes=[4, 3])
    for one in series:
        axes.plot(one.x, one.y, color=INKS[f"series-{one.number % SERIES}"], marker="o", markersize=3.5, linewidth=1.3)
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share that is right")
    return _svg(figure, f"{title}: {'; '.join(f'{one.name}, {len(one.x)} bins' for one in series)}; the diagonal is a perfect calibration")


def heatmap(title: str, cosines: Sequence[Sequence[float]]) -> Markup:
    """Cosines between rows: blue the same direction, orange the opposite one, nothing where they have none in common."""
    import numpy as np

    array = np.array(cosines, dtype=float)
    pixels = np.empty((*array.shape, 4))
    pixels[..., :3] = np.where(array[..., None] >= 0, (0.15, 0.42, 0.72), (0.85, 0.45, 0.1))
    pixels[..., 3] = np.clip(np.abs(array), 0, 1)
    figure, axes = _figure(width=3.4, height=3.2)
    axes.imshow(pixels, interpolation="none")
    axes.grid(visible=False)
    axes.set(xlabel="row", ylabel="row")
    for axis in (axes.xaxis, axes.yaxis):
        _whole_numbers(axis)
    others = array[~np.eye(len(array), dtype=bool)]
    told = f", between two rows from {others.min():.2f} to {others.max():.2f}" if others.size else ""
    return _svg(figure, f"{title}: {len(array)} rows{told}")


def parallel(title: str, axes: Sequence[tuple[str, Sequence[Any], bool]], losses: Sequence[float], whole: Sequence[bool]) -> Markup:
    """A line for each trial over its settings, (key, values, logarithmic) each, to its loss; the best one thick, the worse the fainter.
    `whole`: which were trained to their end. Values that are no numbers stand evenly apart, under their numbers in `words`' order."""
    figure, drawn = _figure(width=max(WIDTH, 1.5 * (len(axes) + 1)), height=3.6)
    scales = [_heights(values, log) for _, values, log in axes] + [_heights(losses, False)]
    order = sorted(range(len(losses)), key=lambda at: losses[at], reverse=True)
    best = min((at for at in order if whole[at]), key=lambda at: losses[at], default=None)
    for rank, at in enumerate(order):
        style: dict[str, Any] = {"color": INKS["series-0"], "alpha": 0.15 + 0.6 * rank / max(1, len(order)), "linewidth": 1.0}
        style |= {} if whole[at] else {"dashes": [4, 3]}
        style |= {"color": INKS["series-1"], "alpha": 1.0, "linewidth": 2.2, "zorder": 3} if at == best else {}
        drawn.plot(range(len(scales)), [heights[at] for heights, _ in scales], **style)
    for place, (_, ticks) in enumerate(scales):
        for height, text in ticks:
            drawn.text(place + 0.03, height, text, fontsize=8, va="center", color=INKS["ink"])
    drawn.set(xlim=(-0.1, len(scales) - 0.6), ylim=(-0.06, 1.06), yticks=[])
    drawn.set_xticks(range(len(scales)), [*(key for key, _, _ in axes), "held-out loss"])
    lowest = f", the lowest loss {min(losses):.4g}" if losses else ""
    return _svg(figure, f"{title}: {len(losses)} trials over {', '.join(key for key, _, _ in axes)}{lowest}")


def _heights(values: Sequence[Any], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Where values stand on an axis from 0 to 1, and its ticks: words and few numbers one by one, else the two ends and the middle."""
    different: list[Any] = sorted(set(values)) if all(_is_number(one) for one in values) else words(values)
    if not different:
        return [], []
    if not _is_number(different[0]) or len(different) == 1:
        places = {value: at / max(1, len(different) - 1) for at, value in enumerate(different)}
        known = [places[value if _is_number(value) else str(value)] for value in values]
        return known, [
            (at / max(1, len(different) - 1), f"{one:g}" if _is_number(one) else f"#{at + 1}") for at, one in enumerate(different)
        ]
    bent: Callable[[float], float] = math.log if log else float
    back: Callable[[float], float] = math.exp if log else float
    low, high = bent(different[0]), bent(different[-1])
    shown = different if len(different) <= 5 else [back(low + (high - low) * part) for part in (0, 0.5, 1)]
    return [(bent(one) - low) / (high - low) for one in values], [((bent(one) - low) / (high - low), f"{one:.3g}") for one in shown]


def words(values: Sequence[Any]) -> list[str]:
    """The different values of a setting that are no numbers, in the order in which a chart numbers them; none where all are numbers."""
    return [] if all(_is_number(one) for one in values) else list(dict.fromkeys(map(str, values)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(width: float = WIDTH, height: float = HEIGHT) -> "tuple[Figure, Axes]":
    need("matplotlib", "a report")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.add_subplot()


def _whole_numbers(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _svg(figure: "Figure", label: str) -> Markup:
    """The figure as an element of the page: it scales, has a name, ids of its own, and the sheet's colours."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    own = f"c{hashlib.sha256((label + text).encode()).hexdigest()[:10]}-"
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{own}", text)
    for name, color in INKS.items():
        text = text.replace(color, f"var(--{name})")
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    limit = f"max-width: {figure.get_figwidth() * LARGEST:.0f}rem"
    return Markup(f'<svg class="chart" role="img" aria-label="{escape(label)}" {size[0]} style="{limit}">' + text[text.index(">") + 1 :])
