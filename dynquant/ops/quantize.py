"""Fake kernels of the ops on activations: ranges, qparams, quantized and rotated values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.checks import check_device
from .registry import fake


@fake("min_max")
def _(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    m = x.shape[:-1].numel() if per_token else 1
    return x.new_empty(m, dtype=torch.float32), x.new_empty(m, dtype=torch.float32)


@fake("choose_qparams")
def _(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    check_device("choose_qparams", "lo", lo, "hi", hi)
    return torch.empty_like(lo), torch.empty_like(lo, dtype=torch.int32)


@fake("quantize")
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    check_device("quantize", "x", x, "scale", scale)
    check_device("quantize", "x", x, "zero_point", zero_point)
    return x.new_empty(x.shape, dtype=torch.int8)


@fake("rotate")
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)
