"""How far one next-token distribution is from another over the whole vocabulary, and the gradient of that, without logits [N, V].

With p the teacher's distribution and q the student's, of logits t and s: KL(p || q) = sum of p (t - s) - logsumexp(t) + logsumexp(s), and
its gradient by s is q - p. Where logits are no more than products with the head's rows, the teacher's part of both is one vector, the mean
of these rows under p: it is found once, and a step walks the vocabulary for the student alone (head.py). Where the head has a cap or a
bias, both are walked in the same blocks of the vocabulary, each with its own running log-sum-exp.

Shapes: N tokens, H hidden size, V vocabulary, C columns of one block. The states of both stand in one tensor [2 N, H], the student's first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.engine.head import SAFETY, TOKENS, Head, block_size, weighted

NEVER = -1e4  # a logit whose exponential is 0 in float32


@dataclass(frozen=True)
class Mean:
    """A teacher's distributions as far as a plain head needs them: the mean of the head's rows under each [N, H], the log-sum-exp of the
    logits [N], the likeliest token [N]."""

    rows_NH: Tensor
    log_sum_N: Tensor
    likeliest_N: Tensor

    def split(self, counts: list[int] | int) -> list["Mean"]:
        parts = (part.split(counts) for part in (self.rows_NH, self.log_sum_N, self.likeliest_N))
        return [Mean(*own) for own in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Told:
    """What a teacher says at N places: the states [N, H] that its distributions come after, or where `sure_N` is not -1 that token, with
    certainty; `mean` where the head is plain."""

    states_NH: Tensor
    sure_N: Tensor
    mean: Mean | None

    def split(self, counts: list[int] | int) -> list["Told"]:
        """By so many places at a time."""
        states = self.states_NH.split(counts)
        means = [None] * len(states) if self.mean is None else self.mean.split(counts)
        return [Told(*own) for own in zip(states, self.sure_N.split(counts), means, strict=True)]


def joined(parts: Sequence[Told]) -> Told:
    """All of them, in their order."""
    columns = zip(*((one.mean.rows_NH, one.mean.log_sum_N, one.mean.likeliest_N) for one in parts if one.mean is not None), strict=True)
    means = [torch.cat(column) for column in columns]
    states_NH, sure_N = torch.cat([one.states_NH for one in parts]), torch.cat([one.sure_N for one in parts])
    return Told(states_NH, sure_N, Mean(*means) if means else None)


@torch.no_grad()
def told(head: Head, states_NH: Tensor, sure_N: Tensor) -> Told:
    """What a teacher says after these states, which are 0 where `sure_N`, [N], has a token that it says with certainty, and not -1."""
    if not head.plain:
        return Told(states_NH, sure_N, None)
    parts = []
    for states, sure in zip(states_NH.split(TOKENS), sure_N.split(TOKENS), strict=True):
        rows_NH = torch.zeros_like(states, dtype=torch.float32)
        likeliest_N = torch.zeros_like(sure)
        log_sum_N = head.walk(states.to(head.weight_VH.dtype), _lowest(states), rows_NH, 0.0, likeliest_N)
        (known,) = (sure >= 0).nonzero(as_tuple=True)
        rows_NH[known] = head.weight_VH[sure[known]].float() * head.scale  # and as all that it says, no logarithm of a sum
        parts.append(Told(states, sure, Mean(rows_NH, log_sum_N.index_fill(0, known, 0.0), torch.where(sure < 0, likeliest_N, sure))))
    return joined(parts)


def divergences(head: Head, student_NH: Tensor, teacher: Told, known_N: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor | None]:
    """(KL divergence [N] of the teacher's distribution from the student's in nats, its gradient by `student_NH` [N, H] or None), float32.

    `known_N`: a token that is likely at each place, where the walk begins. `tolerance`: as in Head.losses.
    """
    losses, grads = [], []
    for student, wanted, known in zip(student_NH.split(TOKENS), teacher.split(TOKENS), known_N.split(TOKENS), strict=True):
        loss, grad = (
            _toward_mean(head, student, wanted, known, tolerance) if wanted.mean else _both(head, student, wanted, known, tolerance)
        )
        losses.append(loss)
        grads.append(grad)
    return torch.cat(losses), None if tolerance is None else torch.cat([grad for grad in grads if grad is not None])


def compared(head: Head, student_NH: Tensor, teacher: Told, known_N: Tensor) -> tuple[Tensor, Tensor]:
    """(KL divergence [N] as above, whether both hold the same token for the likeliest, [N])."""
    losses, same = [], []
    for student, wanted, known in zip(student_NH.split(TOKENS), teacher.split(TOKENS), known_N.split(TOKENS), strict=True):
        if wanted.mean is not None:
            first = torch.zeros_like(wanted.mean.likeliest_N)
            losses.append(_apart(student, wanted, head.walk(student.to(head.weight_VH.dtype), _lowest(student), None, 0.0, first)))
            same.append(first == wanted.mean.likeliest_N)
        else:
            walked = _walk(head, student, wanted, known, None)
            losses.append(_divergence(walked))
            same.append(torch.eq(*walked.likeliest.chunk(2)))
    return torch.cat(losses).clamp(min=0), torch.cat(same)  # rounding apart


def _lowest(states_NH: Tensor) -> Tensor:
    return torch.full((len(states_NH),), torch.finfo(torch.float32).min, device=states_NH.device)


# ---- a plain head --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _toward_mean(head: Head, student_NH: Tensor, teacher: Told, known_N: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor | None]:
    assert teacher.mean is not None, "of a plain head"
    student_NH = student_NH.to(head.weight_VH.dtype)
    start_N = torch.logsumexp(head.block(student_NH, known_N.unique()), dim=1)
    if tolerance is None:
        return _apart(student_NH, teacher, head.walk(student_NH, start_N, None, 0.0)), None
    tolerance = tolerance if student_NH.device.type == "cpu" else 0.0  # choosing columns would make a GPU wait
    grad_NH = torch.zeros_like(student_NH, dtype=torch.float32)
    log_sum_N = head.walk(student_NH, start_N, grad_NH, tolerance)
    return _apart(student_NH, teacher, log_sum_N), grad_NH.sub_(teacher.mean.rows_NH)


def _apart(student_NH: Tensor, teacher: Told, log_sum_N: Tensor) -> Tensor:
    """The divergence; `log_sum_N`: of the student's logits."""
    assert teacher.mean is not None, "of a plain head"
    towards_NH = teacher.states_NH.float() - student_NH.float()
    return torch.linalg.vecdot(teacher.mean.rows_NH, towards_NH) - teacher.mean.log_sum_N + log_sum_N


