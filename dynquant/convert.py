"""quantize_dynamic: swaps layers of a model for quantized ones."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .config import layer_config
from .fuse import fuse as fuse_layers
from .guard import check_arguments, kept_float
from .measure import measure_layers, pair_layers
from .nn.linear import QLinear
from .progress import layer_bar
from .qtensor import QTensor
from .report import Report, make_report
from .sample import Sample, measuring
from .selection import Left, Selected, Words, default_mapping, label, read_spec, select

Spec = Mapping[type | str, Any] | Collection[type | str] | None


@overload
def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[type, Any] | None = None,
    inplace: bool = False,
    *,
    activations: str = "per_token",
    weights: str = "per_channel",
    rotation: str | int | None = None,
    fuse: bool = False,
    sample: Any = None,
    min_speedup: float | None = None,
    min_sqnr: float | None = None,
    report: Literal[False] = False,
) -> nn.Module: ...


@overload
def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[type, Any] | None = None,
    inplace: bool = False,
    *,
    activations: str = "per_token",
    weights: str = "per_channel",
    rotation: str | int | None = None,
    fuse: bool = False,
    sample: Any = None,
    min_speedup: float | None = None,
    min_sqnr: float | None = None,
    report: Literal[True],
) -> tuple[nn.Module, Report]: ...


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[type, Any] | None = None,
    inplace: bool = False,
    *,
    activations: str = "per_token",
    weights: str = "per_channel",
    rotation: str | int | None = None,
    fuse: bool = False,
    sample: Any = None,
    min_speedup: float | None = None,
    min_sqnr: float | None = None,
    report: bool = False,
) -> nn.Module | tuple[nn.Module, Report]:
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
        fuse: move activation functions into the layers before them, and bring layers that read the same
            tensor together, see :func:`dynquant.fuse`.
        sample: what the model is called with, as of :func:`dynquant.report`, for the three that follow. They
            run the model on it, in eval mode and without gradients.
        min_speedup: keep a layer float where time of the float layer / time of the int8 layer, measured on
            its inputs from the sample, is below this; 1.0: no layer becomes slower. Layers that the sample
            does not reach are converted.
        min_sqnr: likewise where the SQNR of its output is below this, in dB; 20 is an error of a tenth.
        report: return what was measured too.

    Returns:
        The converted model; with ``report=True`` the pair of it and a :class:`dynquant.Report`.

    Raises:
        ValueError: for a name that the model does not have, a scheme word, dtype or qconfig that is not for
            int8, a NaN or an infinity in a weight, with the name of the layer; for a sample that the model
            does not take, ``min_speedup``, ``min_sqnr`` or ``report`` without a sample.
        TypeError: for a ``qconfig_spec`` or a key or value in it of another kind, a minimum that is no
            number.
    """
    words: Words = {"activations": activations, "weights": weights, "rotation": rotation}
    layer_config(1, **words)
    check_arguments(sample, report, min_speedup, min_sqnr)
    spec = read_spec(qconfig_spec, dtype, words)
    if mapping is None:
        mapping = default_mapping(model)
        if qconfig_spec is None:
            spec = {**dict.fromkeys(mapping, spec[nn.Linear]), **spec}
    selected, left = select(model, spec, words, mapping)
    _tell_what_stays_float(model, spec if qconfig_spec is not None else {}, selected, left)

    def build(selected: Collection[Selected], inplace: bool, shared: Iterable[Tensor] = ()) -> nn.Module:
        with torch.inference_mode(False):
            result = swap(model, convert(selected), inplace, shared).eval()
            return fuse_layers(result) if fuse else result

    if sample is None:
        return build(selected, inplace)
    given = Sample.of(sample)
    with measuring(model):
        # Whether it fits is said before anything is converted.
        given.run(model, "the model")
        # In place, the model itself comes last, when nothing can fail any more: what is measured is a copy
        # that shares its tensors.
        shared = [*model.parameters(), *model.buffers()] if inplace else []
        result = build(selected, False, shared)
        pairs = pair_layers(model, result)
        measured = measure_layers(model, pairs, given, timed=report or min_speedup is not None)
        # A from_float of the user's may have converted layers that were not selected themselves.
        mine = {id(item.module) for item in selected}
        candidates = [pair for pair in pairs if id(pair.float_layer) in mine]
        kept = kept_float(candidates, measured, min_speedup, min_sqnr)
        if kept and min_speedup is not None:
            # On a busy machine any layer may look slow once: what does is timed again, and that holds.
            names = {item.name for item in kept}
            candidates = [pair for pair in candidates if pair.name in names]
            measured |= measure_layers(model, candidates, given)
            kept = kept_float(candidates, measured, min_speedup, min_sqnr)
        if kept:
            del result, pairs, candidates
            floats = {id(item.module) for item in kept}
            selected = [item for item in selected if id(item.module) not in floats]
            result = build(selected, False, shared)
        told = make_report(model, result, given, kept=kept, measured=measured) if report else None
    if inplace:
        result = build(selected, True)
    return result if told is None else (result, told)


def convert(selected: Collection[Selected]) -> list[tuple[nn.Module, nn.Module]]:
    """Each selected module with its quantized counterpart; the model is not touched."""
    pairs = []
    weights: dict[int, QTensor] = {}
    with layer_bar("quantize_dynamic", len(selected)) as advance:
        for item in selected:
            try:
                layer = _from_float(item)
            except (ValueError, TypeError, RuntimeError, AssertionError) as error:
                reason = str(error).removeprefix("dynquant: ")
                raise ValueError(f"quantize_dynamic: {label(item.name)}: {reason}") from error
            parameter = item.module._parameters.get("weight")
            if isinstance(layer, QLinear) and parameter is not None:
                tied = weights.setdefault(id(parameter), layer.weight)
                if tied.config == layer.weight.config:
                    layer.weight = tied
            pairs.append((item.module, layer))
            advance()
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


def swap(
    model: nn.Module,
    pairs: Iterable[tuple[nn.Module, nn.Module]],
    inplace: bool,
    shared: Iterable[Tensor] = (),
) -> nn.Module:
    """The model, or a copy of it, with the first module of each of ``pairs`` replaced by the second.

    Args:
        shared: tensors of the model that a copy of it is to have too, instead of copies.
    """
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
    memo: dict[int, Any] = {**{id(tensor): tensor for tensor in shared}, **replacement}
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
                stays[name] = f"{label(name)} ({type(module).__name__}): {reason}"
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
