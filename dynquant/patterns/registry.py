"""Patterns by the type of a module, since its forward alone decides the roles of its layers.

A module of a subclass has no pattern: its forward may be another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import hugging_face, torch_nn


class Pattern(NamedTuple):
    """Roles of a module's layers in its forward, by their names.

    Attributes:
        activation_after: pairs (layer, activation): only the activation reads the layer's output.
        same_input: groups of layers that are usually called with the same tensor, in this order.
    """

    activation_after: tuple[tuple[str, str], ...] = ()
    same_input: tuple[tuple[str, ...], ...] = ()


_ACTIVATION_AFTER = torch_nn.ACTIVATION_AFTER | hugging_face.ACTIVATION_AFTER
_QKV_GROUPS = hugging_face.QKV_GROUPS

PATTERNS: dict[str, Pattern] = {
    name: Pattern(
        activation_after=(_ACTIVATION_AFTER[name],) if name in _ACTIVATION_AFTER else (),
        same_input=(_QKV_GROUPS[name],) if name in _QKV_GROUPS else (),
    )
    for name in (*_ACTIVATION_AFTER, *_QKV_GROUPS)
}
"""By the dotted name of a type, such as ``"torch.nn.modules.transformer.TransformerEncoderLayer"``.
nn.Sequential needs no pattern."""


def pattern_of(module: Any) -> Pattern:
    """The pattern of a module's own type; an empty one for other types."""
    return PATTERNS.get(type_name(module), Pattern())


def type_name(thing: Any) -> str:
    """The dotted name of a thing's type."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
