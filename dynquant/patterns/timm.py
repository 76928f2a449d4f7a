"""Patterns of timm, by name: this module does not import that package."""

from __future__ import annotations

ACTIVATION_AFTER: dict[str, tuple[str, str]] = {
    "timm.layers.mlp.Mlp": ("fc1", "act"),
    "timm.models.layers.mlp.Mlp": ("fc1", "act"),
}
"""By type: a layer and the activation of its output. Query, key and value are one layer there, ``qkv``."""
