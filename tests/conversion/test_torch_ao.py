"""from_torch_ao: what torch.ao's dynamic quantization made, with the same int8 weights."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.intrinsic.quantized.dynamic import LinearReLU
from torch.ao.quantization import (
    QConfig,
    convert,
    default_dynamic_qconfig,
    default_dynamic_quant_observer,
    default_qconfig,
    float_qparams_weight_only_qconfig,
    per_channel_dynamic_qconfig,
    prepare,
)
from torch.ao.quantization import quantize_dynamic as torch_ao_quantize_dynamic
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

import dynquant
from dynquant import QGRU, QLSTM, QGRUCell, QLinear, QLSTMCell, QRNNCell, from_torch_ao, quantize_dynamic
from dynquant.nn.merged import MergedGroup
from tests.support.isas import ISAS, forced
from tests.support.nets import net
from tests.support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]

K, N = 40, 64
X = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
QCONFIGS = {"per_tensor": default_dynamic_qconfig, "per_channel": per_channel_dynamic_qconfig}
every_scheme = pytest.mark.parametrize("weights", QCONFIGS)


def of_torch_ao(model: nn.Module, weights: str = "per_tensor", kind: type = nn.Linear) -> Any:
    return torch_ao_quantize_dynamic(model.eval(), {kind: QCONFIGS[weights]})


def linear(weights: str = "per_tensor", bias: bool = True) -> Any:
    """torch.ao's layer, whose weight has -128 in many places."""
    torch.manual_seed(0)
    module = of_torch_ao(nn.Sequential(nn.Linear(K, N, bias)), weights)[0]
    values = torch.randint(-128, 128, (N, K)).to(torch.int8)
    values[:, ::3] = -128
    if weights == "per_tensor":
        weight = torch._make_per_tensor_quantized_tensor(values, 0.0012, 0)
    else:
        zeros = torch.zeros(N, dtype=torch.int64)
        scale = torch.rand(N, dtype=torch.float64) / 500 + 1e-4
        weight = torch._make_per_channel_quantized_tensor(values, scale, zeros, 0)
    module.set_weight_bias(weight, module.bias())
    assert (module.weight().int_repr() == -128).any()
    return module


def scales(weight: Tensor) -> Tensor:
    if weight.qscheme() == torch.per_tensor_affine:
        return torch.tensor([weight.q_scale()])
    return weight.q_per_channel_scales().float()


@every_scheme
@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_integers_and_scales_are_the_same(weights: str, activations: str, bias: bool) -> None:
    module = linear(weights, bias)
    layer = from_torch_ao(module, activations=activations)
    assert type(layer) is QLinear
    assert (layer.config.activations, layer.config.weights) == (activations, weights)
    assert layer.config.full_range
    assert torch.equal(layer.weight.int_repr(), module.weight().int_repr())
    assert torch.equal(layer.weight_scale, scales(module.weight()))
    assert (layer.bias is None) == (not bias)
    if bias:
        assert torch.equal(layer.bias.detach(), module.bias().detach())
    assert not layer.training
    # The rounding of activations alone is another: torch.ao has 7 bits for them.
    error = (layer(X) - module(X)).norm() / module(X).norm()
    assert error < 0.02
    exact = nn.functional.linear(X, module.weight().dequantize(), module.bias())
    assert (layer(X) - exact).norm() / exact.norm() < 0.01


