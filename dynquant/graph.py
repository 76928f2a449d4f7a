"""fuse_graph: the fusions of :func:`dynquant.fuse`, found in a torch.fx graph instead of by module types.

A graph shows every use of every value, so nothing has to be known of the modules: an activation function
moves into the op before it where nothing else reads that op's output, and ops that read the same tensor
become one wider op, whose weights are joined beforehand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .config import Config, recode
from .fuse import has_hooks
from .nn.linear import QLinear
from .patterns.activations import EPILOGUE_OF_TARGET, GELU_OF_APPROXIMATE, epilogue_of
from .reference import packed_shape

_ops, _aten = torch.ops.dynquant, torch.ops.aten
_LINEAR = (_ops.linear_dynamic.default, _ops.linear_static.default)
_SLICE = _aten.slice.Tensor


def fuse_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Fuse the int8 layers of a traced or exported module, in place, for inference.

    - QLinear modules that the graph calls become ops on constants of ``module``.
    - relu, gelu (both forms) and silu after ``linear_dynamic`` or ``linear_static``, as function, method,
      module or ATen op, become its epilogue, where nothing else reads the op's output.
    - Ops of one config that read the same tensor become one op, where their weights are constants that fill
      whole panels side by side, and nothing depends on how their outputs lie in memory. Each weight is still
      held once.

    Joined ops give the same bits, and so does relu. gelu and silu are those of
    :mod:`dynquant.reference.epilogue` then, within 2^-22 of the exact function. An epilogue is computed in
    fp32 before the one cast to the output's dtype: for bf16 and fp16 that is closer to exact than an
    activation of the rounded output. Gradients go on reaching the input and biases that require them; biases
    that do not are joined to a constant.

    What changes a weight, dtype or device comes before: the weights are constants in the result.

    Args:
        module: of ``torch.fx.symbolic_trace``, with QLinear traced through or left as a module, or of
            ``torch.export.export(...).module()``, before or after ``run_decompositions()``.

    Returns:
        ``module``.

    Raises:
        TypeError: for anything but a torch.fx.GraphModule.
    """
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"fuse_graph: expected a torch.fx.GraphModule, got {type(module).__name__}")
    _modules_to_ops(module)
    fold_activations(module)
    constants_before = [node for node in module.graph.nodes if node.op == "get_attr" and node.users]
    joined: dict[tuple[str, ...], list[str]] = {}

    def constants(calls: Sequence[Call]) -> tuple[list[fx.Node], fx.Node | None] | None:
        key = tuple(str(part.target) for call in calls for part in (*call.weight, call.bias) if part)
        if key not in joined:
            tensors = [join([_attribute(module, part) for part in parts]) for parts in parts_of(calls)]
            own = [_attribute(module, call.bias) for call in calls if call.bias is not None]
            names = ["packed_weight", "weight_sum", "weight_scale"]
            if own and not any(bias.requires_grad for bias in own):
                tensors.append(join(own))
                names.append("bias")
            holder = next(name for i in count() if not hasattr(module, name := f"shared_input_{i}"))
            module.add_submodule(holder, _holder(dict(zip(names, tensors, strict=True))))
            joined[key] = [f"{holder}.{name}" for name in names]
        nodes = [module.graph.get_attr(name) for name in joined[key]]
        if len(nodes) == 4:
            return nodes[:3], nodes[3]
        biases = [module.graph.get_attr(str(call.bias.target)) for call in calls if call.bias is not None]
        return nodes, module.graph.call_function(torch.cat, (biases,)) if biases else None

    def value_of(node: fx.Node) -> Tensor | None:
        return _attribute(module, node) if node.op == "get_attr" else None

    join_calls(module, value_of, constants)
    for node in constants_before:
        if not node.users:
            module.graph.erase_node(node)
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for target in {str(node.target) for node in constants_before} - used:
        _delete(module, target)
    module.graph.lint()
    module.recompile()
    return module


# ---- activations


def fold_activations(module: fx.GraphModule) -> None:
    """Activation functions into the op before them, where nothing else reads that op's output."""
    graph = module.graph
    for node in list(graph.nodes):
        found = _activation(module, node)
        if found is None:
            continue
        source, epilogue, parts = found
        call = Call.of(source)
        if call is None or call.config.epilogue != "none" or set(source.users) != set(parts):
            continue
        # An activation that autocast moves to another dtype has an output that the epilogue would not have.
        dtypes = {value.dtype for value in map(_value, (source, node)) if isinstance(value, Tensor)}
        if len(dtypes) > 1 or any(kind_of(module, other) == "unknown" for other in _between(source, node)):
            continue
        source.args = (*call.arguments[:-1], recode(call.arguments[-1], epilogue=epilogue))
        source.kwargs = {}
        node.replace_all_uses_with(source)
        for part in reversed(parts):
            graph.erase_node(part)


