"""This machine's limits, from the probes of csrc/probes, and the fraction of them that a call reaches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from . import probes


def int8_isas() -> list[str]:
    """ISAs with an int8 probe on this machine; empty where there is no compiler."""
    loaded = probes.load()
    return [] if loaded is None else loaded.isas


def read_patterns() -> list[str]:
    """Names of the read probes; empty where there is no compiler."""
    loaded = probes.load()
    return [] if loaded is None else loaded.read_patterns


def limiting_isas(forced: str | None) -> list[str]:
    """ISAs whose int8 peaks bound a kernel: all of this machine, or the forced one."""
    return [isa for isa in int8_isas() if forced is None or isa == forced]


def _all_threads(probe: Callable[[], float], threads: int) -> float:
    """Sum of the probe on ``threads`` threads at once; it releases the GIL."""
    if threads == 1:
        return probe()
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: probe(), range(threads)))


def int8_sampler(isa: str, threads: int, seconds: float) -> Callable[[], float]:
    """A function that measures the int8 peak in GOPS."""
    loaded = probes.load()
    assert loaded is not None
    return lambda: _all_threads(lambda: loaded.int8(isa, seconds), threads)


def read_sampler(pattern: str, size: int, threads: int, seconds: float) -> Callable[[], float]:
    """A function that measures the read bandwidth in GB/s, the ``size`` bytes divided among the threads."""
    loaded = probes.load()
    assert loaded is not None
    return lambda: _all_threads(lambda: loaded.read(pattern, max(size // threads, 1), seconds), threads)


def peaks(threads: int, seconds: float = 0.1) -> dict[str, float]:
    """int8 GOPS by ISA and fp32 GFLOPS, for the head of a report."""
    loaded = probes.load()
    if loaded is None:
        return {}
    result = {f"int8 {isa} GOPS": int8_sampler(isa, threads, seconds)() for isa in int8_isas()}
    result["fp32 FMA GFLOPS"] = _all_threads(lambda: loaded.fp32(seconds), threads)
    return result


@dataclass(frozen=True)
class Limits:
    """Measured upper bounds for a call."""

    int8_gops: float | None
    read_gbs: float | None  # at the size of the weight

    def fractions(self, m: int, k: int, n: int, us: float) -> dict[str, float]:
        """Fraction of each limit that a call of ``us`` microseconds reaches; reading is capped at 1.

        "int8" counts 2*M*K*N operations, "read" the K*N bytes of the weight once. A kernel that reads faster
        than the probes shows that these are not the limit, hence the cap.
        """
        fractions = {}
        if self.int8_gops:
            fractions["int8"] = 2 * m * k * n / us / 1e3 / self.int8_gops
        if self.read_gbs:
            fractions["read"] = min(k * n / us / 1e3 / self.read_gbs, 1.0)
        return fractions
