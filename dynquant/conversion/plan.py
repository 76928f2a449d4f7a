"""Decisions of a conversion: modules to convert with their schemes, float modules with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

Scheme = dict[str, Any]
"""The scheme of a layer as arguments of ``from_float``: activations, weights, rotation and so on."""


@dataclass(frozen=True)
class Selected:
    """A module that is to be converted."""

    name: str
    module: nn.Module
    target: Any
    scheme: Scheme


@dataclass(frozen=True)
class Skipped:
    """A module that stays float although the spec covers it, and why."""

    name: str
    module: nn.Module
    reason: str


def label(key: type | str) -> str:
    """A key of a spec, or the name of a layer, as messages call it."""
    if isinstance(key, type):
        return key.__name__
    return f"layer {key!r}" if key else "the model itself"
