"""How speed and memory grow: with virtual tokens, text length, examples per step, and prompts in a bank (ours only).

    python benchmarks/scaling.py --model FOLDER_OR_GGUF --json scaling.json --plot scaling.png [--steps N]

One quantity is varied at a time; the others stay as in Point. PEFT runs at its best: grouped by length, at the faster of
the batch sizes in PEFT_SIZES. Every measurement has a fresh process; its first step is not timed. The JSON is written
after every point, and a run that finds it goes on from there; points that failed (out of memory, as a rule) are kept
with their reason: delete them there to have them measured again. The plot needs matplotlib.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compare import say
from jobs import Job, PeftSetting, SideFailed, measure
from train_speed import Asked, make_job, prepare_rows
from workloads import Profile, Workload

from softprompt.atomic import write_text

PEFT_SIZES = (2, 8)


@dataclass(frozen=True)
class Point:
    """One workload; the defaults are what stays when another quantity is varied."""

    virtual_tokens: int = 16
    text_tokens: int = 64
    examples_per_step: int = 8
    num_prompts: int = 1


@dataclass(frozen=True)
class Column:
    """A quantity of Point that is varied. `sides`: who is measured."""

    label: str
    values: tuple[int, ...]
    sides: tuple[str, ...] = ("ours", "peft")


COLUMNS = {
    "virtual_tokens": Column("virtual tokens", (1, 16, 50, 100, 200)),
    "text_tokens": Column("text length (tokens)", (32, 64, 128, 256)),
    "examples_per_step": Column("examples per step", (1, 4, 8, 16, 32)),
    "num_prompts": Column("prompts in the bank", (1, 2, 4, 8), sides=("ours",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or .gguf file")
    parser.add_argument("--json", required=True, type=Path, help="results; taken up again where it exists")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a measurement")
    given = parser.parse_args()
    asked = Asked(given.model, "scaling", given.steps, None, 1, given.dtype, None)
    results = measure_all(asked, given.json)
    if given.plot:
        draw(results["points"], given.plot)


def measure_all(asked: Asked, path: Path) -> dict[str, Any]:
    """Every point that the file does not hold yet; the file is written after each."""
    results = take_up(asked, path)
    for point, side in points():
        key = key_of(point, side)
        if key not in results["points"]:
            results["points"][key] = measure_point(asked, point, side)
            say(key, results["points"][key].get("samples_per_second"))
            write_text(path, json.dumps(results, indent=2) + "\n")
    return results


def take_up(asked: Asked, path: Path) -> dict[str, Any]:
    """The results so far. Raises SystemExit when they were made with other settings."""
    from meters import machine

    settings = {"model": asked.model, "dtype": asked.dtype, "steps": asked.steps}
    if not path.exists():
        return {"settings": settings, "machine": machine(), "points": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise SystemExit(f"{path} holds results of {results['settings']}, not of {settings}: name another file")
    return results


def points() -> Iterator[tuple[Point, str]]:
    """Everything to measure, column by column; columns meet in the same Point, which is measured once."""
    for name, column in COLUMNS.items():
        for value in column.values:
            for side in column.sides:
                yield replace(Point(), **{name: value}), side


def key_of(point: Point, side: str) -> str:
    return " ".join([side, *(f"{name}={value}" for name, value in asdict(point).items())])


def measure_point(asked: Asked, point: Point, side: str) -> dict[str, Any]:
    """The measurement as a dictionary; `failed` with the reason where there is none."""
    length = point.text_tokens
    profile = Profile(mean=round(0.875 * length), shortest=round(0.75 * length), longest=length, sigma=0.1, share=0.8)
    workload = Workload(point.virtual_tokens, point.examples_per_step, profile, manners=(), num_prompts=point.num_prompts)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(asked, workload, str(Path(folder) / "rows.jsonl"))
        lengths = prepare_rows(workload, job, None)
        settings = peft_settings(point, asked.dtype) if side == "peft" else [None]
        tried = [_attempt(side, job, Path(folder), setting) for setting in settings]
    worked = [one for one in tried if "failed" not in one] or tried
    best: dict[str, Any] = max(worked, key=lambda one: float(one.get("samples_per_second", 0.0)))
    return {**best, **lengths}


def peft_settings(point: Point, dtype: str) -> list[PeftSetting]:
    sizes = [size for size in PEFT_SIZES if size <= point.examples_per_step] or [point.examples_per_step]
    return [PeftSetting(dtype, size, grouped=True) for size in sizes]


def _attempt(side: str, job: Job, folder: Path, setting: PeftSetting | None) -> dict[str, Any]:
    used = {} if setting is None else {"batch_size": setting.batch_size}
    try:
        return {**used, **asdict(measure(side, job, folder, setting))}
    except SideFailed as error:
        return {**used, "failed": str(error)}


# ---- the figure ----------------------------------------------------------------------------------------------------

ROWS = (("samples_per_second", "samples per second", 1.0), ("peak_bytes", "peak memory above the idle model (MB)", 1e-6))
LOOKS = {"ours": ("softprompt", "o-", "#1f6fb4"), "peft": ("PEFT + Trainer, at its best", "s--", "#d1662f")}


def draw(measured: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Speed above, memory below, a column per quantity; both sides in one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.5), layout="constrained")
    grid = figure.subplots(len(ROWS), len(COLUMNS), squeeze=False)
    for index, (name, column) in enumerate(COLUMNS.items()):
        for axes, (quantity, label, scale) in zip(grid[:, index], ROWS, strict=True):
            for side in column.sides:
                _draw_line(axes, side, *line(measured, name, column.values, side, quantity, scale))
            _label(axes, column.label, label if index == 0 else "", column.values, logarithmic=name == "text_tokens")
    grid[0, 0].legend()
    figure.savefig(path, dpi=130)


def line(
    measured: Mapping[str, Mapping[str, Any]], name: str, values: Sequence[int], side: str, quantity: str, scale: float
) -> tuple[list[int], list[float]]:
    """x and y of one side in one column, without the points that failed."""
    found = {value: measured[key_of(replace(Point(), **{name: value}), side)].get(quantity) for value in values}
    kept = {value: y * scale for value, y in found.items() if y is not None}
    return list(kept), list(kept.values())


def _draw_line(axes: Any, side: str, x: Sequence[int], y: Sequence[float]) -> None:
    label, style, color = LOOKS[side]
    axes.plot(x, y, style, color=color, label=label)


def _label(axes: Any, x_label: str, y_label: str, values: Sequence[int], logarithmic: bool) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if logarithmic:  # both quantities change by about tenfold
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.axhline(0, alpha=0)  # unseen: the margin above is then one of the whole height
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
