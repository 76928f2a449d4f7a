"""Derives the coefficients of dynquant/reference/epilogue.py again and says how far those in use are from the
exact functions: python docs/epilogue_coefficients.py

Each polynomial is a minimax fit in float64 (Lawson's reweighted least squares). Its coefficients are
rounded to fp32 one by one from the lowest power up, the others fitted anew each time, so that they make up
for the rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynquant.reference import epilogue as used

UNIT = 2.0**-24


def points(low: float, high: float, count: int = 700) -> Tensor:
    """Chebyshev points, dense at the ends, where a minimax error peaks. Not the first: weights vanish."""
    angles = torch.linspace(0, math.pi, count, dtype=torch.float64)
    return (low + (1 - torch.cos(angles)) / 2 * (high - low))[1:]


def minimax(basis: Tensor, values: Tensor, weights: Tensor, rounds: int = 200) -> Tensor:
    """c with the smallest largest ``weights * |basis @ c - values|``."""
    share = torch.full_like(values, 1 / len(values))
    best, coefficients = math.inf, torch.empty(0)
    for _ in range(rounds):
        scale = share.sqrt() * weights
        norms = (basis * scale[:, None]).norm(dim=0)
        solved = torch.linalg.lstsq(basis * scale[:, None] / norms, (values * scale)[:, None])
        fit = solved.solution[:, 0] / norms
        error = (weights * (basis @ fit - values)).abs()
        if error.max() < best:
            best, coefficients = float(error.max()), fit
        share = share * (error / error.max() + 1e-3)
        share = share / share.sum()
    return coefficients


def evaluate(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    return sum((float(torch.tensor(c)) * x**k for k, c in enumerate(coefficients)), torch.zeros_like(x))


def fit(
    x: Tensor, values: Tensor, weights: Tensor, count: int, given: tuple[float, ...] = ()
) -> tuple[float, ...]:
    """fp32 coefficients of powers 0 to count - 1 of x, the first ones given."""
    coefficients = [float(torch.tensor(c)) for c in given]
    while len(coefficients) < count:
        known = len(coefficients)
        basis = torch.stack([x**k for k in range(known, count)], 1)
        rest = minimax(basis, values - evaluate(x, tuple(coefficients)), weights)
        coefficients.append(float(rest[0].float()))
    return tuple(coefficients)


def show(
    name: str, x: Tensor, values: Tensor, weights: Tensor, in_use: tuple[float, ...], given: int
) -> None:
    derived = fit(x, values, weights, len(in_use), in_use[:given])
    print(name)
    for what, coefficients in (("in use", in_use), ("derived", derived)):
        error = float((weights * (evaluate(x, coefficients) - values)).abs().max())
        print(f"  {what:8} error {error:.3f}  " + ", ".join(f"{c:.9g}" for c in coefficients))


def main() -> None:
    f = points(-0.5, 0.5)
    show("EXP2, in units of 2^-24", f, torch.exp2(f), 1 / torch.exp2(f) / UNIT, used.EXP2, 1)

    # From a = 6 on a * Phi(-a) is below 2^-26, the error that is allowed where the function is small.
    a = points(0.0, 6.0)
    h = a * torch.special.ndtr(-a)
    w = torch.special.log_ndtr(-a) / math.log(2) + 1
    share = h * math.log(2) / (torch.clamp(h, min=2.0**-8) * 2.0**-18)  # of the allowed error, by that of w
    show("GELU, as a fraction of the allowed error", a, w / a, share * a, used.GELU, 0)

    tanh = 2 * math.sqrt(2 / math.pi) / math.log(2)
    print(f"SILU       {used.SILU}  derived {-1 / math.log(2):.9g}")
    print(f"QUICK_GELU {used.QUICK_GELU}  derived {-1.702 / math.log(2):.9g}")
    print(f"GELU_TANH  {used.GELU_TANH}  derived ({-tanh:.9g}, {-0.044715 * tanh:.9g})")


if __name__ == "__main__":
    main()
