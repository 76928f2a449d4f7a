"""Comparison bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INTEGER_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def difference(actual: Tensor, expected: Tensor) -> dict[str, Any] | None:
    """None for equal tensors: NaN at the same coordinates, everything else equal as integers.

    ``torch.equal`` would call NaN unequal to itself and -0 equal to 0. The comparison runs on the device of
    ``actual``.

    Returns:
        {"differ", "of": elements; "at", "last_at": first and last coordinates that differ; "actual",
        "expected": values at the first}, or {"actual", "expected": dtype and shape} where these differ.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (actual, expected)]
        return {"actual": kinds[0], "expected": kinds[1]}
    actual, expected = actual.detach().contiguous(), expected.detach().to(actual.device).contiguous()
    if actual.dtype in _INTEGER_OF:
        integer = _INTEGER_OF[actual.dtype]
        equal = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
    else:
        equal = actual == expected
    if bool(equal.all()):
        return None
    wrong = (~equal).nonzero()
    first = tuple(wrong[0].tolist())
    return {
        "differ": len(wrong),
        "of": equal.numel(),
        "at": list(first),
        "last_at": wrong[-1].tolist(),
        "actual": repr(actual[first].item()),
        "expected": repr(expected[first].item()),
    }
