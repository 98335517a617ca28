"""Prefixes that answers continue from: each is computed once, and kept for as long as its prompt is in use, or while there is room."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor

from softprompt.engine.prefix import Prefix


class Owner(Protocol):
    """A prompt; prefixes are its, and of the texts that stand behind it."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class _Kept:
    """`held`: the prompt itself, on a shelf that has a bound."""

    prompt: "ref[Owner]"
    held: Owner | None
    prefix: Prefix
    num_bytes: int


class Shelf:
    """`room`: bytes of prefixes and their prompts at most, the least recently used leave; None: each prefix stays for as long as somebody
    else holds its prompt."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def has(self, prompt: Owner, ids: tuple[int, ...] = ()) -> bool:
        return (id(prompt), ids) in self._kept

    def take(self, prompt: Owner, ids: tuple[int, ...], make: Callable[[], Prefix]) -> Prefix:
        """The prefix of a prompt and the ids behind it, made now if it is not there."""
        key = (id(prompt), ids)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].prefix
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, of use outside of decoding too
            made = make()
        self.put(prompt, ids, made)
        return made

    def put(self, prompt: Owner, ids: tuple[int, ...], prefix: Prefix) -> None:
        """Keeps a prefix that somebody else made."""
        key = (id(prompt), ids)
        num_bytes = sum(part.nbytes for part in prefix.tensors) + sum(part.nbytes for part in prompt.tensors.values())
        self._drop(key)
        gone = ref(prompt, lambda _: self._drop(key))
        self._kept[key] = _Kept(gone, None if self.room is None else prompt, prefix, num_bytes)
        self.num_bytes += num_bytes
        while self.room is not None and self.num_bytes > self.room:
            self._drop(next(iter(self._kept)))

    def longest(self, prompt: Owner, text: Sequence[int]) -> tuple[int, ...]:
        """Of what is kept behind this prompt, the most that the text begins with; it leaves a token to be read."""
        found = (ids for own, ids in self._kept if own == id(prompt) and len(ids) < len(text) and tuple(text[: len(ids)]) == ids)
        return max(found, key=len, default=())

    def _drop(self, key: tuple[int, tuple[int, ...]]) -> None:
        kept = self._kept.pop(key, None)
        self.num_bytes -= kept.num_bytes if kept is not None else 0
