"""What one measurement is asked for and answers, how it gets a process of its own, and what that reads about itself.

A process of its own, because memory that an earlier measurement touched would count as idle memory of the next one.
"""

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter

from benchmarks.workloads import Dtype, Workload

T = TypeVar("T")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Job:
    """What every side works on. `steps` are timed, one more before them is not; `rows` is a JSONL file of rows for all of them.

    `model`: folder or .gguf file. `head_tolerance`: None leaves softprompt's default.
    """

    model: str
    dtype: Dtype
    rows: str
    workload: Workload
    steps: int
    head_tolerance: float | None = None
    seed: int = 0

    @property
    def seeds(self) -> range:
        """Of its prompts."""
        return range(self.seed, self.seed + self.workload.num_prompts)


@dataclass(frozen=True)
class PeftSetting:
    """How the Trainer runs. `grouped`: rows of similar length share a batch."""

    dtype: Dtype
    batch_size: int
    grouped: bool


@dataclass(frozen=True)
class Spec:
    """One process: `side` is a key of sides.SIDES, `result` the file it writes, `start` a file of start rows to use."""

    side: str
    job: Job
    result: str
    peft: PeftSetting | None = None
    start: str | None = None


@dataclass(frozen=True)
class Measured:
    """`samples` are rows times prompts. `peak_bytes`: above the idle process with its weights; `planned_bytes`: what
    `softprompt plan` says that it would be (ours only)."""

    samples: int
    seconds: float
    samples_per_second: float
    peak_bytes: int
    device: str
    dtype: str
    planned_bytes: int | None = None


class SideFailed(RuntimeError):
    """A measuring process ended without a result, for want of memory as a rule."""


def load(kind: type[T], path: str | Path) -> T:
    """A dataclass from its JSON file."""
    return TypeAdapter(kind).validate_json(Path(path).read_bytes())


def save(value: object, path: str | Path) -> None:
    """A dataclass as a JSON file."""
    Path(path).write_bytes(TypeAdapter(type(value)).dump_json(value))


def run_side(spec: Spec) -> None:
    """Runs one side in a fresh process. Raises SideFailed with the end of what it wrote to stderr."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        save(spec, file.name)
        done = subprocess.run([sys.executable, "-m", "benchmarks.sides", file.name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SideFailed(f"{spec.side} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")


def measure(side: str, job: Job, folder: Path, peft: PeftSetting | None = None) -> Measured:
    """Runs a side that measures speed and memory. Raises SideFailed."""
    result = folder / "measured.json"
    run_side(Spec(side, job, str(result), peft))
    return load(Measured, result)


# ---- clock, memory and machine ---------------------------------------------------------------------------------------


class StepClock:
    """Seconds from the end of the first step to the end of the last. A GPU is waited for at these two moments only."""

    def __init__(self, device: torch.device, num_timed: int) -> None:
        self.device = device
        self.num_timed = num_timed
        self.ticks = 0
        self.began = self.ended = 0.0

    def tick(self) -> None:
        """To be called when a step has ended."""
        self.ticks += 1
        if self.ticks == 1:
            self.began = self._now()
        if self.ticks == self.num_timed + 1:
            self.ended = self._now()

    @property
    def seconds(self) -> float:
        assert self.ticks == self.num_timed + 1, f"{self.ticks} steps were taken, not {self.num_timed} and a first one"
        return self.ended - self.began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def watch_peak(model: torch.nn.Module, device: torch.device) -> Callable[[], int]:
    """Starts to watch memory; the returned function tells the most bytes used since, above what the idle model takes."""
    for parameter in model.parameters():  # weights that are mapped from a file count once they were read
        parameter.sum()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        idle = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - idle
    return _watch_process()


def _watch_process() -> Callable[[], int]:
    _return_free_memory()
    idle = _status_bytes("VmRSS")
    try:
        CLEAR.write_text("5")  # sets the high-water mark back to the present size, see proc(5)
    except OSError:
        return _watch_by_samples(idle)
    return lambda: _status_bytes("VmHWM") - idle


def _watch_by_samples(idle: int) -> Callable[[], int]:
    highest = idle

    def sample() -> None:
        nonlocal highest
        while True:
            highest = max(highest, _status_bytes("VmRSS"))
            time.sleep(SAMPLE_SECONDS)

    threading.Thread(target=sample, daemon=True).start()
    return lambda: highest - idle


def _return_free_memory() -> None:
    """What loading left behind in the allocator would be used again unseen, and hide as much of the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
    assert found, f"no {field} in {STATUS}"
    return int(found[1]) * 1024


def die_first() -> None:
    """When memory runs out, the system ends this process and not one that others wait for."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:  # no such file outside of Linux: then the system chooses
        return


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "tf32": torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), flags=re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor()
