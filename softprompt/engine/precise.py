"""Float32 arithmetic over weights that are kept in half precision.

A matrix product whose input is float32 is computed in float32; the weight is widened for the moment of the product, in
backward again, so that no second copy of the base is ever held.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)
SMALL = (layer_norm, torch.conv1d)  # whose weights are few: their widened copies may be kept for backward


class float32_products(TorchFunctionMode):
    """Inside, float32 inputs meet half-precision weights without being rounded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear and _mixed(args, kwargs):
            return _Product.apply(args[0], args[1].t(), wide(_third(args, kwargs)))  # type: ignore[no-untyped-call]
        if func is torch.addmm and _mixed(args, kwargs):  # GPT-2's Conv1D: addmm(bias, input, weight)
            return _Product.apply(args[1], args[2], wide(args[0]))  # type: ignore[no-untyped-call]
        if func in SMALL and _mixed(args, kwargs):
            return func(*(wide(arg) for arg in args), **{name: wide(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)


class _Product(torch.autograd.Function):
    """input [..., I] float32, frozen weight [I, O] half, bias [O] float32 or None -> [..., O] float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight_IO: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_IO)
        product = states @ weight_IO.float()
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight_IO,) = ctx.saved_tensors
        return grad_outputs[0] @ weight_IO.t().float(), None, None


def _mixed(args: Any, kwargs: Any) -> bool:
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]  # layer_norm comes with its weights named
    return any(tensor.dtype in HALF for tensor in tensors) and any(tensor.dtype == torch.float32 for tensor in tensors)


def _third(args: Any, kwargs: Any) -> Any:
    return args[2] if len(args) > 2 else kwargs.get("bias")


def wide(value: Any) -> Any:
    """A half-precision tensor as float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
