"""One micro-batch computed on shapes alone: what a step will hold in memory, without weights and in a few seconds.

The step's own code runs under PyTorch's fake tensors, which have shapes, types and lifetimes but no numbers; what is alive
is counted as it comes and goes. So whatever a family keeps for backward is counted as it is, by no formula of ours.
"""

import logging
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softprompt.engine.batch import Batch
from softprompt.engine.family import empty_model
from softprompt.engine.model import FrozenBase, head_of
from softprompt.engine.prefix import checkpointed
from softprompt.engine.prompt import flat
from softprompt.engine.step import StepSettings, batch_gradients
from softprompt.engine.trial import Sharing


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they live."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def step_peak(settings: Any, dtype: torch.dtype, prefix_lengths: Sequence[int], shape: tuple[int, int], checkpoint: bool) -> int:
    """Bytes above the weights that a step holds at most: prefixes of these lengths (BOS included), and one micro-batch of
    `shape` (rows, tokens of each), every token supervised. Raises what the family's code raises where it looks at numbers."""
    num_rows, width = shape
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it prints what is raised as well
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = _without_numbers(settings, dtype)
        starts = [torch.zeros(length, base.hidden_size, requires_grad=True) for length in prefix_lengths]
        batch = _full_batch(num_rows, width, len(starts))
        alive = _Alive([*base.model.parameters(), *base.model.buffers()])
        settings = StepSettings(num_rows * width)
        with alive, checkpointed(base.backbone) if checkpoint else nullcontext():
            prefix = base.prefill(starts)
            batch_gradients(base, prefix.leaf(), batch, torch.ones(len(starts)), settings)
    return alive.peak


def prefix_width(settings: Any, dtype: torch.dtype) -> int:
    """Keys and values of one position, in numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = _without_numbers(settings, dtype)
        return flat(base.prefill([torch.zeros(1, base.hidden_size)]).layers).shape[1]


def _without_numbers(settings: Any, dtype: torch.dtype) -> FrozenBase:
    """A base of fake tensors; what only its numbers could tell (fingerprints, spread of the rows) is left empty."""
    model = empty_model(settings, dtype).eval().requires_grad_(False)
    nothing_H = torch.zeros(model.get_input_embeddings()(torch.zeros(1, dtype=torch.long)).shape[-1])
    base = FrozenBase("", model, None, torch.device("cpu"), head_of(model), nothing_H, nothing_H)
    try:
        base.prefill([nothing_H[None]])
    except Exception:  # such layers keep what only they understand: rows are read whole
        return replace(base, sharing=Sharing(prefix=False))
    return base


def _full_batch(num_rows: int, width: int, num_prompts: int) -> Batch:
    ids_BT = torch.zeros(num_rows, width, dtype=torch.long)
    scored_N = torch.arange(num_rows * width)
    which_B = torch.arange(num_rows) % num_prompts
    return Batch(ids_BT, torch.ones_like(ids_BT), which_B, scored_N, torch.zeros_like(scored_N), scored_N // width, tuple(range(num_rows)))
