"""Quantized counterparts of the selected modules, and their place in the model."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..nn.module import QModule
from ..progress import layer_bar
from ..qtensor import QTensor
from .plan import Decision, Plan, Request, label
from .sources import is_own


class Converted(NamedTuple):
    """A decision and the quantized counterpart that it led to."""

    decision: Decision
    layer: nn.Module


def convert(plan: Plan) -> list[Converted]:
    """The quantized counterpart of each module that the plan converts; the model does not change."""
    converted = []
    decisions = plan.converted
    with layer_bar("quantize_dynamic", len(decisions)) as advance:
        for decision in decisions:
            try:
                layer = _from_float(decision)
            except (ValueError, TypeError, RuntimeError, AssertionError) as error:
                reason = str(error).removeprefix("dynquant: ")
                raise ValueError(f"quantize_dynamic: {label(decision.name)}: {reason}") from error
            converted.append(Converted(decision, layer))
            advance()
    _tie(converted)
    return converted


def _tie(converted: Iterable[Converted]) -> None:
    """Have layers that were made of the same float parameter share one weight.

    A packed one comes first: products need it, and embeddings can read it too.
    """
    holders: dict[int, list[tuple[QModule, str, QTensor]]] = {}
    for decision, layer in converted:
        if isinstance(layer, QModule):
            for name, weight in layer.quantized_weights().items():
                parameter = decision.module._parameters.get(name)
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append((layer, name, weight))
    for group in holders.values():
        weights = sorted((weight for _, _, weight in group), key=lambda weight: weight.is_rows)
        for layer, name, own in group:
            shared = next((weight for weight in weights if weight is own or layer.shares(name, weight)), own)
            if shared is not own:
                setattr(layer, name, shared)


def _from_float(decision: Decision) -> nn.Module:
    module = decision.module
    assert decision.request is not None
    reparametrized = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]
    if reparametrized:
        # These hooks set the weight before each forward: the present one may be stale. A copy takes the new.
        module = copy.copy(module).eval()
        with torch.no_grad():
            for hook in reparametrized:
                hook(module, ())
    accepted = inspect.signature(decision.target.from_float).parameters
    scheme = {name: value for name, value in decision.request.scheme.items() if name in accepted}
    with contextlib.nullcontext() if is_own(decision.target) else _with_qconfig(module, decision.request):
        layer: nn.Module = decision.target.from_float(module, **scheme)
    return layer


@contextlib.contextmanager
def _with_qconfig(module: nn.Module, request: Request) -> Iterator[None]:
    """Within the block, the module has the ``qconfig`` that ``from_float`` of torch.ao's classes reads."""
    if "qconfig" in vars(module):
        yield
        return
    qconfig = request.qconfig
    if qconfig is None:
        from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig

        per_tensor = request.scheme.get("weights") == "per_tensor"
        qconfig = default_dynamic_qconfig if per_tensor else per_channel_dynamic_qconfig
    vars(module)["qconfig"] = qconfig
    try:
        yield
    finally:
        del vars(module)["qconfig"]


def swap(
    model: nn.Module,
    converted: Iterable[Converted],
    inplace: bool,
    shared: Iterable[Tensor] = (),
) -> nn.Module:
    """The model, or a copy of it, with each converted module in the place of the float one.

    Args:
        shared: tensors of the model that its copy holds too, instead of copies.
    """
    pairs = [(decision.module, layer) for decision, layer in converted]
    replacement = {id(old): new for old, new in pairs}
    if inplace:
        for old, new in pairs:
            _carry_over(old, new, None)
        for parent in [*model.modules(), *(new for _, new in pairs)]:
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
    """Everything that ``old`` has and a fresh layer of its type has not: hooks, attributes, more parameters,
    buffers and submodules, members of a subclass. The same objects or, with the memo of a deepcopy, copies.
    """

    def carried(value: Any) -> Any:
        return value if memo is None else copy.deepcopy(value, memo)

    carry_hooks_over(old, new, carried)
    if not isinstance(new, QModule) and not isinstance(old, nn.Linear):
        return  # whatever a user's class stands for, its from_float took what it needs
    replaced = _replaced_names(old)
    if isinstance(new, QModule):
        replaced |= {*new.replaced_attributes}
    for tensors in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(old)[tensors].items():
            if name not in replaced and not hasattr(new, name):
                vars(new)[tensors][name] = carried(value)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set & new._buffers.keys()
    for name, value in vars(old).items():
        if name not in vars(new) and name not in replaced:
            new.__dict__[name] = carried(value)
    if isinstance(new, QModule):
        new.take_members_of(type_before_parametrizations(old))


def carry_hooks_over(old: nn.Module, new: nn.Module, carried: Callable[[Any], Any]) -> None:
    """The hooks of ``old``, but those that make its weight, after ``carried``."""
    for hooks in _HOOKS & vars(old).keys():
        value = vars(old)[hooks]
        new.__dict__[hooks] = _hooks_of(new, old, carried(value)) if isinstance(value, dict) else value


def _replaced_names(old: nn.Module) -> set[str]:
    """Attributes that make or observe the float weight, which the quantized layer replaces."""
    names = {
        "weight",
        "bias",
        "parametrizations",
        "activation_post_process",
        "qconfig",
        "_compiled_call_impl",
    }
    if any(isinstance(hook, _WEIGHT_HOOKS) for hook in old._forward_pre_hooks.values()):
        for name in [*old._parameters, *old._buffers]:
            if name.startswith(("weight_", "bias_")):
                names.add(name)
    return names


def _is_of_the_float_weight(hook: Any) -> bool:
    """A hook that computes the float weight, or an observer's of torch.ao.quantization.prepare."""
    return (
        isinstance(hook, _WEIGHT_HOOKS) or getattr(hook, "__module__", "") == "torch.ao.quantization.quantize"
    )


def _hooks_of(new: nn.Module, old: nn.Module, hooks: dict[Any, Any]) -> dict[Any, Any]:
    """The very dict where it may stay as it is: handles that remove a hook know it."""
    fitting = {
        key: _rebound(hook, old, new) for key, hook in hooks.items() if not _is_of_the_float_weight(hook)
    }
    is_same = len(fitting) == len(hooks) and all(fitting[key] is hook for key, hook in hooks.items())
    return hooks if is_same else OrderedDict(fitting)


def _rebound(hook: Any, old: nn.Module, new: nn.Module) -> Any:
    """The hook with ``new`` in the place of ``old`` where it is bound to that."""
    if isinstance(hook, MethodType) and hook.__self__ is old:
        return MethodType(hook.__func__, new)
    if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is old:
        return _WrappedHook(hook.hook, new)
    return hook


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
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}
