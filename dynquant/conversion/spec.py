"""``qconfig_spec``, ``dtype`` and ``mapping`` of quantize_dynamic, read into one dict of requests."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..config import Config
from .plan import Request, Scheme, label

Spec = dict[type | str, Request | None]
"""By type or dotted name: what is asked for the modules, None for those that stay float."""


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def read_spec(
    model: nn.Module,
    qconfig_spec: Mapping[type | str, Any] | Collection[type | str] | None,
    dtype: torch.dtype,
    default: Scheme,
    mapping: Mapping[type, Any],
    embeddings: bool = False,
) -> Spec:
    """``qconfig_spec`` as a dict of types and names of modules of ``model``.

    None stands for all types of ``mapping`` but embeddings, which have to be asked for, as of torch.ao: by
    ``embeddings``, which adds them to any spec that does not name them.
    """
    spec = _read(model, qconfig_spec, dtype, default, mapping)
    return spec if not embeddings else {**dict.fromkeys(EMBEDDINGS, Request(default)), **spec}


def _read(
    model: nn.Module,
    qconfig_spec: Mapping[type | str, Any] | Collection[type | str] | None,
    dtype: torch.dtype,
    default: Scheme,
    mapping: Mapping[type, Any],
) -> Spec:
    if not isinstance(qconfig_spec, Mapping) and dtype not in (torch.qint8, torch.int8):
        raise ValueError(
            f"quantize_dynamic: expected dtype to be torch.qint8 or torch.int8, got {dtype}; dynquant has no "
            "weights of that dtype"
        )
    if qconfig_spec is None:
        types = [kind for kind in mapping if not issubclass(kind, EMBEDDINGS)]
        return dict.fromkeys([nn.Linear, *types], Request(default))
    if isinstance(qconfig_spec, str) or not isinstance(qconfig_spec, Collection):
        raise TypeError(
            "quantize_dynamic: expected qconfig_spec to be None, a set of types and names or a dict of them, "
            f"got {qconfig_spec!r}"
        )
    for key in qconfig_spec:
        if not isinstance(key, (type, str)):
            raise TypeError(f"quantize_dynamic: expected types and names in qconfig_spec, got {key!r}")
    if isinstance(qconfig_spec, Mapping):
        spec: Spec = {key: read_qconfig(label(key), value, default) for key, value in qconfig_spec.items()}
    else:
        spec = dict.fromkeys(qconfig_spec, Request(default))
    return _with_known_names(model, spec)


def read_qconfig(of: str, qconfig: Any, default: Scheme) -> Request | None:
    """One value of the spec: None, a Config, or torch.ao's QConfig (a pair of observer factories)."""
    if qconfig is None:
        return None
    if isinstance(qconfig, Config):
        if qconfig.out_dtype is not None:
            raise ValueError(
                f"quantize_dynamic: the Config of {of} has an out_dtype, which layers do not take"
            )
        if qconfig.rotation_block and not qconfig.rotation_signs:
            raise ValueError(
                f"quantize_dynamic: the Config of {of} has rotation_signs=False, which only layers from "
                "earlier files have"
            )
        return Request(
            {
                "activations": qconfig.activations,
                "weights": qconfig.weights,
                "rotation": qconfig.rotation_block or None,
                "epilogue": qconfig.epilogue,
            }
        )
    if not callable(getattr(qconfig, "weight", None)):
        raise TypeError(
            f"quantize_dynamic: expected None, a dynquant.Config or a QConfig of torch.ao for {of}, got "
            f"{qconfig!r}"
        )
    observer = qconfig.weight()
    float_qparams = observer.qscheme == torch.per_channel_affine_float_qparams
    per_channel = observer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    scheme = {**default, "weights": "per_channel" if per_channel or float_qparams else "per_tensor"}
    return Request(scheme, qconfig, observer.dtype, float_qparams)


def _with_known_names(model: nn.Module, spec: Spec) -> Spec:
    """The spec without names that the model does not have: a warning for those that are to stay float.

    Raises:
        ValueError: for one that is to be converted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = {key: _hint(key, modules) for key in spec if isinstance(key, str) and key not in modules}
    for key, hint in unknown.items():
        if spec[key] is not None:
            raise ValueError(f"quantize_dynamic: qconfig_spec names {hint}")
    if unknown:
        warnings.warn(f"quantize_dynamic: qconfig_spec names {'; '.join(unknown.values())}", stacklevel=5)
    return {key: request for key, request in spec.items() if key not in unknown}


def _hint(name: str, modules: Collection[str]) -> str:
    close = difflib.get_close_matches(name, modules, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name!r}, which the model does not have{hint}"
