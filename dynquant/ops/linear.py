"""Fake kernels of the products, autograd and autocast of the linear ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._extension import extension
from ..config import Config, recode
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


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed_weight, weight_sum, weight_scale, bias, *qparams, config = inputs
    ctx.save_for_backward(x, packed_weight, weight_sum, weight_scale, bias, *qparams)
    ctx.config = config


def _linear_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through: grad_x = grad_out @ dequantized weight, grad_bias = sum of grad_out over the rows."""
    x, packed_weight, weight_sum, weight_scale, bias, *qparams = ctx.saved_tensors
    config = Config.decode(ctx.config)
    grad = grad_out.reshape(-1, weight_scale.shape[0]).to(torch.float32)
    if config.epilogue != "none":
        plain = recode(ctx.config, epilogue="none", out_dtype=torch.float32)
        linear = torch.ops.dynquant.linear_static if qparams else torch.ops.dynquant.linear_dynamic
        y = linear(x, packed_weight, weight_sum, weight_scale, bias, *qparams, plain)
        grad = _epilogue_backward(config.epilogue, grad, y.reshape(grad.shape))
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = unpack_weight(packed_weight, weight_scale.shape[0], x.shape[-1])
        dequantized = weight * weight_scale[:, None]
        if config.rotation_block:
            dequantized = rotate(dequantized, config.rotation_block)
        grad_x = (grad @ dequantized).to(x.dtype).reshape(x.shape)
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_x, None, None, None, grad_bias, *(None for _ in qparams), None


def _epilogue_backward(epilogue: str, grad: Tensor, y: Tensor) -> Tensor:
    if epilogue == "relu":
        return grad * (y > 0)
    if epilogue == "silu":
        return torch.ops.aten.silu_backward(grad, y)
    return torch.ops.aten.gelu_backward(grad, y, approximate="tanh" if epilogue == "gelu_tanh" else "none")


if extension is None:
    for _name in DIFFERENTIABLE:
        torch.library.register_autograd(
            f"dynquant::{_name}", _linear_backward, setup_context=_save_for_backward, lib=library
        )
        for _key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(_name, _with_autocast_dtype(_name, _key), _key)
