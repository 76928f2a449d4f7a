"""Inputs that are not dense tensors: nested ones are computed, those of other layouts refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def of_nested(layer: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """``layer`` of the values of all parts of a nested tensor together, as a nested tensor of x's layout.

    Raises:
        RuntimeError: if the parts have no common last dimension.
    """
    if x.layout is torch.strided:
        return _of_strided(layer, x)
    ragged = x._ragged_idx
    if ragged == x.dim() - 1:
        raise RuntimeError(
            "QLinear: expected a nested input whose parts have one last dimension, in_features, got one that "
            "is ragged there"
        )
    if x.lengths() is not None:  # values between the parts are not the input's
        x = x.contiguous()
    out: Tensor = torch.nested.nested_tensor_from_jagged(
        layer(x.values()), offsets=x.offsets(), jagged_dim=ragged
    )
    return out


def _of_strided(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parts = x.unbind()
    widths = sorted({part.shape[-1] for part in parts})
    if len(widths) > 1:
        raise RuntimeError(
            f"QLinear: expected a nested input whose parts have one last dimension, in_features, got {widths}"
        )
    if not parts:
        raise RuntimeError("QLinear: expected a nested input with at least one part")
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    outputs = layer(torch.cat(rows)).split([part.shape[0] for part in rows])
    return torch.nested.as_nested_tensor(
        [out.reshape(*part.shape[:-1], -1) for out, part in zip(outputs, parts, strict=True)]
    )


def refusal(x: Tensor) -> str:
    """The sentence for an input of a layout that only ``to_dense`` makes one for a layer."""
    return f"QLinear: expected a dense input, got one of layout {x.layout}; input.to_dense() makes it dense"