def _activation(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, str, list[fx.Node]] | None:
    """What an activation is applied to, its epilogue and its nodes, which end in ``node``."""
    if node.op == "call_module":
        activation = module.get_submodule(str(node.target))
        epilogue = None if has_hooks(activation) else epilogue_of(activation)
    else:
        sigmoid = _silu_in_two(node)
        if sigmoid is not None:
            return sigmoid.args[0], "silu", [sigmoid, node]  # type: ignore[return-value]
        is_call = node.op in ("call_function", "call_method")
        epilogue = EPILOGUE_OF_TARGET.get(node.target) if is_call else None
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if epilogue is None or not isinstance(source, fx.Node):
        return None
    if epilogue == "gelu" and node.op != "call_module":
        approximate = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
        epilogue = GELU_OF_APPROXIMATE.get(str(approximate))
    return None if epilogue is None else (source, epilogue, [node])


def _silu_in_two(node: fx.Node) -> fx.Node | None:
    """The sigmoid(y) of a node y * sigmoid(y), as which silu is exported."""
    if node.target not in _MUL or len(node.args) != 2:
        return None
    for y, gate in (node.args, node.args[::-1]):
        is_gate = isinstance(gate, fx.Node) and gate.target in _SIGMOID and gate.args == (y,)
        if is_gate and isinstance(gate, fx.Node) and set(gate.users) == {node}:
            return gate
    return None


_MUL: set[Any] = {_aten.mul.Tensor, operator.mul, torch.mul, "mul"}
_SIGMOID: set[Any] = {_aten.sigmoid.default, torch.sigmoid, F.sigmoid, "sigmoid"}


# ---- ops that read the same tensor

Join = Callable[[Sequence["Call"]], "tuple[list[fx.Node], fx.Node | None] | None"]


@dataclass(frozen=True)
class Call:
    """A node of linear_dynamic or linear_static."""

    node: fx.Node
    arguments: tuple[Any, ...]

    @staticmethod
    def of(node: fx.Node) -> Call | None:
        if node.target not in _LINEAR:
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


def parts_of(calls: Sequence[Call]) -> list[list[fx.Node]]:
    """The packed_weight of each call, the weight_sum of each, the weight_scale of each."""
    return [[call.weight[i] for call in calls] for i in range(3)]


def join_calls(module: fx.GraphModule, value_of: Callable[[fx.Node], Tensor | None], place: Join) -> None:
    """Replace calls that read the same tensor by one call and slices of its output.

    Args:
        value_of: the weight behind a node, None where it is not known or may not be joined.
        place: makes the nodes of the joined packed_weight, weight_sum and weight_scale, and of the bias, at
            the insertion point; None where it cannot.
    """
    for group in list(_groups(module, value_of)):
        views = {call: _views_to_reshape(module, call.node) for call in group}
        calls = _that_fit([call for call in group if views[call] is not None], value_of)
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
    """Calls of one scheme that read the same tensor with nothing between them that might write to it."""
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
    """A qparam of a static layer: its value where that cannot change any more."""
    value = value_of(node) if node.op == "get_attr" else None
    return node if value is None or value.device.type == "meta" else float(value)


