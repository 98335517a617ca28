"""The loss of a micro-batch: head and cross-entropy in one, on supervised positions only.

Since the head is frozen, the gradient of a token's loss by its hidden state is all that backward needs; the head computes
it together with the loss (head.py).
"""

from typing import Any

import torch
from torch import Tensor

from softprompt.batch import Batch
from softprompt.head import Head
from softprompt.model import FrozenBase
from softprompt.prefix import Continued


class _HeadLoss(torch.autograd.Function):
    """hidden [N, H], targets [N] -> losses [N]; loss n depends on hidden n alone, so its saved gradient only needs scaling."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: Head, tolerance: float) -> Tensor:
        losses_N, grad_NH = head.losses(hidden_NH, targets_N, tolerance if ctx.needs_input_grad[0] else None)
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH)
            ctx.dtype = hidden_NH.dtype
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * grad_outputs[0][:, None]).to(ctx.dtype), None, None, None


def token_losses(base: FrozenBase, continued: Continued, batch: Batch, tolerance: float = 0.0) -> Tensor:
    """[N] cross-entropy of every supervised token of a batch, float32, natural log, in the order of `batch.targets_N`.

    `tolerance`: probability that the gradient of a token may leave out (see Head.losses); 0 is exact.
    """
    hidden_NH = continued.hidden_BTH.flatten(0, 1).index_select(0, batch.scored_N)
    return _HeadLoss.apply(hidden_NH, batch.targets_N, base.head, tolerance)  # type: ignore[no-untyped-call]