@every_scheme
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 13, 70])
@pytest.mark.parametrize("k", [4, 37, 768, 1541])
def test_every_instruction_set_multiplies_by_minus_128(weights: str, rows: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    weight = torch.randint(-128, 128, (70, k), generator=generator).to(torch.int8)
    weight[:, ::2] = -128
    weight[1] = -128
    scale = torch.rand(70 if weights == "per_channel" else 1, generator=generator) + 0.1
    x = torch.randn(rows, k, generator=generator)
    x[0] = -1.0
    x[-1, ::2] = 1.0
    for activations in ("per_token", "per_tensor"):
        config = dynquant.Config(activations, weights, full_range=True)
        packed, weight_sum = dynquant.reference.pack_weight(weight, True)
        code = config.encode(k)
        arguments = (packed, weight_sum, scale.expand(70).contiguous(), None, code)
        expected = dynquant.reference.linear_dynamic(x, *arguments)
        q = torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8)
        q[0] = -128
        sums = dynquant.reference.int8_mm(q, packed, weight_sum)
        assert torch.equal(sums, (q.double() @ weight.double().t()).int())
        for isa in ISAS:
            with forced(isa):
                assert_same_bits(torch.ops.dynquant.linear_dynamic(x, *arguments), expected, isa)
                assert_same_bits(torch.ops.dynquant.int8_mm(q, packed, weight_sum), sums, isa)
                again = torch.ops.dynquant.pack_weight(weight, True)
                assert_same_bits(again[0], packed, isa)
                assert_same_bits(again[1], weight_sum, isa)


def test_minus_128_is_refused_where_the_scheme_does_not_allow_it() -> None:
    weight = torch.full((2, 4), -128, dtype=torch.int8)
    for pack in (dynquant.reference.pack_weight, torch.ops.dynquant.pack_weight):
        with pytest.raises(RuntimeError, match=r"pack_weight: expected weight in \[-127, 127\], got -128"):
            pack(weight)
    state = from_torch_ao(linear()).state_dict()
    state["format"][1] &= ~(1 << 18)
    with pytest.raises(RuntimeError, match=r"expected weight in \[-127, 127\], got -128"):
        QLinear(K, N).load_state_dict(state)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: torch.load(_saved(layer), weights_only=False),
    "state_dict": lambda layer: _loaded(layer),
    "half and back": lambda layer: copy.deepcopy(layer).half().float(),
}


