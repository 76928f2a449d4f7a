"""Times of calls beside each other: interleaved samples, medians, no thread of one running during another."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import threading
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

LONG_SECONDS = 0.2
SLOW_SECONDS = 4.0


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory from now on, as tcmalloc and jemalloc do; for programs that measure time.

    Depending on its history glibc returns freed buffers of a megabyte to the system or keeps them. If it
    returns them, the system clears pages for the output of each large layer, whichever version computes it.
    Allocator history, not speed, would decide the ranking.

    Returns:
        Whether the C library has this setting (glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mmap_threshold, trim_threshold = -3, -1  # malloc.h's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    highest_mmap_threshold = 32 << 20
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = torch.iinfo(torch.int32).max
    return bool(mallopt(mmap_threshold, highest_mmap_threshold) and mallopt(trim_threshold, never))


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


def wait_for_idle_threads(limit_seconds: float = 0.1) -> None:
    """Wait until no other thread of this process runs.

    A thread pool spins for milliseconds (OpenMP's) or tens of them (ONNX Runtime's) after a parallel call,
    and would take a core from the next timed call. On systems without ``/proc`` there is no wait.
    """
    deadline = time.monotonic() + limit_seconds
    while _other_threads_run() and time.monotonic() < deadline:
        time.sleep(0.001)


def _other_threads_run() -> bool:
    """Whether another thread of this process is running.

    By their states, which are current; the system updates other threads' processor time only every few
    milliseconds.
    """
    own = str(threading.get_native_id())
    for folder in Path("/proc/self/task").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state == "R" and folder.name != own:
                return True
    return False


def interleave(samplers: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """``rounds`` samples of each sampler, in rounds that start at one sampler after the other.

    Slow changes (clock frequency, other load on the machine) affect all samplers alike.
    """
    names = list(samplers)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            wait_for_idle_threads()
            samples[name].append(samplers[name]())
    return samples


def sampler(call: Callable[[], object], *, threads: int, seconds: float) -> Callable[[], float]:
    """A function that times ``call`` for about ``seconds`` and returns the mean in microseconds.

    ``call`` must have run before, so that its one-time work is done. Above ``LONG_SECONDS`` a sample is one
    call without warm-up; above ``SLOW_SECONDS`` the one sample is a call that is timed here.
    """
    torch.set_num_threads(threads)
    once = _seconds(call)
    if once > SLOW_SECONDS:
        return lambda: once * 1e6
    if once < 0.01:
        once = min(_seconds(call) for _ in range(3))
    timer = timeit.Timer("call()", timer=_now, globals={"call": call})
    number = max(1, round(seconds / once))

    def sample() -> float:
        torch.set_num_threads(threads)
        if once > LONG_SECONDS:
            return _seconds(call) * 1e6
        with torch.inference_mode():
            timer.timeit(max(number // 100, 2))  # warm caches and threads again after the other samplers
            return timer.timeit(number) / number * 1e6

    return sample


def _now() -> float:
    """Seconds, after the accelerator's queued work. As the timer of torch.utils.benchmark, whose import needs
    setuptools and more time than all of dynquant."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return timeit.default_timer()


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
        samples = interleave(samplers, rounds)
    finally:
        torch.set_num_threads(before)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
