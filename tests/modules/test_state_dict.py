"""The state_dict of converted layers: float layers refuse it, and what others wrote is read or named."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic as torch_ao_quantize_dynamic

import dynquant
from dynquant import QLinear, quantize_dynamic
from dynquant.nn.merged import MergedLinear
from dynquant.patterns.registry import PATTERNS, SharedInput, type_name
from tests.support.same_bits import assert_same_bits

K, N = 32, 64


class Attention(nn.Module):
    """Its layers read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, N) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


@pytest.fixture(autouse=True)
def attention_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ("q_proj", "k_proj", "v_proj")
    monkeypatch.setitem(PATTERNS, type_name(Attention()), [SharedInput(layers)])


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 8, bias=False))


def frozen(model: nn.Module) -> nn.Module:
    with dynquant.calibrate(model):
        model(torch.randn(16, K))
    return dynquant.freeze(model)


CONVERSIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "dynamic": (sequence, quantize_dynamic),
    "per_tensor": (
        sequence,
        lambda model: quantize_dynamic(model, activations="per_tensor", weights="per_tensor"),
    ),
    "rotated": (sequence, lambda model: quantize_dynamic(model, rotation="hadamard")),
    "static": (sequence, lambda model: frozen(quantize_dynamic(model))),
    "fused": (sequence, lambda model: quantize_dynamic(model, fuse=True)),
    "merged": (Attention, lambda model: quantize_dynamic(model, fuse=True)),
    "bfloat16": (sequence, lambda model: quantize_dynamic(model.bfloat16()).float()),
}
every_conversion = pytest.mark.parametrize("conversion", CONVERSIONS)


def pair(conversion: str) -> tuple[nn.Module, nn.Module]:
    """A float model and, of another with the same layers, the converted one."""
    torch.manual_seed(0)
    build, convert = CONVERSIONS[conversion]
    model, converted = build(), convert(build())
    assert any(type(module) is MergedLinear for module in converted.modules()) == (conversion == "merged")
    return model, converted


@every_conversion
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_float_model_does_not_take_it(conversion: str, strict: bool, assign: bool) -> None:
    model, converted = pair(conversion)
    before = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("weight")}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(converted.state_dict(), strict=strict, assign=assign)
    for name, value in before.items():
        assert f"size mismatch for {name}" in str(error.value)
        assert_same_bits(model.state_dict()[name], value)


