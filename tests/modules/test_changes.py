"""Every way to change a tensor of a layer: it is checked and used, or refused, and nothing has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear, quantize_dynamic
from tests.support.same_bits import assert_same_bits

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def dynamic(**options) -> QLinear:
    torch.manual_seed(0)
    return QLinear(12, 8, **options)


def static() -> QLinear:
    layer = dynamic()
    layer.set_activation_qparams(torch.tensor([0.03]), torch.tensor([3], dtype=torch.int32))
    return layer


def one(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([value], dtype=dtype)


BAD_QPARAMS = [
    ("activation_scale", one(float("nan"), torch.float32), "finite and positive, got nan"),
    ("activation_scale", one(-1.0, torch.float32), "finite and positive, got -1.0"),
    ("activation_scale", one(0.0, torch.float32), "finite and positive, got 0.0"),
    ("activation_scale", one(1.0, torch.float64), "torch.float32 of shape [1], got torch.float64"),
    ("activation_scale", torch.ones(2), "of shape [1], got torch.float32 of shape [2]"),
    ("activation_zero_point", one(1000, torch.int32), "in [-128, 127], got 1000"),
    ("activation_zero_point", one(0, torch.int64), "torch.int32 of shape [1], got torch.int64"),
]
WAYS = {
    "setattr": lambda layer, name, value: setattr(layer, name, value),
    "load": lambda layer, name, value: layer.load_state_dict({name: value}, strict=False),
    "load assign": lambda layer, name, value: layer.load_state_dict({name: value}, strict=False, assign=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "value", "sentence"), BAD_QPARAMS)
def test_static_qparams_are_checked(way, name, value, sentence) -> None:
    layer = static()
    before, out = copy.deepcopy(layer.state_dict()), layer(X)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        WAYS[way](layer, name, value)
    assert name in str(caught.value)
    assert sentence in str(caught.value)
    assert_same_bits(layer(X), out)
    for key, kept in before.items():
        assert_same_bits(layer.state_dict()[key], kept)


@pytest.mark.parametrize("way", [*WAYS, "functional_call"])
def test_static_qparams_are_used(way) -> None:
    layer, scale = static(), one(0.05, torch.float32)
    expected = static()
    expected.set_activation_qparams(scale, one(3, torch.int32))
    if way == "functional_call":
        before = layer(X)
        assert_same_bits(torch.func.functional_call(layer, {"activation_scale": scale}, (X,)), expected(X))
        assert_same_bits(layer(X), before)
        return
    WAYS[way](layer, "activation_scale", scale)
    assert_same_bits(layer(X), expected(X))
    assert_same_bits(copy.deepcopy(layer)(X), expected(X))
    assert_same_bits(layer.activation_scale, scale)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["activation_scale", "activation_zero_point"])
def test_one_of_two_qparams_makes_no_layer_static(way, name) -> None:
    layer = dynamic()
    value = one(1, torch.float32 if name == "activation_scale" else torch.int32)
    with pytest.raises((ValueError, RuntimeError), match="expected both|together"):
        WAYS[way](layer, name, value)
    assert layer.activation_scale is layer.activation_zero_point is None
    assert_same_bits(layer(X), dynamic()(X))


def test_both_qparams_make_a_layer_static() -> None:
    layer, saved = dynamic(), static().state_dict()
    layer.load_state_dict(
        {name: saved[name] for name in saved if name.startswith("activation")}, strict=False
    )
    assert_same_bits(layer(X), static()(X))
    layer.load_state_dict(dynamic().state_dict())
    assert_same_bits(layer(X), dynamic()(X))


def test_a_static_layer_keeps_both_or_none() -> None:
    layer = static()
    with pytest.raises(ValueError, match="expected both of scale and zero_point or none"):
        layer.activation_scale = None
    layer.set_activation_qparams(None, None)
    assert_same_bits(layer(X), dynamic()(X))


@pytest.mark.parametrize("value", [1.0, "x"])
def test_qparams_are_tensors(value) -> None:
    with pytest.raises(TypeError, match="expected activation_scale to be a tensor"):
        static().activation_scale = value


def quantized_tensor(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value.float().flatten(), 0.1, 0, torch.qint8)


MUTATIONS = {
    "numpy": lambda value: value.numpy(),
    "list": lambda value: value.tolist(),
    "None": lambda value: None,
    "number": lambda value: 3,
    "quantized": quantized_tensor,
    "sparse": lambda value: value.to_sparse(),
    "sparse csr": lambda value: value.reshape(value.shape[0], -1).to_sparse_csr(),
    "meta": lambda value: value.to("meta"),
    "nested": lambda value: torch.nested.nested_tensor([value.float().flatten()]),
    "mkldnn": lambda value: value.float().to_mkldnn(),
    "transposed": lambda value: value.unsqueeze(0).transpose(0, -1),
    "longer": lambda value: torch.cat([value, value]),
    "empty": lambda value: value[:0],
    "scalar": lambda value: value.flatten()[0],
    "complex": lambda value: value.to(torch.complex64),
    "bool": lambda value: value.bool(),
    "uint8": lambda value: value.to(torch.uint8),
    "double": lambda value: value.double(),
    "nan": lambda value: value * float("nan"),
    "negative": lambda value: -value.float() - 1000,
    "big": lambda value: torch.full_like(value, 127) if value.dtype == torch.int8 else value + 10**6,
    "subclass": lambda value: dynamic().weight,
    "parameter": lambda value: nn.Parameter(value.float()),
}
KEYS = ("weight", "weight_scale", "format", "bias", "activation_scale", "activation_zero_point")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("key", KEYS)
def test_a_mutated_state_dict_is_refused_with_its_key_or_fits(key, mutation, strict, assign) -> None:
    """The error names key and layer and tells the other layer's fault too; a refused layer is as before."""
    model = nn.Sequential(static(), dynamic(bias=False))
    state = dict(model.state_dict())
    with torch.no_grad():
        model[0].bias += 1
    before, out = copy.deepcopy(model[0].state_dict()), model[0](X)
    state[f"0.{key}"] = MUTATIONS[mutation](state[f"0.{key}"])
    state["1.format"] = torch.tensor([99, 0, 1, 0])
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state, strict=strict, assign=assign)
    sentence = str(caught.value)
    assert "QLinear '1': format [99, 0, 1, 0] is not one" in sentence
    if "QLinear '0'" in sentence or "0." in sentence:
        assert key in sentence
    if "QLinear '0'" in sentence:
        assert_same_bits(model[0](X), out)
        for name, kept in before.items():
            assert_same_bits(model[0].state_dict()[name], kept)
    else:
        model[0](X)


