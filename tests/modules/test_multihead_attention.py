"""QMultiheadAttention, and torch's transformer modules with it: as nn's within 8 bits, files, tools."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch
from torch import Tensor, nn

import dynquant
from dynquant import Config, EncoderLayer, QLinear, QMultiheadAttention, QTensor, quantize_dynamic
from dynquant.conversion.plan import label
from tests.support.nets import CountInt8
from tests.support.reporting import names, reasons, reported
from tests.support.same_bits import assert_same_bits

E, HEADS = 32, 4


def attention(e: int = E, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(e, HEADS, **options).eval()
    with torch.no_grad():
        if module.in_proj_bias is not None:
            module.in_proj_bias.normal_()
            module.out_proj.bias.normal_()
    return module


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def inputs(module: nn.MultiheadAttention, queries: int, keys: int, batch: int | None = 2) -> list[Tensor]:
    torch.manual_seed(1)
    sizes = (queries, module.embed_dim), (keys, module.kdim), (keys, module.vdim)
    if batch is None:
        return [torch.randn(length, width) for length, width in sizes]
    if module.batch_first:
        return [torch.randn(batch, length, width) for length, width in sizes]
    return [torch.randn(length, batch, width) for length, width in sizes]


def assert_close(
    quantized: QMultiheadAttention, module: nn.MultiheadAttention, *args: Any, **call: Any
) -> None:
    out, weights = quantized(*args, **call)
    expected, expected_weights = module(*args, **call)
    assert out.shape == expected.shape
    assert error(out, expected) < 0.03
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        assert weights.shape == expected_weights.shape
        assert (weights - expected_weights).abs().max() < 0.05


# ---- values


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 20, "vdim": 12},
    ],
    ids=str,
)
def test_as_torchs(options: dict[str, Any], need_weights: bool, batch_first: bool) -> None:
    module = attention(batch_first=batch_first, **options)
    quantized = QMultiheadAttention.from_float(module)
    causal = torch.ones(7, 9, dtype=torch.bool).triu(1)
    masks: list[dict[str, Any]] = [
        {},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(7, 9)},
        {"attn_mask": torch.randn(2 * HEADS, 7, 9)},
        {"key_padding_mask": torch.arange(9)[None] >= torch.tensor([[4], [9]])},
        {"attn_mask": causal, "key_padding_mask": torch.arange(9)[None] >= torch.tensor([[4], [9]])},
    ]
    for mask, average in itertools.product(masks, (False, True)):
        call = {**mask, "need_weights": need_weights, "average_attn_weights": average}
        assert_close(quantized, module, *inputs(module, 7, 9), **call)
    for mask in (None, causal):
        call = {"attn_mask": mask, "need_weights": need_weights}
        assert_close(quantized, module, *inputs(module, 7, 9, None), **call)


@pytest.mark.parametrize("e", [32, 64, 96, 20])
@pytest.mark.parametrize("scheme", [{}, {"activations": "per_tensor"}, {"rotation": "hadamard"}], ids=str)
def test_one_quantization_for_what_is_one_tensor(e: int, scheme: dict[str, Any]) -> None:
    """Slices of the packed weight, or all of it, give the bits of separate projections."""
    module = attention(e, batch_first=True)
    quantized = QMultiheadAttention.from_float(module, **scheme)
    x, y = torch.randn(2, 5, e), torch.randn(2, 5, e)
    with CountInt8() as count:
        out, _ = quantized(x, x, x, need_weights=False)
    assert count.calls == 2
    with CountInt8() as count:
        quantized(x, y, y, need_weights=False)
    assert count.calls == 3
    with CountInt8() as count:
        same, _ = quantized(x, x.clone(), x.clone(), need_weights=False)
    assert count.calls == 4
    assert_same_bits(same, out)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    hinted, _ = quantized(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    expected, _ = module(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    assert error(hinted, expected) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    module = attention(batch_first=True)
    quantized = QMultiheadAttention.from_float(module).to(dtype)
    x = torch.randn(2, 5, E, dtype=dtype)
    out, weights = quantized(x, x, x)
    expected, _ = module(*[x.float()] * 3)
    assert (out.dtype, weights.dtype, quantized.in_proj_weight.dtype) == (dtype, dtype, dtype)
    assert error(out.float(), expected) < 0.04


def test_training() -> None:
    """Dropout of the attention weights; gradients reach the inputs and the biases."""
    module = attention(batch_first=True, dropout=0.5)
    quantized = QMultiheadAttention.from_float(module).train()
    x = torch.randn(2, 5, E, requires_grad=True)
    _, weights = quantized(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).float().mean() < 0.8
    a, b = (quantized(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(a, b)
    quantized.eval()
    quantized(x, x, x)[0].square().sum().backward()
    got, bias = x.grad.clone(), quantized.in_proj_bias.grad.clone()
    x.grad = None
    module(x, x, x)[0].square().sum().backward()
    assert error(got, x.grad) < 0.06
    assert error(bias, module.in_proj_bias.grad) < 0.06


def test_nested_inputs() -> None:
    module = attention(batch_first=True)
    quantized = QMultiheadAttention.from_float(module)
    parts = [torch.randn(3, E), torch.randn(5, E)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(parts, layout=layout)
        out, weights = quantized(x, x, x)
        assert out.layout is layout
        assert weights is None
        for part, alone in zip(out.unbind(), parts, strict=True):
            expected, _ = quantized(alone, alone, alone, need_weights=False)
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


# ---- refusals


def test_bad_input_by_its_words() -> None:
    quantized = QMultiheadAttention(E, HEADS, batch_first=True)
    x = torch.randn(2, 5, E)
    nested = torch.nested.nested_tensor([torch.randn(3, E)])
    bools = torch.zeros(2, 5, dtype=torch.bool)
    cases: list[tuple[Any, str]] = [
        (lambda: quantized(x, x[0], x), "all with 3 dimensions, or unbatched with 2, got 3, 2, 3"),
        (lambda: quantized(x, x, x[..., :9]), "expected value.shape[-1] == 32, got 9"),
        (
            lambda: quantized(x, x, x[:, :4]),
            "key and value of one length, got shapes [2, 5, 32], [2, 5, 32], [2, 4",
        ),
        (lambda: quantized(x, x[:1], x[:1]), "expected one batch size"),
        (lambda: quantized(x, x, x, is_causal=True), "expected attn_mask with is_causal"),
        (
            lambda: quantized(x, x, x, attn_mask=torch.ones(4, 5)),
            "expected attn_mask of shape [5, 5] or [8, 5, 5]",
        ),
        (
            lambda: quantized(x, x, x, key_padding_mask=bools[:1]),
            "key_padding_mask of shape [2, 5], got [1, 5]",
        ),
        (
            lambda: quantized(x, x, x, key_padding_mask=bools.int()),
            "float dtype or torch.bool, got torch.int32",
        ),
        (lambda: quantized(nested, nested, x), "query, key and value at once"),
        (lambda: quantized(nested, nested, nested, attn_mask=torch.ones(3, 3)), "without masks"),
        (lambda: QMultiheadAttention(E, HEADS, weights="some"), "expected weights to be one of"),
        (
            lambda: QMultiheadAttention.from_float(nn.Linear(2, 3)),
            "expected an nn.MultiheadAttention, got Linear",
        ),
        (
            lambda: setattr(quantized, "in_proj_weight", torch.ones(3, 3)),
            "expected in_proj_weight of shape [96, 32]",
        ),
    ]
    for call, words in cases:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(words)):
            call()
    broken = attention()
    with torch.no_grad():
        broken.in_proj_weight[4, 5] = float("inf")
    with pytest.raises(ValueError, match=r"expected weight to be finite, got inf at weight\[4, 5\]"):
        QMultiheadAttention.from_float(broken)


# ---- files and copies


OPTIONS: list[dict[str, Any]] = [{}, {"kdim": 20, "vdim": 12}, {"add_bias_kv": True, "bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_copies_and_files(options: dict[str, Any]) -> None:
    module = attention(batch_first=True, **options)
    quantized = QMultiheadAttention.from_float(module)
    x = inputs(module, 4, 6)
    expected, _ = quantized(*x)
    buffer = io.BytesIO()
    torch.save(quantized.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = getattr(module, name)
        if weight is not None:
            assert saved[name].dtype == torch.int8
            assert list(saved[name].shape) == [*weight.shape, 1]
            assert list(saved[f"{name}_scale"].shape) == [weight.shape[0]]
    assert set(module.state_dict()) <= set(saved), "the names of the float module"
    torch.manual_seed(5)
    other = QMultiheadAttention(E, HEADS, batch_first=True, **options)
    other.load_state_dict(saved)
    on_meta = QMultiheadAttention(E, HEADS, batch_first=True, device="meta", **options)
    on_meta.load_state_dict(safetensors.load(safetensors.save(saved)), assign=True)
    on_meta.eval()
    for restored in (other, on_meta, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert_same_bits(restored(*x)[0], expected)
    with pytest.raises(RuntimeError, match="size mismatch for .*_proj_weight"):
        attention(batch_first=True, **options).load_state_dict(saved, strict=False)
    assert error(quantized.to_float().eval()(*x)[0], expected) < 0.03
    with pytest.warns(UserWarning, match="the state_dict holds float weights") as found:
        other.load_state_dict(module.state_dict())
    assert len(found) == 1
    assert_same_bits(other(*x)[0], expected)


def test_files_from_before_int8_in_proj() -> None:
    """A float in_proj_weight beside a quantized out_proj."""
    module = attention(batch_first=True)
    before = copy.deepcopy(module)
    before.out_proj = QLinear.from_float(module.out_proj)
    quantized = QMultiheadAttention(E, HEADS, batch_first=True)
    with pytest.warns(UserWarning, match="the state_dict holds float weights"):
        quantized.load_state_dict(before.state_dict())
    expected = QMultiheadAttention.from_float(module)
    x = torch.randn(2, 5, E)
    assert_same_bits(quantized(x, x, x)[0], expected(x, x, x)[0])
    again = quantize_dynamic(nn.Sequential(before))[0]
    assert type(again) is QMultiheadAttention
    assert_same_bits(again(x, x, x)[0], expected(x, x, x)[0])


def test_bad_files_leave_the_module_as_it_is() -> None:
    quantized = QMultiheadAttention(E, HEADS)
    x = torch.randn(5, 2, E)
    expected, _ = quantized(x, x, x)
    good = quantized.state_dict()
    changes = {
        "in_proj_weight": (
            good["in_proj_weight"][:95],
            "in_proj_weight: expected weight of shape [96, 32, 1], got [95",
        ),
        "in_proj_weight_scale": (good["in_proj_weight_scale"] * float("nan"), "finite and positive"),
        "format": (torch.tensor([9, 0, 1, 0]), "a newer dynquant may have written it"),
    }
    for name, (value, words) in changes.items():
        with pytest.raises(RuntimeError, match=re.escape(words)):
            quantized.load_state_dict(good | {name: value})
        assert_same_bits(quantized(x, x, x)[0], expected)
    lacking = {name: value for name, value in good.items() if name != "in_proj_weight"}
    with pytest.raises(RuntimeError, match="the state_dict has format, but no in_proj_weight"):
        quantized.load_state_dict(lacking)


def test_the_weight_is_read_like_a_float_one() -> None:
    quantized = QMultiheadAttention(E, HEADS)
    assert isinstance(quantized.in_proj_weight, QTensor)
    assert quantized.q_proj_weight is None
    new = torch.randn(3 * E, E)
    quantized.in_proj_weight = new
    assert (quantized.in_proj_weight.dequantize() - new).abs().max() < new.abs().max() / 127
    assert list(quantized.quantized_weights()) == ["in_proj_weight"]
    assert sorted(quantized.int8_tensors()) == ["in_proj_weight_packed", "out_proj.packed_weight"]


# ---- tools


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    quantized = QMultiheadAttention(E, HEADS, batch_first=True).eval()
    x = torch.randn(2, 5, E)
    padding = torch.arange(5)[None] >= torch.tensor([[3], [5]])
    torch._dynamo.reset()
    run = torch.compile(quantized, fullgraph=True, backend=backend)
    with torch.no_grad():
        for call in ({"need_weights": False}, {"key_padding_mask": padding}):
            torch.testing.assert_close(run(x, x, x, **call)[0], quantized(x, x, x, **call)[0])


def test_export_trace_and_functional_call() -> None:
    quantized = QMultiheadAttention(E, HEADS, batch_first=True).eval()
    x = torch.randn(2, 5, E)
    expected, _ = quantized(x, x, x)
    program = torch.export.export(quantized, (x, x, x))
    torch.testing.assert_close(program.module()(x, x, x)[0], expected)
    traced = torch.jit.trace(quantized, (x, x, x))
    torch.testing.assert_close(traced(x, x, x)[0], expected)
    bias = quantized.in_proj_bias + 1
    changed, _ = torch.func.functional_call(quantized, {"in_proj_bias": bias}, (x, x, x))
    assert not torch.equal(changed, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(quantized(x, x, x)[0].float(), expected) < 0.05


# ---- torch's transformer modules


def layer(kind: Any = nn.TransformerEncoderLayer, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(E, HEADS, 64, dropout=0.0, **{"batch_first": True, **options})


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder(batch_first: bool, activation: str, norm_first: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about nested tensors
        model = nn.TransformerEncoder(
            layer(batch_first=batch_first, activation=activation, norm_first=norm_first), 2, nn.LayerNorm(E)
        ).eval()
    x = torch.randn(2, 6, E) if batch_first else torch.randn(6, 2, E)
    padding = torch.arange(6)[None] >= torch.tensor([[4], [6]])
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    kept = ~padding if batch_first else ~padding.t()
    for options in ({}, {"fuse": True}):
        quantized = quantize_dynamic(model, **options)
        assert type(quantized.layers[0].self_attn) is QMultiheadAttention
        for call in (
            {},
            {"src_key_padding_mask": padding},
            {"mask": causal},
            {"mask": causal, "is_causal": True},
        ):
            for train, grad in ((False, False), (False, True), (True, True)):
                with torch.set_grad_enabled(grad):
                    out = quantized.train(train)(x, **call)
                    expected = model.train(train)(x, **call)
                assert error(out[kept], expected[kept]) < 0.04, (call, train, grad)
        model.eval()


def test_nested_encoder() -> None:
    """The float model has a fast path for nested tensors, which a converted one must not take."""
    model = nn.TransformerEncoder(layer(), 2).eval()
    quantized = quantize_dynamic(model)
    parts = [torch.randn(3, E), torch.randn(6, E)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        x = torch.nested.nested_tensor(parts)
        out, expected = quantized(x), model(x)
        for a, b in zip(out.unbind(), expected.unbind(), strict=True):
            assert error(a, b) < 0.04
        with CountInt8() as count:
            quantized(x)
    assert count.calls >= 2 * 4


def test_decoder_and_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, HEADS, 2, 2, 64, dropout=0.0, batch_first=True).eval()
    quantized = quantize_dynamic(model)
    kinds = [type(part) for part in quantized.modules()]
    assert kinds.count(QMultiheadAttention) == 6
    assert nn.MultiheadAttention not in kinds
    source, target = torch.randn(2, 7, E), torch.randn(2, 5, E)
    padding = torch.arange(7)[None] >= torch.tensor([[4], [7]])
    call = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "tgt_is_causal": True,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    for train in (False, True):
        with torch.no_grad():
            out = quantized.train(train)(source, target, **call)
            expected = model.train(train)(source, target, **call)
        assert error(out, expected) < 0.06


def test_a_fused_layer_runs_its_ops_with_a_converted_attention() -> None:
    model = nn.TransformerEncoder(layer(), 1).eval()
    x = torch.randn(2, 6, E)
    fused = quantize_dynamic(model, fuse=True)
    encoder_layer = fused.layers[0]
    assert isinstance(encoder_layer, EncoderLayer)
    with torch.no_grad(), CountInt8() as count:
        out = fused(x)
    why = encoder_layer.why_parts()
    if why is None:
        assert count.calls == 1, "query, key and value; the rest is one op"
    quantized = quantize_dynamic(model)
    with torch.no_grad():
        assert error(out, quantized(x)) < 0.03
        # After a change of the weight the ops take the new one.
        encoder_layer.self_attn.in_proj_weight = torch.zeros(3 * E, E)
        quantized.layers[0].self_attn.in_proj_weight = torch.zeros(3 * E, E)
        assert error(fused(x), quantized(x)) < 0.03
    restored = copy.deepcopy(fused)
    assert isinstance(restored.layers[0], EncoderLayer)
    restored.layers[0].restore()
    with torch.no_grad():
        torch.testing.assert_close(restored(x), quantized(x))


@pytest.mark.parametrize("options", [{}, {"fuse": True}], ids=str)
def test_saved_to_one_file(options: dict[str, Any], tmp_path: Path) -> None:
    model = nn.TransformerEncoder(layer(), 2).eval()
    quantized = quantize_dynamic(model, **options)
    dynquant.save(quantized, tmp_path / "encoder.safetensors")
    loaded = dynquant.load(nn.TransformerEncoder(layer(), 2).eval(), tmp_path / "encoder.safetensors")
    x = torch.randn(2, 6, E)
    with torch.no_grad():
        assert_same_bits(loaded(x), quantized(x))
    assert type(loaded.layers[1].self_attn) is QMultiheadAttention


# ---- conversion


def test_what_the_spec_asks_for() -> None:
    model = nn.TransformerEncoder(layer(), 1).eval()
    own, float_type = QMultiheadAttention, nn.MultiheadAttention
    for spec, kind, out in [
        (None, own, QLinear),
        ({nn.Linear}, float_type, QLinear),
        ({nn.MultiheadAttention}, own, QLinear),
        ({"layers.0"}, own, QLinear),
        ({"": torch.ao.quantization.default_dynamic_qconfig}, own, QLinear),
        ({nn.MultiheadAttention: Config(activations="per_tensor")}, own, QLinear),
        (
            {nn.MultiheadAttention: Config(), "layers.0.self_attn.out_proj": None},
            float_type,
            type(layer().self_attn.out_proj),
        ),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = quantize_dynamic(model, spec)
        part = quantized.layers[0].self_attn
        assert (type(part), type(part.out_proj)) == (kind, out), label(str(spec))
    assert type(quantize_dynamic(attention())) is own


def test_a_replaced_out_proj_keeps_the_attention_float() -> None:
    module = attention()
    module.out_proj = nn.Sequential(nn.Linear(E, E))
    with pytest.warns(UserWarning, match="its out_proj is a Sequential"):
        quantized = quantize_dynamic(nn.ModuleDict({"a": module, "b": nn.Linear(E, E)}))
    assert type(quantized["a"]) is nn.MultiheadAttention


@pytest.mark.usefixtures("quick_measuring")
def test_measured_and_reported() -> None:
    model = nn.TransformerEncoder(layer(), 1).eval()
    quantized, report = reported(model, torch.randn(2, 6, E), min_sqnr=15)
    parts = ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert names(report) == [f"layers.0.{name}" for name in parts], "the whole, and what is in it"
    row = report.layers[0]
    assert (row.float_type, row.int8_type, row.n, row.k) == (
        "MultiheadAttention",
        "QMultiheadAttention",
        96,
        32,
    )
    assert row.sqnr_db > 25
    assert not reasons(report)
    assert dynquant.QMultiheadAttention is type(quantized.layers[0].self_attn)
