"""What a run needs to go on with the same bits: the rows, the optimizer's moments and a few counters.

The order of rows is a function of seed and step, and the base has no dropout, so there is no random state to keep.
A checkpoint folder is also a prompt folder (that of a bank holds one for each prompt): it loads like a finished prompt.
Checkpoints are written beside the steps, and those that `train.keep` does not name go once a newer one is there.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.artifact import write_prompt
from softprompt.atomic import new_folder, remove_folder
from softprompt.card import Card
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt
from softprompt.engine.world import World
from softprompt.errors import RunError
from softprompt.events import Saved
from softprompt.runlog import RunFolder

BEST = "best"  # the rows with the lowest held-out loss
PARTS, LAST = 10, 2  # train.keep = "some": parts of a run that keep a checkpoint each, and how many of the last


@dataclass(frozen=True)
class Scores:
    """Sums and losses of one prompt so far. `best_loss`: the lowest on the held-out rows after any step; `num_worse`: evaluations
    since then."""

    loss_sum: float = 0.0
    num_supervised: int = 0
    eval_loss_before: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    num_worse: int = 0

    @property
    def train_loss(self) -> float:
        """Mean loss per supervised token over all steps."""
        return self.loss_sum / max(1, self.num_supervised)

    def trained(self, loss: float, num_supervised: int) -> "Scores":
        """After a step with this mean loss over so many supervised tokens."""
        return replace(self, loss_sum=self.loss_sum + loss * num_supervised, num_supervised=self.num_supervised + num_supervised)

    def evaluated(self, loss: float, step: int) -> "Scores":
        """After an evaluation on the held-out rows; that of step 0 is before any training."""
        if step == 0:
            return replace(self, eval_loss_before=loss)
        if self.best_loss is None or loss < self.best_loss:
            return replace(self, best_loss=loss, best_step=step, num_worse=0)
        return replace(self, num_worse=self.num_worse + 1)


@dataclass(frozen=True)
class Counters:
    """A run after `step` optimizer steps; `num_examples` counts a row once for every prompt that saw it. `tokens_per_batch`: what
    memory allowed of the budget of a micro-batch so far, or None where all of it."""

    step: int = 0
    num_examples: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    data_fingerprint: str = ""
    base_fingerprint: str = ""
    scores: dict[str, Scores] = field(default_factory=dict)
    tokens_per_batch: int | None = None

    @property
    def best_steps(self) -> list[int]:
        """The steps after which a prompt had its lowest held-out loss."""
        return [scores.best_step for scores in self.scores.values() if scores.best_step is not None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: counters, and by name what each prompt needs to go on (BEST and the optimizer's tensors)."""

    counters: Counters
    states: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """One prompt of a run at a moment, copied: training goes on while it is written. `stored`: what lies on disk of `prompt`, whose own
    numbers may have changed by then; `state`: what it goes on from; `card`: makes the card."""

    prompt: Prompt
    stored: Tensor
    state: dict[str, Tensor]
    card: Callable[[], Card]

    @classmethod
    def of(cls, prompt: Prompt, state: Mapping[str, Tensor], card: Callable[[], Card], base: FrozenBase) -> Self:
        copied = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}
        return cls(prompt, prompt.stored(base).detach().to("cpu", copy=True), copied, card)


def save_checkpoint(path: Path, counters: Counters, prompts: Mapping[str, Snapshot], base: FrozenBase) -> None:
    """Writes the folder `path`, whole or not at all; one that is there already holds the same bits and is kept.

    Raises OSError, also where the run's folder has vanished.
    """
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)  # not its parents: a run folder that has vanished does not come back as a folder of checkpoints
    with new_folder(path) as draft:
        state: dict[str, Tensor] = {}
        for name, one in prompts.items():
            write_prompt(prompt_folder(draft, name, len(prompts)), one.prompt, one.card(), base, one.stored)
            state |= _under(name, one.state)
        save_file(state, draft / "state.safetensors")
        (draft / "progress.json").write_text(json.dumps(asdict(counters), indent=2) + "\n", encoding="utf-8", newline="\n")


