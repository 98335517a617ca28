"""What the rows of an open batch have read, in memory that is laid out ahead and grown in blocks: a token copies nothing.

All rows end at one position; shorter ones have holes on their left, so that real tokens stay next to each other also for bases that
measure distance by index (sliding windows, ALiBi).

Shapes: R rows of room, B rows in use, C positions of room, S positions in use.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt.engine.layers import GROWING, Layer, Layers, Room, filled_cache

BLOCK = 64  # positions that are laid out ahead
SPARE = 2  # a row more is laid out for each of so many in use


class Slots:
    """`lengths`: positions that every row in use has, in the order of the rows.

    `most_rows`, `most_positions`: what whoever joins rows keeps to, with all of them as long as the longest may become. No memory is laid
    out that such a batch never needs: `most_positions + most_rows * BLOCK` positions at most, and what rows that left had goes back within
    BLOCK tokens.
    """

    def __init__(self, device: torch.device, most_rows: int, most_positions: int) -> None:
        self._device, self._most_rows, self._most_positions = device, most_rows, most_positions
        self.clear()

    def clear(self) -> None:
        """No row is in use, and no memory."""
        self.lengths: list[int] = []
        self._layers: Layers = ()  # growing parts [R, ..., C, size], states [B, ...]
        self._mask_RC = torch.zeros(0, 0, dtype=torch.long, device=self._device)
        self._end = 0

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for layer in self._layers for part in layer.parts.values())

    @property
    def num_positions(self) -> int:
        """Positions in use, holes included."""
        return len(self.lengths) * max(self.lengths, default=0)

    @property
    def mask_BS(self) -> Tensor:
        """1 where a row has a position, 0 on the holes to its left."""
        return self._mask_RC[: len(self.lengths), self._start : self._end]

    @property
    def layers(self) -> Layers:
        """[B, ..., S, size] and [B, ...]: what every layer keeps of the rows."""
        return tuple(layer.changed(lambda part: self._room(part).used, lambda part: part) for layer in self._layers)

    def join(self, layers: Layers, lengths: Sequence[int]) -> None:
        """More rows, those of a Prefix: padded on the left."""
        first, rows = len(self.lengths), len(self.lengths) + len(lengths)
        self._lay_out(layers, rows, max(lengths))
        for own, new in zip(self._layers, layers, strict=True):
            for name, part in new.parts.items():
                if name in GROWING:
                    own.parts[name][first:rows, ..., self._end - part.shape[-2] : self._end, :] = part
                else:
                    own.parts[name] = torch.cat([own.parts[name], part]) if first else part  # type: ignore[index]
        self._mask_RC[first:rows] = 0
        for row, length in enumerate(lengths, first):
            self._mask_RC[row, self._end - length : self._end] = 1
        self.lengths += lengths

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves the rows of these numbers, in this order."""
        if not rows:
            self.clear()
            return
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        new, old = [pair[0] for pair in moved], [pair[1] for pair in moved]
        whole = torch.tensor(list(rows))
        if moved:
            self._mask_RC[new] = self._mask_RC[old]
        for layer in self._layers:
            for name, part in layer.parts.items():
                if name not in GROWING:
                    layer.parts[name] = part[whole.to(part.device)]  # type: ignore[index]
                elif moved:
                    part[new] = part[old]
        self.lengths = [self.lengths[row] for row in rows]

    # ---- one more token ------------------------------------------------------------------------------------------------

    def begin(self) -> tuple[Tensor, Tensor]:
        """Room for one more position of every row: (the mask [B, S + 1] with it, its number in every row [B, 1])."""
        if self._end == self._mask_RC.shape[1]:
            self._lay_out((), len(self.lengths), max(self.lengths))
        self._mask_RC[: len(self.lengths), self._end] = 1
        positions_B1 = torch.tensor(self.lengths, device=self._device)[:, None]
        return self._mask_RC[: len(self.lengths), self._start : self._end + 1], positions_B1

    def cache(self) -> DynamicCache:
        """What transformers' layers read, and write their next position into."""
        rooms = [{name: self._room(part) for name, part in layer.parts.items() if name in GROWING} for layer in self._layers]
        return filled_cache(self.layers, held=False, rooms=rooms)

    def end(self, layers: Layers) -> None:
        """The position was written; `layers`: what a cache keeps now, whose states take the place of those before."""
        for own, new in zip(self._layers, layers, strict=False):
            own.parts.update({name: part for name, part in new.parts.items() if name not in GROWING})  # type: ignore[attr-defined]
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def write(self, name: str, part: Tensor) -> None:
        """The position of a part [B, ..., 1, size] of the only layer, where no cache does it."""
        self._room(self._layers[0].parts[name]).add(part)

    @property
    def _start(self) -> int:
        return self._end - max(self.lengths, default=0)

    def _room(self, whole: Tensor) -> Room:
        return Room(whole[: len(self.lengths)], self._start, self._end)

    def _lay_out(self, layers: Layers, rows: int, width: int) -> None:
        """Room for so many rows, of `width` positions before the end, and for more behind it. What is there is copied where it lacks, a
        part at a time. `layers`: the first rows to come, where nothing is there."""
        if rows <= self._mask_RC.shape[0] and width <= self._end < self._mask_RC.shape[1]:
            return
        used = max(self.lengths, default=0)
        end = max(width, used)
        num_rows = max(rows, min(rows + len(self.lengths) // SPARE, self._most_rows, self._most_positions // end))

        def larger(part: Tensor) -> Tensor:
            new = part.new_zeros(num_rows, *part.shape[1:-2], end + BLOCK, part.shape[-1])  # holes are read, times zero
            if self.lengths:
                new[: len(self.lengths), ..., end - used : end, :] = self._room(part).used
            return new

        mask_RC = self._mask_RC.new_zeros(num_rows, end + BLOCK)
        mask_RC[: len(self.lengths), end - used : end] = self.mask_BS
        if not self.lengths:
            self._layers = tuple(Layer(layer.kind, dict(layer.parts)) for layer in layers)
        for layer in self._layers:
            for name in [name for name in layer.parts if name in GROWING]:
                layer.parts[name] = larger(layer.parts[name])  # type: ignore[index]
        self._mask_RC, self._end = mask_RC, end
