"""Observers: they record the values of a layer's inputs and choose the range to quantize."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

OBSERVERS = ("min_max", "percentile", "mse")


class Observer(ABC):
    """Tracks the smallest and the largest value of all batches; a subclass chooses the range."""

    def __init__(self) -> None:
        self.lo = self.hi = 0.0
        self.batches = 0

    def observe(self, x: Tensor) -> bool:
        """Record a batch of any shape and float dtype; False, and nothing recorded, if it is not finite."""
        # Batches come in any mode, and what is kept of one is written to in the next.
        with torch.inference_mode(False), torch.no_grad():
            lo, hi = (end.item() for end in torch.ops.dynquant.min_max(x, False))
            if not (math.isfinite(lo) and math.isfinite(hi)):
                return False
            self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
            self.batches += 1
            self.record(x)
        return True

    def range(self) -> tuple[float, float] | None:
        """lo <= 0 <= hi, or None if there was no batch."""
        return self.choose() if self.batches else None

    @abstractmethod
    def record(self, x: Tensor) -> None:
        """Record a finite batch."""

    @abstractmethod
    def choose(self) -> tuple[float, float]:
        """The range to quantize."""


class MinMax(Observer):
    """The whole range of the values."""

    def record(self, x: Tensor) -> None:
        pass

    def choose(self) -> tuple[float, float]:
        return self.lo, self.hi


class Histogram(Observer):
    """Counts over [-limit, limit], limit a power of two: as it doubles, each two bins become one, exactly."""

    bins = 8192

    @torch.inference_mode(False)
    def __init__(self) -> None:
        super().__init__()
        self.limit = 0.0
        self.counts = torch.zeros(self.bins, dtype=torch.float64, device="cpu")

    def record(self, x: Tensor) -> None:
        largest = max(-self.lo, self.hi)
        if largest > self.limit:
            self._widen(2.0 ** math.ceil(math.log2(largest)))
        if self.limit:
            values = x.flatten().to(torch.float64)
            index = ((values / self.limit + 1.0) * (self.bins / 2)).floor().clamp(0, self.bins - 1)
            self.counts += index.long().bincount(minlength=self.bins).cpu()
        else:
            self.counts[self.bins // 2] += x.numel()

    def _widen(self, limit: float) -> None:
        if self.limit == 0.0:  # only zeros so far, counted in the bin that starts at 0
            self.limit = limit
        while self.limit < limit:
            half = self.counts.reshape(-1, 2).sum(1)
            edge = self.bins // 4
            self.counts = torch.zeros_like(self.counts)
            self.counts[edge : edge + self.bins // 2] = half
            self.limit *= 2

    def edges(self) -> Tensor:
        """fp64 [bins + 1]."""
        return torch.linspace(-self.limit, self.limit, self.bins + 1, dtype=torch.float64, device="cpu")


class Percentile(Histogram):
    """The range of ``percentile`` percent of the values; half of the others are cut off at each end."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.outside = (1 - percentile / 100) / 2

    def choose(self) -> tuple[float, float]:
        if self.outside == 0.0 or self.limit == 0.0:
            return self.lo, self.hi
        below = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        cut = self.outside * below[-1]
        edges = self.edges()
        lo = edges[(below <= cut).nonzero().max()].item()
        hi = edges[(below >= below[-1] - cut).nonzero().min()].item()
        return min(max(lo, self.lo), 0.0), max(min(hi, self.hi), 0.0)


class Mse(Histogram):
    """The range whose 256 steps have the smallest squared error of the values: first both ends are drawn in
    together, then each by itself."""

    shares = torch.linspace(1.0, 0.02, 50, dtype=torch.float64, device="cpu")

    def choose(self) -> tuple[float, float]:
        if self.limit == 0.0:
            return self.lo, self.hi
        edges, filled = self.edges(), self.counts > 0
        values, counts = ((edges[1:] + edges[:-1]) / 2)[filled], self.counts[filled]
        low = high = 1.0
        for draw_low, draw_high in ((True, True), (True, False), (False, True)):
            lows = low * self.shares if draw_low else torch.full_like(self.shares, low)
            highs = high * self.shares if draw_high else torch.full_like(self.shares, high)
            errors = _squared_errors(values, counts, self.lo * lows, self.hi * highs)
            best = int(errors.argmin())
            low, high = lows[best].item(), highs[best].item()
        return self.lo * low, self.hi * high


def _squared_errors(values: Tensor, counts: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """fp64 [candidates]: squared error of ``values`` quantized to each [lo, hi], weighted by ``counts``."""
    scale = ((hi - lo) / 255).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    zero_point = (-128 - lo[:, None] / scale).round()
    steps = ((values / scale).round() + zero_point).clamp(-128, 127) - zero_point
    return ((steps * scale - values) ** 2 * counts).sum(1)


def make_observer(name: str, percentile: float) -> Observer:
    """A new observer by its name in OBSERVERS."""
    if name == "percentile":
        return Percentile(percentile)
    return Mse() if name == "mse" else MinMax()
