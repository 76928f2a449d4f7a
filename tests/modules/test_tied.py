"""Layers that hold one weight go on doing so; the bias of a layer has the dtype that nn.Linear's would."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear
from dynquant.nn.merged import MergedGroup
from tests.support.same_bits import assert_same_bits


class Tied(nn.Module):
    """An encoder and a decoder with one weight, and biases of their own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def tied(seed: int = 0, **scheme: object) -> nn.Module:
    return dynquant.quantize_dynamic(Tied(seed), **scheme)


def assert_tied(model: nn.Module) -> None:
    first, second = model.first.weight, model.second.weight
    for name in ("packed_weight", "weight_sum", "channel_scale"):
        assert getattr(first, name) is getattr(second, name)
        assert getattr(model.first, name) is getattr(model.second, name)


SCHEMES = [{}, {"activations": "per_tensor", "weights": "per_tensor"}, {"rotation": "hadamard"}]
CHANGES: dict[str, Callable[[nn.Module, nn.Module], object]] = {
    "load": lambda model, other: model.load_state_dict(other.state_dict()),
    "assign": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "float weights": lambda model, other: model.load_state_dict(Tied(1).state_dict()),
    "half": lambda model, other: (other.half(), model.load_state_dict(other.state_dict())),
    "cast, then load": lambda model, other: (model.half(), model.load_state_dict(other.state_dict())),
    "cast, then assign": lambda model, other: (
        model.double(),
        model.load_state_dict(other.state_dict(), assign=True),
    ),
}


@pytest.mark.filterwarnings("ignore:QLinear. the state_dict holds float weights")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tied_layers_stay_tied_when_they_are_loaded(change, scheme: dict[str, object]) -> None:
    model, other = tied(**scheme), tied(1, **scheme)
    assert_tied(model)
    change(model, other)
    assert_tied(model)
    x = torch.randn(3, 24)
    assert_same_bits(model(x).detach(), other(x).detach())


@pytest.mark.parametrize("assign", [False, True])
def test_tied_layers_stay_tied_when_the_file_has_another_scheme(assign: bool) -> None:
    model, other = tied(), tied(1, rotation="hadamard", weights="per_tensor")
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_tied(model)
    x = torch.randn(3, 24)
    assert_same_bits(model(x).detach(), other(x).detach())


@pytest.mark.parametrize("key", ["first", "second"])
def test_a_file_with_one_of_two_tied_layers_is_for_both(key: str) -> None:
    model, other = tied(), tied(1)
    state = {name: value for name, value in other.state_dict().items() if name.startswith(key)}
    model.load_state_dict(state, strict=False)
    assert_tied(model)
    assert_same_bits(model.first.weight.int_repr(), other.first.weight.int_repr())


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16).to("cpu", torch.float64),
        lambda model: model.to("meta"),
        lambda model: model.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
    ],
    ids=["half", "to", "meta", "to_empty", "deepcopy"],
)
def test_tied_layers_stay_tied_when_they_are_cast_moved_or_copied(move) -> None:
    model = move(tied())
    assert_tied(model)
    assert model.first.weight is model.second.weight


def test_layers_that_are_not_tied_stay_apart() -> None:
    model = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model.load_state_dict(
        {
            **model.state_dict(),
            **{f"1{key[1:]}": value for key, value in model.state_dict().items() if key[0] == "0"},
        }
    )
    assert_same_bits(model[0].weight.int_repr(), model[1].weight.int_repr())
    assert model[0].packed_weight is not model[1].packed_weight


def test_loading_keeps_the_memory_of_a_weight() -> None:
    """As that of a Parameter: who holds it (a captured graph, another process) sees the new values."""
    layer, other = QLinear(24, 7), QLinear(24, 7)
    before, address = layer.packed_weight, layer.packed_weight.data_ptr()
    state = {name: value.clone() for name, value in other.state_dict().items()}
    layer.load_state_dict(state)
    assert layer.packed_weight is before
    assert before.data_ptr() == address
    layer.load_state_dict(QLinear(24, 7).state_dict())
    for name, value in other.state_dict().items():
        assert_same_bits(state[name], value)  # what was loaded first is not the layer's own memory


