"""Prompts as vLLM's connector reads them (kv_connector.py): a folder with their keys and values, and the ids that name them."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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

MODULE = "softprompt_connector"
CONNECTION = {"kv_connector": "SoftPromptConnector", "kv_connector_module_path": MODULE, "kv_role": "kv_consumer"}
ENOUGH_BITS = 64  # ids that stand for fewer might begin an ordinary text
ENOUGH_WORDS = 1000  # of which a name can be made
WORD_STARTS = "Ġ▁"  # how vocabularies write the blank before a word


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
        return {**CONNECTION, "kv_connector_extra_config": {"folder": str(self.path)}}

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

    def close(self) -> None:
        """Nothing will be changed any more."""
        self._lock.unlink(missing_ok=True)

    @property
    def _lock(self) -> Path:
        return self.path / "index.lock"

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _held(self) -> Any:
        return locked(self._lock, wait=True, unlocked="only one program may change it")

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
    """Tokens of which a name can be made: words, where there are enough of them, so that a chat can say it as text; else all that have an
    embedding and are no special ones."""
    return _ordinary(base.tokenizer, base.num_tokens)


@lru_cache(maxsize=4)
def _ordinary(tokenizer: Any, num_tokens: int) -> list[int]:
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [token for token in range(num_tokens) if token not in special]
    texts = {token: text for token in ordinary if (text := _word(tokenizer, token)) is not None}
    read = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"] if texts else []
    words = [token for token, ids in zip(texts, read, strict=True) if ids == [token]]
    return words if len(words) >= ENOUGH_WORDS else ordinary


def _word(tokenizer: Any, token: int) -> str | None:
    """A token's text, where that is a blank and a word of plain letters."""
    piece = tokenizer.convert_ids_to_tokens(token)
    plain = piece[:1] and piece[0] in WORD_STARTS and piece[1:].isascii() and piece[1:].isalpha()
    return f" {piece[1:]}" if plain else None


def text_of_name(tokenizer: Any, ids: Sequence[int]) -> str:
    """What a chat says for these ids. Whether it becomes them again is for the caller to check."""
    return "".join(_word(tokenizer, token) or tokenizer.decode([token]) for token in ids)


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
