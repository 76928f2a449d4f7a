"""quantize_dynamic: which layers of a model are swapped for quantized ones, and the swap."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from tqdm import tqdm

from .config import Config
from .fuse import fuse as fuse_layers
from .fuse import type_name
from .hugging_face import CONV1D, linear_of_conv1d
from .nn.linear import QLinear, layer_config
from .qtensor import QTensor
from .reference import FLOAT_DTYPES

Words = dict[str, Any]
"""The scheme of a layer as ``from_float`` takes it: activations, weights, rotation and so on."""


@dataclass(frozen=True)
class Selected:
    """A module that is to be converted."""

    name: str
    module: nn.Module
    target: Any
    words: Words


@dataclass(frozen=True)
class Left:
    """A module that stays float although the spec covers it, and why."""

    name: str
    module: nn.Module
    reason: str


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Mapping[type | str, Any] | Collection[type | str] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[type, Any] | None = None,
    inplace: bool = False,
    *,
    activations: str = "per_token",
    weights: str = "per_channel",
    rotation: str | int | None = None,
    fuse: bool = False,
) -> nn.Module:
    """Swap the nn.Linear layers of a model for :class:`dynquant.QLinear`; torch.ao's function of that name.

    Subclasses of nn.Linear are swapped where they run nn.Linear's own forward, the model itself where it is
    one. A module that appears several times is converted once, and layers that share a weight go on sharing
    it. Forward and backward hooks come along. Everything else stays as it is, and where anything fails so
    does the model. The result is in eval mode, as torch.ao's.

    Args:
        model: any module on any device.
        qconfig_spec: what to convert. None: every nn.Linear. A set of types and dotted names: these, and what
            is below them. A dict of types and dotted names to None (leave float), a :class:`dynquant.Config`
            or one of torch.ao's QConfig objects, whose weight observer says per_tensor or per_channel. A name
            goes before a type, both before what holds for the parent, a ``qconfig`` attribute before all.
        dtype: torch.qint8 or torch.int8; ignored where ``qconfig_spec`` is a dict, as by torch.ao.
        mapping: float type to quantized type with a ``from_float``; None for {nn.Linear: QLinear}, and
            Hugging Face's Conv1D, GPT-2's linear layer, likewise.
        inplace: swap in ``model`` itself instead of a copy. A model that is itself an nn.Linear is never
            changed: use what is returned.
        activations, weights, rotation: the scheme, as of :class:`dynquant.QLinear`.
        fuse: move activation functions into the layers before them and let layers that read the same tensor
            quantize it once, see :func:`dynquant.fuse`.

    Returns:
        The converted model.

    Raises:
        ValueError: for a name that the model does not have, a scheme word, dtype or qconfig that is not for
            int8, a NaN or an infinity in a weight; with the name of the layer.
        TypeError: for a ``qconfig_spec`` or a key or value in it of another kind.
    """
    words: Words = {"activations": activations, "weights": weights, "rotation": rotation}
    layer_config(1, **words)
    spec = read_spec(qconfig_spec, dtype, words)
    if mapping is None:
        conv1d = {type(module): _Conv1D for module in model.modules() if type_name(module) == CONV1D}
        mapping = {nn.Linear: QLinear, **conv1d}
        if qconfig_spec is None:
            spec = {**dict.fromkeys(conv1d, spec[nn.Linear]), **spec}
    selected, left = select(model, spec, words, mapping)
    _tell_what_stays_float(model, spec if qconfig_spec is not None else {}, selected, left)
    with torch.inference_mode(False):
        model = swap(model, convert(selected), inplace).eval()
        return fuse_layers(model) if fuse else model


class _Conv1D:
    """Makes QLinear layers of Hugging Face's Conv1D."""

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


