"""The language-model head: hidden states to logits, and the cross-entropy of many tokens without ever holding their logits.

The vocabulary is walked in blocks with a running log-sum-exp, as flash attention walks its keys; what backward needs,
softmax(logits) times the head's weight, is summed up on the way. Exact, in one pass, at N x block numbers of memory.

Shapes: N scored tokens, M states that they come after, K members of an ensemble, H hidden size, V vocabulary, C columns of one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_NUMBERS = {"cpu": 2**21, "cuda": 2**27}  # float32 logits at a time: what the caches of a CPU like, what fills a GPU
TOKENS = 1024  # scored tokens at a time
SAFETY = 256  # a column is left out of backward where no token gives it more than tolerance / SAFETY


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap); `cap` and `bias` may be None."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        return self._finish(torch.nn.functional.linear(hidden.to(self.weight_VH.dtype), self.weight_VH, self.bias_V))

    def _finish(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _block(self, hidden_NH: Tensor, columns: slice | Tensor) -> Tensor:
        """[N, C] logits; from [K, N, H] the mean over the K."""
        bias = None if self.bias_V is None else self.bias_V[columns]
        logits = self._finish(torch.nn.functional.linear(hidden_NH, self.weight_VH[columns], bias).float())
        return logits if logits.dim() == 2 else logits.mean(dim=0)

    def _slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits by hidden @ weight.T."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())

    def losses(self, hidden_NH: Tensor, targets_N: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor | None]:
        """(cross-entropy [N], its gradient by `hidden_NH` [N, H] or None), float32, natural logarithm.

        `tolerance`: None leaves the gradient out, 0 is exact. Otherwise each token's gradient may leave out columns of the
        vocabulary that hold this share of its probability together, at most: its error is below tolerance x (norm of the
        longest row of the head). On a CPU this nearly halves the work.
        """
        hidden_NH = hidden_NH.to(self.weight_VH.dtype)
        parts = [
            self._losses(hidden, targets, tolerance)
            for hidden, targets in zip(hidden_NH.split(TOKENS), targets_N.split(TOKENS), strict=True)
        ]
        losses_N = torch.cat([losses for losses, _ in parts])
        return losses_N, None if tolerance is None else torch.cat([grad for _, grad in parts if grad is not None])

    def losses_after(self, states_KMH: Tensor, source_N: Tensor, targets_N: Tensor) -> Tensor:
        """[N] cross-entropy of target n after state number `source_N[n]`, float32, natural logarithm. However many targets a state
        has, it is taken to the whole vocabulary once.

        K states are of an ensemble, which chooses by the mean of its members' log-probabilities: renormalised, that is the
        distribution of their mean logits.
        """
        states_KMH = states_KMH.to(self.weight_VH.dtype)
        states_KMH = states_KMH[0] if len(states_KMH) == 1 else states_KMH
        start_M = torch.full(states_KMH.shape[-2:-1], torch.finfo(torch.float32).min, device=states_KMH.device)
        parts = zip(states_KMH.split(TOKENS, dim=-2), start_M.split(TOKENS), strict=True)
        log_sum_M = torch.cat([self._walk(states, start, None, 0.0) for states, start in parts])
        target_logits_N = self._target_logits(states_KMH[..., source_N, :], targets_N)
        return log_sum_M[source_N] - target_logits_N

    def _target_logits(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        """[N]; from [K, N, H] the mean over the K."""
        logits = _row_by_row(hidden_NH, self.weight_VH[targets_N])
        if self.bias_V is not None:
            logits = logits + self.bias_V[targets_N].float()
        logits = self._finish(logits)
        return logits if logits.dim() == 1 else logits.mean(dim=0)

    def _losses(self, hidden_NH: Tensor, targets_N: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor | None]:
        target_logits_N = self._target_logits(hidden_NH, targets_N)
        if tolerance is None:
            return self._walk(hidden_NH, target_logits_N, None, 0.0) - target_logits_N, None
        tolerance = tolerance if hidden_NH.device.type == "cpu" else 0.0  # choosing columns would make a GPU wait
        start_N = torch.logsumexp(self._block(hidden_NH, targets_N.unique()), dim=1) if tolerance else target_logits_N
        grad_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        log_sum_N = self._walk(hidden_NH, start_N, grad_NH, tolerance)
        slope = self._slope(target_logits_N)
        grad_NH -= self.weight_VH[targets_N].float() * (slope[:, None] if isinstance(slope, Tensor) else slope)
        return log_sum_N - target_logits_N, grad_NH

    def _walk(self, hidden_NH: Tensor, start_N: Tensor, grad_NH: Tensor | None, tolerance: float) -> Tensor:
        """Log-sum-exp of the logits [N] (of [K, N, H], of their mean over the K); adds softmax @ weight to `grad_NH`.

        `start_N` is at most the log-sum-exp: shares are relative to it, and to more as the walk learns more, so a share is
        never below the probability that it stands for.
        """
        level_N, sum_N, left_out_N = start_N, torch.zeros_like(start_N), torch.zeros_like(start_N)
        vocabulary = len(self.weight_VH)
        size = max(256, BLOCK_NUMBERS.get(hidden_NH.device.type, 2**27) // hidden_NH.shape[:-1].numel())
        for first in range(0, vocabulary, size):
            columns = slice(first, first + size)
            logits_NC = self._block(hidden_NH, columns)
            higher_N = torch.maximum(logits_NC.amax(dim=1), level_N + sum_N.clamp(min=1).log())
            shrink_N = (level_N - higher_N).exp()
            level_N = higher_N
            slope = self._slope(logits_NC) if grad_NH is not None else 1.0
            shares_NC = logits_NC.sub_(level_N[:, None]).exp_()
            sum_N = sum_N * shrink_N + shares_NC.sum(dim=1)
            if grad_NH is None:
                continue
            may_leave_N = tolerance * min(1.0, (first + size) / vocabulary) - left_out_N
            product_NH, missed_N = _weighted(shares_NC, slope, self.weight_VH[columns], tolerance / SAFETY, may_leave_N)
            left_out_N += missed_N
            grad_NH.mul_(shrink_N[:, None]).add_(product_NH)
        if grad_NH is not None:
            grad_NH.div_(sum_N[:, None])
        return level_N + sum_N.log()


def _weighted(
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


def _row_by_row(left_NH: Tensor, right_NH: Tensor) -> Tensor:
    return torch.linalg.vecdot(left_NH.float(), right_NH.float())
