"""A run in a notebook: one display with a bar, the numbers, and the curves of training and held-out loss.

Text has the notebook's own colour, and the two lines have colours that are seen on light paper and on dark: nothing asks for a theme.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

from softprompt.events import Evaluated, Finished, Found, Preparing, Searching, Started, Step, Warned
from softprompt.report import minutes, number

if TYPE_CHECKING:
    from softprompt.events import Event

SECONDS = 0.5  # between two pictures at least; what matters is shown at once
POINTS = 240  # of a curve at most: neighbours are averaged
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 230, 46, 20, 10, 26
TRAIN, HELD, WARN = "#3b82c4", "#d9702b", "#b7791f"
DIM = "opacity:.7"


class Curve:
    """Values over the steps, POINTS at most however many there are: neighbours become one point, their mean."""

    def __init__(self) -> None:
        self.wide = 1  # values of a point
        self.groups: list[tuple[int, float, int]] = []  # the last step, the sum and the number of values

    def add(self, step: int, value: float) -> None:
        """Adds the value of a later step."""
        if self.groups and self.groups[-1][2] < self.wide:
            _, total, count = self.groups[-1]
            self.groups[-1] = (step, total + value, count + 1)
        else:
            self.groups.append((step, value, 1))
        if len(self.groups) > POINTS:
            self.wide *= 2
            pairs = [self.groups[start : start + 2] for start in range(0, len(self.groups), 2)]
            self.groups = [(pair[-1][0], sum(one[1] for one in pair), sum(one[2] for one in pair)) for pair in pairs]

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(float(step), total / count) for step, total, count in self.groups]


class Story:
    """What a run has reported so far. `last`: the steps that the training loss is averaged over."""

    def __init__(self, window: int) -> None:
        self.last: deque[Step] = deque(maxlen=window)
        self.state = "loading"
        self.started: Started | None = None
        self.step = self.num_steps = 0
        self.raw, self.mean = Curve(), Curve()
        self.held: list[tuple[int, float]] = []
        self.said: list[str] = []
        self.result: dict[str, Any] | None = None

    @property
    def unit(self) -> str:
        """What is counted now."""
        return "row" if self.state == "reading rows" else "step"

    def hear(self, event: "Event") -> None:
        """Takes an event in."""
        match event:
            case Preparing():
                self.state, self.step, self.num_steps = "reading rows", event.num_rows, event.total or 0
            case Searching():
                self.state, self.step, self.num_steps = "finding the rate", event.step, event.num_steps
            case Found():
                self.said.append(f"optim.relative_lr = {event.relative_lr}, the best of {len(event.losses)} that were tried")
            case Started():
                self.state, self.started, self.step, self.num_steps = "training", event, event.first_step, event.num_steps
                if event.num_rejected:
                    self.said.append(f"{event.num_rejected} rows rejected, listed in {event.run / 'rejected.jsonl'}")
                if not event.num_eval:
                    self.said.append("no held-out rows: set data.eval or data.eval_fraction to know whether the prompt helps")
            case Step():
                self.step = event.step
                self.last.append(event)
                self.raw.add(event.step, event.loss)
                self.mean.add(event.step, self.loss)
            case Evaluated():
                self.held.append((event.step, event.loss))
            case Warned():
                self.said.append(event.finding)
            case Finished():
                self.state, self.step, self.result = "done", event.step, event.result
                found = (finding for prompt in event.result["prompts"].values() for finding in prompt["findings"])
                self.said = list(dict.fromkeys([*self.said, *found]))

    @property
    def loss(self) -> float:
        """The training loss, the mean over the last steps."""
        return sum(step.loss for step in self.last) / len(self.last)


def displayed(events: "Iterable[Event]", window: int) -> "Iterator[Event]":
    """The events as they are, in a kernel's display. What it shows last is what the run came to, also where it was stopped."""
    from IPython.display import display

    story = Story(window)
    handle: Any = display(_bundle(story), raw=True, display_id=True)
    shown = time.monotonic()
    try:
        for event in events:
            story.hear(event)
            if not isinstance(event, Step | Searching) or time.monotonic() - shown > SECONDS:
                handle.update(_bundle(story), raw=True)
                shown = time.monotonic()
            yield event
    finally:
        if story.result is None:
            story.state = "stopped"
            handle.update(_bundle(story), raw=True)


def _bundle(story: Story) -> dict[str, str]:
    return {"text/html": page(story), "text/plain": sentence(story)}


def sentence(story: Story) -> str:
    """How far the run is, in a line."""
    place = f"{story.started.run}: " if story.started else ""
    step = f", {story.unit} {story.step} of {story.num_steps}" if story.num_steps else ""
    return place + " · ".join([f"{story.state}{step}", *_numbers(story)])


def page(story: Story) -> str:
    """The display as HTML."""
    parts = [_heading(story), _bar(story), _line(_progress(story), DIM)]
    if len(story.last) > 1 or story.held:
        parts += [_legend(story), chart(story)]
    parts += [_line(f"⚠ {escape(said)}", f"color:{WARN}") for said in story.said]
    if story.result is not None:
        parts.append(_line(f"The prompt lies in <code>{escape(str(story.result['prompt']))}</code>"))
    elif story.state == "stopped" and story.started:
        parts.append(_line("<code>train(config, resume=True)</code> goes on with it"))
    return f'<div style="max-width:{WIDTH}px;line-height:1.5">{"".join(parts)}</div>'


