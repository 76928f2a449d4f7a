"""Autograd and autocast of the ops without the extension; csrc/torch/autograd.cpp has the same formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..config import EPILOGUES, Config, recode
from ..patterns.activations import ACTIVATIONS, apply_float
from ..reference import FLOAT_DTYPES, rotate_back, unpack_weight

NO_DERIVATIVE = (
    "{}: expected inputs that require no gradient, since this op has no derivative; call it under "
    "torch.no_grad()"
)


def activation(y: Tensor, epilogue: int) -> Tensor:
    """The float function of the epilogue with this code."""
    return apply_float(EPILOGUES[epilogue], y)


def activation_backward(grad: Tensor, y: Tensor, epilogue: int) -> Tensor:
    """The gradient of y from that of :func:`activation`."""
    return grad if epilogue == 0 else ACTIVATIONS[EPILOGUES[epilogue]].backward(grad, y)


def below_autograd(name: str, refuses: bool) -> Callable[..., Any]:
    """An op without derivatives: its results require no gradient, or it ``refuses`` inputs that do."""

    def kernel(*args: Any) -> Any:
        if refuses and torch.is_grad_enabled():
            lists = [argument if isinstance(argument, (list, tuple)) else [argument] for argument in args]
            tensors = [value for values in lists for value in values if isinstance(value, Tensor)]
            if any(tensor.requires_grad for tensor in tensors):
                raise NotImplementedError(NO_DERIVATIVE.format(name))
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.dynquant, name).default(*args)

    return kernel


def with_autocast_dtype(name: str, key: str) -> Callable[..., Any]:
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


def with_derivatives(name: str) -> Callable[..., Any]:
    """Straight-through: the op as x @ dequantized weight.T + bias, then the epilogue, for any derivative."""

    def kernel(x: Tensor, *args: Any) -> Any:
        packed_weight, weight_sum, weight_scale, bias, *qparams, code = args
        op = getattr(torch.ops.dynquant, name).default
        if not _have_derivatives(x, bias):
            with torch._C._AutoDispatchBelowAutograd():
                return op(x, *args)
        config = Config.decode(code)
        fixed_x, fixed_bias = x.detach(), None if bias is None else bias.detach()
        fixed = fixed_x, packed_weight, weight_sum, weight_scale, fixed_bias, *qparams
        out = op(*fixed, code)
        weight = unpack_weight(packed_weight, weight_scale.shape[0], x.shape[-1]) * weight_scale[:, None]
        if config.rotation_block:
            weight = rotate_back(weight, config.rotation_block, config.rotation_signs)
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


def with_derivatives_of_sdpa(name: str) -> Callable[..., Any]:
    """The op, plus torch's own attention as a term that is 0 and has its derivatives."""

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        op = getattr(torch.ops.dynquant, name).default
        if not _have_derivatives(q, k, v, mask):
            with torch._C._AutoDispatchBelowAutograd():
                return op(q, k, v, mask, is_causal, scale)
        fixed_mask = None if mask is None else mask.detach()
        out = op(q.detach(), k.detach(), v.detach(), fixed_mask, is_causal, scale)
        added, is_causal = sdpa_arguments(q, k, mask, is_causal)
        shared = bool(q.shape[1] != k.shape[1])
        exact = F.scaled_dot_product_attention(
            q, k, v, added, is_causal=is_causal, scale=scale, enable_gqa=shared
        )
        return out + (exact - exact.detach())

    return kernel


def sdpa_arguments(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> tuple[Tensor | None, bool]:
    """mask and is_causal for torch's attention, which takes one of them and a float mask of q's dtype."""
    if mask is not None and is_causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -math.inf)
        is_causal = False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return mask, is_causal


def _have_derivatives(*inputs: Tensor | None) -> bool:
    tensors = [x for x in inputs if x is not None]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return recorded or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
