"""Dynamic int8 attention: softmax(q @ k.T * scale + mask) @ v with both products in int8.

Keys go in blocks of 64, which are part of the arithmetic: each block has a maximum and a v scale for each
channel of its own, so that one peak among the scores, or one large value, leaves the precision of other
blocks alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import fma
from .checks import check, check_device, check_float, check_memory
from .quantization import FLT_MIN, constant
from .softmax import exp2, probabilities

BLOCK = 64
LOG2_E = 1.44269502
MASKED = -(2.0**126)
"""An additive mask of this value or less takes a key out: transformers writes ``torch.finfo(dtype).min``."""

MAX_HEAD_SIZE = (2**31 - 1) // (255 * 127)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, as ``F.scaled_dot_product_attention``, with int8 products.

    Rows of q and k are symmetric int8 with a scale for each row, v with a scale for each channel and block of
    64 keys; probabilities are 8-bit unsigned, relative to the maximum of their block. Contributions of blocks
    are added in fp32, in order.

    Args:
        q: [B, H, S_q, D], fp32, bf16, fp16 or fp64, of any strides.
        k, v: [B, H_kv, S_kv, D] of q's dtype; H_kv divides H, and H / H_kv adjacent heads of q share one.
        mask: broadcasts to [B, H, S_q, S_kv]. Bool: true where the key takes part. Float: added to the
            scores; values of -2^126 and less take the key out.
        is_causal: query i sees the keys j <= i alone (of those that the mask leaves).
        scale: of the products, 1 / sqrt(D) if None.

    Returns:
        [B, H, S_q, D] of q's dtype, dense as [B, S_q, H, D]: ``out.transpose(1, 2).flatten(2)`` is a view.
        Zeros for a query without keys. NaN for a query that is not finite or sees a key, a mask or a score
        that is NaN or +inf; NaN in channel d for queries that see a block of keys with a v[..., d] that is
        not finite.

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not fit together, and a scale that is not finite.
    """
    check_attention(q, k, v, mask, scale)
    batch, heads, s_q, head_size = q.shape
    s_kv = k.shape[2]
    shared = heads // max(k.shape[1], 1)
    k_rows = k.to(torch.float32).repeat_interleave(shared, 1)
    v_rows = v.to(torch.float32).repeat_interleave(shared, 1)
    q_int, q_scale = _quantize(q.to(torch.float32), -1)
    k_int, k_scale = _quantize(k_rows, -1)
    q_factor = q_scale * (constant(attention_scale(head_size, scale), q_scale) * constant(LOG2_E, q_scale))
    taken, bias = _mask_terms(mask, is_causal, (batch, heads, s_q, s_kv), q.device)

    blocks = []
    for begin in range(0, s_kv, BLOCK):
        keys = slice(begin, begin + BLOCK)
        products = (q_int @ k_int[:, :, keys].transpose(2, 3)).to(torch.float32)
        scores = products * k_scale[:, :, keys].transpose(2, 3)
        scores = scores * q_factor if bias is None else fma(scores, q_factor, bias[..., keys])
        scores = torch.where(taken[..., keys], scores, -math.inf)
        blocks.append(_attend(scores, *_quantize(v_rows[:, :, keys], -2)))
    out = _combine(blocks) if blocks else q.new_zeros(q.shape, dtype=torch.float32)
    return out.transpose(1, 2).contiguous().to(q.dtype).transpose(1, 2)


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 along ``dim``, as fp64 integers, and the scale: NaN and zeros for what is not finite."""
    largest = x.abs().amax(dim, keepdim=True) if x.shape[dim] else x.abs().sum(dim, keepdim=True)
    scale = torch.where(
        largest.isfinite(), (largest / constant(127.0, x)).clamp(min=FLT_MIN), constant(math.nan, x)
    )
    steps = (x * (constant(1.0, x) / scale)).round()
    return torch.where(scale.isnan(), 0.0, steps).to(torch.float64), scale


def _mask_terms(
    mask: Tensor | None, is_causal: bool, shape: tuple[int, int, int, int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which keys take part, bool, and what is added to their scores in units of log2, both of ``shape``."""
    taken = torch.ones(shape[2:], dtype=torch.bool, device=device)
    if is_causal:
        taken = taken.tril()
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        taken = taken & mask
    elif mask is not None:
        added = mask.to(torch.float32)
        taken = taken & ~(added <= MASKED)
        bias = (added * constant(LOG2_E, added)).expand(shape)
    return taken.expand(shape), bias


