"""``attn_implementation="dynquant"`` of transformers: int8 attention by name.

transformers keeps two registers. With the function alone, models would ask for no mask of this name and the
padding mask would arrive as None. Nothing here imports transformers.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..after_import import after_import
from ..nn.attention import (
    has_int8_attention,
    is_attention_float,
    report_to_watcher,
    scaled_dot_product_attention,
)
from ..nn.encoder import EncoderLayer
from ..nn.multihead_attention import QMultiheadAttention

NAME = "dynquant"
_NOT_IN_INT8 = ("softcap", "s_aux", "sliding_window_bias")
_ASKS_FOR_SDPA = re.compile(r"""_attn_implementation\s*(?:[!=]=|(?:not )?in\b)[^\n]*["']sdpa["']""")


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
        interface.register(NAME, _refusing(masking_utils.sdpa_mask))


def _refusing(mask: Callable[..., Any]) -> Callable[..., Any]:
    """The mask function, but for models that add what it makes to their scores by themselves."""

    @wraps(mask)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        config = type(kwargs.get("config"))
        modeling = config.__module__.replace(".configuration_", ".modeling_")
        _refuse_own_attention(modeling, config.__name__.removesuffix("Config"))
        return mask(*args, **kwargs)

    return refusing


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

    Raises:
        ValueError: for a module of transformers whose attention is more than softmax over these masks.
    """
    _refuse_own_attention(type(module).__module__, type(module).__name__)
    covered = dropout == 0.0 and all(kwargs.get(name) is None for name in _NOT_IN_INT8)
    if not covered or is_attention_float(module) or not has_int8_attention(query, key, value):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(wanted) and attention_mask is None and query.shape[2] > 1
    mask = attention_mask
    if kwargs.get("position_bias") is not None:
        mask = _added(kwargs["position_bias"], mask, key.shape[2])
    report_to_watcher(id(module), query, key, value, mask, causal, scaling)
    out = scaled_dot_product_attention(query, key, value, mask, causal, scaling)
    return out.transpose(1, 2), None


def _added(bias: Tensor, mask: Tensor | None, keys: int) -> Tensor:
    """T5's position bias, which is added to the scores, and the mask of a call."""
    bias = bias[..., :keys]
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask


def use_int8_attention(model: nn.Module) -> str | None:
    """Have the attention of every transformers model in a module go by the name ``"dynquant"``, in place.

    EncoderLayers have int8 attention anyway.

    Returns:
        What attention stays float, with the reasons, or that there is none, as a clause; None if all is int8.
    """
    encoder_layers = [module for module in model.modules() if isinstance(module, EncoderLayer)]
    inside = {id(part) for layer in encoder_layers for part in layer.modules()}
    found = bool(encoder_layers)
    left: dict[str, str] = {}
    refused: set[str] = set()  # modules of classes; models within a model are in the same one
    for module in _pretrained_models(model):
        reason = _why_not_by_name(type(module))
        if reason is None:
            # Not by the property, which sets the configs of inner models that may not use the interface.
            module.config._attn_implementation_internal = NAME
            found = True
        elif (
            not any(id(part) in inside for part in module.modules())
            and type(module).__module__ not in refused
        ):
            refused.add(type(module).__module__)
            left[type(module).__name__] = reason
    for module in model.modules():
        if isinstance(module, QMultiheadAttention) and id(module) not in inside:
            module.int8_attention = found = True
    if any(type(m) is nn.MultiheadAttention and id(m) not in inside for m in model.modules()):
        left["nn.MultiheadAttention"] = "whose function in torch takes it whole"
    if left:
        return f"attention stays float in {', '.join(f'{name}, {reason}' for name, reason in left.items())}"
    if found:
        return None
    return (
        "no attention was found in the model; that of a compiled model is int8 by "
        "torch.compile(model, backend='dynquant', options={'attention': 'int8'})"
    )


def _pretrained_models(model: nn.Module) -> Iterator[Any]:
    """The transformers models in a module."""
    modeling_utils = sys.modules.get("transformers.modeling_utils")
    base = getattr(modeling_utils, "PreTrainedModel", None)
    if base is not None:
        yield from (module for module in model.modules() if isinstance(module, base))


def _why_not_by_name(kind: Any) -> str | None:
    """Why a class of transformers models cannot have int8 attention by name, as a clause; None if it can."""
    modeling_utils = sys.modules["transformers.modeling_utils"]
    can_set = getattr(kind, "_can_set_attn_implementation", None)
    if not hasattr(modeling_utils, "AttentionInterface") or not (
        can_set() if can_set is not None else kind._supports_attention_backend
    ):
        return "which does not use transformers' AttentionInterface"
    if not kind._supports_sdpa:
        return _NOT_BY_SDPA
    reasons = (_asks_for_sdpa(base.__module__) for base in kind.__mro__)
    return next((reason for reason in reasons if reason is not None), None)


_NOT_BY_SDPA = "which transformers does not run by 'sdpa' either"


def _refuse_own_attention(modeling: str, name: str) -> None:
    reason = _own_attention(modeling)
    if reason is not None:
        raise ValueError(
            f"attn_implementation={NAME!r}: {name} has attention of its own, {reason}; expected 'eager'"
        )


# What torch.compiler.assume_constant_result does, which imports all of dynamo: it cannot trace the look at
# the source, and need not.
vars(_refuse_own_attention)["_dynamo_marked_constant"] = True


@cache
def _own_attention(modeling: str) -> str | None:
    """Why the attention modules of a Python module are not for a function of this interface, as a clause.

    A model that does not support ``sdpa`` has sinks, caps or masks that only its own function applies, or
    leaves out ``is_causal``; ``sdpa`` would be as wrong, and transformers refuses it.
    """
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    module = sys.modules.get(modeling)
    if base is None or module is None:
        return None
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)]
    own: list[Any] = [kind for kind in kinds if kind.__module__ == modeling]
    if own and not any(kind._supports_sdpa for kind in own):
        return _NOT_BY_SDPA
    return _asks_for_sdpa(modeling)


@cache
def _asks_for_sdpa(modeling: str) -> str | None:
    """A clause for a Python module of transformers whose code compares the implementation's name with
    "sdpa": what it does for that name, such as a sparse mask, it would leave out for another."""
    if not modeling.startswith("transformers.models."):
        return None
    try:
        source = inspect.getsource(sys.modules[modeling])
    except (OSError, TypeError, KeyError):
        return None
    return "whose code asks whether it is 'sdpa'" if _ASKS_FOR_SDPA.search(source) else None
