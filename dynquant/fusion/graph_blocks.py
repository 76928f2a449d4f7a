"""Layers with residual and norm, and whole MLPs, in a torch.fx graph become one op each.

Works upwards in size: a layer, the sum with a residual and a norm become linear_norm; the layer before it
joins as mlp; the linear_norm before that, whose rows are input and residual of the MLP, as linear_mlp. Values
between the parts must have no other reader. The ops have no derivatives, so this is for graphs that run
without gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..config import NORMS
from .nodes import Call, value_at

_ops, _aten = torch.ops.dynquant, torch.ops.aten
_LAYER_NORM, _RMS_NORM = NORMS.index("layer_norm"), NORMS.index("rms_norm")
_ADDITIONS = (operator.add, operator.iadd, torch.add, _aten.add.Tensor, "add")
_DROPOUTS = (F.dropout, torch.dropout, _aten.dropout.default)


class _Norm(NamedTuple):
    """A norm over the last dimension."""

    x: fx.Node
    parameters: list[fx.Node | None]
    eps: float
    kind: int


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
    norm = _norm_of(node)
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


def _mlp(node: fx.Node) -> Match | None:
    """linear_norm(up(x)); or down(up(norm(x))) + x, pre-norm."""
    if node.target is _ops.linear_norm.default:
        args: tuple[Any, ...] = node.args
        x, down, config, residual, _, norm_out, eps, norm = args
        up = _only_reader(x, node)
        if up is None or not _alike(node, up.x):
            return None
        configs = [0, up.arguments[-1], config]
        parts: tuple[Any, ...] = (up.x, [], _operands(up), down, configs, residual, [], norm_out)
        return _ops.mlp.default, (*parts, eps, norm), node
    if node.target not in _ADDITIONS or len(node.all_input_nodes) != 2:
        return None
    layer, residual = _layer_and_residual(node)
    up = None if layer is None else _only_reader(layer.x, layer.node)
    norm = None if up is None else _norm_of(up.x)
    if layer is None or up is None or norm is None or residual is not norm.x or len(up.x.users) != 1:
        return None
    if not _alike(node, layer.node, residual) or not _same_width(node, residual):
        return None
    configs = [0, up.arguments[-1], layer.arguments[-1]]
    arguments: tuple[Any, ...] = (
        norm.x,
        [],
        _operands(up),
        _operands(layer),
        configs,
        residual,
        norm.parameters,
        [],
    )
    return _ops.mlp.default, (*arguments, norm.eps, norm.kind), node


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


def _norm_of(node: Any) -> _Norm | None:
    """A LayerNorm or RMSNorm over rows."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target in (F.layer_norm, torch.layer_norm, _aten.layer_norm.default):
        kind, names = _LAYER_NORM, ["input", "normalized_shape", "weight", "bias", "eps"]
    elif node.target in (F.rms_norm, torch.rms_norm, _aten.rms_norm.default):
        kind, names = _RMS_NORM, ["input", "normalized_shape", "weight", "eps"]
    else:
        return None
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, eps = given["input"], given.get("eps", 1e-5 if kind == _LAYER_NORM else None)
    if len(given["normalized_shape"]) != 1 or not isinstance(eps, float) or not isinstance(x, fx.Node):
        return None
    return _Norm(x, [given.get("weight"), given.get("bias")], eps, kind)


def _layer_and_residual(node: fx.Node) -> tuple[Call | None, fx.Node | None]:
    """The layer whose output a node is, alone or in a sum; and the other summand."""
    if node.op != "call_function" and node.op != "call_method":
        return None, None
    if node.target not in _ADDITIONS:
        return _fusible(_without_dropout(node, None)), None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None, None
    for one, other in (node.args, node.args[::-1]):
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


def _only_reader(x: Any, reader: fx.Node) -> Call | None:
    """The layer whose output ``x`` is, which ``reader`` alone reads."""
    return _fusible(_without_dropout(x, reader))


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
