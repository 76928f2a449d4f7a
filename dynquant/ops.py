"""The ops ``torch.ops.dynquant.*``: schemas, the reference as default, fake kernels, autograd, autocast.

The extension overrides them for each device (``csrc/<device>/bindings.cpp``), and brings autograd and
autocast in C++ (a Python kernel on those keys costs microseconds at every call); without it the same formulas
stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._extension import extension
from .config import Config, recode
from .reference.checks import check_device, check_k
from .reference.layout import check_packed_k
from .reference.linear import check_operands

_SCHEMAS: dict[str, str] = {
    "min_max": "(Tensor x, bool per_token) -> (Tensor, Tensor)",
    "choose_qparams": "(Tensor lo, Tensor hi) -> (Tensor, Tensor)",
    "quantize": "(Tensor x, Tensor scale, Tensor zero_point) -> Tensor",
    "rotate": "(Tensor x, int block) -> Tensor",
    "quantize_weight": "(Tensor weight, int config) -> (Tensor, Tensor)",
    "pack_weight": "(Tensor weight) -> (Tensor, Tensor)",
    "unpack_weight": "(Tensor packed_weight, int n, int k) -> Tensor",
    "int8_mm": "(Tensor q, Tensor packed_weight, Tensor weight_sum) -> Tensor",
    "linear_dynamic": "(Tensor x, Tensor packed_weight, Tensor weight_sum, Tensor weight_scale, "
    "Tensor? bias, int config) -> Tensor",
    "linear_static": "(Tensor x, Tensor packed_weight, Tensor weight_sum, Tensor weight_scale, Tensor? bias, "
    "Tensor scale, Tensor zero_point, int config) -> Tensor",
}
_LINEAR = ("linear_dynamic", "linear_static")

_library = torch.library.Library("dynquant", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"dynquant::{name}", lib=_library)


@_fake("min_max")
def _(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    m = x.shape[:-1].numel() if per_token else 1
    return x.new_empty(m, dtype=torch.float32), x.new_empty(m, dtype=torch.float32)


@_fake("choose_qparams")
def _(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    check_device("choose_qparams", "lo", lo, "hi", hi)
    return torch.empty_like(lo), torch.empty_like(lo, dtype=torch.int32)


@_fake("quantize")
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    check_device("quantize", "x", x, "scale", scale)
    check_device("quantize", "x", x, "zero_point", zero_point)
    return x.new_empty(x.shape, dtype=torch.int8)


@_fake("rotate")
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@_fake("quantize_weight")
def _(weight: Tensor, config: int) -> tuple[Tensor, Tensor]:
    scales = weight.shape[0] if Config.decode(config).weights == "per_channel" else 1
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(scales, dtype=torch.float32)


@_fake("pack_weight")
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    packed = weight.new_empty(reference.packed_shape(weight.device, n, k), dtype=torch.int8)
    return packed, weight.new_empty(n, dtype=torch.int32)


@_fake("unpack_weight")
def _(packed_weight: Tensor, n: int, k: int) -> Tensor:
    return packed_weight.new_empty(n, k)


@_fake("int8_mm")
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


@_fake("linear_dynamic")
def _(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: int,
) -> Tensor:
    return _fake_output("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias, config)


@_fake("linear_static")
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


def _autograd_in_python() -> None:
    """Autograd and autocast kernels for when there is no extension to bring them."""
    for name in _SCHEMAS.keys() - set(_LINEAR):
        _library.impl(name, _without_autograd(name), "Autograd")
    for name in _LINEAR:
        torch.library.register_autograd(
            f"dynquant::{name}", _linear_backward, setup_context=_save_for_backward, lib=_library
        )
        for key in ("AutocastCPU", "AutocastCUDA"):
            _library.impl(name, _with_autocast_dtype(name, key), key)


def _without_autograd(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.dynquant, name).default(*args)

    return kernel


def _with_autocast_dtype(name: str, key: str) -> Callable[..., Any]:
    device_type = key.removeprefix("Autocast").lower()
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, *args: Any) -> Any:
        *tensors, config = args
        own_dtype = Config.decode(config).out_dtype is None
        if own_dtype and x.dtype in reference.FLOAT_DTYPES and x.dtype != torch.float64:
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
        weight = reference.unpack_weight(packed_weight, weight_scale.shape[0], x.shape[-1])
        dequantized = weight * weight_scale[:, None]
        if config.rotation_block:
            dequantized = reference.rotate(dequantized, config.rotation_block)
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
    _autograd_in_python()
