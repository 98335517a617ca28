"""Training speed and memory: softprompt against PEFT prompt tuning with transformers' Trainer, on the same rows.

    python -m benchmarks.train_speed --model FOLDER_OR_GGUF --workload tuned --json out.json [--steps 10] [--data FILE]
    python -m benchmarks.train_speed --model FOLDER_OR_GGUF --workload scaling --json scaling.json --plot scaling.png [--steps 3]

The sides alternate (ours, peft, ours, peft ...), every measurement in a fresh process; the first step of each is not
timed. Workloads are listed in workloads.py: tutorial and tuned (instructions; PEFT as the tutorials have it, and at its
best), classify (long prompt, short rows, both manners), long (texts of 1,024 tokens) and bank (8 prompts at once against
8 runs). --data takes a file of instruction/input/output rows for tutorial, tuned and long; without it, and for classify
and bank, rows are made of common words with the same lengths.

The result is one JSON object. Both ratios are ours / theirs (speed: above 1 is faster; memory: below 1 is less), as the
median over the pairs. Peak bytes are those above the idle process with its weights. loss_difference and gradient_cosine
compare ours, in the precision that is timed, with PEFT in float32 on the first step's rows.

scaling tells how speed and memory grow: with virtual tokens, text length, examples per step, and prompts in a bank (ours
only). One quantity is varied at a time; the others stay as in Point. PEFT runs at its best: grouped by length, at the faster
of the batch sizes in PEFT_SIZES. The JSON is written after every point, and a run that finds it goes on from there; points
that failed (out of memory, as a rule) are kept with their reason: delete them there to have them measured again.

Measure on a machine that does nothing else: with its cores taken by others, torch's threads wait for each other, and
small micro-batches (PEFT's more than ours) become many times slower.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.compare import compare, say
from benchmarks.measuring import Job, PeftSetting, SideFailed, machine, measure
from benchmarks.workloads import WORKLOADS, Dtype, Profile, Workload, make_rows, read_rows, write_rows
from softprompt.atomic import write_text
from softprompt.config import Config, ModelConfig
from softprompt.encode import make_encoder
from softprompt.engine.loading import load_tokenizer
from softprompt.errors import Error

PEFT_SIZES = (2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or .gguf file")
    parser.add_argument("--data", help="JSON file of instruction/input/output rows")
    parser.add_argument("--workload", required=True, choices=(*WORKLOADS, "scaling"))
    parser.add_argument("--steps", type=int, help="timed steps of every measurement; left out, 10, of scaling 3")
    parser.add_argument("--pairs", type=int, default=3, help="alternations of the sides")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of ours, and of PEFT at its best")
    parser.add_argument("--head-tolerance", type=float, help="train.head_tolerance of ours; left out, softprompt's default")
    parser.add_argument("--json", required=True, type=Path, help="file for the result; that of scaling is taken up again")
    parser.add_argument("--plot", type=Path, help="PNG to draw of scaling")
    given = parser.parse_args()
    scaling = given.workload == "scaling"
    if given.steps is None:
        given.steps = 3 if scaling else 10
    if min(given.steps, given.pairs) < 1:
        parser.error("at least one step and one pair are needed")
    if scaling:
        results = measure_points(given)
        if given.plot:
            draw(results["points"], given.plot)
        return
    try:
        result = run(given)
    except (Error, SideFailed) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Makes the rows, measures, and puts the result together."""
    workload = WORKLOADS[given.workload]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(given.model, given.dtype, f"{folder}/rows.jsonl", workload, given.steps, given.head_tolerance)
        lengths = prepare_rows(job, given.data)
        return {
            "workload": given.workload,
            **compare(job, given.pairs, Path(folder)),
            "steps": job.steps,
            "examples_per_step": workload.examples_per_step,
            "virtual_tokens": workload.virtual_tokens,
            "num_prompts": workload.num_prompts,
            "head_tolerance": Config().train.head_tolerance if job.head_tolerance is None else job.head_tolerance,
            **lengths,
            "model": Path(given.model).name,
            "data": Path(given.data).name if given.data and workload.takes_data else None,
            "machine": machine(),
        }


def prepare_rows(job: Job, data: str | None) -> dict[str, float]:
    """Writes the rows of a job and tells their mean lengths, as they are encoded (BOS counted)."""
    encoder = make_encoder(load_tokenizer(ModelConfig(name=job.model, dtype=job.dtype)), Config().data.template)
    rows = make_rows(job.workload, (job.steps + 1) * job.workload.examples_per_step, encoder, data, job.seed)
    write_rows(Path(job.rows), rows)
    encoded = read_rows(job.rows, encoder, job.workload.profile.longest)
    return {
        "mean_tokens": fmean(len(row) for row in encoded) + (encoder.bos_id is not None),
        "mean_supervised": fmean(row.num_supervised for row in encoded),
    }