def _saved(layer: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def _loaded(layer: nn.Module) -> nn.Module:
    fresh = QLinear(K, N)
    fresh.load_state_dict(layer.state_dict())
    return fresh


@pytest.mark.parametrize("way", COPIES)
def test_minus_128_goes_everywhere_with_the_layer(way: str) -> None:
    layer = from_torch_ao(linear())
    other: Any = COPIES[way](layer)
    assert other.config == layer.config
    assert torch.equal(other.weight.int_repr(), layer.weight.int_repr())
    if way != "half and back":
        assert_same_bits(other(X), layer(X))
    assert torch.equal(other.to_float().weight, layer.weight.dequantize())
    other.weight = torch.randn(N, K)
    assert not other.config.full_range
    other.weight = layer.weight
    assert other.config.full_range
    expected = from_torch_ao(linear(bias=False))
    assert_same_bits(nn.functional.linear(X, expected.weight), expected(X))


def test_layers_are_merged_with_minus_128_in_one_of_them() -> None:
    made = nn.ModuleDict(
        {"q": linear("per_channel"), "k": of_torch_ao(nn.Sequential(nn.Linear(K, N)), "per_channel")[0]}
    )
    weight = torch._make_per_channel_quantized_tensor(
        made["k"].weight().int_repr().clamp(min=-127),
        made["k"].weight().q_per_channel_scales(),
        torch.zeros(N, dtype=torch.int64),
        0,
    )
    made["k"].set_weight_bias(weight, made["k"].bias())
    model = from_torch_ao(made)
    expected = [layer(X) for layer in model.values()]
    assert [layer.config.full_range for layer in model.values()] == [True, False]
    group = MergedGroup(list(model.values()))
    assert group.merged is not None
    assert dynquant.Config.decode(group.merged.config).full_range
    assert_same_bits(group.layers[0](X), expected[0])
    assert_same_bits(group.layers[1](X), expected[1])


# ---- recurrent modules

RECURRENT: dict[str, tuple[Callable[[], nn.Module], type]] = {
    "LSTM": (lambda: nn.LSTM(K, 16, 2, bidirectional=True, batch_first=True), QLSTM),
    "LSTM of one layer": (lambda: nn.LSTM(K, 16), QLSTM),
    "LSTM of three layers": (lambda: nn.LSTM(16, 16, 3, dropout=0.1), QLSTM),
    "GRU": (lambda: nn.GRU(K, 16, 2), QGRU),
    "GRU of two directions": (lambda: nn.GRU(K, 16, bidirectional=True), QGRU),
    "LSTMCell": (lambda: nn.LSTMCell(K, 16), QLSTMCell),
    "GRUCell": (lambda: nn.GRUCell(K, 16), QGRUCell),
    "RNNCell": (lambda: nn.RNNCell(K, 16, nonlinearity="relu"), QRNNCell),
}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first(output[0])


@every_scheme
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_modules(name: str, weights: str) -> None:
    build, kind = RECURRENT[name]
    torch.manual_seed(0)
    float_module = build().eval()
    module = of_torch_ao(nn.Sequential(float_module), weights, type(float_module))[0]
    own: Any = from_torch_ao(module)
    assert type(own) is kind
    assert own.config.weights == weights
    for key, weight in module.get_weight().items():
        assert torch.equal(getattr(own, key).int_repr(), weight.int_repr()), key
    for key, bias in module.get_bias().items():
        assert torch.equal(getattr(own, key).detach(), bias.detach()), key
    x = X[0] if name.endswith("Cell") else X
    x = x[..., : float_module.input_size]
    expected = first(float_module(x))
    assert (first(own(x)) - expected).norm() / expected.norm() < 0.05
    assert (first(own(x)) - first(module(x))).norm() / expected.norm() < 0.05

    fresh: Any = quantize_dynamic(nn.Sequential(build()), {type(float_module)})
    fresh.load_state_dict(from_torch_ao(nn.Sequential(module).state_dict()))
    assert_same_bits(first(fresh[0](x)), first(own(x)))
    alone: Any = quantize_dynamic(build(), {type(float_module)})
    alone.load_state_dict(from_torch_ao(module.state_dict()))
    assert_same_bits(first(alone(x)), first(own(x)))


def test_recurrent_weights_with_minus_128() -> None:
    torch.manual_seed(0)
    module = of_torch_ao(nn.Sequential(nn.LSTMCell(K, 16)), "per_tensor", nn.LSTMCell)[0]
    weights = {
        key: torch._make_per_tensor_quantized_tensor(
            torch.randint(-128, -100, weight.shape).to(torch.int8), 0.001, 0
        )
        for key, weight in module.get_weight().items()
    }
    module.set_weight_bias({"weight": weights, "bias": module.get_bias()})
    own: Any = from_torch_ao(module)
    assert (own.weight_hh.int_repr() == -128).any()
    x, hx = -torch.rand(9, K), (-torch.rand(9, 16), torch.rand(9, 16))
    expected = own(x, hx)
    for isa in ISAS:
        with forced(isa):
            for actual, value in zip(own(x, hx), expected, strict=True):
                assert_same_bits(actual, value, isa)
    fresh: Any = quantize_dynamic(nn.LSTMCell(K, 16), {nn.LSTMCell})
    fresh.load_state_dict(own.state_dict())
    assert_same_bits(fresh(x, hx)[0], expected[0])


def test_a_recurrent_state_dict_that_says_too_little() -> None:
    module = of_torch_ao(nn.Sequential(nn.LSTM(16, 16, bidirectional=True)), kind=nn.LSTM)
    with pytest.raises(
        ValueError, match=r"^from_torch_ao: module '0': .* two layers or two directions; pass"
    ):
        from_torch_ao(module.state_dict())
    half = torch_ao_quantize_dynamic(nn.Sequential(nn.LSTM(K, 16)), {nn.LSTM}, dtype=torch.float16)
    for x in (half[0], half.state_dict()):
        with pytest.raises(ValueError, match=r"^from_torch_ao: .*its weight is float16"):
            from_torch_ao(x)


# ---- models and state_dicts


@every_scheme
def test_a_whole_model(weights: str) -> None:
    float_model = net().eval()
    calls: list[int] = []
    float_model.head.register_forward_hook(lambda *_: calls.append(1))
    made = of_torch_ao(copy.deepcopy(float_model), weights)
    before = list(map(id, made.modules()))
    model = from_torch_ao(made)
    assert list(map(id, made.modules())) == before
    names = [name for name, module in model.named_modules() if type(module) is QLinear]
    assert names == ["fc1", "block.0", "block.2", "head"]
    x = torch.randn(6, 12)
    expected = float_model(x)
    assert (model(x) - expected).norm() / expected.norm() < 0.05
    assert len(calls) == 2
    for name in names:
        theirs = made.get_submodule(name).weight().int_repr()
        assert torch.equal(model.get_submodule(name).weight.int_repr(), theirs)
    assert model.norm is not made.norm
    assert torch.equal(model.norm.weight, made.norm.weight)


@every_scheme
@pytest.mark.parametrize("file", [False, True])
def test_a_state_dict(weights: str, file: bool) -> None:
    made = of_torch_ao(net(), weights)
    state = made.state_dict()
    if file:
        saved = io.BytesIO()
        torch.save(state, saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
    fresh = quantize_dynamic(net())
    with pytest.raises(RuntimeError, match=r"load_state_dict\(dynquant\.from_torch_ao\(state_dict\)\)"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(from_torch_ao(state))
    expected = from_torch_ao(made)
    x = torch.randn(6, 12)
    assert_same_bits(fresh(x), expected(x))
    assert fresh.state_dict().keys() == expected.state_dict().keys()


def test_a_state_dict_of_one_layer_and_of_version_2() -> None:
    module = linear()
    expected = from_torch_ao(module)
    fresh = QLinear(K, N)
    fresh.load_state_dict(from_torch_ao(module.state_dict()))
    assert_same_bits(fresh(X), expected(X))
    state = module.state_dict()
    weight, bias = state.pop("_packed_params._packed_params")
    state |= {"_packed_params.weight": weight, "_packed_params.bias": bias}
    fresh = QLinear(K, N)
    fresh.load_state_dict(from_torch_ao(state))
    assert_same_bits(fresh(X), expected(X))


def test_relu() -> None:
    torch.manual_seed(0)
    pair = torch.ao.nn.intrinsic.LinearReLU(nn.Linear(K, N), nn.ReLU())
    pair.qconfig = pair[0].qconfig = default_dynamic_qconfig
    module = LinearReLU.from_float(pair)
    layer = from_torch_ao(module)
    assert layer.config.epilogue == "relu"
    assert torch.equal(layer.weight.int_repr(), module.weight().int_repr())
    assert (layer(X) - module(X)).norm() / module(X).norm() < 0.02
    assert (layer(X) >= 0).all()


def test_the_default_layers_of_torch_ao() -> None:
    """17 of 40 hold a -128."""
    found = 0
    for seed in range(40):
        torch.manual_seed(seed)
        module = of_torch_ao(nn.Sequential(nn.Linear(64, 64)))[0]
        layer = from_torch_ao(module)
        holds = bool((module.weight().int_repr() == -128).any())
        assert layer.config.full_range == holds
        assert torch.equal(layer.weight.int_repr(), module.weight().int_repr())
        found += holds
    assert 5 < found < 35


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, vocab_size=50, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = from_torch_ao(of_torch_ao(transformers.BertModel(config).eval()))
    assert len(model.config.quantization_config.modules) == 7


# ---- what is not taken


def statically(model: nn.Module) -> Any:
    model.qconfig = default_qconfig
    prepared = prepare(
        nn.Sequential(torch.ao.quantization.QuantStub(), model, torch.ao.quantization.DeQuantStub())
    )
    prepared.qconfig = default_qconfig
    prepared = prepare(prepared)
    prepared(torch.randn(4, K))
    return convert(prepared.eval())


def asymmetric() -> Any:
    observer = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_affine)
    layer = nn.Sequential(nn.Linear(K, N))
    with torch.no_grad():
        layer[0].weight += 1
    qconfig = QConfig(activation=default_dynamic_quant_observer, weight=observer)
    return torch_ao_quantize_dynamic(layer, {nn.Linear: qconfig})[0]


def by_input_channel() -> Any:
    weight = torch.quantize_per_channel(torch.randn(N, K), torch.ones(K), torch.zeros(K), 1, torch.qint8)
    module = linear()
    module._weight_bias = lambda: (weight, None)
    return module


def embedding() -> Any:
    model = nn.Sequential(nn.Embedding(8, 4))
    model[0].qconfig = float_qparams_weight_only_qconfig
    return convert(prepare(model.eval()))[0]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "float16": (
        lambda: torch_ao_quantize_dynamic(nn.Sequential(nn.Linear(K, N)), dtype=torch.float16)[0],
        r"the module \(Linear\): its weight is float16, and there is nothing int8 in it",
    ),
    "asymmetric": (
        asymmetric,
        r"the module \(Linear\): expected a symmetric weight, got one with zero point -?\d",
    ),
    "axis 1": (
        by_input_channel,
        r"the module \(Linear\): expected scales by output channel \(axis 0\), got axis 1",
    ),
    "embedding": (embedding, r"the module \(Embedding\): its rows are uint8 with a zero point of their own"),
    "conv": (
        lambda: torch.ao.nn.quantized.dynamic.Conv1d(2, 2, 1),
        r"the module \(Conv1d\): dynquant has no module that takes its weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_are_refused(case: str) -> None:
    make, sentence = REFUSED[case]
    module = make()
    with pytest.raises(ValueError, match=f"^from_torch_ao: {sentence}"):
        from_torch_ao(module)
    with pytest.warns(UserWarning, match=r"1 layers converted; left as they are: layer '1' \(") as caught:
        model = from_torch_ao(nn.Sequential(linear(), module))
    ours = [warning for warning in caught if str(warning.message).startswith("from_torch_ao")]
    assert [warning.filename for warning in ours] == [__file__]
    assert [type(part) for part in model] == [QLinear, type(module)]


def test_static_layers_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = statically(nn.Linear(K, N))
    module = made[1]
    assert type(module) is torch.ao.nn.quantized.Linear
    sentence = r"its input is a quantized tensor, whose scale another module sets; .* dynquant\.freeze"
    with pytest.raises(ValueError, match=rf"the module \(Linear\): {sentence}"):
        from_torch_ao(module)
    with pytest.raises(ValueError, match=rf"layer '': {sentence}"):
        from_torch_ao(module.state_dict())


def test_state_dicts_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"_packed_params\.dtype .*its rows are uint8 with a zero point"):
        from_torch_ao(embedding().state_dict())
    half = torch_ao_quantize_dynamic(nn.Sequential(nn.Linear(K, N)), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^from_torch_ao: layer '0': its weight is float16"):
        from_torch_ao(half.state_dict())
    with pytest.raises(ValueError, match=r"expected a state_dict that torch\.ao quantized, .* 9 entries"):
        from_torch_ao(net().state_dict())
    with pytest.raises(ValueError, match=r"expected modules that torch\.ao quantized, got a Net without any"):
        from_torch_ao(net())
    with pytest.raises(TypeError, match=r"expected a module or a state_dict of torch\.ao, got str"):
        from_torch_ao("model.pt")
    with pytest.raises(
        ValueError, match=r"expected activations to be one of 'per_token', 'per_tensor', got 'x'"
    ):
        from_torch_ao(linear(), activations="x")


def test_other_observers_of_symmetric_weights() -> None:
    observer = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    qconfig = QConfig(activation=default_dynamic_quant_observer, weight=observer)
    module: Any = torch_ao_quantize_dynamic(nn.Sequential(nn.Linear(K, N)), {nn.Linear: qconfig})[0]
    layer = from_torch_ao(module)
    assert torch.equal(layer.weight.int_repr(), module.weight().int_repr())
