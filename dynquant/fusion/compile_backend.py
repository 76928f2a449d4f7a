"""``torch.compile(model, backend="dynquant")``: the fusions of a graph, then another backend.

Importing dynquant does not import torch's compiler: the backend is found by its entry point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..nn.attention import check_attention_choice
from .epilogues import fold_activations
from .graph_attention import quantize_attention
from .graph_blocks import fuse_blocks
from .merge import are_contiguous, merge_calls, merge_tensors, parts_of
from .nodes import Call

COPIED_BYTES = 1 << 22
"""Packed weights that are not contiguous are copied, up to this many bytes, to merge their layers. One op
instead of three saves about 10 us a call: below this size several percent, above it less than the memory is
worth."""


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuse a graph of torch.compile, as :func:`dynquant.fuse_graph` does, and compile it.

    It runs before autograd splits the graph: the fused ops have gradients of their own, and the results are
    the same with gradients and without (the backward of an epilogue computes its layer again). A new weight
    in a layer takes effect at the next call, without compiling again. Without gradients, layers with residual
    and norm and whole MLPs become one op each (fp32, on the CPU). Weights that :func:`dynquant.fuse` made
    contiguous are merged in place; others are copied, up to :data:`COPIED_BYTES`.

    Args:
        mode: as of ``torch.compile(backend="inductor")``.
        options: ``"backend"``: the backend that compiles the fused graph, ``"inductor"`` (the default),
            ``"eager"``, ``"aot_eager"``, any other that torch knows, or a function. ``"attention"``:
            ``"int8"`` as in :func:`dynquant.fuse_graph`, None by default. Other options go to inductor.

    Raises:
        ValueError: for a mode or other options if the backend is not inductor; for another value of
            ``"attention"``.
    """
    options = dict(options or {})
    inner = options.pop("backend", "inductor")
    attention = options.pop("attention", None)
    check_attention_choice("dynquant: expected options['attention']", attention)
    if inner != "inductor" and (mode or options):
        got = f"mode={mode!r}" if mode else f"options {sorted(options)}"
        raise ValueError(
            f"dynquant: expected no mode and no options but 'backend' and 'attention' for {inner!r}, "
            f"got {got}"
        )
    if inner == "dynquant":
        raise ValueError("dynquant: expected options['backend'] to be another backend, got 'dynquant'")
    if attention is not None:
        quantize_attention(module)
    fold_activations(module)
    if not torch.is_grad_enabled():
        fuse_blocks(module)
    inputs = list(example_inputs)
    merged = _merge_inputs(module, inputs)
    module.recompile()
    if inner == "inductor":
        from torch import _inductor as inductor

        patches = {**(inductor.list_mode_options(mode) if mode else {}), **options}
        compiled: Callable[..., Any] = inductor.compile(module, inputs, options=patches)
    else:
        compiled = torch._dynamo.lookup_backend(inner)(module, inputs)
    if not merged:
        return compiled

    def run(*args: Any) -> Any:
        inputs = list(args)
        for weight in merged:
            weight.put(args, inputs)
        return compiled(*inputs)

    return run


class _MergedInput:
    """Several inputs of the graph, merged to one input of the compiled function.

    A merged tensor is valid while its parts are the very same tensors and nothing is written to them:
    load_state_dict writes into the memory that a layer has. It takes the first part's input slot; the
    compiled function does not read the others.
    """

    def __init__(self, slots: Sequence[int], inputs: Sequence[Any]) -> None:
        self.slots = slots
        self.cached = self._merge(inputs)

    def _merge(self, inputs: Sequence[Any]) -> tuple[list[tuple[Tensor, int]], Tensor]:
        parts = [inputs[slot] for slot in self.slots]
        return [(part, _version(part)) for part in parts], merge_tensors(parts)

    def put(self, args: Sequence[Any], inputs: list[Any]) -> None:
        cached = self.cached  # read once: another thread may replace it
        if any(
            args[slot] is not part or _version(part) != version
            for (part, version), slot in zip(cached[0], self.slots, strict=True)
        ):
            self.cached = cached = self._merge(args)
        inputs[self.slots[0]] = cached[1]


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _merge_inputs(module: fx.GraphModule, inputs: list[Any]) -> list[_MergedInput]:
    """Merge the weights of layers with one input, where they are inputs of the graph, in ``inputs``."""
    placeholders = module.graph.find_nodes(op="placeholder")
    slots = {node: slot for slot, node in enumerate(placeholders)}
    originals = list(inputs)
    merged: list[_MergedInput] = []

    def value_of(node: fx.Node) -> Tensor | None:
        value = originals[slots[node]] if node in slots else None
        return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else None

    def place(calls: Sequence[Call]) -> tuple[list[fx.Node], fx.Node | None] | None:
        columns = parts_of(calls)
        packed_weights = [originals[slots[node]] for node in columns[0]]
        size = sum(part.numel() for part in packed_weights)
        if size > COPIED_BYTES and not are_contiguous(packed_weights):
            return None
        # The merged weight takes the first weight's input slot, so that input must have no other user.
        if any(set(column[0].users) != {calls[0].node} for column in columns):
            return None
        for column in columns:
            merged_input = _MergedInput([slots[node] for node in column], originals)
            merged.append(merged_input)
            inputs[slots[column[0]]] = _example(column[0], merged_input.cached[1])
        biases = [call.bias for call in calls if call.bias is not None]
        # Concatenated at each call: training and loading write to biases in place.
        bias = module.graph.call_function(torch.cat, (biases,)) if biases else None
        return [column[0] for column in columns], bias

    merge_calls(module, value_of, place)
    return merged


def _example(node: fx.Node, merged: Tensor) -> Tensor:
    """The merged tensor as an example input for the compiler: of static shape, as the parts are."""
    part = node.meta.get("example_value")
    if not isinstance(part, FakeTensor):
        return merged
    fake: Tensor = part.fake_mode.from_tensor(merged, static_shapes=True)
    node.meta["example_value"] = fake
    return fake
