"""Powers of 2 for the softmax, as fixed sequences of fp32 operations that every kernel repeats.

Both split x = n + f with an integer n and abs(f) <= 0.5: x + 12583039, that is 1.5 * 2^23 + 127 + x, rounds
to 12583039 + n and has n + 127, the exponent field of 2^n, as its lowest bits. 2^f is a polynomial of f by
Horner's rule, an :func:`~dynquant.reference.arithmetic.fma` a coefficient; the coefficients minimise the
relative error (Lawson's algorithm). csrc/kernels/cpu/generic/softmax.h is the same text in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import fma

SPLIT = 12583039.0

# 2^f, highest power first. The first set is exact for f = 0.
EXP2 = (0.000153458124, 0.00133999309, 0.00961848907, 0.0555032864, 0.240226462, 0.693147182, 1.0)
EXP2_TIMES_255 = (14.068775177, 61.865837097, 176.781555176, 254.981658936)

LEAST_EXP2 = -127.0
LEAST_PROBABILITY = -16.0


def exp2(x: Tensor) -> Tensor:
    """2^x for x <= 0: relative error at most 2^-22 from -125 on, then subnormal, 0 below -126.5.

    Args:
        x: fp32 of any shape; NaN gives NaN.
    """
    power, f = _split(x, LEAST_EXP2)
    return _horner(f, EXP2) * power


def probabilities(x: Tensor) -> Tensor:
    """round(255 * 2^x) for x <= 0, to the nearest even: 2^x with a relative error of at most 2^-13.7.

    The error moves the product by less than 0.02, far below the rounding that follows. 255 for x = 0, 0 below
    -9 and for -inf.

    Args:
        x: fp32 of any shape.

    Returns:
        fp32 integers in [0, 255]; NaN for NaN.
    """
    power, f = _split(x, LEAST_PROBABILITY)
    return (_horner(f, EXP2_TIMES_255) * power).round()


def _split(x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """2^n, 0 for n = -127, and f."""
    x = x.clamp(min=least)
    shifted = x + SPLIT
    n = shifted - SPLIT
    return (shifted.view(torch.int32) << 23).view(torch.float32), x - n


def _horner(f: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = fma(f, coefficients[0], coefficients[1])
    for coefficient in coefficients[2:]:
        total = fma(total, f, coefficient)
    return total
