"""The warning about what stays float although its user may expect otherwise."""

from __future__ import annotations

from torch import nn

from .plan import Plan, label, type_text
from .spec import Spec

NAMES_SHOWN = 3


def describe_left_float(model: nn.Module, spec: Spec, plan: Plan) -> str | None:
    """One sentence with counts and reasons; None where all that was asked for is converted.

    It names the modules that the spec asks for and that stay float, the keys of the spec under which nothing
    is converted, and, if nothing is converted at all, every module that could have been.

    Args:
        spec: as read; for ``qconfig_spec=None`` without keys, which the model need not have.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for decision in plan.left_float:
        if decision.is_notable or not plan.converted:
            key = (type_text(decision.module), str(decision.reason))
            groups.setdefault(key, []).append(decision.name)
    for name, module in _without_effect(model, spec, plan):
        groups.setdefault((type_text(module), "there is nothing in it to convert"), []).append(name)
    count = len(plan.converted)
    if not groups and count:
        return None
    parts = [f"{len(names)} {kind} ({_listed(names)}): {why}" for (kind, why), names in groups.items()]
    converted = f"{count} layer{'s' if count > 1 else ''} converted" if count else "no layer was converted"
    left = "; left as they are: " + "; ".join(parts) if parts else f"; {type_text(model)} has none to convert"
    return converted + left


def _without_effect(model: nn.Module, spec: Spec, plan: Plan) -> list[tuple[str, nn.Module]]:
    """The modules that a key of the spec covers, where nothing is converted under any of them."""
    converted = {id(decision.module) for decision in plan.converted}
    known = {id(decision.module) for decision in plan.left_float}
    found: dict[int, tuple[str, nn.Module]] = {}
    for key, request in spec.items():
        if request is None:
            continue
        matches = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if (name == key or key in type(module).__mro__) and spec.get(name, request) is not None
        }
        inside = {id(part) for module in matches.values() for part in module.modules()}
        if inside.isdisjoint(converted):
            for name, module in matches.items():
                if id(module) not in known and not any(id(part) in known for part in module.modules()):
                    found[id(module)] = (name, module)
    return list(found.values())


def _listed(names: list[str]) -> str:
    shown = [label(name).removeprefix("layer ") for name in names[:NAMES_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
