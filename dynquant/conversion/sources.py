"""Float types and the quantized types that their modules become."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.embedding import QEmbedding, QEmbeddingBag
from ..nn.linear import QLinear
from ..nn.module import QModule
from ..nn.multihead_attention import QMultiheadAttention
from ..nn.rnn import QGRU, QLSTM
from ..nn.rnn_cells import QGRUCell, QLSTMCell, QRNNCell
from ..patterns.hugging_face import CONV1D
from ..patterns.registry import type_name

EMBEDDINGS: dict[type, Any] = {nn.Embedding: QEmbedding, nn.EmbeddingBag: QEmbeddingBag}

_TORCH_NN: dict[type, Any] = {
    nn.Linear: QLinear,
    nn.MultiheadAttention: QMultiheadAttention,
    nn.LSTM: QLSTM,
    nn.GRU: QGRU,
    nn.LSTMCell: QLSTMCell,
    nn.GRUCell: QGRUCell,
    nn.RNNCell: QRNNCell,
    **EMBEDDINGS,
}


def default_mapping(model: nn.Module) -> dict[type, Any]:
    """Float type to quantized type: those of torch.nn, and Hugging Face's Conv1D if ``model`` has any."""
    conv1d = {type(module): _Conv1D for module in model.modules() if type_name(module) == CONV1D}
    return {**_TORCH_NN, **conv1d}


def is_own(target: Any) -> bool:
    """Whether ``from_float`` of a target makes QModules by a scheme; other classes may need torch.ao's
    ``qconfig``."""
    return target is _Conv1D or (isinstance(target, type) and issubclass(target, QModule))


class _Conv1D:
    """QLinear layers from Hugging Face's Conv1D."""

    @staticmethod
    def from_float(
        conv: nn.Module,
        activations: str,
        weights: str,
        rotation: str | int | None = None,
        epilogue: str = "none",
    ) -> QLinear:
        linear = linear_of_conv1d(conv)
        return QLinear.from_float(
            linear, activations=activations, weights=weights, rotation=rotation, epilogue=epilogue
        )


def linear_of_conv1d(conv: Any) -> nn.Linear:
    """GPT-2's Conv1D as the nn.Linear that computes the same; it shares the weight's memory."""
    k, n = conv.weight.shape
    linear = nn.Linear(k, n, bias=conv.bias is not None, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t(), requires_grad=False)
    if conv.bias is not None:
        linear.bias = conv.bias
    return linear.train(conv.training)
