"""Calls that read the same tensor, in a torch.fx graph, become one call on merged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from ..reference import packed_shape
from .nodes import Call, input_of, kind_of, value_at, views_to_reshape, with_value

_aten = torch.ops.aten
_SLICE = _aten.slice.Tensor

PlaceMerged = Callable[[Sequence["Call"]], "tuple[list[fx.Node], fx.Node | None] | None"]


def parts_of(calls: Sequence[Call]) -> list[list[fx.Node]]:
    """The packed_weight of each call, the weight_sum of each, the weight_scale of each."""
    return [[call.weight[i] for call in calls] for i in range(3)]


def merge_calls(
    module: fx.GraphModule, value_of: Callable[[fx.Node], Tensor | None], place: PlaceMerged
) -> None:
    """Replace calls that read the same tensor by one call and slices of its output.

    Args:
        value_of: the weight of a node, None if it is unknown or must not be merged.
        place: makes the nodes of the merged packed_weight, weight_sum and weight_scale, and of the bias, at
            the insertion point; None if it cannot.
    """
    for group in list(_groups(module, value_of)):
        views = {call: views_to_reshape(module, call.node) for call in group}
        calls = _mergeable([call for call in group if views[call] is not None], value_of)
        if len(calls) < 2:
            continue
        with module.graph.inserting_before(calls[0].node):
            placed = place(calls)
            if placed is None:
                continue
            _replace(module.graph, calls, value_of, *placed)
        for view in (view for call in calls for view in views[call] or ()):
            view.target = "reshape" if view.op == "call_method" else _aten.reshape.default


def _groups(module: fx.GraphModule, value_of: Callable[[fx.Node], Tensor | None]) -> Iterator[list[Call]]:
    """Calls of one scheme that read the same tensor, with no node between them that might write to it."""
    groups: dict[Any, list[Call]] = {}
    for node in module.graph.nodes:
        call = Call.of(node)
        if call is None:
            if kind_of(module, node) == "unknown":
                yield from groups.values()
                groups = {}
            continue
        packed_weight = value_of(call.weight[0])
        nodes = [part for part in (*call.weight, call.bias) if part is not None]
        if packed_weight is None or any(part.op not in ("get_attr", "placeholder") for part in nodes):
            continue
        layout = (packed_weight.device, packed_weight.shape[1:])
        qparams = tuple(_constant(part, value_of) for part in call.arguments[5:-1])
        key = (node.target, call.x, qparams, call.arguments[-1], call.bias is None, layout)
        group = groups.setdefault(key, [])
        if all(call.weight[0].target != other.weight[0].target for other in group):
            group.append(call)
    yield from groups.values()


def _constant(node: fx.Node, value_of: Callable[[fx.Node], Tensor | None]) -> fx.Node | float:
    """A qparam of a static layer: its value if it is a constant, else its node."""
    value = value_of(node) if node.op == "get_attr" else None
    return node if value is None or value.device.type == "meta" else float(value)


def _mergeable(calls: list[Call], value_of: Callable[[fx.Node], Tensor | None]) -> list[Call]:
    """Calls whose panels, end to end, are one wider layer's packed weight: only the last may be padded."""
    weights = {call: weight for call in calls if (weight := value_of(call.weight[0])) is not None}
    channels = {call: scale.shape[0] for call in weights if (scale := value_of(call.weight[2])) is not None}
    full = [call for call in channels if channels[call] == weights[call].shape[:3:2].numel()]
    if calls and weights[calls[0]].dim() == 2:
        full = list(channels)  # rows, not panels
    padded = [call for call in channels if call not in full]
    for candidate in (full + padded[:1], full):
        parts = [weights[call] for call in candidate]
        if len(parts) < 2:
            continue
        _, k, *panel = parts[0].shape
        n = sum(channels[call] for call in candidate)
        expected = packed_shape(parts[0].device, n, 4 * k if panel else k)
        if [sum(part.shape[0] for part in parts), k, *panel] == expected:
            return candidate
    return []


def _replace(
    graph: fx.Graph,
    calls: Sequence[Call],
    value_of: Callable[[fx.Node], Tensor | None],
    weight: Sequence[fx.Node],
    bias: fx.Node | None,
) -> None:
    first = calls[0]
    # x of the node, not of the Call: calls that computed x may have been merged since.
    x = input_of(first.node)
    arguments = (x, *weight, bias, *first.arguments[5:])
    wide = graph.call_function(first.node.target, arguments)  # type: ignore[arg-type]
    channels = [0 if (scale := value_of(call.weight[2])) is None else scale.shape[0] for call in calls]
    ends = list(accumulate(channels))
    out = value_at(first.node)
    if out is not None:
        out = out.new_empty((*out.shape[:-1], ends[-1]))
    wide.meta = with_value(first.node, out)
    for call, start, end in zip(calls, [0, *ends], ends, strict=False):
        part = graph.call_function(_SLICE, (wide, -1, start, end))
        part.meta = with_value(call.node, None if out is None else out.narrow(-1, start, end - start))
        call.node.replace_all_uses_with(part)
    for call in calls:
        graph.erase_node(call.node)


def merge_tensors(parts: Sequence[Tensor]) -> Tensor:
    """Tensors end to end along dimension 0: a view if they are contiguous in memory, else a copy."""
    if are_contiguous(parts):
        size = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return parts[0].as_strided(size, parts[0].stride())
    with torch.no_grad(), torch.inference_mode(False):
        return torch.cat(list(parts))


def are_contiguous(parts: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow each other without a gap in one storage."""
    storage = parts[0].untyped_storage().data_ptr()
    starts = accumulate((part.numel() for part in parts), initial=parts[0].storage_offset())
    return parts[0].device.type != "meta" and all(
        part.untyped_storage().data_ptr() == storage and part.storage_offset() == start
        for part, start in zip(parts, starts, strict=False)
    )
