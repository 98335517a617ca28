"""Where a base's weights lie: on one device where they fit, else its layers in turn on all GPUs; or a sentence that says what is missing.

Embeddings, norms and head stay on the first device, so that what the layers are given and what comes out of them is there; accelerate
carries states from one device to the next.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from psutil import swap_memory, virtual_memory
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt.engine.family import backbone_of
from softprompt.engine.memory import weight_bytes
from softprompt.errors import ModelError

ROOM = 0.85  # of a GPU's free memory, for weights, where there are more GPUs: a step needs room too
TRIES = 100  # shares of the free memory that are tried


def free_memory(device: torch.device, *, all_gpus: bool) -> dict[str, int]:
    """Free bytes by device: of this one, or of all GPUs, it first."""
    if device.type == "cuda":
        first = torch.cuda.current_device() if device.index is None else device.index
        others = [index for index in range(torch.cuda.device_count()) if index != first] if all_gpus else []
        return {f"cuda:{index}": torch.cuda.mem_get_info(index)[0] for index in (first, *others)}
    if device.type == "mps":
        return {"mps": torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()}
    return {str(device): virtual_memory().available + swap_memory().free}


def device_map(model: Any, dtype: torch.dtype, bits: int | None, free: Mapping[str, int], name: str) -> dict[str, str]:
    """The device of every part; {"": device} where one is enough. `model`: on the meta device; `free`: bytes, the device to prefer first.

    Raises ModelError where there is too little memory on all of them together.
    """
    needed, (first, *_) = weight_bytes(model, dtype, bits), free
    if needed <= (free[first] if len(free) == 1 else ROOM * free[first]):
        return {"": first}
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in backbone_of(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    sizes = [weight_bytes(layer, dtype, bits) for layer in layers]
    for share in range(1, TRIES + 1):  # as evenly as they fit
        places = _in_turn(sizes, {device: share / TRIES * room for device, room in free.items()}, needed - sum(sizes))
        if places is not None and len(free) > 1:
            return _rest(model, set(layers), first) | {names[layer]: place for layer, place in zip(layers, places, strict=True)}
    raise ModelError(no_room(name, needed, free))


def no_room(name: str, needed: int, free: Mapping[str, int]) -> str:
    """The sentence about a base that does not fit."""
    there = ", ".join(f"{device} has {room / 1e9:.3g} GB" for device, room in free.items())
    return (
        f"{name} needs {needed / 1e9:.3g} GB for its weights and {there} free: "
        'try model.quantization = "nf4", model.dtype = "bfloat16" or a smaller base; softprompt plan counts the rest'
    )


def _in_turn(sizes: Sequence[int], room: Mapping[str, float], rest: int) -> list[str] | None:
    """A device for every layer, each filled before the next is begun; None where they do not fit. The first holds `rest` as well."""
    places: list[str] = []
    left = dict(room)
    left[next(iter(left))] -= rest
    devices = iter(left)
    device = next(devices)
    for size in sizes:
        while left[device] < size:
            following = next(devices, None)
            if following is None:
                return None
            device = following
        left[device] -= size
        places.append(device)
    return places if min(left.values()) >= 0 else None


def _rest(module: nn.Module, layers: set[nn.Module], device: str, name: str = "") -> dict[str, str]:
    """The largest parts that hold no layer, and what a part holds itself beside its layers."""
    if layers.isdisjoint(module.modules()):
        return {name: device}
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    places = {f"{name}.{part}".lstrip("."): device for part, _ in own}
    for child, part in module.named_children():
        if part not in layers:
            places |= _rest(part, layers, device, f"{name}.{child}".lstrip("."))
    return places
