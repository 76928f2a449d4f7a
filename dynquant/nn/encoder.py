"""EncoderLayer: a transformer layer whose parts are quantized, run as three ops."""

from __future__ import annotations

from typing import Any

from torch import nn

from .block import Block, new_block
from .encoder_call import EncoderCall, prepare


class EncoderLayer(Block):
    """A post- or pre-norm transformer layer as three ops: query, key and value in one product; attention;
    output projection and MLP with their residuals and norms.

    :func:`dynquant.fuse` makes it of a layer that a pattern knows
    (:mod:`dynquant.patterns.transformer_layers`) by changing the layer's class to a subclass of its own class
    and of this one: parts, parameters, hooks and ``state_dict()`` stay what they are, ``isinstance`` holds.
    Attention is int8 too, where the device has a kernel for it.

    A call runs the layer's own forward on its parts wherever three ops would do something else or leave
    something out:

    - in training mode, where gradients are needed (parameters require them and grad mode is on), under
      autocast, torch.func's transforms, torch.compile, torch.export and torch.jit;
    - where somebody looks inside: hooks on parts, ``output_attentions``, replaced forwards;
    - for arguments other than the input and a padding mask, for inputs that are not [B, S, hidden];
    - where parts have changed so that the ops cannot express them (static or per_tensor inputs, other types),
      and on devices without kernels of these ops.

    :meth:`why_parts` gives the reason that lies in the layer itself.

    In nn.TransformerEncoderLayer the float ``in_proj_weight`` of nn.MultiheadAttention is quantized in the
    scheme of ``linear1``, and again after it has changed; ``state_dict()`` holds the float one. A change of a
    few of its elements through ``.data`` leaves no trace: write them under ``torch.no_grad()`` instead.
    """

    @staticmethod
    def _prepare(module: nn.Module, pattern: Any, base: type[nn.Module]) -> EncoderCall:
        return prepare(module, pattern, base)


EncoderLayer._kind = EncoderLayer


def _new(base: Any, pattern: Any) -> Block:
    """An instance without state, for pickles of versions in which this was the only kind of block."""
    return new_block(EncoderLayer, base, pattern)
