"""The language-model head: hidden states to logits, and the cross-entropy of many tokens without ever holding their logits.

The vocabulary is walked in blocks with a running log-sum-exp, as flash attention walks its keys; what backward needs,
softmax(logits) times the head's weight, is summed up on the way. Exact, in one pass, at N x block numbers of memory.

Shapes: N scored tokens, K tokens that one of them has a wish about, M states that they come after, E members of an ensemble,
H hidden size, V vocabulary, C columns of one block.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

BLOCK_NUMBERS = {"cpu": 2**21, "cuda": 2**27}  # float32 logits at a time: what the caches of a CPU like, what fills a GPU
TOKENS = 1024  # scored tokens at a time
SAFETY = 256  # a column is left out of backward where no token gives it more than tolerance / SAFETY


class Wanted(Protocol):
    """What is learned from at N positions: a function of the logits of some tokens and of the log-sum-exp of all.

    With q the softmax of the logits z, the gradient of such a loss by the hidden state is
    share * sum over the vocabulary of q dz - sum over `ids_NK` of pull * dz: the walk sums up the first part, whatever is wanted.
    """

    @property
    def ids_NK(self) -> Tensor: ...

    def split(self, size: int) -> list[Self]:
        """The same by `size` positions at a time."""

    def terms(self, logits_NK: Tensor, log_sum_N: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(losses [N], share [N], pull [N, K]); None stands for ones."""


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap); `cap` and `bias` may be None."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether logits are products with the rows of the weight, and no more."""
        return self.cap is None and self.bias_V is None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        return self._finish(torch.nn.functional.linear(hidden.to(self.weight_VH.dtype), self.weight_VH, self.bias_V))

    def _finish(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def block(self, hidden_NH: Tensor, columns: slice | Tensor) -> Tensor:
        """[N, C] logits; from [E, N, H] the mean over the E."""
        bias = None if self.bias_V is None else self.bias_V[columns]
        logits = self._finish(torch.nn.functional.linear(hidden_NH, self.weight_VH[columns], bias).float())
        return logits if logits.dim() == 2 else logits.mean(dim=0)

    def _logits_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of one token, or of K, after each state: [..., H] and ids [...] -> [...]."""
        logits = torch.linalg.vecdot(hidden.float(), self.weight_VH[ids].float())
        return self._finish(logits if self.bias_V is None else logits + self.bias_V[ids].float())

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits by hidden @ weight.T."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())

    def losses(self, hidden_NH: Tensor, wanted: Wanted, tolerance: float | None) -> tuple[Tensor, Tensor | None]:
        """(losses [N], their gradient by `hidden_NH` [N, H] or None), float32, natural logarithm.

        `tolerance`: None leaves the gradient out, 0 is exact. Otherwise each token's gradient may leave out columns of the
        vocabulary that hold this share of its probability together, at most: its error is below tolerance x (norm of the
        longest row of the head). On a CPU this nearly halves the work.
        """
        hidden_NH = hidden_NH.to(self.weight_VH.dtype)
        parts = [self._losses(hidden, own, tolerance) for hidden, own in zip(hidden_NH.split(TOKENS), wanted.split(TOKENS), strict=True)]
        losses_N = torch.cat([losses for losses, _ in parts])
        return losses_N, None if tolerance is None else torch.cat([grad for _, grad in parts if grad is not None])

    def losses_after(self, states_EMH: Tensor, source_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy [N] of target n after state number `source_N[n]`, float32, natural logarithm; whether it was the likeliest
        token, [N]). However many targets a state has, it is taken to the whole vocabulary once.

        E states are of an ensemble, which chooses by the mean of its members' log-probabilities: renormalised, that is the
        distribution of their mean logits.
        """
        states_EMH = states_EMH.to(self.weight_VH.dtype)
        states_EMH = states_EMH[0] if len(states_EMH) == 1 else states_EMH
        likeliest_M = torch.zeros(states_EMH.shape[-2], dtype=torch.long, device=states_EMH.device)
        start_M = torch.full_like(likeliest_M, torch.finfo(torch.float32).min, dtype=torch.float32)
        parts = zip(states_EMH.split(TOKENS, dim=-2), start_M.split(TOKENS), likeliest_M.split(TOKENS), strict=True)
        log_sum_M = torch.cat([self.walk(states, start, None, 0.0, first) for states, start, first in parts])
        target_logits_N = self._logits_of(states_EMH[..., source_N, :], targets_N)
        target_logits_N = target_logits_N if target_logits_N.dim() == 1 else target_logits_N.mean(dim=0)
        return log_sum_M[source_N] - target_logits_N, likeliest_M[source_N] == targets_N

    def _losses(self, hidden_NH: Tensor, wanted: Wanted, tolerance: float | None) -> tuple[Tensor, Tensor | None]:
        ids_NK = wanted.ids_NK
        logits_NK = self._logits_of(hidden_NH[:, None], ids_NK)
        start_N = logits_NK.amax(dim=1)
        if tolerance is None:
            return wanted.terms(logits_NK, self.walk(hidden_NH, start_N, None, 0.0))[0], None
        tolerance = tolerance if hidden_NH.device.type == "cpu" else 0.0  # choosing columns would make a GPU wait
        start_N = torch.logsumexp(self.block(hidden_NH, ids_NK.unique()), dim=1) if tolerance else start_N
        grad_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        log_sum_N = self.walk(hidden_NH, start_N, grad_NH, tolerance)
        losses_N, share_N, pull_NK = wanted.terms(logits_NK, log_sum_N)
        slope = self.slope(logits_NK)
        pull = slope if pull_NK is None else pull_NK * slope
        grad_NH = grad_NH if share_N is None else grad_NH.mul_(share_N[:, None])
        grad_NH -= (self.weight_VH[ids_NK].float() * (pull[..., None] if isinstance(pull, Tensor) else pull)).sum(dim=1)
        return losses_N, grad_NH

    def walk(
        self, hidden_NH: Tensor, start_N: Tensor, grad_NH: Tensor | None, tolerance: float, likeliest_N: Tensor | None = None
    ) -> Tensor:
        """Log-sum-exp of the logits [N] (of [E, N, H], of their mean over the E); adds softmax @ weight to `grad_NH`, and writes
        the likeliest tokens to `likeliest_N`.

        `start_N` is at most the log-sum-exp: shares are relative to it, and to more as the walk learns more, so a share is
        never below the probability that it stands for.
        """
        level_N, sum_N, left_out_N = start_N, torch.zeros_like(start_N), torch.zeros_like(start_N)
        largest_N = torch.full_like(start_N, -torch.inf)
        vocabulary = len(self.weight_VH)
        size = block_size(hidden_NH)
        for first in range(0, vocabulary, size):
            columns = slice(first, first + size)
            logits_NC = self.block(hidden_NH, columns)
            block_N = logits_NC.amax(dim=1)
            if likeliest_N is not None:
                better = (block_N > largest_N).nonzero()[:, 0]
                likeliest_N[better] = logits_NC[better].argmax(dim=1) + first
                largest_N = torch.maximum(largest_N, block_N)
            higher_N = torch.maximum(block_N, level_N + sum_N.clamp(min=1).log())
            shrink_N = (level_N - higher_N).exp()
            level_N = higher_N
            slope = self.slope(logits_NC) if grad_NH is not None else 1.0
            shares_NC = logits_NC.sub_(level_N[:, None]).exp_()
            sum_N = sum_N * shrink_N + shares_NC.sum(dim=1)
            if grad_NH is None:
                continue
            may_leave_N = tolerance * min(1.0, (first + size) / vocabulary) - left_out_N
            product_NH, missed_N = weighted(shares_NC, slope, self.weight_VH[columns], tolerance / SAFETY, may_leave_N)
            left_out_N += missed_N
            grad_NH.mul_(shrink_N[:, None]).add_(product_NH)
        if grad_NH is not None:
            grad_NH.div_(sum_N[:, None])
        return level_N + sum_N.log()


def block_size(hidden_NH: Tensor) -> int:
    """Columns of a block for so many states."""
    return max(256, BLOCK_NUMBERS.get(hidden_NH.device.type, 2**27) // hidden_NH.shape[:-1].numel())


def weighted(
    shares_NC: Tensor, slope: Tensor | float, weight_CH: Tensor, smallest: float, may_leave_N: Tensor
) -> tuple[Tensor, Tensor | float]:
    """((shares * slope) @ weight [N, H], the share of each token that was left out).

    Columns where no token has a share above `smallest` are left out, except for tokens that would lose more than they may.
    """
    sloped_NC = shares_NC * slope if isinstance(slope, Tensor) else shares_NC
    scale = 1.0 if isinstance(slope, Tensor) else slope
    large = (shares_NC.amax(dim=0) > smallest).nonzero()[:, 0] if smallest else None
    if large is None or len(large) > len(weight_CH) // 2:
        return sloped_NC.to(weight_CH.dtype) @ weight_CH * scale, 0.0
    product_NH = sloped_NC[:, large].to(weight_CH.dtype) @ weight_CH[large]
    missed_N = shares_NC.sum(dim=1) - shares_NC[:, large].sum(dim=1)
    whole = (missed_N > may_leave_N).nonzero()[:, 0]
    if len(whole):
        product_NH[whole] = sloped_NC[whole].to(weight_CH.dtype) @ weight_CH
        missed_N[whole] = 0.0
    return product_NH * scale, missed_N