# ---- any head: both are walked -------------------------------------------------------------------------------------


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


def _both(head: Head, student_NH: Tensor, teacher: Told, known_N: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor | None]:
    walked = _walk(head, student_NH, teacher, known_N, tolerance)
    if walked.rows is None:
        return _divergence(walked), None
    own, wanted = (walked.rows / walked.sums[:, None]).chunk(2)
    return _divergence(walked), own - wanted


def _divergence(walked: _Walked) -> Tensor:
    log_sum_s, log_sum_t = (walked.level + walked.sums.log()).chunk(2)
    return walked.gap / walked.sums.chunk(2)[1] - log_sum_t + log_sum_s


@torch.no_grad()
def _walk(head: Head, student_NH: Tensor, told: Told, known_N: Tensor, tolerance: float | None) -> _Walked:
    both_2NH = torch.cat([student_NH, told.states_NH]).to(head.weight_VH.dtype)
    tolerance = tolerance if both_2NH.device.type == "cpu" or tolerance is None else 0.0  # choosing columns would make a GPU wait
    level = torch.logsumexp(head.block(both_2NH, known_N.unique()), dim=1)
    level[len(known_N) :][told.sure_N >= 0] = 0.0
    nothing = torch.zeros_like(level)
    rows = None if tolerance is None else torch.zeros_like(both_2NH, dtype=torch.float32)
    least = torch.full_like(level, -torch.inf)
    walked = _Walked(level, nothing, nothing[len(known_N) :], rows, nothing.clone(), least, torch.zeros_like(level, dtype=torch.long))
    size, vocabulary = block_size(both_2NH), len(head.weight_VH)
    for first in range(0, vocabulary, size):
        may_leave = None if tolerance is None else tolerance * min(1.0, (first + size) / vocabulary) - walked.left_out
        _add_block(head, both_2NH, told.sure_N, slice(first, first + size), walked, tolerance, may_leave)
    return walked


def _make_sure(teacher_NC: Tensor, sure_N: Tensor, columns: slice) -> None:
    """Logits of 0 for what is said with certainty, and of next to nothing for all else there."""
    teacher_NC[sure_N >= 0] = NEVER
    here = ((sure_N >= columns.start) & (sure_N < columns.stop)).nonzero()[:, 0]
    teacher_NC[here, sure_N[here] - columns.start] = 0.0


def _add_block(
    head: Head,
    both_2NH: Tensor,
    sure_N: Tensor,
    columns: slice,
    walked: _Walked,
    tolerance: float | None,
    may_leave_2N: Tensor | None,
) -> None:
    logits = head.block(both_2NH, columns)
    student, teacher = logits.chunk(2)
    _make_sure(teacher, sure_N, columns)
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
