"""Many rows in a few flat arrays, in memory or mapped from files, instead of as objects.

`rows` is a table with a line for each row (ROW); `ids` and `supervised` hold the tokens of all rows one after the other, `texts` the
turns and the place of each as UTF-8. A row's tokens are `ids[start : start + length]`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from softprompt.data import Example, Message
from softprompt.engine.tokens import Encoded

# `text` and `size`: where the row's text begins in `texts`, and its bytes: the first `place` are its place, the last `fields` its other
# columns. `lost`: supervised
# tokens among those that were `cut`. `unlearned`: answers that are read and not learned. `label`: which of the labels, or -1. `part`:
# which of the sources. `tools`: 1 where the last of its turns are its tools. `turns`, `asked`, `seen`, `system`: hashes of all turns, of
# those before the answer, of the tokens before the first supervised one, and of the system turn (0: none). That two of a million
# different rows share a hash happens in one of 37 million such sets.
ROW = np.dtype(
    [("start", "<i8"), ("text", "<i8"), ("turns", "<u8"), ("asked", "<u8"), ("seen", "<u8"), ("system", "<u8")]
    + [(name, "<i4") for name in ("length", "supervised", "cut", "lost", "unlearned", "label", "part", "tools", "size", "place", "fields")]
)
KINDS = {"rows": ROW, "ids": np.dtype("<i4"), "supervised": np.dtype(np.bool_), "texts": np.dtype(np.uint8)}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Flat:
    """`rows` [R] of ROW, `ids` [T] int32, `supervised` [T] bool, `texts` [X] uint8. Several may share all but `rows`."""

    rows: NDArray[Any]
    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    texts: NDArray[np.uint8]

    def picked(self, which: NDArray[Any]) -> "Flat":
        """These rows alone: their numbers, or a mask."""
        return replace(self, rows=self.rows[which])

    def fingerprint(self) -> str:
        """sha256 over the turns of all rows, in order: that of data.Loaded."""
        digest, texts = hashlib.sha256(), memoryview(self.texts)  # type: ignore[arg-type]
        numbers = (self.rows[name].tolist() for name in ("text", "place", "size", "fields"))
        for begin, place, size, fields in zip(*numbers, strict=True):
            digest.update(texts[begin + place : begin + size - fields])
            digest.update(b"\n")
        return digest.hexdigest()

    def encoded(self, number: int) -> Encoded:
        row = self.rows[number]
        tokens = slice(int(row["start"]), int(row["start"]) + int(row["length"]))
        ids, supervised = tuple(self.ids[tokens].tolist()), tuple(self.supervised[tokens].tolist())
        return Encoded(ids, supervised, self.place(number), int(row["cut"]), int(row["lost"]))

    def place(self, number: int) -> str:
        return self._text(number, 0, int(self.rows[number]["place"])).decode()

    def turns(self, number: int) -> list[Any]:
        """The row's turns as `turns_text` wrote them."""
        row = self.rows[number]
        found: list[Any] = json.loads(self._text(number, int(row["place"]), int(row["size"]) - int(row["fields"])))
        return found

    def fields(self, number: int) -> dict[str, Any]:
        """The row's other columns, where they are kept."""
        row = self.rows[number]
        size, kept = int(row["size"]), int(row["fields"])
        return dict(json.loads(self._text(number, size - kept, size))) if kept else {}

    def _text(self, number: int, start: int, stop: int) -> bytes:
        begin = int(self.rows[number]["text"])
        return self.texts[begin + start : begin + stop].tobytes()


class _MadeOnDemand(Sequence[Item], ABC):
    """What stands behind the rows of flat arrays, each made when it is asked for."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat

    @abstractmethod
    def _made(self, number: int) -> Item: ...

    def __len__(self) -> int:
        return len(self.flat.rows)

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, at: int | slice) -> Item | tuple[Item, ...]:
        if isinstance(at, slice):
            return tuple(map(self._made, range(*at.indices(len(self)))))
        return self._made(range(len(self))[at])


class EncodedRows(_MadeOnDemand[Encoded]):
    """The rows as the model sees them."""

    def _made(self, number: int) -> Encoded:
        return self.flat.encoded(number)


class StoredExamples(_MadeOnDemand[Example]):
    """The examples: turns, tools, label and place; other columns where they are kept."""

    def __init__(self, flat: Flat, labels: Sequence[str]) -> None:
        super().__init__(flat)
        self.labels = labels

    def _made(self, number: int) -> Example:
        turns, label = self.flat.turns(number), int(self.flat.rows[number]["label"])
        tools = tuple(turns.pop()) if self.flat.rows[number]["tools"] else ()
        name = None if label < 0 else self.labels[label]
        return Example(tuple(map(_message, turns)), self.flat.place(number), name, self.flat.fields(number), tools)


def _message(turn: list[Any]) -> Message:
    """[role, content], with False behind it for an answer that is not learned, and a mapping for what else a turn says."""
    role, content, *rest = turn
    more = rest[-1] if rest and isinstance(rest[-1], dict) else {}
    return Message(role, content, False not in rest, more)


# ---- written -------------------------------------------------------------------------------------------------------


def hashed(content: bytes) -> int:
    """64 bits of BLAKE2, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def turn_hashes(example: Example) -> tuple[int, int]:
    """Of all turns of a row, and of those before its answer: what rows are compared by."""
    turns = example.turns
    return hashed("\0".join(turns).encode()), hashed("\0".join(turns[:-1]).encode())


