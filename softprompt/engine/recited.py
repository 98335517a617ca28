"""Keys and values of some of a text's positions, as they are with all of the text before them, at positions that follow each other.

Keys hold where their token stands, in whatever way a family turns them. So the layers are run twice: over the text, keeping what each
attention reads; and over as many positions as are picked, where each attention is given what it had read of the picked ones. The second
run's cache then holds their keys and values, turned as their new positions ask.

Shapes: S positions of the text, P picked ones, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from softprompt.engine.layers import Layers
from softprompt.engine.model import FrozenBase
from softprompt.errors import ModelError

STATES = "hidden_states"  # what every family calls what its attention reads


@torch.no_grad()
def recited(base: FrozenBase, ids: Sequence[int], picked: Sequence[int]) -> Layers:
    """What the layers keep of the positions `picked` of a text, in order. Raises ModelError for a base whose attention is not found."""
    embeds_SH = base.embed_ids(ids)
    read: dict[Any, Tensor] = {}

    def kept(module: Any, states: Tensor) -> Tensor:
        read[module] = states
        return states

    def replaced(module: Any, states: Tensor) -> Tensor:
        return read[module][:, list(picked)]

    with _attention(base, kept):
        base.prefill([embeds_SH])
    with _attention(base, replaced):
        layers = base.prefill([embeds_SH[list(picked)]]).layers
    if len(read) != len(layers):
        raise ModelError(f"{base.name}: {len(read)} of {len(layers)} layers have an attention that can be told apart: start from spread")
    return layers


@contextmanager
def _attention(base: FrozenBase, change: Any) -> Iterator[None]:
    """Inside, what every attention of the base reads is what `change(module, states)` makes of it."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if STATES in kwargs:
            return args, {**kwargs, STATES: change(module, kwargs[STATES])}
        return (change(module, args[0]), *args[1:]), kwargs

    modules = [module for module in base.backbone.modules() if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")]
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
