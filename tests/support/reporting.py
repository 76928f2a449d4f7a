"""Code shared by the tests of the report and of the guard; conftest.py registers the fixtures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynquant import Report, quantize_dynamic
from dynquant.measurement import layers as measure
from dynquant.measurement.timing import Timing
from dynquant.patterns.registry import PATTERNS, SharedInput

X = torch.linspace(-2, 3, 60).reshape(5, 12)


def reported(model: nn.Module, sample: Any = X, **options: Any) -> tuple[nn.Module, Report]:
    quantized, report = quantize_dynamic(model, sample=sample, report=True, **options)
    assert isinstance(report, Report)
    return quantized, report


def names(report: Report) -> list[str]:
    return [layer.name for layer in report.layers]


def reasons(report: Report) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.skipped}


def decibels(expected: Tensor, actual: Tensor) -> float:
    expected, actual = expected.detach().double(), actual.detach().double()
    return 10 * math.log10(expected.square().sum() / (expected - actual).square().sum())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(12, 64), nn.Linear(12, 64), nn.Linear(12, 128)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return torch.cat([self.q(x).mean(0), self.k(memory).mean(0), self.v(memory).mean(0)])


@pytest.fixture
def quick_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real times of short samples; no test asserts a duration."""
    for name in ("LAYER_SECONDS", "MODEL_SECONDS"):
        monkeypatch.setattr(measure, name, 1e-5)
    for name in ("LAYER_ROUNDS", "SLOW_LAYER_ROUNDS", "MODEL_ROUNDS"):
        monkeypatch.setattr(measure, name, 1)
    monkeypatch.setattr("dynquant.measurement.timing.wait_for_idle_threads", lambda: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], float]], list[tuple[int, int]]]:
    """Sets the time of an int8 layer, by the (M, N) of its output; the float layer takes 100 µs."""

    def set_clock(us_int8: Callable[[int, int], float]) -> list[tuple[int, int]]:
        timed: list[tuple[int, int]] = []

        def compare(calls: Mapping[str, Callable[[], object]], **options: Any) -> dict[str, Timing]:
            y = calls["float"]()
            if not isinstance(y, Tensor):  # the whole model
                return {name: Timing((1000.0,)) for name in calls}
            shape = (y.numel() // y.shape[-1], y.shape[-1])
            timed.append(shape)
            times = {"float": 100.0, "int8": us_int8(*shape)}
            return {name: Timing((times[name],)) for name in calls}

        monkeypatch.setattr(measure, "compare", compare)
        return timed

    return set_clock


@pytest.fixture
def shared_attention() -> Iterator[Attention]:
    name = f"{Attention.__module__}.{Attention.__qualname__}"
    PATTERNS[name] = [SharedInput(("q", "k", "v"))]
    yield Attention()
    del PATTERNS[name]
