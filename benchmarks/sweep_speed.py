"""A sweep of many trials by two processes against as many separate runs: the seconds of both.

    python -m benchmarks.sweep_speed --model FOLDER --json out.json [--data FILE --eval FILE] [--trials 30] [--set train.steps=20]

The separate runs are `softprompt train` one after the other, each with all cores, with the same settings as the trials; their seconds are
measured of `--runs` of them, spread over the trials, and multiplied. Nothing is pruned on either side. Rows that are not named are made up:
this measures time alone. The runs are timed first, then the sweep with all that belongs to it, judging
and report too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import machine
from softprompt.atomic import write_text
from softprompt.sweep.folder import create_sweep

SPACE = ("prompt.length=8,16,32", "optim.relative_lr=0.05..0.5:log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or .gguf file")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--data", help="training rows")
    parser.add_argument("--eval", help="held-out rows")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5, help="separate runs that are timed")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of all trials")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(given, Path(folder))
    write_text(given.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = [f"model.name={given.model}", "model.device=cpu", *rows(given, folder), "train.examples_per_step=16", "train.steps=20"]
    settings += given.set
    drawn = create_sweep([*settings, f"train.out={folder / 'drawn'}", *SPACE], trials=given.trials).spec.trials
    picked = [drawn[place * len(drawn) // given.runs] for place in range(given.runs)]
    apart = []
    for number, trial in enumerate(picked):
        own = [f"{key}={value}" for key, value in trial.items()]
        apart.append(timed("train", *settings, *own, f"train.out={folder / f'run-{number}'}"))
        print(f"a run of its own: {apart[-1]:.1f} s", flush=True)
    how = ["--trials", str(given.trials), "--workers", str(given.workers), "--bank", str(given.bank), "--no-prune"]
    swept = timed("sweep", *settings, f"train.out={folder / 'sweep'}", *SPACE, *how)
    separate = given.trials * median(apart)
    return {
        "trials": given.trials,
        "workers": given.workers,
        "bank": given.bank,
        "speed": separate / swept,
        "seconds_of_the_sweep": swept,
        "seconds_of_a_run": apart,
        "seconds_of_all_runs": separate,
        "model": Path(given.model).name,
        "machine": machine(),
    }


def timed(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "softprompt", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def rows(given: argparse.Namespace, folder: Path) -> list[str]:
    """The settings that name the rows; made up where none are named."""
    found = []
    for split, number in (("train", 320), ("eval", 60)):
        file = given.data if split == "train" else given.eval
        if file is None:
            lines = [
                {"prompt": f"{split} {place}: {'please ' * (place % 8)}bring tea", "completion": "tea " * 10} for place in range(number)
            ]
            file = folder / f"{split}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        found.append(f"data.{split}={file}")
    return found


if __name__ == "__main__":
    main()
