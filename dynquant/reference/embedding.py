"""Embeddings: rows of an int8 table with a scale for each row, and reductions of bags of rows.

A value is ``float(q) * scale``, rounded once, so an embedding has the bits of the dequantized table's rows.
Only the table is int8; nothing is quantized at a call.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check, check_channels, check_device, check_memory
from .layout import check_packed_k

MODES = ("sum", "mean", "max")


def embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The dequantized rows of a table.

    Args:
        indices: int64 or int32 of any shape, in [0, N).
        weight: int8, contiguous: rows [N, K], or a packed weight as :func:`pack_weight` returns it.
        weight_scale: fp32 [N].
        k: K, the size of a row.
        dtype: of the result.

    Returns:
        [*indices.shape, K].

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not fit together, and an index out of range, with
            its position (on CUDA the device's own assertion).
    """
    check_embedding("embedding", indices, weight, weight_scale, k, dtype)
    check_indices("embedding", indices, weight_scale.shape[0])
    flat = indices.flatten()
    values = rows_of_table(weight, flat, k).to(torch.float32) * weight_scale.index_select(0, flat)[:, None]
    return values.to(dtype).reshape(*indices.shape, k)


def embedding_bag(
    indices: Tensor,
    offsets: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    per_sample_weights: Tensor | None,
    k: int,
    mode: int,
    include_last_offset: bool,
    padding_idx: int,
    dtype: torch.dtype,
) -> Tensor:
    """Sum, mean or maximum of the dequantized rows of each bag, in fp32 and in order; zeros for an empty bag.

    With weights, a row counts ``float(q) * (scale * weight)``.

    Args:
        indices: int64 or int32 [L], in [0, N): the bags, one behind the other.
        offsets: int64 or int32 [B], where each bag begins: from 0 on, not decreasing, at most L.
        weight, weight_scale, k, dtype: as of :func:`embedding`.
        per_sample_weights: [L] of a float dtype, with the mode "sum" alone; computed with in fp32.
        mode: the position in ``MODES``.
        include_last_offset: whether the last offset is the end of the last bag instead of its begin.
        padding_idx: rows that no bag counts; -1 for none.

    Returns:
        [B, K], with ``include_last_offset`` [B - 1, K].

    Raises:
        RuntimeError: as :func:`embedding`, and for offsets or weights that do not fit.
    """
    op = "embedding_bag"
    check_embedding_bag(
        indices, offsets, weight, weight_scale, per_sample_weights, k, mode, include_last_offset, dtype
    )
    check_indices(op, indices, weight_scale.shape[0])
    check_offsets(offsets, indices.shape[0])
    begins = offsets[:-1] if include_last_offset else offsets
    last = offsets[-1:] if include_last_offset else offsets.new_tensor([indices.shape[0]])
    ends = torch.cat([begins[1:], last])
    scale = weight_scale.index_select(0, indices)
    if per_sample_weights is not None:
        scale = scale * per_sample_weights.to(torch.float32)
    is_max = MODES[mode] == "max"
    total = scale.new_full((begins.shape[0], k), -math.inf if is_max else 0.0)
    rows = torch.zeros_like(begins)
    for step in range(int((ends - begins).max()) if begins.numel() else 0):
        position = begins + step
        bags = (position < ends).nonzero().flatten()
        bags = bags[indices[position[bags]] != padding_idx]
        taken = position[bags]
        values = rows_of_table(weight, indices[taken], k).to(torch.float32) * scale[taken][:, None]
        total[bags] = torch.maximum(total[bags], values) if is_max else total[bags] + values
        rows[bags] += 1
    if MODES[mode] == "mean":
        total = total / rows.clamp(min=1).to(torch.float32)[:, None]
    return torch.where(rows[:, None] == 0, 0.0, total).to(dtype)


