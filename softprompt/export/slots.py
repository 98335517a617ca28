"""Files of llama.cpp's slots, with the keys and values of a prompt in the place of those of its tokens.

Such a file names its tokens and says, for every cache (bases with sliding layers have two), which positions it holds; then come the keys of
all layers, a row for each position, then the values. What stands between differs from build to build: so a file is taken that the same
build wrote of plain tokens, the rows are looked for in it, and they alone are replaced.

In which form a row holds a head's numbers, and which layer is whose, is measured and not looked up: we compute the keys and values of
the same tokens, and look in which form they are what the file holds. A file of another base is told by that, too.

Source: llama.cpp, src/llama-kv-cache.cpp (state_write_meta, state_write_data, ggml_gen_hadamard).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from softprompt.errors import ArtifactError

HEADER, CELL = struct.Struct("<iQ"), struct.Struct("<iIi")  # of rows: their type, the bytes of one; of a cell: position, 1, its sequence
MOST_LAYERS, MOST_SEQUENCES = 1000, 4096
GAP, WORDS = 1 << 16, 8  # bytes that may stand before a cache, words between its number of layers and their rows
ALIKE = 0.3  # relative error up to which keys and values of the same tokens are those of the same base, in whatever quantisation
SAMPLE = 64  # positions that are compared
SMALLEST_TURN = 64


@dataclass(frozen=True)
class Rows:
    """Keys or values of one layer in a file: where they begin, what type they have, whose positions they are."""

    start: int
    kind: GGMLQuantizationType
    width: int
    positions: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.width * len(self.positions)

    def read(self, data: bytes) -> Tensor:
        """[positions, D] float32."""
        rows = np.frombuffer(data, np.uint8, self.stop - self.start, self.start).reshape(len(self.positions), self.width)
        return torch.from_numpy(np.array(dequantize(rows, self.kind), np.float32))

    def write(self, rows_PD: Tensor, data: bytearray) -> None:
        data[self.start : self.stop] = quantize(rows_PD.contiguous().numpy(), self.kind).tobytes()


@dataclass(frozen=True)
class Form:
    """How a head's numbers are stored: with the halves that transformers turns against each other as neighbours, as llama-like families
    have them, or as they are; then multiplied by Hadamard matrices of size `turned`, as a quantised cache has them, 1: not."""

    neighbours: bool
    turned: int

    def of(self, tensor: Tensor) -> Tensor:
        """[P, D] of keys or values [P, heads, head size]."""
        if self.neighbours:
            tensor = torch.stack(tensor.chunk(2, dim=2), dim=3)
        rows_PD = tensor.reshape(len(tensor), -1)
        return rows_PD if self.turned == 1 else (rows_PD.reshape(-1, self.turned) @ _hadamard(self.turned)).reshape(rows_PD.shape)


@dataclass(frozen=True)
class Layer:
    """A layer of a file: `number` in the base; its keys and values, and the forms they are in."""

    number: int
    parts: Mapping[str, tuple[Rows, Form]]


@dataclass(frozen=True)
class Slot:
    """A file that a server wrote of plain tokens. `error`: how far its keys and values are from ours of the same tokens."""

    data: bytes
    ids: tuple[int, ...]
    layers: tuple[Layer, ...]
    error: float

    @property
    def cache_types(self) -> dict[str, str]:
        """What the server's options --cache-type-k and --cache-type-v were."""
        keys, values = (self.layers[0].parts[name][0].kind.name.lower() for name in ("keys", "values"))
        return {"cache_type_k": keys, "cache_type_v": values}

    def holding(self, tensors: Mapping[str, Tensor], ids: Sequence[int]) -> bytes:
        """The same file with these keys and values, "keys.N" and "values.N" [P, heads, head size], called by these ids."""
        data = bytearray(self.data.replace(_words(self.ids), _words(ids)))
        for layer in self.layers:
            for name, (rows, form) in layer.parts.items():
                rows.write(form.of(tensors[f"{name}.{layer.number}"])[list(rows.positions)], data)
        return bytes(data)


def read_slot(data: bytes, ids: Sequence[int], plain: Mapping[str, Tensor]) -> Slot:
    """A file of these tokens, whose keys and values we compute to be `plain`.

    Raises ArtifactError for a file whose build is not known, one of another base, and one whose numbers cannot be replaced.
    """
    length, num_layers = len(plain["keys.0"]), len(plain) // 2
    found = list(layers_in(data, length))
    if not found or data.count(_words(ids)) != 1:
        raise ArtifactError("nothing in it has a form that is known: another build of llama.cpp is needed")
    if len(found) < num_layers:
        raise ArtifactError(f"it holds {len(found)} layers, the prompts' base has {num_layers}")
    left, layers, errors = set(range(num_layers)), list[Layer](), list[float]()
    for rows in found[:num_layers]:
        number, *best = min(_matches(data, rows, plain, left), key=lambda match: match[1][0] + match[2][0])
        left.discard(number)
        layers.append(Layer(number, {name: (one, form) for (name, one), (_, form) in zip(rows.items(), best, strict=True)}))
        errors += [error for error, _ in best]
    error = float(np.mean(errors))
    if not error <= ALIKE:
        raise ArtifactError(f"the keys and values of plain tokens are {error:.2f} of their size away from those of the prompts' base")
    if any(data[found[num_layers - 1]["values"].stop :]):
        raise ArtifactError("it holds more than its layers, checkpoints of sliding ones, say: start the server with --swa-full")
    return Slot(data, tuple(ids), tuple(layers), error)


