"""Calls on a contended machine: one spinning process per core, torch at several threads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dynquant.measurement.timing import Timing, compare, interleave

from . import baselines
from .linear import Row, layer_and_input

ROWS: tuple[Row, ...] = ((1, 3, 3), (1, 768, 768), (8, 768, 3072), (32, 768, 3072), (128, 768, 768))
CANDIDATES = (
    "dynquant per_token",
    "dynquant per_tensor",
    "fp32",
    "torch.ao x86",
    "torch.ao onednn",
    "onnxruntime",
)

# Exits once its parent process is gone.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100000))\n"


@contextlib.contextmanager
def spinning_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``count`` processes that compute without pause."""
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _samples(call: Callable[[], object], seconds: float) -> tuple[list[float], float]:
    """Microseconds of single calls during about ``seconds``, and the mean number of cores in use."""
    samples = []
    with torch.inference_mode():
        call()
        end = time.perf_counter() + seconds
        start, used = time.perf_counter(), time.process_time()
        while (now := time.perf_counter()) < end:
            call()
            samples.append((time.perf_counter() - now) * 1e6)
        cores = (time.process_time() - used) / (time.perf_counter() - start)
    return samples, cores


def _measure(
    calls: dict[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Interleaved, because the cores that this process gets change within a second."""
    samplers = {name: partial(_samples, call, seconds) for name, call in calls.items()}
    results = {}
    for name, turns in interleave(samplers, rounds).items():
        timing = Timing(tuple(us for samples, _ in turns for us in samples))
        results[name] = {
            "us": timing.median_us,
            "p90_us": timing.quantile_us(0.9),
            "cores": max(cores for _, cores in turns),
        }
    return results


def run(
    rows: Sequence[Row],
    names: Sequence[str],
    *,
    threads: int,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Median and p90 of each candidate, alone and with one spinning process on each core.

    Returns:
        {"threads", "spinning", "rows": [{"M", "K", "N", "quiet": {name: {"us", "p90_us", "cores"}},
        "contended": as "quiet", "one_thread_us": {our name: alone, on one thread},
        "left_out": {name: reason}}]}
    """
    spinning = len(os.sched_getaffinity(0))
    results = []
    for row in rows:
        torch.set_num_threads(threads)
        linear, x = layer_and_input(*row)
        expected = linear.double()(x.double())
        linear.float()
        calls: dict[str, Callable[[], object]] = {}
        left_out = {}
        for name in names:
            try:
                calls[name], _ = baselines.prepare(name, linear, x, expected, threads)
            except baselines.Unavailable as reason:
                left_out[name] = str(reason)
        ours = {name: call for name, call in calls.items() if name in baselines.OURS}
        one_thread = compare(ours, threads=1, rounds=5, seconds=seconds)
        torch.set_num_threads(threads)
        quiet = _measure(calls, rounds, seconds)
        with spinning_processes(spinning):
            contended = _measure(calls, rounds, seconds)
        results.append(
            {
                "M": row[0],
                "K": row[1],
                "N": row[2],
                "quiet": quiet,
                "contended": contended,
                "one_thread_us": {name: timing.median_us for name, timing in one_thread.items()},
                "left_out": left_out,
            }
        )
        columns = (f"{name} {contended[name]['us']:.0f}/{contended[name]['p90_us']:.0f}" for name in calls)
        log(f"contention  {row[0]}x{row[1]}x{row[2]}  median/p90 µs: {', '.join(columns)}")
    return {"threads": threads, "spinning": spinning, "rows": results}
