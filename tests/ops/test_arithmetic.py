"""reference.fma against the C library's fmaf, which IEEE 754 defines."""

from __future__ import annotations

import ctypes
import ctypes.util

import pytest
import torch
from torch import Tensor

from dynquant import reference
from tests.support.same_bits import assert_same_bits

COUNT = 20_000


def fmaf(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    function = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    values = [function(*numbers) for numbers in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    return torch.tensor(values, dtype=torch.float32)


def any_bits(generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, (COUNT,), generator=generator).to(torch.int32).view(torch.float32)


def operands(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randn(COUNT, generator=generator) for _ in range(2))
    if kind == "any bits":
        return any_bits(generator), any_bits(generator), any_bits(generator)
    if kind == "cancellation":  # c is the rounded product: the result is the product's rounding error
        return a, b, -(a * b)
    if kind == "halfway":  # the product ends a little above or below the middle of two fp32 numbers
        return 1.0 + a * 2.0**-23, 1.0 + b * 2.0**-23, torch.full((COUNT,), 2.0**24)
    if kind == "subnormal":
        return a * 2.0**-70, b * 2.0**-70, torch.randn(COUNT, generator=generator) * 2.0**-140
    return a, b, torch.randn(COUNT, generator=generator)


@pytest.mark.parametrize("kind", ["normal", "any bits", "cancellation", "halfway", "subnormal"])
def test_fma_rounds_once(kind: str) -> None:
    a, b, c = operands(kind)
    assert_same_bits(reference.fma(a, b, c), fmaf(a, b, c), kind)


def test_fma_takes_numbers_and_broadcasts() -> None:
    a = torch.randn(3, 5)
    expected = reference.fma(a, torch.full((3, 5), 0.1), torch.full((3, 5), -2.0))
    assert_same_bits(reference.fma(a, 0.1, -2.0), expected)
    assert reference.fma(a, torch.randn(5), torch.randn(3, 1)).shape == (3, 5)
