"""QModule: the answers of QLinear, and modules of other shapes in conversion, thresholds and report."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynquant
from dynquant import Config, QLinear, QModule, QTensor, quantize_dynamic
from dynquant.nn.merged import MergedGroup
from tests.support.paths import ROOT
from tests.support.reporting import X, names, reasons, reported
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("quick_measuring")


def test_no_room_asks_for_a_type() -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dynquant").rglob("*.py")
        if re.search(r"isinstance\([^)]*QLinear|type\(\w+\) is (not )?QLinear", path.read_text())
    ]
    inside = {f"dynquant/nn/{name}.py" for name in ("linear", "merged", "block_call", "multihead_attention")}
    assert set(found) <= inside | {"dynquant/demo/regression.py"}


@pytest.mark.parametrize(
    "scheme", [{}, {"rotation": "hadamard"}, {"weights": "per_tensor", "epilogue": "gelu"}]
)
def test_answers_of_a_linear_layer(scheme: dict[str, Any]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 24)
    layer = QLinear.from_float(linear, **scheme)
    x = torch.randn(3, 16)
    y = layer.expected(linear, x)
    assert_same_bits(y, F.gelu(linear(x)) if "epilogue" in scheme else linear(x))
    assert_same_bits(layer.expected(linear, input=x), y)
    assert layer.matrix_shape == (24, 16)
    assert layer.fits(linear)
    assert not layer.fits(nn.Linear(24, 16))
    assert not layer.fits(nn.ReLU())
    assert {name: id(weight) for name, weight in layer.quantized_weights().items()} == {
        "weight": id(layer.weight)
    }
    assert list(layer.int8_tensors()) == ["packed_weight"]
    assert set(layer.other_tensors()) == {"bias", "weight_sum", "channel_scale"}
    (seen,) = layer.quantized_inputs((x,), {}).values()
    assert seen is x
    assert layer.quantized_inputs((), {"input": x}) == {"input": x}
    assert layer.quantized_inputs(("x",), {}) == {}
    assert layer.takes_epilogue == ("epilogue" not in scheme)
    assert (layer.why_not_static() is None) == ("rotation" not in scheme)
    call = layer.op_call()
    assert call is not None
    assert_same_bits(call.op(x, *call.constants.values(), call.config), layer(x))
    assert Config(**layer.saved_scheme()) == layer.config


def test_answers_of_static_and_merged_layers() -> None:
    layer = QLinear(16, 64)
    layer.set_activation_qparams(torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32))
    assert layer.is_static
    assert layer.saved_scheme() == {"static": True}
    call = layer.op_call()
    assert call is not None
    x = torch.randn(2, 16)
    assert_same_bits(call.op(x, *call.constants.values(), call.config), layer(x))
    group = MergedGroup([QLinear(16, 64), QLinear(16, 64)])
    assert [part.merged_count for part in group.layers] == [2, 2]
    assert not any(part.is_mergeable for part in group.layers)


class Pairwise(nn.Module):
    """A float module with two inputs, two weights and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x @ self.left.T, {"right": y @ self.right.T}


class QPairwise(QModule):
    quantized_input_names = ("x", "y")
    left: QTensor
    right: QTensor

    @classmethod
    def from_float(cls, module: Pairwise, activations: str = "per_token") -> QPairwise:
        self = cls()
        self.scheme = Config(activations)
        self.left = QTensor.quantize(module.left.detach(), self.scheme)
        self.right = QTensor.quantize(module.right.detach(), self.scheme)
        return self

    @property
    def config(self) -> Config:
        return self.scheme

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return 8, 12

    def quantized_weights(self) -> dict[str, QTensor]:
        return {"left": self.left, "right": self.right}

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return F.linear(x, self.left), {"right": F.linear(y, self.right)}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Pairwise(), Pairwise()
        self.other.left = self.one.left

    def forward(self, x: Tensor) -> Tensor:
        a, rest = self.one(x, y=x * 2)
        b, _ = self.other(x, x)
        return torch.cat([a, rest["right"], b], -1)


