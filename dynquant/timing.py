"""Times calls against each other fairly: taken in turns, medians, no thread of one running during another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

LONG_SECONDS = 0.2
SLOW_SECONDS = 4.0


@dataclass(frozen=True)
class Timing:
    """Samples of one call, in microseconds."""

    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    def quantile_us(self, fraction: float) -> float:
        """The sample below which ``fraction`` (0 to 1) of the samples lie."""
        ordered = sorted(self.samples_us)
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]


def settle(limit_seconds: float = 0.1) -> None:
    """Wait until no thread of this process spins any more.

    A thread pool (OpenMP's, ONNX Runtime's) spins for milliseconds after a parallel call, and would take a
    core from whatever is timed next.
    """
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        before = time.process_time_ns()
        time.sleep(0.001)
        if time.process_time_ns() - before < 300_000:
            return


def take_turns(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each sampler, one round after the other, each round from another starting place.

    What changes slowly (clock frequency, neighbours on the machine) so meets all of them alike.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            settle()
            samples[name].append(samplers[name]())
    return samples


def sampler(call: Callable[[], object], *, threads: int, seconds: float) -> Callable[[], float]:
    """A function that times ``call`` for about ``seconds`` and returns the mean in microseconds.

    ``call`` has run before: what it does once only is done. From ``LONG_SECONDS`` on a sample is one call
    without warming up; from ``SLOW_SECONDS`` on the call is measured once, here, and that is its sample.
    """
    torch.set_num_threads(threads)
    once = _seconds(call)
    if once > SLOW_SECONDS:
        return lambda: once * 1e6
    if once < 0.01:
        once = min(_seconds(call) for _ in range(3))
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    number = max(1, round(seconds / once))

    def sample() -> float:
        torch.set_num_threads(threads)
        if once > LONG_SECONDS:
            return _seconds(call) * 1e6
        with torch.inference_mode():
            return timer.timeit(number).mean * 1e6

    return sample


def _seconds(call: Callable[[], object]) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def compare(
    calls: Mapping[str, Callable[[], object]], *, threads: int, rounds: int = 7, seconds: float = 0.02
) -> dict[str, Timing]:
    """Median time of each call, under ``torch.inference_mode`` with ``threads`` threads.

    Args:
        calls: name to function without arguments; each is called once before anything is timed.
        rounds: samples of each call; ``seconds``: length of a sample.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for call in calls.values():
            with torch.inference_mode():
                call()
        samplers = {name: sampler(call, threads=threads, seconds=seconds) for name, call in calls.items()}
        samples = take_turns(samplers, rounds)
    finally:
        torch.set_num_threads(before)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