def test_onto_meta_without_assign_is_said_as_by_nn_linear() -> None:
    saved = nn.Sequential(dynamic()).state_dict()
    with torch.device("meta"):
        model = nn.Sequential(QLinear(12, 8))
    with pytest.warns(UserWarning, match="for 0.weight: copying from a non-meta parameter") as caught:
        model.load_state_dict(saved)
    assert sum("for 0.weight:" in str(warning.message) for warning in caught) == 1
    model.load_state_dict(saved, assign=True)
    assert_same_bits(model(X), dynamic()(X))


FORMATS = [{}, {"activations": "per_tensor"}, {"weights": "per_tensor"}, {"rotation": "hadamard"}]


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("fuse", [False, True])
def test_memory_formats_leave_the_weight_alone(scheme, fuse) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    quantized = quantize_dynamic(model, fuse=fuse, **scheme)
    out = quantized(X)
    moved = quantized.to(memory_format=torch.channels_last)
    assert_same_bits(moved(X), out)
    assert_same_bits(copy.deepcopy(moved)(X), out)
    moved.load_state_dict(moved.state_dict())
    assert_same_bits(moved(X), out)


def test_memory_formats_leave_merged_and_static_layers_alone() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    quantized = quantize_dynamic(model, fuse=True)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    with dynquant.calibrate(quantized):
        quantized(x)
    dynquant.freeze(quantized)
    out = quantized(x)
    assert_same_bits(quantized.to(memory_format=torch.channels_last)(x), out)


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize("tool", ["eager", "fuse", "trace", "compile"])
def test_the_argument_is_named_as_that_of_nn_linear(tool) -> None:
    model = quantize_dynamic(ByName(), fuse=tool == "fuse")
    expected = model(X)
    if tool == "trace":
        model = dynquant.fuse_graph(torch.fx.symbolic_trace(model))
    if tool == "compile":
        torch._dynamo.reset()
        model = torch.compile(model, backend="dynquant", fullgraph=True)
    with torch.no_grad():
        assert_same_bits(model(X), expected.detach())