def test_a_module_with_several_inputs_weights_and_outputs() -> None:
    quantized, report = reported(Twice(), qconfig_spec={Pairwise}, mapping={Pairwise: QPairwise}, min_sqnr=20)
    assert type(quantized.one) is QPairwise
    assert quantized.one.left is quantized.other.left, "tied weights stay tied"
    assert names(report) == ["one", "other"]
    row = report.layers[0]
    assert (row.float_type, row.int8_type, row.n, row.k) == ("Pairwise", "QPairwise", 8, 12)
    assert (row.calls, row.rows, row.activations) == (1, (5,), "per_token")
    assert 20 < row.sqnr_db < 60
    with torch.no_grad():
        assert (quantized(X) - Twice()(X)).norm() / Twice()(X).norm() < 0.05
    with pytest.raises(ValueError, match="expected a model with QLinear layers"):
        dynquant.freeze(quantized)


class Zeros(nn.Module):
    """What a user's mapping may convert a layer to."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Zeros:
        return cls(linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.n)


class Cut(Zeros):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], 1)


class Special(nn.Module):
    """A module of the user's with layers inside; it writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(12, 12)

    @property
    def out_features(self) -> int:
        return self.inner.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2))


class QSpecial(nn.Module):
    def __init__(self, inner: QModule) -> None:
        super().__init__()
        self.inner = inner

    @classmethod
    def from_float(cls, module: Special) -> QSpecial:
        return cls(QLinear.from_float(module.inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2))


def test_what_a_mapping_converted_is_measured_and_judged() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 3))
    quantized, report = reported(model, mapping={nn.Linear: Zeros})
    assert [type(layer) for layer in quantized] == [Zeros, Zeros]
    assert [(row.name, row.int8_type, row.sqnr_db, row.n) for row in report.layers] == [
        ("0", "Zeros", 0.0, 6),
        ("1", "Zeros", 0.0, 3),
    ]
    quantized, report = reported(model, mapping={nn.Linear: Zeros}, min_sqnr=20)
    assert [type(layer) for layer in quantized] == [nn.Linear, nn.Linear]
    assert names(report) == []
    assert reasons(report) == dict.fromkeys(
        ("0", "1"), "its int8 output has an SQNR of 0.0 dB, below min_sqnr=20"
    )
    quantized = quantize_dynamic(nn.Linear(12, 6), mapping={nn.Linear: Cut}, sample=X, min_sqnr=-50)
    assert type(quantized) is nn.Linear, "an output of another shape is no output"


def test_a_users_own_type_is_measured_whole() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.special, self.head = Special(), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.special(x.clone()))

    model, x = Model(), X.clone()
    quantized, report = reported(
        model, sample=x, qconfig_spec={Special, nn.Linear}, mapping={Special: QSpecial, nn.Linear: QLinear}
    )
    assert [type(part) for part in quantized.children()] == [QSpecial, QLinear]
    rows = {row.name: row for row in report.layers}
    assert rows["special"].sqnr_db > 30
    assert (rows["special"].scheme, rows["special"].n, rows["special"].rows) == (("QSpecial",), None, (5,))
    assert "special" in str(report)
    assert_same_bits(x, X)
    again = dynquant.report(model, quantized, x)
    assert names(again) == names(report)


class QWhole(QModule):
    """Takes a whole module with the layers in it, as an encoder layer does."""

    converts_parts = True
    quantized_input_names = ("x",)
    inner: QLinear

    @classmethod
    def from_float(cls, module: Special, **scheme: Any) -> QWhole:
        self = cls()
        self.inner = QLinear.from_float(module.inner)
        return self

    @property
    def config(self) -> Config:
        return self.inner.config

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.inner.matrix_shape

    def quantized_weights(self) -> dict[str, QTensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2)


def test_a_module_that_takes_its_parts_along() -> None:
    model = nn.Sequential(Special(), nn.Linear(12, 3))
    calls: list[nn.Module] = []
    plain = QLinear.from_float

    class Counted(QLinear):
        @classmethod
        def from_float(cls, linear: nn.Linear, **scheme: Any) -> QLinear:  # type: ignore[override]
            calls.append(linear)
            return plain(linear, **scheme)

    quantized = quantize_dynamic(model, {Special, nn.Linear}, mapping={Special: QWhole, nn.Linear: Counted})
    assert [type(part) for part in quantized] == [QWhole, QLinear]
    assert calls == [model[1]]
    x = X.clone()
    assert names(dynquant.report(model, quantized, x)) == ["0", "0.inner", "1"]
