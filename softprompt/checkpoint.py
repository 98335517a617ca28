"""What a run needs to go on with the same bits: the rows, the optimizer's moments and a few counters.

The order of rows is a function of seed and step, and the base has no dropout, so there is no random state to keep.
A checkpoint folder is also a prompt folder: it loads like a finished prompt.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.artifact import TENSOR, Card, write_prompt
from softprompt.atomic import new_folder
from softprompt.model import FrozenBase
from softprompt.prompt import SoftPrompt


@dataclass(frozen=True)
class Progress:
    """Counters of a run after `step` optimizer steps."""

    step: int = 0
    loss_sum: float = 0.0
    num_supervised: int = 0
    num_examples: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    data_fingerprint: str = ""
    base_fingerprint: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: counters, rows [P, H] and the optimizer's moments."""

    progress: Progress
    rows_PH: Tensor
    moments: dict[str, Tensor]


def save_checkpoint(folder: Path, progress: Progress, soft: SoftPrompt, moments: dict[str, Tensor], card: Card, base: FrozenBase) -> Path:
    """Writes `folder/step-000123`, whole or not at all; one that is there already holds the same bits and is kept."""
    path = folder / f"step-{progress.step:06d}"
    if not path.exists():
        with new_folder(path) as draft:
            write_prompt(draft, soft, card, base)
            state = {TENSOR: soft.rows_PH.detach(), **moments}
            save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, draft / "state.safetensors")
            (draft / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
    return path


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The furthest checkpoint of a run, or None before the first."""
    steps = sorted(folder.glob("step-*"))
    if not steps:
        return None
    state = load_file(steps[-1] / "state.safetensors")
    progress = Progress(**json.loads((steps[-1] / "progress.json").read_text(encoding="utf-8")))
    return Checkpoint(progress, state.pop(TENSOR), state)
