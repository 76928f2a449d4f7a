"""LayerNorm and RMSNorm as fixed sequences of fp32 operations, and the sums over rows that they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import NORMS
from .checks import check, check_device, check_float
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


# ---- norms as arguments of ops: weight and bias, or an empty list ----


def normed(y: Tensor, parameters: Sequence[Tensor | None], eps: float, norm: int) -> Tensor:
    """The norm of each row of y, fp32 [M, K], with weight and bias in fp32; y itself without parameters."""
    if not parameters:
        return y
    weight, bias = (None if tensor is None else tensor.to(torch.float32) for tensor in parameters)
    return layer_norm(y, weight, bias, eps) if NORMS[norm] == "layer_norm" else rms_norm(y, weight, eps)


def check_norm(
    op: str,
    name: str,
    parameters: Sequence[Tensor | None],
    x: Tensor,
    size: int,
    norm: int,
    x_name: str = "x",
) -> None:
    """Weight and bias of a norm over ``size`` elements."""
    check(0 <= norm < len(NORMS), f"{op}: expected norm in [0, {len(NORMS) - 1}], got {norm}")
    if not parameters:
        return
    check(len(parameters) == 2, f"{op}: expected {name} to be weight and bias, got {len(parameters)} tensors")
    check(size > 0, f"{op}: expected {name} over at least 1 element, got {size}")
    biased = NORMS[norm] == "rms_norm" and parameters[1] is not None
    check(not biased, f"{op}: expected no bias in {name}, since rms_norm has none")
    for role, tensor in zip(("weight", "bias"), parameters, strict=True):
        if tensor is not None:
            check_float(op, f"{name}'s {role}", tensor)
            check(
                list(tensor.shape) == [size],
                f"{op}: expected {name}'s {role} of shape [{size}], got {list(tensor.shape)}",
            )
            check_device(op, x_name, x, f"{name}'s {role}", tensor)
