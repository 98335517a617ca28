"""One comparison: PEFT's best batch size, alternating pairs, medians, and whether both sides compute the same function."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import Job, Measured, PeftSetting, SideFailed, Spec, measure, run_side
from benchmarks.workloads import MANNERS, Manner

TRIAL_STEPS = 2
SLOWER = 0.1  # the trial ends at a batch size that is slower by this share than a smaller one


@dataclass(frozen=True)
class Other:
    """What ours is compared with: a side, see measuring.Spec. Of PEFT its setting, and what the trial of batch sizes gave: samples per
    second, or None where one failed."""

    side: str
    setting: PeftSetting | None = None
    trial: Mapping[int, float | None] = field(default_factory=dict)


Pair = Mapping[str, Measured]  # "ours" and the names of the others


def compare(job: Job, num_pairs: int, folder: Path) -> dict[str, Any]:
    """All results of a workload but those that its rows and the machine give."""
    checked = check_gradients(job, folder)
    others = {name: choose(MANNERS[name], job, folder) for name in job.workload.manners} or {"separate": Other("separate")}
    pairs = [_measure_pair(job, others, folder, number) for number in range(1, num_pairs + 1)]
    return {**_summary(pairs, others), **checked, "pairs": [{name: asdict(one) for name, one in pair.items()} for pair in pairs]}


def choose(manner: Manner, job: Job, folder: Path) -> Other:
    """The manner's setting for a job; a short trial picks the fastest batch size. Raises SideFailed when none works."""
    sizes = [size for size in manner.batch_sizes if job.workload.examples_per_step % size == 0]
    settings = {size: PeftSetting(manner.dtype or job.dtype, size, manner.grouped) for size in sizes}
    if len(settings) == 1:
        return Other("peft", settings[sizes[0]])
    short = replace(job, steps=min(TRIAL_STEPS, job.steps))
    trial: dict[int, float | None] = {}
    failure: SideFailed | None = None
    for size, setting in settings.items():
        try:
            trial[size] = measure("peft", short, folder, setting).samples_per_second
        except SideFailed as error:
            trial[size], failure = None, error
        say(f"trial: PEFT with batch size {size}", trial[size])
        if (trial[size] or 0.0) < (1 - SLOWER) * max(speed or 0.0 for speed in trial.values()):
            break
    worked = {size: speed for size, speed in trial.items() if speed is not None}
    if not worked:
        assert failure is not None
        raise failure
    return Other("peft", settings[max(worked, key=lambda size: worked[size])], trial)


def check_gradients(job: Job, folder: Path) -> dict[str, float]:
    """Ours against PEFT in float32 on the first step's rows: the worst of the job's prompts."""
    ours, reference = folder / "ours.npz", folder / "reference.npz"
    run_side(Spec("gradient", job, str(ours)))
    run_side(Spec("reference", job, str(reference), start=str(ours)))
    mine, theirs = np.load(ours), np.load(reference)
    cosines = [cosine(a_PH, b_PH) for a_PH, b_PH in zip(mine["gradient"], theirs["gradient"], strict=True)]
    return {"loss_difference": float(np.abs(mine["loss"] - theirs["loss"]).max()), "gradient_cosine": min(cosines)}


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of two gradients of one shape, summed in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def _measure_pair(job: Job, others: Mapping[str, Other], folder: Path, number: int) -> Pair:
    pair = {"ours": measure("ours", job, folder)}
    say(f"pair {number}: ours", pair["ours"].samples_per_second)
    for name, other in others.items():
        pair[name] = measure(other.side, job, folder, other.setting)
        say(f"pair {number}: {name}", pair[name].samples_per_second)
    return pair


def say(what: str, speed: float | None) -> None:
    """Progress, a line per measurement."""
    print(f"{what}: " + ("failed" if speed is None else f"{speed:.3f} samples/s"), flush=True)


# ---- the numbers of the result -------------------------------------------------------------------------------------


def _summary(pairs: Sequence[Pair], others: Mapping[str, Other]) -> dict[str, Any]:
    ours = [pair["ours"] for pair in pairs]
    manners = {name: _against(pairs, name, other) for name, other in others.items()}
    return {
        "device": ours[0].device,
        "dtype": ours[0].dtype,
        "ours_samples_per_second": median(one.samples_per_second for one in ours),
        "ours_peak_bytes": round(median(one.peak_bytes for one in ours)),
        "planned_peak_bytes": ours[0].planned_bytes,
        **manners[list(manners)[-1]],
        **({"manners": manners} if len(manners) > 1 else {}),
    }


def _against(pairs: Sequence[Pair], name: str, other: Other) -> dict[str, Any]:
    """Medians of one opponent. Both ratios are ours / theirs, each the median over the pairs."""
    theirs = [pair[name] for pair in pairs]
    result: dict[str, Any] = {
        f"{other.side}_samples_per_second": median(one.samples_per_second for one in theirs),
        f"{other.side}_peak_bytes": round(median(one.peak_bytes for one in theirs)),
        "ratio": median(pair["ours"].samples_per_second / pair[name].samples_per_second for pair in pairs),
        "memory_ratio": median(pair["ours"].peak_bytes / max(1, pair[name].peak_bytes) for pair in pairs),
    }
    if other.setting is not None:
        result["peft_setting"] = {**asdict(other.setting), "dtype": theirs[0].dtype, "trial": other.trial}
    return result
