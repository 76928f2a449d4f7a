"""Fake kernels of the ops on weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config
from ..reference import packed_shape
from .registry import fake


@fake("quantize_weight")
def _(weight: Tensor, config: int) -> tuple[Tensor, Tensor]:
    scales = weight.shape[0] if Config.decode(config).weights == "per_channel" else 1
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(scales, dtype=torch.float32)


@fake("pack_weight")
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    packed = weight.new_empty(packed_shape(weight.device, n, k), dtype=torch.int8)
    return packed, weight.new_empty(n, dtype=torch.int32)


@fake("unpack_weight")
def _(packed_weight: Tensor, n: int, k: int) -> Tensor:
    return packed_weight.new_empty(n, k)
