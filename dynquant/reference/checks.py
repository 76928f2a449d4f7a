"""Argument checks of the ops. Their sentences, with names and values, are the same on every path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import K_MODULUS, k_modulo_16

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(condition: bool, sentence: str) -> None:
    """Raise RuntimeError, as torch's own ops do, if ``condition`` is false."""
    if not condition:
        raise RuntimeError(sentence)


def check_float(op: str, name: str, x: Tensor) -> None:
    """``x`` is a floating-point tensor with at least 1 dimension."""
    check(
        x.dtype in FLOAT_DTYPES,
        f"{op}: expected {name} of dtype float32, bfloat16, float16 or float64, got {x.dtype}",
    )
    check(x.dim() >= 1, f"{op}: expected {name} with at least 1 dimension, got 0")
    check_memory(op, name, x)


def check_memory(op: str, name: str, values: Tensor) -> None:
    """A tensor has its memory, which ``untyped_storage().resize_(0)`` takes; a read would end the process."""
    if type(values) not in (Tensor, torch.nn.Parameter) or values.device.type not in ("cpu", "cuda"):
        return
    if values.numel() == 0 or torch.compiler.is_compiling():  # dynamo cannot ask the next either
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return
    last = values.storage_offset()
    last += sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    size = values.untyped_storage().nbytes()
    check(
        (last + 1) * values.itemsize <= size,
        f"{op}: expected {name} to have its memory, got a storage of {size} bytes for {list(values.shape)} "
        f"elements of {values.dtype}",
    )


def check_device(op: str, x_name: str, x: Tensor, name: str, other: Tensor) -> None:
    """``other`` and ``x`` are on one device."""
    check(
        other.device == x.device,
        f"{op}: expected all tensors on one device, got {x_name} on {x.device} and {name} on {other.device}",
    )


def check_channels(op: str, name: str, values: Tensor, dtype: torch.dtype, n: int) -> None:
    """``values`` is a contiguous 1-D tensor with one element for each output channel."""
    check(
        values.dtype == dtype and list(values.shape) == [n] and values.is_contiguous(),
        f"{op}: expected {name} to be contiguous {dtype} of shape [{n}], got {values.dtype} of shape "
        f"{list(values.shape)}",
    )
    check_memory(op, name, values)


def check_bias(op: str, bias: Tensor, n: int) -> None:
    """``bias`` is a 1-D float tensor with one element for each output channel, of any stride."""
    check(
        bias.dtype in FLOAT_DTYPES and list(bias.shape) == [n],
        f"{op}: expected bias of dtype float32, bfloat16, float16 or float64 and shape [{n}], got "
        f"{bias.dtype} of shape {list(bias.shape)}",
    )
    check_memory(op, "bias", bias)


def check_finite(op: str, name: str, values: Tensor) -> None:
    """A 1-D or 2-D tensor is finite; the error names its first non-finite element."""
    bad = ~values.isfinite()
    if bad.any():
        index = bad.nonzero()[0].tolist()
        check(
            False, f"{op}: expected {name} to be finite, got {values[tuple(index)].item()} at {name}{index}"
        )


def check_ranges(op: str, lo: Tensor, hi: Tensor) -> None:
    """lo and hi are fp32 of one shape."""
    check(
        lo.dtype == hi.dtype == torch.float32 and lo.shape == hi.shape,
        f"{op}: expected lo and hi of dtype float32 and one shape, got {lo.dtype} of shape "
        f"{list(lo.shape)} and {hi.dtype} of shape {list(hi.shape)}",
    )
    check_device(op, "lo", lo, "hi", hi)
    check_memory(op, "lo", lo)
    check_memory(op, "hi", hi)


def check_weight(op: str, weight: Tensor, rotation_block: int) -> None:
    """A float matrix [N, K], which ``rotation_block`` (0: none) can rotate."""
    check(weight.dim() == 2, f"{op}: expected weight with 2 dimensions [N, K], got {weight.dim()}")
    check_float(op, "weight", weight)
    if rotation_block:
        check_rotation(op, weight.shape[1], rotation_block)


def check_int8_matrix(op: str, name: str, values: Tensor, sizes: str) -> None:
    """int8 with 2 dimensions; ``sizes`` is how the error writes them, as in "[M, K]"."""
    check(
        values.dtype == torch.int8 and values.dim() == 2,
        f"{op}: expected {name} to be int8 with 2 dimensions {sizes}, got {values.dtype} with {values.dim()}",
    )
    check_memory(op, name, values)


def check_qparams(op: str, x: Tensor, m: int, scale: Tensor, zero_point: Tensor) -> None:
    """scale fp32 and zero_point int32, both [1] or both [m], on the device of x."""
    check(
        scale.dtype == torch.float32 and zero_point.dtype == torch.int32,
        f"{op}: expected scale of dtype float32 and zero_point of dtype int32, got "
        f"{scale.dtype} and {zero_point.dtype}",
    )
    check(
        scale.dim() == 1 and scale.shape == zero_point.shape and scale.shape[0] in (1, m),
        f"{op}: expected scale and zero_point of shape [1] or [{m}], got {list(scale.shape)} and "
        f"{list(zero_point.shape)}",
    )
    check_device(op, "x", x, "scale", scale)
    check_device(op, "x", x, "zero_point", zero_point)
    check_memory(op, "scale", scale)
    check_memory(op, "zero_point", zero_point)


def check_rotation(op: str, k: int, block: int) -> None:
    """``block`` can rotate rows of k elements."""
    check(
        1 <= block <= 128 and block & (block - 1) == 0 and k % block == 0,
        f"{op}: expected block to be a power of two up to 128 that divides K ({k}), got {block}",
    )


def check_k(op: str, k: int, config: int) -> None:
    """K of x is the one in ``config``, modulo 16; check_packed_k compares it with the packed weight."""
    expected = k_modulo_16(config)
    torch._check(
        expected is None or k % K_MODULUS == expected,
        lambda: f"{op}: expected x.shape[-1] to be {expected} modulo {K_MODULUS}, as config says, got {k}",
    )
