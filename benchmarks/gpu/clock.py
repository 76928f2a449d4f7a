"""Times calls on the card: medians of CUDA events around replays of graphs, candidates interleaved.

A graph holds every call of a candidate once or several times, each with its own operands, so that no call
finds its operands in L2, and no launch from Python is timed. On a CPU a plain loop replaces the graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .results import short

Call = Callable[[], object]
GRAPH_US = 1000.0  # minimal length of a graph, reached by repeating its calls
MAX_CALLS = 2000  # of a graph
WARM_UP_S = 0.15


def measure(
    candidates: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float = 1.0, rounds: int = 15
) -> dict[str, dict[str, Any]]:
    """Median time of one call of each candidate.

    Args:
        candidates: name to calls that do the same work, each on its own operands.
        rounds: samples of each, interleaved; fewer after ``seconds``, but at least 3.

    Returns:
        {name: {"us", "p10_us", "p90_us", "samples"} or {"left_out": reason}}
    """
    results: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Callable[[], float]] = {}
    for name, calls in candidates.items():
        try:
            samplers[name] = _sampler(calls, device)
        except Exception as error:
            results[name] = {"left_out": short(error)}
    warm_until = time.monotonic() + (WARM_UP_S if device.type == "cuda" else 0)  # clocks rise under load
    while samplers and time.monotonic() < warm_until:
        for sample in samplers.values():
            sample()
    results |= _medians(samplers, rounds, seconds)
    return {name: results[name] for name in candidates}


def host_us(
    candidates: Mapping[str, Call], device: torch.device, *, rounds: int = 9, calls: int = 200
) -> dict[str, dict[str, Any]]:
    """Median wall-clock time of one eager call: ``calls`` in a row, then a synchronization."""

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

    return _medians({name: sampler(call) for name, call in candidates.items()}, rounds, 10.0)


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
    """A function that times one pass over the calls and returns microseconds per call."""
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
