"""A sweep from outside: its processes are started and watched here, and its best prompt is judged."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from softprompt.errors import RunError
from softprompt.events import STEP
from softprompt.runlog import RunFolder
from softprompt.sweep.folder import Sweep
from softprompt.sweep.study import Seen, Trials

LOOK_SECONDS = 0.5  # between two looks at the trials
TAIL = 100_000  # bytes of a run's stream that hold its last step
LAUNCHED = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # say that processes share one run (engine/launched.py), which these do not


@dataclass(frozen=True)
class Progress:
    """`trials` as they stand; `share`: how much of all steps is taken; `seconds` since this process looked for the first time, and `left`
    to the end, where that can be said; `workers` that are at work here."""

    trials: tuple[Seen, ...]
    share: float
    seconds: float
    left: float | None
    workers: int


def running(sweep: Sweep, workers: int) -> Iterator[Progress]:
    """Works on a sweep with so many processes until all its trials are over, here or elsewhere. On Ctrl-C and SIGTERM each of them writes a
    checkpoint first. Raises RunError when they have ended and trials are left."""
    trials = Trials(sweep)
    trials.fill()
    if trials.over():
        yield _progress(sweep, trials, 0.0, None, 0)
        return
    began, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    processes = [_started(sweep, number, workers) for number in range(workers)]
    first = _share(sweep, trials.seen())
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        while (alive := sum(process.poll() is None for process in processes)) and not trials.over():
            yield _progress(sweep, trials, time.monotonic() - began, first, alive)
            time.sleep(LOOK_SECONDS)
        if not trials.over():
            codes = sorted({process.returncode for process in processes})
            ended = ", ".join(f"killed by signal {-code}" if code < 0 else f"exit code {code}" for code in codes)
            raise RunError(f"the sweep's processes have ended before it did ({ended}); go on with: softprompt sweep --resume {sweep.path}")
        yield _progress(sweep, trials, time.monotonic() - began, first, 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _started(sweep: Sweep, number: int, workers: int) -> "subprocess.Popen[bytes]":
    """A process that works on the sweep, with its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    own.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    line = [sys.executable, "-m", "softprompt.sweep.work", str(sweep.path), str(number)]
    return subprocess.Popen(line, env=own, stdout=subprocess.DEVNULL, start_new_session=True)  # Ctrl-C comes from here, once


def _progress(sweep: Sweep, trials: Trials, seconds: float, first: float | None, workers: int) -> Progress:
    seen = trials.seen()
    share = _share(sweep, seen)
    done = share - (first or 0.0)
    return Progress(tuple(seen), share, seconds, seconds / done * (1 - share) if first is not None and done > 0 else None, workers)


def _share(sweep: Sweep, seen: list[Seen]) -> float:
    """How much of the trials is done: whole ones, and of those that run the share of their steps."""
    done = 0.0
    for bank, numbers in enumerate(sweep.banks):
        left = [number for number in numbers if seen[number].state != "failed"]
        share = _taken(RunFolder(sweep.run_of(bank, left))) if any(seen[number].state == "running" for number in left) else 0.0
        done += sum({"waiting": 0.0, "running": share}.get(seen[number].state, 1.0) for number in numbers)
    return done / len(seen)


def _taken(run: RunFolder) -> float:
    """The share of a run's steps that are taken, by the end of its stream."""
    data = run.read("data.json")
    if not data or not run.events_file.is_file():
        return 0.0
    with open(run.events_file, "rb") as stream:
        stream.seek(-min(TAIL, run.events_file.stat().st_size), os.SEEK_END)
        steps = [line for line in stream.read().split(b"\n")[:-1] if line.startswith(STEP)]
    return json.loads(steps[-1])["step"] / data["steps"] if steps else 0.0
