"""Derives the coefficients of dynquant/reference/epilogue.py again and says how far those in use are from the
exact functions: python docs/epilogue_coefficients.py

Each polynomial is a minimax fit in float64 (Lawson's reweighted least squares). Its coefficients are
rounded to fp32 one by one from the lowest power up, the others fitted anew each time, so that they make up
for the rounding. Errors are in parts of 2^-24, the largest relative rounding error of one fp32 operation; 4
are allowed in all.
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
    f = points(-0.515, 0.515)
    show(
        "EXP2_MINUS_1",
        f,
        torch.expm1(f * math.log(2)) / f,
        f.abs() / torch.exp2(f) / UNIT,
        used.EXP2_MINUS_1,
        1,
    )
    r = points(-0.357, 0.357)
    show("EXP_MINUS_1", r, torch.expm1(r) / r, r.abs() / torch.exp(r) / UNIT, used.EXP_MINUS_1, 1)

    # From a = 6.62 on h(a) is below 2^-32, the error that is allowed where h is small.
    a = points(0.0, 6.62)
    phi = 0.5 * torch.special.erfc(a * math.sqrt(0.5))
    twice_k = 2 * torch.exp(torch.special.log_ndtr(-a) + math.log(2) * 0.59375 * a * (a + 2.875))
    weights = a * phi / torch.clamp(a * phi, min=2.0**-10) / twice_k / UNIT
    show("GELU", a, (twice_k - 1) / a, weights * a, used.GELU, 0)

    # What 0.5625 a (a + 2.8125) leaves of the cubic w(a) = alpha a + beta a^3 has two positive
    # roots beside 0.
    alpha = 2 * math.sqrt(2 / math.pi) / math.log(2)
    beta = 0.044715 * alpha
    half, product = 0.5625 / beta / 2, (alpha - 0.5625 * 2.8125) / beta
    spread = math.sqrt(half**2 - product)
    print(f"GELU_TANH\n  in use   {used.GELU_TANH_CUBIC} {used.GELU_TANH_ROOTS}")
    print(f"  derived  {beta:.9g} ({half - spread:.9g}, {half + spread:.9g})")


if __name__ == "__main__":
    main()
