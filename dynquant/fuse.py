"""fuse: activation functions into the layer before them, layers that read the same tensor side by side.

What may be fused is said by RULES, by the type of the module that holds the layers: only its forward tells
that nothing else happens between them. A module of another type, or of a subclass, is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hugging_face import ACTIVATIONS, SAME_INPUT, THEN
from .nn.linear import QLinear
from .nn.shared_input import SharedInput


@dataclass(frozen=True)
class Rule:
    """What a module's forward does with its layers, by their names.

    Attributes:
        then: pairs (layer, activation): the output of the layer goes to the activation and nowhere else.
        same_input: groups of layers that are called with one and the same tensor, as a rule, in this order.
    """

    then: tuple[tuple[str, str], ...] = ()
    same_input: tuple[tuple[str, ...], ...] = ()


_FEED_FORWARD = Rule(then=(("linear1", "activation"),))

RULES: dict[str, Rule] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": _FEED_FORWARD,
    "torch.nn.modules.transformer.TransformerDecoderLayer": _FEED_FORWARD,
    **{name: Rule(then=(pair,)) for name, pair in THEN.items()},
    **{name: Rule(same_input=(layers,)) for name, layers in SAME_INPUT.items()},
}
"""Rules by the dotted name of a type, such as ``"torch.nn.modules.transformer.TransformerEncoderLayer"``; add
what your models have. nn.Sequential needs no rule."""


def fuse(model: nn.Module) -> nn.Module:
    """Fuse what RULES and nn.Sequential allow in a model with QLinear layers, in place.

    An activation function moves into the QLinear before it (``epilogue=``), and nn.Identity takes its place.
    relu gives the same bits; gelu and silu are those of :mod:`dynquant.reference.epilogue` then, within 2^-22
    of the exact function, and computed in fp32 before the one cast to the output's dtype: for bf16 and fp16
    closer to exact than an activation of the rounded output. The weights of layers that read the same tensor
    come to lie side by side, so that compiled (``torch.compile(model, backend="dynquant")``) they run as one
    layer; the bits stay. ``state_dict()`` keeps its names. Layers and activations with hooks, and those that
    appear in several places, are left alone.

    Returns:
        ``model``.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for parent in list(model.modules()):
        for layer_name, activation_name in _then(parent):
            _fuse_activation(parent, layer_name, activation_name, uses)
        for names in rule_of(parent).same_input:
            _share_input(parent, names, uses)
    return model


def rule_of(module: nn.Module) -> Rule:
    """The rule of a module's own type, an empty one where there is none."""
    return RULES.get(type_name(module), Rule())


def type_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def epilogue_of(activation: Any) -> str | None:
    """The epilogue that computes an activation module or function, None where there is none."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if type(activation) in _MODULES:
        return _MODULES[type(activation)]
    if isinstance(activation, nn.Module):
        return ACTIVATIONS.get(type_name(activation))
    return next((epilogue for function, epilogue in _FUNCTIONS if function is activation), None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu"}
_FUNCTIONS: list[tuple[Callable[..., Tensor], str]] = [
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
]


def _then(parent: nn.Module) -> Iterator[tuple[str, str]]:
    if type(parent).forward is nn.Sequential.forward:
        names = list(parent._modules)
        yield from pairwise(names)
    yield from rule_of(parent).then


def _fuse_activation(parent: nn.Module, layer_name: str, activation_name: str, uses: Counter[int]) -> None:
    layer, activation = getattr(parent, layer_name, None), getattr(parent, activation_name, None)
    epilogue = epilogue_of(activation)
    if not isinstance(layer, QLinear) or epilogue is None or layer.config.epilogue != "none":
        return
    if uses[id(layer)] > 1 or has_hooks(layer) or has_hooks(activation):
        return
    layer._set_weight(layer.weight, replace(layer.config, epilogue=epilogue))
    setattr(parent, activation_name, nn.Identity())
    if isinstance(getattr(parent, "activation_relu_or_gelu", None), int):
        # What the float kernel of nn.TransformerEncoderLayer would apply.
        setattr(parent, "activation_relu_or_gelu", 0)  # noqa: B010


def _share_input(parent: nn.Module, names: tuple[str, ...], uses: Counter[int]) -> None:
    layers = [getattr(parent, name, None) for name in names]
    if any(type(layer) is not QLinear or uses[id(layer)] > 1 for layer in layers):
        return
    shared = SharedInput([layer for layer in layers if isinstance(layer, QLinear)])
    if shared.wide is not None:
        for name, layer in zip(names, shared.layers, strict=True):
            setattr(parent, name, layer)


def has_hooks(thing: Any) -> bool:
    return any(getattr(thing, hooks, None) for hooks in _HOOKS)
