"""How far one next-token distribution is from another over the whole vocabulary, and the gradient of that, without logits [N, V].

Both are walked in the same blocks of the vocabulary, each with its own running log-sum-exp (head.py). With p the teacher's distribution
and q the student's, of logits t and s: KL(p || q) = sum of p (t - s) - logsumexp(t) + logsumexp(s), and its gradient by s is q - p.

Shapes: N tokens, H hidden size, V vocabulary, C columns of one block. The states of both stand in one tensor [2 N, H], the student's first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.engine.head import SAFETY, TOKENS, Head, block_size, weighted


@dataclass
class _Walked:
    """Sums over the columns so far, relative to exp(`level`): of the shares, [2 N], and of the teacher's shares times t - s, [N]; the rows
    of the head weighted by the shares, [2 N, H], where a gradient is wanted; the likeliest tokens, [2 N]."""

    level: Tensor
    sums: Tensor
    gap: Tensor
    rows: Tensor | None
    left_out: Tensor
    largest: Tensor
    likeliest: Tensor


def divergences(
    head: Head, student_NH: Tensor, teacher_NH: Tensor, known_N: Tensor, tolerance: float | None
) -> tuple[Tensor, Tensor | None]:
    """(KL divergence [N] of the teacher's distribution from the student's in nats, its gradient by `student_NH` [N, H] or None), float32.

    `known_N`: a token that is likely at each place, where the walk begins. `tolerance`: as in Head.losses.
    """
    losses, grads = [], []
    for walked in _walks(head, student_NH, teacher_NH, known_N, tolerance):
        losses.append(_divergence(walked))
        if walked.rows is not None:
            own, wanted = (walked.rows / walked.sums[:, None]).chunk(2)
            grads.append(own - wanted)
    return torch.cat(losses), torch.cat(grads) if grads else None


def compared(head: Head, student_NH: Tensor, teacher_NH: Tensor, known_N: Tensor) -> tuple[Tensor, Tensor]:
    """(KL divergence [N] as above, whether both hold the same token for the likeliest, [N])."""
    losses, same = [], []
    for walked in _walks(head, student_NH, teacher_NH, known_N, None):
        first, other = walked.likeliest.chunk(2)
        losses.append(_divergence(walked).clamp(min=0))  # rounding apart
        same.append(first == other)
    return torch.cat(losses), torch.cat(same)


def _walks(head: Head, student_NH: Tensor, teacher_NH: Tensor, known_N: Tensor, tolerance: float | None) -> Iterator[_Walked]:
    """TOKENS places at a time."""
    for student, teacher, known in zip(student_NH.split(TOKENS), teacher_NH.split(TOKENS), known_N.split(TOKENS), strict=True):
        yield _walk(head, torch.cat([student, teacher]), known, tolerance)


def _divergence(walked: _Walked) -> Tensor:
    log_sum_s, log_sum_t = (walked.level + walked.sums.log()).chunk(2)
    return walked.gap / walked.sums.chunk(2)[1] - log_sum_t + log_sum_s


@torch.no_grad()
def _walk(head: Head, both_2NH: Tensor, known_N: Tensor, tolerance: float | None) -> _Walked:
    both_2NH = both_2NH.to(head.weight_VH.dtype)
    tolerance = tolerance if both_2NH.device.type == "cpu" or tolerance is None else 0.0  # choosing columns would make a GPU wait
    level = torch.logsumexp(head.block(both_2NH, known_N.unique()), dim=1)
    nothing = torch.zeros_like(level)
    rows = None if tolerance is None else torch.zeros_like(both_2NH, dtype=torch.float32)
    least = torch.full_like(level, -torch.inf)
    walked = _Walked(level, nothing, nothing[len(known_N) :], rows, nothing.clone(), least, torch.zeros_like(level, dtype=torch.long))
    size, vocabulary = block_size(both_2NH), len(head.weight_VH)
    for first in range(0, vocabulary, size):
        may_leave = None if tolerance is None else tolerance * min(1.0, (first + size) / vocabulary) - walked.left_out
        _add_block(head, both_2NH, slice(first, first + size), walked, tolerance, may_leave)
    return walked


def _add_block(head: Head, both_2NH: Tensor, columns: slice, walked: _Walked, tolerance: float | None, may_leave_2N: Tensor | None) -> None:
    logits = head.block(both_2NH, columns)
    student, teacher = logits.chunk(2)
    block, likeliest = logits.max(dim=1)
    walked.likeliest = torch.where(block > walked.largest, likeliest + columns.start, walked.likeliest)
    walked.largest = torch.maximum(walked.largest, block)
    higher = torch.maximum(block, walked.level + walked.sums.clamp(min=1).log())
    shrink = (walked.level - higher).exp()
    apart = teacher - student
    slope = head.slope(student)  # the gradient is by the student's logits, on both sides
    shares = logits.sub_(higher[:, None]).exp_()
    walked.gap = walked.gap * shrink.chunk(2)[1] + (shares.chunk(2)[1] * apart).sum(dim=1)
    walked.sums = walked.sums * shrink + shares.sum(dim=1)
    walked.level = higher
    if walked.rows is None or tolerance is None or may_leave_2N is None:
        return
    sloped = slope.repeat(2, 1) if isinstance(slope, Tensor) else slope
    product, missed = weighted(shares, sloped, head.weight_VH[columns], tolerance / SAFETY, may_leave_2N)
    walked.left_out += missed
    walked.rows.mul_(shrink[:, None]).add_(product)
