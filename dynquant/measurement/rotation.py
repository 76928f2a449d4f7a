"""``rotation="auto"`` by measurement: each layer on a sample, with the rotation and without it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..conversion.plan import Decision, Plan
from ..conversion.rotation import (
    asks_for_auto,
    layers_behind_activations,
    layers_of_one_input,
    with_rotations,
)
from ..conversion.swap import Converted
from .layers import measure_layers
from .pairs import Pair
from .sample import Sample, measuring


def choose_rotations(
    model: nn.Module, plan: Plan, sample: Sample | None, convert: Callable[[Plan], list[Converted]]
) -> Plan:
    """The plan with a rotation, or none, in the place of each ``"auto"``.

    Args:
        model: the float model, under :func:`dynquant.measurement.sample.measuring` if there is a sample.
        sample: a layer takes the form with the higher SQNR at its inputs from the sample; layers that read
            the same tensor take one, by their mean. None, or a layer that the sample does not reach: rotated,
            unless an activation's output is known to be its input.
        convert: makes the quantized layers of a plan.
    """
    if not any(map(asks_for_auto, plan.decisions)):
        return plan
    plain = layers_behind_activations(model)
    gains = {} if sample is None else _gains(model, plan, sample, convert)
    for group in layers_of_one_input(model):
        known = [gains[layer] for layer in group if layer in gains]
        gains.update({layer: sum(known) / len(known) for layer in group if layer in gains})

    def rotates(layer: int) -> bool:
        return gains[layer] > 0 if layer in gains else layer not in plain

    return with_rotations(plan, lambda decision: rotates(id(decision.module)))


def _gains(
    model: nn.Module, plan: Plan, sample: Sample, convert: Callable[[Plan], list[Converted]]
) -> dict[int, float]:
    """By the id of a float layer: the SQNR in dB that the rotation gains."""
    open_ones = Plan(tuple(filter(asks_for_auto, plan.decisions)))
    sqnr = [_sqnr(model, convert(with_rotations(open_ones, form)), sample) for form in (_rotated, _plain)]
    layers = {decision.name: id(decision.module) for decision in open_ones.decisions}
    return {layers[name]: sqnr[0][name] - sqnr[1][name] for name in sqnr[0].keys() & sqnr[1].keys()}


def _rotated(decision: Decision) -> bool:
    return True


def _plain(decision: Decision) -> bool:
    return False


def _sqnr(model: nn.Module, converted: list[Converted], sample: Sample) -> dict[str, float]:
    """By name, in dB; without layers that the sample does not reach."""
    with measuring(*(layer for _, layer in converted)):
        pairs = [Pair(decision.name, decision.module, layer) for decision, layer in converted]
        measured = measure_layers(model, pairs, sample, timed=False)
    return {name: figures.sqnr_db for name, figures in measured.items() if figures.sqnr_db is not None}
