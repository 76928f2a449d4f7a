"""Fake kernels of the products, autograd and autocast of the linear ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._extension import extension
from ..config import Config, recode
from ..patterns.activations import apply_float
from ..reference import FLOAT_DTYPES, rotate, unpack_weight
from ..reference.checks import check_device, check_k
from ..reference.layout import check_packed_k
from ..reference.linear import check_operands
from .registry import DIFFERENTIABLE, fake, library


@fake("int8_mm")
def _(q: Tensor, packed_weight: Tensor, weight_sum: Tensor) -> Tensor:
    check_device("int8_mm", "q", q, "packed_weight", packed_weight)
    check_device("int8_mm", "q", q, "weight_sum", weight_sum)
    check_packed_k("int8_mm", "q", q, packed_weight, weight_sum.shape[0])
    return q.new_empty(q.shape[0], weight_sum.shape[0], dtype=torch.int32)


def _fake_output(
    op: str,
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: int,
) -> Tensor:
    dtype = Config.decode(config).out_dtype or x.dtype
    check_operands(op, x, packed_weight, weight_sum, weight_scale, bias)
    check_packed_k(op, "x", x, packed_weight, weight_scale.shape[0])
    check_k(op, x, config)
    return x.new_empty(*x.shape[:-1], weight_scale.shape[0], dtype=dtype)


@fake("linear_dynamic")
def _(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: int,
) -> Tensor:
    return _fake_output("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias, config)


@fake("linear_static")
def _(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    config: int,
) -> Tensor:
    check_device("linear_static", "x", x, "scale", scale)
    check_device("linear_static", "x", x, "zero_point", zero_point)
    return _fake_output("linear_static", x, packed_weight, weight_sum, weight_scale, bias, config)


def _with_autocast_dtype(name: str, key: str) -> Callable[..., Any]:
    device_type = key.removeprefix("Autocast").lower()
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, *args: Any) -> Any:
        *tensors, config = args
        own_dtype = Config.decode(config).out_dtype is None
        if own_dtype and x.dtype in FLOAT_DTYPES and x.dtype != torch.float64:
            config = recode(config, out_dtype=torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return getattr(torch.ops.dynquant, name).default(x, *tensors, config)

    return kernel


def _with_derivatives(name: str) -> Callable[..., Any]:
    """Straight-through: the op as x @ dequantized weight.T + bias, then the epilogue, for any derivative."""

    def kernel(x: Tensor, *args: Any) -> Any:
        packed_weight, weight_sum, weight_scale, bias, *qparams, code = args
        op = getattr(torch.ops.dynquant, name).default
        inputs = [x] if bias is None else [x, bias]
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if not recorded and not any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return op(x, *args)
        config = Config.decode(code)
        fixed_x, fixed_bias = x.detach(), None if bias is None else bias.detach()
        fixed = fixed_x, packed_weight, weight_sum, weight_scale, fixed_bias, *qparams
        out = op(*fixed, code)
        weight = unpack_weight(packed_weight, weight_scale.shape[0], x.shape[-1]) * weight_scale[:, None]
        if config.rotation_block:
            weight = rotate(weight, config.rotation_block)
        # Terms that are 0 and have the derivatives.
        change = (x - fixed_x).to(torch.float32) @ weight.t()
        if bias is not None:
            # An infinite bias rules an output out; inf - inf would make it NaN.
            change = change + (bias - fixed_bias).to(torch.float32).nan_to_num(0.0)
        if config.epilogue != "none":
            plain = recode(code, epilogue="none", out_dtype=torch.float32)
            activated = apply_float(config.epilogue, op(*fixed, plain) + change)
            change = activated - activated.detach()
        return out + change.to(out.dtype)

    return kernel


if extension is None:
    for _name in DIFFERENTIABLE:
        library.impl(_name, _with_derivatives(_name), "Autograd")
        for _key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(_name, _with_autocast_dtype(_name, _key), _key)
