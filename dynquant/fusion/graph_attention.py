"""scaled_dot_product_attention in a torch.fx graph becomes int8 attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..nn.attention import FEW_QUERIES, KEYS_IN_CACHE, scaled_dot_product_attention
from .nodes import value_at

_aten = torch.ops.aten
_TARGETS = (F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def quantize_attention(module: fx.GraphModule) -> int:
    """Replace the attention of a graph, in place: that without dropout whose shapes the op takes.

    Where tracing left no shapes, the call decides by its operands, see
    :func:`dynquant.nn.attention.has_int8_attention`.

    Returns:
        How many calls were replaced.
    """
    count = 0
    for node in list(module.graph.nodes):
        arguments = _arguments(node)
        if arguments is None:
            continue
        with module.graph.inserting_before(node):
            new = module.graph.call_function(_function_for(arguments), arguments)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        count += 1
    return count


def _arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """q, k, v, mask, is_causal and scale of a call that int8 attention can stand for."""
    if node.op != "call_function" or node.target not in _TARGETS:
        return None
    given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p", 0.0) != 0.0 or not set(given) <= set(_NAMES):
        return None
    operands = [given.get(name) for name in _NAMES[:3]]
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    arguments = (*operands, given.get("attn_mask"), given.get("is_causal", False), given.get("scale"))
    return arguments if _fits(arguments) else None


def _fits(arguments: tuple[Any, ...]) -> bool:
    """Whether the shapes, where they are known, are those that run in int8."""
    values = [value_at(operand) for operand in arguments[:3]]
    if any(value is None for value in values):
        return True
    q, k, v = values
    assert q is not None
    assert k is not None
    assert v is not None
    if not q.dim() == k.dim() == v.dim() == 4 or not q.dtype == k.dtype == v.dtype:
        return False
    if q.device.type != "cpu" or q.shape[3] != v.shape[3] or q.shape[0] != k.shape[0]:
        return False
    queries, keys = q.shape[2], k.shape[2]
    known = isinstance(queries, int) and isinstance(keys, int)
    return not known or queries >= FEW_QUERIES or keys <= KEYS_IN_CACHE


def _function_for(arguments: tuple[Any, ...]) -> Any:
    known = all(value_at(operand) is not None for operand in arguments[:3])
    return torch.ops.dynquant.attention.default if known else scaled_dot_product_attention
