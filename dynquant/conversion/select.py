"""Selection: the layers of a model to quantize, with their schemes, and the reasons why others stay float."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..config import Config
from ..reference import FLOAT_DTYPES
from .plan import Scheme, Selected, Skipped, label


def read_spec(
    qconfig_spec: Mapping[type | str, Any] | Collection[type | str] | None,
    dtype: torch.dtype,
    default: Scheme,
) -> dict[type | str, Scheme | None]:
    """``qconfig_spec`` as a dict of types and names to their scheme, None for those that stay float."""
    if not isinstance(qconfig_spec, Mapping) and dtype not in (torch.qint8, torch.int8):
        raise ValueError(
            f"quantize_dynamic: expected dtype to be torch.qint8 or torch.int8, got {dtype}; dynquant has no "
            "weights of that dtype"
        )
    if qconfig_spec is None:
        return {nn.Linear: default}
    if isinstance(qconfig_spec, str) or not isinstance(qconfig_spec, Collection):
        raise TypeError(
            "quantize_dynamic: expected qconfig_spec to be None, a set of types and names or a dict of them, "
            f"got {qconfig_spec!r}"
        )
    for key in qconfig_spec:
        if not isinstance(key, (type, str)):
            raise TypeError(f"quantize_dynamic: expected types and names in qconfig_spec, got {key!r}")
    if isinstance(qconfig_spec, Mapping):
        return {key: read_qconfig(label(key), value, default) for key, value in qconfig_spec.items()}
    return dict.fromkeys(qconfig_spec, default)


def read_qconfig(of: str, qconfig: Any, default: Scheme) -> Scheme | None:
    """One value of the spec: None, a Config, or torch.ao's QConfig (a pair of observer factories)."""
    if qconfig is None:
        return None
    if isinstance(qconfig, Config):
        if qconfig.out_dtype is not None:
            raise ValueError(
                f"quantize_dynamic: the Config of {of} has an out_dtype, which layers do not take"
            )
        return {
            "activations": qconfig.activations,
            "weights": qconfig.weights,
            "rotation": qconfig.rotation_block or None,
            "epilogue": qconfig.epilogue,
        }
    if not callable(getattr(qconfig, "weight", None)):
        raise TypeError(
            f"quantize_dynamic: expected None, a dynquant.Config or a QConfig of torch.ao for {of}, got "
            f"{qconfig!r}"
        )
    observer = qconfig.weight()
    if observer.dtype not in (torch.qint8, torch.int8):
        raise ValueError(
            f"quantize_dynamic: expected the qconfig of {of} to ask for weights of torch.qint8, "
            f"got {observer.dtype}"
        )
    per_channel = observer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    return {**default, "weights": "per_channel" if per_channel else "per_tensor"}


def select(
    model: nn.Module, spec: Mapping[type | str, Scheme | None], default: Scheme, mapping: Mapping[type, Any]
) -> tuple[list[Selected], list[Skipped]]:
    """The modules that the spec covers, each once: those to convert, and those that cannot be converted.

    Args:
        default: the scheme that a module's ``qconfig`` attribute completes.

    Raises:
        ValueError: for a name in ``spec`` that ``model`` does not have, a layer that has no weight yet.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for key in spec:
        if isinstance(key, str) and key not in modules:
            close = difflib.get_close_matches(key, modules, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"quantize_dynamic: qconfig_spec names {key!r}, which the model does not have{hint}"
            )

    covered: dict[str, Scheme | None] = {}
    for name, module in modules.items():
        keys = [name, *type(module).__mro__]
        found = next((key for key in keys if key in spec), None)
        if "qconfig" in vars(module):
            covered[name] = read_qconfig(label(name), module.qconfig, default)
        elif found is not None:
            covered[name] = spec[found]
        elif name and (parent := name.rpartition(".")[0]) in covered:
            covered[name] = covered[parent]
    # A shared module stays float if any of its names maps to None.
    stays_float = {id(modules[name]) for name, scheme in covered.items() if scheme is None}

    selected: dict[int, Selected] = {}
    skipped: dict[int, Skipped] = {}
    for name, scheme in covered.items():
        module = modules[name]
        if scheme is None or id(module) in stays_float or id(module) in selected:
            continue
        base = next((base for base in type(module).__mro__ if base in mapping), None)
        reason = _why_not(name, module, base)
        if reason is not None:
            skipped[id(module)] = Skipped(name, module, reason)
        elif base is not None:
            selected[id(module)] = Selected(name, module, mapping[base], scheme)
    return list(selected.values()), list(skipped.values())


_CALL_MEMBERS = (
    "forward",
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "__getattr__",
    "_save_to_state_dict",
    "_load_from_state_dict",
)
"""Members that decide what a call or a state_dict of a module is; a quantized layer has its own."""


def _why_not(name: str, module: nn.Module, base: Any) -> str | None:
    """The reason why a module stays float; None if it can be converted or has no matrix to quantize."""
    if base is None:
        parameters = module.parameters(recurse=False)
        has_matrix = any(not is_lazy(parameter) and parameter.dim() > 1 for parameter in parameters)
        return "there is no int8 version of it" if has_matrix else None
    weight = getattr(module, "weight", None)
    if weight is not None and is_lazy(weight):
        raise ValueError(
            f"quantize_dynamic: {label(name)} ({type(module).__name__}) has no weight before its first "
            "batch; run the model once before converting it"
        )
    for member in _CALL_MEMBERS:
        if getattr(type(module), member) is not getattr(base, member) or member in vars(module):
            return f"its {member} is not that of {base.__name__}"
    if base is nn.Linear and weight is not None and weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}"
    return None


def warn_of_unconverted(
    model: nn.Module,
    spec: Mapping[type | str, Scheme | None],
    selected: list[Selected],
    skipped: list[Skipped],
) -> None:
    """One warning that lists the keys of the spec under which no module is converted."""
    converted = {id(item.module) for item in selected}
    reasons = {id(item.module): item.reason for item in skipped}
    stays = {}
    for key, scheme in spec.items():
        if scheme is None:
            continue
        matches = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if (name == key or key in type(module).__mro__) and spec.get(name, scheme) is not None
        }
        if converted.isdisjoint(id(part) for module in matches.values() for part in module.modules()):
            for name, module in matches.items():
                reason = reasons.get(id(module), "there is nothing in it to convert")
                stays[name] = f"{label(name)} ({type(module).__name__}): {reason}"
    if stays:
        warnings.warn("quantize_dynamic: left as they are: " + "; ".join(stays.values()), stacklevel=3)
