"""The comparison that every kernel is judged by, on the device that holds the tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def difference(actual: Tensor, expected: Tensor) -> str | None:
    """None where NaN stands in the same places and everything else is equal as integers; else what differs.

    ``torch.equal`` would call NaN unequal to itself and -0 equal to 0.
    """
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"dtype {actual.dtype} instead of {expected.dtype}"
    actual, expected = actual.detach().contiguous(), expected.detach().to(actual.device).contiguous()
    if actual.dtype in _INTEGER_OF:
        nan, nan_expected = actual.isnan(), expected.isnan()
        integer = _INTEGER_OF[actual.dtype]
        equal = actual.view(integer) == expected.view(integer)
        differs = (nan != nan_expected) | ~(equal | nan)
    else:
        differs = actual != expected
    count = int(differs.sum())
    if count == 0:
        return None
    first = tuple(differs.nonzero()[0].tolist())
    return (
        f"{count} of {differs.numel()} elements differ, first at {list(first)}: {actual[first].item()!r} "
        f"instead of {expected[first].item()!r}"
    )
