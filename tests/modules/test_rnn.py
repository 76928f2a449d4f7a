"""QLSTM, QGRU and the cells: values and signatures of torch.nn, state_dicts, gradients, tools, errors."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import dynquant
from dynquant import QGRU, QLSTM, QGRUCell, QLSTMCell, QModule, QRNNCell, QTensor, quantize_dynamic
from tests.support.same_bits import assert_same_bits

K, H = 88, 40
"""More inputs than a layer takes in float (test_rnn_float_input.py)."""
LAYERS: dict[type[nn.Module], type[QModule]] = {nn.LSTM: QLSTM, nn.GRU: QGRU}
CELLS: dict[type[nn.Module], type[QModule]] = {
    nn.LSTMCell: QLSTMCell,
    nn.GRUCell: QGRUCell,
    nn.RNNCell: QRNNCell,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.4},
    {"proj_size": 12},
    {"proj_size": 8, "num_layers": 2, "bidirectional": True, "bias": False},
]
CASES = [
    (kind, options) for kind in LAYERS for options in OPTIONS if kind is nn.LSTM or "proj_size" not in options
]


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def assert_close(actual: Any, expected: Any, sqnr: float = 30.0) -> None:
    """The same structure, shapes and dtypes, and values as near as 8 bits allow (dB)."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        error = (a.double() - b.double()).norm()
        assert error <= b.double().norm() * 10 ** (-sqnr / 20) + 1e-12


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        assert_same_bits(a, b)


def pair(kind: type[nn.Module], **options: Any) -> tuple[Any, Any]:
    """A float module in eval mode and its int8 counterpart."""
    torch.manual_seed(0)
    module = kind(K, H, **options).eval()
    return module, {**LAYERS, **CELLS}[kind].from_float(module)


def hx_of(layer: Any, batch: tuple[int, ...]) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    out = layer.proj_size or H
    h = torch.randn(count, *batch, out) / 2
    return (h, torch.randn(count, *batch, H)) if isinstance(layer, (QLSTM, nn.LSTM)) else h


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_values_of_torch(kind: type[nn.Module], options: dict[str, Any]) -> None:
    module, layer = pair(kind, **options)
    x = torch.randn(7, 5, K)
    with torch.no_grad():
        batch = x.shape[0 if options.get("batch_first") else 1]
        assert_close(layer(x), module(x))
        hx = hx_of(layer, (batch,))
        assert_close(layer(x, hx), module(x, hx))
        assert_close(layer(x[0]), module(x[0]))
        hx = hx_of(layer, ())
        assert_close(layer(x[0], hx), module(x[0], hx))
    assert_same(layer(x.double())[0].float(), layer(x)[0])
    assert layer(x.double())[0].dtype == torch.float64


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("lengths", [[7, 5, 5, 1], [2, 7, 1, 7], [3]], ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_packed_sequences(kind: type[nn.Module], options: dict[str, Any], lengths: list[int]) -> None:
    module, layer = pair(kind, **options)
    parts = [torch.randn(length, K) for length in lengths]
    packed = pack_sequence(parts, enforce_sorted=sorted(lengths, reverse=True) == lengths)
    with torch.no_grad():
        for hx in (None, hx_of(layer, (len(lengths),))):
            out, last = layer(packed, hx)
            expected, expected_last = module(packed, hx)
            assert isinstance(out, PackedSequence)
            assert_close((out.data, last), (expected.data, expected_last))
            assert torch.equal(out.batch_sizes, expected.batch_sizes)
            for a, b in zip(out[2:], expected[2:], strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b)


def test_a_packed_sequence_gives_what_its_parts_give() -> None:
    _, layer = pair(nn.LSTM, num_layers=2, bidirectional=True)
    parts = [torch.randn(length, K) for length in (2, 7, 1)]
    out, (h, c) = layer(pack_sequence(parts, enforce_sorted=False))
    padded, lengths = nn.utils.rnn.pad_packed_sequence(out)
    for i, part in enumerate(parts):
        alone, (h_alone, c_alone) = layer(part)
        assert_same_bits(padded[: lengths[i], i], alone)
        assert_same_bits(h[:, i], h_alone)
        assert_same_bits(c[:, i], c_alone)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: type[nn.Module], bias: bool, nonlinearity: str) -> None:
    options = {"nonlinearity": nonlinearity} if kind is nn.RNNCell else {}
    module, cell = pair(kind, bias=bias, **options)
    x = torch.randn(5, K)
    state = torch.randn(5, H) / 2
    hx = (state, torch.randn(5, H)) if kind is nn.LSTMCell else state
    one = (hx[0][0], hx[1][0]) if kind is nn.LSTMCell else hx[0]
    with torch.no_grad():
        for arguments in ((x,), (x, hx), (x[0],), (x[0], one)):
            assert_close(cell(*arguments), module(*arguments), 28)
    loop, h = [], None
    for step in x.unsqueeze(1):
        h = cell(step, h)
        loop.append(tensors(h)[0])
    if kind is nn.LSTMCell:
        layer = QLSTM(K, H, bias=bias)
        layer.load_state_dict(
            {
                name.replace("_ih", "_ih_l0").replace("_hh", "_hh_l0"): value
                for name, value in cell.state_dict().items()
            }
        )
        assert_same_bits(torch.stack(loop), layer(x.unsqueeze(1))[0])


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts(dtype: torch.dtype) -> None:
    _, layer = pair(nn.LSTM, num_layers=2)
    x = torch.randn(4, 3, K)
    scale = layer.weight_ih_l0.channel_scale.clone()
    cast = copy.deepcopy(layer).to(dtype)
    assert cast.weight_ih_l0.dtype == cast.bias_ih_l0.dtype == dtype
    assert_same_bits(cast.weight_ih_l0.channel_scale, scale)
    out, (h, c) = cast(x.to(dtype))
    assert out.dtype == h.dtype == c.dtype == dtype
    assert_close(out.float(), layer(x)[0], 20)
    with pytest.raises(TypeError, match="QLSTM: expected a cast to float32, bfloat16, float16 or float64"):
        layer.to(torch.complex64)


