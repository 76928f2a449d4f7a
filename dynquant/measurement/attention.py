"""Measures int8 attention against torch's on the queries, keys and values of a converted model's run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn.attention import (
    float_attention,
    keep_attention_float,
    scaled_dot_product_attention,
    watching_attention,
)
from .layers import LAYER_ROUNDS, LAYER_SECONDS, TIMED_SHAPES, Agreement
from .sample import Sample
from .timing import compare


@dataclass
class MeasuredAttention:
    """The measurements of one module's int8 attention; the module is an EncoderLayer or an attention module.

    Attributes:
        calls: in one run of the model on the sample.
        shapes: the different [B, H, S_q, S_kv, D], in the order of appearance.
        us_float, us_int8: microseconds a call, the mean over the calls of the medians for their shapes; None
            without times.
    """

    module: nn.Module
    calls: int = 0
    shapes: dict[tuple[int, ...], tuple[float, float] | None] = field(default_factory=dict)
    agreement: Agreement = field(default_factory=Agreement)
    timed: list[tuple[float, float]] = field(default_factory=list)

    @property
    def us_float(self) -> float | None:
        return sum(us[0] for us in self.timed) / len(self.timed) if self.timed else None

    @property
    def us_int8(self) -> float | None:
        return sum(us[1] for us in self.timed) / len(self.timed) if self.timed else None

    def measure(self, arguments: tuple[Any, ...], timed: bool) -> None:
        """Both kinds of attention on the arguments of a call."""
        q, k, v, mask, is_causal, scale = arguments
        # fp32, whatever the dtype of the model: its own rounding is no error of int8.
        exact = float_attention(q.float(), k.float(), v.float(), mask, is_causal, scale)
        self.agreement.add(exact, scaled_dot_product_attention(*arguments).float())
        self.calls += 1
        shape = (*q.shape[:3], k.shape[2], q.shape[3])
        if shape not in self.shapes:
            self.shapes[shape] = _times(arguments) if timed and len(self.shapes) < TIMED_SHAPES else None
        us = self.shapes[shape]
        if us is not None:
            self.timed.append(us)


def _times(arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Microseconds of torch's and of int8 attention."""
    times = compare(
        {
            "float": lambda: float_attention(*arguments),
            "int8": lambda: scaled_dot_product_attention(*arguments),
        },
        threads=torch.get_num_threads(),
        rounds=LAYER_ROUNDS,
        seconds=LAYER_SECONDS,
    )
    return times["float"].median_us, times["int8"].median_us


def measure_attention(model: nn.Module, sample: Sample, *, timed: bool) -> dict[str, MeasuredAttention]:
    """Run a converted model on the sample and measure each int8 attention at its own operands.

    Args:
        model: under :func:`dynquant.measurement.sample.measuring`.
        timed: whether to measure times.

    Returns:
        By the name of the module; empty for a model without int8 attention.
    """
    modules = {id(module): module for module in model.modules()}
    found: dict[int, MeasuredAttention] = {}

    def watch(module_id: int, arguments: tuple[Any, ...]) -> None:
        if module_id in modules:
            measured = found.setdefault(module_id, MeasuredAttention(modules[module_id]))
            measured.measure(arguments, timed)

    with watching_attention(watch):
        sample.run(model, "the int8 model")
    return {name: found[id(module)] for name, module in model.named_modules() if id(module) in found}


def judge_attention(model: nn.Module, sample: Sample, min_sqnr: float) -> dict[str, str]:
    """Have attention below the threshold stay float, in place.

    Returns:
        The reasons, by the name of the module.
    """
    reasons = {}
    for name, measured in measure_attention(model, sample, timed=False).items():
        sqnr = measured.agreement.sqnr_db
        if sqnr is not None and sqnr < min_sqnr:
            keep_attention_float(measured.module)
            reasons[name] = f"its int8 attention has an SQNR of {sqnr:.1f} dB, below min_sqnr={min_sqnr:g}"
    return reasons
