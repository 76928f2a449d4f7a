"""fuse_graph: the fusions of :func:`dynquant.fuse`, found in a torch.fx graph instead of by module types.

A graph shows every use of every value, so no patterns are needed: an activation function moves into the op
before it where nothing else reads that op's output, and ops that read the same tensor become one wider op on
merged weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..nn.attention import check_attention_choice
from ..nn.module import QModule
from .epilogues import fold_activations
from .graph_attention import quantize_attention
from .merge import merge_calls, merge_tensors, parts_of
from .modules import has_hooks
from .nodes import Call, input_of


def fuse_graph(module: fx.GraphModule, *, attention: str | None = None) -> fx.GraphModule:
    """Fuse the int8 layers of a traced or exported module, in place, for inference.

    - QLinear modules that the graph calls become ops on constants of ``module``.
    - relu, gelu (both forms) and silu after ``linear_dynamic`` or ``linear_static``, as function, method,
      module or ATen op, become its epilogue, where nothing else reads the op's output.
    - Ops of one config that read the same tensor are merged, where their weights are constants that fill
      whole panels end to end, and nothing depends on the memory layout of their outputs. Each weight is still
      held once.

    Merged ops give the same bits, and so does relu. gelu and silu become those of
    :mod:`dynquant.reference.epilogue`, within 2^-18 of the exact function. An epilogue is computed in fp32
    before the one cast to the output's dtype: for bf16 and fp16 that is closer to exact than an activation of
    the rounded output. The input and biases that require gradients still receive them; biases that do not are
    merged to a constant.

    Change weights, dtype or device before: the weights are constants in the result.

    Args:
        module: of ``torch.fx.symbolic_trace``, with QLinear traced through or left as a module, or of
            ``torch.export.export(...).module()``, before or after ``run_decompositions()``.
        attention: ``"int8"`` makes ``scaled_dot_product_attention`` without dropout int8 attention
            (:func:`dynquant.reference.attention`), except for fewer than 16 queries with more than 64 keys
            and on devices without a kernel for it. None leaves it as it is. ``run_decompositions()`` takes
            attention apart, before which this function must run then.

    Returns:
        ``module``.

    Raises:
        TypeError: for anything but a torch.fx.GraphModule.
        ValueError: for another value of ``attention``.
    """
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"fuse_graph: expected a torch.fx.GraphModule, got {type(module).__name__}")
    check_attention_choice("fuse_graph: expected attention", attention)
    if attention is not None:
        quantize_attention(module)
    _modules_to_ops(module)
    fold_activations(module)
    original_constants = [node for node in module.graph.nodes if node.op == "get_attr" and node.users]
    merged: dict[tuple[str, ...], list[str]] = {}

    def place(calls: Sequence[Call]) -> tuple[list[fx.Node], fx.Node | None] | None:
        key = tuple(str(part.target) for call in calls for part in (*call.weight, call.bias) if part)
        if key not in merged:
            tensors = [
                merge_tensors([_attribute(module, part) for part in parts]) for parts in parts_of(calls)
            ]
            biases = [_attribute(module, call.bias) for call in calls if call.bias is not None]
            names = ["packed_weight", "weight_sum", "weight_scale"]
            if biases and not any(bias.requires_grad for bias in biases):
                tensors.append(merge_tensors(biases))
                names.append("bias")
            # A key of state_dicts that earlier versions saved.
            holder = next(name for i in count() if not hasattr(module, name := f"shared_input_{i}"))
            module.add_submodule(holder, _holder(dict(zip(names, tensors, strict=True))))
            merged[key] = [f"{holder}.{name}" for name in names]
        nodes = [module.graph.get_attr(name) for name in merged[key]]
        if len(nodes) == 4:
            return nodes[:3], nodes[3]
        bias_nodes = [module.graph.get_attr(str(call.bias.target)) for call in calls if call.bias is not None]
        return nodes, module.graph.call_function(torch.cat, (bias_nodes,)) if bias_nodes else None

    def value_of(node: fx.Node) -> Tensor | None:
        return _attribute(module, node) if node.op == "get_attr" else None

    merge_calls(module, value_of, place)
    for node in original_constants:
        if not node.users:
            module.graph.erase_node(node)
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for target in {str(node.target) for node in original_constants} - used:
        _delete(module, target)
    module.graph.lint()
    module.recompile()
    return module


def _modules_to_ops(module: fx.GraphModule) -> None:
    """Replace calls of quantized modules that are one op by that op on constants."""
    graph = module.graph
    holders: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        layer = module.get_submodule(node.target) if node.op == "call_module" else None
        call = layer.op_call() if isinstance(layer, QModule) and not has_hooks(layer) else None
        if call is None:
            continue
        holders[node.target] = _holder(call.constants)
        with graph.inserting_before(node):
            constants = [
                None if tensor is None else graph.create_node("get_attr", f"{node.target}.{name}")
                for name, tensor in call.constants.items()
            ]
            op = graph.call_function(call.op, (input_of(node), *constants, call.config))
        op.meta = dict(node.meta)
        node.replace_all_uses_with(op)
        graph.erase_node(node)
    for name, holder in holders.items():
        module.add_submodule(name, holder)


def _holder(tensors: dict[str, Tensor | None]) -> nn.Module:
    """A module that holds constants of a graph."""
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
    # A holder of constants that tracing or this pass made, not a module of the user's.
    if holder is module or type(holder) is nn.Module:
        delattr(holder, name)
