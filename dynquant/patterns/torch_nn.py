"""Patterns of torch.nn's own modules."""

from __future__ import annotations

ACTIVATION_AFTER: dict[str, tuple[str, str]] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("linear1", "activation"),
    "torch.nn.modules.transformer.TransformerDecoderLayer": ("linear1", "activation"),
}
"""By type: a layer and the activation of its output."""
