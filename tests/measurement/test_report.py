"""The conversion report: measurements, reasons, and unchanged models."""

from __future__ import annotations

import copy
import gc
import importlib
import math
import warnings
import weakref
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import dynquant
from dynquant import Config, QLinear, quantize_dynamic
from dynquant.conversion.plan import NOT_ASKED_FOR
from dynquant.measurement import layers as measure
from dynquant.measurement.sample import Sample
from tests.support.nets import Net, assert_unchanged, converted, net, state
from tests.support.reporting import X, decibels, names, reasons, reported
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("quick_measuring")


# ---- contents of a report


def test_one_row_a_layer_with_size_scheme_and_closeness() -> None:
    model = net().eval()
    quantized = quantize_dynamic(model, rotation="hadamard")
    report = dynquant.report(model, quantized, X)
    assert names(report) == ["fc1", "block.0", "block.2", "head"]
    first, last = report.layers[0], report.layers[-1]
    assert (first.activations, first.weights, first.rotation_block) == ("per_token", "per_channel", 4)
    assert (first.epilogue, first.static, first.shares_input) == ("none", False, 1)
    assert (first.float_type, first.int8_type) == ("Linear", "QLinear")
    assert [(layer.n, layer.k) for layer in report.layers] == [(16, 12), (16, 16), (16, 16), (4, 16)]
    assert (first.calls, first.rows) == (1, (5,))
    assert first.bytes_float == 4 * (16 * 12 + 16)
    packed = quantized.fc1.weight.packed_weight.nbytes
    assert first.bytes_int8 == packed + 3 * 4 * 16, "packed weight, weight_sum, weight_scale, bias"
    assert first.bytes_int8 < first.bytes_float
    with torch.no_grad():
        hidden = model.block(model.norm(model.fc1(X)))
        pairs = [
            (first, model.fc1(X), quantized.fc1(X)),
            (last, model.head(hidden), quantized.head(hidden)),
            (report.model, model(X), quantized(X)),
        ]
    for row, expected, actual in pairs:
        assert row.sqnr_db == pytest.approx(decibels(expected, actual), abs=1e-6)
        assert row.cosine == pytest.approx(
            F.cosine_similarity(expected.flatten(), actual.flatten(), 0).item()
        )
        assert row.speedup is not None
        assert row.speedup > 0
    assert first.us_float > 0
    assert first.us_int8 > 0
    assert report.model.type == "Net"
    assert report.model.bytes_float == sum(p.nbytes for p in model.parameters())
    assert report.skipped == ()
    assert report.threads == torch.get_num_threads()
    assert report.isa == dynquant.isa()
    assert report.sample == "float32 [5, 12]"


def test_quantize_dynamic_gives_the_same_report_beside_the_model() -> None:
    model = net()
    quantized, report = reported(model, activations="per_tensor")
    again = dynquant.report(model, quantized, X)
    for one, other in zip(report.layers, again.layers, strict=True):
        assert (one.sqnr_db, one.cosine, one.bytes_int8) == (other.sqnr_db, other.cosine, other.bytes_int8)
        assert one.scheme == other.scheme
    assert (report.model.sqnr_db, report.model.bytes_int8) == (again.model.sqnr_db, again.model.bytes_int8)
    assert isinstance(quantize_dynamic(model), Net)
    assert_same_bits(quantized.eval()(X), quantize_dynamic(model, activations="per_tensor")(X))


def test_times_of_several_calls_are_of_their_shapes(clock) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.fc(x), self.fc(x[:1]), self.fc(x[1:2]), self.fc(x[:0])])

    timed = clock(lambda m, n: 10.0 * m)
    model = Steps()
    _, report = reported(model)
    (layer,) = report.layers
    assert (layer.calls, layer.rows) == (4, (0, 1, 5))
    assert timed == [(5, 16), (1, 16)], "each shape once, nothing for an empty one"
    assert layer.us_float == 100.0
    assert layer.us_int8 == pytest.approx((50 + 10 + 10) / 3)
    assert layer.speedup == pytest.approx(300 / 70)


