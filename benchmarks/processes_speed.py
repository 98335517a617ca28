"""Several processes of one thread each against one process that has all threads: samples per second, and what talking to each other costs.

    python -m benchmarks.processes_speed --model FOLDER_OR_GGUF --json out.json [--processes 2] [--steps 3] [--pairs 3] [--data FILE]

The workload is the tutorial's (workloads.py): 16 instructions a step, 17 virtual tokens. The sides alternate, every measurement in fresh
processes, which are started as torchrun starts them; the first step is not timed, and evaluations and checkpoints are no part of a step.
What talking costs is measured in a run of its own, where they wait for each other before every word, so that only the word is counted.

Measure on a machine that does nothing else, with as many cores as processes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks.measuring import Job, machine
from benchmarks.train_speed import prepare_rows
from benchmarks.workloads import PROMPT_TEXT, WORKLOADS
from softprompt.atomic import write_text
from softprompt.config import Config, load_config
from softprompt.events import Step
from softprompt.training import train

WORDS = ("all_to_all_single", "all_gather", "all_reduce", "broadcast")  # of torch.distributed that a run uses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or .gguf file")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--data", help="JSON file of instruction/input/output rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of every measurement")
    parser.add_argument("--pairs", type=int, default=3, help="alternations of the sides")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of the run")
    parser.add_argument("--side", choices=("plain", "counting"), help=argparse.SUPPRESS)  # a process that measures, of the run in --model
    given = parser.parse_args()
    if given.side:
        measure(load_config(given.model), given.json, counting=given.side == "counting")
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(given, Path(folder))
    write_text(given.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job = Job(given.model, "float32", str(folder / "rows.jsonl"), WORKLOADS["tutorial"], given.steps)
    lengths = prepare_rows(job, given.data)
    config = configured(job, given.set)
    pairs = []
    for _ in range(given.pairs):
        one, several = (seconds_of(config, folder, size, given.processes // size)["seconds"] for size in (1, given.processes))
        pairs.append({"one": one, "several": several})
        print(f"a step takes {one:.3f} s, shared {several:.3f} s: {one / several:.2f}x", flush=True)
    talking = seconds_of(config, folder, given.processes, 1, "counting")
    return {
        "processes": given.processes,
        "speed": median(pair["one"] / pair["several"] for pair in pairs),
        "samples_per_second": job.workload.examples_per_step / median(pair["several"] for pair in pairs),
        "talking_share_of_a_step": talking["talking"] / talking["seconds"],
        "talking_seconds_of_a_step": talking["talking"],
        "pairs": pairs,
        **lengths,
        "model": Path(given.model).name,
        "machine": machine(),
    }


def configured(job: Job, settings: list[str]) -> Config:
    """A run that does nothing but steps."""
    path = Path(job.model)
    base = {"gguf_file": str(path)} if path.suffix == ".gguf" else {"name": str(path)}
    how = {"steps": job.steps + 1, "examples_per_step": job.workload.examples_per_step, "save_every": job.steps + 2}
    sections = {
        "model": {**base, "dtype": "float32", "device": "cpu"},
        "data": {"train": job.rows, "max_length": job.workload.profile.longest},
        "prompt": {"length": job.workload.virtual_tokens, "text": PROMPT_TEXT},
        "train": how,
    }
    return load_config(sections, settings)


def seconds_of(config: Config, folder: Path, size: int, threads: int, side: str = "plain") -> dict[str, float]:
    """Runs it by so many processes. Returns what the first one has measured of a step."""
    place = Path(tempfile.mkdtemp(dir=folder))
    file = place / "run.toml"
    file.write_text(config.model_copy(update={"train": config.train.model_copy(update={"out": str(place / "run")})}).to_toml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    line = [sys.executable, "-m", "benchmarks.processes_speed", "--model", str(file), "--json", str(place / "out.json"), "--side", side]
    processes = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": str(threads)}
        processes.append(subprocess.Popen(line, env={**os.environ, **meeting, **own}))
    if any(process.wait() for process in processes):
        raise SystemExit("a process has failed: see above")
    found: dict[str, float] = json.loads((place / "out.json").read_text())
    return found


def measure(config: Config, out: Path, *, counting: bool) -> None:
    """One process of a run: the median seconds of a step, and of its words where they are counted."""
    spoken = [0.0]
    if counting:
        for name in WORDS:
            setattr(dist, name, counted(getattr(dist, name), spoken))
    seconds, talking, before = [], [], 0.0
    for event in train(config):
        if isinstance(event, Step):
            seconds.append(event.seconds)
            talking.append(spoken[0] - before)
            before = spoken[0]
    if os.environ["RANK"] == "0":
        write_text(out, json.dumps({"seconds": median(seconds[1:]), "talking": median(talking[1:])}))


def counted(say: Callable[..., Any], spoken: list[float]) -> Callable[..., Any]:
    """The same, timed from when all are there."""

    def said(*args: Any, **how: Any) -> Any:
        dist.barrier(group=how.get("group"))
        began = time.perf_counter()
        result = say(*args, **how)
        spoken[0] += time.perf_counter() - began
        return result

    return said


if __name__ == "__main__":
    main()
