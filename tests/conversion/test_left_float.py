"""One warning says what a conversion leaves float although its user may expect otherwise, with counts and
reasons; the report has the rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    get_default_qat_qconfig,
    per_channel_dynamic_qconfig,
    prepare_qat,
)
from torch.ao.quantization.quantization_mappings import get_default_dynamic_quant_module_mappings
from transformers.pytorch_utils import Conv1D

import dynquant
from dynquant import QEmbedding, QLinear, quantize_dynamic
from tests.support.nets import converted
from tests.support.reporting import names, reasons, reported

pytestmark = [
    pytest.mark.usefixtures("quick_measuring"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
AO = torch.ao.nn.quantized
X = torch.linspace(-2, 3, 40).reshape(5, 8)
NONE = "quantize_dynamic: no layer was converted; "


def said(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of a call and its one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = call()
    own = [item for item in caught if str(item.message).startswith(("quantize_dynamic", "fuse", "dynquant"))]
    assert len(own) < 2, own
    assert all(item.filename == __file__ for item in own)
    return result, str(own[0].message) if own else None


class OwnForward(nn.Linear):
    """A linear layer that does not call F.linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.gate_up[0]


def hooked() -> nn.Module:
    """A layer as accelerate leaves it: a forward in the instance, and the hook that it runs."""
    layer = nn.Linear(8, 8)
    layer._hf_hook = object()
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    return layer


def for_training() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).train()
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model)


LINEAR = "1 layer converted; left as they are: "


@pytest.mark.parametrize(
    ("make", "spec", "sentence"),
    [
        (
            lambda: nn.Sequential(nn.Linear(8, 8), *(OwnForward(8, 8) for _ in range(8))),
            None,
            LINEAR + "8 OwnForward ('1', '2', '3' and 5 more): its forward is not that of Linear, and reads",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.RNN(8, 8))),
            None,
            LINEAR + "1 RNN ('1.0'): there is no int8 version of it",
        ),
        (
            lambda: nn.Sequential(Conv1D(8, 8), nn.Linear(8, 8)),
            {nn.Linear},
            LINEAR + "1 Conv1D ('0'): the spec names Linear, and not its type",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), Experts()),
            {nn.Linear},
            LINEAR + "1 Experts ('1'): its weights are 3-D, a matrix for each expert, and there is no int8",
        ),
        (
            lambda: nn.Sequential(hooked(), hooked()),
            None,
            NONE + "left as they are: 2 Linear ('0', '1'): accelerate replaced its forward; call remove_hook",
        ),
        (
            for_training,
            None,
            NONE + "left as they are: 1 Linear ('0'): torch.ao.quantization.prepare_qat made it; convert the",
        ),
        (
            lambda: torch.jit.trace(nn.Sequential(nn.Linear(8, 8)), X),
            None,
            NONE + "left as they are: 1 Sequential (the model itself): torch.jit.script or torch.jit.trace",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8))),
            {nn.Linear},
            LINEAR + "1 Linear ('1'): torch.jit.script or torch.jit.trace made it; convert the model before",
        ),
        (lambda: nn.Sequential(nn.ReLU()), None, NONE + "Sequential has none to convert"),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 1)), {nn.Linear}, NONE + "left as they are: 1 Conv1d ('0')"),
        (
            lambda: nn.Sequential(QLinear(8, 8)),
            None,
            NONE + "left as they are: 1 QLinear ('0'): it was a QLinear before",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Embedding(5, 8), nn.LayerNorm(8)), None, None),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8), nn.Conv1d(2, 3, 1)), {nn.Linear}, None),
        (lambda: nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8)), None, None),
        (lambda: nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8)), {"0"}, None),
    ],
)
def test_one_warning_with_counts_and_reasons(
    make: Callable[[], nn.Module], spec: Any, sentence: str | None
) -> None:
    torch.manual_seed(0)
    _, message = said(lambda: quantize_dynamic(make(), spec))
    if sentence is None:
        assert message is None
    else:
        assert message is not None
        assert sentence in message


def test_the_report_has_the_rows() -> None:
    model = nn.Sequential(
        OwnForward(8, 8), Experts(), hooked(), torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 4)
    ).eval()
    with pytest.warns(UserWarning, match="1 layer converted; left as they are: 1 OwnForward"):
        _, report = reported(model, X)
    assert names(report) == ["4"]
    assert {name: reason.split(";")[0] for name, reason in reasons(report).items()} == {
        "0": "its forward is not that of Linear, and reads the weight by T",
        "1": "its weights are 3-D, a matrix for each expert, and there is no int8 version of such a module",
        "2": "accelerate replaced its forward",
        "3": "torch.jit.script or torch.jit.trace made it",
    }
    assert [row.type for row in report.skipped] == ["OwnForward", "Experts", "Linear", "Linear"]
    assert [row.bytes for row in report.skipped] == [288, 1024, 288, 288]


def test_layers_that_miss_a_threshold_need_no_warning() -> None:
    """The user asked for it, and the report says it."""
    _, message = said(lambda: quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), sample=X, min_sqnr=1e6))
    assert message is None


