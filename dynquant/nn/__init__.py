"""Modules that stand in for those of torch.nn."""

from .encoder import EncoderLayer
from .linear import QLinear
from .module import QModule

__all__ = ["EncoderLayer", "QLinear", "QModule"]
