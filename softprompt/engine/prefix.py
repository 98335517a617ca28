"""What texts continue from: what the base's layers keep of prompts, computed once, and the two ways to continue from it.

Shapes: B rows, T text tokens, P virtual tokens, K prefixes, S prefix positions (BOS included), H hidden size.
Text is always padded on the right; shorter prefixes are padded on the left, so that real tokens stay next to each other
also for bases that measure distance by index (sliding windows, ALiBi).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt.engine.layers import Layer, Layers, empty_cache, filled_cache, keeps_states, layers_of, looks_back, merged
from softprompt.engine.precise import float32_products
from softprompt.errors import ModelError

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # what a forward calls what its layers keep; "cache" since transformers 5.24


@dataclass(frozen=True)
class Prefix:
    """K prefixes, each BOS and the rows of a prompt, of `lengths` positions.

    `layers`: float32, what every layer keeps of them, shorter prefixes padded on the left; where the base can keep nothing, their
    embeddings alone. Empty where there is nothing to keep.
    """

    layers: Layers
    lengths: tuple[int, ...]

    def mask_KS(self, device: torch.device) -> Tensor:
        """1 where a prefix has a position, 0 on the padding to its left."""
        longest = max(self.lengths)
        length_K1 = torch.tensor(self.lengths, device=device)[:, None]
        return (torch.arange(longest, device=device) >= longest - length_K1).long()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a text reads, and what gradients arrive at."""
        return tuple(part for layer in self.layers for part in layer.parts.values())

    def separate(self) -> list["Prefix"]:
        """Each prefix alone, without padding."""

        def alone(index: int, start: int) -> Layers:
            one = slice(index, index + 1)
            return tuple(layer.changed(lambda part: part[one][..., start:, :], lambda part: part[one]) for layer in self.layers)

        longest = max(self.lengths)
        return [Prefix(alone(index, longest - length), (length,)) for index, length in enumerate(self.lengths)]

    def leaf(self) -> "Prefix":
        """The same prefixes, cut off from the graph behind them, collecting gradients of their own."""

        def cut(part: Tensor) -> Tensor:
            return part.detach().requires_grad_()

        return Prefix(tuple(layer.changed(cut, cut) for layer in self.layers), self.lengths)

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


# ---- prefixes ------------------------------------------------------------------------------------------------------


def prefill(backbone: Any, embeds: Sequence[Tensor], exact: bool = True, first: int = 0) -> Prefix:
    """The prefixes of K sequences of embeddings [S, H], those of one length in one forward. Computed in float32 whatever
    the base's precision: it is short, runs once a step, and every example depends on it. `exact` = False: in the base's.
    `first`: the position of the first, also a negative one for bases that turn keys by their position."""
    lengths = [len(embeds_SH) for embeds_SH in embeds]
    parts = {index: Prefix((), (0,)) for index in range(len(embeds))}
    for length in sorted(set(lengths) - {0}):
        same = [index for index, other in enumerate(lengths) if other == length]
        layers = _prefill_same(backbone, torch.stack([embeds[index] for index in same]), exact, first)
        parts |= zip(same, Prefix(layers, (length,) * len(same)).separate(), strict=True)
    return assemble([parts[index] for index in range(len(embeds))])


def embedded(embeds: Sequence[Tensor]) -> Prefix:
    """The prefixes of K sequences of embeddings [S, H] over a base that can keep nothing else of them."""
    return assemble([Prefix((Layer(None, {"embeds": embeds_SH[None]}),), (len(embeds_SH),)) for embeds_SH in embeds])


def assemble(prefixes: Sequence[Prefix]) -> Prefix:
    """One Prefix of all that are given; shorter ones are padded on the left."""
    lengths = tuple(length for prefix in prefixes for length in prefix.lengths)
    some = next((prefix.layers for prefix in prefixes if prefix.layers), ())
    nothing = tuple(layer.changed(lambda part: part[:1, ..., :0, :], lambda part: torch.zeros_like(part[:1])) for layer in some)
    layers = [prefix.layers or nothing for prefix in prefixes]
    return Prefix(merged(layers, left_padded, lambda parts: torch.cat(list(parts))), lengths)


def left_padded(parts: Sequence[Tensor]) -> Tensor:
    """[K, ..., S, size] of all K, those with fewer positions padded on the left."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([pad(part, (0, 0, longest - part.shape[-2], 0)) if part.shape[-2] < longest else part for part in parts])


def as_prefixes(read: Continued) -> Prefix:
    """Texts that were read with `keep`, as prefixes to continue from: every one's padding moves to its left."""
    order_BS = read.mask_BS.argsort(dim=1, stable=True)
    lengths = read.mask_BS.sum(dim=1).tolist()
    holes = read.mask_BS.shape[1] - max(lengths)

    def moved(part: Tensor) -> Tensor:
        return _taken(part, order_BS)[..., holes:, :]

    return Prefix(tuple(layer.changed(moved, lambda part: part) for layer in read.layers), tuple(lengths))


def _taken(part: Tensor, index_BS: Tensor) -> Tensor:
    """[B, ..., S, size] in the order that `index_BS` has the positions."""
    index = index_BS.view(len(index_BS), *(1,) * (part.dim() - 3), index_BS.shape[1], 1)
    return part.gather(-2, index.to(part.device).expand(*part.shape[:-2], index_BS.shape[1], part.shape[-1]))


def _prefill_same(backbone: Any, embeds_KSH: Tensor, exact: bool, first: int) -> Layers:
    cache = empty_cache(backbone.config)
    positions = torch.arange(first, first + embeds_KSH.shape[1], device=embeds_KSH.device).expand(embeds_KSH.shape[:2])
    with float32_products() if exact else nullcontext():
        run(backbone, embeds_KSH.to(torch.float32 if exact else backbone.dtype), torch.ones_like(positions), positions, cache)
    return tuple(layer.changed(Tensor.float, Tensor.float) for layer in layers_of(cache))


