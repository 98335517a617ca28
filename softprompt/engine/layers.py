"""What the layers of a base keep of the positions before: keys and values, states, or both; into transformers' caches and out of them.

transformers' own cache layers copy states in place, which stops autograd, and grow as texts read them; ours do neither.

Shapes: K prefixes or rows, S positions, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

GROWING = ("keys", "values", "indexer_keys", "embeds")  # have an entry for every position, in their last dimension but one

Change = Callable[[Tensor], Tensor]
Merge = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Layer:
    """What one layer keeps of K sequences, by name.

    "keys" and "values" [K, heads, S, head size] of attention, "indexer_keys" [K, S, size] of sparse attention, "embeds" [K, S, H] where
    nothing but the embeddings can be kept; "conv_states N" and "recurrent_states N" [K, ...] know of all positions together.
    `kind`: the cache layer that holds them.
    """

    kind: Any
    parts: Mapping[str, Tensor]

    def changed(self, growing: Change, states: Change) -> "Layer":
        """Every part changed by the function for its sort."""
        return Layer(self.kind, {name: (growing if name in GROWING else states)(part) for name, part in self.parts.items()})


Layers = tuple[Layer, ...]


def merged(several: Sequence[Layers], growing: Merge, states: Merge) -> Layers:
    """The layers of several as those of one; each part of theirs put together by the function for its sort."""

    def together(layers: Sequence[Layer]) -> Layer:
        names = layers[0].parts
        return Layer(layers[0].kind, {n: (growing if n in GROWING else states)([layer.parts[n] for layer in layers]) for n in names})

    return tuple(together(layers) for layers in zip(*several, strict=True))


@dataclass(frozen=True)
class Room:
    """Memory of a growing part [B, ..., C, size]: positions `start` to `end` are in use, and there is room behind them."""

    whole: Tensor
    start: int
    end: int

    @property
    def used(self) -> Tensor:
        return self.whole[..., self.start : self.end, :]

    def add(self, new: Tensor) -> Tensor:
        """Writes the next positions; all that are in use then."""
        end = self.end + new.shape[-2]
        self.whole[..., self.end : end, :] = new
        return self.whole[..., self.start : end, :]


# ---- cache layers --------------------------------------------------------------------------------------------------


class _Concatenating:
    """Keys and values behind those before, in `rooms` of their own or put together anew; `held`: texts read them and do not extend them,
    so that a layer may run twice (activation checkpointing) and no text's keys outlive their use."""

    held = False
    rooms: Mapping[str, Room] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._behind("keys", keys), self._behind("values", values)
        if not self.held:
            self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values

    def update_indexer(self, keys: Tensor) -> Tensor:
        keys = self._behind("indexer_keys", keys)
        if not self.held:
            self.indexer_keys, self.is_indexer_initialized = keys, True
        return keys

    def _behind(self, name: str, new: Tensor) -> Tensor:
        if self.rooms is not None:
            return self.rooms[name].add(new)
        before = getattr(self, name)
        return new if before is None else torch.cat([before, new], dim=-2)


class _Replacing:
    """New states in the place of those before, nothing copied in place: gradients flow. `held` as above."""

    held = False
    conv_states: dict[int, Tensor | None]

    def update_conv_state(self, new: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any) -> Tensor:
        before = self.conv_states[state_idx]
        size = (before.shape[-1] if before is not None else conv_kernel_size) or new.shape[-1]
        whole = torch.nn.functional.pad(new, (max(0, size - new.shape[-1]), 0)) if before is None else torch.cat([before, new], dim=-1)
        if not self.held:
            _put(self, "conv_states", state_idx, whole[..., -size:])
        return whole

    def update_recurrent_state(self, new: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if not self.held:
            _put(self, "recurrent_states", state_idx, new)
        return new


class Attention(_Concatenating, DynamicLayer):  # type: ignore[misc]
    """Also of sliding windows, which the mask alone applies: a prompt may be longer than the window."""


class Indexed(_Concatenating, DynamicIndexedLayer):  # type: ignore[misc]
    """Attention that an indexer makes sparse."""


class Recurrent(_Replacing, LinearAttentionLayer):  # type: ignore[misc]
    """Convolutions and recurrences."""


class Hybrid(_Concatenating, _Replacing, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """Both in one layer."""


OURS: dict[Any, Any] = {
    DynamicLayer: Attention,
    DynamicSlidingWindowLayer: Attention,
    DynamicIndexedLayer: Indexed,
    LinearAttentionLayer: Recurrent,
    LinearAttentionAndFullAttentionLayer: Hybrid,
    LinearAttentionAndSlidingWindowAttentionLayer: Hybrid,
}
if hasattr(cache_utils, "DummyLayer"):  # keeps nothing; transformers 5.19 has no such layers
    OURS[cache_utils.DummyLayer] = cache_utils.DummyLayer


def empty_cache(settings: Any) -> DynamicCache:
    """A cache of our layers for a base of these settings. Raises KeyError for one with layers of another kind."""
    try:
        theirs = DynamicCache(config=settings).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # settings that say nothing of layers
        return DynamicCache()
    return _cache([OURS[type(layer)](number_of_states=getattr(layer, "number_of_states", 1)) for layer in theirs])


def keeps_states(cache: DynamicCache) -> bool:
    """Whether a layer knows of all positions together, so that none can be taken out again."""
    return any(isinstance(layer, _Replacing) for layer in cache.layers)


def looks_back(cache: DynamicCache) -> bool:
    """Whether a layer has attention."""
    return not cache.layers or any(isinstance(layer, _Concatenating) for layer in cache.layers)


def filled_cache(layers: Layers, held: bool, rooms: Sequence[Mapping[str, Room]] = ()) -> DynamicCache:
    """A cache that holds `layers`. `held`: texts read it and do not extend it. `rooms`: of the growing parts of every layer."""
    return _cache([_filled(layer, held, rooms[number] if rooms else None) for number, layer in enumerate(layers)])


def layers_of(cache: DynamicCache) -> Layers:
    """What a cache holds."""
    return tuple(Layer(type(layer), _parts(layer)) for layer in cache.layers)


def _cache(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache


def _filled(layer: Layer, held: bool, rooms: Mapping[str, Room] | None) -> Any:
    numbered = [name.split() for name in layer.parts if name not in GROWING]
    made = layer.kind(number_of_states=1 + max((int(number) for _, number in numbered), default=0))
    made.held = held
    if rooms:
        made.rooms = rooms
    for name, part in layer.parts.items():
        if name in GROWING:
            setattr(made, name, part)
        else:
            kind, number = name.split()
            _put(made, kind, int(number), part)
    made.is_initialized = "keys" in layer.parts
    made.is_indexer_initialized = "indexer_keys" in layer.parts
    return made


def _put(layer: Any, kind: str, number: int, state: Tensor) -> None:
    getattr(layer, kind)[number] = state
    getattr(layer, f"is_{kind}_initialized")[number] = True
    layer.dtype, layer.device = state.dtype, state.device
    layer.has_previous_state[number] = True
    if kind == "conv_states":
        layer.conv_kernel_size[number] = state.shape[-1]


def _parts(layer: Any) -> dict[str, Tensor]:
    growing = {name: getattr(layer, name, None) for name in GROWING}
    states = {
        f"{kind} {number}": state for kind in ("conv_states", "recurrent_states") for number, state in getattr(layer, kind, {}).items()
    }
    return {name: part for name, part in (growing | states).items() if part is not None}
