"""Selection: the decision about each module of a model, made by the spec and the types of the modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from ..nn.module import QModule
from ..nn.own_forward import with_own_forward
from ..patterns.hugging_face import CONV1D, LINEAR_FORWARDS
from ..patterns.registry import type_name
from ..reference import FLOAT_DTYPES
from .own_forward import why_not_int8
from .plan import (
    NO_INT8_VERSION,
    NOT_ASKED_FOR,
    SPEC_LEAVES_FLOAT,
    Decision,
    Plan,
    Request,
    Scheme,
    label,
)
from .sources import is_own
from .spec import EMBEDDINGS, Spec, read_qconfig

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
EXPERTS = "its weights are 3-D, a matrix for each expert, and there is no int8 version of such a module"


def select(
    model: nn.Module, spec: Spec, default: Scheme, mapping: Mapping[type, Any], *, covers_all: bool = False
) -> Plan:
    """The plan of a conversion by a spec.

    Args:
        default: the scheme that a module's ``qconfig`` attribute completes.
        covers_all: whether the spec stands for everything that can be converted (``qconfig_spec=None``), so
            that a linear or recurrent module that cannot be is notable.

    Raises:
        ValueError: for a layer that has no weight yet, a request for weights other than int8 for a module
            that could be int8.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    requests = _requests(modules, spec, default)
    # A shared module stays float if any of its names maps to None.
    stays_float = {id(modules[name]) for name, request in requests.items() if request is None}
    covered = {id(modules[name]) for name, request in requests.items() if request is not None} - stays_float

    decisions: dict[int, Decision] = {}
    replaced: tuple[str, ...] = ()  # prefixes of names within modules that are converted as a whole
    for name, module in modules.items():
        request = requests.get(name)
        if id(module) in decisions or name.startswith(replaced):
            continue
        if id(module) in covered and request is None:
            continue  # another of its names is covered
        if id(module) in stays_float:
            request = None
        decision = _decide(name, module, request, mapping, spec)
        if decision is None:
            continue
        if decision.target is None and id(module) not in stays_float:
            decision = _noted(decision, spec, covers_all)
        whole = _converts_parts(decision.target)
        if whole and is_own(decision.target):
            other = _other_entry(name, modules, requests, spec)
            if other is not None:
                whole, reason = False, f"the spec has an entry of its own for {label(other)}"
                decision = decision._replace(target=None, reason=reason)
        if isinstance(module, torch.jit.ScriptModule) or whole:
            replaced = (*replaced, f"{name}." if name else "")
        decisions[id(module)] = decision
    return Plan(tuple(decisions.values()))


def _converts_parts(target: Any) -> bool:
    """Whether a module is converted as a whole, and what is in it not by itself."""
    return target is not None and (not is_own(target) or getattr(target, "converts_parts", False))


def _other_entry(
    name: str, modules: Mapping[str, Any], requests: Mapping[str, Request | None], spec: Spec
) -> str | None:
    """The name of a part of a module that the spec leaves float, or for which it names another scheme."""
    for part, module in modules.items():
        is_inside = part.startswith(f"{name}." if name else "") and part != name
        is_named = part in spec or "qconfig" in vars(module)
        if is_inside and (requests.get(part) is None or (is_named and requests[part] != requests[name])):
            return part
    return None


def _requests(modules: Mapping[str, Any], spec: Spec, default: Scheme) -> dict[str, Request | None]:
    """What the spec asks for each name that it covers: by name, by type, by the parent's."""
    requests: dict[str, Request | None] = {}
    for name, module in modules.items():
        keys = [name, *type(module).__mro__]
        found = next((key for key in keys if key in spec), None)
        if "qconfig" in vars(module):
            requests[name] = read_qconfig(label(name), module.qconfig, default)
        elif found is not None:
            requests[name] = spec[found]
        elif name and (parent := name.rpartition(".")[0]) in requests:
            requests[name] = requests[parent]
    return requests