def _line(text: str, style: str = "") -> str:
    return f'<div style="margin:.25em 0;{style}">{text}</div>'


def _heading(story: Story) -> str:
    if story.started is None:
        return _line(f"<b>{story.state}</b>")
    one = story.started
    rows = f"{one.num_train:,} rows, {one.num_eval:,} held out"
    several = f"{len(one.notes)} prompts at once, losses are their means · " if len(one.notes) > 1 else ""
    return _line(f"<b>{story.state}</b> <code>{escape(str(one.run))}</code> <span style='{DIM}'>{several}{rows}</span>")


def _bar(story: Story) -> str:
    share = 100 * min(1, story.step / story.num_steps) if story.num_steps else 0
    inner = f'<div style="width:{share:.1f}%;height:6px;border-radius:3px;background:{TRAIN}"></div>'
    return f'<div style="margin:.4em 0;height:6px;border-radius:3px;background:rgba(128,128,128,.3)">{inner}</div>'


def _progress(story: Story) -> str:
    parts = [f"{story.unit} {story.step:,} of {story.num_steps:,}"] if story.num_steps else []
    if story.last:
        last = story.last
        seconds = sum(step.seconds for step in last)
        if story.state == "training" and story.step < story.num_steps:
            parts.append(f"{minutes(seconds / len(last) * (story.num_steps - story.step))} left")
        parts.append(f"{sum(step.num_tokens for step in last) / max(seconds, 1e-9):,.0f} tokens/s")
    if story.result is not None:
        parts.append(f"{minutes(story.result['seconds'])} in all")
    return " · ".join(parts)


def _numbers(story: Story) -> list[str]:
    parts = [f"training loss {number(story.loss)}"] if story.last else []
    if story.held:
        best = min(story.held, key=lambda one: one[1])
        before = f", {number(story.held[0][1])} before" if len(story.held) > 1 else ""
        kept = f", best {number(best[1])} at step {best[0]}" if best != story.held[-1] else ""
        parts.append(f"held-out loss {number(story.held[-1][1])}{before}{kept}")
    return parts


def _legend(story: Story) -> str:
    colors = {text: HELD if text.startswith("held") else TRAIN for text in _numbers(story)}
    dots = (f'<span style="margin-right:1.5em"><span style="color:{color}">●</span> {text}</span>' for text, color in colors.items())
    return _line("".join(dots))


# ---- the curves ----------------------------------------------------------------------------------------------------


def chart(story: Story) -> str:
    """Training loss (each step faintly, their running mean) and held-out loss over the steps, as SVG."""
    smooth, held = story.mean.points, _thinned([one for one in story.held if math.isfinite(one[1])])
    values = [loss for _, loss in [*smooth, *held] if math.isfinite(loss)] or [0.0, 1.0]
    low, high = min(values), max(values)
    log = low > 0 and high > 10 * low
    low, high = (low / 1.15, high * 1.15) if log else (low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    scale = math.log if log else float
    first = story.started.first_step if story.started else 0
    first = min([first, *(step for step, _ in story.held[:1])])
    last = max(story.num_steps, story.step, first + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(loss: float) -> float:
        share = (scale(min(max(loss, low), high)) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def line(points: Sequence[tuple[float, float]], color: str, style: str) -> str:
        at = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points if math.isfinite(loss))
        return f'<polyline points="{at}" fill="none" stroke="{color}" {style}/>'

    raw = story.raw.points
    parts = [_rule(y(tick), f"{tick:g}") for tick in _ticks(low, high, log)]
    parts += [_under(x(tick), f"{tick:,.0f}") for tick in _ticks(first, last, False) if tick == round(tick)]
    parts.append(_under(LEFT - 25, "step"))
    parts += [line(raw, TRAIN, 'stroke-width="1" opacity=".5"'), line(smooth, TRAIN, 'stroke-width="2"')]
    parts += [line(held, HELD, 'stroke-width="2"'), *(f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.2" fill="{HELD}"/>' for s, v in held)]
    told = escape("; ".join(_numbers(story)))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="{told}" font-size="11" font-family="inherit" '
        f'fill="currentColor">{"".join(parts)}</svg>'
    )


def _rule(y: float, text: str) -> str:
    across = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".15"/>'
    return f'{across}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" opacity=".7">{text}</text>'


def _under(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle" opacity=".7">{text}</text>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, each the mean of neighbours."""
    wide = -(-len(points) // POINTS) or 1
    groups = [points[start : start + wide] for start in range(0, len(points), wide)]
    return [(group[-1][0], fmean(loss for _, loss in group)) for group in groups]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from `low` to `high`, three to seven or so."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [mantissa * 10.0**decade for decade in decades for mantissa in (1, 2, 5)]
        inside = [value for value in found if low <= value <= high]
        return inside if len(inside) < 8 else [value for value in inside if f"{value:e}"[0] == "1"]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [round(place * step, 10) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
