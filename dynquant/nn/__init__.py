"""Modules that stand in for those of torch.nn."""

from .linear import QLinear
from .module import QModule

__all__ = ["QLinear", "QModule"]
