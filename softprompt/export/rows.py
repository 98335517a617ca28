"""Plain rows for engines that take embeddings: float32 [P, H], what the base's embedding module would give (its scale included)."""

from collections.abc import Callable
from pathlib import Path

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
    return _export(goal, "npy", lambda rows_PH, file: np.save(file, rows_PH.numpy()), lambda file: torch.from_numpy(np.load(file)))


def export_torch(goal: Goal) -> Exported:
    """NAME.pt, one tensor as `torch.save` writes it; read it with `weights_only=True`."""
    return _export(goal, "pt", torch.save, lambda file: torch.load(file, weights_only=True))


def export_vllm(goal: Goal) -> Exported:
    """NAME.safetensors for vLLM's `prompt_embeds`, and NAME.jinja, the template of its chats (`vllm serve --chat-template`).

    In a chat the rows are the content part of a first system message; the template puts them where they stood in training.
    """
    exported = _export(goal, "safetensors", lambda rows_PH, file: save_file({"rows": rows_PH}, file), _read_safetensors)
    for prompt in goal.prompts:
        template = with_rows_from_message(prompt)
        (goal.draft / f"{prompt.name}.jinja").write_text(template, encoding="utf-8", newline="\n")
        exported.prompts[prompt.name] |= {"template": f"{prompt.name}.jinja", "cached_positions": _cached(prompt)}
    return exported


def _export(goal: Goal, ending: str, write: Callable[[Tensor, Path], None], read: Callable[[Path], Tensor]) -> Exported:
    prompts = {}
    for prompt in goal.prompts:
        rows_PH = prompt.rows_PH.contiguous()
        file = goal.draft / f"{prompt.name}.{ending}"
        write(rows_PH, file)
        if not torch.equal(read(file), rows_PH):
            raise ArtifactError(f"{file.name}: read back, the rows differ from those that were written")
        soft = prompt.soft
        where = {"position": soft.position, "bos_id": soft.bos_id, "end_ids": prompt.end_ids}
        prompts[prompt.name] = {"file": file.name, "shape": list(rows_PH.shape), **where}
    return Exported("torch" if ending == "pt" else "vllm" if ending == "safetensors" else ending, goal.base.name, prompts)


def _read_safetensors(file: Path) -> Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor("rows")


def _cached(prompt: Carried) -> dict[str, int]:
    """How many positions of BOS and rows a prefix cache keeps: whole blocks only. P + 1 = 16 n keeps all of them on a GPU."""
    soft = prompt.soft
    length = soft.length + (soft.bos_id is not None)
    return {f"blocks of {size}": length // size * size for size in BLOCKS}
