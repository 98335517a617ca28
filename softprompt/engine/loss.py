"""What a prompt learns from, and the loss of a micro-batch: head and loss in one, on supervised positions only.

Since the head is frozen, the gradient of a token's loss by its hidden state is all that backward needs; the head computes
it together with the loss (head.py).

Shapes: N scored tokens, K tokens with a probability of their own, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.engine.batch import Batch
from softprompt.engine.divergence import Told, divergences
from softprompt.engine.head import Wanted
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Continued


@dataclass(frozen=True)
class TokenIds:
    """The next tokens themselves, [N]: the loss is the cross-entropy."""

    ids_N: Tensor

    @property
    def ids_NK(self) -> Tensor:
        return self.ids_N[:, None]

    def split(self, size: int) -> list["TokenIds"]:
        return [TokenIds(ids) for ids in self.ids_N.split(size)]

    def terms(self, logits_NK: Tensor, log_sum_N: Tensor) -> tuple[Tensor, None, None]:
        return log_sum_N - logits_NK[:, 0], None, None


@dataclass(frozen=True)
class TopTokens:
    """A teacher's likeliest tokens with their probabilities, both [N, K], and all others as one class: the loss is the KL divergence
    from this distribution of K + 1 classes to the student's."""

    ids_NK: Tensor
    probabilities_NK: Tensor

    def split(self, size: int) -> list["TopTokens"]:
        return [TopTokens(*both) for both in zip(self.ids_NK.split(size), self.probabilities_NK.split(size), strict=True)]

    def terms(self, logits_NK: Tensor, log_sum_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_own_NK = logits_NK - log_sum_N[:, None]
        own_NK, wanted_NK = log_own_NK.exp(), self.probabilities_NK
        smallest = torch.finfo(torch.float32).eps
        own_rest_N = (1 - own_NK.sum(dim=1)).clamp(min=smallest)
        rest_N = (1 - wanted_NK.sum(dim=1)).clamp(min=0)
        losses_N = (torch.xlogy(wanted_NK, wanted_NK) - wanted_NK * log_own_NK).sum(dim=1)
        losses_N = losses_N + torch.xlogy(rest_N, rest_N) - rest_N * own_rest_N.log()
        ratio_N = rest_N / own_rest_N
        return losses_N, wanted_NK.sum(dim=1) + rest_N - ratio_N, wanted_NK - own_NK * ratio_N[:, None]


Losses = Callable[[Tensor, float | None], tuple[Tensor, Tensor | None]]
"""(hidden states [N, H], tolerance) -> (losses [N], their gradient by the states [N, H], or None where the tolerance is)."""


class _HeadLoss(torch.autograd.Function):
    """hidden [N, H] -> losses [N]; loss n depends on hidden n alone, so its saved gradient only needs scaling."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, losses: Losses, tolerance: float) -> Tensor:
        losses_N, grad_NH = losses(hidden_NH, tolerance if ctx.needs_input_grad[0] else None)
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH)
            ctx.dtype = hidden_NH.dtype
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * grad_outputs[0][:, None]).to(ctx.dtype), None, None


Loss = Callable[[FrozenBase, Tensor, Batch, float], Tensor]
"""(base, hidden states [N, H] before the supervised tokens of a batch, the batch, tolerance: see Head.losses) -> losses [N]."""


def head_losses(base: FrozenBase, hidden_NH: Tensor, wanted: Wanted, tolerance: float = 0.0) -> Tensor:
    """[N] losses with gradient, float32, natural logarithm. `tolerance`: probability that the gradient of a token may leave out (see
    Head.losses); 0 is exact."""

    def losses(states_NH: Tensor, allowed: float | None) -> tuple[Tensor, Tensor | None]:
        return base.head.losses(states_NH, wanted, allowed)

    return _HeadLoss.apply(hidden_NH, losses, tolerance)  # type: ignore[no-untyped-call]


def divergence_losses(base: FrozenBase, hidden_NH: Tensor, teacher: Told, known_N: Tensor, tolerance: float = 0.0) -> Tensor:
    """[N] losses with gradient, float32, nats: the KL divergence of a teacher's distributions from those after `hidden_NH` [N, H], over the
    whole vocabulary (Hinton et al. 2015). `known_N`: the tokens that came there."""

    def losses(states_NH: Tensor, allowed: float | None) -> tuple[Tensor, Tensor | None]:
        return divergences(base.head, states_NH, teacher, known_N, allowed)

    return _HeadLoss.apply(hidden_NH, losses, tolerance)  # type: ignore[no-untyped-call]


def next_tokens(base: FrozenBase, hidden_NH: Tensor, batch: Batch, tolerance: float) -> Tensor:
    """The loss of ordinary training: the cross-entropy of every supervised token, in the order of `batch.targets_N`."""
    return head_losses(base, hidden_NH, TokenIds(batch.targets_N), tolerance)


def batch_losses(base: FrozenBase, continued: Continued, batch: Batch, loss: Loss = next_tokens, tolerance: float = 0.0) -> Tensor:
    """[N] losses of the supervised tokens of a batch."""
    return loss(base, continued.hidden_BTH.flatten(0, 1).index_select(0, batch.scored_N), batch, tolerance)
