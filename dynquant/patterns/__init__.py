"""Roles of the layers in modules of torch.nn and of model libraries, by the names of types and attributes."""

from .embedding_stages import EmbeddingStage
from .registry import ActivationAfter, SharedInput, register_pattern
from .residual_mlps import ResidualMLP
from .transformer_layers import TransformerLayer

__all__ = [
    "ActivationAfter",
    "EmbeddingStage",
    "ResidualMLP",
    "SharedInput",
    "TransformerLayer",
    "register_pattern",
]
