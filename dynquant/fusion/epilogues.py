"""Activation functions in a torch.fx graph become epilogues of the ops before them."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..config import recode
from ..patterns.activations import (
    EPILOGUE_OF_GATE_FACTOR,
    EPILOGUE_OF_TARGET,
    GELU_OF_APPROXIMATE,
    epilogue_of,
)
from .modules import has_hooks
from .nodes import Call, between, kind_of, value_at

_aten = torch.ops.aten

_MUL: set[Any] = {_aten.mul.Tensor, operator.mul, torch.mul, "mul"}
_SIGMOID: set[Any] = {_aten.sigmoid.default, torch.sigmoid, F.sigmoid, "sigmoid"}


def fold_activations(module: fx.GraphModule) -> None:
    """Make activation functions epilogues of the ops before them, where nothing else reads their outputs."""
    graph = module.graph
    for node in list(graph.nodes):
        found = _activation(module, node)
        if found is None:
            continue
        source, epilogue, parts = found
        call = Call.of(source)
        if call is None or call.config.epilogue != "none" or not set(source.users) <= set(parts):
            continue
        # Under autocast an activation may have an output dtype that the epilogue would not have.
        dtypes = {value.dtype for value in map(value_at, (source, node)) if isinstance(value, Tensor)}
        if len(dtypes) > 1 or any(kind_of(module, other) == "unknown" for other in between(source, node)):
            continue
        source.args = (*call.arguments[:-1], recode(call.arguments[-1], epilogue=epilogue))
        source.kwargs = {}
        node.replace_all_uses_with(source)
        for part in reversed(parts):
            graph.erase_node(part)


def _activation(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, str, list[fx.Node]] | None:
    """The input of an activation, its epilogue, and its nodes, of which ``node`` is the last."""
    if node.op == "call_module":
        activation = module.get_submodule(str(node.target))
        epilogue = None if has_hooks(activation) else epilogue_of(activation)
    else:
        gated = _gated_by_itself(node)
        if gated is not None:
            return gated
        is_call = node.op in ("call_function", "call_method")
        epilogue = EPILOGUE_OF_TARGET.get(node.target) if is_call else None
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if epilogue is None or not isinstance(source, fx.Node):
        return None
    if epilogue == "gelu" and node.op != "call_module":
        approximate = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
        epilogue = GELU_OF_APPROXIMATE.get(str(approximate))
    return None if epilogue is None else (source, epilogue, [node])


def _gated_by_itself(node: fx.Node) -> tuple[fx.Node, str, list[fx.Node]] | None:
    """y, the epilogue and the nodes of y * sigmoid(factor * y), the form in which silu is exported."""
    if node.target not in _MUL or len(node.args) != 2:
        return None
    for y, gate in (node.args, node.args[::-1]):
        if not isinstance(y, fx.Node) or not _is_only_for(gate, node) or gate.target not in _SIGMOID:
            continue
        inner = gate.args[0]
        if inner is y:
            return y, EPILOGUE_OF_GATE_FACTOR[1.0], [gate, node]
        if not _is_only_for(inner, gate) or inner.target not in _MUL or y not in inner.args:
            continue
        factor = inner.args[1 - inner.args.index(y)]
        if isinstance(factor, float) and factor in EPILOGUE_OF_GATE_FACTOR:
            return y, EPILOGUE_OF_GATE_FACTOR[factor], [inner, gate, node]
    return None


def _is_only_for(value: Any, user: fx.Node) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and set(value.users) == {user}
