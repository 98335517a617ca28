"""The gradient of one step: the prompts' prefixes once, every micro-batch continues from them, one backward ends it.

The rows of a step are a set; how they are cut into micro-batches never changes the gradient. A micro-batch that does not
fit into memory is cut in two, and later ones are cut like it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.batch import Batch, batches, collate
from softprompt.encode import Encoded
from softprompt.errors import RunError
from softprompt.loss import token_losses
from softprompt.model import FrozenBase
from softprompt.prefix import Prefix, checkpointed
from softprompt.prompt import SoftPrompt, read_together

TOGETHER = 256  # positions that may be shared by rows however small their micro-batches are


@dataclass
class Engine:
    """How steps are computed. `tokens_per_batch` (padding included) shrinks when memory turns out too short.

    `head_tolerance`: see Head.losses. `checkpoint_activations` keeps the input of each layer alone and computes the rest
    again in backward: about a third more time for a fraction of the memory.
    """

    tokens_per_batch: int
    head_tolerance: float = 0.0
    checkpoint_activations: bool = False


def step_gradients(base: FrozenBase, prompts: Sequence[SoftPrompt], rows: Sequence[Sequence[Encoded]], engine: Engine) -> Tensor:
    """Adds to `rows_PH.grad` of every prompt the gradient of its mean loss per supervised token of its own rows.

    Returns those losses, [K] float32 on the base's device: reading them waits for the device.
    Raises RunError when a single row does not fit into memory.
    """
    room = max(TOGETHER, engine.tokens_per_batch // 4)  # in float32, and kept for backward beside a micro-batch
    prefix, flat = read_together(base, prompts, [row for own in rows for row in own], room)
    leaf = prefix.leaf()
    which = [index for index, own in enumerate(rows) for _ in own]
    counts_K = torch.tensor([sum(row.num_supervised for row in own) for own in rows], dtype=torch.float32, device=base.device)
    loss_K = torch.zeros_like(counts_K)
    with checkpointed(base.model.base_model) if engine.checkpoint_activations else nullcontext():
        for batch in batches(flat, which, engine.tokens_per_batch, base.device):
            loss_K += _add_gradients(base, leaf, flat, batch, counts_K, engine)
    prefix.backward_from(leaf)
    return loss_K


def _add_gradients(base: FrozenBase, leaf: Prefix, rows: Sequence[Encoded], batch: Batch, counts_K: Tensor, engine: Engine) -> Tensor:
    """One micro-batch: its gradients are added to the leaf when all of them are there, or not at all."""
    try:
        continued = base.continue_from(leaf, batch.which_B, batch.ids_BT, batch.mask_BT)
        which_N = batch.which_B[batch.row_N]
        losses_N = token_losses(base, continued, batch, engine.head_tolerance) / counts_K[which_N]
        grads = torch.autograd.grad(losses_N.sum(), leaf.tensors, allow_unused=True)
    except torch.OutOfMemoryError:
        grads = None
    if grads is None:  # outside of the handler, which holds on to the tensors of the failed attempt
        return _in_halves(base, leaf, rows, batch, counts_K, engine)
    for tensor, grad in zip(leaf.tensors, grads, strict=True):
        if grad is not None:
            tensor.grad = grad if tensor.grad is None else tensor.grad.add_(grad)
    return torch.zeros_like(counts_K).index_add(0, which_N, losses_N.detach())


def _in_halves(base: FrozenBase, leaf: Prefix, rows: Sequence[Encoded], batch: Batch, counts_K: Tensor, engine: Engine) -> Tensor:
    if len(batch.rows) == 1:
        raise RunError(f"out of memory with a single row of {len(rows[batch.rows[0]])} tokens: lower data.max_length or use a smaller base")
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    engine.tokens_per_batch = batch.ids_BT.numel() // 2
    which, middle = batch.which_B.tolist(), len(batch.rows) // 2
    loss_K = torch.zeros_like(counts_K)
    for part in (slice(None, middle), slice(middle, None)):
        half = collate(rows, batch.rows[part], which[part], base.device)
        loss_K += _add_gradients(base, leaf, rows, half, counts_K, engine)
    return loss_K
