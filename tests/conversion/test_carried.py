"""What a linear layer carries besides its weight and bias comes along, or the layer stays float."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynquant import QLinear, quantize_dynamic
from tests.support.same_bits import assert_same_bits

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


class WithMembers(nn.Linear):
    """More members than nn.Linear has, and nn.Linear's own forward."""

    factor = 3

    def __init__(self) -> None:
        super().__init__(12, 8)
        self.register_buffer("shift", torch.ones(8))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.gain = nn.Parameter(torch.full((8,), 2.0))
        self.A = nn.Linear(12, 8)
        self._private = "kept"
        self.calls = 0

    @property
    def doubled(self) -> Tensor:
        return self.gain * 2

    @property
    def setting(self) -> int:
        return self.calls

    @setting.setter
    def setting(self, value: int) -> None:
        self.calls = value + 1

    def scaled(self, x: Tensor) -> Tensor:
        return self(x) * self.gain

    @staticmethod
    def three() -> int:
        return 3

    @classmethod
    def name(cls) -> str:
        return cls.__name__


class CallsRelu(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(super().__call__(x))


class SavesMore(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "more"] = torch.ones(1)


def adapter(module, args, output):
    return output + module.A(args[0])


@pytest.fixture(params=[False, True], ids=["copy", "inplace"])
def inplace(request):
    return request.param


def test_members_of_a_subclass(inplace) -> None:
    model = nn.Sequential(WithMembers())
    layer = quantize_dynamic(model, {"0"}, inplace=inplace)[0]
    assert isinstance(layer, QLinear)
    assert isinstance(layer.A, QLinear)
    assert layer.factor == layer.three() == 3
    assert layer._private == "kept"
    assert layer.setting == 0
    layer.setting = 4
    assert layer.calls == 5
    assert_same_bits(layer.doubled, torch.full((8,), 4.0))
    assert_same_bits(layer.scaled(X), layer(X) * 2)
    with pytest.raises(AttributeError, match="'QLinear' object has no attribute 'no_such'"):
        _ = layer.no_such
    saved = layer.state_dict()
    assert {"shift", "gain", "A.weight"} <= saved.keys()
    assert "scratch" not in saved
    assert "scratch" in dict(layer.named_buffers())
    restored = pickle.loads(pickle.dumps(layer))
    assert_same_bits(restored.scaled(X), layer.scaled(X))


def test_more_tensors_are_cast_as_those_of_nn_linear() -> None:
    layer = quantize_dynamic(nn.Sequential(WithMembers()))[0].half()
    assert layer.gain.dtype == layer.shift.dtype == layer.A.weight.dtype == torch.float16
    assert layer.weight_scale.dtype == torch.float32


def test_a_hook_uses_a_submodule(inplace) -> None:
    layer = nn.Linear(12, 8)
    layer.A = nn.Linear(12, 8, bias=False)
    layer.register_forward_hook(adapter)
    expected = layer(X)
    layer = quantize_dynamic(nn.Sequential(layer), inplace=inplace)[0]
    out = layer(X)
    assert isinstance(layer, QLinear)
    assert (out - expected).norm() < 0.02 * expected.norm()
    assert {"weight", "A.weight"} <= layer.state_dict().keys()


def test_state_dict_hooks_come_along(inplace) -> None:
    layer = nn.Linear(12, 8)
    seen = []

    def save(module, state, prefix, metadata):
        state[prefix + "more"] = torch.ones(1)

    def load(module, state, prefix, *rest):
        seen.append(type(module).__name__)
        state.pop(prefix + "more")

    layer._register_state_dict_hook(save)
    layer.register_load_state_dict_pre_hook(load)
    layer.register_load_state_dict_post_hook(lambda module, keys: seen.append("after"))
    model = quantize_dynamic(nn.Sequential(layer), inplace=inplace)
    del layer
    saved = model.state_dict()
    assert "0.more" in saved
    model.load_state_dict(saved)
    assert seen == ["QLinear", "after"]


@pytest.mark.parametrize("kind", [CallsRelu, SavesMore])
def test_a_layer_whose_call_or_file_differs_stays_float(kind) -> None:
    model = nn.Sequential(kind(12, 8), nn.Linear(8, 8))
    result, report = quantize_dynamic(model, sample=X, report=True)
    assert type(result[0]) is kind
    assert isinstance(result[1], QLinear)
    (skipped,) = report.skipped
    assert skipped.name == "0"
    assert "is not that of Linear" in skipped.reason
    with pytest.warns(UserWarning, match="is not that of Linear"):
        quantize_dynamic(model, {"0"})


def test_observers_of_torch_ao_are_left_behind() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        torch.ao.quantization.prepare(model, inplace=True)
    model(X)
    assert hasattr(model[0], "activation_post_process")
    del model.qconfig, model[0].qconfig
    layer = quantize_dynamic(model)[0]
    assert isinstance(layer, QLinear)
    assert not hasattr(layer, "activation_post_process")
    assert_same_bits(layer(X), quantize_dynamic(nn.Sequential(model[0]))(X))
    assert layer.state_dict().keys() == {"weight", "weight_scale", "bias", "format"}


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "parametrized", "pruned"])
def test_what_makes_the_float_weight_is_left_behind(kind) -> None:
    layer = nn.Linear(12, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "weight_norm":
            nn.utils.weight_norm(layer)
        elif kind == "spectral_norm":
            nn.utils.spectral_norm(layer)
        elif kind == "parametrized":
            nn.utils.parametrizations.orthogonal(layer)
        else:
            nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    layer.eval()
    expected = layer(X)
    quantized = quantize_dynamic(nn.Sequential(layer))[0]
    assert (quantized(X) - expected).norm() < 0.05 * expected.norm()
    assert quantized.state_dict().keys() == {"weight", "weight_scale", "bias", "format"}
    assert not list(quantized.children())
