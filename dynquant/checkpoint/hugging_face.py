"""The conversion of a transformers model, written into its config and so into the ``config.json`` beside its
weights. Nothing here imports transformers: that takes 1.5 s. The classes that it asks for are in
``hugging_face_quantizer.py``, which is imported when transformers is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from ..after_import import after_import
from ..extras import needs
from ..nn.module import QModule

METHOD = "dynquant"
"""``quant_method`` in a ``config.json``."""

_QUANTIZER = f"{__package__}.hugging_face_quantizer"
_REGISTRY = "transformers.quantizers.auto"
_MODELS = "transformers.modeling_utils"

Quantize = Callable[..., nn.Module]
_quantize: Quantize | None = None


def install(quantize: Quantize) -> None:
    """Have transformers know dynquant's quantizer, now or when it is imported.

    Args:
        quantize: :func:`dynquant.quantize_dynamic`, for ``from_pretrained`` of float weights.
    """
    global _quantize
    _quantize = quantize
    after_import(_REGISTRY, _register)


def quantize_function() -> Quantize:
    assert _quantize is not None, "dynquant/__init__.py calls install"
    return _quantize


def config_type(user: str) -> Any:
    """``DynquantConfig``, for which transformers is imported.

    Args:
        user: the caller, for the error if transformers is not installed.
    """
    with needs(user, extra="demo"):
        return import_module(_QUANTIZER).DynquantConfig


def _register(registry: ModuleType) -> None:
    """Importing the quantizer registers it. Where that fails, transformers is none the worse."""
    try:
        import_module(_QUANTIZER)
    except Exception as error:
        warnings.warn(f"dynquant: transformers does not take its quantizer: {error}", stacklevel=2)


def describe(model: nn.Module) -> None:
    """Write which layers are quantized into the config of each transformers model that ``model`` is or holds.

    A model within another, such as the BertModel of a BertForMaskedLM, is described as a part of the outer.
    """
    base: Any = getattr(sys.modules.get(_MODELS), "PreTrainedModel", None)
    if base is None:
        return
    for part in _outermost(model, base):
        if any(isinstance(module, QModule) for module in part.modules()):
            part.config.quantization_config = config_type("describe").of(part)
            for module in part.modules():
                if isinstance(module, base):
                    # Set by from_pretrained too: a few families' forwards depend on it.
                    module.config._is_quantized = True


def _outermost(module: nn.Module, base: type) -> Iterator[Any]:
    if isinstance(module, base):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, base)
