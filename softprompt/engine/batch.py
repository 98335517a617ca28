"""The plan of a step (pure) and the tensors of a micro-batch.

A step is a set of examples. How it is cut into micro-batches is decided here, by length and a token budget; since the
loss is a sum over supervised tokens divided by the step's own count of them, the cut never changes the gradient.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.engine.tokens import Encoded
from softprompt.engine.world import World

# How many tokens' layers take as long as one more micro-batch (LOG.md): on a CPU that is a walk over the head's weights, on a GPU the
# launching of every kernel.
CPU_BATCH_COST, GPU_BATCH_COST = 64, 4096
EPOCHS = 32  # orders that are kept: the prompts of a bank have one each


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right. `ids_BT` and `mask_BT` are long; `which_B` says which prefix a row continues from.

    The last token of a row is predicted and never read, so it is not among `ids_BT`. `scored_N` are the flat positions
    (row x T + column) of the hidden states whose next token is supervised, `targets_N` those tokens and `row_N` their rows, in
    the same row by row order. `rows` are the numbers of the rows as they were given.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    which_B: Tensor
    scored_N: Tensor
    targets_N: Tensor
    row_N: Tensor
    rows: tuple[int, ...]


class Order:
    """An endless series of shuffled epochs; a row number's place in it is a function of the arguments alone.

    `labels_R`: a number for the label of every row. Each stretch of an epoch has the labels in the shares that they have of all rows: steps
    of a few rows would else learn by turns that one label is likelier than the other (LOG.md). `parts_R` and `weights`: which source a row
    comes from, and how much is drawn from each; an epoch has as many rows as there are, a row more often or less often than once.
    """

    def __init__(self, labels_R: NDArray[Any], parts_R: NDArray[Any] | None = None, weights: Sequence[float] = ()) -> None:
        self._labels_R = labels_R
        self._sources: list[tuple[NDArray[Any], Order]] = []
        self._shares: list[int] = []
        if parts_R is not None and weights:
            numbers = [np.flatnonzero(parts_R == part) for part in range(len(weights))]
            self._sources = [(own, Order(labels_R[own])) for own in numbers]
            self._shares = _shares(weights, len(labels_R))
        self._epoch = lru_cache(maxsize=EPOCHS)(self._mixed if self._sources else self._shuffled)

    def rows(self, first: int, count: int, seed: int | str) -> list[int]:
        """Row numbers first .. first + count of the series."""
        rows: list[int] = []
        while len(rows) < count:
            epoch, offset = divmod(first + len(rows), len(self._labels_R))
            rows += self._epoch(f"{seed}", epoch)[offset : offset + count - len(rows)].tolist()
        return rows

    def _shuffled(self, seed: str, epoch: int) -> NDArray[Any]:
        """All row numbers once: those of each label shuffled, and spread evenly from a random beginning."""
        draw, of_labels, beginnings = random.Random(f"{seed}/{epoch}"), [], []
        _, first, own_R = np.unique(self._labels_R, return_index=True, return_inverse=True)
        for label in np.argsort(first, kind="stable"):  # in the order in which they appear
            numbers = np.flatnonzero(own_R == label).tolist()
            draw.shuffle(numbers)
            of_labels.append(np.array(numbers, np.int32))
            beginnings.append(draw.random())
        return _spread(of_labels, beginnings)

    def _mixed(self, seed: str, epoch: int) -> NDArray[Any]:
        """Of each source its share, the next rows of its own series, spread evenly."""
        shares = zip(self._sources, self._shares, strict=True)
        drawn = [
            own[order.rows(epoch * share, share, f"{seed}/{part}")].astype(np.int32)
            for part, ((own, order), share) in enumerate(shares)
            if share
        ]
        draw = random.Random(f"{seed}/{epoch}/mixed")
        return _spread(drawn, [draw.random() for _ in drawn])


def _spread(groups: Sequence[NDArray[Any]], beginnings: Sequence[float]) -> NDArray[Any]:
    """The numbers of all groups, those of each evenly from its beginning."""
    places = [(np.arange(len(numbers)) + beginning) / len(numbers) for numbers, beginning in zip(groups, beginnings, strict=True)]
    return np.concatenate(groups)[np.argsort(np.concatenate(places), kind="stable")]


def _shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` dealt out by the weights, what is left over to the largest remainders."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for part in sorted(range(len(exact)), key=lambda part: shares[part] - exact[part])[: count - sum(shares)]:
        shares[part] += 1
    return shares


def cut_by_length(lengths: Sequence[int], tokens_per_batch: int, batch_cost: int) -> list[list[int]]:
    """Cuts indices, longest row first, into the micro-batches that compute the fewest tokens, padding included.

    The padded size of each stays within the budget; one row always fits. A micro-batch counts as `batch_cost`
    tokens more, so that small ones come about only where they save more than that.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cost, start = [0] + [math.inf] * len(order), [0] * (len(order) + 1)  # of the best cut of the first rows; its last beginning
    for first, index in enumerate(order):
        widest = lengths[index]
        for end in range(first + 1, min(len(order), first + max(1, tokens_per_batch // widest)) + 1):
            total = cost[first] + widest * (end - first) + batch_cost
            if total < cost[end]:
                cost[end], start[end] = total, first
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def collate(rows: Sequence[Encoded], numbers: Sequence[int], which: Sequence[int], device: torch.device) -> Batch:
    """The tensors of `rows[number]` for every number; `which[i]` is the prefix that row `numbers[i]` continues from."""
    picked = [rows[number] for number in numbers]
    width = max(len(row) for row in picked) - 1
    ids_BT = torch.zeros(len(picked), width, dtype=torch.long)
    mask_BT, next_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    supervised_BT = torch.zeros(len(picked), width, dtype=torch.bool)
    for index, row in enumerate(picked):
        real = slice(len(row) - 1)
        ids_BT[index, real] = torch.tensor(row.ids[:-1])
        mask_BT[index, real] = 1
        next_BT[index, real] = torch.tensor(row.ids[1:])
        supervised_BT[index, real] = torch.tensor(row.supervised[1:])
    scored_N = supervised_BT.flatten().nonzero()[:, 0]
    tensors = (ids_BT, mask_BT, torch.tensor(which), scored_N, next_BT.flatten()[scored_N], scored_N // width)
    ids_BT, mask_BT, which_B, scored_N, targets_N, row_N = (_sent(tensor, device) for tensor in tensors)
    return Batch(ids_BT, mask_BT, which_B, scored_N, targets_N, row_N, tuple(numbers))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a GPU goes on with what it is doing while rows are prepared."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def cut(rows: Sequence[Encoded], tokens_per_batch: int, device: torch.device) -> list[list[int]]:
    """The numbers of the rows of every micro-batch, longest first."""
    return cut_by_length([len(row) for row in rows], tokens_per_batch, _batch_cost(device))


def cost(rows: Sequence[Encoded], numbers: Sequence[int], device: torch.device) -> int:
    """What a micro-batch of these rows takes, in tokens."""
    return len(numbers) * max(len(rows[number]) for number in numbers) + _batch_cost(device)


def batches(
    rows: Sequence[Encoded], which: Sequence[int], tokens_per_batch: int, device: torch.device, world: World = World()
) -> Iterator[Batch]:
    """The micro-batches of rows that this process computes, longest first; row i continues from prefix `which[i]`."""
    groups = cut(rows, tokens_per_batch, device)
    for group, owner in zip(groups, world.owners([cost(rows, group, device) for group in groups]), strict=True):
        if owner == world.rank:
            yield collate(rows, group, [which[index] for index in group], device)


def _batch_cost(device: torch.device) -> int:
    return CPU_BATCH_COST if device.type == "cpu" else GPU_BATCH_COST
