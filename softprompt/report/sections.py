"""What the page shows of the runs: charts with their legends, and tables with a column for each run."""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from softprompt.config import Config
from softprompt.metrics import METRICS, UNTRAINED, below_teacher, called, percent, sentence
from softprompt.report import charts
from softprompt.report.charts import DASHES, SERIES, Line
from softprompt.report.reading import Evaluation, Inspection, Prompt, Run

NUMBERS = 20  # lines of a table of numbers
MOST, FEWEST, TOGETHER = 1000, 100, 8000  # points of a line, and of all lines of a chart
DOTS = 0.25  # share of them that is drawn where each is a dot


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    number: int

    @property
    def color(self) -> int:
        return self.number % SERIES

    @property
    def dashes(self) -> str:
        return DASHES[self.number // SERIES % len(DASHES)] if self.number >= SERIES else ""


@dataclass(frozen=True)
class Figure:
    """A chart with what stands above and below it; a legend where there is more than one line."""

    title: str
    note: str
    chart: Markup
    legend: tuple[Key, ...] = ()


def _legend(names: Sequence[str]) -> tuple[Key, ...]:
    return tuple(Key(name, number) for number, name in enumerate(names)) if len(names) > 1 else ()


# ---- training ------------------------------------------------------------------------------------------------------


def curves(prompts: Sequence[Prompt]) -> list[Figure]:
    """Loss, gradient norm, learning rate and movement of the rows by step, all prompts in one chart each."""
    legend = _legend([prompt.name for prompt in prompts])
    most = max(FEWEST, min(MOST, TOGETHER // max(1, len(prompts))))
    drawn: list[tuple[str, str, list[Line], bool]] = []
    trained = [Line(f"{one.name} in training", one.steps, one.losses, index, faint=True) for index, one in enumerate(prompts) if one.steps]
    held = [
        Line(f"{one.name} held out", list(one.held_out), list(one.held_out.values()), index, dots=True)
        for index, one in enumerate(prompts)
        if one.held_out
    ]
    note = "nats per supervised token" + ("; thin: rows of the step; dots: held-out rows" if held else ", rows of the step")
    drawn.append(("Loss", note, trained + held, False))
    of: list[tuple[str, str, Callable[[Prompt], Sequence[float]], bool]] = [
        ("Gradient norm", "before clipping, logarithmic", lambda one: one.grad_norms, True),
        ("Learning rate", "of the rows", lambda one: one.lrs, False),
        ("Movement of the rows", "RMS distance from the start, as a share of the embedding rows' RMS", lambda one: one.movements, False),
    ]
    for title, note, values, log in of:
        drawn.append((title, note, [Line(one.name, one.steps, values(one), index) for index, one in enumerate(prompts) if one.steps], log))
    return [_curve(title, note, series, log, legend, most) for title, note, series, log in drawn if series]


def _curve(title: str, note: str, series: list[Line], log: bool, legend: tuple[Key, ...], most: int) -> Figure:
    """The lines in one chart, thinned where they are long, and the thinning said."""
    thin = [charts.thinned(line, round(most * DOTS) if line.dots else most) for line in series]
    for what, dots in (("steps", False), ("evaluations", True)):
        long = max((long for line, long in thin if line.dots == dots), default=1)
        note += f"; of every {long:,} {what} the lowest and the highest are drawn" if long > 1 else ""
    return Figure(title, note, charts.lines(title, [line for line, _ in thin], log=log), legend)


def curve_numbers(prompt: Prompt) -> list[tuple[int, list[float | None]]]:
    """(step, [loss, held-out loss, gradient norm, learning rate, movement]) of NUMBERS steps or so, and of as many evaluations, the best
    among them."""
    best = () if prompt.best_step is None else (prompt.best_step,)
    shown = {*_some(prompt.steps), *_some(list(prompt.held_out)), *best}
    columns = (prompt.losses, None, prompt.grad_norms, prompt.lrs, prompt.movements)

    def cell(column: Sequence[float] | None, step: int) -> float | None:
        if column is None:
            return prompt.held_out.get(step)
        at = bisect_left(prompt.steps, step)
        return column[at] if at < len(column) and prompt.steps[at] == step else None

    return [(step, [cell(column, step) for column in columns]) for step in sorted(shown)]


def _some(steps: Sequence[int]) -> set[int]:
    """NUMBERS of them or so, evenly apart, and the last."""
    return {*steps[:: max(1, -(-len(steps) // NUMBERS))], *steps[-1:]}


def lengths(runs: Sequence[Run]) -> list[Figure]:
    """How long the rows of each split are."""
    figures = []
    for run in runs:
        splits = (("training rows", run.data.train), ("held-out rows", run.data.eval)) if run.data else ()
        for name, split in splits:
            if split and split.counts:
                title = f"{run.name}, {name}" if len(runs) > 1 else name.capitalize()
                figures.append(Figure(title, "", charts.histogram(title, split.counts)))
    return figures


# ---- evaluations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A cell: the value and its interval in words, and the interval as shares of the widest of the table's column."""

    value: str
    interval: str
    low: float
    high: float
    at: float


@dataclass(frozen=True)
class Contestant:
    name: str
    tokens: float
    scores: dict[str, Score | None]
    unended: int
    trained: bool


@dataclass(frozen=True)
class Confusion:
    """`rows`: of each label its word, and for each chosen label (rows, share of the label's rows)."""

    name: str
    rows: list[tuple[str, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Comparison:
    """One evaluation. `title` of all the page; `first`: the newest of its run; `scale`: what its drawn intervals end at."""

    run: str
    title: str
    first: bool
    facts: Evaluation
    direction: str
    scale: str
    metrics: list[str]
    contestants: list[Contestant]
    verdicts: list[str]
    confusions: list[Confusion]
    calibration: Figure | None
    bins: list[tuple[str, list[tuple[float, float, int]]]]


def contests(runs: Sequence[Run]) -> list[Comparison]:
    """All evaluations, run by run; intervals of one metric have one scale."""
    widest: dict[str, float] = {}
    for one in (one for run in runs for one in run.evaluations):
        for own in one.intervals.values():
            for metric, (low, high) in own.items():
                widest[metric] = max(widest.get(metric, 0.0), abs(low), abs(high))
    return [_contest(run, index, one, widest) for run in runs for index, one in enumerate(run.evaluations)]


def _contest(run: Run, index: int, facts: Evaluation, widest: dict[str, float]) -> Comparison:
    names = {name: called(name, int(own.get("shots") or 0)) for name, own in facts.contestants.items()}
    metrics = list(dict.fromkeys(metric for own in facts.intervals.values() for metric in own))
    metrics = [facts.metric, *(metric for metric in metrics if metric != facts.metric)]
    rows = []
    for name, own in facts.contestants.items():
        scores = {metric: _score(metric, own.get(metric), facts.intervals.get(name, {}).get(metric), widest) for metric in metrics}
        trained = name not in ("base", *UNTRAINED)
        rows.append(Contestant(names[name], own.get("tokens") or 0.0, scores, int(own.get("unended_answers") or 0), trained))
    verdicts = []
    for one in (one for one in facts.verdicts if one.first not in UNTRAINED):  # those of prompts
        values = [facts.contestants[side].get(one.metric) for side in (one.first, one.second)]
        verdicts.append(sentence(one, [names[one.first], names[one.second]], [value or 0.0 for value in values]))
    verdicts += [f"{names[name]}: {below_teacher(lost)}" for name, lost in facts.lost.items()]
    confusions = [Confusion(names[name], _shares(facts.labels, table)) for name, table in (facts.confusion or {}).items()]
    bins = [(names[name], own) for name, own in (facts.calibration or {}).items()]
    series = [Line(name, [one[0] for one in own], [one[1] for one in own], number) for number, (name, own) in enumerate(bins)]
    title = f"{run.name}, {facts.rows} rows"
    calibration = None
    if series:
        legend = _legend([name for name, _ in bins])
        calibration = Figure("Calibration", "dashed: perfect", charts.reliability(f"Calibration, {title}", series), legend)
    direction = "higher is better" if facts.metric not in METRICS or METRICS[facts.metric].higher_is_better else "lower is better"
    largest = widest[facts.metric]
    scale = f"{largest:.0%}" if percent(facts.metric) else f"{largest:.3g}"
    return Comparison(run.name, title, index == 0, facts, direction, scale, metrics, rows, verdicts, confusions, calibration, bins)


def _score(metric: str, value: float | None, interval: tuple[float, float] | None, widest: dict[str, float]) -> Score | None:
    if value is None or interval is None:
        return None
    low, high = interval
    scale = widest[metric] or 1.0
    shares = [min(1.0, max(0.0, end / scale)) for end in (low, high, value)]
    if percent(metric):
        return Score(f"{value:.1%}", f"{100 * low:.1f} to {100 * high:.1f}", *shares)
    return Score(f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}", f"{low:.3g} to {high:.3g}", *shares)


def _shares(labels: Sequence[str], table: list[list[int]]) -> list[tuple[str, list[tuple[int, float]]]]:
    return [(label, [(rows, rows / max(1, sum(own))) for rows in own]) for label, own in zip(labels, table, strict=True)]


# ---- the prompts' rows ---------------------------------------------------------------------------------------------


def row_charts(prompts: Sequence[Prompt]) -> list[Figure]:
    """Size against the vocabulary's, drift and worth of every row."""
    inspected = [(index, one.name, one.inspection) for index, one in enumerate(prompts) if one.inspection]
    legend = _legend([prompt.name for prompt in prompts])
    band = next((one.vocabulary_sizes for _, _, one in inspected if one.vocabulary_sizes), None)
    grey = "; grey: 90% of the vocabulary's rows, and the middle one" if band else ""

    def series(value: Callable[[Any], float | None]) -> list[Line]:
        found: list[tuple[int, str, Inspection]] = [item for item in inspected if all(value(row) is not None for row in item[2].rows)]
        return [Line(name, range(len(one.rows)), [value(row) or 0.0 for row in one.rows], index, dots=True) for index, name, one in found]

    drawn = [
        ("Size of the rows", f"RMS, as a share of the embedding rows' RMS{grey}", series(lambda row: row.size), band or ()),
        ("Drift from the start", "RMS distance, in the same unit", series(lambda row: row.drift), ()),
        ("Worth of a row", "what the held-out loss rises by without it", series(lambda row: row.worth), ()),
    ]
    return [Figure(title, note, charts.lines(title, own, x="row", band=band), legend) for title, note, own, band in drawn if own]


def heatmaps(prompts: Sequence[Prompt]) -> list[Figure]:
    """Cosines between the rows of each prompt."""
    figures = []
    for prompt in prompts:
        facts = prompt.inspection
        if facts and facts.cosine_between_rows:
            note = f"mean {facts.cosine_between_rows.mean:.2f}, largest {facts.cosine_between_rows.largest:.2f} between two rows"
            title = prompt.name if len(prompts) > 1 else "Cosine between rows"
            figures.append(Figure(title, note, charts.heatmap(f"Cosine between rows, {prompt.name}", facts.cosines)))
    return figures


# ---- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A row of a table with a column for each run. `usual`: all of them have the default; `differs`: not all are the same."""

    key: str
    values: list[str]
    usual: bool = False

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def settings(runs: Sequence[Run]) -> list[Setting]:
    """The resolved configuration, key by key."""
    trees = [run.config.model_dump(mode="json") for run in runs]
    plain = Config().model_dump(mode="json")
    return [
        Setting(f"{section}.{key}", [_text(tree[section][key]) for tree in trees], all(tree[section][key] == default for tree in trees))
        for section, keys in plain.items()
        for key, default in keys.items()
    ]


def versions(runs: Sequence[Run]) -> list[Setting]:
    """The start of each run and the packages that it ran with."""
    names = list(dict.fromkeys(name for run in runs for name in run.started.versions))
    packages = [Setting(name, [run.started.versions.get(name, "–") for run in runs]) for name in names]
    return [Setting("started", [run.started.started for run in runs]), *packages]


def _text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
