"""Conversion, calibration and loading in inference mode and under any default device; training goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant.calibration.observers import OBSERVERS
from tests.support.same_bits import assert_same_bits


def float_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 7))


def batch(scale: float = 1.0) -> Tensor:
    return torch.randn(8, 24, device="cpu") * scale


def frozen(observer: str = "min_max") -> nn.Module:
    model = dynquant.quantize_dynamic(float_model())
    with dynquant.calibrate(model, observer):
        model(batch())
    return dynquant.freeze(model)


def assert_trains(model: nn.Module) -> None:
    """Gradients reach the input and the biases, also after casts."""
    for dtype in (torch.float32, torch.float64, torch.float32):
        x = batch().to(dtype).requires_grad_()
        model.to(dtype)(x).sum().backward()
        assert x.grad is not None
        assert all(bias.grad is not None for bias in model.parameters())
        model.zero_grad()


def _convert_and_freeze(observer: str) -> nn.Module:
    with torch.inference_mode():
        return frozen(observer)


def _calibrate(observer: str) -> nn.Module:
    model = dynquant.quantize_dynamic(float_model())
    with torch.inference_mode(), dynquant.calibrate(model, observer):
        model(batch())
        model(batch(100))
    return dynquant.freeze(model)


def _freeze(observer: str) -> nn.Module:
    model = dynquant.quantize_dynamic(float_model())
    with dynquant.calibrate(model, observer):
        model(batch())
    with torch.inference_mode():
        return dynquant.freeze(model)


def _alternate(observer: str) -> nn.Module:
    model = dynquant.quantize_dynamic(float_model())
    with dynquant.calibrate(model, observer):
        for scale in (1, 100, 1, 10_000):
            with torch.inference_mode(scale > 1):
                model(batch(scale))
    return dynquant.freeze(model)


def _load(observer: str) -> nn.Module:
    model = dynquant.quantize_dynamic(float_model())
    with torch.inference_mode():
        model.load_state_dict(frozen(observer).state_dict())
    return model


def _assign(observer: str) -> nn.Module:
    model = dynquant.quantize_dynamic(float_model())
    with torch.inference_mode():
        state = frozen(observer).state_dict()
    state = {name: value.clone() if name.endswith("bias") else value for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    return model


def _set(observer: str) -> nn.Module:
    model = frozen(observer)
    with torch.inference_mode():
        model[0].activation_scale = model[0].activation_scale.clone()
        model[2].set_activation_qparams(torch.tensor([0.1]), torch.tensor([-128], dtype=torch.int32))
    return model


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(
    "make",
    [_convert_and_freeze, _calibrate, _freeze, _alternate, _load, _assign, _set],
    ids=lambda f: f.__name__,
)
def test_a_model_made_in_inference_mode_trains(make: Callable[[str], nn.Module], observer: str) -> None:
    assert_trains(make(observer))


@pytest.mark.parametrize(
    "scheme", [{}, {"activations": "per_tensor"}, {"rotation": "hadamard"}, {"fuse": True}]
)
def test_a_model_converted_in_inference_mode_trains(scheme: dict[str, object]) -> None:
    with torch.inference_mode():
        model = dynquant.quantize_dynamic(float_model(), **scheme)
    assert_trains(model)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_does_not_depend_on_the_default_device(observer: str) -> None:
    def calibrated(device: str | None) -> nn.Module:
        torch.manual_seed(1)
        model = dynquant.quantize_dynamic(float_model())
        torch.set_default_device(device)
        try:
            with dynquant.calibrate(model, observer):
                model(batch())
                model(batch(100))
            return dynquant.freeze(model)
        finally:
            torch.set_default_device(None)

    model, expected = calibrated("meta"), calibrated(None)
    for name, value in expected.state_dict().items():
        assert_same_bits(model.state_dict()[name], value)
    assert_trains(model)


def test_conversion_and_report_do_not_depend_on_the_default_device() -> None:
    model, x = float_model(), batch()
    torch.set_default_device("meta")
    try:
        int8, report = dynquant.quantize_dynamic(model, sample=x, min_sqnr=5, fuse=True, report=True)
        assert [layer.name for layer in report.layers] == ["0", "2"]
        assert all(layer.sqnr_db > 20 for layer in dynquant.report(model, int8, x).layers)
        int8.load_state_dict(int8.state_dict())
    finally:
        torch.set_default_device(None)
    assert_trains(int8)