def _attend(scores: Tensor, v: Tensor, v_scale: Tensor) -> tuple[Tensor, ...]:
    """Maximum, sum of probabilities, product with v and v's scale for one block of keys."""
    maximum = scores.amax(-1, keepdim=True)
    maximum = torch.where(maximum == math.inf, math.nan, maximum)
    probability = probabilities(scores - torch.where(maximum == -math.inf, 0.0, maximum))
    counted = probability.nan_to_num(0.0).to(torch.float64)
    total = counted.sum(-1, keepdim=True).to(torch.float32)
    return maximum, total, (counted @ v).to(torch.float32), v_scale


def _combine(blocks: list[tuple[Tensor, ...]]) -> Tensor:
    """The weighted sum of the blocks in order, divided by that of their probabilities."""
    maximum = torch.stack([block[0] for block in blocks]).amax(0)
    numerator = torch.zeros_like(blocks[0][2])
    denominator = torch.zeros_like(maximum)
    for block_maximum, total, product, v_scale in blocks:
        weight = exp2(block_maximum - maximum)
        seen = block_maximum != -math.inf
        numerator = torch.where(seen, fma(weight * v_scale, product, numerator), numerator)
        denominator = torch.where(seen, fma(weight, total, denominator), denominator)
    return torch.where(maximum == -math.inf, 0.0, numerator / denominator)


def attention_scale(head_size: int, scale: float | None) -> float:
    """The factor of the products."""
    return 1.0 / math.sqrt(max(head_size, 1)) if scale is None else scale


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> None:
    """The checks of the op before it reads its tensors."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float("attention", name, x)
        check(
            x.dim() == 4,
            f"attention: expected {name} with 4 dimensions [B, H, S, D], got {x.dim()}",
        )
        check_device("attention", "q", q, name, x)
    check(
        q.dtype == k.dtype == v.dtype,
        f"attention: expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}",
    )
    check(
        k.shape == v.shape,
        f"attention: expected k and v of one shape, got {list(k.shape)} and {list(v.shape)}",
    )
    for place, what in ((0, "batch size"), (3, "head size")):
        check(
            q.shape[place] == k.shape[place],
            f"attention: expected k and v of q's {what} ({q.shape[place]}), got {k.shape[place]}",
        )
    heads, shared = q.shape[1], k.shape[1]
    check(
        heads == 0 or (shared > 0 and heads % shared == 0),
        f"attention: expected the heads of k and v to divide those of q ({heads}), got {shared}",
    )
    check(
        q.shape[3] <= MAX_HEAD_SIZE,
        f"attention: expected a head size up to {MAX_HEAD_SIZE}, so that int32 is exact, got {q.shape[3]}",
    )
    check(scale is None or math.isfinite(scale), f"attention: expected scale to be finite, got {scale}")
    if mask is not None:
        _check_mask(mask, q, [*q.shape[:3], k.shape[2]])


def _check_mask(mask: Tensor, q: Tensor, shape: list[int]) -> None:
    check(
        mask.dtype == torch.bool or mask.dtype.is_floating_point,
        f"attention: expected mask of dtype bool or a float dtype, got {mask.dtype}",
    )
    check_device("attention", "q", q, "mask", mask)
    sizes = list(mask.shape)
    check(
        len(sizes) <= 4 and all(m in (1, s) for m, s in zip(reversed(sizes), reversed(shape), strict=False)),
        f"attention: expected mask to broadcast to [B, H, S_q, S_kv] = {shape}, got {sizes}",
    )
    check_memory("attention", "mask", mask)
