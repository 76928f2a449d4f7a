"""The comparison of every kernel with the reference."""

from __future__ import annotations

import torch

from benchmarks.shared.bits import difference


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """NaN at the same coordinates, everything else equal as integers; compared on the CPU.

    Raises:
        AssertionError: with ``name`` and the first coordinate that differs.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype} != {expected.dtype}"
    found = difference(actual.detach().cpu(), expected)
    if found is not None:
        raise AssertionError(
            f"{name}: {found['differ']} of {found['of']} elements differ, first at {tuple(found['at'])}: "
            f"{found['actual']} != {found['expected']}"
        )