def by_torch(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def by_safetensors(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    safetensors.save_file(state, path)
    return safetensors.load_file(path)


@every_conversion
@pytest.mark.parametrize("through", [by_torch, by_safetensors, "save_model"])
def test_files(conversion: str, through: Any, tmp_path: Path) -> None:
    model, converted = pair(conversion)
    fresh = quantize_dynamic(model, fuse=conversion in ("fused", "merged"))
    x = torch.randn(3, K)
    if through == "save_model":
        safetensors.save_model(converted, tmp_path / "file")
        assert safetensors.load_model(fresh, tmp_path / "file") == (set(), [])
    else:
        fresh.load_state_dict(through(converted.state_dict(), tmp_path / "file"))
    assert_same_bits(fresh(x), converted(x))


@every_conversion
def test_format_1(conversion: str) -> None:
    model, converted = pair(conversion)
    state = converted.state_dict()
    assert {tuple(value.shape[2:]) for value in state.values() if value.dtype == torch.int8} == {(1,)}
    for name, value in list(state.items()):
        if name.endswith(".format"):
            assert value[0] == 2
            state[name] = torch.cat([torch.tensor([1]), value[1:]])
        elif value.dtype == torch.int8:
            state[name] = value.squeeze(-1)
    fresh = quantize_dynamic(model, fuse=conversion in ("fused", "merged"))
    fresh.load_state_dict(state)
    x = torch.randn(3, K)
    assert_same_bits(fresh(x), converted(x))


@pytest.mark.parametrize("static", [False, True])
def test_a_module_with_two_names_through_safetensors(static: bool, tmp_path: Path) -> None:
    def tied() -> nn.Module:
        shared = nn.Linear(K, K)
        model = quantize_dynamic(nn.Sequential(shared, nn.ReLU(), shared))
        return frozen(model) if static else model

    model, fresh = tied(), tied()
    safetensors.save_model(model, tmp_path / "file")
    names = safetensors.load_file(tmp_path / "file").keys()
    assert {"0.weight_scale", "2.weight_scale"} <= names
    safetensors.load_model(fresh, tmp_path / "file")
    x = torch.randn(3, K)
    assert_same_bits(fresh(x), model(x))
    assert (fresh[0].activation_scale is not None) == static


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("assign", [True, False])
def test_a_bias_of_another_float_dtype(dtype: torch.dtype, assign: bool) -> None:
    layer, fresh = QLinear(K, N), QLinear(K, N)
    layer.bias.data = layer.bias.data.to(dtype).float()
    state = layer.state_dict()
    fresh.load_state_dict({**state, "bias": state["bias"].to(dtype)}, assign=assign)
    assert fresh.bias.dtype == dtype
    assert type(fresh.bias) is nn.Parameter
    x = torch.randn(3, K)
    assert_same_bits(fresh(x), layer(x))


# ---- what others wrote


def test_one_warning_a_model_where_weights_are_float() -> None:
    models = [nn.Sequential(sequence(), sequence()) for _ in range(2)]
    converted = [quantize_dynamic(model) for model in models]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for fresh, model in zip(converted, models, strict=True):
            for _ in range(2):
                fresh.load_state_dict(model.state_dict())
    assert [str(warning.message) for warning in caught] == [
        "QLinear: the state_dict holds float weights, of an unquantized model: quantizing them"
    ]
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for fresh, model in zip(converted, models, strict=True):
            fresh.load_state_dict(model.state_dict())
    assert len(caught) == 2
    x = torch.randn(3, K)
    for fresh, model in zip(converted, models, strict=True):
        assert_same_bits(fresh[0](x), quantize_dynamic(model)[0](x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_of_torch_ao_is_named(strict: bool) -> None:
    model = sequence()
    theirs = torch_ao_quantize_dynamic(copy.deepcopy(model))
    fresh = quantize_dynamic(sequence())
    with pytest.raises(RuntimeError) as error:
        fresh.load_state_dict(theirs.state_dict(), strict=strict)
    for name in ("0", "2"):
        assert f"QLinear '{name}': the state_dict is of a layer that torch.ao quantized" in str(error.value)
    assert "load_state_dict(dynquant.from_torch_ao(state_dict))" in str(error.value)
    fresh.load_state_dict(dynquant.from_torch_ao(theirs.state_dict()), strict=strict)  # as the sentence says
    x = torch.randn(3, K)
    assert (fresh(x) - model(x)).abs().max() < 0.05


@pytest.mark.parametrize("strict", [True, False])
def test_a_newer_format_is_named(strict: bool) -> None:
    layer = QLinear(K, N)
    state = layer.state_dict()
    state["format"][0] = 3
    with pytest.raises(
        RuntimeError, match=r"format \[3, 0, 1, 0\] .* \(versions 1 to 2\); a newer dynquant may"
    ):
        layer.load_state_dict(state, strict=strict)


# ---- buffers

PACKED = ("packed_weight", "weight_sum", "channel_scale")


def loaded_again(model: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
    return model


def packed(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if "activation" not in name}


@every_conversion
@pytest.mark.parametrize(
    "change",
    {
        "as converted": lambda model: model,
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "half": lambda model: model.half(),
        "to meta and back": lambda model: model.to("meta").to_empty(device="cpu"),
        "channels_last": lambda model: model.to(memory_format=torch.channels_last),
        "shared memory": lambda model: model.share_memory(),
        "loaded": lambda model: loaded_again(model),
    }.items(),
    ids=lambda item: item[0],
)
def test_the_buffers_are_the_tensors_that_run(conversion: str, change: tuple[str, Any]) -> None:
    """So that sizes, devices and broadcasts of whole models are right."""
    _, model = pair(conversion)
    keys = list(model.state_dict())
    x = torch.randn(3, K)
    expected = model(x)
    model = change[1](model)
    assert list(model.state_dict()) == keys
    if change[0] not in ("half", "to meta and back"):
        assert_same_bits(model(x), expected)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}
    buffers = packed(model)
    assert len(buffers) == 3 * len(layers)
    for name, layer in layers.items():
        for part, tensor in zip(PACKED, layer._packed, strict=False):
            assert buffers[f"{name}.{part}"] is tensor is getattr(layer.weight, part)
        assert [tensor.dtype for tensor in layer._packed[:3]] == [torch.int8, torch.int32, torch.float32]


def test_a_new_weight_brings_its_buffers() -> None:
    layer = QLinear(K, N)
    layer.weight = torch.randn(N, K)
    assert layer.packed_weight is layer.weight.packed_weight is layer._packed[0]


@pytest.mark.parametrize("part", PACKED)
def test_a_buffer_that_is_assigned_runs(part: str) -> None:
    first, second = QLinear(K, N), QLinear(K, N)
    for name in PACKED:
        setattr(first, name, getattr(second, name))
    first.bias = second.bias
    x = torch.randn(3, K)
    assert_same_bits(first(x), second(x))
    assert_same_bits(first.weight.int_repr(), second.weight.int_repr())
    with pytest.raises(ValueError, match=f"QLinear: expected {part} to be"):
        setattr(first, part, getattr(second, part)[:1].double())


def test_a_cast_that_fails_leaves_a_layer_that_runs() -> None:
    layer = QLinear(K, N)
    x = torch.randn(3, K)
    expected = layer(x)

    def fails(tensor: Tensor) -> Tensor:
        if tensor.numel() and tensor.dtype == torch.int8:
            raise RuntimeError("out of memory")
        return tensor

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(fails)
    assert_same_bits(layer(x), expected)
    assert len(packed(layer)) == 3
