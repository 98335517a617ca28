"""What one measurement is asked for, what it answers, and how it gets a process of its own. Nothing heavy is imported.

A process of its own, because memory that an earlier measurement touched would count as idle memory of the next one.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

SCRIPT = Path(__file__).with_name("train_speed.py")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What every side works on. `steps` are timed, one more before them is not; `rows` is a JSONL file of rows for all of them.

    `model`: folder or .gguf file. `head_tolerance`: None leaves softprompt's default. `random_start`: prompts start from noise
    by their seeds, not all from the same text.
    """

    model: str
    dtype: str
    rows: str
    max_length: int
    prompt_text: str
    virtual_tokens: int
    num_prompts: int
    examples_per_step: int
    steps: int
    random_start: bool = False
    head_tolerance: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class PeftSetting:
    """How the Trainer runs. `grouped`: rows of similar length share a batch."""

    dtype: str
    batch_size: int
    grouped: bool


@dataclass(frozen=True)
class Spec:
    """One process: `side` is a key of ours.SIDES or theirs.SIDES, `result` the file it writes, `start` a file of start rows to use."""

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
        done = subprocess.run([sys.executable, str(SCRIPT), "--side", file.name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SideFailed(f"{spec.side} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")


def measure(side: str, job: Job, folder: Path, peft: PeftSetting | None = None) -> Measured:
    """Runs a side that measures speed and memory. Raises SideFailed."""
    result = folder / "measured.json"
    run_side(Spec(side, job, str(result), peft))
    return load(Measured, result)