def table(result: dict[str, Any]) -> str:
    """The result for the eye."""
    others = result.get("manners") or {"separate" if "separate_peak_bytes" in result else "peft": result}
    lines = [f"{'':12}{'samples/s':>12}{'peak MB':>10}{'speed':>9}{'memory':>8}  (ours / theirs)"]
    lines.append(f"{'ours':12}{result['ours_samples_per_second']:12.3f}{result['ours_peak_bytes'] / 1e6:10.1f}")
    for name, other in others.items():
        side = "separate" if name == "separate" else "peft"
        speed, peak = other[f"{side}_samples_per_second"], other[f"{side}_peak_bytes"] / 1e6
        lines.append(f"{name:12}{speed:12.3f}{peak:10.1f}{other['ratio']:8.2f}x{other['memory_ratio']:7.2f}x  {_setting(other)}")
    lines.append(f"{'planned':24}{(result['planned_peak_bytes'] or 0) / 1e6:10.1f}")
    lines.append(f"loss difference {result['loss_difference']:.2e}, gradient cosine {result['gradient_cosine']:.6f}")
    return "\n".join([f"{result['workload']} on {result['device']} in {result['dtype']}, {len(result['pairs'])} pairs", *lines])


def _setting(other: dict[str, Any]) -> str:
    setting = other.get("peft_setting")
    if setting is None:
        return ""
    return f"batch size {setting['batch_size']}, {setting['dtype']}" + (", grouped by length" if setting["grouped"] else "")


# ---- how they grow -------------------------------------------------------------------------------------------------


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

ROWS = (("samples_per_second", "samples per second", 1.0), ("peak_bytes", "peak memory above the idle model (MB)", 1e-6))
LOOKS = {"ours": ("softprompt", "o-", "#1f6fb4"), "peft": ("PEFT + Trainer, at its best", "s--", "#d1662f")}


def measure_points(given: argparse.Namespace) -> dict[str, Any]:
    """Every point that the file does not hold yet; the file is written after each."""
    results = take_up(given)
    for point, side in points():
        key = key_of(point, side)
        if key not in results["points"]:
            results["points"][key] = measure_point(given, point, side)
            say(key, results["points"][key].get("samples_per_second"))
            write_text(given.json, json.dumps(results, indent=2) + "\n")
    return results


def take_up(given: argparse.Namespace) -> dict[str, Any]:
    """The results so far. Raises SystemExit when they were made with other settings."""
    settings = {"model": given.model, "dtype": given.dtype, "steps": given.steps}
    if given.head_tolerance is not None:
        settings["head_tolerance"] = given.head_tolerance
    if not given.json.exists():
        return {"settings": settings, "machine": machine(), "points": {}}
    results = json.loads(given.json.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise SystemExit(f"{given.json} holds results of {results['settings']}, not of {settings}: name another file")
    return results


def points() -> Iterator[tuple[Point, str]]:
    """Everything to measure, column by column; columns meet in the same Point, which is measured once."""
    for name, column in COLUMNS.items():
        for value in column.values:
            for side in column.sides:
                yield replace(Point(), **{name: value}), side


def key_of(point: Point, side: str) -> str:
    return " ".join([side, *(f"{name}={value}" for name, value in asdict(point).items())])


def measure_point(given: argparse.Namespace, point: Point, side: str) -> dict[str, Any]:
    """The measurement as a dictionary; `failed` with the reason where there is none."""
    length = point.text_tokens
    profile = Profile(mean=round(0.875 * length), shortest=round(0.75 * length), longest=length, sigma=0.1, share=0.8)
    workload = Workload(point.virtual_tokens, point.examples_per_step, profile, manners=(), num_prompts=point.num_prompts)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(given.model, given.dtype, f"{folder}/rows.jsonl", workload, given.steps, given.head_tolerance)
        lengths = prepare_rows(job, None)
        settings = peft_settings(point, given.dtype) if side == "peft" else [None]
        tried = [_attempt(side, job, Path(folder), setting) for setting in settings]
    worked = [one for one in tried if "failed" not in one] or tried
    best: dict[str, Any] = max(worked, key=lambda one: float(one.get("samples_per_second", 0.0)))
    return {**best, **lengths}


def peft_settings(point: Point, dtype: Dtype) -> list[PeftSetting]:
    sizes = [size for size in PEFT_SIZES if size <= point.examples_per_step] or [point.examples_per_step]
    return [PeftSetting(dtype, size, grouped=True) for size in sizes]


def _attempt(side: str, job: Job, folder: Path, setting: PeftSetting | None) -> dict[str, Any]:
    used = {} if setting is None else {"batch_size": setting.batch_size}
    try:
        return {**used, **asdict(measure(side, job, folder, setting))}
    except SideFailed as error:
        return {**used, "failed": str(error)}


def draw(measured: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Speed above, memory below, a column per quantity; both sides in one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.5), layout="constrained")
    grid = figure.subplots(len(ROWS), len(COLUMNS), squeeze=False)
    for index, (name, column) in enumerate(COLUMNS.items()):
        for axes, (quantity, label, scale) in zip(grid[:, index], ROWS, strict=True):
            for side in column.sides:
                legend, style, color = LOOKS[side]
                axes.plot(*line(measured, name, column.values, side, quantity, scale), style, color=color, label=legend)
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
