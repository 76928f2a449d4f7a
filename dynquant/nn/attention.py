"""Where int8 attention runs, and torch's own attention runs in its place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from .._extension import extension
from ..ops.autograd import sdpa_arguments

FEW_QUERIES = 16
KEYS_IN_CACHE = 64


def has_int8_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`scaled_dot_product_attention` computes these operands in int8.

    Not on devices without the kernel (all but the CPU with the extension); not for fewer than 16 queries with
    more than 64 keys, since a call that quantizes a whole cache for a few tokens takes longer than the float
    products; not where q and v differ in head size, which the op does not have.
    """
    if extension is None or q.device.type != "cpu" or q.dim() != 4:
        return False
    if q.shape[-1] != v.shape[-1] or not (q.dtype == k.dtype == v.dtype):
        return False
    return q.shape[2] >= FEW_QUERIES or k.shape[2] <= KEYS_IN_CACHE


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention in int8 where :func:`has_int8_attention` says so, else torch's.

    Args:
        q, k, v, mask, is_causal, scale: see :func:`dynquant.reference.attention`; without int8, mask and
            is_causal apply together as there.

    Returns:
        [B, H, S_q, D] of q's dtype.
    """
    if has_int8_attention(q, k, v):
        return torch.ops.dynquant.attention(q, k, v, mask, is_causal, scale)
    mask, is_causal = sdpa_arguments(q, k, mask, is_causal)
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=shared)
