"""Recurrent modules whose first layer has few inputs, and keeps the weight of its input in float."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import dynquant
from dynquant import QGRU, QLSTM, QGRUCell, QLSTMCell, QRNNCell, QTensor, from_torch_ao, quantize_dynamic
from dynquant.nn.recurrent import MAX_FLOAT_INPUT
from tests.support.same_bits import assert_same_bits

K, H = 40, 48
LAYERS: dict[type[nn.Module], Any] = {nn.LSTM: QLSTM, nn.GRU: QGRU}
CELLS: dict[type[nn.Module], Any] = {nn.LSTMCell: QLSTMCell, nn.GRUCell: QGRUCell, nn.RNNCell: QRNNCell}
every_kind = pytest.mark.parametrize("kind", [*LAYERS, *CELLS])


def pair(kind: type[nn.Module], **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = kind(K, H, **options).eval()
    return module, {**LAYERS, **CELLS}[kind].from_float(module)


def input_of(kind: type[nn.Module]) -> Tensor:
    return torch.randn(7, 3, K) if kind in LAYERS else torch.randn(3, K)


def weight_of(layer: Any) -> Any:
    return layer.weight_ih_l0 if hasattr(layer, "weight_ih_l0") else layer.weight_ih


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_same_bits(a, b)


def int8_input(layer: Any) -> dict[str, Tensor]:
    """The state_dict of a module as earlier versions made it."""
    state = copy.deepcopy(layer).state_dict()
    for name in layer._input_weight_names():
        weight = QTensor.quantize(state[name], dynquant.Config())
        state[name], state[f"{name}_scale"] = weight.int_repr().unsqueeze(-1), weight.channel_scale
    state["format"][1] &= ~(1 << 19)
    return state


# ---- accuracy


def spectra(steps: int, batch: int) -> Tensor:
    """Linear power by band, over 4 decades and more, that varies slowly, as that of speech."""
    levels = 0.1 * torch.randn(steps, batch, K).cumsum(0) + 0.5 * torch.randn(steps, batch, K)
    return (levels - torch.linspace(0, 9.2, K)).exp()


def test_inputs_with_a_range_of_ten_thousand() -> None:
    """The weights of the weak bands are large, those of the strong ones small, as training makes them: in 8
    bits the products of the strong ones are lost."""
    torch.manual_seed(0)
    module = nn.LSTM(K, H, batch_first=False).eval()
    x = spectra(160, 16)
    with torch.no_grad():
        module.weight_ih_l0 /= x.mean((0, 1))
        module.weight_ih_l0[:, : K // 2] *= torch.rand(4 * H, 1)
        expected, _ = module(x)
        layer = QLSTM.from_float(module)
        in_int8 = QLSTM(K, H)
        in_int8.load_state_dict(int8_input(layer))

        def error(model: nn.Module) -> float:
            return ((model(x)[0] - expected).norm() / expected.norm()).item()

        assert error(in_int8) > 0.05
        assert error(layer) < 0.01


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"batch_first": True}], ids=str
)
@pytest.mark.parametrize("kind", LAYERS)
def test_values(kind: type[nn.Module], options: dict[str, Any], packed: bool) -> None:
    module, layer = pair(kind, **options)
    names = {"weight_ih_l0", "weight_ih_l0_reverse"} if "bidirectional" in options else {"weight_ih_l0"}
    assert {name for name, value in layer.named_parameters() if value.dim() == 2} == names
    assert layer.config.float_input
    assert "float_input=True" in repr(layer)
    x: Any = torch.randn(7, 3, K)
    x = pack_sequence([x[:n, i] for i, n in enumerate((2, 7, 4))], enforce_sorted=False) if packed else x
    with torch.no_grad():
        out, expected = layer(x)[0], module(x)[0]
    out, expected = (out.data, expected.data) if packed else (out, expected)
    assert ((out - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: type[nn.Module]) -> None:
    module, cell = pair(kind)
    x = input_of(kind)
    with torch.no_grad():
        assert_close = torch.testing.assert_close
        assert_close(cell(x), module(x), rtol=0, atol=1e-3)
        assert_close(cell(x[0]), module(x[0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("k", "stays_float"), [(1, True), (MAX_FLOAT_INPUT, True), (MAX_FLOAT_INPUT + 1, False)]
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_the_width_decides(kind: type[nn.Module], k: int, stays_float: bool) -> None:
    layer = {**LAYERS, **CELLS}[kind].from_float(kind(k, H))
    assert layer.config.float_input == stays_float
    assert isinstance(weight_of(layer), nn.Parameter if stays_float else QTensor)


def test_a_non_finite_input_rules_out_its_own_sequence() -> None:
    _, layer = pair(nn.LSTM)
    x = input_of(nn.LSTM)
    x[2, 1, 0] = math.inf
    nan = layer(x)[0].isnan().all(-1)
    assert nan[:, 1].tolist() == [False] * 2 + [True] * 5
    assert not nan[:, [0, 2]].any()


# ---- files


@every_kind
def test_state_dict(kind: type[nn.Module], tmp_path: Path) -> None:
    module, layer = pair(kind)
    state, x = layer.state_dict(), input_of(kind)
    end = "_l0" if kind in LAYERS else ""
    assert_same_bits(state[f"weight_ih{end}"], module.state_dict()[f"weight_ih{end}"])
    assert f"weight_ih{end}_scale" not in state
    assert state[f"weight_hh{end}"].dtype == torch.int8
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "state.safetensors")
    for assign in (False, True):
        other = type(layer)(K, H)
        assert not any(other.load_state_dict(loaded, assign=assign))
        assert_same(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind(K, H).load_state_dict(state, strict=False)
    with pytest.warns(UserWarning, match="holds float weights"):
        assert not any(other.load_state_dict(module.state_dict()))
    assert_same(other(x), layer(x))


@every_kind
def test_the_file_decides(kind: type[nn.Module], tmp_path: Path) -> None:
    """A file of an earlier version has that weight in int8: it stays so, and the other way round."""
    _, layer = pair(kind)
    old, x = int8_input(layer), input_of(kind)
    for assign in (False, True):
        other = type(layer)(K, H)
        assert not any(other.load_state_dict(old, assign=assign))
        assert not other.config.float_input
        assert isinstance(weight_of(other), QTensor)
        again = other.state_dict()
        assert again.keys() == old.keys()
        assert all(torch.equal(again[key], old[key]) for key in old)
        before = other(x)
        for same in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert_same(same(x), before)
        model = nn.Sequential(other)
        dynquant.save(model, tmp_path / "model.safetensors")
        for empty in (nn.Sequential(kind(K, H)), nn.Sequential(type(layer)(K, H))):
            assert_same(dynquant.load(empty, tmp_path / "model.safetensors")(x), before)
        assert not any(other.load_state_dict(layer.state_dict(), assign=assign))
        assert other.config == layer.config
        assert_same(other(x), layer(x))


@every_kind
def test_save_load_and_copies(kind: type[nn.Module], tmp_path: Path) -> None:
    module, layer = pair(kind)
    x, model = input_of(kind), quantize_dynamic(nn.Sequential(module))
    dynquant.save(model, tmp_path / "model.safetensors")
    for same in (
        model,
        dynquant.load(nn.Sequential(kind(K, H)), tmp_path / "model.safetensors").eval(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert_same(same(x), layer(x))
    assert_same_bits(weight_of(layer.to_float()), weight_of(module))
    half = copy.deepcopy(layer).bfloat16()
    assert weight_of(half).dtype == torch.bfloat16
    assert tree_leaves(half(x.bfloat16()))[0].dtype == torch.bfloat16


def test_bad_states_change_nothing() -> None:
    _, layer = pair(nn.LSTM)
    x = input_of(nn.LSTM)
    before, state = layer(x), layer.state_dict()
    for change, words in (
        ({"weight_ih_l0": state["weight_ih_l0"][1:]}, "expected weight of shape [192, 40], got [191, 40]"),
        ({"weight_ih_l0": state["weight_ih_l0"] * math.nan}, "weight_ih_l0: expected weight to be finite"),
        ({"weight_ih_l0": state["weight_ih_l0"].char()}, "weight_ih_l0: expected weight of dtype float32"),
        ({"weight_ih_l0": None}, "the state_dict has format, but no weight_ih_l0"),
        ({"weight_ih_l0_scale": torch.ones(192), "format": None}, "has weight_ih_l0_scale, but no format"),
    ):
        given = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(RuntimeError, match=re.escape(words)):
            layer.load_state_dict(given)
        assert_same(layer(x), before)
    assert {*layer.load_state_dict({}, strict=False).missing_keys} >= {"weight_ih_l0", "weight_hh_l0"}
    module = nn.LSTM(K, H)
    with torch.no_grad():
        module.weight_ih_l0[2, 1] = math.inf
    with pytest.raises(ValueError, match=re.escape("weight_ih_l0: expected weight to be finite, got inf at")):
        QLSTM.from_float(module)


def test_assignment() -> None:
    _, layer = pair(nn.GRU)
    layer.weight_ih_l0 = torch.ones(3 * H, K)
    assert isinstance(layer.weight_ih_l0, nn.Parameter)
    assert (layer.weight_ih_l0 == 1).all()
    layer.weight_ih_l0 = QTensor.quantize(torch.full((3 * H, K), 2.0), dynquant.Config())
    assert ((layer.weight_ih_l0 - 2).abs() < 1e-6).all()
    with pytest.raises(
        ValueError, match=re.escape("weight_ih_l0: expected weight of shape [144, 40], got [3, 2]")
    ):
        layer.weight_ih_l0 = torch.ones(3, 2)
    with pytest.raises(TypeError, match="QGRU: expected a tensor for .weight_ih_l0, got int"):
        layer.weight_ih_l0 = 3


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_of_torch_ao_stay_its_integers(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(K, H)).eval()
    of_torch: Any = torch.ao.quantization.quantize_dynamic(model, {kind})
    layer: Any = from_torch_ao(of_torch)[0]
    assert not layer.config.float_input
    integers = layer.weight_ih_l0.int_repr()
    assert torch.equal(integers, of_torch[0].get_weight()["weight_ih_l0"].int_repr())
    other: Any = quantize_dynamic(model)
    other.load_state_dict(from_torch_ao(of_torch.state_dict()))
    assert torch.equal(other[0].weight_ih_l0.int_repr(), integers)
    x = input_of(kind)
    assert_same(other(x), layer(x))


# ---- gradients and tools


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind: type[nn.Module], packed: bool) -> None:
    _, layer = pair(kind, bidirectional=True)
    module = layer.to_float()
    x = torch.randn(7, 3, K, requires_grad=True)
    layer.requires_grad_()

    def loss(model: nn.Module) -> Tensor:
        given: Any = pack_sequence([x[:n, i] for i, n in enumerate((2, 7, 4))], False) if packed else x
        out = model(given)[0]
        return (out.data if packed else out).square().sum()

    names = [name for name, _ in layer.named_parameters()]
    assert "weight_ih_l0_reverse" in names
    own = dict(module.named_parameters())
    actual = torch.autograd.grad(loss(layer), [x, *layer.parameters()])
    expected = torch.autograd.grad(loss(module), [x, *(own[name] for name in names)])
    for a, b in zip(actual, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 0.05


@every_kind
def test_compile_and_export(kind: type[nn.Module]) -> None:
    torch.compiler.reset()
    _, layer = pair(kind)
    x = input_of(kind)
    with torch.no_grad():
        assert_same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        assert_same(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_functional_call() -> None:
    _, layer = pair(nn.LSTM)
    x = input_of(nn.LSTM)
    other = {"weight_ih_l0": torch.zeros_like(layer.weight_ih_l0)}
    assert not torch.equal(torch.func.functional_call(layer, other, (x,))[0], layer(x)[0])
