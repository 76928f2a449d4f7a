"""Thresholds: layers that int8 makes too slow or too inexact, as measured on a sample, stay float."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..conversion.plan import Skipped
from .layers import Measured
from .pairs import Pair
from .sample import SAMPLE_WORDS


def check_arguments(
    sample: Any, report: bool, fuse: bool, min_speedup: float | None, min_sqnr: float | None
) -> None:
    """Check the arguments of quantize_dynamic that need a sample.

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
    if sample is not None and not given and not fuse:
        raise ValueError(
            "quantize_dynamic: a sample serves fuse=True, report=True, min_speedup= and min_sqnr=, and none "
            "of these was given"
        )
    for name, value in (("min_speedup", min_speedup), ("min_sqnr", min_sqnr)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"quantize_dynamic: expected {name} to be a number, got {value!r}")
        if math.isnan(value):
            raise ValueError(f"quantize_dynamic: expected {name} to be a number, got nan")


def below_thresholds(
    pairs: Sequence[Pair],
    measured: Mapping[str, Measured],
    min_speedup: float | None,
    min_sqnr: float | None,
) -> list[Skipped]:
    """Layers that miss a threshold, and by how much. Unmeasured layers pass.

    Args:
        measured: by the name of the layer.
        min_speedup: time of the float layer / time of the int8 layer.
        min_sqnr: dB.
    """
    rejected = []
    for pair in pairs:
        reason = _reason(measured[pair.name], min_speedup, min_sqnr)
        if reason is not None:
            rejected.append(Skipped(pair.name, pair.float_layer, reason))
    return rejected


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