def run(backbone: Any, embeds_BTH: Tensor, mask_BS: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
    """Hidden states of the last layer. A base that only keeps states is told of the padding of `embeds_BTH` alone."""
    takes = _parameters(type(backbone))  # type: ignore[arg-type]
    mask_BS = mask_BS if looks_back(cache) else mask_BS[:, -embeds_BTH.shape[1] :]
    kept = {next(name for name in CACHE_NAMES if name in takes): cache}
    where = {"position_ids": positions_BT} if "position_ids" in takes else {}
    return backbone(inputs_embeds=embeds_BTH, attention_mask=mask_BS, use_cache=True, **where, **kept).last_hidden_state


@lru_cache
def _parameters(kind: type) -> Mapping[str, Parameter]:
    """What the forward of a family takes; asked for every token."""
    return signature(kind.forward).parameters  # type: ignore[attr-defined]


# ---- continuing ----------------------------------------------------------------------------------------------------


def continue_shared(backbone: Any, embeds_BTH: Tensor, prefix: Prefix, which_B: Tensor, mask_BT: Tensor, keep: bool) -> Continued:
    """One forward over the text alone, whose tokens look at what the layers keep of the prefixes. `keep`: for decoding."""
    layers = _spread(prefix.layers, which_B, embeds_BTH.dtype)
    cache = filled_cache(layers, held=not keep) if layers else empty_cache(backbone.config)
    width, states = mask_BT.shape[1], keeps_states(cache)
    if states and keep and not bool(mask_BT.all()):
        return _continue_by_length(backbone, embeds_BTH, prefix, which_B, mask_BT)
    if states and not keep and width == 1:  # for a single token such layers write into the states that they are given
        embeds_BTH, mask_BT = pad(embeds_BTH, (0, 0, 0, 1)), pad(mask_BT, (0, 1))
    mask_KS = prefix.mask_KS(mask_BT.device)
    mask_BS = torch.cat([mask_KS[which_B], mask_BT], dim=1)
    positions_BT = (mask_KS.sum(dim=1)[which_B, None] + mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    hidden = run(backbone, embeds_BTH, mask_BS, positions_BT, cache)[:, :width]
    return Continued(hidden, layers_of(cache) if keep else (), mask_BS)


def _continue_by_length(backbone: Any, embeds_BTH: Tensor, prefix: Prefix, which_B: Tensor, mask_BT: Tensor) -> Continued:
    """Texts of one length together: a state knows of every position that it was given, padding too."""
    num_B = mask_BT.sum(dim=1)
    lengths = num_B.unique().tolist()
    groups = [(num_B == length).nonzero()[:, 0] for length in lengths]
    read = [
        continue_shared(backbone, embeds_BTH[rows, :length], prefix, which_B[rows], mask_BT[rows, :length], keep=True)
        for rows, length in zip(groups, lengths, strict=True)
    ]
    back = torch.cat(groups).argsort()

    def wide(parts: Sequence[Tensor]) -> Tensor:
        missing = [max(lengths) - length for length in lengths]
        return torch.cat([pad(part, (0, 0, 0, more)) for part, more in zip(parts, missing, strict=True)])[back]

    def narrow(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))[back]

    hidden, masks = [part.hidden_BTH for part in read], [part.mask_BS[..., None] for part in read]
    return Continued(wide(hidden), merged([part.layers for part in read], wide, narrow), wide(masks)[..., 0])


def _spread(layers: Layers, which_B: Tensor, dtype: torch.dtype) -> Layers:
    """What layers keep for every row of a batch; growing parts are views where all rows share one prefix. Spread first and rounded
    then, so that the rows' gradients are summed in float32."""

    def growing(part: Tensor) -> Tensor:
        rows = part.expand(len(which_B), *part.shape[1:]) if len(part) == 1 else part.index_select(0, which_B.to(part.device))
        return rows.to(dtype)

    def states(part: Tensor) -> Tensor:
        return part.index_select(0, which_B.to(part.device)).to(dtype)

    return tuple(layer.changed(growing, states) for layer in layers)


def continue_plain(backbone: Any, embeds_BTH: Tensor, prefix: Prefix, which_B: Tensor, mask_BT: Tensor, keep: bool) -> Continued:
    """[prefix][text] as a whole, without a cache, padded on the right: no padding stands before a real token, so no mask is needed."""
    start_BSH = prefix.layers[0].parts["embeds"].index_select(0, which_B).to(embeds_BTH.dtype)
    mask_BS = torch.cat([prefix.mask_KS(mask_BT.device)[which_B], mask_BT], dim=1)
    whole_BSH = torch.cat([start_BSH, embeds_BTH], dim=1)
    order_BS = mask_BS.argsort(dim=1, descending=True, stable=True)[:, : int(mask_BS.sum(dim=1).max())]
    hidden_BSH = read_whole(backbone, _taken(whole_BSH, order_BS))
    places_BT = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)[:, -mask_BT.shape[1] :]
    layers = (Layer(None, {"embeds": whole_BSH}),) if keep else ()
    return Continued(_taken(hidden_BSH, places_BT), layers, mask_BS)


def read_whole(backbone: Any, embeds_BSH: Tensor) -> Tensor:
    """Hidden states of rows that begin at their first position."""
    if hasattr(backbone, "_setup_cache"):  # RecurrentGemma keeps the states of its last batch in its modules
        backbone._setup_cache(backbone.config, len(embeds_BSH), embeds_BSH.device, embeds_BSH.dtype)
    return backbone(inputs_embeds=embeds_BSH, use_cache=False).last_hidden_state


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
