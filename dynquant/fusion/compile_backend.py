"""``torch.compile(model, backend="dynquant")``: the fusions of a graph, then another backend's work.

Importing dynquant does not import torch's compiler: the backend is found by its entry point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from .epilogues import fold_activations
from .merge import are_contiguous, merge_calls, merge_tensors, parts_of
from .nodes import Call

COPIED_BYTES = 1 << 22
"""Up to this many bytes of packed weights are copied to stand side by side. One op instead of three saves
about 10 us a call: below this size several percent, above it less than the memory is worth."""


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuse a graph of torch.compile, as :func:`dynquant.fuse_graph` does, and compile it.

    It runs before autograd takes the graph apart: the fused ops bring gradients of their own, and the
    results are the same with gradients and without (the backward of an epilogue computes its layer again).
    A new weight in a layer takes effect at the next call, without compiling again. Weights that
    :func:`dynquant.fuse` laid side by side are merged where they are; others are copied for it, small ones
    only (:data:`COPIED_BYTES`).

    Args:
        mode: as of ``torch.compile(backend="inductor")``.
        options: ``"backend"``: who compiles the fused graph, ``"inductor"`` (the default), ``"eager"``,
            ``"aot_eager"``, any other that torch knows, or a function. The rest goes to inductor.

    Raises:
        ValueError: for a mode or further options where the backend is not inductor.
    """
    options = dict(options or {})
    inner = options.pop("backend", "inductor")
    if inner != "inductor" and (mode or options):
        got = f"mode={mode!r}" if mode else f"options {sorted(options)}"
        raise ValueError(f"dynquant: expected no mode and no options but 'backend' for {inner!r}, got {got}")
    if inner == "dynquant":
        raise ValueError("dynquant: expected options['backend'] to be another backend, got 'dynquant'")
    fold_activations(module)
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
    """An input of the compiled function that is several of the graph's own, merged.

    Layers keep their weights as long as nobody assigns new ones, so what was merged once is good while the
    very same tensors come. The first part's place is that of the whole; the others are read no more.
    """

    def __init__(self, places: Sequence[int], inputs: Sequence[Any]) -> None:
        self.places = places
        self.held = self._merged(inputs)

    def _merged(self, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], Tensor]:
        parts = tuple(inputs[place] for place in self.places)
        return parts, merge_tensors(parts)

    def put(self, args: Sequence[Any], inputs: list[Any]) -> None:
        held = self.held  # read once: another thread may be replacing it
        if any(args[place] is not part for part, place in zip(held[0], self.places, strict=True)):
            self.held = held = self._merged(args)
        inputs[self.places[0]] = held[1]


def _merge_inputs(module: fx.GraphModule, inputs: list[Any]) -> list[_MergedInput]:
    """Merge the weights of layers with one input, where they are inputs of the graph, in ``inputs``."""
    placeholders = module.graph.find_nodes(op="placeholder")
    places = {node: place for place, node in enumerate(placeholders)}
    originals = list(inputs)
    merged: list[_MergedInput] = []

    def value_of(node: fx.Node) -> Tensor | None:
        value = originals[places[node]] if node in places else None
        return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else None

    def place(calls: Sequence[Call]) -> tuple[list[fx.Node], fx.Node | None] | None:
        columns = parts_of(calls)
        packed_weights = [originals[places[node]] for node in columns[0]]
        size = sum(part.numel() for part in packed_weights)
        if size > COPIED_BYTES and not are_contiguous(packed_weights):
            return None
        # The first part's place is lent to the whole, so nothing else may read that part.
        if any(set(column[0].users) != {calls[0].node} for column in columns):
            return None
        for column in columns:
            whole = _MergedInput([places[node] for node in column], originals)
            merged.append(whole)
            inputs[places[column[0]]] = _shown(column[0], whole.held[1])
        biases = [call.bias for call in calls if call.bias is not None]
        # Joined at each call: a bias is trained and loaded in place.
        bias = module.graph.call_function(torch.cat, (biases,)) if biases else None
        return [column[0] for column in columns], bias

    merge_calls(module, value_of, place)
    return merged


def _shown(node: fx.Node, whole: Tensor) -> Tensor:
    """What stands for an input while the graph is compiled: of a fixed shape, as the parts are."""
    part = node.meta.get("example_value")
    if not isinstance(part, FakeTensor):
        return whole
    fake: Tensor = part.fake_mode.from_tensor(whole, static_shapes=True)
    node.meta["example_value"] = fake
    return fake
