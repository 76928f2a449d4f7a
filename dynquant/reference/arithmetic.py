"""Operations that PyTorch lacks or does not round as one."""

from __future__ import annotations

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c rounded once to fp32, as the ``fma`` instruction of every device rounds it.

    Computed in fp64, where the product of two fp32 numbers is exact: the sum is rounded to odd, so that the
    rounding to fp32 which follows is the only one that counts (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 2008).

    Args:
        a: fp32 of any shape.
        b, c: fp32 that broadcasts with a, or a number, which is rounded to fp32.

    Returns:
        fp32 of the broadcast shape.
    """
    product = a.double() * _fp32(b, a).double()
    addend = _fp32(c, a).double()
    total = product + addend
    # Knuth's two-sum: total + error is the exact sum.
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    away_from_zero = (error > 0.0) == (total > 0.0)
    to_odd = bits + torch.where(away_from_zero, 1, -1)
    inexact_and_even = (error != 0.0) & (bits & 1 == 0) & total.isfinite()
    return torch.where(inexact_and_even, to_odd, bits).view(torch.float64).float()


def _fp32(value: Tensor | float, like: Tensor) -> Tensor:
    return (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device=like.device)
    )
