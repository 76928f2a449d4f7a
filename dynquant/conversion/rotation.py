"""``rotation="auto"``: for each layer, whether its input is rotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from ..config import AUTO_ROTATION
from ..patterns.activations import epilogue_of
from ..patterns.hugging_face import CONV1D
from ..patterns.registry import ActivationAfter, SharedInput, patterns_of, type_name
from ..patterns.residual_mlps import ResidualMLP
from ..patterns.transformer_layers import TransformerLayer
from .plan import Decision, Plan, Scheme

ROTATION = "hadamard"
"""The rotation of the layers that ``"auto"`` rotates."""

_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)
_PASSES = (nn.Dropout, nn.Identity)


def asks_for_auto(decision: Decision) -> bool:
    """Whether the rotation of a converted module is still to be chosen."""
    request = decision.request
    return (
        decision.target is not None
        and request is not None
        and request.scheme.get("rotation") == AUTO_ROTATION
    )


def with_rotations(plan: Plan, rotates: Callable[[Decision], bool]) -> Plan:
    """The plan with a rotation, or none, in the place of each ``"auto"``."""

    def chosen(decision: Decision) -> Decision:
        if not asks_for_auto(decision):
            return decision
        assert decision.request is not None
        scheme: Scheme = {**decision.request.scheme, "rotation": ROTATION if rotates(decision) else None}
        return decision._replace(request=decision.request._replace(scheme=scheme))

    return Plan(tuple(map(chosen, plan.decisions)))


def layers_behind_activations(model: nn.Module) -> set[int]:
    """The ids of the layers whose input is known to be an activation function's output.

    Its values have one sign or bounds, and no outliers: the 8 bits of a layer go further without a rotation.
    """
    return {id(layer) for parent in model.modules() for layer in _behind_activations(parent)}


def layers_of_one_input(model: nn.Module) -> list[set[int]]:
    """The ids of layers that read the same tensor, group by group: they share its quantized rows, and so need
    one rotation."""
    groups = []
    for parent in model.modules():
        parts = [pattern.layers for pattern in patterns_of(parent, SharedInput)]
        for layer in patterns_of(parent, TransformerLayer):
            parts += [(layer.query, layer.key, layer.value), (layer.gate, layer.up)]
        parts += [(mlp.gate, mlp.up) for mlp in patterns_of(parent, ResidualMLP)]
        for names in parts:
            found = [_part(parent, name) for name in names if name]
            groups.append({id(part) for part in found if part is not None})
    return [group for group in groups if len(group) > 1]


def _behind_activations(parent: nn.Module) -> Iterator[nn.Module]:
    if isinstance(parent, nn.Sequential):
        before: nn.Module | None = None
        for part in parent:
            if before is not None and (isinstance(before, _ACTIVATIONS) or epilogue_of(before) is not None):
                yield part
            before = before if isinstance(part, _PASSES) else part
    blocks: list[TransformerLayer | ResidualMLP] = [*patterns_of(parent, TransformerLayer)]
    for layer in [*blocks, *patterns_of(parent, ResidualMLP)]:
        up = _part(parent, layer.up) if layer.up and not layer.gate else None
        if up is not None and (down := _part(parent, layer.down)) is not None:
            yield down
    for pair in patterns_of(parent, ActivationAfter):
        # An MLP of two layers: the one that does not come before the activation comes after it.
        linear = {name: part for name, part in parent.named_children() if _is_linear(part)}
        if len(linear) == 2 and pair.layer in linear:
            yield from (part for name, part in linear.items() if name != pair.layer)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type_name(module) == CONV1D


def _part(parent: nn.Module, name: str) -> nn.Module | None:
    try:
        return parent.get_submodule(name)
    except AttributeError:
        return None
