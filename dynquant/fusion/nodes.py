"""Nodes of a torch.fx graph: calls of the linear ops, effects on memory, fake values, views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..config import Config
from .modules import has_hooks

_ops, _aten = torch.ops.dynquant, torch.ops.aten
LINEAR_OPS = (_ops.linear_dynamic.default, _ops.linear_static.default)

_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
_OPERATORS = {
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lt",
    "le",
    "eq",
    "ne",
    "gt",
    "ge",
    "and_",
    "or_",
    "invert",
}
_PYTHON_VIEWS = {"getattr", "float", "half", "bfloat16", "double", "type", "cpu", "cuda"}
_STRIDES = {"as_strided", "is_contiguous", "stride", "sym_stride", "storage_offset", "sym_storage_offset"}
_STRIDES |= {"view_as", "view_as_complex", "view_as_real", "set_", "data_ptr"}


class Call(NamedTuple):
    """A node of linear_dynamic or linear_static."""

    node: fx.Node
    arguments: tuple[Any, ...]

    @staticmethod
    def of(node: fx.Node) -> Call | None:
        if node.target not in LINEAR_OPS:
            return None
        names = [argument.name for argument in node.target._schema.arguments]
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        return Call(node, tuple(values[name] for name in names))

    @property
    def x(self) -> fx.Node:
        return self.arguments[0]

    @property
    def weight(self) -> tuple[fx.Node, ...]:
        """packed_weight, weight_sum, weight_scale."""
        return self.arguments[1:4]

    @property
    def bias(self) -> fx.Node | None:
        return self.arguments[4]

    @property
    def config(self) -> Config:
        return Config.decode(self.arguments[-1])


def kind_of(module: fx.GraphModule, node: fx.Node) -> str:
    """``"compute"``: returns new memory; ``"view"``: may return memory of its argument; ``"unknown"``: may
    have any other effect, such as to write to a tensor, to switch a mode or to read strides."""
    if node.op in ("placeholder", "get_attr"):
        return "compute"
    if node.op == "call_module":
        return _kind_of_module(module.get_submodule(str(node.target)))
    if node.op == "output" or "out" in node.kwargs or node.kwargs.get("inplace"):
        return "unknown"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2]
        overloads = [target] if target.namespace in ("aten", "prims", "dynquant") else []
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        owner = getattr(target, "__module__", None) or getattr(target, "__objclass__", object).__module__
        if owner == "_operator":
            known = name in _OPERATORS or hasattr(_aten, name)
            return "view" if name == "getitem" else "compute" if known else "unknown"
        if name in _PYTHON_VIEWS and (isinstance(target, str) or target is getattr):
            return "view"
        known = isinstance(target, str) or owner.partition(".")[0] == "torch" or owner == "builtins"
        packet = getattr(_aten, name, None) if known and not name.startswith("__") else None
        overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
        overloads = [overload for overload in overloads if not _writes_to_out(overload)]
        if len(node.args) > 1 and any(argument is True for argument in node.args[1:]):
            overloads = [overload for overload in overloads if owner != "torch.nn.functional"]  # inplace?
    if not overloads or name in _STRIDES or any(overload._schema.is_mutable for overload in overloads):
        return "unknown"
    may_alias = any(value.alias_info for overload in overloads for value in overload._schema.returns)
    return "view" if may_alias or "dropout" in name else "compute"


def _kind_of_module(module: nn.Module) -> str:
    plain = type(module).__module__.startswith("torch.nn.modules.") and not list(module.children())
    if isinstance(module, nn.modules.batchnorm._NormBase) or getattr(module, "inplace", False):
        return "unknown"
    if not plain or has_hooks(module):
        return "unknown"
    return "view" if isinstance(module, _VIEW_MODULES) else "compute"


def _writes_to_out(overload: Any) -> bool:
    return any(argument.is_out for argument in overload._schema.arguments)


def views_to_reshape(module: fx.GraphModule, node: fx.Node) -> list[fx.Node] | None:
    """The calls of ``view``, direct or through other views, which on a slice of a wider output must become
    ``reshape``; None if other nodes need the output to be contiguous or in memory of its own."""
    views = []
    for user in node.users:
        kind = kind_of(module, user)
        if kind == "unknown":
            return None
        if kind == "view":
            if user.target == "view" and any(isinstance(arg, torch.dtype) for arg in user.args):
                return None
            if user.target in ("view", _aten.view.default):
                views.append(user)
            later = views_to_reshape(module, user)
            if later is None:
                return None
            views += later
    return views


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes after ``first`` and before ``last``."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def value_at(node: fx.Node) -> Tensor | None:
    """The fake tensor that tracing left at a node, if any."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, Tensor) else None


def with_value(node: fx.Node, value: Tensor | None) -> dict[str, Any]:
    """The meta of a node with another fake tensor."""
    keys = ("val", "example_value", "tensor_meta")
    meta = {key: item for key, item in node.meta.items() if key not in keys}
    return meta if value is None else meta | {key: value for key in keys[:2] if key in node.meta}


def input_of(node: fx.Node) -> Any:
    """The first argument of a call of a linear op (``x``) or of a QLinear (``input``)."""
    if node.args:
        return node.args[0]
    return node.kwargs["x" if "x" in node.kwargs else "input"]
