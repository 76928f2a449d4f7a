"""The products: int8_mm, and the linear ops, from float input to float output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config
from .arithmetic import fma
from .checks import (
    check,
    check_bias,
    check_channels,
    check_device,
    check_float,
    check_int8_matrix,
    check_k,
    check_qparams,
    check_rotation,
)
from .epilogue import apply_epilogue
from .layout import check_packed, unpack_weight
from .quantization import choose_qparams, constant, min_max, quantize, rotate, rows_of

MAX_K_INT8_MM = (2**31 - 1) // (128 * 128)


def int8_mm(q: Tensor, packed_weight: Tensor, weight_sum: Tensor) -> Tensor:
    """The exact accumulators: sum_k q[m, k] * weight[n, k].

    Args:
        q: int8 [M, K], K <= 131,071 (beyond it an int32 could wrap).
        packed_weight, weight_sum: from :func:`pack_weight`.

    Returns:
        int32 [M, N].
    """
    check_int8_mm(q, packed_weight, weight_sum)
    check_packed("int8_mm", packed_weight, weight_sum.shape[0], q.shape[1])
    weight = unpack_weight(packed_weight, weight_sum.shape[0], q.shape[1])
    return _exact_mm(q, weight).to(torch.int32)


def check_int8_mm(q: Tensor, packed_weight: Tensor, weight_sum: Tensor) -> None:
    """The checks of int8_mm without the shape of the packed weight."""
    check_int8_matrix("int8_mm", "q", q, "[M, K]")
    check_channels("int8_mm", "weight_sum", weight_sum, torch.int32, weight_sum.numel())
    k = q.shape[1]
    check(k <= MAX_K_INT8_MM, f"int8_mm: expected K <= {MAX_K_INT8_MM} so that int32 is exact, got {k}")
    check_device("int8_mm", "q", q, "packed_weight", packed_weight)
    check_device("int8_mm", "q", q, "weight_sum", weight_sum)


def _exact_mm(q: Tensor, weight: Tensor) -> Tensor:
    # + 0.0: with K = 1 a product of a negative number and 0 can be -0.0, which no integer equals in its bits.
    return q.to(torch.float64) @ weight.to(torch.float64).t() + 0.0


def check_linear(
    op: str, x: Tensor, packed_weight: Tensor, weight_sum: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    """The checks of every linear op before it reads its tensors."""
    check_operands(op, x, packed_weight, weight_sum, weight_scale, bias)
    check_packed(op, packed_weight, weight_scale.numel(), x.shape[-1])


def check_operands(
    op: str, x: Tensor, packed_weight: Tensor, weight_sum: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    """The checks of :func:`check_linear` without the shape of the packed weight."""
    check_float(op, "x", x)
    n = weight_scale.numel()
    check_channels(op, "weight_scale", weight_scale, torch.float32, n)
    check_channels(op, "weight_sum", weight_sum, torch.int32, n)
    if bias is not None:
        check_bias(op, bias, n)
    for name, tensor in (
        ("packed_weight", packed_weight),
        ("weight_sum", weight_sum),
        ("weight_scale", weight_scale),
        ("bias", bias),
    ):
        if tensor is not None:
            check_device(op, "x", x, name, tensor)


def linear_dynamic(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: int,
) -> Tensor:
    """x @ weight.T + bias in int8, with activation qparams from x itself.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64 (all computed in fp32), any strides.
        packed_weight, weight_sum: from :func:`pack_weight`.
        weight_scale: fp32 [N]. bias: any float dtype [N], or None.
        config: see :mod:`dynquant.config`.

    Returns:
        [..., N] in x's dtype, or the config's out dtype. A row of x with a NaN or an infinity gives NaN
        (per_tensor: any such element makes all of it NaN).
    """
    check_linear("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias)
    cfg = Config.decode(config)
    check_k("linear_dynamic", x.shape[-1], config)
    rows = _rotated_rows("linear_dynamic", x, cfg)
    scale, zero_point = choose_qparams(*min_max(rows, cfg.activations == "per_token"))
    return _linear(x, rows, packed_weight, weight_sum, weight_scale, bias, scale, zero_point, cfg)


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias with a float weight: for each output one chain of fma, from the bias on, in the
    order of k, so that the bits do not depend on the device.

    Args:
        x: fp32 [M, K]. weight: any float dtype [N, K]. bias: any float dtype [N], or None.

    Returns:
        fp32 [M, N]. A row of x with a NaN or an infinity gives NaN.
    """
    columns = weight.to(torch.float32).t()
    start = x.new_zeros(columns.shape[1]) if bias is None else bias.to(torch.float32)
    out = torch.where(x.isfinite().all(1, keepdim=True), start, constant(float("nan"), x))
    for k in range(x.shape[1]):
        out = fma(x[:, k : k + 1], columns[k], out)
    return out


def linear_static(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    config: int,
) -> Tensor:
    """As :func:`linear_dynamic`, with activation qparams from calibration.

    Args:
        scale, zero_point: fp32 and int32 [1], positive and in [-128, 127] (checked for CPU tensors).

    Returns:
        [..., N]; a row of x with a NaN or an infinity gives NaN.
    """
    check_linear("linear_static", x, packed_weight, weight_sum, weight_scale, bias)
    check_qparams("linear_static", x, 1, scale, zero_point)
    if zero_point.device.type == "cpu":
        value = int(zero_point.item())
        check(-128 <= value <= 127, f"linear_static: expected zero_point in [-128, 127], got {value}")
        check(not scale.item() <= 0, f"linear_static: expected scale to be positive, got {scale.item():g}")
    cfg = Config.decode(config)
    check_k("linear_static", x.shape[-1], config)
    rows = _rotated_rows("linear_static", x, cfg)
    finite = rows.isfinite().all(1)
    nan = constant(float("nan"), rows)
    row_scale = torch.where(finite, scale, nan)
    row_zero_point = torch.where(finite, zero_point, torch.zeros_like(zero_point))
    return _linear(x, rows, packed_weight, weight_sum, weight_scale, bias, row_scale, row_zero_point, cfg)


def dequantize(acc: Tensor, weight_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Accumulators as floats: (float(acc) * weight_scale) * scale + bias, the last two rounded as one.

    The weight's scale comes first: float(acc) * scale would overflow for inputs of 1e38 whose outputs are far
    below that.

    Args:
        acc: [M, N] integers of any dtype that holds them exactly, the zero point compensated.
        weight_scale: fp32 [N]. scale: fp32 [M]. bias: any float dtype [N], or None.

    Returns:
        fp32 [M, N].
    """
    product = acc.to(torch.float32) * weight_scale
    if bias is None:
        return product * scale[:, None]
    return fma(product, scale[:, None], bias.to(torch.float32))


def _rotated_rows(op: str, x: Tensor, cfg: Config) -> Tensor:
    rows = rows_of(op, x)
    if not cfg.rotation_block:
        return rows
    check_rotation(op, rows.shape[1], cfg.rotation_block)
    return rotate(rows, cfg.rotation_block, cfg.rotation_signs)


def _linear(
    x: Tensor,
    rows: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    cfg: Config,
) -> Tensor:
    n, k = weight_scale.shape[0], rows.shape[1]
    weight = unpack_weight(packed_weight, n, k)
    q = quantize(rows, scale, zero_point)
    acc = _exact_mm(q, weight) - zero_point[:, None].to(torch.float64) * weight_sum.to(torch.float64)
    out = apply_epilogue(dequantize(acc, weight_scale, scale, bias), cfg.epilogue)
    return out.to(cfg.out_dtype or x.dtype).reshape(*x.shape[:-1], n)
