"""Attention alone: int8 beside torch's scaled_dot_product_attention in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dynquant import ops  # noqa: F401  registers torch.ops.dynquant
from dynquant.measurement.timing import compare

SHAPES = ((8, 12, 128, 32), (8, 12, 512, 32), (8, 12, 197, 64), (1, 12, 128, 64))
"""B, H, S, D."""

MAX_RELATIVE_ERROR = 0.1


def _measure(
    shape: tuple[int, int, int, int], padded: bool, threads: int, rounds: int, seconds: float
) -> dict[str, Any]:
    batch, heads, tokens, size = shape
    torch.manual_seed(0)
    # Views of one product, as in a merged projection.
    q, k, v = torch.randn(batch, tokens, 3 * heads, size).transpose(1, 2).split(heads, 1)
    mask = None
    if padded:
        lengths = torch.linspace(tokens // 4, tokens, batch).round().to(torch.int64)
        mask = (torch.arange(tokens) < lengths[:, None])[:, None, None, :]
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "torch": partial(F.scaled_dot_product_attention, q, k, v, mask),
        "dynquant": partial(torch.ops.dynquant.attention, q, k, v, mask),
    }
    expected, got = (call() for call in calls.values())
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < MAX_RELATIVE_ERROR:
        raise AssertionError(f"attention is wrong at {shape}, relative error {error:.3g}")
    times = compare(calls, threads=threads, rounds=rounds, seconds=seconds)
    return {
        "shape": list(shape),
        "padded": padded,
        "threads": threads,
        "us": {name: timing.median_us for name, timing in times.items()},
        "error": error,
    }


def run(
    threads: Sequence[int],
    *,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
) -> list[dict[str, Any]]:
    """[{"shape": [B, H, S, D], "padded", "threads", "us": {"torch", "dynquant"}, "error"}]; the error is
    relative, of the output in int8 to that in float."""
    results = []
    for count in threads:
        for shape in shapes:
            for padded in (False, True):
                results.append(_measure(shape, padded, count, rounds, seconds))
        log(f"threads {count}  attention done")
    return results
