"""Modules that stand in for those of torch.nn."""

from .linear import QLinear

__all__ = ["QLinear"]
