"""The layouts of packed weights: panels of channels on the CPU, padded rows elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check, check_int8_matrix, check_memory

PANELS = (64, 32, 16)
ROW_ALIGNMENT = 16


def panel_width(n: int) -> int:
    """Output channels P of a panel: the widest of 64, 32, 16 that pads N by fewer than 16 rows."""
    return next((p for p in PANELS if -n % p < 16), PANELS[-1])


def packs_in_panels(device: torch.device) -> bool:
    """Whether packed weights on ``device`` are panels of channels; elsewhere they are padded rows."""
    return device.type == "cpu"


def packed_shape(device: torch.device, n: int, k: int) -> list[int]:
    """Shape of the packed weight of an [n, k] weight on ``device``."""
    if not packs_in_panels(device):
        return [n, -(-k // ROW_ALIGNMENT) * ROW_ALIGNMENT]
    p = panel_width(n)
    return [-(-n // p), -(-k // 4), p, 4]


def pack_weight(weight: Tensor, full_range: bool = False) -> tuple[Tensor, Tensor]:
    """The layout that the kernels read, and the sum of each row.

    Args:
        weight: int8 [N, K], in [-127, 127].
        full_range: whether it may hold -128. Ops that multiply by it are then given a config that says so.

    Returns:
        packed_weight int8, on the CPU [ceil(N/P), ceil(K/4), P, 4] with P = :func:`panel_width`, elsewhere
        [N, 16 * ceil(K/16)], so that every row starts at a multiple of 16 bytes; zeros for padding.
        weight_sum int32 [N].
    """
    check_int8_matrix("pack_weight", "weight", weight, "[N, K]")
    if not full_range and weight.device.type != "meta" and weight.numel() and int(weight.min()) == -128:
        place = (weight == -128).nonzero()[0].tolist()
        raise RuntimeError(f"pack_weight: expected weight in [-127, 127], got -128 at weight{place}")
    weight_sum = weight.sum(1, dtype=torch.int32)
    n, k = weight.shape
    if not packs_in_panels(weight.device):
        rows = weight.new_zeros(packed_shape(weight.device, n, k))
        rows[:, :k] = weight
        return rows, weight_sum
    p = panel_width(n)
    padded = torch.nn.functional.pad(weight, (0, -k % 4, 0, -n % p))
    panels = padded.reshape(padded.shape[0] // p, p, padded.shape[1] // 4, 4)
    return panels.permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format), weight_sum


def unpack_weight(packed_weight: Tensor, n: int, k: int) -> Tensor:
    """The int8 [n, k] weight that :func:`pack_weight` packed."""
    check_packed("unpack_weight", packed_weight, n, k)
    if packed_weight.dim() == 2:
        return packed_weight[:, :k].clone(memory_format=torch.contiguous_format)
    panels, groups, p, _ = packed_weight.shape
    rows = packed_weight.permute(0, 2, 1, 3).reshape(panels * p, groups * 4)
    return rows[:n, :k].clone(memory_format=torch.contiguous_format)


def check_packed(op: str, packed_weight: Tensor, n: int, k: int) -> None:
    """int8, contiguous, and of the shape that [n, k] packs to."""
    shape = packed_shape(packed_weight.device, n, k)
    check(
        packed_weight.dtype == torch.int8
        and packed_weight.is_contiguous()
        and list(packed_weight.shape) == shape,
        f"{op}: expected packed_weight to be contiguous int8 of shape {shape} for N = {n} and K = {k}, got "
        f"{packed_weight.dtype} of shape {list(packed_weight.shape)}",
    )
    check_memory(op, "packed_weight", packed_weight)


def check_packed_k(op: str, name: str, k: int, packed_weight: Tensor, n: int) -> None:
    """The packed weight has n channels and k inputs, up to padding, in either layout: on meta a layer keeps
    the layout of its device. Together with :func:`check_k` this fixes K.
    """
    p, panels = panel_width(n), packed_weight.dim() == 4
    shape = list(packed_weight.shape)
    channels = [-(-n // p), shape[1], p, 4] if panels else [n, *shape[1:2]]
    check(
        packed_weight.dtype == torch.int8
        and packed_weight.is_contiguous()
        and len(shape) in (2, 4)
        and shape == channels,
        f"{op}: expected packed_weight to be contiguous int8 as pack_weight makes it for N = {n}, got "
        f"{packed_weight.dtype} of shape {shape}",
    )
    unit = 4 if panels else ROW_ALIGNMENT
    packed = shape[1] * (unit if panels else 1)
    torch._check(
        -(-k // unit) * unit == packed,
        lambda: f"{op}: expected {name} to fit packed_weight of shape {shape}, got {k}",
    )
