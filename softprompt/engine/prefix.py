"""What texts continue from: the keys and values of prompts, computed once, and the two ways to continue from them.

Shapes: B rows, T text tokens, P virtual tokens, K prefixes, S prefix positions (BOS included), H hidden size.
Text is always padded on the right; shorter prefixes are padded on the left, so that real tokens stay next to each other
also for bases that measure distance by index (sliding windows, ALiBi).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt.engine.precise import float32_products
from softprompt.errors import ModelError

Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """K prefixes, each BOS and the rows of a prompt.

    `layers`: float32 keys and values per layer, each [K, heads, S, head size], shorter prefixes padded on the left; empty
    where the base cannot share a prefix. `embeds`: of each prefix [S, H], which the plain path puts before every row.
    """

    layers: Layers
    embeds: tuple[Tensor, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(embeds_SH) for embeds_SH in self.embeds)

    @property
    def mask_KS(self) -> Tensor:
        """1 where a prefix has a position, 0 on the padding to its left."""
        device, longest = self.embeds[0].device, max(self.lengths)
        length_K1 = torch.tensor(self.lengths, device=device)[:, None]
        return (torch.arange(longest, device=device) >= longest - length_K1).long()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a text reads, and what gradients arrive at."""
        return tuple(tensor for layer in self.layers for tensor in layer) or self.embeds

    def separate(self) -> list[Layers]:
        """Keys and values per layer of each prefix alone, without padding."""
        longest = max(self.lengths)
        starts = [longest - length for length in self.lengths]
        return [tuple((k[index, :, start:], v[index, :, start:]) for k, v in self.layers) for index, start in enumerate(starts)]

    def leaf(self) -> "Prefix":
        """The same prefixes, cut off from the graph behind them, collecting gradients of their own."""
        if self.layers:
            layers = tuple((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in self.layers)
            return Prefix(layers, tuple(embeds.detach() for embeds in self.embeds))
        return Prefix((), tuple(embeds.detach().requires_grad_() for embeds in self.embeds))

    def backward_from(self, leaf: "Prefix") -> None:
        """Sends the gradients that `leaf` collected through the prompts' own positions, in float32."""
        pairs = [
            (tensor, other.grad)
            for tensor, other in zip(self.tensors, leaf.tensors, strict=True)
            if other.grad is not None and tensor.requires_grad
        ]
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])


@dataclass(frozen=True)
class Continued:
    """Hidden states of texts that continued from prefixes. `layers` and `mask_BS`: what decoding needs to go on."""

    hidden_BTH: Tensor
    layers: Layers
    mask_BS: Tensor


class _Held(DynamicLayer):  # type: ignore[misc]
    """A layer that texts read and do not extend, so that a layer may run twice (activation checkpointing) and no text's
    keys outlive their use."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


def prefill(backbone: Any, embeds: Sequence[Tensor], exact: bool = True) -> Prefix:
    """The prefixes of K sequences of embeddings [S, H], those of one length in one forward. Computed in float32 whatever
    the base's precision: it is short, runs once a step, and every example depends on it. `exact` = False: in the base's."""
    lengths = [len(embeds_SH) for embeds_SH in embeds]
    parts: dict[int, Layers] = {}
    for length in sorted(set(lengths) - {0}):
        same = [index for index, other in enumerate(lengths) if other == length]
        layers = _prefill_same(backbone, torch.stack([embeds[index] for index in same]), exact)
        parts |= {index: tuple((k[row], v[row]) for k, v in layers) for row, index in enumerate(same)}
    if not parts:
        return Prefix((), tuple(embeds))
    nothing = tuple((k[:, :0], v[:, :0]) for k, v in next(iter(parts.values())))
    return replace(assemble([parts.get(index, nothing) for index in range(len(embeds))]), embeds=tuple(embeds))


def assemble(prefixes: Sequence[Layers]) -> Prefix:
    """One Prefix of K prefixes, each given by its keys and values per layer, [heads, S, head size]; shorter ones are padded on the
    left. Its `embeds` have no width: these prefixes have no embeddings."""
    lengths = [layers[0][0].shape[1] for layers in prefixes]

    def stacked(layer: int, part: int) -> Tensor:
        states = [layers[layer][part] for layers in prefixes]
        return torch.stack([torch.nn.functional.pad(state, (0, 0, max(lengths) - state.shape[1], 0)) for state in states])

    layers = tuple((stacked(layer, 0), stacked(layer, 1)) for layer in range(len(prefixes[0])))
    return Prefix(layers, tuple(layers[0][0].new_zeros(length, 0) for length in lengths))


def as_prefixes(read: Continued) -> Prefix:
    """Texts that were read with `keep`, as prefixes to continue from: every one's padding moves to its left."""
    order_BS = read.mask_BS.argsort(dim=1, stable=True)
    lengths = read.mask_BS.sum(dim=1).tolist()
    holes = read.mask_BS.shape[1] - max(lengths)

    def moved(states: Tensor) -> Tensor:
        return states.gather(2, order_BS.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))[:, :, holes:]

    layers = tuple((moved(k), moved(v)) for k, v in read.layers)
    return Prefix(layers, tuple(read.hidden_BTH.new_zeros(length, 0) for length in lengths))