SCHEMES = [{"activations": "per_tensor"}, {"weights": "per_tensor"}, {"rotation": "hadamard"}]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_schemes(kind: type[nn.Module], scheme: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = kind(K, H).eval()
    layer: Any = {**LAYERS, **CELLS}[kind].from_float(module, **scheme)
    x = torch.randn(5, 4, K) if kind in LAYERS else torch.randn(5, K)
    with torch.no_grad():
        assert_close(layer(x), module(x), 25)
    given = {"rotation_block": 128} if "rotation" in scheme else scheme
    assert vars(layer.config).items() >= given.items()
    blocks = {weight.config.rotation_block for weight in layer.quantized_weights().values()}
    assert blocks == ({8} if "rotation" in scheme else {0})
    again = type(layer)(K, H, **scheme)
    again.load_state_dict(layer.state_dict())
    assert_same(again(x), layer(x))
    plain = type(layer)(K, H)
    plain.load_state_dict(layer.state_dict())
    assert plain.config == layer.config, "the saved scheme"
    assert_same(plain(x), layer(x))


def test_dropout_is_that_of_training() -> None:
    _, layer = pair(nn.LSTM, num_layers=2, dropout=0.5)
    x = torch.randn(6, 3, K)
    assert_same(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert_same(layer(x), first)


def test_empty_and_non_finite() -> None:
    _, layer = pair(nn.LSTM, bidirectional=True)
    out, (h, c) = layer(torch.randn(4, 0, K))
    assert out.shape == (4, 0, 2 * H)
    assert h.shape == c.shape == (2, 0, H)
    hx = hx_of(layer, (3,))
    out, last = layer(torch.randn(0, 3, K), hx)
    assert out.shape == (0, 3, 2 * H)
    assert_same(last, hx)
    x = torch.randn(4, 3, K)
    x[1, 2, 0] = math.nan
    out, (h, c) = layer(x)
    assert not out[:, :2].isnan().any()
    assert out[1, 2].isnan().all()
    assert h[:, 2].isnan().all()


# ---- state_dict


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_state_dict(kind: type[nn.Module], tmp_path: Path) -> None:
    _, layer = pair(kind)
    state = layer.state_dict()
    end = "_l0" if kind in LAYERS else ""
    gates = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNNCell: 1}[kind]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        f"weight_ih{end}": (torch.int8, (gates * H, K, 1)),
        f"weight_ih{end}_scale": (torch.float32, (gates * H,)),
        f"weight_hh{end}": (torch.int8, (gates * H, H, 1)),
        f"weight_hh{end}_scale": (torch.float32, (gates * H,)),
        f"bias_ih{end}": (torch.float32, (gates * H,)),
        f"bias_hh{end}": (torch.float32, (gates * H,)),
        "format": (torch.int64, (4,)),
    }
    assert all(type(value) is Tensor for value in state.values())
    x = torch.randn(3, 2, K)[:: 1 if kind in LAYERS else 3].reshape(-1, 2, K)
    x = x if kind in LAYERS else x[0]
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    for loaded in (
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
        torch.load(tmp_path / "state.pt", weights_only=True),
    ):
        for assign in (False, True):
            other = type(layer)(K, H)
            assert not any(other.load_state_dict(loaded, assign=assign))
            assert_same(other(x), layer(x))
        with torch.device("meta"):
            empty = type(layer)(K, H)
        empty.load_state_dict(loaded, assign=True)
        assert_same(empty(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind(K, H).load_state_dict(state, strict=False)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_float_checkpoint_is_quantized(kind: type[nn.Module]) -> None:
    module, layer = pair(kind)
    other = type(layer)(K, H)
    with pytest.warns(UserWarning, match="holds float weights"):
        assert not any(other.load_state_dict(module.state_dict()))
    for name, weight in other.quantized_weights().items():
        assert_same_bits(weight.int_repr(), layer.quantized_weights()[name].int_repr())
    x = torch.randn(3, 2, K) if kind in LAYERS else torch.randn(2, K)
    assert_same(other(x), layer(x))


BAD_STATES: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda s: s.pop("weight_hh_l0_scale"), "the state_dict has format, but no weight_hh_l0_scale"),
    (lambda s: s.pop("format"), "the state_dict has weight_ih_l0_scale, but no format"),
    (
        lambda s: s.update(weight_hh_l0=s["weight_hh_l0"][1:]),
        "weight_hh_l0: expected weight of shape [160, 40, 1]",
    ),
    (lambda s: s["weight_ih_l0_scale"].fill_(math.nan), "weight_ih_l0: expected weight_scale to be finite"),
    (lambda s: s["weight_ih_l0"].fill_(-128), "weight_ih_l0: expected weight in [-127, 127], got -128"),
    (lambda s: s.update(weight_ih_l0=s["weight_ih_l0"].float()), "weight_ih_l0: expected weight to be int8"),
    (lambda s: s["bias_hh_l0"].fill_(math.nan), "bias_hh_l0: expected bias without NaN"),
    (
        lambda s: s.update(bias_hh_l0=s["bias_hh_l0"][1:]),
        "bias_hh_l0: expected bias of shape [160], got [159]",
    ),
    (lambda s: s["format"].__setitem__(0, 9), "a newer dynquant may have written it"),
    (lambda s: s.update({"_all_weight_values.0.param": torch.zeros(1)}), "that torch.ao quantized"),
    (lambda s: s.update(weight_hh_l0=[1]), "expected weight_hh_l0 to be a tensor, got list"),
]


