"""fuse: activation functions become epilogues of the layers before them, layers with one input are merged.

Fusions follow the patterns of :mod:`dynquant.patterns.registry`, by the type of the layers' parent module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from ..checkpoint.hugging_face import describe
from ..nn.linear import QLinear
from ..nn.merged import MergedGroup
from ..patterns.activations import epilogue_of, remove_activation
from ..patterns.registry import pattern_of


def fuse(model: nn.Module) -> nn.Module:
    """Fuse the QLinear layers of a model in place, where nn.Sequential or a pattern of PATTERNS allows it.

    An activation function moves into the QLinear before it (``epilogue=``), and nn.Identity takes its place.
    relu gives the same bits; gelu and silu become those of :mod:`dynquant.reference.epilogue`, within 2^-22
    of the exact function, and computed in fp32 before the one cast to the output's dtype: for bf16 and fp16
    closer to exact than an activation of the rounded output. The weights of layers that read the same tensor
    become contiguous, so that these layers run as one in a compiled model, with the same bits
    (``torch.compile(model, backend="dynquant")``). ``state_dict()`` keeps its names. Layers and activations
    with hooks, or with several places in the model, do not change.

    Returns:
        ``model``.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for parent in list(model.modules()):
        for layer_name, activation_name in _activation_pairs(parent):
            _fuse_activation(parent, layer_name, activation_name, uses)
        for names in pattern_of(parent).same_input:
            _merge(parent, names, uses)
    describe(model)
    return model


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _activation_pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    if type(parent).forward is nn.Sequential.forward:
        names = list(parent._modules)
        yield from pairwise(names)
    yield from pattern_of(parent).activation_after


def _fuse_activation(parent: nn.Module, layer_name: str, activation_name: str, uses: Counter[int]) -> None:
    layer, activation = getattr(parent, layer_name, None), getattr(parent, activation_name, None)
    epilogue = epilogue_of(activation)
    if not isinstance(layer, QLinear) or epilogue is None or layer.config.epilogue != "none":
        return
    if uses[id(layer)] > 1 or has_hooks(layer) or has_hooks(activation):
        return
    layer._set_weight(layer.weight, replace(layer.config, epilogue=epilogue))
    remove_activation(parent, activation_name)


def _merge(parent: nn.Module, names: tuple[str, ...], uses: Counter[int]) -> None:
    layers = [getattr(parent, name, None) for name in names]
    if any(type(layer) is not QLinear or uses[id(layer)] > 1 for layer in layers):
        return
    group = MergedGroup([layer for layer in layers if isinstance(layer, QLinear)])
    if group.merged is not None:
        for name, layer in zip(names, group.layers, strict=True):
            setattr(parent, name, layer)


def has_hooks(thing: Any) -> bool:
    """Whether a call of a module or function runs hooks, which a fusion would skip."""
    return any(getattr(thing, hooks, None) for hooks in _HOOKS)
