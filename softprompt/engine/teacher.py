"""A teacher: the same base with a text in its context. What a prompt learns from it is its distribution of every supervised token.

The text's keys and values are computed once and kept; rows are read behind them, whatever the text's length. Base and text are frozen, so
what it says of a row is kept too: later epochs and evaluations do not ask again.

Shapes: N supervised tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from softprompt.engine.batch import CPU_BATCH_COST, Batch, batches, collate, cut_by_length
from softprompt.engine.divergence import Told, compared, joined, told
from softprompt.engine.loss import Loss, TopTokens, divergence_losses, head_losses
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix, assemble
from softprompt.engine.prompt import Prompt, read_together
from softprompt.engine.rows import Context
from softprompt.engine.shelf import Shelf
from softprompt.engine.tokens import Encoded
from softprompt.engine.world import World

ROOM = 2**31  # bytes of keys and values of texts that are kept; of several chunks those that were not used for longest leave
SAID = 2**29  # bytes of what it says of rows that are kept; where all of it would be more, none is
TOGETHER = 512  # tokens of rows that are read at once to be kept


class Teaching(Protocol):
    """Who says, at every supervised token of a row, how it goes on."""

    def loss(self, numbers: Sequence[int]) -> Loss:
        """The loss of a step whose rows have these numbers: the divergence of the teacher's distribution from the student's."""

    def compared(self, base: FrozenBase, own_NH: Tensor, numbers: Sequence[int], known_N: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence [N] at the supervised tokens `known_N` of these rows, row by row, whether the likeliest tokens are the same [N]);
        `own_NH`: the student's states before them."""

    def judges(self, numbers: Sequence[int]) -> Sequence[bool]:
        """[N]: at which of these tokens it has a distribution of its own."""