@pytest.mark.parametrize(("fault", "words"), BAD_STATES, ids=[words for _, words in BAD_STATES])
def test_bad_state_dicts_change_nothing(fault: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    _, layer = pair(nn.LSTM)
    x = torch.randn(3, 2, K)
    before = layer(x)
    state = QLSTM(K, H).state_dict()
    fault(state)
    with pytest.raises(RuntimeError, match=re.escape(f"QLSTM '': {words}" if ":" in words else words)):
        layer.load_state_dict(state)
    assert_same(layer(x), before)


def test_missing_weights_are_missing_keys() -> None:
    _, layer = pair(nn.GRU)
    assert {*layer.load_state_dict({}, strict=False).missing_keys} >= {
        "weight_ih_l0",
        "weight_hh_l0",
        "bias_ih_l0",
        "bias_hh_l0",
    }


# ---- copies, attributes, conversion


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_copies(kind: type[nn.Module]) -> None:
    _, layer = pair(kind)
    x = torch.randn(3, 2, K) if kind in LAYERS else torch.randn(2, K)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
    ):
        assert type(other) is type(layer)
        assert [name for name, _ in other.named_buffers()] == [name for name, _ in layer.named_buffers()]
        other.load_state_dict(layer.state_dict())
        assert_same(other(x), layer(x))
    assert_same(copy.deepcopy(layer)(x), layer(x))
    assert_same(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_weights_look_like_the_float_ones() -> None:
    module, layer = pair(nn.LSTM, proj_size=12)
    for name, parameter in module.named_parameters():
        value = getattr(layer, name)
        assert (value.shape, value.dtype, value.device) == (
            parameter.shape,
            parameter.dtype,
            parameter.device,
        )
        if name.startswith("weight"):
            assert isinstance(value, QTensor)
            assert ((value.dequantize() - parameter).abs() <= parameter.abs().amax() / 120).all()
    assert [[tuple(w.shape) for w in ws] for ws in layer.all_weights] == [
        [tuple(w.shape) for w in ws] for ws in module.all_weights
    ]
    layer.flatten_parameters()
    assert set(layer.int8_tensors()) == {f"{name}_packed" for name in layer.quantized_weights()}
    layer.weight_hh_l0 = torch.ones(4 * H, 12)
    assert (layer.weight_hh_l0.dequantize() == 1).all()
    with pytest.raises(
        ValueError, match=re.escape("QLSTM: expected weight_hh_l0 of shape [160, 12], got [3, 2]")
    ):
        layer.weight_hh_l0 = torch.ones(3, 2)
    with pytest.raises(TypeError, match="QLSTM: expected a tensor for .weight_hh_l0, got int"):
        layer.weight_hh_l0 = 3
    assert layer.fits(module)
    assert not layer.fits(nn.LSTM(K, H))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_to_float(kind: type[nn.Module]) -> None:
    _, layer = pair(kind)
    module = layer.to_float()
    assert type(module) is kind
    x = torch.randn(3, 2, K) if kind in LAYERS else torch.randn(2, K)
    with torch.no_grad():
        assert_close(layer(x), module(x), 35)
    assert str(layer).startswith(f"Q{kind.__name__}(88, 40, activations=per_token")


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(K, H, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(2 * H, 16)
        self.cell = nn.LSTMCell(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.lstm(x)[0])
        h, _ = self.cell(y[:, 0])
        return self.head(h)


@pytest.mark.parametrize("spec", [None, {nn.LSTM, nn.GRU, nn.LSTMCell, nn.Linear}])
def test_quantize_dynamic(spec: Any) -> None:
    model = Tagger().eval()
    x = torch.randn(5, 6, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized: Any = quantize_dynamic(model, spec)
    assert [type(part) for part in quantized.children()] == [QLSTM, QGRU, QLSTMCell, dynquant.QLinear]
    with torch.no_grad():
        assert_close(quantized(x), model(x), 25)
    held = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for module in quantized.modules():
        assert not any(id(value) in held for value in tree_leaves(list(vars(module).values()))), (
            "no float weights"
        )
    assert not list(quantize_dynamic(model, {"lstm"}).lstm.named_modules())[1:]
    pickle.loads(pickle.dumps(quantized))


@pytest.mark.usefixtures("quick_measuring")
def test_report_and_thresholds() -> None:
    model, x = Tagger().eval(), torch.randn(5, 6, K)
    quantized, report = quantize_dynamic(model, sample=x, report=True)
    assert [row.name for row in report.layers] == ["lstm", "gru", "cell", "head"]
    assert all(row.sqnr_db > 25 and row.bytes_int8 < row.bytes_float for row in report.layers[:3])
    quantized = quantize_dynamic(model, sample=x, min_sqnr=1000)
    assert not any(isinstance(module, QModule) for module in quantized.modules())


# ---- gradients and tools


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 8}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_gradients(kind: type[nn.Module], options: dict[str, Any], packed: bool) -> None:
    if kind is nn.GRU and "proj_size" in options:
        options = {"bias": False}
    _, layer = pair(kind, **options)
    module = layer.to_float()
    x = torch.randn(7, 4, K, requires_grad=True)
    hx = hx_of(layer, (4,))
    state = tensors(hx)
    for tensor in state:
        tensor.requires_grad_()
    for parameter in layer.parameters():
        parameter.requires_grad_()

    def loss(model: nn.Module) -> Tensor:
        given: Any = pack_sequence([x[:n, i] for i, n in enumerate((2, 7, 1, 7))], False) if packed else x
        out, last = model(given, hx)
        return (out.data if packed else out).square().sum() + sum(t.square().sum() for t in tensors(last))

    names = [name for name, _ in layer.named_parameters()]
    actual = torch.autograd.grad(loss(layer), [x, *state, *layer.parameters()])
    own = dict(module.named_parameters())
    expected = torch.autograd.grad(loss(module), [x, *state, *(own[name] for name in names)])
    assert_close(actual, expected, 25)
    with torch.no_grad():
        assert not layer(x)[0].requires_grad


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_cells(kind: type[nn.Module]) -> None:
    _, cell = pair(kind)
    module = cell.to_float()
    x = torch.randn(4, K, requires_grad=True)
    actual, expected = (
        torch.autograd.grad(sum(t.square().sum() for t in tensors(m(x))), x)[0] for m in (cell, module)
    )
    assert_close(actual, expected, 25)


def test_autocast_and_inference_mode() -> None:
    _, layer = pair(nn.LSTM)
    x = torch.randn(3, 2, K)
    with torch.autocast("cpu", torch.bfloat16):
        out, (h, _) = layer(x)
    assert out.dtype == h.dtype == torch.bfloat16
    assert_close(out.float(), layer(x)[0], 25)
    with torch.inference_mode():
        assert_same(layer(x), layer(x.clone()))
        made = QLSTM(K, H)
    torch.autograd.grad(made(x.requires_grad_())[0].sum(), x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_compile(kind: type[nn.Module], grad: bool) -> None:
    torch.compiler.reset()
    _, layer = pair(kind, **({"num_layers": 2, "bidirectional": True} if kind in LAYERS else {}))
    x = torch.randn(3, 2, K) if kind in LAYERS else torch.randn(2, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert_same(compiled(x), layer(x))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_export(kind: type[nn.Module]) -> None:
    _, layer = pair(kind)
    x = torch.randn(3, 2, K) if kind in LAYERS else torch.randn(2, K)
    program = torch.export.export(layer, (x,))
    assert_same(program.module()(x), layer(x))
    calls = [str(node.target) for node in program.graph.nodes if "dynquant" in str(node.target)]
    assert calls == ["dynquant.rnn.default"]


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_trace_by_fx_has_one_node(kind: type[nn.Module]) -> None:
    _, layer = pair(kind)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(3, 2, K) if kind in LAYERS else torch.randn(2, K)
    assert_same(traced(x), layer(x))


def test_transforms_that_would_be_wrong_are_refused() -> None:
    _, layer = pair(nn.LSTM)
    x = torch.randn(3, 2, K)
    with pytest.raises(NotImplementedError, match="a quantized LSTM: expected inputs without tangents"):
        torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match="dynquant::rnn"):
        torch.func.vmap(lambda x: layer(x)[0])(x[None])


def test_save_and_load(tmp_path: Path) -> None:
    model, x = Tagger().eval(), torch.randn(5, 6, K)
    for scheme in ({}, *SCHEMES):
        quantized = quantize_dynamic(model, **scheme)
        dynquant.save(quantized, tmp_path / "model.safetensors")
        assert_same(dynquant.load(Tagger(), tmp_path / "model.safetensors").eval()(x), quantized(x))


@pytest.mark.long
def test_inductor_and_aot_inductor(tmp_path: Path) -> None:
    torch.compiler.reset()
    quantized, x = quantize_dynamic(Tagger().eval()), torch.randn(5, 6, K)
    with torch.no_grad():
        assert_same(torch.compile(quantized, fullgraph=True)(x), quantized(x))
        program = torch.export.export(quantized, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert_same(torch._inductor.aoti_load_package(path)(x), quantized(x))


def test_functional_call_of_biases() -> None:
    _, layer = pair(nn.GRU)
    x = torch.randn(3, 2, K)
    zeros = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
    out = torch.func.functional_call(layer, zeros, (x,))
    assert not torch.equal(out[0], layer(x)[0])


# ---- errors


def errors() -> list[tuple[type[nn.Module], tuple[Any, ...], type[Exception], str]]:
    x, one = torch.randn(3, 2, K), torch.zeros(1, 2, H)
    return [
        (
            nn.LSTM,
            (torch.randn(3, 2, 7),),
            RuntimeError,
            "QLSTM: expected input.shape[-1] == input_size (88), got 7",
        ),
        (nn.LSTM, (torch.randn(K),), ValueError, "QLSTM: expected input with 2 or 3 dimensions, got 1"),
        (nn.LSTM, ([1.0],), TypeError, "QLSTM: expected input to be a tensor, got list"),
        (
            nn.LSTM,
            (x.int(),),
            RuntimeError,
            "QLSTM: expected input of dtype float32, bfloat16, float16 or float64",
        ),
        (
            nn.LSTM,
            (x.to("meta"),),
            RuntimeError,
            "QLSTM: expected input on cpu, where the weights are, got it on meta",
        ),
        (nn.LSTM, (x, one), TypeError, "QLSTM: expected hx to be a pair of tensors (h, c), got Tensor"),
        (nn.LSTM, (x, (one,)), TypeError, "QLSTM: expected hx to be a pair of tensors (h, c), got 1 values"),
        (
            nn.LSTM,
            (x, (one, one[:, :1])),
            RuntimeError,
            "QLSTM: expected hx[1] of shape [1, 2, 40], got [1, 1, 40]",
        ),
        (nn.LSTM, (x[0], (one, one)), RuntimeError, "QLSTM: expected hx[0] of shape [1, 40], got [1, 2, 40]"),
        (nn.GRU, (x, (one, one)), TypeError, "QGRU: expected hx to be a tensor, got tuple"),
        (nn.GRU, (x, one.int()), RuntimeError, "QGRU: expected hx of dtype float32"),
        (
            nn.GRU,
            (x.to_sparse(),),
            RuntimeError,
            "QGRU: expected a dense input, got one of layout torch.sparse_coo",
        ),
        (nn.LSTMCell, (x,), ValueError, "QLSTMCell: expected input with 1 or 2 dimensions, got 3"),
        (nn.GRUCell, (x[0], one), RuntimeError, "QGRUCell: expected hx of shape [2, 40], got [1, 2, 40]"),
        (
            nn.RNNCell,
            (x[0, :, :5],),
            RuntimeError,
            "QRNNCell: expected input.shape[-1] == input_size (88), got 5",
        ),
    ]


@pytest.mark.parametrize("case", errors(), ids=lambda case: case[-1][:70])
def test_errors(case: tuple[type[nn.Module], tuple[Any, ...], type[Exception], str]) -> None:
    kind, arguments, error, words = case
    _, layer = pair(kind)
    with pytest.raises(error, match=re.escape(words)):
        layer(*arguments)


def test_from_float_errors() -> None:
    with pytest.raises(TypeError, match=re.escape("QLSTM.from_float: expected an nn.LSTM, got GRU")):
        QLSTM.from_float(nn.GRU(3, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=re.escape("QGRUCell.from_float: expected an nn.GRUCell, got Linear")):
        QGRUCell.from_float(nn.Linear(3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected activations to be one of"):
        QLSTM(3, 4, activations="per_row")
    module = nn.LSTM(3, 4)
    with torch.no_grad():
        module.weight_hh_l0[2, 1] = math.inf
    with pytest.raises(ValueError, match=re.escape("weight_hh_l0: expected weight to be finite, got inf")):
        QLSTM.from_float(module)
    with pytest.raises(ValueError, match=re.escape("layer '0': weight_hh_l0: expected weight to be finite")):
        quantize_dynamic(nn.Sequential(module))
    for arguments in ({"dropout": 2.0}, {"num_layers": 0}, {"proj_size": 9}):
        with pytest.raises(ValueError, match="."):
            QLSTM(3, 4, **arguments)
