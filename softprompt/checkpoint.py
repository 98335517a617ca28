"""What a run needs to go on with the same bits: the rows, the optimizer's moments and a few counters.

The order of rows is a function of seed and step, and the base has no dropout, so there is no random state to keep.
A checkpoint folder is also a prompt folder (that of a bank holds one for each prompt): it loads like a finished prompt.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.artifact import Card, write_prompt
from softprompt.atomic import new_folder
from softprompt.model import FrozenBase
from softprompt.prompt import SoftPrompt

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
class Progress:
    """Counters of a run after `step` optimizer steps; `num_examples` counts a row once for every prompt that saw it."""

    step: int = 0
    num_examples: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    data_fingerprint: str = ""
    base_fingerprint: str = ""
    scores: dict[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: counters, and by name what each prompt needs to go on (BEST and the optimizer's tensors)."""

    progress: Progress
    states: dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path, progress: Progress, prompts: Mapping[str, tuple[SoftPrompt, dict[str, Tensor], Card]], base: FrozenBase
) -> Path:
    """Writes `folder/step-000123` with (prompt to show, state to go on from, card) of every name, whole or not at all; one
    that is there already holds the same bits and is kept."""
    path = folder / f"step-{progress.step:06d}"
    if not path.exists():
        with new_folder(path) as draft:
            state: dict[str, Tensor] = {}
            for name, (soft, own, card) in prompts.items():
                write_prompt(prompt_folder(draft, name, len(prompts)), soft, card, base)
                state |= {f"{name}/{key}": tensor.cpu().contiguous() for key, tensor in own.items()}
            save_file(state, draft / "state.safetensors")
            (draft / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
    return path


def prompt_folder(folder: Path, name: str, count: int) -> Path:
    """Where a prompt lies in `folder`: the folder itself for the one prompt of a run, else one by its name."""
    return folder if count == 1 else folder / name


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The furthest checkpoint of a run, or None before the first."""
    steps = sorted(folder.glob("step-*"))
    if not steps:
        return None
    values = json.loads((steps[-1] / "progress.json").read_text(encoding="utf-8"))
    progress = Progress(**{**values, "scores": {name: Scores(**scores) for name, scores in values["scores"].items()}})
    states: dict[str, dict[str, Tensor]] = {name: {} for name in progress.scores}
    for key, tensor in load_file(steps[-1] / "state.safetensors").items():
        name, _, part = key.rpartition("/")
        states[name][part] = tensor
    return Checkpoint(progress, states)
