"""The guard: its choice of float layers, and the resulting model."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from torch import nn

import dynquant
from dynquant import Config, QLinear, quantize_dynamic
from dynquant.nn.fused_activation import FusedActivation
from dynquant.nn.merged import MergedLinear
from tests.support.nets import assert_unchanged, converted, net, state
from tests.support.reporting import X, names, reasons, reported
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("quick_measuring")


def test_layers_that_would_be_slower_stay_float(clock) -> None:
    clock(lambda m, n: 200.0 if n == 4 else 50.0)
    model = net()
    quantized, report = reported(model, min_speedup=1.0)
    assert converted(quantized) == ["fc1", "block.0", "block.2"]
    assert type(quantized.head) is nn.Linear
    assert not quantized.training
    assert reasons(report) == {
        "head": "in int8 it takes 200.0 µs a call, in float 100.0 µs: 0.50 times as fast, below min_speedup=1"
    }
    assert names(report) == ["fc1", "block.0", "block.2"]
    assert all(layer.speedup == 2.0 for layer in report.layers)
    assert_same_bits(quantized(X), quantize_dynamic(model, {"fc1", "block"})(X))
    assert converted(quantize_dynamic(model, sample=X, min_speedup=2.5)) == []
    assert converted(quantize_dynamic(model, sample=X, min_speedup=0.5)) == converted(quantize_dynamic(model))


def test_a_layer_that_looks_slow_once_is_timed_again(clock) -> None:
    timed = clock(lambda m, n: 200.0 if n == 4 and timed.count((5, 4)) == 1 else 50.0)
    quantized, report = reported(net(), min_speedup=1.0)
    assert timed == [(5, 16), (5, 16), (5, 16), (5, 4), (5, 4)]
    assert len(converted(quantized)) == 4
    assert report.layers[3].us_int8 == 50.0


def test_without_min_speedup_nothing_is_timed(clock) -> None:
    timed = clock(lambda m, n: 200.0)
    quantize_dynamic(net(), sample=X, min_sqnr=1.0)
    assert timed == []


def test_layers_that_would_be_inexact_stay_float() -> None:
    model = net()
    with torch.no_grad():
        model.block[0].weight[:, 0] *= 1e4  # one column outweighs all others, which quantize to 0 ...
        model.norm.weight[0] = 0  # ... and its own input is 0
        model.norm.bias[0] = 0
    quantized, report = reported(model, min_sqnr=20.0)
    assert converted(quantized) == ["fc1", "block.2", "head"]
    assert reasons(report)["block.0"].startswith("its int8 output has an SQNR of ")
    assert reasons(report)["block.0"].endswith(" dB, below min_sqnr=20")
    assert min(layer.sqnr_db for layer in report.layers) >= 20
    unguarded = reported(model)[1]
    assert unguarded.layers[1].sqnr_db < 20


@pytest.mark.parametrize("options", [{}, {"min_speedup": 0, "min_sqnr": -1000}])
def test_in_place(options: dict[str, float]) -> None:
    model, sample = net(), X
    untouched = copy.deepcopy(model)
    norm = model.norm
    result, report = reported(model, sample, inplace=True, fuse=True, **options)
    assert result is model
    assert model.norm is norm
    assert not model.training
    assert model.block[0].config.epilogue == "relu"
    assert_same_bits(model(X), quantize_dynamic(untouched, fuse=True)(X))
    after = dynquant.report(untouched, model, X)
    assert [layer.sqnr_db for layer in after.layers] == [layer.sqnr_db for layer in report.layers]
    assert after.model.sqnr_db == report.model.sqnr_db
    assert after.model.bytes_float == report.model.bytes_float
    assert after.model.bytes_int8 == report.model.bytes_int8


def test_in_place_with_layers_kept_float(clock) -> None:
    clock(lambda m, n: 200.0 if n == 4 else 50.0)
    model = net()
    head = model.head
    assert quantize_dynamic(model, sample=X, min_speedup=1.0, inplace=True) is model
    assert model.head is head
    assert converted(model) == ["fc1", "block.0", "block.2"]


def test_a_fused_layer_that_stays_float_keeps_its_activation(clock) -> None:
    clock(lambda m, n: 200.0 if n == 24 else 50.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6), nn.ReLU()).eval()
    quantized, report = reported(model, fuse=True, min_speedup=1.0)
    assert [type(module) for module in quantized] == [nn.Linear, nn.ReLU, QLinear, FusedActivation]
    assert report.layers[0].epilogue == "relu"
    assert_same_bits(quantized[1](quantized[0](X)), model[:2](X))


def test_a_layer_that_stays_float_leaves_its_group(shared_attention, clock) -> None:
    clock(lambda m, n: 200.0 if n == 128 else 50.0)
    quantized, report = reported(shared_attention, fuse=True, min_speedup=1.0)
    assert [type(layer) for layer in quantized.children()] == [QLinear, QLinear, nn.Linear]
    assert [layer.shares_input for layer in report.layers] == [1, 1]
    assert_same_bits(quantized(X), quantize_dynamic(shared_attention, {"q", "k"})(X))
    quantized = quantize_dynamic(shared_attention, fuse=True, sample=X, min_speedup=0.5)
    assert all(type(layer) is MergedLinear for layer in quantized.children())


def test_tied_modules_and_subclasses_under_the_guard(clock) -> None:
    class Subclass(nn.Linear):
        pass

    shared = nn.Linear(12, 12)
    model = nn.Sequential(
        shared, Subclass(12, 12), nn.ReLU(), shared, nn.Sequential(shared, nn.Linear(12, 5))
    )
    clock(lambda m, n: 50.0 if n == 5 else 200.0)
    for inplace in (False, True):
        quantized = quantize_dynamic(copy.deepcopy(model), sample=X, min_speedup=1.0, inplace=inplace)
        assert converted(quantized) == ["4.1"]
        assert quantized[0] is quantized[3] is quantized[4][0]
        assert type(quantized[1]) is Subclass
    clock(lambda m, n: 200.0 if n == 5 else 50.0)
    quantized = quantize_dynamic(model, sample=X, min_speedup=1.0)
    assert converted(quantized) == ["0", "1", "3", "4.0"]
    assert quantized[0] is quantized[3] is quantized[4][0]


def test_a_spec_under_the_guard(clock) -> None:
    clock(lambda m, n: 200.0)
    spec = {"block": Config("per_tensor"), "block.2": None}
    quantized, report = reported(net(), qconfig_spec=spec, min_speedup=0.5)
    assert quantized.block[0].config.activations == "per_tensor"
    assert converted(quantized) == ["block.0"]
    quantized, report = reported(net(), qconfig_spec=spec, min_speedup=0.6)
    assert converted(quantized) == []
    assert reasons(report)["block.2"] == "the spec leaves it float"
    assert "below min_speedup=0.6" in reasons(report)["block.0"]


def test_real_times_decide_where_the_bound_is_out_of_reach() -> None:
    assert converted(quantize_dynamic(net(), sample=X, min_speedup=1e9)) == []
    assert converted(quantize_dynamic(net(), sample=X, min_speedup=0)) == converted(quantize_dynamic(net()))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"min_speedup": 1.0}, ValueError, "min_speedup=1.0 takes measuring, and there is no sample"),
        ({"min_sqnr": 20}, ValueError, "min_sqnr=20 takes measuring, and there is no sample to measure on"),
        ({"report": True}, ValueError, "report=True takes measuring, and there is no sample to measure on"),
        ({"report": True, "min_sqnr": 3}, ValueError, "report=True, min_sqnr=3 takes measuring"),
        (
            {"sample": X},
            ValueError,
            "a sample serves fuse=True, rotation='auto', report=True, min_speedup= and min_sqnr=, and",
        ),
        ({"sample": X, "min_speedup": "1"}, TypeError, "expected min_speedup to be a number, got '1'"),
        ({"sample": X, "min_sqnr": True}, TypeError, "expected min_sqnr to be a number, got True"),
        ({"sample": X, "min_sqnr": math.nan}, ValueError, "expected min_sqnr to be a number, got nan"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], error: type, sentence: str) -> None:
    model = net()
    before = state(model)
    with pytest.raises(error) as caught:
        quantize_dynamic(model, inplace=True, **options)
    assert sentence in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_is_converted_once_and_once_more_in_place(monkeypatch, clock, inplace: bool) -> None:
    """Layers are judged before there is a model of them, with the epilogues that they will have in it."""
    clock(lambda m, n: 200.0 if n == 4 else 50.0)
    entry = importlib.import_module("dynquant.quantize")
    calls: list[str] = []
    judged: list[str] = []

    def counted(name: str) -> None:
        function = getattr(entry, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if name == "judge":
                judged.extend(pair.int8_layer.config.epilogue for pair in args[1])
            return function(*args, **kwargs)

        monkeypatch.setattr(entry, name, call)

    for name in ("convert", "judge", "swap"):
        counted(name)
    quantized, report = reported(net(), fuse=True, min_speedup=1.0, min_sqnr=-100, inplace=inplace)
    assert calls == ["convert", "judge", "swap", *(["convert", "swap"] if inplace else [])]
    assert judged == ["none", "relu", "none", "none"]
    assert converted(quantized) == ["fc1", "block.0", "block.2"]
    assert [layer.epilogue for layer in report.layers] == ["none", "relu", "none"]
    assert quantized.block[0].config.epilogue == "relu"