def test_many_shapes_are_not_all_timed(clock) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.fc(x[:1].expand(m, 12)) for m in range(1, 31)])

    timed = clock(lambda m, n: 50.0)
    _, report = reported(Growing())
    assert len(timed) == measure.TIMED_SHAPES
    assert report.layers[0].calls == 30
    assert "1 ... 30" in str(report)


def test_layers_that_the_sample_does_not_reach() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    quantized, report = reported(Half(), min_speedup=0, min_sqnr=-100)
    assert converted(quantized) == ["used", "unused"]
    unused = report.layers[1]
    assert (unused.calls, unused.rows, unused.speedup) == (0, (), None)
    assert (unused.sqnr_db, unused.cosine, unused.us_float, unused.us_int8) == (None, None, None, None)
    assert "not reached by the sample" in str(report)
    quantized = quantize_dynamic(Half(), sample=X, min_speedup=1e9)
    assert converted(quantized) == ["unused"]


def test_skipped_layers_and_reasons() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t() * 2

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 12)
            self.lstm = nn.LSTM(12, 12, batch_first=True)
            self.own, self.a, self.b, self.c = (
                Own(12, 12),
                nn.Linear(12, 12),
                nn.Linear(12, 12),
                nn.Linear(12, 3),
            )
            self.norm = nn.LayerNorm(12)
            self.c.qconfig = None

        def forward(self, ids: Tensor) -> Tensor:
            return self.c(self.norm(self.b(self.a(self.own(self.lstm(self.words(ids))[0])))))

    _, report = reported(Mixed(), torch.tensor([[1, 2, 3]]), qconfig_spec={nn.Linear: Config(), "b": None})
    assert names(report) == ["a"]
    assert reasons(report) == {
        "words": NOT_ASKED_FOR,
        "lstm": "the spec leaves it float",
        "own": "its forward is not that of Linear, and reads the weight by t",
        "b": "the spec leaves it float",
        "c": "the spec leaves it float",
    }
    assert [layer.name for layer in report.skipped] == ["words", "lstm", "own", "b", "c"]
    assert report.skipped[0].type == "Embedding"
    assert report.skipped[0].bytes == 7 * 12 * 4
    assert "its forward is not that of Linear" in str(report)


def test_fused_epilogues_are_held_to_the_layer_and_its_activation() -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(12, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16)]
    model = nn.Sequential(*parts, nn.ReLU(), nn.Linear(16, 16), nn.GELU()).eval()
    quantized, report = reported(model, fuse=True)
    assert [layer.epilogue for layer in report.layers] == ["gelu_tanh", "silu", "relu", "gelu"]
    x = X
    for layer, name in zip(report.layers, names(report), strict=True):
        index = int(name)
        expected = model[index + 1](model[index](x))
        assert layer.sqnr_db == pytest.approx(decibels(expected, quantized[index](x)), abs=1e-6)
        x = expected
    assert min(layer.sqnr_db for layer in report.layers) > 25


def test_layers_that_share_their_input_are_measured_each_alone(shared_attention, clock) -> None:
    clock(lambda m, n: n / 2)
    quantized, report = reported(shared_attention, (X, X[:3] + 1), fuse=True)
    assert [layer.shares_input for layer in report.layers] == [3, 3, 3]
    assert [layer.rows for layer in report.layers] == [(5,), (3,), (3,)]
    assert [layer.us_int8 for layer in report.layers] == [32, 32, 64]
    assert "input shared by 3" in str(report)
    for layer, x in zip(report.layers, (X, X[:3] + 1, X[:3] + 1), strict=True):
        expected = shared_attention.get_submodule(layer.name)(x)
        actual = quantized.get_submodule(layer.name)(x)
        assert layer.sqnr_db == pytest.approx(decibels(expected, actual), abs=1e-6)
    assert reported(shared_attention)[1].layers[0].shares_input == 1