class _Column:
    """An array that grows: in memory, or from some size on in a .npy file."""

    def __init__(self, kind: np.dtype[Any]) -> None:
        self.kind, self.count = kind, 0
        self.parts: list[NDArray[Any]] = []
        self.file: BinaryIO | None = None

    def append(self, values: NDArray[Any]) -> None:
        self.count += len(values)
        if self.file is None:
            self.parts.append(values)
        else:
            self.file.write(values.tobytes())

    def to_file(self, path: Path) -> None:
        self.file = path.open("w+b")
        self._head(0)
        for values in self.parts:
            self.file.write(values.tobytes())
        self.parts = []

    def close(self) -> None:
        """Ends the file: its head says how long the array became (numpy leaves room in it for any length)."""
        if self.file is not None:
            begin = self._head(self.count)
            assert self.file.seek(0, 2) == begin + self.count * self.kind.itemsize, "the head has grown over what is behind it"
            self.file.close()

    def _head(self, count: int) -> int:
        assert self.file is not None
        self.file.seek(0)
        about = {"descr": np.lib.format.dtype_to_descr(self.kind), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self.file, about)
        return self.file.tell()

    def whole(self) -> NDArray[Any]:
        return np.concatenate(self.parts) if self.parts else np.zeros(0, self.kind)


class FlatWriter:
    """Takes rows batch by batch. They stay in memory until `to_folder`, and lie in the files of that folder from then on."""

    def __init__(self) -> None:
        self._columns = {name: _Column(kind) for name, kind in KINDS.items()}
        self._lines: list[tuple[Any, ...]] = []
        self._tokens: list[Encoded] = []
        self._texts = bytearray()
        self._num_tokens = self._num_bytes = 0

    def __len__(self) -> int:
        return self._columns["rows"].count + len(self._lines)

    def add(
        self, row: Encoded | None, example: Example, text: str, *, label: int, part: int = 0, unlearned: int = 0, fields: str = ""
    ) -> None:
        """`row`: None for an example that cannot be used. `text`: its turns as `turns_text` writes them; `fields`: its columns as
        `fields_text` does, where they are to be kept."""
        place, turns, columns = example.source.encode(), text.encode(), fields.encode()
        size = len(place) + len(turns) + len(columns)
        system = example.messages[0].content if example.messages[0].role == "system" else None
        seen, counts = 0, (0, 0, 0, 0)
        if row is not None:
            seen = hashed(array("i", row.ids[: row.supervised.index(True)]).tobytes())
            counts = (len(row), row.num_supervised, row.num_cut, row.num_lost)
            self._tokens.append(row)
        hashes = (*turn_hashes(example), seen)
        about = (unlearned, label, part, bool(example.tools), size, len(place), len(columns))
        self._lines.append((self._num_tokens, self._num_bytes, *hashes, 0 if system is None else hashed(system.encode()), *counts, *about))
        self._texts += place + turns + columns
        self._num_tokens += counts[0]
        self._num_bytes += size

    def end_batch(self) -> None:
        """Puts what was added into the arrays."""
        total = sum(map(len, self._tokens))
        ids = chain.from_iterable(row.ids for row in self._tokens)
        supervised = chain.from_iterable(row.supervised for row in self._tokens)
        values = {
            "rows": np.array(self._lines, ROW),
            "ids": np.fromiter(ids, np.int32, total),
            "supervised": np.fromiter(supervised, np.bool_, total),
            "texts": np.frombuffer(bytes(self._texts), np.uint8),
        }
        for name, column in self._columns.items():
            column.append(values[name])
        self._lines, self._tokens, self._texts = [], [], bytearray()

    def to_folder(self, folder: Path) -> None:
        for name, column in self._columns.items():
            column.to_file(folder / f"{name}.npy")

    def close(self) -> None:
        self.end_batch()
        for column in self._columns.values():
            column.close()

    def release(self) -> None:
        """Closes the files, whatever has become of them."""
        for column in self._columns.values():
            if column.file is not None:
                with suppress(OSError):
                    column.file.close()

    def in_memory(self) -> Flat:
        """The arrays, where `to_folder` was not called."""
        return Flat(**{name: column.whole() for name, column in self._columns.items()})


def map_folder(folder: Path) -> Flat:
    """The arrays of a folder, mapped: what is not used takes no memory. Raises OSError or ValueError for a damaged one."""
    mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in KINDS}
    found = {name: array.view(np.ndarray) for name, array in mapped.items()}  # slices of a memmap cost ten times as much
    for name, kind in KINDS.items():
        if found[name].dtype != kind:
            raise ValueError(f"{folder / name}.npy holds {found[name].dtype}, not {kind}")
    return Flat(**found)
