"""The embedding stage of a transformer: sums of rows of several tables, with a norm over each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check, check_device, check_memory
from .embedding import check_embedding, check_index_dtype, check_indices, rows_of_table
from .norm import check_norm, normed

TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def embedding_norm(
    indices: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    k: int,
    norm_out: Sequence[Tensor | None],
    eps: float,
    norm: int,
    dtype: torch.dtype,
) -> Tensor:
    """norm_out(tables[0][indices[0]] + tables[1][indices[1]] + ...), in fp32 and in this order.

    Args:
        indices: int64 or int32, in [0, N) of their table. The first have the shape of the output's rows; the
            others broadcast to it.
        tables: fp32, bf16 or fp16 [N, K], elements of a row adjacent; or int8 [N, K] or a packed weight.
        scales: fp32 [N] of an int8 table, None for one of floats.
        k: K, the size of a row.
        norm_out: weight and bias, each of any float dtype or None; an empty list for no norm.
        eps: of the norm, rounded to fp32.
        norm: index into ``dynquant.config.NORMS``.
        dtype: of the result.

    Returns:
        [*indices[0].shape, K].

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not fit together, and an index out of range, with
            its position (on CUDA the device's own assertion).
    """
    check_embedding_norm(indices, tables, scales, k, norm_out, norm, dtype)
    shape = indices[0].shape
    total: Tensor | None = None
    for number, (of_table, table, scale) in enumerate(zip(indices, tables, scales, strict=True)):
        check_indices(_named(number), of_table, (table if scale is None else scale).shape[0])
        flat = of_table.flatten()
        if scale is None:
            rows = table.index_select(0, flat).to(torch.float32)
        else:
            rows = rows_of_table(table, flat, k).to(torch.float32) * scale.index_select(0, flat)[:, None]
        rows = rows.reshape(*of_table.shape, k).expand(*shape, k)
        total = rows if total is None else total + rows
    assert total is not None
    out = normed(total.reshape(shape.numel(), k), norm_out, eps, norm)
    return out.to(dtype).reshape(*shape, k)


def _named(number: int) -> str:
    return f"embedding_norm, table {number}"


def check_embedding_norm(
    indices: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    k: int,
    norm_out: Sequence[Tensor | None],
    norm: int,
    dtype: torch.dtype,
) -> None:
    """All requirements except those on values."""
    op = "embedding_norm"
    check(
        0 < len(indices) == len(tables) == len(scales),
        f"{op}: expected at least one table, with indices and a scale (or None) each, got {len(tables)} "
        f"tables, {len(indices)} indices and {len(scales)} scales",
    )
    check(k >= 0, f"{op}: expected k of at least 0, got {k}")
    check(
        dtype in FLOAT_DTYPES,
        f"{op}: expected dtype to be float32, bfloat16, float16 or float64, got {dtype}",
    )
    for number, (of_table, table, scale) in enumerate(zip(indices, tables, scales, strict=True)):
        _check_table(_named(number), of_table, table, scale, indices[0], k)
    check_norm(op, "norm_out", norm_out, indices[0], k, norm, x_name="indices")


def _check_table(
    op: str, indices: Tensor, table: Tensor, scale: Tensor | None, first: Tensor, k: int
) -> None:
    check_index_dtype(op, indices)
    check_device("embedding_norm", "indices", first, "indices", indices)
    pairs = zip(reversed(indices.shape), reversed(first.shape), strict=False)
    check(
        indices.dim() <= first.dim() and all(size in (1, whole) for size, whole in pairs),
        f"{op}: expected indices that broadcast to {list(first.shape)}, got {list(indices.shape)}",
    )
    if scale is not None:
        check_embedding(op, indices, table, scale, k, torch.float32)
        return
    check(
        table.dtype in TABLE_DTYPES,
        f"{op}: expected a table of dtype float32, bfloat16 or float16, or int8 with a scale, got "
        f"{table.dtype}",
    )
    check(
        table.dim() == 2 and table.shape[1] == k,
        f"{op}: expected rows of shape [N, {k}], got {list(table.shape)}",
    )
    check(
        k <= 1 or table.stride(1) == 1,
        f"{op}: expected rows with adjacent elements, got stride {table.stride(1)}",
    )
    check_memory(op, "rows", table)
    check_device(op, "indices", indices, "rows", table)