def test_attention_of_torch_hands_its_out_projection_to_a_function() -> None:
    """out_proj is never called as a module, and the fast path calls no layer at all."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    quantized, report = reported(model, x, qconfig_spec={nn.Linear})
    assert torch.backends.mha.get_fastpath_enabled() is fast_path
    assert [layer.calls for layer in report.layers] == [1] * 6
    assert all(layer.rows == (10,) for layer in report.layers)
    assert min(layer.sqnr_db for layer in report.layers) > 25
    assert reasons(report)["layers.0.self_attn"] == "the spec leaves it float"
    seen: list[Tensor] = []
    attention = model.layers[0].self_attn
    with torch.no_grad():
        # With an identity for out_proj, the attention's output is out_proj's input.
        bare = copy.deepcopy(attention)
        bare.out_proj.weight.copy_(torch.eye(16))
        bare.out_proj.bias.zero_()
        seen.append(bare(x, x, x)[0])
        out = report.layers[0]
        assert out.name == "layers.0.self_attn.out_proj"
        actual = quantized.layers[0].self_attn.out_proj(seen[0])
        assert out.sqnr_db == pytest.approx(decibels(attention.out_proj(seen[0]), actual), abs=0.01)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_that_fails_leaves_no_mode_behind(bias: bool) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, bias=bias)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.attention(x, x, x[:, :5] if self.calls == 2 else x)[0]

    model = Failing()
    with pytest.raises(ValueError, match="the sample does not fit the float model: Failing was called with"):
        reported(model)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not model.attention._forward_hooks
    assert not model.attention._forward_pre_hooks


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("fuse", [False, True])
def test_hugging_face_models_and_outputs_of_a_tokenizer(name: str, fuse: bool) -> None:
    torch.manual_seed(0)
    config = (
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
        if name == "gpt2"
        else transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )
    model = transformers.AutoModel.from_config(config)
    encoding = transformers.BatchEncoding({"input_ids": torch.arange(24).reshape(2, 12)})
    assert isinstance(encoding, UserDict)
    quantized, report = reported(model, encoding, fuse=fuse)
    assert all(layer.calls == 1 for layer in report.layers if "pooler" not in layer.name)
    assert all(layer.sqnr_db > 20 for layer in report.layers)
    expected, actual = (m.eval()(**encoding).last_hidden_state for m in (model, quantized))
    assert report.model.sqnr_db > 20
    assert report.model.cosine == pytest.approx(1, abs=0.01)
    assert decibels(expected, actual) > 20
    assert NOT_ASKED_FOR in reasons(report).values()
    if name == "gpt2":
        first = report.layers[0]
        assert (first.float_type, first.n, first.k) == ("Conv1D", 96, 32)
        assert first.bytes_float == 4 * (96 * 32 + 96)
    if fuse:
        assert any(layer.epilogue != "none" for layer in report.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    _, report = reported(net().to(dtype), X.to(dtype))
    assert all(20 < layer.sqnr_db < 60 for layer in report.layers)
    assert report.layers[0].bytes_float == dtype.itemsize * (16 * 12 + 16)


def test_under_autocast_and_inference_mode() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, report = reported(net())
    assert report.model.sqnr_db > 20
    with torch.inference_mode():
        quantized, report = reported(net(), X.clone())
    assert report.model.sqnr_db > 20
    quantized(X.clone().requires_grad_()).sum().backward()


def test_static_layers() -> None:
    model = net().eval()
    quantized = quantize_dynamic(model)
    with dynquant.calibrate(quantized):
        quantized(X)
    dynquant.freeze(quantized)
    report = dynquant.report(model, quantized, X)
    assert all(layer.static for layer in report.layers)
    assert report.model.sqnr_db > 20
    assert "all layers: static, per_channel" in str(report)


def test_layers_of_torch_ao_are_measured_too() -> None:
    model = net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    report = dynquant.report(model, theirs, X)
    assert names(report) == ["fc1", "block.0", "block.2", "head"]
    first = report.layers[0]
    assert (first.activations, first.weights, first.n, first.k) == (None, None, 16, 12)
    assert 16 * 12 + 4 * 16 <= first.bytes_int8 < first.bytes_float
    assert first.sqnr_db > 20


def test_a_graph_is_measured_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    graph = dynquant.fuse_graph(torch.fx.symbolic_trace(quantize_dynamic(model)))
    report = dynquant.report(model, graph, X)
    assert report.layers == ()
    assert report.skipped == ()
    assert report.model.sqnr_db == pytest.approx(decibels(model(X), graph(X)), abs=1e-6)
    assert report.model.bytes_int8 < report.model.bytes_float


def test_parametrized_tied_and_partly_converted_models() -> None:
    shared = nn.Linear(12, 12)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 12)), shared, nn.ReLU(), shared)
    quantized, report = reported(model)
    assert names(report) == ["0", "1"]
    assert report.layers[1].calls == 2
    assert report.skipped == ()
    once = quantize_dynamic(model, {"1"})
    twice, report = reported(once)
    assert names(report) == ["0"]
    assert reasons(report) == {"1": "it was a QLinear before"}
    assert_same_bits(twice(X), quantized(X))


def test_the_root_module_itself() -> None:
    linear = nn.Linear(12, 4)
    layer, report = reported(linear)
    assert isinstance(layer, QLinear)
    assert names(report) == [""]
    assert "(the model)" in str(report)
    layer, report = reported(linear, min_speedup=1e9)
    assert type(layer) is nn.Linear
    assert "below min_speedup=1e+09" in reasons(report)[""]


def test_a_from_float_of_the_users() -> None:
    class Pair(nn.Sequential):
        @classmethod
        def from_float(cls, module: nn.Sequential) -> nn.Module:
            return nn.Sequential(*(QLinear.from_float(layer) for layer in module))

    model = nn.Sequential(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), nn.Linear(12, 12))
    mapping = {nn.Sequential: Pair, nn.Linear: QLinear}
    quantized, report = reported(model, qconfig_spec={"0", "1"}, mapping=mapping, min_sqnr=1e6, min_speedup=0)
    assert converted(quantized) == []
    assert names(report) == []
    assert all("below min_sqnr=1e+06" in reasons(report)[name] for name in ("0", "1"))
    quantized, report = reported(model, qconfig_spec={"0", "1"}, mapping=mapping, min_sqnr=10)
    assert converted(quantized) == ["0.0", "0.1", "1"]
    assert names(report) == ["0", "0.0", "0.1", "1"], "the layer as a whole, and what is in it"
    assert report.layers[0].sqnr_db < report.layers[1].sqnr_db


# ---- outputs and samples of every kind


@dataclass
class Answer:
    scores: Tensor
    ids: Tensor
    more: dict[str, Any]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: {"a": [y], "b": "text"},
        lambda y: Answer(y, torch.arange(3), {"n": 3}),
        lambda y: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=y),
    ],
)
def test_outputs_of_every_kind(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.net(x))

    model = Wrapped()
    _, report = reported(model)
    plain = reported(model.net)[1]
    assert report.model.sqnr_db == plain.model.sqnr_db
    assert report.model.cosine == plain.model.cosine


def test_models_without_float_outputs() -> None:
    class Best(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    _, report = reported(Best())
    assert report.model.sqnr_db is None
    assert report.model.cosine is None
    assert report.model.speedup > 0
    assert report.layers[0].sqnr_db > 20


class Takes(nn.Module):
    """Records its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.seen: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = args, kwargs
        return self.fc(X)


