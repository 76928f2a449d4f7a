"""fuse: activation functions become epilogues of the layers before them, layers with one input are merged.

Fusions follow the patterns of :mod:`dynquant.patterns.registry`, by the type of the layers' parent module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from ..checkpoint.hugging_face import describe
from ..nn.merged import MergedGroup
from ..nn.module import QModule
from ..patterns.activations import epilogue_of, remove_activation
from ..patterns.registry import pattern_of
from ..patterns.whole_calls import whole_sequentials


def fuse(model: nn.Module) -> nn.Module:
    """Fuse the QLinear layers of a model in place, where nn.Sequential or a pattern of PATTERNS allows it.

    An activation function moves into the QLinear before it (``epilogue=``), and nn.Identity takes its place.
    relu gives the same bits; gelu and silu become those of :mod:`dynquant.reference.epilogue`, within 2^-22
    of the exact function, and computed in fp32 before the one cast to the output's dtype: for bf16 and fp16
    closer to exact than an activation of the rounded output. The weights of layers that read the same tensor
    become contiguous, so that these layers run as one in a compiled model, with the same bits
    (``torch.compile(model, backend="dynquant")``). ``state_dict()`` keeps its names. Layers and activations
    with hooks, those with several places in the model, and those in an nn.Sequential whose parts are called
    one by one do not change.

    Returns:
        ``model``.
    """
    for _ in fuse_steps(model):
        pass
    describe(model)
    return model


def fuse_steps(model: nn.Module) -> Iterator[ActivationFusion]:
    """Fuse a model in place, one activation after the other, which the caller may undo."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    whole = whole_sequentials(model)
    names = {id(module): name for name, module in model.named_modules()}
    for parent in list(model.modules()):
        pairs = pairwise(parent._modules) if id(parent) in whole else ()
        for layer_name, activation_name in (*pairs, *pattern_of(parent).activation_after):
            fusion = _fuse_activation(parent, layer_name, activation_name, uses)
            if fusion is not None:
                yield replace(fusion, parent_name=names[id(parent)])
        for group in pattern_of(parent).same_input:
            _merge(parent, group, uses)


@dataclass(frozen=True)
class ActivationFusion:
    """An activation that became the epilogue of a layer."""

    parent: nn.Module
    layer_name: str
    activation_name: str
    activation: nn.Module | Any
    relu_or_gelu: int | None  # the parent's ``activation_relu_or_gelu`` before
    parent_name: str = ""

    def __str__(self) -> str:
        prefix = f"{self.parent_name}." if self.parent_name else ""
        return f"{prefix}{self.layer_name} and {prefix}{self.activation_name}"

    def undo(self) -> None:
        getattr(self.parent, self.layer_name).set_epilogue("none")
        if not isinstance(self.activation, nn.Module):
            delattr(self.parent, self.activation_name)
        setattr(self.parent, self.activation_name, self.activation)
        if self.relu_or_gelu is not None:
            self.parent.activation_relu_or_gelu = self.relu_or_gelu  # type: ignore[assignment]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _fuse_activation(
    parent: nn.Module, layer_name: str, activation_name: str, uses: Counter[int]
) -> ActivationFusion | None:
    layer, activation = getattr(parent, layer_name, None), getattr(parent, activation_name, None)
    epilogue = epilogue_of(activation)
    if not isinstance(layer, QModule) or epilogue is None or not layer.takes_epilogue:
        return None
    if uses[id(layer)] > 1 or has_hooks(layer) or has_hooks(activation):
        return None
    relu_or_gelu = getattr(parent, "activation_relu_or_gelu", None)
    layer.set_epilogue(epilogue)
    remove_activation(parent, activation_name)
    return ActivationFusion(parent, layer_name, activation_name, activation, relu_or_gelu)


def _merge(parent: nn.Module, names: tuple[str, ...], uses: Counter[int]) -> None:
    found = [getattr(parent, name, None) for name in names]
    layers: list[Any] = [layer for layer in found if isinstance(layer, QModule) and layer.is_mergeable]
    if len(layers) < len(names) or any(uses[id(layer)] > 1 for layer in layers):
        return
    group = MergedGroup(layers)
    if group.merged is not None:
        for name, layer in zip(names, group.layers, strict=True):
            setattr(parent, name, layer)


def has_hooks(thing: Any) -> bool:
    """Whether a call of a module or function runs hooks, which a fusion would skip."""
    return any(getattr(thing, hooks, None) for hooks in _HOOKS)
