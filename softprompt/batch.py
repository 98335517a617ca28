"""The plan of a step (pure) and the tensors of a micro-batch.

A step is a set of examples. How it is cut into micro-batches is decided here, by length and a token budget; since the
loss is a sum over supervised tokens divided by the step's own count of them, the cut never changes the gradient.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.encode import Encoded


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right. `ids_BT` and `mask_BT` are long; `scored_BT` marks the hidden states whose next
    token is supervised, and `targets_N` holds those tokens in the same (row by row) order."""

    ids_BT: Tensor
    mask_BT: Tensor
    scored_BT: Tensor
    targets_N: Tensor
    rows: tuple[int, ...]

    @property
    def row_of_target(self) -> Tensor:
        """[N]: the batch row that each target belongs to."""
        return self.scored_BT.nonzero()[:, 0]


def order_of_rows(num_rows: int, first: int, count: int, seed: int) -> list[int]:
    """Row numbers first .. first + count of an endless series of shuffled epochs; a function of its arguments alone."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, offset = divmod(first + len(rows), num_rows)
        shuffled = list(range(num_rows))
        random.Random(f"{seed}/{epoch}").shuffle(shuffled)
        rows += shuffled[offset : offset + count - len(rows)]
    return rows


def cut_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Groups indices into micro-batches of similar length whose padded size stays within the budget (one row always fits)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        widest = lengths[groups[-1][0]] if groups else 0
        if groups and widest * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def collate(rows: Sequence[Encoded], numbers: Sequence[int], device: torch.device) -> Batch:
    """The tensors of `rows[number]` for every number."""
    picked = [rows[number] for number in numbers]
    width = max(len(row) for row in picked)
    ids_BT = torch.zeros(len(picked), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    supervised_BT = torch.zeros(len(picked), width, dtype=torch.bool)
    for index, row in enumerate(picked):
        ids_BT[index, : len(row)] = torch.tensor(row.ids)
        mask_BT[index, : len(row)] = 1
        supervised_BT[index, : len(row)] = torch.tensor(row.supervised)
    scored_BT = torch.zeros_like(supervised_BT)
    scored_BT[:, :-1] = supervised_BT[:, 1:]
    return Batch(ids_BT.to(device), mask_BT.to(device), scored_BT.to(device), ids_BT[supervised_BT].to(device), tuple(numbers))


def batches(rows: Sequence[Encoded], numbers: Sequence[int], tokens_per_batch: int, device: torch.device) -> Iterator[Batch]:
    """The micro-batches of the rows with these numbers, longest first."""
    for group in cut_by_length([len(rows[number]) for number in numbers], tokens_per_batch):
        yield collate(rows, [numbers[index] for index in group], device)
