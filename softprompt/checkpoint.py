"""What a run needs to go on with the same bits: the rows, the optimizer's moments and a few counters.

The order of rows is a function of seed and step, and the base has no dropout, so there is no random state to keep.
A checkpoint folder is also a prompt folder (that of a bank holds one for each prompt): it loads like a finished prompt.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.artifact import Card, write_prompt
from softprompt.atomic import new_folder
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt
from softprompt.errors import RunError

BEST = "best"  # the rows with the lowest held-out loss


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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: counters, and by name what each prompt needs to go on (BEST and the optimizer's tensors)."""

    counters: Counters
    states: dict[str, dict[str, Tensor]]


def save_checkpoint(
    path: Path, counters: Counters, prompts: Mapping[str, tuple[Prompt, dict[str, Tensor], Card]], base: FrozenBase
) -> None:
    """Writes the folder `path` with (prompt to show, state to go on from, card) of every name, whole or not at all; one that is there
    already holds the same bits and is kept."""
    if path.exists():
        return
    with new_folder(path) as draft:
        state: dict[str, Tensor] = {}
        for name, (prompt, own, card) in prompts.items():
            write_prompt(prompt_folder(draft, name, len(prompts)), prompt, card, base)
            state |= _under(name, own)
        save_file(state, draft / "state.safetensors")
        (draft / "progress.json").write_text(json.dumps(asdict(counters), indent=2) + "\n", encoding="utf-8")


def prompt_folder(folder: Path, name: str, count: int) -> Path:
    """Where a prompt lies in `folder`: the folder itself for the one prompt of a run, else one by its name."""
    return folder if count == 1 else folder / name


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The furthest checkpoint of a run, or None before the first."""
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not steps:
        return None
    values = json.loads((steps[-1] / "progress.json").read_text(encoding="utf-8"))
    counters = Counters(**{**values, "scores": {name: Scores(**scores) for name, scores in values["scores"].items()}})
    states = _by_name(load_file(steps[-1] / "state.safetensors"))
    return Checkpoint(counters, {name: states.get(name, {}) for name in counters.scores})


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
