"""The comparison that every kernel is judged by."""

from __future__ import annotations

import torch

_INTEGER_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    """NaN masks must be equal and everything else equal as integers.

    ``torch.equal`` would call NaN unequal to itself and -0 equal to 0. The first coordinate that
    differs is named.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} != {expected.dtype}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if actual.dtype in _INTEGER_OF:
        nan, nan_expected = actual.isnan(), expected.isnan()
        integer = _INTEGER_OF[actual.dtype]
        differs = (nan != nan_expected) | (
            ~nan & ~nan_expected & (actual.view(integer) != expected.view(integer))
        )
    else:
        differs = actual != expected
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first at {first}: "
            f"{actual[first].item()!r} != {expected[first].item()!r}"
        )