class Writer:
    """Writes the checkpoints of a run beside its steps, one at a time. Nothing is begun before what was begun has been waited for."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._begun: tuple[Saved, Callable[[], None], Future[None]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.shutdown()

    def begin(self, saved: Saved, write: Callable[[], None]) -> None:
        """Begins to `write` this checkpoint."""
        assert self._begun is None, "waited for, so that checkpoints are told of in their order"
        self._begun = saved, write, self._worker.submit(write)

    def wait(self) -> Iterator[Saved]:
        """The checkpoint that was begun, if any, once it lies on disk; what keeps it from there is waited for here, where Ctrl-C arrives.

        Raises RunError when it cannot be written.
        """
        if self._begun is None:
            return
        saved, write, first = self._begun
        self._begun = None
        tries = chain([first.result], repeat(write))
        self._run.patiently(lambda: next(tries)())
        yield saved


def kept_steps(steps: Iterable[int], keep: Literal["some", "all"] | int, best: Iterable[int], num_steps: int) -> set[int]:
    """Those of the checkpoints after these steps that `train.keep` keeps. `best`: the steps with the lowest held-out losses; `num_steps`:
    of the whole run."""
    there = sorted(steps)
    if keep == "all":
        return set(there)
    if keep != "some":
        return set(there[-keep:])
    marks = [*best, *(part * num_steps / PARTS for part in range(1, PARTS + 1))]
    first = (next((step for step in there if step >= mark), None) for mark in marks)
    return {*there[-LAST:], *(step for step in first if step is not None)}


def drop_checkpoints(folder: Path, keep: Literal["some", "all"] | int, best: Iterable[int], num_steps: int) -> None:
    """Takes away what `train.keep` does not keep: never the last, which the run goes on from."""
    there = _checkpoints(folder)
    for step in set(there) - kept_steps(there, keep, best, num_steps):
        remove_folder(there[step])


def prompt_folder(folder: Path, name: str, count: int) -> Path:
    """Where a prompt lies in `folder`: the folder itself for the one prompt of a run, else one by its name."""
    return folder if count == 1 else folder / name


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The furthest checkpoint of a run, or None before the first."""
    there = _checkpoints(folder)
    if not there:
        return None
    last = there[max(there)]
    return _checkpoint(json.loads((last / "progress.json").read_text(encoding="utf-8")), load_file(last / "state.safetensors"))


def _checkpoint(values: dict[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    counters = Counters(**{**values, "scores": {name: Scores(**scores) for name, scores in values["scores"].items()}})
    states = _by_name(tensors)
    return Checkpoint(counters, {name: states.get(name, {}) for name in counters.scores})


def told(world: World, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What the first process reads, at every process: the others need not see the run folder."""
    found = read() if world.first else None
    values = world.told(lambda: asdict(found.counters) if found else None)
    if values is None or world.size == 1:
        return found
    states = found.states if found else {}
    return _checkpoint(
        values, world.tensors(lambda: {key: one for name, state in states.items() for key, one in _under(name, state).items()})
    )


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step."""
    return {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}


def save_start(file: Path, prompts: Mapping[str, Prompt]) -> None:
    """Writes what the prompts of a run start from, by name."""
    state: dict[str, Tensor] = {}
    for name, prompt in prompts.items():
        state |= _under(name, prompt.tensors)
    save_file(state, file)


def load_start(file: Path, name: str | None, prompt: Prompt) -> Prompt | None:
    """What a prompt of a run started from; `name` may be left out for the only one. None where that was not kept.

    Raises RunError where the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        states = _by_name(load_file(file))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} is damaged: {error}") from None
    own = states.get(name or "") or (next(iter(states.values())) if len(states) == 1 else None)
    return None if own is None else prompt.with_tensors(own)


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        found.setdefault(name, {})[part] = tensor
    return found
