"""The epilogue functions as fixed sequences of fp32 operations, each rounded once, as the kernels do them.

torch's own gelu and silu differ between CPU capabilities and devices, so these are written out. Their error
is at most 2^-22 max(abs(y), 2^-10) for every fp32 x. docs/epilogue.md derives them;
csrc/kernels/epilogue_math.h is the same text in C++.

All but relu have the form y = max(x, 0) - h(a), where a = abs(x) and h(a) = a * (the function's gate at
-a): only one half line needs an approximation, and the tails are exact. 2^-n for an integer n comes from the
bits of a float: 12583039 - n, that is 1.5 * 2^23 + 127 - n, has 127 - n, the exponent field of 2^-n, as its
lowest bits. n = 127 gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 2^f - 1 = f * (c0 + f * (c1 + ...)) for |f| <= 0.51, and e^r - 1 in the same way for |r| <= 0.36.
EXP2_MINUS_1 = (0.693147182, 0.240226462, 0.0555035435, 0.00961863901, 0.00133940298, 0.000153021625)
EXP_MINUS_1 = (1.0, 0.499999911, 0.166665047, 0.0416688211, 0.00837066211, 0.00137997477)

# 2 * Phi(-a) * 2^Q(a) - 1 = a * (k0 + a * (k1 + ...)), Phi the normal distribution and
# Q(a) = 0.59375 a (a + 2.875).
GELU = (
    0.385338783,
    0.167495534,
    0.00911017135,
    0.00300565665,
    -0.00159929413,
    0.000166017009,
    -6.13620432e-05,
    1.18250928e-05,
    -6.65178106e-07,
)

# log2(e) * 2 sqrt(2/pi) * (a + 0.044715 a^3) = 0.5625 a (a + 2.8125) + CUBIC a (a - ROOTS[0]) (a - ROOTS[1]).
GELU_TANH_CUBIC = 0.102943242
GELU_TANH_ROOTS = (2.04766059, 3.41651559)

LOG2_E = 1.44269502
LN_2_HIGH, LN_2_LOW = 0.693359375, -0.000212194442  # 9 bits, so n * LN_2_HIGH is exact, and the remainder


def relu(x: Tensor) -> Tensor:
    """max(x, 0): NaN stays NaN and -0 stays -0. fp32 of any shape."""
    return torch.where(x < 0.0, 0.0, x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), Phi the normal distribution: ``F.gelu(x)``, its erf form. -inf gives 0, NaN gives NaN.

    h(a) = a Phi(-a) = a * 2^-Q(a) * K(a) with the quadratic Q above. 2^-Q would turn an error of Q into a
    relative one of h, and Q reaches 10 where h still counts, so Q = n - f is summed exactly: of a's 9 leading
    bits c, with a correction for the remaining bits.
    """
    a = x.abs().clamp(max=13.1875)
    c = _leading_bits(a)
    c_plus = c + 2.875
    q = c * 0.59375 * c_plus
    t = 12583038.0 - q
    n = 12583038.0 - t
    f = (n - q) - (a - c) * (a + c_plus) * 0.59375
    s = f * _polynomial(f, EXP2_MINUS_1)
    z = a * _polynomial(a, GELU)
    return relu(x) - (a + a * (z + s * (1.0 + z))) * _power_of_2(t)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): ``F.gelu(x, approximate="tanh")``. -inf gives 0.

    h(a) = a / (1 + 2^w) with w the cubic above: its quadratic part exact as in :func:`gelu`, the cubic
    remainder small and factored, since the subtraction of a root is exact where it cancels.
    """
    a = x.abs().clamp(max=10.03125)
    c = _leading_bits(a)
    c_plus = c + 2.8125
    q = c * 0.5625 * c_plus
    g = a * GELU_TANH_CUBIC * (a - GELU_TANH_ROOTS[0]) * (a - GELU_TANH_ROOTS[1])
    t = 12583039.0 - (q + g)
    n = 12583039.0 - t
    f = (q - n) + (a - c) * (a + c_plus) * 0.5625 + g
    return relu(x) - _gated(a, f * _polynomial(f, EXP2_MINUS_1), _power_of_2(t))


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x): ``F.silu(x)``. -inf gives 0, NaN gives NaN.

    h(a) = a / (1 + e^a), e^a = 2^n e^r.
    """
    a = x.abs().clamp(max=88.0)
    t = 12583039.0 - a * LOG2_E
    n = 12583039.0 - t
    r = (a - n * LN_2_HIGH) - n * LN_2_LOW
    return relu(x) - _gated(a, r * _polynomial(r, EXP_MINUS_1), _power_of_2(t))


_FUNCTIONS = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}


def apply_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """The function that a layer applies after its bias, fp32 to fp32."""
    return y if epilogue == "none" else _FUNCTIONS[epilogue](y)


def _gated(a: Tensor, s: Tensor, power: Tensor) -> Tensor:
    """a / (1 + 2^n (1 + s)) for power = 2^-n, multiplied through by it: ends at 0 instead of overflowing."""
    return a * power / ((power + 1.0) + s)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """c0 + c1 x + x^2 (c2 + c3 x + x^2 (...)): in pairs, half as many operations depend on each other."""
    square = x * x
    pairs = [coefficients[i : i + 2] for i in range(0, len(coefficients), 2)]
    values = [x * pair[1] + pair[0] if len(pair) == 2 else torch.full_like(x, pair[0]) for pair in pairs]
    total = values.pop()
    while values:
        total = total * square + values.pop()
    return total


def _leading_bits(x: Tensor) -> Tensor:
    """x cut to 9 significant bits, so that products of two such numbers are exact."""
    return (x.view(torch.int32) & -0x8000).view(torch.float32)


def _power_of_2(t: Tensor) -> Tensor:
    """2^(e - 127) for e the lowest 9 bits of t, in [0, 254]; e = 0 gives 0."""
    return (t.view(torch.int32) << 23).view(torch.float32)
