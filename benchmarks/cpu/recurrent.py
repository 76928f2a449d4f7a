"""Recurrent layers: nn.LSTM and nn.GRU in int8 beside torch.ao's dynamic ones and fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import dynquant
from dynquant.measurement.timing import compare

from ..shared.tables import table
from .target_list import Results, TargetList

HIDDEN = (32, 256, 512, 1024)
BATCHES = (1, 4, 16)
STEPS = 100
KINDS: dict[str, Callable[[int, int], nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU}

MAX_RELATIVE_ERROR = 0.05


def _torch_ao(layer: nn.RNNBase) -> nn.Module:
    quantized: Any = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})
    made: nn.Module = quantized[0]
    return made


def _measure(kind: str, hidden: int, batch: int, steps: int, rounds: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = KINDS[kind](hidden, hidden).eval()
    x = torch.randn(steps, batch, hidden)
    layers = {"fp32": layer, "torch.ao": _torch_ao(layer), "dynquant": dynquant.quantize_dynamic(layer)}
    with torch.inference_mode():
        expected, got = layer(x)[0], layers["dynquant"](x)[0]
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < MAX_RELATIVE_ERROR:
        raise AssertionError(f"{kind} is wrong at hidden {hidden}, batch {batch}, relative error {error:.3g}")
    times = compare(
        {name: partial(each, x) for name, each in layers.items()}, threads=1, rounds=rounds, seconds=seconds
    )

    def speed(baseline: str) -> float:
        """Median of the ratios within a round, in which other load slows all calls alike."""
        pairs = zip(times[baseline].samples_us, times["dynquant"].samples_us, strict=True)
        return median(us / ours for us, ours in pairs)

    return {
        "kind": kind,
        "hidden": hidden,
        "batch": batch,
        "steps": steps,
        "us": {name: timing.median_us for name, timing in times.items()},
        "speed": {name: speed(name) for name in layers if name != "dynquant"},
        "error": error,
    }


def run(
    *, rounds: int, seconds: float, log: Callable[[str], None], quick: bool = False
) -> list[dict[str, Any]]:
    """[{"kind", "hidden", "batch", "steps", "us": by version, "speed": by baseline, "error"}], on 1 thread;
    the error is relative, of the output in int8 to that in float."""
    results = []
    for kind in KINDS:
        for hidden in HIDDEN[:2] if quick else HIDDEN:
            for batch in BATCHES[:1] if quick else BATCHES:
                results.append(_measure(kind, hidden, batch, STEPS, rounds, seconds))
            log(f"{kind}  hidden {hidden} done")
    return results


def text(rows: Sequence[Results]) -> str:
    """The section of the report."""
    body = [
        [
            row["kind"],
            str(row["hidden"]),
            str(row["batch"]),
            *(f"{row['us'][name]:.0f}" for name in ("fp32", "torch.ao", "dynquant")),
            *(f"{row['speed'][name]:.2f}" for name in ("fp32", "torch.ao")),
            f"{100 * row['error']:.2f} %",
        ]
        for row in rows
    ]
    heads = ("", "hidden", "batch", "fp32 µs", "torch.ao µs", "dynquant µs", "times fp32", "times torch.ao")
    title = f"## Recurrent layers, {STEPS} time steps, as many inputs as hidden units, 1 thread\n\n"
    return title + table((*heads, "error"), body)


def add_targets(targets: TargetList, rows: Sequence[Results]) -> None:
    """Those of LSTM: the lowest speed of all batch sizes."""
    lstm = [row for row in rows if row["kind"] == "LSTM"]
    for name, baseline, goal, of_hidden in (
        ("hidden 256 to 1024, the speed of torch.ao", "torch.ao", 1.5, lambda hidden: hidden >= 256),
        ("hidden 256 to 1024, the speed of fp32", "fp32", 2.0, lambda hidden: hidden >= 256),
        ("hidden 32, the speed of fp32", "fp32", 1.0, lambda hidden: hidden == 32),
    ):
        found = [
            (row["speed"][baseline], f"{row['hidden']}, batch {row['batch']}")
            for row in lstm
            if of_hidden(row["hidden"])
        ]
        lowest, at = min(found, default=(0.0, ""))
        targets.add(
            "10",
            f"LSTM, {name}",
            f">= {goal:.1f}",
            f"lowest {lowest:.2f} ({at})",
            lowest >= goal if found else None,
        )
