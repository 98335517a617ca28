"""The loss of rows that continue from prefixes, and of many candidates after one text, which is read once.

The layers run in micro-batches. The head, most of a small base's weights, then runs once for a group of rows.

Shapes: R rows, C candidates of each, K members of an ensemble, M states, N scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from softprompt.engine.batch import Batch, batches
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Continued, Prefix, as_prefixes
from softprompt.engine.tokens import Encoded, num_shared
from softprompt.engine.world import World
from softprompt.errors import ConfigError

GROUP = 4096  # tokens of a group of rows, whose states wait for the head together
Candidates = Sequence[Sequence[Encoded]]  # [R][C]


def row_losses(
    base: FrozenBase,
    prefix: Prefix,
    rows: Sequence[Encoded],
    tokens_per_batch: int,
    which: Sequence[int] | None = None,
    world: World = World(),
) -> Tensor:
    """[len(rows)] summed loss of every row's supervised tokens, float64 on the CPU. Row i continues from prefix number `which[i]`,
    all of them from the first where nothing is said. The processes of `world` share the rows."""
    return _losses(base, [prefix], [[_branch([row]) for row in rows]], tokens_per_batch, which, world)[:, 0]


def candidate_losses(base: FrozenBase, prefix: Prefix, rows: Candidates, tokens_per_batch: int) -> Tensor:
    """[rows, candidates] summed loss of every row's supervised tokens with each of its candidates, float64 on the CPU.

    `rows[r][c]` is row r with candidate c. What a row's candidates have in common is read once, and each goes on from there.
    """
    return ensemble_losses(base, [(prefix, rows)], tokens_per_batch)


def ensemble_losses(
    base: FrozenBase, members: Sequence[tuple[Prefix, Candidates]], tokens_per_batch: int, world: World = World()
) -> Tensor:
    """Like `candidate_losses`, of members that agree on every token as they do when they answer: by the mean of their
    log-probabilities, here renormalised. The processes of `world` share the rows. Raises ConfigError for members that do not score the
    same tokens."""
    prefixes = [prefix for prefix, _ in members]
    branches = [[_branch(candidates) for candidates in rows] for _, rows in members]
    if all(branch.num_read for own in branches for branch in own):
        return _losses(base, prefixes, branches, tokens_per_batch, world=world)
    num_candidates = len(members[0][1][0])
    columns = [[[_branch([candidates[c]]) for candidates in rows] for _, rows in members] for c in range(num_candidates)]
    return torch.cat([_losses(base, prefixes, column, tokens_per_batch, world=world) for column in columns], dim=1)


# ---- rows that branch ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """A row's candidates as the text that they all begin with and the distinct tails after it; candidate c has tail `which[c]`.

    The last token of `text` is predicted and not read: in its place stands the first of every tail.
    """

    text: Encoded
    tails: tuple[Encoded, ...]
    which: tuple[int, ...]

    @property
    def num_read(self) -> int:
        return len(self.text) - 1

    @property
    def num_states(self) -> list[int]:
        """How many states score the text, and each of its tails."""
        return [sum(part.supervised[1:]) for part in (self.text, *self.tails)]


def _branch(candidates: Sequence[Encoded]) -> _Branch:
    count = num_shared(candidate.ids[:-1] for candidate in candidates)
    tails = [Encoded(candidate.ids[count:], candidate.supervised[count:]) for candidate in candidates]
    distinct = tuple(dict.fromkeys(tails))
    first = candidates[0]
    return _Branch(Encoded(first.ids[: count + 1], (*first.supervised[:count], True)), distinct, tuple(map(distinct.index, tails)))


def _offsets(branches: Sequence[_Branch]) -> list[list[int]]:
    """The number of the first state of every branch's text and of each of its tails, in the order of rows; a last one is the count."""
    numbers = list(accumulate((count for branch in branches for count in branch.num_states), initial=0))
    ends = list(accumulate((1 + len(branch.tails) for branch in branches), initial=0))
    return [numbers[first:end] for first, end in pairwise(ends)] + [numbers[-1:]]