@pytest.mark.parametrize(
    ("sample", "args", "kwargs", "words"),
    [
        (3.5, (3.5,), {}, "3.5"),
        ((), (), {}, "no arguments"),
        (("a", 2), ("a", 2), {}, "'a', 2"),
        ({"x": 1, "y": None}, (), {"x": 1, "y": None}, "x=1, y=None"),
        (UserDict(x=1), (), {"x": 1}, "x=1"),
        ([1, 2, 3, 4], ([1, 2, 3, 4],), {}, "list of 4 (1, 2, 3, ...)"),
        (({"x": 1},), ({"x": 1},), {}, "dict"),
        (("a" * 60,), ("a" * 60,), {}, "'" + "a" * 36 + "..."),
    ],
)
def test_kinds_of_samples(sample: Any, args: Any, kwargs: Any, words: str) -> None:
    model = Takes()
    _, report = reported(model, sample)
    assert model.seen == (args, kwargs)
    assert report.sample == words


def test_a_packed_sequence_is_one_argument() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 12), torch.ones(2, 12)])
    assert Sample.of(packed).args == (packed,)


def test_models_that_write_to_their_input_or_fill_a_cache() -> None:
    class Writes(Takes):
        def forward(self, x: Tensor, cache: list[Tensor], store: Any) -> Tensor:
            assert not cache
            assert not store.tensors
            cache.append(x)
            store.tensors.append(x)
            return self.fc(x.mul_(0.5))

    class Store:
        def __init__(self) -> None:
            self.tensors: list[Tensor] = []

    x, cache, store = X.clone(), [], Store()
    model = Writes()
    _, report = reported(model, (x, cache, store), min_sqnr=0)
    assert_same_bits(x, X)
    assert cache == store.tensors == []
    assert report.model.sqnr_db > 20


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("sample", "error", "sentences"),
    [
        (
            torch.randn(2, 7),
            ValueError,
            ["the sample does not fit the model: Net was called with float32 [2, 7] and said RuntimeError: "],
        ),
        ((X, X), ValueError, ["Net was called with float32 [5, 12], float32 [5, 12] and said TypeError: "]),
        ({"y": X}, ValueError, ["Net was called with y=float32 [5, 12] and said TypeError: "]),
        ({"x": X, 3: X}, TypeError, ["expected the names of arguments as keys of the sample, got 'x', 3"]),
        (
            (X, (value for value in [1])),
            TypeError,
            ["the sample (float32 [5, 12], generator) cannot be copied"],
        ),
    ],
)
def test_a_sample_that_does_not_fit(sample: Any, error: type, sentences: list[str], inplace: bool) -> None:
    model = net()
    before = state(model)
    with pytest.raises(error) as caught:
        reported(model, sample, inplace=inplace, min_speedup=0.5)
    for sentence in sentences:
        assert sentence in str(caught.value)
    assert_unchanged(model, before)
    quantized = quantize_dynamic(model)
    with pytest.raises(error):
        dynquant.report(model, quantized, sample)
    assert_unchanged(model, before)


