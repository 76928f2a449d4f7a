"""The picture of a Report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .report_data import Report

_FLOAT, _INT8, _SLOWER = "#d5d8dc", "#2a6f97", "#c8553d"
_ROW_INCHES = 0.21


def plot(report: Report, path: Path) -> None:
    """PNG with one line a layer and three panels: speed against float, SQNR in dB, kilobytes."""
    layers = report.layers
    height = 2.2 + _ROW_INCHES * max(len(layers), 4)
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)
    speed, sqnr, size = figure.subplots(1, 3, sharey=True, width_ratios=(1.3, 1, 1))
    places = list(range(len(layers)))

    speeds = [layer.speedup or 0.0 for layer in layers]
    bars = speed.barh(places, speeds, color=[_INT8 if value >= 1 else _SLOWER for value in speeds])
    times = [
        f"{layer.us_float:.0f} → {layer.us_int8:.0f} µs"
        if layer.us_float is not None and layer.us_int8 is not None
        else "not timed"
        for layer in layers
    ]
    speed.bar_label(bars, times, padding=3, fontsize=7, color="#555555")
    speed.axvline(1, color="black", linewidth=0.8, linestyle=":")
    speed.set_xlim(0, 1.3 * max([1.0, *speeds]))
    speed.set_title("speed, float = 1", fontsize=10)

    decibels = [layer.sqnr_db for layer in layers]
    finite = [value for value in decibels if value is not None and math.isfinite(value)]
    top = max([1.0, *finite])
    lengths = [_length(value, top) for value in decibels]
    bars = sqnr.barh(places, lengths, color=_INT8)
    sqnr.bar_label(bars, [_decibel(value) for value in decibels], padding=3, fontsize=7, color="#555555")
    sqnr.set_xlim(min([0.0, *finite]), 1.15 * top)
    sqnr.set_title("SQNR of the output, dB", fontsize=10)

    size.barh(places, [layer.bytes_float / 1e3 for layer in layers], color=_FLOAT, label="float")
    size.barh(places, [layer.bytes_int8 / 1e3 for layer in layers], color=_INT8, label="int8")
    size.set_title("kB", fontsize=10, loc="left")
    if layers:
        # Above the bars, beside the title.
        size.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)

    names = [f"{layer.name or '(the model)'}  {layer.shape}".rstrip() for layer in layers]
    speed.set_yticks(places, names, fontsize=7)
    # Upside down: the first layer on top.
    speed.set_ylim(max(len(layers), 1) - 0.4, -0.6)
    for panel in (speed, sqnr, size):
        _tidy(panel)
    figure.suptitle(report.summary(), fontsize=11)
    figure.supxlabel(_footer(report), fontsize=8, color="#555555")
    figure.savefig(path, dpi=120, format="png")


def _length(value: float | None, top: float) -> float:
    """Length of a bar: that of the longest finite one for an infinite SQNR."""
    if value is None or value == -math.inf:
        return 0.0
    return min(value, top)


def _decibel(value: float | None) -> str:
    if value is None:
        return "not reached"
    return "exact" if value == math.inf else f"{value:.1f}"


def _footer(report: Report) -> str:
    conditions = report.conditions()
    if not report.skipped:
        return conditions
    names = [layer.name or "(the model)" for layer in report.skipped[:4]]
    more = len(report.skipped) - len(names)
    if more:
        names.append(f"{more} more")
    return f"{conditions}\nleft float: {', '.join(names)}"


def _tidy(panel: Any) -> None:
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="both", length=0, labelsize=7)
    panel.grid(axis="x", color="#eeeeee", linewidth=0.8)
    panel.set_axisbelow(True)
