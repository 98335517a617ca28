"""What a run reports while it goes on: the wire between a run and whoever wants to see it.

Every event is a JSON line, `{"event": "step", "step": 3, ...}`, and the run folder's metrics.jsonl is their stream: terminal,
notebook, report, doctor and trackers read it, on this machine or another. Values only; torch is not imported.
"""

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

Value = TypeVar("Value")
Cell = str | int | float | None


@dataclass(frozen=True)
class Preparing:
    """`num_rows` rows were read and tokenized in `seconds`, before the run is set up; of about `total`, where that is known. The run
    folder's stream does not hold it."""

    num_rows: int
    total: int | None
    seconds: float


@dataclass(frozen=True)
class Studying:
    """`done` of `total` questions were asked ("questions"), or answered ("answers"), before a distillation is set up. `note`: what all of
    it will cost, once. The run folder's stream does not hold it."""

    doing: Literal["questions", "answers"]
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Searching:
    """A step of the search for a rate was taken, before the run is set up."""

    step: int
    num_steps: int


@dataclass(frozen=True)
class Found:
    """The rate that the run will use, and the loss of every rate that was tried."""

    relative_lr: float
    losses: dict[float, float]


@dataclass(frozen=True)
class Started:
    """The run is set up. `first_step` is not 0 when it goes on from a checkpoint. `base`: its name. `notes`: by prompt, where it
    starts from. `row_rms`: RMS of the base's embedding rows."""

    run: Path
    base: str
    num_steps: int
    first_step: int
    num_train: int
    num_eval: int
    num_rejected: int
    notes: dict[str, str]
    num_trainable: int
    num_parameters: int
    row_rms: float


@dataclass(frozen=True)
class Step:
    """An optimizer step was taken. Of every prompt of the run: `losses` per supervised token, `lrs`, `grad_norms` before clipping, and
    `movements`: how far the rows are from where they started, RMS, as a share of the RMS of the base's embedding rows. `loss`, `lr`,
    `grad_norm` and `movement` are their means. `num_tokens` real tokens of the step's rows, counted for every prompt that saw them."""

    step: int
    losses: tuple[float, ...]
    lrs: tuple[float, ...]
    grad_norms: tuple[float, ...]
    movements: tuple[float, ...]
    num_tokens: int
    seconds: float

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def lr(self) -> float:
        return fmean(self.lrs)

    @property
    def grad_norm(self) -> float:
        return fmean(self.grad_norms)

    @property
    def movement(self) -> float:
        return fmean(self.movements)


@dataclass(frozen=True)
class Evaluated:
    """Loss per supervised token on the held-out rows after `step` steps: the mean over the prompts, and that of each."""

    step: int
    loss: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Warned:
    """The doctor found something of these prompts after `step` steps, before the run is over; it says so once for a prompt. `check`:
    which of its checks."""

    step: int
    prompts: tuple[str, ...]
    check: str
    finding: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written, and lies on disk; `train.keep` says how long."""

    step: int
    path: Path


@dataclass(frozen=True)
class Sampled:
    """What the run's best prompt answers to the first held-out rows, (question, wanted, answer); where trackers want to show it."""

    step: int
    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Finished:
    """The run is done; `result` is what `softprompt train --json` writes."""

    result: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.result["steps"])


Event = Preparing | Studying | Searching | Found | Started | Step | Evaluated | Warned | Saved | Sampled | Finished

KINDS: dict[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (Preparing, Studying, Searching, Found, Started, Step, Evaluated, Warned, Saved, Sampled, Finished)
}
STEP = b'{"event": "step", '  # how the line of most events begins
_ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in KINDS.items() if kind is not Finished}
_STEPS = _ADAPTERS["step"]


def returned(events: Generator[Any, None, Value]) -> Value:
    """What a generator of events returns, run to its end."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            found: Value = end.value
            return found


def to_line(event: Event) -> str:
    """The event as one line of JSON, without its end."""
    name = type(event).__name__.lower()
    if isinstance(event, Finished):
        return json.dumps({"event": name, "step": event.step, **event.result}, ensure_ascii=False)
    return json.dumps({"event": name, **_ADAPTERS[name].dump_python(event, mode="json")}, ensure_ascii=False)


def from_line(line: bytes) -> Event:
    """The event of a line in UTF-8. Raises ValueError for what is none, with the reason where the line is JSON."""
    if line.startswith(STEP):  # a run of days has a million of them: read by a faster way, unless something is wrong
        try:
            step: Step = _STEPS.validate_json(line)
            return step
        except ValidationError:
            pass
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("no object")
    name = values.pop("event", None)
    if name == "finished" and "step" in values:
        return Finished({key: value for key, value in values.items() if key != "step"})
    if name not in _ADAPTERS:
        raise ValueError(f"event: {name!r} is not known")
    try:
        event: Event = _ADAPTERS[name].validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return event
