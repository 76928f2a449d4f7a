"""Where int8 attention runs, and torch's own attention runs in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from .._extension import extension
from ..ops.autograd import sdpa_arguments

FEW_QUERIES = 16
KEYS_IN_CACHE = 64

ATTENTION_CHOICES = (None, "int8")
"""Values of the option ``attention`` of :func:`dynquant.quantize_dynamic` and of graphs."""

STAYS_FLOAT = "_dynquant_float_attention"

Watcher = Callable[[int, tuple[Any, ...]], None]
_watcher: Watcher | None = None


def check_attention_choice(function: str, attention: Any) -> None:
    """Raises:
    ValueError: for a value of the option that there is not.
    """
    if attention not in ATTENTION_CHOICES:
        raise ValueError(f"{function} to be None or 'int8', got {attention!r}")


def keep_attention_float(module: nn.Module) -> None:
    """Have the attention of one EncoderLayer or attention module of transformers stay torch's."""
    vars(module)[STAYS_FLOAT] = True


def is_attention_float(module: nn.Module) -> bool:
    """Whether :func:`keep_attention_float` was called with it."""
    return vars(module).get(STAYS_FLOAT) is True


@contextlib.contextmanager
def watching_attention(watcher: Watcher) -> Iterator[None]:
    """Within the block, ``watcher`` gets the id of the module and the arguments of
    :func:`scaled_dot_product_attention` before each int8 attention of a module."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def report_to_watcher(module_id: int, *arguments: Any) -> None:
    """To be called by modules before int8 attention."""
    if _watcher is not None:
        _watcher(module_id, arguments)


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
    return float_attention(q, k, v, mask, is_causal, scale)


def float_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's attention, with mask and is_causal together and shared heads of k and v."""
    mask, is_causal = sdpa_arguments(q, k, mask, is_causal)
    shared = bool(q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=shared)