def _that_fit(calls: list[Call], value_of: Callable[[fx.Node], Tensor | None]) -> list[Call]:
    """Those whose panels, side by side, are the wider layer's packed weight: only the last may be ragged."""
    weights = {call: weight for call in calls if (weight := value_of(call.weight[0])) is not None}
    channels = {call: scale.shape[0] for call in weights if (scale := value_of(call.weight[2])) is not None}
    full = [call for call in channels if channels[call] == weights[call].shape[:3:2].numel()]
    if calls and weights[calls[0]].dim() == 2:
        full = list(channels)  # no panels at all
    ragged = [call for call in channels if call not in full]
    for candidate in (full + ragged[:1], full):
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
    # x by the node itself: it may have been the output of calls that are joined by now.
    x = first.node.args[0] if first.node.args else first.node.kwargs["x"]
    arguments = (x, *weight, bias, *first.arguments[5:])
    wide = graph.call_function(first.node.target, arguments)  # type: ignore[arg-type]
    channels = [0 if (scale := value_of(call.weight[2])) is None else scale.shape[0] for call in calls]
    ends = list(accumulate(channels))
    out = _value(first.node)
    if out is not None:
        out = out.new_empty((*out.shape[:-1], ends[-1]))
    wide.meta = _with_value(first.node, out)
    for call, start, end in zip(calls, [0, *ends], ends, strict=False):
        part = graph.call_function(_SLICE, (wide, -1, start, end))
        part.meta = _with_value(call.node, None if out is None else out.narrow(-1, start, end - start))
        call.node.replace_all_uses_with(part)
    for call in calls:
        graph.erase_node(call.node)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Tensors end to end along dimension 0: a view where they lie so in memory already, else a copy."""
    if lie_side_by_side(parts):
        size = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return parts[0].as_strided(size, parts[0].stride())
    with torch.no_grad(), torch.inference_mode(False):
        return torch.cat(list(parts))


def lie_side_by_side(parts: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow each other without a gap in one storage."""
    storage = parts[0].untyped_storage().data_ptr()
    starts = accumulate((part.numel() for part in parts), initial=parts[0].storage_offset())
    return parts[0].device.type != "meta" and all(
        part.untyped_storage().data_ptr() == storage and part.storage_offset() == start
        for part, start in zip(parts, starts, strict=False)
    )


# ---- what a node does


def kind_of(module: fx.GraphModule, node: fx.Node) -> str:
    """``"compute"``: returns values of its own; ``"view"``: what it returns may be its argument's memory;
    ``"unknown"``: may write to a tensor, switch a mode, ask for strides, or anything else."""
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


def _views_to_reshape(module: fx.GraphModule, node: fx.Node) -> list[fx.Node] | None:
    """The calls of ``view``, direct or through other views, that a slice of a wider output needs as
    ``reshape``; None where more than they depend on the output to be contiguous and its memory its own."""
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
            behind = _views_to_reshape(module, user)
            if behind is None:
                return None
            views += behind
    return views


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _value(node: fx.Node) -> Tensor | None:
    """The fake tensor that tracing left at a node, if any."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, Tensor) else None


def _with_value(node: fx.Node, value: Tensor | None) -> dict[str, Any]:
    keys = ("val", "example_value", "tensor_meta")
    kept = {key: item for key, item in node.meta.items() if key not in keys}
    return kept if value is None else kept | {key: value for key in keys[:2] if key in node.meta}


# ---- constants of a module


def _modules_to_ops(module: fx.GraphModule) -> None:
    graph = module.graph
    holders: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        layer = module.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, QLinear) or type(layer).forward is not QLinear.forward or has_hooks(layer):
            continue
        packed_weight, weight_sum, weight_scale, qparams, config = layer._packed
        scale, zero_point = (None, None) if qparams is None else qparams
        tensors = {
            "packed_weight": packed_weight,
            "weight_sum": weight_sum,
            "weight_scale": weight_scale,
            "bias": layer.bias,
            "activation_scale": scale,
            "activation_zero_point": zero_point,
        }
        holders[node.target] = _holder(tensors)
        with graph.inserting_before(node):
            x = node.args[0] if node.args else node.kwargs["x"]
            nodes = {
                name: None if tensor is None else graph.create_node("get_attr", f"{node.target}.{name}")
                for name, tensor in tensors.items()
            }
            weights = [nodes.pop(name) for name in ("packed_weight", "weight_sum", "weight_scale", "bias")]
            qparam_nodes = [] if qparams is None else list(nodes.values())
            op = graph.call_function(_LINEAR[qparams is not None], (x, *weights, *qparam_nodes, config))
        op.meta = dict(node.meta)
        node.replace_all_uses_with(op)
        graph.erase_node(node)
    for name, holder in holders.items():
        module.add_submodule(name, holder)


def _holder(tensors: dict[str, Tensor | None]) -> nn.Module:
    holder = nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        elif tensor is not None:
            holder.register_buffer(name, tensor)
    return holder


def _attribute(module: nn.Module, node: fx.Node) -> Tensor:
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _delete(module: nn.Module, target: str) -> None:
    path, _, name = target.rpartition(".")
    holder = module.get_submodule(path)
    # What tracing or this pass made to hold constants, not a module of the user's.
    if holder is module or type(holder) is nn.Module:
        delattr(holder, name)
