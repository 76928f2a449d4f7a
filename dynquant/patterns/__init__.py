"""Roles of the layers in modules of torch.nn and of model libraries, by the names of types and attributes."""

from .registry import ActivationAfter, SharedInput, register_pattern

__all__ = ["ActivationAfter", "SharedInput", "register_pattern"]