def _prefill_same(backbone: Any, embeds_KSH: Tensor, exact: bool) -> Layers:
    # A cache without a config keeps every position in every layer; sliding windows are then applied by the mask alone.
    cache = DynamicCache()
    positions = torch.arange(embeds_KSH.shape[1], device=embeds_KSH.device).expand(embeds_KSH.shape[:2])
    with float32_products() if exact else nullcontext():
        run(backbone, embeds_KSH.to(torch.float32 if exact else backbone.dtype), torch.ones_like(positions), positions, cache)
    return tuple((keys.float(), values.float()) for keys, values in layers_of(cache))


def run(backbone: Any, embeds_BTH: Tensor, mask_BS: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
    """Hidden states of the last layer."""
    return backbone(
        inputs_embeds=embeds_BTH, attention_mask=mask_BS, position_ids=positions_BT, past_key_values=cache, use_cache=True
    ).last_hidden_state


def layers_of(cache: DynamicCache) -> Layers:
    """Keys and values per layer."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def continue_shared(backbone: Any, embeds_BTH: Tensor, prefix: Prefix, which_B: Tensor, mask_BT: Tensor, keep: bool) -> Continued:
    """One forward over the text alone, whose queries look at the prefixes' keys and values. `keep`: for decoding."""
    mask_KS = prefix.mask_KS
    mask_BS = torch.cat([mask_KS[which_B], mask_BT], dim=1)
    positions_BT = (mask_KS.sum(dim=1)[which_B, None] + mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    spread = [(_spread(k, which_B, embeds_BTH.dtype), _spread(v, which_B, embeds_BTH.dtype)) for k, v in prefix.layers]
    cache = DynamicCache(ddp_cache_data=spread) if keep and spread else DynamicCache()
    if not keep:
        cache.layers = [_Held(k, v) for k, v in spread]
    hidden = run(backbone, embeds_BTH, mask_BS, positions_BT, cache)
    return Continued(hidden, layers_of(cache) if keep else (), mask_BS)


def _spread(states_K: Tensor, which_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values for every row of a batch, a view where all rows share one prefix. Spread first and rounded then, so
    that the rows' gradients are summed in float32."""
    if states_K.shape[0] == 1:
        return states_K.expand(len(which_B), -1, -1, -1).to(dtype)
    return states_K.index_select(0, which_B.to(states_K.device)).to(dtype)


def continue_plain(backbone: Any, embeds_BTH: Tensor, prefix: Prefix, which_B: Tensor, mask_BT: Tensor) -> Continued:
    """Row by row [prefix][text] without a cache. No padding stands before a real token, so no mask is needed."""
    hidden = []
    for row, which in enumerate(which_B.tolist()):
        start_SH = prefix.embeds[which].to(embeds_BTH.dtype)
        real = mask_BT[row].bool()
        joined_SH = torch.cat([start_SH, embeds_BTH[row, real]])
        states_SH = backbone(inputs_embeds=joined_SH[None], use_cache=False).last_hidden_state[0, len(start_SH) :]
        hidden.append(embeds_BTH.new_zeros(len(real), states_SH.shape[-1]).masked_scatter(real[:, None], states_SH))
    return Continued(torch.stack(hidden), (), mask_BT)


@contextmanager
def checkpointed(backbone: Any) -> Iterator[None]:
    """Inside, each decoder layer keeps its input alone and runs again in backward.

    transformers' own gradient checkpointing takes the cache away from the layers, and with it the prompt; here a layer only
    reads the prefix, so it may run twice. Raises ModelError for a base whose layers transformers does not mark.
    """
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(backbone).__name__} does not mark its layers: train.checkpoint_activations cannot be used with it")
    before = [vars(layer).get("forward") for layer in layers]  # accelerate's, where layers lie on several devices
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
