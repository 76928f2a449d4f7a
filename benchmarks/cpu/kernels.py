"""Each op alone: min/max and quantize in GB/s, the integer product in GOPS, packing in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

import dynquant
from dynquant.measurement.timing import Timing, interleave, sampler

from . import roofline
from .linear import layer_and_input

ACTIVATIONS = ((1, 768), (1, 4096), (128, 768), (512, 1024), (1024, 4096))  # M, K
PRODUCTS = ((1, 4096, 4096), (32, 768, 3072), (128, 768, 3072), (512, 1024, 4096))  # M, K, N
WEIGHTS = ((768, 768), (768, 3072), (4096, 4096))  # K, N


def _timed(
    calls: dict[str, Callable[[], object]],
    probes: dict[str, Callable[[], float]],
    threads: int,
    rounds: int,
    seconds: float,
) -> tuple[dict[str, float], float | None]:
    """Median microseconds of each call and the highest median of the probes, all interleaved."""
    for call in calls.values():
        call()
    samplers = {name: sampler(call, threads=threads, seconds=seconds) for name, call in calls.items()}
    samples = interleave(samplers | probes, rounds)
    limit = max((median(samples[name]) for name in probes), default=None)
    return {name: Timing(tuple(samples[name])).median_us for name in calls}, limit


def _activation_ops(m: int, k: int, threads: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """fp32 [m, k]: counts bytes read and written once; the limit is the best read probe at the size of x."""
    ops = torch.ops.dynquant
    x = torch.randn(m, k)
    calls: dict[str, Callable[[], object]] = {}
    bytes_moved = {}
    for name, per_token in (("per_token", True), ("per_tensor", False)):
        qparams = ops.choose_qparams(*ops.min_max(x, per_token))
        calls[f"min_max {name}"] = partial(ops.min_max, x, per_token)
        calls[f"quantize {name}"] = partial(ops.quantize, x, *qparams)
        bytes_moved[f"min_max {name}"] = 4 * m * k
        bytes_moved[f"quantize {name}"] = 5 * m * k
    probes = {
        pattern: roofline.read_sampler(pattern, 4 * m * k, threads, seconds / 2)
        for pattern in roofline.read_patterns()
    }
    times, limit = _timed(calls, probes, threads, rounds, seconds)
    return [
        {
            "op": name,
            "shape": [m, k],
            "threads": threads,
            "us": us,
            "rate": bytes_moved[name] / us / 1e3,
            "unit": "GB/s",
            "limit": limit,
        }
        for name, us in times.items()
    ]


def _product(
    row: tuple[int, int, int], isa: str | None, threads: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """int8_mm alone; the limit is the int8 peak."""
    m, k, n = row
    ops = torch.ops.dynquant
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    packed = ops.pack_weight(weight)
    if not torch.equal(ops.int8_mm(q, *packed).double(), q.double() @ weight.double().T):
        raise AssertionError(f"int8_mm is wrong at M = {m}, K = {k}, N = {n}")
    probes = {p: roofline.int8_sampler(p, threads, seconds / 2) for p in roofline.limiting_isas(isa)}
    times, limit = _timed({"int8_mm": partial(ops.int8_mm, q, *packed)}, probes, threads, rounds, seconds)
    us = times["int8_mm"]
    return {
        "op": "int8_mm",
        "shape": list(row),
        "threads": threads,
        "us": us,
        "rate": 2 * m * k * n / us / 1e3,
        "unit": "GOPS",
        "limit": limit,
    }


def _packing(k: int, n: int, threads: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """From the float layer to a QLinear, and the two ops inside; counts bytes read and written once."""
    linear, _ = layer_and_input(1, k, n)
    weight = linear.weight.detach()
    code = dynquant.Config().encode()
    int8, _ = torch.ops.dynquant.quantize_weight(weight, code)
    calls: dict[str, Callable[[], object]] = {
        "QLinear.from_float": partial(dynquant.QLinear.from_float, linear),
        "quantize_weight": partial(torch.ops.dynquant.quantize_weight, weight, code),
        "pack_weight": partial(torch.ops.dynquant.pack_weight, int8),
    }
    bytes_moved = {"QLinear.from_float": 5 * k * n, "quantize_weight": 5 * k * n, "pack_weight": 2 * k * n}
    times, _ = _timed(calls, {}, threads, rounds, seconds)
    return [
        {
            "op": name,
            "shape": [n, k],
            "threads": threads,
            "us": us,
            "rate": bytes_moved[name] / us / 1e3,
            "unit": "GB/s",
            "limit": None,
        }
        for name, us in times.items()
    ]


def run(
    threads: Sequence[int],
    *,
    isa: str | None,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
    largest: int | None = None,
) -> list[dict[str, Any]]:
    """All ops. ``largest`` leaves out shapes with more elements in a matrix."""
    fits = (lambda size: True) if largest is None else (lambda size: size <= largest)
    results: list[dict[str, Any]] = []
    for count in threads:
        for m, k in ACTIVATIONS:
            if fits(m * k):
                results += _activation_ops(m, k, count, rounds, seconds)
        for row in PRODUCTS:
            if fits(row[1] * row[2]):
                results.append(_product(row, isa, count, rounds, seconds))
        for k, n in WEIGHTS:
            if fits(k * n):
                results += _packing(k, n, count, rounds, seconds)
        log(f"threads {count}  kernels done")
    return results
