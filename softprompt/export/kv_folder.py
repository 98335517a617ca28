"""Prompts as vLLM's connector reads them (kv_connector.py): a folder with their keys and values, and the ids that name them."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from softprompt.atomic import locked, new_file, write_text
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix
from softprompt.engine.prompt import shapes_of
from softprompt.errors import ArtifactError, ModelError

MODULE, CONNECTOR = "softprompt_connector", "SoftPromptConnector"
ENOUGH_BITS = 64  # ids that stand for fewer might begin an ordinary text


@dataclass(frozen=True)
class Placed:
    """A prompt in the folder. `key`: the hash of its content; `ids`: what a text for it begins with, one for each of its positions."""

    key: str
    ids: tuple[int, ...]


class KeyValueFolder:
    """The folder of one base. Every change is atomic, and vLLM sees it at its next request."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("kv_connector.py"), self.path / f"{MODULE}.py")

    @property
    def transfer_config(self) -> dict[str, Any]:
        """What `vllm serve --kv-transfer-config` is told, with the folder on PYTHONPATH."""
        known = {"kv_connector": CONNECTOR, "kv_connector_module_path": MODULE, "kv_role": "kv_consumer"}
        return {**known, "kv_connector_extra_config": {"folder": str(self.path)}}

    def put(self, base: FrozenBase, prefix: Prefix) -> Placed:
        """Writes the keys and values of one prefix. Raises ModelError for a base that keeps anything else, ArtifactError for a prefix
        that is too short to be told from text."""
        tensors = keys_and_values(base, prefix)
        placed = named_by_ids(tensors, prefix.lengths[0], ordinary_ids(base))
        with self._held():
            file = self._file(placed.key)
            if not file.exists():
                with new_file(file) as draft:
                    draft.write(save(tensors))
            self._write({**self._index(), placed.key: {"ids": list(placed.ids)}})
        return placed

    def take_away(self, key: str) -> None:
        """The prompt is not to be had any more. Its ids stay in the index, so that a late request is an error and no ordinary text."""
        with self._held():
            self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _held(self) -> Any:
        return locked(self.path / "index.lock", wait=True, unlocked="only one program may change it")

    def _index(self) -> dict[str, Any]:
        file = self.path / "index.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _write(self, index: dict[str, Any]) -> None:
        write_text(self.path / "index.json", json.dumps(index))


def keys_and_values(base: FrozenBase, prefix: Prefix) -> dict[str, Tensor]:
    """ "keys.N" and "values.N" [P, kv heads, head size] of every layer, float32."""
    if not base.shares_prefix or not shapes_of(prefix.layers):
        raise ModelError(
            f"{base.name}: its layers keep states or something else beside keys and values, which other engines take from nobody: "
            "they cannot serve prompts over it"
        )
    parts = [(f"{part}.{number}", tensor) for number, layer in enumerate(prefix.layers) for part, tensor in layer.parts.items()]
    return {name: tensor[0].transpose(0, 1).float().cpu().contiguous() for name, tensor in parts}


def ordinary_ids(base: FrozenBase) -> list[int]:
    """Tokens that have an embedding and are no special ones."""
    special = {*base.tokenizer.all_special_ids, *base.tokenizer.added_tokens_decoder}
    return [token for token in range(base.num_tokens) if token not in special]


def named_by_ids(tensors: dict[str, Tensor], length: int, ordinary: Sequence[int]) -> Placed:
    """Ids from the content, so that another prompt, of the same name too, never meets what an engine has cached of this one. Raises
    ArtifactError for a prompt that is too short to be told from text."""
    if length * math.log2(len(ordinary)) < ENOUGH_BITS:
        needed = math.ceil(ENOUGH_BITS / math.log2(len(ordinary)))
        raise ArtifactError(f"a prompt of {length} positions cannot be told from text by its ids: it needs {needed}, BOS included")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    key = digest.hexdigest()[:32]
    return Placed(key, drawn_ids(key, length, ordinary))


def drawn_ids(key: str, length: int, ordinary: Sequence[int]) -> tuple[int, ...]:
    """Tokens drawn from these by a key: always the same."""
    stream = hashlib.shake_256(key.encode()).digest(8 * length)
    numbers = (int.from_bytes(stream[start : start + 8], "big") for start in range(0, len(stream), 8))
    return tuple(ordinary[number % len(ordinary)] for number in numbers)
