"""A GGUF file's metadata, read in a second.

transformers asks the gguf library for it, several times in a loading, and both take a vocabulary's tokens, scores and kinds one by one:
half a minute each time for Gemma's 262,144 tokens. Inside `quick_reader` the library's reader lays out whole arrays at once.
"""

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType, Keys, ReaderField
from transformers.utils import logging as transformers_logging

VOCABULARY = (Keys.Tokenizer.SCORES, Keys.Tokenizer.TOKEN_TYPE, Keys.Tokenizer.MERGES)  # beside its tokens
NOTHING = np.empty(0, np.uint8)
ALONE = Lock()  # what is changed is changed for the process


class QuickReader(gguf.GGUFReader):
    """What gguf.GGUFReader finds in a file. Raises ValueError where the file ends within a list of texts."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, count, start = GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            parts, end = self._texts(start, count)
        elif kind in self.gguf_scalar_to_np:
            values = np.asarray(self._get(start, self.gguf_scalar_to_np[kind], count))
            parts, end = list(values.reshape(-1, 1)), start + values.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return end - orig_offs, [*head, *parts], list(range(2, 2 + len(parts))), [GGUFValueType.ARRAY, *([kind] if parts else [])]

    def _texts(self, start: int, count: int) -> tuple[list[Any], int]:
        """The bytes of so many texts, each behind its length, and where the last one ends."""
        found: list[Any] = []
        whole, length_at = np.asarray(self.data), struct.Struct("=Q").unpack_from
        try:
            for _ in range(count):
                (length,) = length_at(whole.data, start)
                found.append(whole[start + 8 : start + 8 + length])
                start += 8 + length
        except struct.error:
            raise ValueError("the file ends within its metadata") from None
        return found, start


class BareReader(QuickReader):
    """The same without the vocabulary, of which the number of tokens is left: what the base is, and its weights, need no more."""

    def __init__(self, *given: Any, **how: Any) -> None:
        super().__init__(*given, **how)
        for key in VOCABULARY:
            self.fields.pop(key, None)
        tokens = self.fields.get(Keys.Tokenizer.LIST)
        if tokens is not None:
            self.fields[tokens.name] = ReaderField(tokens.offset, tokens.name, [NOTHING], [0] * len(tokens.data), tokens.types)


@contextmanager
def quick_reader(*, vocabulary: bool) -> Iterator[None]:
    """Inside, what asks the gguf library for its reader gets the quick one, and the names of tensors are listed once, not for every module
    of a model. `vocabulary`: with the tokens' texts. The one bar of transformers that heeds no setting heeds it, too."""
    with ExitStack() as changed:
        changed.enter_context(ALONE)
        changed.enter_context(_replaced(gguf, "GGUFReader", QuickReader if vocabulary else BareReader))
        changed.enter_context(_replaced(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)))
        with suppress(ImportError):  # a transformers that reads all files by itself
            legacy = import_module("transformers.modeling_gguf_pytorch_utils")
            changed.enter_context(_replaced(legacy, "tqdm", transformers_logging.tqdm))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
