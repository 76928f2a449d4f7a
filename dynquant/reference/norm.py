"""LayerNorm and RMSNorm as fixed sequences of fp32 operations, and the sums over rows that they need."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantization import constant

LANES = 16


def row_sum(values: Tensor) -> Tensor:
    """The sum of each row in the order of the kernels: fp32 [M, K] -> [M].

    16 lanes start at +0; lane l adds the elements l, l + 16, ... in order. Then the lanes are halved: 0-7 add
    8-15, 0-3 add 4-7, 0-1 add 2-3, 0 adds 1. Every instruction set and device can do this in its registers.
    """
    k = values.shape[1]
    # A lane is never -0, so the zeros that fill the last step leave its bits as they are.
    padded = torch.nn.functional.pad(values, (0, -k % LANES))
    lanes = padded.new_zeros(values.shape[0], LANES)
    for step in padded.split(LANES, dim=1):
        lanes = lanes + step
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes[:, 0]


def layer_norm(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(y - mean) / sqrt(variance + eps) * weight + bias over the last dimension, as ``F.layer_norm``.

    Args:
        y: fp32 [M, K], K > 0.
        weight, bias: fp32 [K] or None.
        eps: rounded to fp32.

    Returns:
        fp32 [M, K]. A row with a non-finite element becomes NaN.
    """
    size = constant(float(y.shape[1]), y)
    centered = y - (row_sum(y) / size)[:, None]
    variance = row_sum(centered * centered) / size
    out = centered * _inverse_root(variance, eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def rms_norm(y: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y / sqrt(mean(y^2) + eps) * weight, as ``F.rms_norm``. fp32 [M, K] -> [M, K]."""
    out = y * _inverse_root(row_sum(y * y) / constant(float(y.shape[1]), y), eps)
    return out if weight is None else out * weight


def _inverse_root(variance: Tensor, eps: float) -> Tensor:
    # torch's fp32 sqrt is a unit off for some numbers on some CPUs. In fp64 a unit does not reach the next
    # fp32 number: a root of an fp32 number is at least 2^-50 of it away from the middle between two.
    root = (variance + constant(eps, variance)).double().sqrt().float()
    return (constant(1.0, variance) / root)[:, None]
