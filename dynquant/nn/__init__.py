"""Modules that stand in for those of torch.nn."""

from .embedding import QEmbedding, QEmbeddingBag
from .embedding_block import EmbeddingBlock
from .encoder import EncoderLayer
from .linear import QLinear
from .mlp_block import MLPBlock
from .module import QModule
from .multihead_attention import QMultiheadAttention
from .rnn import QGRU, QLSTM
from .rnn_cells import QGRUCell, QLSTMCell, QRNNCell

__all__ = [
    "QGRU",
    "QLSTM",
    "EmbeddingBlock",
    "EncoderLayer",
    "MLPBlock",
    "QEmbedding",
    "QEmbeddingBag",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QModule",
    "QMultiheadAttention",
    "QRNNCell",
]