def test_a_fusion_without_effect() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    expected = "fuse: nothing was fused: none of the 1 quantized layers is followed by an activation with an "
    for options in ({}, {"sample": X}):
        _, message = said(lambda options=options: quantize_dynamic(model, fuse=True, **options))
        assert message is not None
        assert message.startswith(expected)
        assert "(Sequential); dynquant.register_pattern adds patterns" in message
    _, message = said(lambda: dynquant.fuse(quantize_dynamic(model)))
    assert message is not None
    assert message.startswith(f"dynquant.{expected}")
    _, message = said(lambda: dynquant.fuse(model))
    assert message == "dynquant.fuse: nothing was fused: the model has no quantized layers"
    both = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), OwnForward(8, 8))
    _, message = said(lambda: quantize_dynamic(both, fuse=True))
    assert message is not None
    assert "1 OwnForward ('2'): its forward is not that of Linear, and reads the weight by T. fuse" in message
    fused, message = said(lambda: quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), fuse=True))
    assert message is None
    assert said(lambda: dynquant.fuse(fused))[1] is None, "fused before"


# ---- what torch.ao takes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lstm, self.head = nn.Embedding(10, 8), nn.LSTM(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


IDS = torch.arange(6).reshape(3, 2)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({nn.Embedding: float_qparams_weight_only_qconfig}, None),
        ({"embedding": float_qparams_weight_only_qconfig}, None),
        (
            {nn.LSTM: float16_dynamic_qconfig},
            "1 LSTM ('lstm'): its qconfig asks for weights of torch.float16",
        ),
        ({"lost": None}, "qconfig_spec names 'lost', which the model does not have"),
        ({"heat": None}, "names 'heat', which the model does not have; did you mean 'head'?"),
        ({nn.GRU: float16_dynamic_qconfig}, None),
    ],
)
def test_specs_that_torch_ao_takes(more: dict[Any, Any], sentence: str | None) -> None:
    spec = {nn.Linear: per_channel_dynamic_qconfig, **more}
    quantized, message = said(lambda: quantize_dynamic(Net(), spec))
    assert converted(quantized) == ["head"]
    assert type(quantized.lstm) is nn.LSTM
    asks_for_embedding = not {nn.Embedding, "embedding"}.isdisjoint(more)
    assert type(quantized.embedding) is (QEmbedding if asks_for_embedding else nn.Embedding)
    assert (message is None) == (sentence is None)
    assert sentence is None or sentence in str(message)


def test_torch_aos_classes_in_a_mapping() -> None:
    model = Net()
    quantized, message = said(
        lambda: quantize_dynamic(model, {nn.Linear}, mapping={nn.Linear: AO.dynamic.Linear})
    )
    assert message is None
    assert type(quantized.head) is AO.dynamic.Linear
    assert quantized.head.weight().qscheme() == torch.per_channel_affine
    mapping = get_default_dynamic_quant_module_mappings()
    quantized = quantize_dynamic(model, mapping=mapping, weights="per_tensor")
    assert [type(part) for part in quantized.children()] == [nn.Embedding, AO.dynamic.LSTM, AO.dynamic.Linear]
    assert quantized.head.weight().qscheme() == torch.per_tensor_affine
    assert not list(quantized.parameters(recurse=False))
    assert {name for name, _ in quantized.named_parameters()} == {"embedding.weight"}, "no float weights kept"
    spec = {
        nn.Linear: default_dynamic_qconfig,
        nn.LSTM: float16_dynamic_qconfig,
        nn.Embedding: float_qparams_weight_only_qconfig,
    }
    quantized = quantize_dynamic(model, spec, mapping=mapping)
    assert [type(part) for part in quantized.children()] == [AO.Embedding, AO.dynamic.LSTM, AO.dynamic.Linear]
    assert quantized.head.weight().qscheme() == torch.per_tensor_affine
    assert (quantized(IDS) - model(IDS)).norm() / model(IDS).norm() < 0.05
    assert not any(hasattr(part, "qconfig") for part in model.modules())


def test_torch_aos_modules_are_measured_and_judged() -> None:
    mapping = get_default_dynamic_quant_module_mappings()
    spec = {
        nn.Linear: default_dynamic_qconfig,
        nn.LSTM: default_dynamic_qconfig,
        nn.Embedding: float_qparams_weight_only_qconfig,
    }
    quantized, report = reported(Net(), IDS, qconfig_spec=spec, mapping=mapping)
    assert names(report) == ["embedding", "lstm", "head"]
    assert all(row.calls == 1 and row.rows == (6,) and row.sqnr_db > 25 for row in report.layers)
    assert all(0 < row.bytes_int8 < row.bytes_float for row in report.layers)
    assert names(dynquant.report(Net(), quantized, IDS)) == names(report)
    quantized, report = reported(Net(), IDS, qconfig_spec=spec, mapping=mapping, min_sqnr=1000)
    assert not names(report)
    assert all("below min_sqnr=1000" in reason for reason in reasons(report).values())
    assert [type(part) for part in quantized.children()] == [nn.Embedding, nn.LSTM, nn.Linear]


def test_torch_aos_linear_does_not_break_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16).eval()
    x = torch.randn(3, 2, 8)
    mapping = {nn.Linear: AO.dynamic.Linear}
    with pytest.warns(
        UserWarning, match="'self_attn.out_proj'.: nn.MultiheadAttention reads its weight, which"
    ):
        quantized = quantize_dynamic(model, mapping=mapping)
    assert (quantized(x) - model(x)).norm() / model(x).norm() < 0.05


def test_a_failing_from_float_leaves_no_qconfig() -> None:
    class Failing:
        @staticmethod
        def from_float(module: nn.Linear) -> nn.Module:
            assert module.qconfig is not None
            raise ValueError("not today")

    model = Net()
    with pytest.raises(ValueError, match="layer 'head': not today"):
        quantize_dynamic(model, mapping={nn.Linear: Failing}, inplace=True)
    assert not any(hasattr(part, "qconfig") for part in model.modules())
