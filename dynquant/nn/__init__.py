"""Modules that stand in for those of torch.nn."""

from .encoder import EncoderLayer
from .linear import QLinear
from .module import QModule
from .rnn import QGRU, QLSTM
from .rnn_cells import QGRUCell, QLSTMCell, QRNNCell

__all__ = ["QGRU", "QLSTM", "EncoderLayer", "QGRUCell", "QLSTMCell", "QLinear", "QModule", "QRNNCell"]
