"""Times calls on the card: CUDA events around replays of graphs, contenders in turns, medians.

A graph holds every call of a contender once or several times, each with other operands, so that what one call
leaves in L2 is gone before the next wants it; and no launch from Python is timed. On a CPU a plain loop takes
its place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .results import short

Call = Callable[[], object]
GRAPH_US = 1000.0  # a graph is made at least so long, by repeating its calls
MAX_CALLS = 2000  # of a graph
WARM_UP_S = 0.15


def measure(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float = 1.0, rounds: int = 15
) -> dict[str, dict[str, Any]]:
    """Median time of one call of each contender.

    Args:
        contenders: name to calls that do the same work on operands that differ.
        rounds: samples of each, taken in turns; fewer where ``seconds`` are over, at least 3.

    Returns:
        {name: {"us", "p10_us", "p90_us", "samples"} or {"left_out": why it cannot run}}
    """
    results: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Callable[[], float]] = {}
    for name, calls in contenders.items():
        try:
            samplers[name] = _sampler(calls, device)
        except Exception as error:
            results[name] = {"left_out": short(error)}
    busy_until = time.monotonic() + (WARM_UP_S if device.type == "cuda" else 0)  # clocks rise with the load
    while samplers and time.monotonic() < busy_until:
        for sample in samplers.values():
            sample()
    results |= _medians(samplers, rounds, seconds)
    return {name: results[name] for name in contenders}


def host_us(
    contenders: Mapping[str, Call], device: torch.device, *, rounds: int = 9, calls: int = 200
) -> dict[str, dict[str, Any]]:
    """Median time of one eager call as the caller waits for it: ``calls`` in a row, then the card."""

    def sampler(call: Call) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return (time.perf_counter() - start) * 1e6 / calls

        sample()
        return sample

    return _medians({name: sampler(call) for name, call in contenders.items()}, rounds, 10.0)


def _medians(
    samplers: Mapping[str, Callable[[], float]], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names, deadline = list(samplers), time.monotonic() + seconds
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() > deadline:
            break
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            samples[name].append(samplers[name]())
    return {
        name: {
            "us": statistics.median(values),
            "p10_us": sorted(values)[len(values) // 10],
            "p90_us": sorted(values)[(9 * len(values)) // 10],
            "samples": len(values),
        }
        for name, values in samples.items()
    }


def _sampler(calls: Sequence[Call], device: torch.device) -> Callable[[], float]:
    """A function that times the calls once and returns the microseconds of one."""
    if device.type != "cuda":
        return lambda: _loop_us(calls)
    once = _graph(calls, 1, device)
    elapsed = min(_replay_us(once) for _ in range(3))
    repeats = max(1, min(round(GRAPH_US / max(elapsed, 1.0)), MAX_CALLS // len(calls)))
    graph = once if repeats == 1 else _graph(calls, repeats, device)
    _replay_us(graph)
    return lambda: _replay_us(graph) / (repeats * len(calls))


def _graph(calls: Sequence[Call], repeats: int, device: torch.device) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def _loop_us(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6 / len(calls)