def rows_of_table(weight: Tensor, indices: Tensor, k: int) -> Tensor:
    """int8 [L, K]: rows of a table in any layout, without unpacking the whole of it."""
    if weight.dim() == 2:
        return weight.index_select(0, indices)[:, :k]
    panel = weight.shape[2]
    return weight[indices // panel, :, indices % panel].flatten(1)[:, :k]


def check_embedding(
    op: str, indices: Tensor, weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype
) -> None:
    """All requirements except those on values."""
    check_index_dtype(op, indices)
    check(weight_scale.dim() == 1, f"{op}: expected weight_scale with 1 dimension, got {weight_scale.dim()}")
    n = weight_scale.shape[0]
    check_channels(op, "weight_scale", weight_scale, torch.float32, n)
    check(k >= 0, f"{op}: expected k of at least 0, got {k}")
    if list(weight.shape) == [n, k]:
        check(
            weight.dtype == torch.int8 and weight.is_contiguous(),
            f"{op}: expected weight to be contiguous int8, got {weight.dtype}, contiguous: "
            f"{weight.is_contiguous()}",
        )
    else:
        check(
            weight.dim() in (2, 4),
            f"{op}: expected weight to be rows of shape {[n, k]} or a packed weight, got one of shape "
            f"{list(weight.shape)}",
        )
        check_packed_k(op, "k", k, weight, n)
    check_memory(op, "weight", weight)
    check_device(op, "indices", indices, "weight", weight)
    check_device(op, "indices", indices, "weight_scale", weight_scale)
    check(
        dtype in FLOAT_DTYPES,
        f"{op}: expected dtype to be float32, bfloat16, float16 or float64, got {dtype}",
    )


def check_index_dtype(op: str, indices: Tensor) -> None:
    check(
        indices.dtype in (torch.int64, torch.int32),
        f"{op}: expected indices of dtype int64 or int32, got {indices.dtype}",
    )
    check_memory(op, "indices", indices)


def check_embedding_bag(
    indices: Tensor,
    offsets: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    per_sample_weights: Tensor | None,
    k: int,
    mode: int,
    include_last_offset: bool,
    dtype: torch.dtype,
) -> None:
    """All requirements except those on values."""
    op = "embedding_bag"
    check_embedding(op, indices, weight, weight_scale, k, dtype)
    check(indices.dim() == 1, f"{op}: expected indices with 1 dimension, got {indices.dim()}")
    check(
        offsets.dtype in (torch.int64, torch.int32) and offsets.dim() == 1,
        f"{op}: expected offsets of dtype int64 or int32 with 1 dimension, got {offsets.dtype} with "
        f"{offsets.dim()}",
    )
    check_memory(op, "offsets", offsets)
    check_device(op, "indices", indices, "offsets", offsets)
    check(
        offsets.shape[0] > 0 or not include_last_offset,
        f"{op}: expected at least 1 offset with include_last_offset, got 0",
    )
    check(0 <= mode < len(MODES), f"{op}: expected mode to be 0 (sum), 1 (mean) or 2 (max), got {mode}")
    if per_sample_weights is None:
        return
    check(
        MODES[mode] == "sum",
        f"{op}: expected per_sample_weights with mode 'sum' alone, got mode {MODES[mode]!r}",
    )
    check(
        per_sample_weights.dtype in FLOAT_DTYPES and per_sample_weights.shape == indices.shape,
        f"{op}: expected per_sample_weights of a float dtype and of shape {list(indices.shape)}, got "
        f"{per_sample_weights.dtype} of shape {list(per_sample_weights.shape)}",
    )
    check_memory(op, "per_sample_weights", per_sample_weights)
    check_device(op, "indices", indices, "per_sample_weights", per_sample_weights)


def check_indices(op: str, indices: Tensor, n: int) -> None:
    """All in [0, n). CUDA's index_select asserts it on the device; a look from here would wait for that."""
    if indices.device.type in ("cuda", "meta"):
        return
    flat = indices.flatten()
    bad = ((flat < 0) | (flat >= n)).nonzero()
    if bad.numel():
        position = int(bad[0])
        check(
            False,
            f"{op}: expected indices in [0, {n}), got {int(flat[position])} at position {position}",
        )


def check_offsets(offsets: Tensor, length: int) -> None:
    """From 0 on, not decreasing, at most ``length``."""
    values = offsets.tolist()
    if not values:
        return
    check(values[0] == 0, f"embedding_bag: expected offsets[0] to be 0, got {values[0]}")
    for i, (before, after) in enumerate(pairwise(values)):
        check(
            before <= after,
            f"embedding_bag: expected offsets that do not decrease, got {before} and then {after} at "
            f"offsets[{i + 1}]",
        )
    check(
        values[-1] <= length,
        f"embedding_bag: expected offsets of at most {length}, the number of indices, got {values[-1]}",
    )
