"""Thresholds: layers that int8 makes too slow or too inexact, as measured on a sample, stay float."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .layers import Measured, measure_layers
from .pairs import Pair
from .sample import SAMPLE_WORDS, Sample


def check_arguments(
    sample: Any, report: bool, other_uses: bool, min_speedup: float | None, min_sqnr: float | None
) -> None:
    """Check the arguments of quantize_dynamic that need a sample.

    Args:
        other_uses: whether an argument that can do without a sample makes use of one.

    Raises:
        ValueError: for one of them without a sample, a sample without any of them, a NaN.
        TypeError: for a threshold that is not a number.
    """
    arguments = {"report": report or None, "min_speedup": min_speedup, "min_sqnr": min_sqnr}
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    if sample is None and given:
        raise ValueError(
            f"quantize_dynamic: {given} takes measuring, and there is no sample to measure on; pass as "
            f"sample= what the model is called with: {SAMPLE_WORDS}"
        )
    if sample is not None and not given and not other_uses:
        raise ValueError(
            "quantize_dynamic: a sample serves fuse=True, rotation='auto', report=True, min_speedup= and "
            "min_sqnr=, and none of these was given"
        )
    for name, value in (("min_speedup", min_speedup), ("min_sqnr", min_sqnr)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"quantize_dynamic: expected {name} to be a number, got {value!r}")
        if math.isnan(value):
            raise ValueError(f"quantize_dynamic: expected {name} to be a number, got nan")


def judge(
    model: nn.Module,
    pairs: Sequence[Pair],
    sample: Sample,
    *,
    timed: bool,
    min_speedup: float | None,
    min_sqnr: float | None,
) -> tuple[dict[str, str], dict[str, Measured]]:
    """Measure layers and find those that miss a threshold. Unmeasured layers pass.

    Args:
        model: the float model, under :func:`dynquant.measurement.sample.measuring`.
        timed: whether to measure times even if no threshold needs them.
        min_speedup: time of the float layer / time of the int8 layer.
        min_sqnr: dB.

    Returns:
        By the name of the layer: why it must stay float; all measurements.
    """
    measured = measure_layers(model, pairs, sample, timed=timed or min_speedup is not None)
    reasons = _reasons(measured, min_speedup, min_sqnr)
    if reasons and min_speedup is not None:
        # On a busy machine any layer may look slow once: rejected layers are timed again, which decides.
        again = measure_layers(model, [pair for pair in pairs if pair.name in reasons], sample)
        reasons = _reasons(again, min_speedup, min_sqnr)
        measured |= again
    return reasons, measured


def _reasons(
    measured: Mapping[str, Measured], min_speedup: float | None, min_sqnr: float | None
) -> dict[str, str]:
    found = {name: _reason(layer, min_speedup, min_sqnr) for name, layer in measured.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def _reason(layer: Measured, min_speedup: float | None, min_sqnr: float | None) -> str | None:
    if min_sqnr is not None and layer.sqnr_db is not None and layer.sqnr_db < min_sqnr:
        return f"its int8 output has an SQNR of {layer.sqnr_db:.1f} dB, below min_sqnr={min_sqnr:g}"
    speedup = layer.speedup
    if min_speedup is not None and speedup is not None and speedup < min_speedup:
        return (
            f"in int8 it takes {layer.us_int8:.1f} µs a call, in float {layer.us_float:.1f} µs: "
            f"{speedup:.2f} times as fast, below min_speedup={min_speedup:g}"
        )
    return None
