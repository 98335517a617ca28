"""Plain rows for engines that take embeddings: float32 [P, H], what the base's embedding module would give (its scale included)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from softprompt.errors import ArtifactError
from softprompt.export.carried import Carried, Exported, Goal
from softprompt.export.chat import with_rows_from_message

BLOCKS = (16, 128)  # tokens of vLLM's cache blocks, on a GPU and on a CPU


def export_npy(goal: Goal) -> Exported:
    """NAME.npy, for anything that reads NumPy's format."""
    facts = _write(goal, goal.prompts, "npy", lambda rows, file: np.save(file, rows.numpy()), lambda file: torch.from_numpy(np.load(file)))
    return Exported("npy", goal.base.name, facts)


def export_torch(goal: Goal) -> Exported:
    """NAME.pt, one tensor as `torch.save` writes it; read it with `weights_only=True`."""
    facts = _write(goal, goal.prompts, "pt", torch.save, lambda file: torch.load(file, weights_only=True))
    return Exported("torch", goal.base.name, facts)


def export_vllm_rows(goal: Goal, prompts: Sequence[Carried]) -> dict[str, dict[str, Any]]:
    """NAME.safetensors for vLLM's `prompt_embeds`, and NAME.jinja, the template of its chats (`vllm serve --chat-template`). Returns the
    facts of each prompt.

    In a chat the rows are the content part of a first system message; the template puts them where they stood in training.
    """
    facts = _write(goal, prompts, "safetensors", lambda rows_PH, file: save_file({"rows": rows_PH}, file), _read_safetensors)
    for prompt in prompts:
        template = with_rows_from_message(prompt)
        (goal.draft / f"{prompt.name}.jinja").write_text(template, encoding="utf-8", newline="\n")
        facts[prompt.name] |= {"template": f"{prompt.name}.jinja", "cached_positions": _cached(prompt)}
    return facts


def _write(
    goal: Goal, prompts: Sequence[Carried], ending: str, write: Callable[[Tensor, Path], None], read: Callable[[Path], Tensor]
) -> dict[str, dict[str, Any]]:
    """The facts of each prompt."""
    facts = {}
    for prompt in prompts:
        rows_PH = prompt.rows_PH.contiguous()
        file = goal.draft / f"{prompt.name}.{ending}"
        write(rows_PH, file)
        if not torch.equal(read(file), rows_PH):
            raise ArtifactError(f"{file.name}: read back, the rows differ from those that were written")
        soft = prompt.soft
        where = {"position": soft.position, "bos_id": soft.bos_id, "end_ids": prompt.end_ids}
        facts[prompt.name] = {"file": file.name, "shape": list(rows_PH.shape), **where}
    return facts


def _read_safetensors(file: Path) -> Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor("rows")


def _cached(prompt: Carried) -> dict[str, int]:
    """How many positions of BOS and rows a prefix cache keeps: whole blocks only. P + 1 = 16 n keeps all of them on a GPU."""
    soft = prompt.soft
    length = soft.length + (soft.bos_id is not None)
    return {f"blocks of {size}": length // size * size for size in BLOCKS}
