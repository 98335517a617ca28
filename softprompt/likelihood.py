"""The loss of rows that continue from prefixes, and of many candidates after one text, which is read once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.batch import Batch, batches
from softprompt.encode import Encoded, num_shared
from softprompt.loss import token_losses
from softprompt.model import FrozenBase
from softprompt.prefix import Continued, Prefix, as_prefixes


@torch.no_grad()
def row_losses(
    base: FrozenBase, prefix: Prefix, rows: Sequence[Encoded], tokens_per_batch: int, which: Sequence[int] | None = None
) -> Tensor:
    """[len(rows)] summed loss of every row's supervised tokens, float64 on the CPU. Row i continues from prefix number `which[i]`,
    all of them from the first where nothing is said."""
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for batch in batches(rows, which or [0] * len(rows), tokens_per_batch, base.device):
        continued = base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
        _add_losses(sums, base, continued, batch)
    return sums


def _add_losses(sums: Tensor, base: FrozenBase, continued: Continued, batch: Batch) -> None:
    if not len(batch.targets_N):
        return
    losses = token_losses(base, continued, batch).double().cpu()
    sums.index_add_(0, torch.tensor(batch.rows)[batch.row_N.cpu()], losses)


@torch.no_grad()
def candidate_losses(base: FrozenBase, prefix: Prefix, rows: Sequence[Sequence[Encoded]], tokens_per_batch: int) -> Tensor:
    """[rows, candidates] summed loss of every row's supervised tokens with each of its candidates, float64 on the CPU.

    `rows[r][c]` is row r with candidate c. What a row's candidates have in common is read once, and each goes on from there.
    """
    shared = [num_shared(candidate.ids[:-1] for candidate in candidates) for candidates in rows]  # a tail has a token to predict
    if not base.shares_prefix or min(shared) < 2:
        columns = [row_losses(base, prefix, candidates, tokens_per_batch) for candidates in zip(*rows, strict=True)]
        return torch.stack(columns, dim=1)
    texts = [Encoded(row[0].ids[:count], row[0].supervised[:count]) for row, count in zip(rows, shared, strict=True)]
    of_texts, of_tails = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), len(rows[0]), dtype=torch.float64)
    for batch in batches(texts, [0] * len(texts), tokens_per_batch, base.device):
        read = base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT, keep=True)
        _add_losses(of_texts, base, read, batch)
        tails = [candidate.after(shared[row] - 1) for row in batch.rows for candidate in rows[row]]
        which = [index for index in range(len(batch.rows)) for _ in rows[0]]
        of_tails[list(batch.rows)] = row_losses(base, as_prefixes(read), tails, tokens_per_batch, which).view(len(batch.rows), -1)
    return of_texts[:, None] + of_tails
