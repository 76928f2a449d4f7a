"""Quantized counterparts of the selected modules, and their place in the model."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..nn.linear import QLinear
from ..progress import layer_bar
from ..qtensor import QTensor
from .plan import Selected, label


def convert(selected: Collection[Selected]) -> list[tuple[nn.Module, nn.Module]]:
    """Each selected module with its quantized counterpart; the model does not change."""
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
        # These hooks set the weight before each forward: the present one may be stale. A copy takes the new.
        module = copy.copy(module).eval()
        with torch.no_grad():
            for hook in reparametrized:
                hook(module, ())
    accepted = inspect.signature(item.target.from_float).parameters
    scheme = {name: value for name, value in item.scheme.items() if name in accepted}
    layer: nn.Module = item.target.from_float(module, **scheme)
    return layer


def swap(
    model: nn.Module,
    pairs: Iterable[tuple[nn.Module, nn.Module]],
    inplace: bool,
    shared: Iterable[Tensor] = (),
) -> nn.Module:
    """The model, or a copy of it, with the first module of each pair replaced by the second.

    Args:
        shared: tensors of the model that its copy holds too, instead of copies.
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
    # deepcopy takes the memo's entries for copied objects: no float weight is copied, all references follow.
    memo: dict[int, Any] = {**{id(tensor): tensor for tensor in shared}, **replacement}
    result = copy.deepcopy(model, memo)
    for old, new in pairs:
        _carry_over(old, new, memo)
    return result


def _carry_over(old: nn.Module, new: nn.Module, memo: dict[int, Any] | None) -> None:
    """Give ``new`` the hooks and public attributes of ``old``, or copies by the memo of a deepcopy."""
    for name, value in vars(old).items():
        if name in _HOOKS or not (name.startswith("_") or name in vars(new) or name == "qconfig"):
            if name == "_forward_pre_hooks" and any(
                isinstance(hook, _WEIGHT_HOOKS) for hook in value.values()
            ):
                others = (item for item in value.items() if not isinstance(item[1], _WEIGHT_HOOKS))
                value = OrderedDict(others)
            new.__dict__[name] = value if memo is None else copy.deepcopy(value, memo)


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
