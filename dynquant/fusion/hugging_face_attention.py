"""``attn_implementation="dynquant"`` of transformers: int8 attention by name.

transformers keeps two registers. With the function alone, models would ask for no mask of this name and the
padding mask would arrive as None. Nothing here imports transformers.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..after_import import after_import
from ..nn.attention import has_int8_attention, scaled_dot_product_attention

NAME = "dynquant"
_NOT_IN_INT8 = ("position_bias", "softcap", "s_aux", "sliding_window_bias")


def install() -> None:
    """Register int8 attention and its masks, now or when transformers is imported."""
    after_import("transformers.modeling_utils", _register_function)
    after_import("transformers.masking_utils", _register_mask)


def _register_function(modeling_utils: ModuleType) -> None:
    interface = getattr(modeling_utils, "AttentionInterface", None)
    if interface is not None:  # older versions have no such register
        interface.register(NAME, attention_forward)


def _register_mask(masking_utils: ModuleType) -> None:
    interface = getattr(masking_utils, "AttentionMaskInterface", None)
    if interface is not None:
        interface.register(NAME, masking_utils.sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer, as transformers calls it; what int8 does not cover goes to ``sdpa``.

    Returns:
        [B, S_q, H, D], a contiguous view, and None for the weights, which no step computes.
    """
    covered = dropout == 0.0 and all(kwargs.get(name) is None for name in _NOT_IN_INT8)
    if not covered or not has_int8_attention(query, key, value):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(wanted) and attention_mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(query, key, value, attention_mask, causal, scaling)
    return out.transpose(1, 2), None