def read_spec(
    qconfig_spec: Mapping[type | str, Any] | Collection[type | str] | None, dtype: torch.dtype, words: Words
) -> dict[type | str, Words | None]:
    """``qconfig_spec`` as a dict of types and names to their scheme, None for what is to stay float."""
    if not isinstance(qconfig_spec, Mapping) and dtype not in (torch.qint8, torch.int8):
        raise ValueError(
            f"quantize_dynamic: expected dtype to be torch.qint8 or torch.int8, got {dtype}; dynquant has no "
            "weights of that dtype"
        )
    if qconfig_spec is None:
        return {nn.Linear: words}
    if isinstance(qconfig_spec, str) or not isinstance(qconfig_spec, Collection):
        raise TypeError(
            "quantize_dynamic: expected qconfig_spec to be None, a set of types and names or a dict of them, "
            f"got {qconfig_spec!r}"
        )
    for key in qconfig_spec:
        if not isinstance(key, (type, str)):
            raise TypeError(f"quantize_dynamic: expected types and names in qconfig_spec, got {key!r}")
    if isinstance(qconfig_spec, Mapping):
        return {key: read_qconfig(_label(key), value, words) for key, value in qconfig_spec.items()}
    return dict.fromkeys(qconfig_spec, words)


def read_qconfig(label: str, qconfig: Any, words: Words) -> Words | None:
    """One value of the spec: None, a Config, or torch.ao's QConfig (a pair of observer factories)."""
    if qconfig is None:
        return None
    if isinstance(qconfig, Config):
        if qconfig.out_dtype is not None:
            raise ValueError(
                f"quantize_dynamic: the Config of {label} has an out_dtype, which layers do not take"
            )
        return {
            "activations": qconfig.activations,
            "weights": qconfig.weights,
            "rotation": qconfig.rotation_block or None,
            "epilogue": qconfig.epilogue,
        }
    if not callable(getattr(qconfig, "weight", None)):
        raise TypeError(
            f"quantize_dynamic: expected None, a dynquant.Config or a QConfig of torch.ao for {label}, got "
            f"{qconfig!r}"
        )
    observer = qconfig.weight()
    if observer.dtype not in (torch.qint8, torch.int8):
        raise ValueError(
            f"quantize_dynamic: expected the qconfig of {label} to ask for weights of torch.qint8, "
            f"got {observer.dtype}"
        )
    per_channel = observer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    return {**words, "weights": "per_channel" if per_channel else "per_tensor"}


