"""What a run reports while it goes on. Values only: whoever loops over `train` prints, plots or streams them."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from softprompt.model import FrozenBase


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
    """The run is set up. `first_step` is not 0 when it goes on from a checkpoint. `notes`: by prompt, where it starts from."""

    run: Path
    base: FrozenBase
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
    """The doctor found something of these prompts after `step` steps, before the run is over; it says so once for a prompt."""

    step: int
    prompts: tuple[str, ...]
    finding: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The run is done; `result` is what `softprompt train --json` writes."""

    result: dict[str, Any]


Event = Searching | Found | Started | Step | Evaluated | Warned | Saved | Finished
