"""One linear layer: all candidates, each row of the table, each number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from dynquant.measurement.timing import Timing, interleave, sampler

from . import baselines, roofline

Row = tuple[int, int, int]  # M, K, N

ROWS: tuple[Row, ...] = (
    (1, 3, 3),
    (1, 768, 768),
    (1, 768, 3072),
    (1, 4096, 4096),
    (4, 768, 768),
    (8, 768, 3072),
    (16, 4096, 4096),
    (32, 768, 3072),
    (64, 384, 1536),
    (128, 768, 768),
    (128, 768, 3072),
    (128, 3072, 768),
    (512, 1024, 4096),
    (1024, 4096, 4096),
)


def layer_and_input(m: int, k: int, n: int) -> tuple[nn.Linear, torch.Tensor]:
    """An nn.Linear with normally distributed weights and input; the same values for the same M, K, N."""
    torch.manual_seed(m * 1_000_003 + k * 1009 + n)
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.normal_(std=k**-0.5)
    return linear.requires_grad_(False).eval(), torch.randn(m, k)


def measure(
    row: Row, threads: int, names: Sequence[str], *, isa: str | None, rounds: int, seconds: float
) -> dict[str, Any]:
    """Time the named candidates on one row, interleaved with the probes of the machine's limits.

    Returns:
        {"M", "K", "N", "threads", "limits": {"int8_gops", "read_gbs"},
        "fractions": {our name: {"int8", "read"}},
        "candidates": {name: {"us", "p10_us", "p90_us", "gops", "error", "samples"} or {"left_out": reason}}}
    """
    m, k, n = row
    linear, x = layer_and_input(m, k, n)
    expected = linear.double()(x.double())
    linear.float()
    torch.set_num_threads(threads)

    samplers: dict[str, Callable[[], float]] = {}
    candidates: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            call, error = baselines.prepare(name, linear, x, expected, threads)
        except baselines.Unavailable as reason:
            candidates[name] = {"left_out": str(reason)}
            continue
        candidates[name] = {"error": error}
        samplers[name] = sampler(call, threads=threads, seconds=seconds)
    for probe_isa in roofline.limiting_isas(isa):
        samplers[f"int8 {probe_isa}"] = roofline.int8_sampler(probe_isa, threads, seconds / 2)
    for pattern in roofline.read_patterns():
        samplers[f"read {pattern}"] = roofline.read_sampler(pattern, k * n, threads, seconds / 2)

    samples = interleave(samplers, rounds)
    limits = _limits(samples)
    fractions = {}
    for name, entry in candidates.items():
        if name in samples:
            timing = Timing(tuple(samples[name]))
            entry |= {
                "us": timing.median_us,
                "p10_us": timing.quantile_us(0.1),
                "p90_us": timing.quantile_us(0.9),
                "gops": 2 * m * k * n / timing.median_us / 1e3,
                "samples": len(timing.samples_us),
            }
            if name in baselines.OURS:
                fractions[name] = limits.fractions(m, k, n, timing.median_us)
    return {
        "M": m,
        "K": k,
        "N": n,
        "threads": threads,
        "candidates": candidates,
        "limits": {"int8_gops": limits.int8_gops, "read_gbs": limits.read_gbs},
        "fractions": fractions,
    }


def _limits(samples: dict[str, list[float]]) -> roofline.Limits:
    """Highest median of the int8 probes and highest median of the read probes."""

    def best(prefix: str) -> float | None:
        return max((median(s) for name, s in samples.items() if name.startswith(prefix)), default=None)

    return roofline.Limits(int8_gops=best("int8 "), read_gbs=best("read "))


def times(result: dict[str, Any]) -> dict[str, float]:
    """Median microseconds of the candidates that ran."""
    return {name: entry["us"] for name, entry in result["candidates"].items() if "us" in entry}


def best_of(result: dict[str, Any], names: Sequence[str]) -> tuple[str, float] | None:
    """The fastest of the named candidates and its microseconds."""
    ran = {name: us for name, us in times(result).items() if name in names}
    return min(ran.items(), key=lambda item: item[1]) if ran else None


def run(
    rows: Sequence[Row],
    threads: Sequence[int],
    names: Sequence[str],
    *,
    isa: str | None,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """:func:`measure` for every row and number of threads; ``log`` receives a line after each."""
    results = []
    for count in threads:
        for row in rows:
            result = measure(row, count, names, isa=isa, rounds=rounds, seconds=seconds)
            results.append(result)
            log(_line(result))
    return results


def _line(result: dict[str, Any]) -> str:
    shape = f"{result['M']}x{result['K']}x{result['N']}"
    columns = (f"{name} {us:.1f}" for name, us in times(result).items())
    return f"threads {result['threads']}  {shape:<16} µs: {', '.join(columns)}"