def select(
    model: nn.Module, spec: Mapping[type | str, Words | None], words: Words, mapping: Mapping[type, Any]
) -> tuple[list[Selected], list[Left]]:
    """The modules that the spec covers: those that can be converted, each once, and those that cannot.

    Args:
        words: the scheme for modules that have a ``qconfig`` attribute, where that leaves it open.

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

    covered: dict[str, Words | None] = {}
    for name, module in modules.items():
        keys = [name, *type(module).__mro__]
        found = next((key for key in keys if key in spec), None)
        if "qconfig" in vars(module):
            covered[name] = read_qconfig(_label(name), module.qconfig, words)
        elif found is not None:
            covered[name] = spec[found]
        elif name and (parent := name.rpartition(".")[0]) in covered:
            covered[name] = covered[parent]
    # A tied module has several names; one that says None is enough.
    stays_float = {id(modules[name]) for name, scheme in covered.items() if scheme is None}

    selected: dict[int, Selected] = {}
    left: dict[int, Left] = {}
    for name, scheme in covered.items():
        module = modules[name]
        if scheme is None or id(module) in stays_float or id(module) in selected:
            continue
        base = next((base for base in type(module).__mro__ if base in mapping), None)
        reason = _why_not(name, module, base)
        if reason is not None:
            left[id(module)] = Left(name, module, reason)
        elif base is not None:
            selected[id(module)] = Selected(name, module, mapping[base], scheme)
    return list(selected.values()), list(left.values())


def _why_not(name: str, module: nn.Module, base: Any) -> str | None:
    """Why a module that the spec covers stays float; None where it does not, or has no matrix to quantize."""
    if base is None:
        has_matrix = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        return "there is no int8 version of it" if has_matrix else None
    if type(module).forward is not base.forward or "forward" in vars(module):
        return f"its forward is not that of {base.__name__}"
    weight = getattr(module, "weight", None)
    if weight is not None and is_lazy(weight):
        raise ValueError(
            f"quantize_dynamic: {_label(name)} ({type(module).__name__}) has no weight before its first "
            "batch; run the model once before converting it"
        )
    if base is nn.Linear and weight is not None and weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}"
    return None


def convert(selected: Collection[Selected]) -> list[tuple[nn.Module, nn.Module]]:
    """Each selected module with its quantized counterpart; the model is not touched."""
    pairs = []
    weights: dict[int, QTensor] = {}
    for item in tqdm(selected, desc="quantize_dynamic", unit="layer", delay=1):
        try:
            layer = _from_float(item)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            reason = str(error).removeprefix("dynquant: ")
            raise ValueError(f"quantize_dynamic: {_label(item.name)}: {reason}") from error
        parameter = item.module._parameters.get("weight")
        if isinstance(layer, QLinear) and parameter is not None:
            tied = weights.setdefault(id(parameter), layer.weight)
            if tied.config == layer.weight.config:
                layer.weight = tied
        pairs.append((item.module, layer))
    return pairs


def _from_float(item: Selected) -> nn.Module:
    module = item.module
    reparametrized = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]
    if reparametrized:
        # They set the weight before each forward: the one at hand may be stale. A copy takes the new.
        module = copy.copy(module).eval()
        with torch.no_grad():
            for hook in reparametrized:
                hook(module, ())
    accepted = inspect.signature(item.target.from_float).parameters
    words = {word: value for word, value in item.words.items() if word in accepted}
    layer: nn.Module = item.target.from_float(module, **words)
    return layer


def swap(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]], inplace: bool) -> nn.Module:
    """The model, or a copy of it, with the first module of each of ``pairs`` replaced by the second."""
    pairs = list(pairs)
    replacement = {id(old): new for old, new in pairs}
    if inplace:
        for old, new in pairs:
            _carry_over(old, new, None)
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if id(child) in replacement:
                    parent._modules[name] = replacement[id(child)]
        return replacement.get(id(model), model)
    # As if the deepcopy had met them before: no float weight is copied, and every reference follows.
    memo: dict[int, Any] = dict(replacement)
    result = copy.deepcopy(model, memo)
    for old, new in pairs:
        _carry_over(old, new, memo)
    return result


def _carry_over(old: nn.Module, new: nn.Module, memo: dict[int, Any] | None) -> None:
    """Hooks and public attributes of ``old``: the same objects or, with the memo of a deepcopy, copies."""
    for name, value in vars(old).items():
        if name in _HOOKS or not (name.startswith("_") or name in vars(new) or name == "qconfig"):
            if name == "_forward_pre_hooks" and any(
                isinstance(hook, _WEIGHT_HOOKS) for hook in value.values()
            ):
                kept = (item for item in value.items() if not isinstance(item[1], _WEIGHT_HOOKS))
                value = OrderedDict(kept)
            new.__dict__[name] = value if memo is None else copy.deepcopy(value, memo)


def _label(key: type | str) -> str:
    if isinstance(key, type):
        return key.__name__
    return f"layer {key!r}" if key else "the model itself"


def _tell_what_stays_float(
    model: nn.Module, spec: Mapping[type | str, Words | None], selected: list[Selected], left: list[Left]
) -> None:
    """One warning for whatever the spec names and nothing comes of."""
    converted = {id(item.module) for item in selected}
    reasons = {id(item.module): item.reason for item in left}
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
                stays[name] = f"{_label(name)} ({type(module).__name__}): {reason}"
    if stays:
        warnings.warn("quantize_dynamic: left as they are: " + "; ".join(stays.values()), stacklevel=3)


_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
_HOOKS = {
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
}
