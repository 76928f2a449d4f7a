"""Roles of the layers in modules of torch.nn and of model libraries, by the names of types and attributes."""

from .registry import ActivationAfter, SharedInput, register_pattern
from .transformer_layers import TransformerLayer

__all__ = ["ActivationAfter", "SharedInput", "TransformerLayer", "register_pattern"]
