"""This machine's limits, from the probes in the extension, and how much of them a time uses."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

from dynquant import _extension


def _probes() -> ModuleType | None:
    return _extension.extension


def int8_isas() -> list[str]:
    """ISAs whose int8 limit can be measured here; empty without the extension."""
    probes = _probes()
    return [] if probes is None else list(probes.probe_isas())


def read_patterns() -> list[str]:
    """Names of the read probes; empty without the extension."""
    probes = _probes()
    return [] if probes is None else list(probes.probe_read_patterns())


def limiting_isas(forced: str | None) -> list[str]:
    """Whose int8 peaks bound a kernel: those of every ISA here, or of the one that is forced."""
    return [isa for isa in int8_isas() if forced is None or isa == forced]


def _all_threads(probe: Callable[[], float], threads: int) -> float:
    """The probe on ``threads`` threads at once (it releases the GIL), added up."""
    if threads == 1:
        return probe()
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: probe(), range(threads)))


def int8_sampler(isa: str, threads: int, seconds: float) -> Callable[[], float]:
    """A function that measures the int8 peak in GOPS."""
    probes = _probes()
    assert probes is not None
    return lambda: _all_threads(lambda: probes.probe_int8(isa, seconds), threads)


def read_sampler(pattern: str, size: int, threads: int, seconds: float) -> Callable[[], float]:
    """A function that measures the read bandwidth in GB/s, the ``size`` bytes divided among the threads."""
    probes = _probes()
    assert probes is not None
    return lambda: _all_threads(lambda: probes.probe_read(pattern, max(size // threads, 1), seconds), threads)


def peaks(threads: int, seconds: float = 0.1) -> dict[str, float]:
    """int8 GOPS by ISA and fp32 GFLOPS, for the head of a report."""
    probes = _probes()
    if probes is None:
        return {}
    result = {f"int8 {isa} GOPS": int8_sampler(isa, threads, seconds)() for isa in int8_isas()}
    result["fp32 FMA GFLOPS"] = _all_threads(lambda: probes.probe_fp32(seconds), threads)
    return result


@dataclass(frozen=True)
class Limits:
    """Measured limits that a call of some M, K, N cannot pass."""

    int8_gops: float | None
    read_gbs: float | None  # at the size of the weight

    def fractions(self, m: int, k: int, n: int, us: float) -> dict[str, float]:
        """What share of each limit a call of ``us`` microseconds uses; reading is capped at 1.

        The int8 share counts 2*M*K*N operations, the read share the K*N bytes of the weight once. A kernel
        that reads faster than the probes raises the limit instead of passing it.
        """
        shares = {}
        if self.int8_gops:
            shares["int8"] = 2 * m * k * n / us / 1e3 / self.int8_gops
        if self.read_gbs:
            shares["read"] = min(k * n / us / 1e3 / self.read_gbs, 1.0)
        return shares
