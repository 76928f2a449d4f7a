"""The epilogue functions as fixed sequences of fp32 operations, each rounded once, as the kernels do them.

torch's own gelu and silu differ between CPU capabilities and devices, so these are written out. Their error
is at most 2^-18 max(abs(y), 2^-8) for every fp32 x. docs/epilogue.md derives them;
csrc/kernels/epilogue_math.h is the same text in C++.

2^n for an integer n comes from the bits of a float: 12583039 + n, that is 1.5 * 2^23 + 127 + n, has sign and
exponent field of 2^n as its lowest 9 bits: n = -127 gives 0, n = 128 inf. A sum with such a number is rounded
to an integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import fma

# 2^f = c0 + f * (c1 + f * (c2 + ...)) for |f| <= 1/2.
EXP2 = (1.0, 0.693147004, 0.240222469, 0.0555071086, 0.00967129413, 0.00132695795)

# log2(2 Phi(-a)) = a * (c0 + a * (c1 + ...)), Phi the normal distribution.
GELU = (-1.15115416, -0.458851129, -0.0533757247, 0.00809101481, -0.000779657916, 3.48693065e-05)

# x / (1 + 2^(x * slope)): -log2(e), and of gelu_tanh -log2(e) 2 sqrt(2/pi) (1 + 0.044715 x^2).
SILU = -1.44269502
QUICK_GELU = -2.45546699
GELU_TANH = (-2.3022082, -0.102943242)

# e^(2x) = 2^(x * slope): 2 log2(e).
TANH = 2.88539004

_ONE = 12583039.0
_GELU_FIRST = 12582912.0 + 256 + 99  # 256: the sign bit of the power


def relu(x: Tensor) -> Tensor:
    """max(x, 0): NaN stays NaN and -0 stays -0. fp32 of any shape."""
    return torch.where(x < 0.0, 0.0, x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), Phi the normal distribution: ``F.gelu(x)``, its erf form. -inf gives 0, NaN gives NaN.

    max(x, 0) - a Phi(-a) for a = abs(x), and Phi(-a) = 2^(w - 1) with the polynomial w = GELU(a). The power
    is -2^(n - 28) and the polynomial of the fraction 2^27 times as large, so that n = -99, to which a is
    limited, gives 0.
    """
    a = x.abs().clamp(max=12.75)
    r = _polynomial(a, GELU)
    t = fma(a, r, _GELU_FIRST)
    fraction = fma(a, r, _GELU_FIRST - t)
    minus_gate = _exp2_of_fraction(fraction, 2.0**27) * _power_of_2(t)
    return fma(a, minus_gate, relu(x))


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): ``F.gelu(x, approximate="tanh")``. -inf gives -0."""
    low = x.clamp(min=-10.0625)
    w = low.clamp(max=10.03125)
    return _gated(low, w, fma(w * w, GELU_TANH[1], GELU_TANH[0]))


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x): ``F.silu(x)``. -inf gives -0, NaN gives NaN."""
    low = x.clamp(min=-88.75)
    return _gated(low, low.clamp(max=88.0), SILU)


def quick_gelu(x: Tensor) -> Tensor:
    """x / (1 + e^(-1.702 x)): transformers' ``QuickGELUActivation``. -inf gives -0, NaN gives NaN."""
    low = x.clamp(min=-52.125)
    return _gated(low, low.clamp(max=51.75), QUICK_GELU)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), the gates of recurrent layers. -inf gives 0, inf gives 1, NaN gives NaN."""
    return _gated(torch.ones_like(x), x.clamp(min=-88.75).clamp(max=88.0), SILU)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent, of recurrent layers: m / (m + 2) for m = e^(2x) - 1.

    m = 2^n (2^f - 1) + (2^n - 1) keeps its relative precision around 0, where 2^f - 1 is a polynomial without
    constant. Exactly 1 from 9.5 on, to which abs(x) is limited. 0 for both zeros, NaN for NaN.
    """
    w = x.clamp(min=-9.5).clamp(max=9.5)
    t = fma(w, TANH, _ONE)
    fraction = fma(w, TANH, _ONE - t)
    power = _power_of_2(t)
    m = fma(power, fraction * _polynomial(fraction, EXP2[1:]), power - 1.0)
    return m / (m + 2.0)


def exp2(x: Tensor) -> Tensor:
    """2^x for fp32 x in [-127.5, 127.5), within 4 units of 2^-24: 1 at 0, 0 below -126.5."""
    t = x + _ONE
    return _exp2_of_fraction(x - (t - _ONE), 1.0) * _power_of_2(t)


_FUNCTIONS = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "quick_gelu": quick_gelu}


def apply_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """The function that a layer applies after its bias, fp32 to fp32."""
    return y if epilogue == "none" else _FUNCTIONS[epilogue](y)


def _gated(x: Tensor, w: Tensor, slope: Tensor | float) -> Tensor:
    """x / (1 + 2^(w slope)); w is x, limited to where the power is 0, normal or inf."""
    t = fma(w, slope, _ONE)
    fraction = fma(w, slope, _ONE - t)
    return x / fma(_exp2_of_fraction(fraction, 1.0), _power_of_2(t), 1.0)


def _exp2_of_fraction(f: Tensor, factor: float) -> Tensor:
    """factor * 2^f for |f| <= 1/2 and a power of two as factor."""
    return _polynomial(f, tuple(c * factor for c in EXP2))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """c0 + x (c1 + x (c2 + ...))."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = fma(total, x, coefficient)
    return total


def _power_of_2(t: Tensor) -> Tensor:
    """The float whose sign and exponent field are the lowest 9 bits of t."""
    return (t.view(torch.int32) << 23).view(torch.float32)