def _decide(
    name: str, module: nn.Module, request: Request | None, mapping: Mapping[type, Any], spec: Spec
) -> Decision | None:
    """The decision about a module, None for one that has nothing to quantize."""
    if isinstance(module, QModule):
        return Decision(name, module, None, request, f"it was a {type(module).__name__} before")
    if isinstance(module, torch.jit.ScriptModule):
        made = "torch.jit.script or torch.jit.trace made it; convert the model before"
        return Decision(name, module, None, request, made) if any(True for _ in module.parameters()) else None
    base: Any = next((base for base in type(module).__mro__ if base in mapping), None)
    if base is None and not _has_matrix(module):
        return None
    if request is None:
        return Decision(name, module, None, None, _uncovered(name, module, base, spec))
    if base is None:
        return Decision(name, module, None, request, _no_version(module, request))
    if base in EMBEDDINGS and not (request.has_float_qparams or _is_named(name, module, spec)):
        return Decision(name, module, None, request, NOT_ASKED_FOR)
    reason = _why_not(name, module, base, mapping[base])
    if reason is not None:
        return Decision(name, module, None, request, reason)
    if is_own(mapping[base]) and not (request.is_int8 or (base in EMBEDDINGS and request.has_float_qparams)):
        if issubclass(base, RECURRENT):
            return Decision(name, module, None, request, _no_version(module, request))
        raise ValueError(
            f"quantize_dynamic: expected the qconfig of {label(name)} ({type(module).__name__}) to ask for "
            f"weights of torch.qint8, got {request.dtype}"
        )
    target = mapping[base]
    if (
        is_own(target)
        and type(module).forward is not base.forward
        and type_name(module) not in LINEAR_FORWARDS
    ):
        target = with_own_forward(target, type_before_parametrizations(module))
    return Decision(name, module, target, request)


def _is_named(name: str, module: nn.Module, spec: Spec) -> bool:
    """Whether a spec has an entry for a module itself, not for a part of the model that it is in."""
    names_type = any(key in spec for key in type(module).__mro__ if key is not nn.Module)
    return name in spec or names_type or "qconfig" in vars(module)


def _uncovered(name: str, module: nn.Module, base: type | None, spec: Spec) -> str:
    """The reason why a module stays float for which the spec asks nothing."""
    if base is None:
        return _no_version(module)
    return SPEC_LEAVES_FLOAT if base not in EMBEDDINGS or _is_named(name, module, spec) else NOT_ASKED_FOR


def _has_matrix(module: nn.Module) -> bool:
    parameters = module.parameters(recurse=False)
    return any(not is_lazy(parameter) and parameter.dim() > 1 for parameter in parameters)


def _no_version(module: nn.Module, request: Request | None = None) -> str:
    if request is not None and not request.is_int8:
        return f"its qconfig asks for weights of {request.dtype}, which dynquant does not have"
    return EXPERTS if _has_experts(module) else NO_INT8_VERSION


def _has_experts(module: nn.Module) -> bool:
    parameters = [parameter for parameter in module.parameters(recurse=False) if not is_lazy(parameter)]
    is_torchs = type(module).__module__.startswith("torch.nn.")
    return not is_torchs and any(p.dim() == 3 and min(p.shape) > 1 for p in parameters)


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


def _why_not(name: str, module: Any, base: Any, target: Any) -> str | None:
    """The reason why a module of a mapped type stays float; None if it can be converted."""
    weight = getattr(module, "weight", None)
    if weight is not None and is_lazy(weight):
        raise ValueError(
            f"quantize_dynamic: {label(name)} ({type(module).__name__}) has no weight before its first "
            "batch; run the model once before converting it"
        )
    for member in _CALL_MEMBERS:
        if getattr(type(module), member) is not getattr(base, member) or member in vars(module):
            if "_hf_hook" in vars(module):
                return "accelerate replaced its forward; call remove_hook_from_submodules(model) before"
            if type(module).__module__.startswith("torch.ao.nn.qat."):
                return "torch.ao.quantization.prepare_qat made it; convert the float model"
            if member == "forward" and "forward" not in vars(module) and is_own(target):
                if type_name(module) in LINEAR_FORWARDS:
                    continue
                reason = why_not_int8(module, base)
                if reason is None:
                    continue
                return reason
            return f"its {member} is not that of {base.__name__}"
    if base is nn.Linear and weight is not None and weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}"
    if isinstance(module, NonDynamicallyQuantizableLinear) and not is_own(target):
        return f"nn.MultiheadAttention reads its weight, which is not a tensor in a {target.__name__}"
    return target.why_not(module) if isinstance(target, type) and issubclass(target, QModule) else None


def _noted(decision: Decision, spec: Spec, covers_all: bool) -> Decision:
    """The decision to leave a module float, notable if its user may expect otherwise."""
    module, request = decision.module, decision.request
    asks_for_linear = spec.get(nn.Linear) is not None
    if type_name(module) == CONV1D and request is None and asks_for_linear:
        return decision._replace(reason="the spec names Linear, and not its type", is_notable=True)
    if isinstance(module, QModule):
        is_notable = False
    elif isinstance(module, torch.jit.ScriptModule) or decision.reason == EXPERTS:
        is_notable = request is not None or asks_for_linear
    elif request is None:
        is_notable = covers_all and isinstance(module, RECURRENT)
    else:
        keys: list[type | str] = [decision.name, *type(module).__mro__]
        is_named = any(spec.get(key) is not None for key in keys if key is not nn.Module)
        is_usual = decision.reason in (NO_INT8_VERSION, NOT_ASKED_FOR)
        is_notable = is_named or not is_usual or isinstance(module, RECURRENT)
    return decision._replace(is_notable=is_notable)