def _words(ids: Sequence[int]) -> bytes:
    return np.array(ids, "<i4").tobytes()


# ---- where the rows are ----------------------------------------------------------------------------------------------


def layers_in(data: bytes, length: int) -> Iterator[dict[str, Rows]]:
    """Keys and values of every layer, in the file's order."""
    at = 0
    while found := next(filter(None, (_cache(data, start, length) for start in range(at, min(at + GAP, len(data)), 4))), None):
        keys, values = found
        yield from ({"keys": one, "values": other} for one, other in zip(keys, values, strict=True))
        at = values[-1].stop


def _cache(data: bytes, at: int, length: int) -> tuple[list[Rows], list[Rows]] | None:
    """The rows of the cache that begins here, with the number of its positions; None where none does. Raises ArtifactError for values
    that lie across."""
    positions = _positions(data, at, length)
    at += 4 + CELL.size * len(positions)
    if not positions or at + 8 > len(data):
        return None
    transposed, num_layers = struct.unpack_from("<II", data, at)
    if transposed not in (0, 1) or not 1 <= num_layers <= MOST_LAYERS:
        return None
    starts = (_rows(data, at + 8 + 4 * words, positions, num_layers) for words in range(WORDS))
    keys = next(filter(None, starts), [])
    if keys and transposed:
        raise ArtifactError("its values are transposed: start the server with --flash-attn on")
    values = _rows(data, keys[-1].stop, positions, num_layers) if keys else []
    return (keys, values) if values else None


def _positions(data: bytes, at: int, length: int) -> tuple[int, ...]:
    """The positions that the cells here hold, each once; none where there are no cells."""
    number = int.from_bytes(data[at : at + 4], "little")
    if not 1 <= number <= length or at + 4 + CELL.size * number > len(data):
        return ()
    cells = [CELL.unpack_from(data, at + 4 + CELL.size * index) for index in range(number)]
    positions = tuple(position for position, _, _ in cells)
    good = all(0 <= position < length and one == 1 and 0 <= sequence < MOST_SEQUENCES for position, one, sequence in cells)
    return positions if good and len(set(positions)) == number else ()


def _rows(data: bytes, at: int, positions: tuple[int, ...], num_layers: int) -> list[Rows]:
    """The rows of all layers from here on; empty where they are none."""
    found = []
    for _ in range(num_layers):
        if at + HEADER.size > len(data):
            return []
        kind, width = HEADER.unpack_from(data, at)
        if kind not in GGML_QUANT_SIZES or not width or at + HEADER.size + width * len(positions) > len(data):
            return []
        found.append(Rows(at + HEADER.size, GGMLQuantizationType(kind), width, positions))
        at = found[-1].stop
    return found


# ---- what the rows are -----------------------------------------------------------------------------------------------


def _matches(data: bytes, rows: Mapping[str, Rows], plain: Mapping[str, Tensor], left: set[int]) -> Iterator[Any]:
    """Of each base layer that is left: (its number, (error, form) of the keys, the same of the values)."""
    stored = {name: _read(data, one)[:SAMPLE] for name, one in rows.items()}
    fitting = [number for number in left if all(plain[f"{name}.{number}"][0].numel() == one.shape[1] for name, one in stored.items())]
    if not fitting:
        raise ArtifactError("its rows have another size than those of the prompts' base")
    for number in fitting:
        ours = {name: plain[f"{name}.{number}"][list(one.positions[:SAMPLE])] for name, one in rows.items()}
        yield number, *(_closest(stored[name], ours[name], name == "keys") for name in rows)


def _read(data: bytes, rows: Rows) -> Tensor:
    """The rows. Raises ArtifactError for a type that others could not be written in."""
    try:
        rows_PD = rows.read(data)
        quantize(rows_PD[:1].numpy(), rows.kind)
    except NotImplementedError:
        kind = rows.kind.name.lower()
        raise ArtifactError(f"a cache of type {kind} cannot be written: give the server --cache-type-k and --cache-type-v f16") from None
    return rows_PD


def _closest(stored_PD: Tensor, ours: Tensor, keys: bool) -> tuple[float, Form]:
    """The form in which ours, [P, heads, head size], are nearest to what is stored, and the relative error that is left."""
    size = ours.shape[2]
    turns = [1, *(turn for turn in _powers(size) if size % turn == 0)]
    forms = [Form(neighbours, turned) for neighbours in ((False, True) if keys and size % 2 == 0 else (False,)) for turned in turns]
    errors = [((form.of(ours) - stored_PD).norm() / stored_PD.norm()).item() for form in forms]
    best = int(np.argmin(errors))
    return errors[best], forms[best]


def _powers(size: int) -> Sequence[int]:
    return [1 << power for power in range(SMALLEST_TURN.bit_length() - 1, size.bit_length())]


def _hadamard(size: int) -> Tensor:
    """[size, size] of Walsh and Hadamard, its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