@dataclass(frozen=True)
class Teacher:
    """`rows[r]`: row r as the teacher reads it, behind `contexts[which[r]]`; its supervised tokens are the last of those of the row as
    students read it, and `sure[r]` the ids of the first ones: tokens that the teacher has never to say, since it reads its question
    otherwise, and that the student is to say with certainty. A context is the base's own prompt, of no rows, and the ids of a text."""

    contexts: tuple[Context, ...]
    rows: Sequence[Encoded]
    which: Sequence[int]
    sure: Sequence[tuple[int, ...]] = ()
    shelf: Shelf = field(default_factory=lambda: Shelf(ROOM), repr=False)
    _kept: dict[int, Told] = field(default_factory=dict, init=False, repr=False)

    def told(self, base: FrozenBase, numbers: Sequence[int]) -> Told:
        """What it says before the N supervised tokens of these rows as students read them, row by row, now or before."""
        if 2 * 4 * base.hidden_size * sum(self._counts) > SAID:
            return told(base.head, *self._places(base, numbers))
        for number in numbers:
            if number not in self._kept:
                group = self._groups[number]
                parts = told(base.head, *self._places(base, group)).split([self._counts[member] for member in group])
                self._kept.update(zip(group, parts, strict=True))
        return joined([self._kept[number] for number in numbers])

    def _places(self, base: FrozenBase, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(states [N, H] before what it says itself, 0 before what is sure; the ids of that [N], -1 elsewhere)."""
        states = self.states(base, numbers).split([self.rows[number].num_supervised for number in numbers])
        parts_NH: list[Tensor] = []
        sure_N: list[int] = []
        for number, own_NH in zip(numbers, states, strict=True):
            ids = self._sure(number)
            parts_NH += [own_NH.new_zeros(len(ids), own_NH.shape[1]), own_NH]
            sure_N += [*ids, *(-1,) * len(own_NH)]
        return torch.cat(parts_NH), torch.tensor(sure_N, device=base.device)

    def _sure(self, number: int) -> tuple[int, ...]:
        return self.sure[number] if self.sure else ()

    @cached_property
    def _counts(self) -> list[int]:
        """Supervised tokens of every row as students read it."""
        return [len(self._sure(number)) + row.num_supervised for number, row in enumerate(self.rows)]

    @cached_property
    def _groups(self) -> dict[int, list[int]]:
        """Which rows each row is read together with: always the same, so that it gives the same bits whoever asks first."""
        found: dict[int, list[int]] = {}
        for context in set(self.which):
            own = [number for number, one in enumerate(self.which) if one == context]
            for group in cut_by_length([len(self.rows[number]) for number in own], TOGETHER, CPU_BATCH_COST):
                members = [own[index] for index in group]
                found |= dict.fromkeys(members, members)
        return found

    @torch.no_grad()
    def states(self, base: FrozenBase, numbers: Sequence[int]) -> Tensor:
        """[N, H]: the hidden states before the supervised tokens of these rows, row by row."""
        rows = [self.rows[number] for number in numbers]
        used = sorted({self.which[number] for number in numbers})
        which = [used.index(self.which[number]) for number in numbers]
        batch = collate(rows, range(len(rows)), which, base.device)
        continued = base.continue_from(assemble([self.prefix(base, one) for one in used]), batch.which_B, batch.ids_BT, batch.mask_BT)
        return continued.hidden_BTH.flatten(0, 1).index_select(0, batch.scored_N)

    def loss(self, numbers: Sequence[int]) -> Loss:
        """See Teaching; over the whole vocabulary."""

        def toward(base: FrozenBase, hidden_NH: Tensor, batch: Batch, tolerance: float) -> Tensor:
            teacher = self.told(base, [numbers[row] for row in batch.rows])
            return divergence_losses(base, hidden_NH, teacher, batch.targets_N, tolerance)

        return toward

    def compared(self, base: FrozenBase, own_NH: Tensor, numbers: Sequence[int], known_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Teaching."""
        return compared(base.head, own_NH, self.told(base, numbers), known_N)

    def judges(self, numbers: Sequence[int]) -> Sequence[bool]:
        """See Teaching."""
        counts = [(len(self._sure(number)), self.rows[number].num_supervised) for number in numbers]
        return [own for sure, said in counts for own in (*(False,) * sure, *(True,) * said)]

    def prefix(self, base: FrozenBase, number: int) -> Prefix:
        """What rows behind context number `number` continue from."""
        prompt, ids = self.contexts[number]
        return self.shelf.take(prompt, ids, lambda: prompt.prefix(base, ids))


@dataclass(frozen=True)
class Listed:
    """A teacher elsewhere, which has said its likeliest tokens: `rows[r]`: of the supervised tokens of row r their ids [n, K] and
    probabilities [n, K], the likeliest first. All other tokens are one class."""

    rows: Sequence[tuple[Tensor, Tensor]]

    def loss(self, numbers: Sequence[int]) -> Loss:
        """See Teaching."""

        def toward(base: FrozenBase, hidden_NH: Tensor, batch: Batch, tolerance: float) -> Tensor:
            return head_losses(base, hidden_NH, self._wanted(base, [numbers[row] for row in batch.rows]), tolerance)

        return toward

    def compared(self, base: FrozenBase, own_NH: Tensor, numbers: Sequence[int], known_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Teaching."""
        wanted = self._wanted(base, numbers)
        losses_N, _ = base.head.losses(own_NH, wanted, None)
        every_N = torch.arange(len(own_NH), device=own_NH.device)
        _, same_N = base.head.losses_after(own_NH[None], every_N, wanted.ids_NK[:, 0])
        return losses_N, same_N

    def judges(self, numbers: Sequence[int]) -> Sequence[bool]:
        """See Teaching: of what it is certain, it has said so itself."""
        return [True] * sum(len(self.rows[number][0]) for number in numbers)

    def _wanted(self, base: FrozenBase, numbers: Sequence[int]) -> TopTokens:
        ids, probabilities = zip(*(self.rows[number] for number in numbers), strict=True)
        return TopTokens(torch.cat(ids).to(base.device), torch.cat(probabilities).to(base.device))


@dataclass(frozen=True)
class Likeness:
    """How like its teacher a student is on rows: KL divergence in nats [R], summed over the tokens of a row that the teacher judges, how
    many of these both hold for the likeliest [R], and how many there are [R]; float64 on the CPU."""

    divergences_R: Tensor
    same_first_R: Tensor
    tokens_R: Tensor

    @property
    def divergence(self) -> float:
        """In nats per token."""
        return (self.divergences_R.sum() / self.tokens_R.sum()).item()

    @property
    def same_first(self) -> float:
        """As a share of the tokens."""
        return (self.same_first_R.sum() / self.tokens_R.sum()).item()


@torch.no_grad()
def likeness(
    base: FrozenBase, teacher: Teaching, soft: Prompt, rows: Sequence[Encoded], tokens_per_batch: int, world: World = World()
) -> Likeness:
    """How like the teacher a prompt is on all its rows, which the processes share; `rows`: as the student reads them."""
    prefix, rest = read_together(base, [soft], rows)
    sums_3R = torch.zeros(3, len(rows), dtype=torch.float64)
    for batch in batches(rest, [0] * len(rest), tokens_per_batch, base.device, world):
        continued = base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
        own_NH = continued.hidden_BTH.flatten(0, 1).index_select(0, batch.scored_N)
        losses_N, same_N = teacher.compared(base, own_NH, batch.rows, batch.targets_N)
        judged_N = torch.tensor(teacher.judges(batch.rows), device=losses_N.device)
        found_3N = (torch.stack([losses_N, same_N.float(), torch.ones_like(losses_N)]) * judged_N).cpu().double()
        sums_3R.index_add_(1, torch.tensor(batch.rows)[batch.row_N.cpu()], found_3N)
    return Likeness(*world.total(sums_3R))
