"""The epilogue functions: their error bound, special values, and the same bits on every instruction set."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynquant import reference
from dynquant.config import EPILOGUES, Config
from dynquant.patterns.activations import ACTIVATIONS
from dynquant.reference import epilogue as written
from tests.support.paths import KERNEL_SOURCES
from tests.support.same_bits import assert_same_bits


def exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def exact_gelu_tanh(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)))


def exact_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def exact_quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0.0),
    "gelu": exact_gelu,
    "gelu_tanh": exact_gelu_tanh,
    "silu": exact_silu,
    "quick_gelu": exact_quick_gelu,
}


def function(name: str) -> Callable[[Tensor], Tensor]:
    return getattr(written, name)


def dense_inputs() -> Tensor:
    """Every bf16 pattern (each exponent, NaN, infinity), random fp32 patterns, the bends of the curves."""
    generator = torch.Generator().manual_seed(0)
    every_bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    subnormal = torch.arange(0, 1 << 23, 4099, dtype=torch.int32).view(torch.float32)
    patterns = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).int().view(torch.float32)
    bends = (torch.rand(3, 1 << 16, generator=generator) - 0.5) * torch.tensor([28.0, 8.0, 1.0])[:, None]
    return torch.cat([every_bf16, patterns, subnormal, -subnormal, bends.flatten()])


@pytest.mark.parametrize("name", EXACT)
def test_error_is_within_the_bound(name: str) -> None:
    x = dense_inputs()
    x = x[x.isfinite()]
    exact = EXACT[name](x.double())
    error = (function(name)(x).double() - exact).abs()
    allowed = torch.clamp(exact.abs(), min=2.0**-8) * (2.0**-18 if name != "relu" else 0.0)
    worst = int((error / allowed).argmax())
    assert error[worst] <= allowed[worst], f"{name}({x[worst].item()!r}) is wrong by {error[worst].item()}"


@pytest.mark.parametrize("name", EXACT)
def test_special_values(name: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, -0.0])
    low = 0.0 if name in ("relu", "gelu") else -0.0
    expected = torch.tensor([math.nan, math.inf, low, 3e38, low, 0.0, -0.0])
    assert_same_bits(function(name)(x), expected, name)


def test_exp2() -> None:
    """Exact at integers, 0 below -126.5, elsewhere within 4 units of 2^-24."""
    n = torch.arange(-127.0, 128.0)
    assert_same_bits(written.exp2(n), torch.where(n < -126, 0.0, torch.exp2(n.double())).float())
    x = (torch.rand(1 << 18, generator=torch.Generator().manual_seed(0)) - 0.5) * 253.0
    exact = torch.exp2(x.double())
    assert ((written.exp2(x).double() - exact).abs() <= exact * 2.0**-22).all()


def test_the_lists_of_activations_are_the_same() -> None:
    """Python's table, the list in config.h, the float functions; a code keeps its meaning in files."""
    listed = re.findall(r"X\((k\w+), (\w+)\)", (KERNEL_SOURCES / "config.h").read_text())
    assert ["none", *(name for _, name in listed)] == list(EPILOGUES)
    assert all(label == "k" + name.title().replace("_", "") for label, name in listed)
    assert EPILOGUES[:6] == ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu")
    assert EXACT.keys() == ACTIVATIONS.keys() == set(EPILOGUES[1:])
    x = torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)
    for name, activation in ACTIVATIONS.items():
        torch.testing.assert_close(activation.function(x), EXACT[name](x))


@pytest.mark.parametrize("name", EXACT)
def test_strides_do_not_matter(name: str) -> None:
    x = torch.randn(6, 10)
    assert_same_bits(function(name)(x.t()[::2]), function(name)(x.t()[::2].contiguous()), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EPILOGUES)
def test_every_isa_has_the_bits_of_the_reference(isa: str, name: str, dtype: torch.dtype) -> None:
    """A layer without inputs outputs the epilogue of its bias."""
    bias = dense_inputs()
    n = bias.shape[0]
    packed, weight_sum = reference.pack_weight(torch.zeros(n, 0, dtype=torch.int8))
    arguments = (packed, weight_sum, torch.ones(n), bias, Config(epilogue=name).encode())
    x = torch.zeros(1, 0, dtype=dtype)
    actual = torch.ops.dynquant.linear_dynamic(x, *arguments)
    assert_same_bits(actual, reference.linear_dynamic(x, *arguments), f"{isa} {name}")
    if name != "none":
        assert_same_bits(actual, function(name)(0.0 + bias)[None].to(dtype), f"{isa} {name}")


@pytest.mark.parametrize("n", [1, 7, 16, 24, 40, 100])
@pytest.mark.parametrize("name", EPILOGUES)
def test_every_width_of_a_layer(isa: str, name: str, n: int) -> None:
    x, weight, bias = torch.randn(9, 36) * 3, torch.randn(n, 36) * 0.2, torch.randn(n)
    config = Config(epilogue=name).encode()
    q, scale = reference.quantize_weight(weight, config)
    arguments = (*reference.pack_weight(q), scale, bias, config)
    for rows in (x, x[:1], x.bfloat16()):
        actual = torch.ops.dynquant.linear_dynamic(rows, *arguments)
        assert_same_bits(actual, reference.linear_dynamic(rows, *arguments), f"{isa} {name} N={n}")
