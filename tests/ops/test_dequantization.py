"""Dequantization: fma(float(acc) * weight_scale, scale, bias), at every magnitude of its operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynquant import reference
from dynquant.config import Config
from tests.support.same_bits import assert_same_bits

ops = torch.ops.dynquant
FLT_MIN = 2.0**-126


def layer(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = reference.quantize_weight(weight, 0)
    packed, weight_sum = reference.pack_weight(q)
    return packed, weight_sum, scale


@pytest.mark.parametrize("k", [8, 200, 66_312])
@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_inputs_near_the_largest_float(isa: str, k: int, activations: str, with_bias: bool) -> None:
    """Inputs of 1e38 whose outputs are ordinary numbers: acc * scale would be infinite."""
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(24, k, generator=generator) / k
    x = torch.randn(5, k, generator=generator).clamp(-3, 3) * 1e38
    bias = torch.randn(24, generator=generator) * 1e36 if with_bias else None
    operands, code = (*layer(weight), bias), Config(activations).encode()
    expected = reference.linear_dynamic(x, *operands, code)
    assert_same_bits(ops.linear_dynamic(x, *operands, code), expected, isa)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert expected.isfinite().all()
    assert (expected.double() - exact).norm() <= 0.03 * exact.norm()
    qparams = reference.choose_qparams(*reference.min_max(x, False))
    static = reference.linear_static(x, *operands, *qparams, code)
    assert_same_bits(ops.linear_static(x, *operands, *qparams, code), static, isa)
    assert (static.double() - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("weight_size", [FLT_MIN, 1e-30, 1e-3, 1e28])
@pytest.mark.parametrize("size", [FLT_MIN, 1e-30, 1e-3, 1e30])
def test_error_of_the_dequantization(weight_size: float, size: float) -> None:
    """2^-23 of the product and half a unit of the output, down to the subnormal numbers."""
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**31) + 1, 2**31, (64, 128), generator=generator) >> torch.arange(64)[:, None] % 31
    weight_scale = (torch.rand(128, generator=generator) + 1.0) * weight_size
    scale = (torch.rand(64, generator=generator) + 1.0) * size
    product = acc.double() * weight_scale.double() * scale[:, None].double()
    for bias in (None, torch.randn(128, generator=generator) * product.abs().max().float()):
        out = reference.dequantize(acc, weight_scale, scale, bias)
        exact = product if bias is None else product + bias.double()
        finite = out.isfinite()
        assert torch.equal(finite, exact.abs() < torch.finfo(torch.float32).max)
        unit = torch.nextafter(out.abs(), torch.tensor(torch.inf)).double() - out.abs().double()
        error = (out.double() - exact).abs()
        assert (error <= product.abs() * 2.0**-23 + unit * 0.5)[finite].all()


def test_products_that_underflow_keep_their_sign(isa: str) -> None:
    """Without bias the output is the product: of an accumulator of 0 it is +0, of a negative one -0."""
    weight = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]).repeat(7, 1) * 1e-20
    packed, weight_sum, scale = layer(weight)
    x = torch.ones(3, 2) * 1e-38
    expected = reference.linear_dynamic(x, packed, weight_sum, scale, None, 0)
    assert torch.equal(expected, torch.zeros(3, 21))
    assert torch.equal(expected.signbit(), torch.tensor([False, True, False]).repeat(7).expand(3, 21))
    assert_same_bits(ops.linear_dynamic(x, packed, weight_sum, scale, None, 0), expected, isa)
    bias = torch.tensor([0.0, -0.0, 1.0]).repeat(7)
    with_bias = reference.linear_dynamic(x, packed, weight_sum, scale, bias, 0)
    assert_same_bits(ops.linear_dynamic(x, packed, weight_sum, scale, bias, 0), with_bias, isa)
