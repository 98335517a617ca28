"""Language-model head and cross-entropy in one, on supervised positions only.

Logits exist for one chunk of positions at a time. Since the head is frozen, the gradient of a chunk's loss with respect
to its hidden states is all that backward needs; it is computed while the chunk's logits are still there.

Shapes: N scored tokens, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt.batch import Batch
from softprompt.model import Continued, FrozenBase

CHUNK_LOGITS = 2**26  # float32 logits of one chunk, at most: 256 MB


class _HeadLoss(torch.autograd.Function):
    """hidden [N, H], targets [N] -> losses [N]; loss n depends on hidden n alone, so its saved gradient only needs scaling."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, base: FrozenBase) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        losses, grads = [], []
        chunk_size = max(1, CHUNK_LOGITS // base.model.get_output_embeddings().weight.shape[0])
        for chunk_NH, chunk_targets in zip(hidden_NH.split(chunk_size), targets_N.split(chunk_size), strict=True):
            with torch.set_grad_enabled(wants_grad):
                chunk_NH = chunk_NH.detach().requires_grad_(wants_grad)
                loss_N = cross_entropy(base.logits(chunk_NH).float(), chunk_targets, reduction="none")
                if wants_grad:
                    grads.append(torch.autograd.grad(loss_N.sum(), chunk_NH)[0])
            losses.append(loss_N.detach())
        if wants_grad:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_outputs[0][:, None].to(grad_NH.dtype), None, None


def token_losses(base: FrozenBase, continued: Continued, batch: Batch) -> Tensor:
    """[N] cross-entropy of every supervised token of a batch, float32, natural log, in the order of `batch.targets_N`."""
    return _HeadLoss.apply(continued.hidden_BTH[batch.scored_BT], batch.targets_N, base)  # type: ignore[no-untyped-call]
