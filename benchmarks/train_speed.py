"""Training speed and memory: softprompt against PEFT prompt tuning with transformers' Trainer, on the same rows.

    python benchmarks/train_speed.py --model FOLDER_OR_GGUF --workload tuned --steps 10 --json out.json

The sides alternate (ours, peft, ours, peft ...), every measurement in a fresh process; the first step of each is not
timed. Workloads are listed in workloads.py: tutorial and tuned (instructions; PEFT as the tutorials have it, and at its
best), classify (long prompt, short rows, both manners), long (texts of 1,024 tokens) and bank (8 prompts at once against
8 runs). --data takes a file of instruction/input/output rows for tutorial, tuned and long; without it, and for classify
and bank, rows are made of common words with the same lengths.

The result is one JSON object. Both ratios are ours / theirs (speed: above 1 is faster; memory: below 1 is less), as the
median over the pairs. Peak bytes are those above the idle process with its weights. loss_difference and gradient_cosine
compare ours, in the precision that is timed, with PEFT in float32 on the first step's rows.

Measure on a machine that does nothing else: with its cores taken by others, torch's threads wait for each other, and
small micro-batches (PEFT's more than ours) become many times slower.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jobs import Job, SideFailed, Spec, load
from workloads import PROMPT_TEXT, WORKLOADS, Workload

from softprompt.errors import Error


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    model: str
    workload: str
    steps: int
    data: str | None
    pairs: int
    dtype: str
    head_tolerance: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a measuring process, started by jobs.run_side
    parser.add_argument("--model", help="folder or .gguf file")
    parser.add_argument("--data", help="JSON file of instruction/input/output rows")
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of every measurement")
    parser.add_argument("--pairs", type=int, default=3, help="alternations of the sides")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of ours, and of PEFT at its best")
    parser.add_argument("--head-tolerance", type=float, help="train.head_tolerance of ours; left out, softprompt's default")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    if given.side:
        measure_side(given.side)
        return
    if not (given.model and given.workload and given.json) or min(given.steps, given.pairs) < 1:
        parser.error("--model, --workload and --json are needed, and at least one step and one pair")
    asked = Asked(given.model, given.workload, given.steps, given.data, given.pairs, given.dtype, given.head_tolerance)
    try:
        result = run(asked)
    except (Error, SideFailed) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def measure_side(spec_file: str) -> None:
    """What a measuring process does."""
    import meters

    meters.die_first()
    spec = load(Spec, spec_file)
    if spec.side in ("peft", "reference"):
        from theirs import SIDES
    else:
        from ours import SIDES
    SIDES[spec.side](spec)


def run(asked: Asked) -> dict[str, Any]:
    """Makes the rows, measures, and puts the result together."""
    from compare import compare
    from meters import machine

    from softprompt.config import Config

    workload = WORKLOADS[asked.workload]
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(asked, workload, str(Path(folder) / "rows.jsonl"))
        lengths = prepare_rows(workload, job, asked.data)
        return {
            "workload": asked.workload,
            **compare(workload, job, asked.pairs, Path(folder)),
            "steps": job.steps,
            "examples_per_step": job.examples_per_step,
            "virtual_tokens": job.virtual_tokens,
            "num_prompts": job.num_prompts,
            "head_tolerance": Config().train.head_tolerance if job.head_tolerance is None else job.head_tolerance,
            **lengths,
            "model": Path(asked.model).name,
            "data": Path(asked.data).name if asked.data and workload.takes_data else None,
            "machine": machine(),
        }


def make_job(asked: Asked, workload: Workload, rows: str) -> Job:
    return Job(
        model=asked.model,
        dtype=asked.dtype,
        rows=rows,
        max_length=workload.profile.longest,
        prompt_text=PROMPT_TEXT,
        virtual_tokens=workload.virtual_tokens,
        num_prompts=workload.num_prompts,
        examples_per_step=workload.examples_per_step,
        steps=asked.steps,
        random_start=workload.num_prompts > 1,
        head_tolerance=asked.head_tolerance,
    )


def prepare_rows(workload: Workload, job: Job, data: str | None) -> dict[str, float]:
    """Writes the rows of a job and tells their mean lengths, as they are encoded (BOS counted)."""
    from rows import make_rows, read_rows, write_rows

    from softprompt.config import Config, ModelConfig
    from softprompt.encode import make_encoder
    from softprompt.engine.loading import load_tokenizer

    encoder = make_encoder(load_tokenizer(ModelConfig(name=job.model, dtype=job.dtype)), Config().data.template)  # type: ignore[arg-type]
    rows = make_rows(workload, (job.steps + 1) * job.examples_per_step, encoder, data, job.seed)
    write_rows(Path(job.rows), rows)
    encoded = read_rows(job.rows, encoder, job.max_length)
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


if __name__ == "__main__":
    main()
