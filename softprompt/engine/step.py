"""The gradient of one step: the prompts' prefixes once, every micro-batch continues from them, one backward ends it.

The rows of a step are a set; how they are cut into micro-batches never changes the gradient. A micro-batch that does not
fit into memory is cut in two, and those of later steps are cut like it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompt.engine.batch import Batch, collate, cost, cut
from softprompt.engine.loss import Loss, batch_losses, next_tokens
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix, checkpointed
from softprompt.engine.prompt import Prompt, read_together
from softprompt.engine.tokens import Encoded
from softprompt.engine.world import Item, World, add
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
    """A micro-batch whose gradients are all there. `sums_RD`: of every prompt that its rows continue from, the gradients by the leaf's
    tensors, and last the losses as shares of its mean; and the budget that memory allowed."""

    sums_RD: Tensor
    tokens_per_batch: int


@dataclass(frozen=True)
class _Work:
    """What the micro-batches of a step share: `rows`, and which prefix of the leaf each continues from; `counts_K` of supervised tokens."""

    base: FrozenBase
    leaf: Prefix
    rows: Sequence[Encoded]
    which: Sequence[int]
    counts_K: Tensor

    def batch(self, numbers: Sequence[int]) -> Batch:
        return collate(self.rows, numbers, [self.which[number] for number in numbers], self.base.device)

    @property
    def sizes(self) -> list[int]:
        """Numbers that the leaf's tensors have of one prefix."""
        return [tensor[0].numel() for tensor in self.leaf.tensors]

    @property
    def width(self) -> int:
        return sum(self.sizes) + 1

    def prompts_of(self, numbers: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({self.which[number] for number in numbers}))


def step_gradients(
    base: FrozenBase, prompts: Sequence[Prompt], rows: Sequence[Sequence[Encoded]], settings: StepSettings, world: World = World()
) -> tuple[Tensor, int]:
    """Adds to the gradient of every prompt's learned numbers that of its mean loss per supervised token of its own rows.

    Returns those losses, [K] float32 on the base's device (reading them waits for the device), and `settings.tokens_per_batch`, or
    what less memory allowed here: the budget of the next steps. The processes of `world` share the micro-batches; losses and gradients
    are the same everywhere, to the same bits however many they are. Raises RunError when a single row does not fit into memory.
    """
    room = max(TOGETHER, settings.tokens_per_batch // 4)  # in float32, and kept for backward beside a micro-batch
    prefix, flat = read_together(base, prompts, [row for own in rows for row in own], room)
    leaf = prefix.leaf()
    counts_K = torch.tensor([sum(row.num_supervised for row in own) for own in rows], dtype=torch.float32, device=base.device)
    work = _Work(base, leaf, flat, [index for index, own in enumerate(rows) for _ in own], counts_K)
    groups, allowed = cut(flat, settings.tokens_per_batch, base.device), settings.tokens_per_batch

    def sums_of(number: int) -> Tensor:
        nonlocal allowed
        done = _sums(work, groups[number], settings)
        allowed = min(allowed, done.tokens_per_batch)
        return done.sums_RD

    items = [Item(cost(flat, group, base.device), work.prompts_of(group)) for group in groups]
    with checkpointed(base.backbone) if settings.checkpoint_activations else nullcontext():
        sums_KD = world.added_up(counts_K.new_zeros(len(prompts), work.width), items, sums_of)
    *grads, losses_K = sums_KD.split([*work.sizes, 1], dim=1)
    if world.first:
        for tensor, grad in zip(leaf.tensors, grads, strict=True):
            tensor.grad = grad.reshape(tensor.shape).to(tensor.device)
        prefix.backward_from(leaf)
    if world.size > 1:  # and all go on with what came of that: where a device adds in no fixed order, they would drift apart
        world.as_first([_gradient(prompt.learned_PD) for prompt in prompts])
    return losses_K[:, 0], allowed


def _gradient(learned_PD: Tensor) -> Tensor:
    if learned_PD.grad is None:
        learned_PD.grad = torch.zeros_like(learned_PD)
    return learned_PD.grad


def batch_gradients(
    base: FrozenBase, leaf: Prefix, batch: Batch, counts_K: Tensor, settings: StepSettings
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(losses [N] as shares of their prompts' means, their gradients by the leaf's tensors) of one micro-batch."""
    continued = base.continue_from(leaf, batch.which_B, batch.ids_BT, batch.mask_BT)
    losses_N = batch_losses(base, continued, batch, settings.loss, settings.head_tolerance) / counts_K[batch.which_B[batch.row_N]]
    del continued
    return losses_N, torch.autograd.grad(losses_N.sum(), leaf.tensors, allow_unused=True, materialize_grads=True)


def _sums(work: _Work, numbers: Sequence[int], settings: StepSettings) -> _Done:
    """One micro-batch, of these rows: as a whole, or where memory is short, one half of it after the other."""
    batch = work.batch(numbers)
    try:
        return _Done(
            _packed(work, batch, *batch_gradients(work.base, work.leaf, batch, work.counts_K, settings)), settings.tokens_per_batch
        )
    except torch.OutOfMemoryError:
        pass  # and out of the handler, which holds on to the tensors of the failed attempt
    if len(numbers) == 1:
        longest = len(work.rows[numbers[0]])
        raise RunError(f"out of memory with a single row of {longest} tokens: lower data.max_length or use a smaller base")
    if work.base.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = replace(settings, tokens_per_batch=batch.ids_BT.numel() // 2)
    prompts, allowed = work.prompts_of(numbers), smaller.tokens_per_batch
    sums_RD = work.counts_K.new_zeros(len(prompts), work.width)
    for half in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
        done = _sums(work, half, smaller)
        add(sums_RD, [prompts.index(prompt) for prompt in work.prompts_of(half)], done.sums_RD)
        allowed = min(allowed, done.tokens_per_batch)
    return _Done(sums_RD, allowed)


def _packed(work: _Work, batch: Batch, losses_N: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """[R, D] of the prompts that the batch's rows continue from."""
    losses_K = torch.zeros_like(work.counts_K).index_add(0, batch.which_B[batch.row_N], losses_N.detach())
    own, device = list(work.prompts_of(batch.rows)), losses_K.device
    picked = (*grads, losses_K[:, None]) if len(own) == len(losses_K) else (*(grad[own] for grad in grads), losses_K[own, None])
    return torch.cat([part.flatten(1).to(device) for part in picked], dim=1)
