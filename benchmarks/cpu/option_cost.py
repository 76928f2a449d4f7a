"""Extra time per call of the rotation and of each epilogue, beside torch's function after the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dynquant
from dynquant.measurement.timing import compare

from .linear import Row, layer_and_input

ROWS: tuple[Row, ...] = (
    (1, 768, 768),
    (1, 768, 3072),
    (16, 768, 768),
    (16, 768, 3072),
    (128, 384, 1536),
    (128, 768, 3072),
)
EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def _row(row: Row, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians in microseconds: the plain layer, the extra time of each option, torch's functions alone."""
    m, k, n = row
    linear, x = layer_and_input(m, k, n)
    plain = dynquant.QLinear.from_float(linear)
    calls: dict[str, Callable[[], object]] = {
        "plain": partial(plain, x),
        "rotation": partial(dynquant.QLinear.from_float(linear, rotation="hadamard"), x),
    }
    with torch.inference_mode():
        y = plain(x)
        for name, function in EPILOGUES.items():
            fused = dynquant.QLinear.from_float(linear, epilogue=name)
            # Against float64: torch's own fp32 gelu is off by 1e-6 where the CPU has AVX-512.
            if not torch.allclose(fused(x).double(), function(y.double()), rtol=2**-18, atol=2**-26):
                raise AssertionError(f"epilogue {name} is wrong at M = {m}, K = {k}, N = {n}")
            calls[name] = partial(fused, x)
            calls[f"torch {name}"] = partial(function, y)
    times = compare(calls, threads=threads, rounds=3 * rounds, seconds=seconds / 2)

    def extra_us(name: str) -> float:
        """Median of the differences within a round, in which other load slows both calls alike."""
        pairs = zip(times[name].samples_us, times["plain"].samples_us, strict=True)
        return median(with_option - plain for with_option, plain in pairs)

    return {
        "M": m,
        "K": k,
        "N": n,
        "threads": threads,
        "plain_us": times["plain"].median_us,
        "rotation_us": extra_us("rotation"),
        "epilogues": {
            name: {"us": extra_us(name), "torch_us": times[f"torch {name}"].median_us} for name in EPILOGUES
        },
    }


def run(
    rows: Sequence[Row], *, rounds: int, seconds: float, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One entry per row, 1 thread."""
    results = []
    for row in rows:
        results.append(_row(row, 1, rounds, seconds))
        log(f"{'x'.join(map(str, row))} options done")
    return results
