"""Names that code written for torch.ao's layers reads from a QLinear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear, QTensor
from dynquant.demo.regression import quantize_with_torch_ao
from dynquant.nn.merged import MergedGroup
from tests.support.same_bits import assert_same_bits

LAYERS = {
    "dynamic": lambda: QLinear(24, 7),
    "without bias": lambda: QLinear(24, 7, bias=False),
    "per_tensor": lambda: QLinear(24, 7, activations="per_tensor", weights="per_tensor"),
    "rotated": lambda: QLinear(24, 7, rotation="hadamard"),
    "fused": lambda: QLinear(24, 7, epilogue="relu"),
    "merged": lambda: MergedGroup([QLinear(24, 64), QLinear(24, 64)]).layers[0],
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> QLinear:
    return LAYERS[request.param]()


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_constants_of_torch_ao(bias: bool) -> None:
    float_model = nn.Sequential(nn.Linear(24, 7, bias=bias))
    (theirs,), (ours,) = quantize_with_torch_ao(float_model), dynquant.quantize_dynamic(float_model)
    assert (ours.scale, ours.zero_point) == (theirs.scale, theirs.zero_point)
    for one, other in zip(ours._weight_bias(), theirs._weight_bias(), strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.shape == other.shape
    assert ours._weight_bias()[0].int_repr().shape == theirs._weight_bias()[0].int_repr().shape


def test_weight_and_bias_are_given_and_taken(layer: QLinear) -> None:
    weight, bias = layer._weight_bias()
    assert weight is layer.weight
    assert bias is layer.bias
    other = QLinear(
        24,
        layer.out_features,
        bias is not None,
        **{name: getattr(layer.config, name) for name in ("activations", "weights", "epilogue")},
        rotation=layer.config.rotation_block or None,
    )
    x = torch.randn(3, 24)
    other.set_weight_bias(*layer._weight_bias())
    assert_same_bits(other(x).detach(), layer(x).detach())
    assert other.bias is None or other.bias is not layer.bias


def test_a_float_weight_and_no_bias(layer: QLinear) -> None:
    torch.manual_seed(1)
    weight = torch.randn(layer.out_features, 24)
    layer.set_weight_bias(weight, None)
    assert layer.bias is None
    assert type(layer.weight) is QTensor
    assert (layer.dequantize_weight() - weight).abs().max() < 0.05


@pytest.mark.parametrize("qscheme", ["per_tensor", "per_channel"])
def test_a_weight_that_torch_quantized(qscheme: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(7, 24)
    if qscheme == "per_tensor":
        theirs = torch.quantize_per_tensor(weight, 0.03, 0, torch.qint8)
    else:
        theirs = torch.quantize_per_channel(weight, torch.full([7], 0.03), torch.zeros(7), 0, torch.qint8)
    layer = QLinear(24, 7)
    layer.set_weight_bias(theirs, torch.zeros(7))
    assert (layer.dequantize_weight() - theirs.dequantize()).abs().max() <= layer.weight_scale.max() / 2


@pytest.mark.parametrize(
    ("weight", "bias", "sentence"),
    [
        (torch.zeros(7, 24), torch.zeros(6), r"expected bias of shape \[7\], got \[6\]"),
        (torch.zeros(7, 24), torch.full([7], torch.nan), "expected bias without NaN"),
        (torch.zeros(7, 24), torch.zeros(7, dtype=torch.int32), "expected bias of dtype float32"),
        (torch.zeros(7, 23), torch.zeros(7), r"expected a weight of shape \[7, 24\], got \[7, 23\]"),
        (torch.full([7, 24], torch.inf), torch.zeros(7), "inf"),
    ],
)
def test_what_does_not_fit_changes_nothing(weight: Tensor, bias: Tensor, sentence: str) -> None:
    layer = QLinear(24, 7)
    x = torch.randn(3, 24)
    expected = layer(x).detach()
    with pytest.raises(ValueError, match=sentence):
        layer.set_weight_bias(weight, bias)
    assert_same_bits(layer(x).detach(), expected)


def test_a_subclass_with_a_scale_of_its_own_keeps_it() -> None:
    class Scaled(nn.Linear):
        zero_point = 3

        def __init__(self) -> None:
            super().__init__(24, 7)
            self.scale = 2.5

    (layer,) = dynquant.quantize_dynamic(nn.Sequential(Scaled()))
    assert type(layer) is QLinear
    assert (layer.scale, layer.zero_point) == (2.5, 3)
    layer.scale = 4.0
    assert layer.scale == 4.0


def test_a_name_that_nobody_has_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        QLinear(24, 7).no_such_name  # noqa: B018
