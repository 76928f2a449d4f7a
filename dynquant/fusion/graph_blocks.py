"""Layers with residual and norm, and whole MLPs, in a torch.fx graph become one op each.

Works upwards in size: a layer, the sum with a residual and a norm become linear_norm; the layer before it, or
the product of two layers of which one is a gate, joins as mlp; the linear_norm before that, whose rows are
input and residual of the MLP, as linear_mlp. Values between the parts must have no other reader. The ops have
no derivatives, so this is for graphs that run without gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .graph_norms import norm_of
from .nodes import Call, value_at

_ops, _aten = torch.ops.dynquant, torch.ops.aten
_ADDITIONS = (operator.add, operator.iadd, torch.add, _aten.add.Tensor, "add")
_MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul, _aten.mul.Tensor, "mul")
_DROPOUTS = (F.dropout, torch.dropout, _aten.dropout.default)


def fuse_blocks(module: fx.GraphModule) -> int:
    """Fuse a graph whose nodes have fake values, in place; returns how many nodes of ops it made."""
    count = 0
    for match in (_linear_norm, _mlp, _linear_mlp):
        for node in list(module.graph.nodes):
            found = match(node) if node.users else None
            if found is None:
                continue
            op, arguments, last = found
            with module.graph.inserting_before(last):
                new = module.graph.call_function(op, arguments)
            new.meta = dict(last.meta)
            last.replace_all_uses_with(new)
            count += 1
            _erase(module, last)
    return count


def _erase(module: fx.GraphModule, node: fx.Node) -> None:
    """Remove a node that nothing reads, and what only it has read."""
    if node.users or node.op not in ("call_function", "call_method"):
        return
    inputs = node.all_input_nodes
    module.graph.erase_node(node)
    for value in inputs:
        _erase(module, value)


Match = tuple[Callable[..., Any], tuple[Any, ...], fx.Node]


def _linear_norm(node: fx.Node) -> Match | None:
    """norm(layer(x) + residual), without or with the residual."""
    norm = norm_of(node)
    if norm is None or len(norm.x.users) != 1:
        return None
    layer, residual = _layer_and_residual(norm.x)
    if layer is None or not _alike(node, layer.node, residual) or not _same_width(node, residual):
        return None
    arguments: tuple[Any, ...] = (
        layer.x,
        _operands(layer),
        layer.arguments[-1],
        residual,
        [],
        norm.parameters,
    )
    return _ops.linear_norm.default, (*arguments, norm.eps, norm.kind), node


class _FirstHalf(NamedTuple):
    """What an MLP computes of its input x before its last layer."""

    x: Any
    gate: Call | None
    up: Call

    @property
    def nodes(self) -> set[fx.Node]:
        return {call.node for call in (self.gate, self.up) if call is not None}

    @property
    def operands(self) -> tuple[list[fx.Node | None], list[fx.Node | None]]:
        return [] if self.gate is None else _operands(self.gate), _operands(self.up)

    @property
    def configs(self) -> list[Any]:
        return [0 if self.gate is None else self.gate.arguments[-1], self.up.arguments[-1]]


def _mlp(node: fx.Node) -> Match | None:
    """linear_norm(h); or down(h) + x, pre-norm; with a gate also down(h) + any residual, or down(h) alone.
    h is up(n) or gate(n) * up(n)."""
    if node.target is _ops.linear_norm.default:
        args: tuple[Any, ...] = node.args
        h, down, config, residual, norm_in, norm_out, eps, norm = args
        half = None if norm_in else _first_half(h, node)
        if half is None or not _alike(node, half.x):
            return None
        parts: tuple[Any, ...] = (half.x, *half.operands, down, [*half.configs, config], residual)
        return _ops.mlp.default, (*parts, [], norm_out, eps, norm), node
    layer, residual = _layer_and_residual(node)
    half = None if layer is None else _first_half(layer.x, layer.node)
    if layer is None or half is None:
        return None
    if not _alike(node, layer.node, half.x, residual) or not _same_width(node, residual):
        return None
    norm_before = norm_of(half.x) if isinstance(half.x, fx.Node) else None
    if norm_before is not None and (set(half.x.users) != half.nodes or not _alike(node, norm_before.x)):
        norm_before = None
    is_pre_norm = norm_before is not None and residual is norm_before.x
    if half.gate is None and not is_pre_norm:
        return None
    if residual is None and _joins_a_sum(layer.node, node):
        return None
    parts = (*half.operands, _operands(layer), [*half.configs, layer.arguments[-1]], residual)
    if norm_before is None:
        return _ops.mlp.default, (half.x, *parts, [], [], 0.0, 0), node
    return (
        _ops.mlp.default,
        (norm_before.x, *parts, norm_before.parameters, [], norm_before.eps, norm_before.kind),
        node,
    )


def _joins_a_sum(layer: fx.Node, node: fx.Node) -> bool:
    """Whether a sum with a residual alone reads a layer's output, after dropouts, the last of them ``node``:
    the op then takes it in."""
    readers = set(node.users)
    while len(readers) == 1 and next(iter(readers)).target in _DROPOUTS:
        readers = set(next(iter(readers)).users)
    if len(readers) != 1:
        return False
    (reader,) = readers
    call, residual = _layer_and_residual(reader)
    if call is None or call.node is not layer or residual is None:
        return False
    return _alike(reader, layer, residual) and _same_width(reader, residual)


def _first_half(h: Any, reader: fx.Node) -> _FirstHalf | None:
    """Of an MLP whose last layer reads ``h``."""
    h = _without_dropout(h, reader)
    up = _fusible(h)
    if up is not None:
        return _FirstHalf(up.x, None, up)
    if not isinstance(h, fx.Node) or h.target not in _MULTIPLICATIONS or len(h.args) != 2 or h.kwargs:
        return None
    calls = [_fusible(factor) if _is_read_by(factor, h) else None for factor in h.args]
    gate, up = calls
    if gate is None or up is None or gate.x is not up.x or gate.node is up.node:
        return None
    if gate.config.epilogue == "none":
        gate, up = up, gate
    a, b = gate.config, up.config
    if (a.rotation_block, a.rotation_signs) != (b.rotation_block, b.rotation_signs):
        return None
    same = _alike(h, gate.node, up.node) and _same_width(gate.node, up.node)
    return _FirstHalf(gate.x, gate, up) if same else None


def _is_read_by(node: Any, reader: fx.Node) -> bool:
    """Whether ``reader`` alone reads a node."""
    return isinstance(node, fx.Node) and set(node.users) == {reader}


def _linear_mlp(node: fx.Node) -> Match | None:
    """mlp(h) with the residual h = linear_norm(x), post-norm."""
    if node.target is not _ops.mlp.default:
        return None
    args: tuple[Any, ...] = node.args
    h, gate, up, down, configs, residual, norm_in, norm_out, eps, norm = args
    if h is not residual or norm_in or not isinstance(h, fx.Node) or set(h.users) != {node}:
        return None
    if h.target is not _ops.linear_norm.default or list(h.args[6:]) != [eps, norm]:
        return None
    x, layer, config, first_residual, first_norm_in, first_norm = h.args[:6]
    if first_residual is None or first_norm_in:
        return None
    layers = (x, layer, gate, up, down, [config, *configs])
    arguments = (*layers, first_residual, first_norm, norm_out, eps, norm, False)
    return _ops.linear_mlp.default, arguments, node


def _layer_and_residual(node: fx.Node) -> tuple[Call | None, fx.Node | None]:
    """The layer whose output a node is, alone or in a sum; and the other summand."""
    if node.op != "call_function" and node.op != "call_method":
        return None, None
    if node.target not in _ADDITIONS:
        return _fusible(_without_dropout(node, None)), None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None, None
    # An in-place sum writes to its first argument: that of a layer alone has no other reader.
    orders = (node.args,) if node.target is operator.iadd else (node.args, node.args[::-1])
    for one, other in orders:
        layer = _fusible(_without_dropout(one, node))
        if layer is not None and one is not other:
            return layer, other  # type: ignore[return-value]
    return None, None


def _without_dropout(node: Any, reader: fx.Node | None) -> Any:
    """The input of a dropout that does nothing; None if a value on the way has another reader."""
    while isinstance(node, fx.Node):
        if reader is not None and set(node.users) != {reader}:
            return None
        if node.target not in _DROPOUTS:
            return node
        given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        if given.get("training", True) and given.get("p", 0.5) != 0.0:
            return None
        node, reader = given.get("input"), node
    return None


def _fusible(node: Any) -> Call | None:
    """A call of linear_dynamic that the ops can take in."""
    call = Call.of(node) if isinstance(node, fx.Node) else None
    if call is None or node.target is not _ops.linear_dynamic.default:
        return None
    config = call.config
    return call if config.activations == "per_token" and config.out_dtype is None else None


def _operands(call: Call) -> list[fx.Node | None]:
    return [*call.weight, call.bias]


def _alike(node: fx.Node, *others: fx.Node | None) -> bool:
    """Whether values are known, on the CPU, fp32, and have the leading sizes of the node."""
    values = [value_at(other) for other in (node, *others) if other is not None]
    if any(value is None for value in values):
        return False
    known: list[Tensor] = [value for value in values if value is not None]
    first = known[0]
    return all(
        value.dtype == torch.float32
        and value.device.type == "cpu"
        and value.dim() == first.dim()
        and all(a is b or a == b for a, b in zip(value.shape[:-1], first.shape[:-1], strict=True))
        for value in known
    )


def _same_width(node: fx.Node, residual: fx.Node | None) -> bool:
    """Whether a residual, if there is one, is not broadcast along the rows."""
    if residual is None:
        return True
    value, other = value_at(node), value_at(residual)
    return value is not None and other is not None and value.shape[-1] == other.shape[-1]
