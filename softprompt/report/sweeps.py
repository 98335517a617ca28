"""The trials of a sweep compared on one self-contained page."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.atomic import write_text
from softprompt.errors import RunError
from softprompt.metrics import percent


@dataclass(frozen=True)
class Trial:
    """`loss`: the lowest of the held-out rows so far; `note`: why it failed; `prompt`: its folder in the sweep's."""

    number: int
    values: dict[str, Any]
    state: str
    loss: float | None
    prompt: str | None
    note: str | None


@dataclass(frozen=True)
class Shown:
    """A finished sweep. `judged`: see `softprompt sweep --json`; `log`: the keys whose range is logarithmic."""

    name: str
    keys: tuple[str, ...]
    trials: Sequence[Trial]
    best: int
    prompt: str
    judged: dict[str, Any]
    importance: dict[str, float]
    log: Collection[str]


def write_sweep(shown: Shown, file: Path) -> Path:
    """Writes the page, in place of an earlier one. Raises RunError when it cannot be written; MissingPackage without matplotlib."""
    try:
        write_text(file, build_page(shown))
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror}") from None
    return file


def build_page(shown: Shown) -> str:
    """The page as text."""
    from softprompt.report import MARK, environment
    from softprompt.report.charts import parallel, words

    best = next(one for one in shown.trials if one.number == shown.best)
    drawn = [one for one in shown.trials if one.loss is not None]
    order = sorted(shown.trials, key=lambda one: (one.loss is None, one.loss or 0.0, one.number))
    axes = [(key, [one.values[key] for one in drawn], key in shown.log) for key in shown.keys]
    chart = parallel("Parallel coordinates", axes, [one.loss or 0.0 for one in drawn], [one.state == "finished" for one in drawn])
    numbered = {key: found for key, values, _ in axes if (found := words(values))}
    page = (
        environment()
        .get_template("sweep.html")
        .render(
            mark=MARK,
            sweep=shown,
            best=best,
            order=order,
            chart=chart,
            setting=setting,
            scored=scored,
            numbered=numbered,
            counts=_counts(shown.trials),
        )
    )
    return page.lstrip()


def _counts(trials: Sequence[Trial]) -> str:
    found = {state: sum(one.state == state for one in trials) for state in dict.fromkeys(one.state for one in trials)}
    return ", ".join(f"{count} {state}" for state, count in found.items())


def setting(value: Any) -> str:
    """A setting's value in words."""
    return f"{value:.4g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def scored(metric: str, score: dict[str, float]) -> str:
    """A score with its interval."""
    if percent(metric):
        return f"{score['value']:.1%} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"
    return f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})"
