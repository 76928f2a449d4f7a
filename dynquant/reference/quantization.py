"""Ranges, qparams, quantized values and weights, and the rotation before them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config
from .checks import (
    check_finite,
    check_float,
    check_qparams,
    check_ranges,
    check_rotation,
    check_weight,
)

FLT_MIN = torch.finfo(torch.float32).tiny


def constant(value: float, like: Tensor) -> Tensor:
    """A scalar on ``like``'s device: by a Python number CUDA divides by a product with the reciprocal."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def rows_of(op: str, x: Tensor, name: str = "x") -> Tensor:
    """x as fp32 [M, K]: every leading dimension is a row, a 1-D x is one row."""
    check_float(op, name, x)
    return x.to(torch.float32).reshape(x.shape[:-1].numel(), x.shape[-1])


def min_max(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """Range of x, widened to hold 0: lo = min(min(x), 0), hi = max(max(x), 0).

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64.
        per_token: a range for each row (lo and hi are fp32 [M]) or one for all of x ([1]).

    Returns:
        lo <= 0 <= hi. Both are NaN if the range holds a NaN; an infinity in x is the lo or the hi.
    """
    rows = rows_of("min_max", x)
    if not per_token:
        rows = rows.reshape(1, -1)
    if rows.shape[1] == 0:
        zeros = torch.zeros(rows.shape[0], dtype=torch.float32, device=x.device)
        return zeros, zeros.clone()
    # + 0.0 turns -0.0 into 0.0: of two zeros the reduction returns the one that it reads first.
    return rows.amin(1).clamp(max=0.0) + 0.0, rows.amax(1).clamp(min=0.0) + 0.0


def choose_qparams(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Affine int8 qparams of the range [lo, hi] (gemmlowp's ``real = scale * (q - zero_point)``).

    Two divisions instead of one of the difference: hi - lo overflows at 3e38. FLT_MIN keeps 1/scale finite.

    Args:
        lo, hi: fp32 [M] or [1], as :func:`min_max` returns them.

    Returns:
        scale fp32 and zero_point int32 in [-128, 127]; NaN and 0 where lo or hi is not finite.
    """
    check_ranges("choose_qparams", lo, hi)
    steps = constant(255.0, lo)
    finite = lo.isfinite() & hi.isfinite()
    scale = torch.where(finite, (hi / steps - lo / steps).clamp(min=FLT_MIN), constant(float("nan"), lo))
    zero_point = (-128.0 - lo * _inverse(scale)).round().clamp(-128.0, 127.0)
    return scale, torch.where(finite, zero_point, 0.0).to(torch.int32)


def _inverse(scale: Tensor) -> Tensor:
    return constant(1.0, scale) / scale


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """q = clamp(round(x * (1 / scale)) + zero_point, -128, 127); 0 where x or scale is NaN.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64.
        scale, zero_point: fp32 and int32, [1] for the whole of x or [M], one for each row.

    Returns:
        int8 of x's shape.
    """
    rows = rows_of("quantize", x)
    check_qparams("quantize", x, rows.shape[0], scale, zero_point)
    steps = (rows * _inverse(scale)[:, None]).round() + zero_point[:, None].to(torch.float32)
    q = torch.where(steps.isnan(), 0.0, steps.clamp(-128.0, 127.0))
    return q.to(torch.int8).reshape(x.shape)


def rotation_signs(block: int, device: torch.device | None = None) -> Tensor:
    """The factors 1 and -1 of the elements of a block: the Rudin-Shapiro sequence.

    s[k] = (-1)^(number of pairs of adjacent ones among the binary digits of k). The Walsh-Hadamard transform
    of this sequence is flat: 128 equal elements become coefficients of 0 or 16 times their value, where
    without signs one coefficient holds all of it, 128 times, and sets the scale of the row.

    Returns:
        fp32 [block].
    """
    return torch.tensor([1.0 - 2.0 * ((k & k >> 1).bit_count() % 2) for k in range(block)], device=device)


def rotate(x: Tensor, block: int, signs: bool = False) -> Tensor:
    """Unnormalized Walsh-Hadamard transform of each block of ``block`` elements along the last dimension.

    Stages of strides 1, 2, 4 ... block/2, each (a, b) -> (a + b, a - b): additions only. See
    :func:`rotate_back` for the inverse.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64; ``block`` is a power of two up to 128 that divides K.
        signs: multiply the elements of each block by :func:`rotation_signs` before.

    Returns:
        fp32 of x's shape.
    """
    rows = rows_of("rotate", x)
    k = rows.shape[1]
    check_rotation("rotate", k, block)
    if signs:
        rows = rows * rotation_signs(block, x.device).repeat(k // block)
    stride = 1
    while stride < block:
        a, b = rows.reshape(rows.shape[0], k // (2 * stride), 2, stride).unbind(2)
        rows = torch.stack((a + b, a - b), 2).reshape(rows.shape[0], k)
        stride *= 2
    return rows.reshape(x.shape).clone()


def rotate_back(x: Tensor, block: int, signs: bool = False) -> Tensor:
    """``block`` times the inverse of :func:`rotate`: the same transform, and the signs after it."""
    rows = rotate(x, block)
    return rows * rotation_signs(block, x.device).repeat(x.shape[-1] // block) if signs else rows


def quantize_weight(weight: Tensor, config: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 weights: scale = max(max|w| / 127, FLT_MIN), 1 where all are 0; round(w / scale).

    Args:
        weight: [N, K], fp32, bf16, fp16 or fp64, finite. Rotated first if ``config`` has a rotation block.
        config: see :mod:`dynquant.config`.

    Returns:
        int8 [N, K], and weight_scale fp32 [N] (per_channel) or [1] (per_tensor).

    Raises:
        RuntimeError: for a non-finite element, with its index.
    """
    cfg = Config.decode(config)
    check_weight("quantize_weight", weight, cfg.rotation_block)
    w = rows_of("quantize_weight", weight, "weight")
    check_finite("quantize_weight", "weight", w)
    if cfg.rotation_block:
        w = rotate(w, cfg.rotation_block, cfg.rotation_signs) * (1.0 / cfg.rotation_block)
        check_finite("quantize_weight", "rotated weight", w)
    groups = w if cfg.weights == "per_channel" else w.reshape(1, -1)
    largest = groups.abs().amax(1) if groups.shape[1] else groups.new_zeros(groups.shape[0])
    scale = torch.where(largest == 0, 1.0, (largest / constant(127.0, w)).clamp(min=FLT_MIN))
    return (w / scale[:, None]).round().clamp(-127.0, 127.0).to(torch.int8), scale