def test_merged_layers_stay_merged_when_they_are_loaded() -> None:
    layers = [QLinear(24, 64) for _ in range(2)]
    group = MergedGroup(layers)
    memory = group.merged.packed_weight
    for layer in group.layers:
        other = QLinear(24, 64)
        layer.load_state_dict(other.state_dict())
        assert_same_bits(layer.weight.int_repr(), other.weight.int_repr())
    assert group.merged.packed_weight is memory


# ---- the dtype of the bias


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAKERS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "cast": lambda dtype: QLinear(24, 7).to(dtype),
    "made": lambda dtype: QLinear(24, 7, dtype=dtype),
    "converted": lambda dtype: dynquant.quantize_dynamic(nn.Sequential(nn.Linear(24, 7)).to(dtype)),
    "converted, cast": lambda dtype: dynquant.quantize_dynamic(nn.Sequential(nn.Linear(24, 7))).to(dtype),
    "rotated": lambda dtype: QLinear(24, 7, rotation="hadamard").to(dtype),
    "per_tensor": lambda dtype: QLinear(24, 7, activations="per_tensor", weights="per_tensor").to(dtype),
    "fused": lambda dtype: QLinear(24, 7, epilogue="gelu").to(dtype),
    "merged": lambda dtype: MergedGroup([QLinear(24, 64), QLinear(24, 64)]).layers[0].to(dtype),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_parameters_have_the_dtype_of_the_model(make, dtype: torch.dtype) -> None:
    """Code casts its input to that of the first parameter."""
    model = make(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    x = torch.randn(3, 24).to(next(model.parameters()).dtype)
    assert model(x).dtype == dtype
    fp32 = copy.deepcopy(model).float()
    assert_same_bits(model(x).detach(), fp32(x).detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_file_keeps_the_dtype_of_its_bias(own: torch.dtype, dtype: torch.dtype, assign: bool) -> None:
    saved = QLinear(24, 7).to(dtype)
    assert saved.state_dict()["bias"].dtype == dtype
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    layer = QLinear(24, 7).to(own)
    bias = layer.bias
    layer.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert layer.bias.dtype == layer.weight.dtype == dtype
    assert assign or layer.bias is bias
    x = torch.randn(3, 24)
    assert_same_bits(layer(x).detach(), saved(x).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_fp32_beside_a_weight_of_another_dtype_keeps_its_bits(dtype: torch.dtype) -> None:
    """Files that were written before casts reached the bias."""
    saved = QLinear(24, 7)
    state = saved.state_dict() | {"format": QLinear(24, 7).to(dtype).state_dict()["format"]}
    layer = QLinear(24, 7).to(dtype)
    layer.load_state_dict(state)
    assert layer.weight.dtype == dtype
    x = torch.randn(3, 24)
    assert_same_bits(layer(x).detach(), saved(x).detach())


@pytest.mark.filterwarnings("ignore:QLinear. the state_dict holds float weights")
@pytest.mark.parametrize(("assign", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_float_weights_are_loaded_as_nn_linear_loads_them(assign: bool, expected: torch.dtype) -> None:
    float_state = nn.Linear(24, 7).to(torch.bfloat16).state_dict()
    for layer in (nn.Linear(24, 7), QLinear(24, 7)):
        layer.load_state_dict(float_state, assign=assign)
        assert layer.weight.dtype == layer.bias.dtype == expected
    assert layer(torch.randn(3, 24)).shape == (3, 7)


@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_a_tied_embedding_compiles_whole(rotation: str | None) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 64)
            self.head = torch.nn.Linear(64, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.embedding(ids))
            return out

    model = dynquant.quantize_dynamic(Tied(), embeddings=True, rotation=rotation)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(5)
    torch.testing.assert_close(compiled(ids), model(ids))
