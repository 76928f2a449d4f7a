"""Decisions of a conversion: modules to convert with their schemes, float modules with the reasons."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

Scheme = dict[str, Any]
"""The scheme of a layer as arguments of ``from_float``: activations, weights, rotation and so on."""


class Selected(NamedTuple):
    """A module to convert."""

    name: str
    module: nn.Module
    target: Any
    scheme: Scheme


class Skipped(NamedTuple):
    """A module that stays float although the spec covers it, with the reason."""

    name: str
    module: nn.Module
    reason: str


def label(key: type | str) -> str:
    """A key of a spec or the name of a layer, in the words of messages."""
    if isinstance(key, type):
        return key.__name__
    return f"layer {key!r}" if key else "the model itself"
