"""The gradient of one step: the prompts' prefixes once, every micro-batch continues from them, one backward ends it.

The rows of a step are a set; how they are cut into micro-batches never changes the gradient. A micro-batch that does not
fit into memory is cut in two, and those of later steps are cut like it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompt.engine.batch import Batch, batches, collate
from softprompt.engine.loss import Loss, batch_losses, next_tokens
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix, checkpointed
from softprompt.engine.prompt import Prompt, read_together
from softprompt.engine.tokens import Encoded
from softprompt.engine.world import World
from softprompt.errors import RunError

TOGETHER = 256  # positions that may be shared by rows however small their micro-batches are


@dataclass(frozen=True)
class StepSettings:
    """How steps are computed. `tokens_per_batch`: of a micro-batch at most, padding included. `head_tolerance`: see Head.losses.

    `checkpoint_activations` keeps the input of each layer alone and computes the rest again in backward: about a third more time for
    a fraction of the memory.
    """

    tokens_per_batch: int
    head_tolerance: float = 0.0
    checkpoint_activations: bool = False
    loss: Loss = next_tokens


@dataclass(frozen=True)
class _Done:
    """Micro-batches whose gradients were added: the losses [K] that they add up to, and the budget that memory allowed."""

    losses_K: Tensor
    tokens_per_batch: int

    def then(self, other: "_Done") -> "_Done":
        return _Done(self.losses_K + other.losses_K, min(self.tokens_per_batch, other.tokens_per_batch))


def step_gradients(
    base: FrozenBase, prompts: Sequence[Prompt], rows: Sequence[Sequence[Encoded]], settings: StepSettings, world: World = World()
) -> tuple[Tensor, int]:
    """Adds to the gradient of every prompt's learned numbers that of its mean loss per supervised token of its own rows.

    Returns those losses, [K] float32 on the base's device (reading them waits for the device), and `settings.tokens_per_batch`, or
    what less memory allowed: the budget of the next steps. Raises RunError when a single row does not fit into memory.
    """
    room = max(TOGETHER, settings.tokens_per_batch // 4)  # in float32, and kept for backward beside a micro-batch
    prefix, flat = read_together(base, prompts, [row for own in rows for row in own], room)
    leaf = prefix.leaf()
    which = [index for index, own in enumerate(rows) for _ in own]
    counts_K = torch.tensor([sum(row.num_supervised for row in own) for own in rows], dtype=torch.float32, device=base.device)
    done = _Done(torch.zeros_like(counts_K), settings.tokens_per_batch)
    with checkpointed(base.backbone) if settings.checkpoint_activations else nullcontext():
        for batch in batches(flat, which, settings.tokens_per_batch, base.device, world):
            done = done.then(_add_gradients(base, leaf, flat, batch, counts_K, settings))
    prefix.backward_from(leaf)
    return done.losses_K, world.smallest(done.tokens_per_batch)


def batch_gradients(
    base: FrozenBase, leaf: Prefix, batch: Batch, counts_K: Tensor, settings: StepSettings
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(losses [N] as shares of their prompts' means, their gradients by the leaf's tensors) of one micro-batch."""
    continued = base.continue_from(leaf, batch.which_B, batch.ids_BT, batch.mask_BT)
    losses_N = batch_losses(base, continued, batch, settings.loss, settings.head_tolerance) / counts_K[batch.which_B[batch.row_N]]
    del continued
    return losses_N, torch.autograd.grad(losses_N.sum(), leaf.tensors, allow_unused=True)


def _add_gradients(
    base: FrozenBase, leaf: Prefix, rows: Sequence[Encoded], batch: Batch, counts_K: Tensor, settings: StepSettings
) -> _Done:
    """One micro-batch: its gradients are added to the leaf when all of them are there, or not at all."""
    try:
        losses_N, grads = batch_gradients(base, leaf, batch, counts_K, settings)
    except torch.OutOfMemoryError:
        grads = None
    if grads is None:  # outside of the handler, which holds on to the tensors of the failed attempt
        return _in_halves(base, leaf, rows, batch, counts_K, settings)
    for tensor, grad in zip(leaf.tensors, grads, strict=True):
        if grad is not None:
            tensor.grad = grad if tensor.grad is None else tensor.grad.add_(grad)
    losses_K = torch.zeros_like(counts_K).index_add(0, batch.which_B[batch.row_N], losses_N.detach())
    return _Done(losses_K, settings.tokens_per_batch)


def _in_halves(base: FrozenBase, leaf: Prefix, rows: Sequence[Encoded], batch: Batch, counts_K: Tensor, settings: StepSettings) -> _Done:
    if len(batch.rows) == 1:
        raise RunError(f"out of memory with a single row of {len(rows[batch.rows[0]])} tokens: lower data.max_length or use a smaller base")
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = replace(settings, tokens_per_batch=batch.ids_BT.numel() // 2)
    which, middle = batch.which_B.tolist(), len(batch.rows) // 2
    done = _Done(torch.zeros_like(counts_K), smaller.tokens_per_batch)
    for part in (slice(None, middle), slice(middle, None)):
        half = collate(rows, batch.rows[part], which[part], base.device)
        done = done.then(_add_gradients(base, leaf, rows, half, counts_K, smaller))
    return done
