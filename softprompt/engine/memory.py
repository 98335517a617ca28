"""How many tokens a micro-batch may have on this machine, and what weights hold."""

import math
from typing import Any

import torch
from psutil import virtual_memory

CPU_TOKENS = 256  # in float32, twice as many in half precision; more compute 5% faster at most and need twice the memory (LOG.md)
GPU_TOKENS = 65536
SHARE = 0.5  # of the free memory, for activations
QUANTIZED_BYTES = {8: 1.0, 4: 0.516}  # of a weight by its bits, scales included: one byte for 64, and four for 64 x 256


def token_budget(backbone: Any, device: torch.device, wanted: int | None, processes: int = 1) -> int:
    """Tokens (padding included) of one micro-batch: `wanted`, or what fits into the free memory and computes fastest. `processes`: so many
    share the machine and its GPUs."""
    if wanted is not None:
        return wanted
    if device.type == "cuda":
        processes = math.ceil(processes / torch.cuda.device_count())
        free, most = torch.cuda.mem_get_info(device)[0], GPU_TOKENS
    else:
        free, most = virtual_memory().available, CPU_TOKENS * 4 // next(backbone.parameters()).dtype.itemsize
    return int(max(1, min(most, SHARE * free / processes / activation_bytes(backbone))))


def activation_bytes(backbone: Any) -> int:
    """Bytes that one token keeps for backward, roughly.

    A frozen linear layer keeps nothing itself; what counts is the outputs of linear layers, which norms, attention and
    activations keep, and twice the residual stream per norm.
    """
    linear = sum(module.out_features for module in backbone.modules() if isinstance(module, torch.nn.Linear))
    scales = (getattr(module, "weight", None) for module in backbone.modules() if "Norm" in type(module).__name__)
    norms = sum(weight.numel() for weight in scales if weight is not None)
    return (linear + 2 * norms) * next(backbone.parameters()).dtype.itemsize


def weight_bytes(model: Any, dtype: torch.dtype, bits: int | None) -> int:
    """Bytes of a model, or of a part of it; of a quantised one, embeddings, norms and the head stay as they are."""
    kept = sum(parameter.numel() for parameter in model.parameters())
    if bits is None:
        return kept * dtype.itemsize
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    packed = sum(weight.numel() for weight in linear)
    return round((kept - packed) * dtype.itemsize + packed * QUANTIZED_BYTES.get(bits, bits / 8))