# ---- models that do not match


def test_models_that_do_not_match() -> None:
    model = net()
    quantized = quantize_dynamic(model)
    with pytest.raises(ValueError, match="got one and the same Net; keep a copy of the float model before"):
        dynquant.report(quantized, quantized, X)
    with pytest.raises(ValueError, match="the int8 model has layer 'fc1', the float one has not"):
        dynquant.report(nn.Sequential(nn.Linear(12, 12)), quantized, X)
    other = net()
    other.block[0] = nn.Linear(16, 24)
    with pytest.raises(
        ValueError, match=r"layer 'block.0' is 16 x 16 \[N, K\] in the int8 model, and in the"
    ):
        dynquant.report(other, quantized, X)
    other.block[0] = nn.ReLU()
    with pytest.raises(ValueError, match="ReLU with a weight of shape None"):
        dynquant.report(other, quantized, X)
    untouched = quantize_dynamic(model, {})
    report = dynquant.report(model, untouched, X)
    assert report.layers == ()
    assert report.model.sqnr_db == math.inf
    assert set(reasons(report).values()) == {"the spec leaves it float"}
    str(report)


# ---- unchanged models


def test_modes_hooks_gradients_and_random_numbers_are_left_alone() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return super().forward(x + torch.randn_like(x))

    model = Noisy().train()
    model.block.eval()
    before = state(model)
    quantized = quantize_dynamic(model).train()
    hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    report = dynquant.report(model, quantized, X.clone().requires_grad_())
    assert_same_bits(torch.rand(3), expected)
    assert_unchanged(model, before)
    assert all(module.training for module in quantized.modules())
    assert {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert report.model.sqnr_db > 20, "both models draw the same noise"


def test_inputs_are_not_kept() -> None:
    references: list[Any] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            alive = sum(reference() is not None for reference in references)
            assert alive <= 1, "the inputs of former layers"
            x = x * 1.0
            references.append(weakref.ref(x))
            return self.fc(x)

    gc.disable()
    try:
        _, report = reported(nn.Sequential(*(Watched() for _ in range(6))))
    finally:
        gc.enable()
    assert len(report.layers) == 6


def test_hooks_of_the_model_see_each_run_and_come_along() -> None:
    model, seen = net(), []
    model.fc1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.fc1.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    quantized, report = reported(model, min_sqnr=0)
    assert {nn.Linear, QLinear} == set(seen)
    with torch.no_grad():
        expected, actual = (
            F.linear(2 * X, model.fc1.weight, model.fc1.bias),
            QLinear.forward(quantized.fc1, 2 * X),
        )
    assert report.layers[0].sqnr_db == pytest.approx(decibels(expected, actual), abs=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("stage", ["_convert", "judge", "fuse_checked", "make_report"])
def test_an_interruption_leaves_the_model_as_it_was(monkeypatch, inplace: bool, stage: str) -> None:
    model = net()
    before = state(model)
    modules = list(model.modules())

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("dynquant.quantize"), stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        reported(model, inplace=inplace, min_speedup=1.0, fuse=True)
    assert list(model.modules()) == modules
    assert_unchanged(model, before)


def test_an_interruption_while_a_layer_is_measured(monkeypatch) -> None:
    model = net()
    before = state(model)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_dynamic(model, sample=X, min_speedup=1.0, inplace=True)
    assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- agreement


def test_agreement_of_equal_zero_and_non_finite_outputs() -> None:
    def of(expected: list[float], actual: list[float]) -> tuple[float | None, float | None]:
        agreement = measure.Agreement()
        agreement.add(torch.tensor(expected), torch.tensor(actual))
        return agreement.sqnr_db, agreement.cosine

    nan, inf = math.nan, math.inf
    assert of([1, 2], [1, 2]) == (inf, pytest.approx(1))
    assert of([0, 0], [0, 0]) == (inf, 1.0)
    assert of([0, 0], [0, 1]) == (-inf, 0.0)
    assert of([1, 1], [0, 0]) == (0.0, 0.0)
    assert of([3, 4], [3, 4.5]) == (pytest.approx(20), pytest.approx(27 / (5 * math.sqrt(9 + 4.5**2))))
    assert of([1, -inf], [1, -inf]) == (inf, pytest.approx(1)), "where float is not finite nothing is held"
    assert of([1, nan], [1, 0]) == (inf, pytest.approx(1))
    assert of([1, 1], [1, nan]) == (-inf, 0.0)
    assert of([1, 1], [1, -inf]) == (-inf, 0.0)
    assert of([], []) == (None, None)
    assert of([nan], [nan]) == (None, None)


def test_agreement_over_chunks_is_that_of_the_whole(monkeypatch) -> None:
    torch.manual_seed(0)
    expected = torch.randn(40, 10).t()
    actual = expected + 0.01 * torch.randn(10, 40)
    monkeypatch.setattr(measure, "_CHUNK", 64)
    agreement = measure.Agreement()
    agreement.add(expected, actual)
    assert agreement.sqnr_db == pytest.approx(decibels(expected, actual))
