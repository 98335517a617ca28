"""Bases that were saved in few bits: what their configuration says, and the precision of what was left as it was."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BITS = {"int8": 8, "nf4": 4}  # by model.quantization
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def method_of(settings: Any) -> str | None:
    """What the weights in the files were quantised by ("bitsandbytes", "gptq", "awq", "compressed-tensors" ...), or None."""
    said = _said(settings)
    method = said.get("quant_method") or ("bitsandbytes" if said.get("load_in_4bit") or said.get("load_in_8bit") else None)
    return None if method is None or method == "gguf" else str(getattr(method, "value", method)).removesuffix("_4bit").removesuffix("_8bit")


def bits_of(settings: Any, quantization: str | None = None) -> int | None:
    """Bits that a quantised weight is held in, with `model.quantization` or by what the base's configuration says; None where it is not
    quantised, the configuration does not say, or transformers unpacks it."""
    if quantization is not None:
        return BITS[quantization]
    said = _said(settings)
    if method_of(settings) == "compressed-tensors":
        return None
    if method_of(settings) == "bitsandbytes":
        return 8 if said.get("load_in_8bit") else 4
    return 8 if "fp8" in str(method_of(settings)) else said.get("bits")


def computed_in(settings: Any, dtype: torch.dtype) -> None:
    """Changes the configuration: 4-bit weights of bitsandbytes are computed with in this precision, whatever they were saved for."""
    if method_of(settings) == "bitsandbytes":
        said = {**_said(settings), "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        settings.quantization_config = said


def settle(model: Any, dtype: torch.dtype) -> None:
    """Puts what was not quantised of a quantised model (embeddings, norms, the head) into this precision: files hold it in one of their
    own."""
    if not getattr(model, "is_quantized", False):
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' way for inference repacks 4-bit weights and has no gradient
            module.support_avx512bf16_for_cpu = False
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if all(tensor.dtype in PLAIN for tensor in own):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def _said(settings: Any) -> dict[str, Any]:
    said = getattr(settings, "quantization_config", None) or {}
    return said if isinstance(said, dict) else said.to_dict()


@contextmanager
def unadvised() -> Iterator[None]:
    """bitsandbytes, which PEFT imports wherever it is installed, advises then to install faster kernels: nobody has asked for 4 bits."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