def _scored(branches: Sequence[_Branch]) -> list[tuple[int, int, int]]:
    """(number of the state before it, the token, number of the sum that its loss belongs to) of every supervised token."""
    found = []
    for row, (branch, offsets) in enumerate(zip(branches, _offsets(branches), strict=False)):
        for candidate, number in enumerate(branch.which):
            tail, into = branch.tails[number], row * len(branch.which) + candidate
            before = [token for token, on in zip(branch.text.ids[1:-1], branch.text.supervised[1:-1], strict=True) if on]
            first = tail.ids[:1] if tail.supervised[0] else ()
            after = [token for token, on in zip(tail.ids[1:], tail.supervised[1:], strict=True) if on]
            found += [(offsets[0] + index, token, into) for index, token in enumerate((*before, *first))]
            found += [(offsets[1 + number] + index, token, into) for index, token in enumerate(after)]
    return found


@torch.no_grad()
def _losses(
    base: FrozenBase,
    prefixes: Sequence[Prefix],
    branches: Sequence[Sequence[_Branch]],
    tokens_per_batch: int,
    which: Sequence[int] | None = None,
    world: World = World(),
) -> Tensor:
    """[R, C] of `branches`, [K][R]; member k continues from `prefixes[k]`, row r of it from number `which[r]` of these."""
    num_rows, num_candidates = len(branches[0]), len(branches[0][0].which)
    sums_RC = torch.zeros(num_rows, num_candidates, dtype=torch.float64)
    lengths = [branch.num_read for branch in branches[0]]
    groups = list(_groups(lengths, max(GROUP, tokens_per_batch)))
    owners = world.owners([sum(lengths[number] for number in group) for group in groups])
    for group in (group for group, owner in zip(groups, owners, strict=True) if owner == world.rank):
        own = [[rows[number] for number in group] for rows in branches]
        numbers = [which[number] if which else 0 for number in group]
        scored, *others = map(_scored, own)
        if any(other != scored for other in others):
            raise ConfigError("the prompts of an ensemble score different tokens: they must have the same template")
        states = [_states(base, prefix, rows, numbers, tokens_per_batch) for prefix, rows in zip(prefixes, own, strict=True)]
        source_N, targets_N, into_N = torch.tensor(scored).T
        losses_N, _ = base.head.losses_after(torch.stack(states), source_N.to(base.device), targets_N.to(base.device))
        sums = torch.zeros(len(group) * num_candidates, dtype=torch.float64).index_add_(0, into_N, losses_N.cpu().double())
        sums_RC[group] = sums.view(len(group), num_candidates)
    return world.total(sums_RC)


def _groups(lengths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Numbers of rows, the longest first, in groups of about `room` tokens."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        group.append(number)
        if sum(lengths[number] for number in group) >= room:
            yield group
            group = []
    if group:
        yield group


def _states(base: FrozenBase, prefix: Prefix, branches: Sequence[_Branch], which: Sequence[int], tokens_per_batch: int) -> Tensor:
    """[M, H] states before all scored tokens, numbered as `_offsets` says."""
    offsets = _offsets(branches)
    states_MH = torch.empty(offsets[-1][0], base.hidden_size, dtype=base.dtype, device=base.device)
    for batch in batches([branch.text for branch in branches], which, tokens_per_batch, base.device):
        tails = [
            (index, tail, start)
            for index, row in enumerate(batch.rows)
            for tail, start in zip(branches[row].tails, offsets[row][1:], strict=True)
            if any(tail.supervised[1:])
        ]
        read = base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT, keep=bool(tails))
        _put(states_MH, read, batch, [offsets[row][0] for row in batch.rows])
        if not tails:
            continue
        texts = as_prefixes(read)
        for part in batches([tail for _, tail, _ in tails], [index for index, _, _ in tails], tokens_per_batch, base.device):
            read = base.continue_from(texts, part.which_B, part.ids_BT, part.mask_BT)
            _put(states_MH, read, part, [tails[number][2] for number in part.rows])
    return states_MH


def _put(states_MH: Tensor, read: Continued, batch: Batch, offsets: Sequence[int]) -> None:
    """Writes the states before a batch's supervised tokens, those of its row b from number `offsets[b]` on."""
    num_B = torch.bincount(batch.row_N.cpu(), minlength=len(offsets))
    places_M = torch.cat([start + torch.arange(int(count)) for start, count in zip(offsets, num_B, strict=True)])
    states_MH[places_M.to(states_MH.device)] = read.hidden_BTH.flatten(0, 1).index_select(0, batch.scored_N).to(states_MH.dtype)
