"""QEmbedding and QEmbeddingBag: as nn's within 8 bits, every option, files, tools, ties."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynquant
from dynquant import QEmbedding, QEmbeddingBag, QLinear, QTensor, quantize_dynamic
from tests.support.reporting import reasons, reported
from tests.support.same_bits import assert_same_bits

IDS = torch.tensor([[3, 0, 9], [29, 3, 1]])


def embedding(n: int = 30, k: int = 20, **options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(n, k, **options)


def is_close(out: Tensor, expected: Tensor, table: Tensor, rows: int = 1) -> bool:
    """Within half a step of the largest scale, for each of the rows that an output adds."""
    step = table.abs().max() / 127 / 2 + 1e-6
    return bool((out - expected).abs().max() <= rows * step)


# ---- values


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_those_of_the_dequantized_table(weights: str, dtype: torch.dtype) -> None:
    float_module = embedding(padding_idx=3).to(dtype)
    module = QEmbedding.from_float(float_module, weights=weights)
    out = module(IDS)
    assert_same_bits(out, F.embedding(IDS, module.dequantize_weight()).to(dtype))
    assert out.dtype == dtype
    assert not out[0, 0].any(), "the padding row stays zero"
    steps = 2 if dtype == torch.bfloat16 else 1
    assert is_close(out.float(), float_module(IDS).float(), float_module.weight.float(), steps)
    assert_same_bits(module.int()(IDS.int()) if False else module(IDS.int()), out)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}])
def test_bags(mode: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    float_module = nn.EmbeddingBag(30, 20, mode=mode, **options)
    module = QEmbeddingBag.from_float(float_module)
    offsets = torch.tensor([0, 2, 2, 5])
    table = float_module.weight
    assert is_close(module(IDS), float_module(IDS), table, 3)
    flat = IDS.flatten()
    assert is_close(module(flat, offsets), float_module(flat, offsets), table, 3)
    assert_same_bits(module(input=flat.int(), offsets=offsets.int()), module(flat, offsets))
    last = nn.EmbeddingBag(30, 20, mode=mode, include_last_offset=True, **options)
    ends = torch.tensor([0, 2, 6])
    assert is_close(QEmbeddingBag.from_float(last)(flat, ends), last(flat, ends), last.weight, 4)
    if mode == "sum":
        factors = torch.randn(2, 3)
        expected = float_module(IDS, per_sample_weights=factors)
        assert is_close(module(IDS, per_sample_weights=factors), expected, table, 6)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_gradients_of_per_sample_weights(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    module = QEmbeddingBag(30, 20, mode="sum", padding_idx=padding_idx)
    exact = module.to_float()
    a, b = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    out = module(IDS, per_sample_weights=a)
    out.square().sum().backward()
    exact(IDS, per_sample_weights=b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(out, module(IDS, per_sample_weights=a))


def test_nested_inputs() -> None:
    module = QEmbedding(30, 20)
    parts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    for layout in (torch.jagged, torch.strided):
        out = module(torch.nested.nested_tensor(parts, layout=layout))
        assert out.layout is layout
        for part, ids in zip(out.unbind(), parts, strict=True):
            assert_same_bits(part, module(ids))


def test_a_table_is_held_in_a_byte_an_element() -> None:
    module = QEmbedding(30522, 384)
    bytes_held = sum(tensor.nbytes for tensor in module.buffers())
    assert bytes_held <= 30522 * (384 + 4)
    assert list(module.int8_tensors()) == ["weight_packed"]
    assert sum(value.nbytes for value in module.state_dict().values()) <= bytes_held + 32


# ---- refusals


def test_bad_input_by_its_words() -> None:
    module, bag = QEmbedding(30, 20), QEmbeddingBag(30, 20)
    cases: list[tuple[Any, str]] = [
        (lambda: module(torch.tensor([30])), "embedding: expected indices in [0, 30), got 30 at position 0"),
        (lambda: module(torch.tensor([-1])), "embedding: expected indices in [0, 30), got -1 at position 0"),
        (lambda: module(torch.ones(3)), "expected indices of dtype int64 or int32, got torch.float32"),
        (lambda: QEmbedding(30, 20, max_norm=1.0), "max_norm (1) would change rows of the table"),
        (lambda: QEmbedding.from_float(nn.Embedding(3, 2, max_norm=0.5)), "max_norm (0.5)"),
        (lambda: QEmbeddingBag(30, 20, max_norm=1.0), "max_norm (1)"),
        (lambda: QEmbedding(30, 20, weights="some"), "expected weights to be one of"),
        (lambda: QEmbedding.from_float(nn.Linear(2, 3)), "expected an nn.Embedding, got Linear"),
        (lambda: bag(torch.tensor([1])), "expected offsets with an input [L], got None"),
        (lambda: bag(IDS, torch.tensor([0])), "expected no offsets with an input [B, L]"),
        (lambda: bag(IDS[None]), "expected an input [B, L] or [L], got [1, 2, 3]"),
        (lambda: bag(IDS, per_sample_weights=torch.ones(3)), "of the input's shape [2, 3], got [3]"),
        (lambda: bag(IDS, per_sample_weights=torch.ones(2, 3)), "with mode 'sum' alone, got mode 'mean'"),
        (lambda: bag(IDS[0], torch.tensor([0, 4])), "at most 3, the number of indices, got 4"),
        (lambda: F.embedding(IDS, module.weight, max_norm=1.0), "max_norm (1)"),
        (
            lambda: setattr(module, "weight", torch.ones(3, 3)),
            "expected weight of shape [30, 20], got [3, 3]",
        ),
        (lambda: setattr(module, "weight", 3), "expected a tensor for .weight, got int"),
        (lambda: module.to(torch.int8), "floating point"),
    ]
    for call, words in cases:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(words)):
            call()
    with torch.no_grad():
        broken = embedding()
        broken.weight[4, 5] = float("nan")
        with pytest.raises(
            ValueError, match=re.escape("expected weight to be finite, got nan at weight[4, 5]")
        ):
            QEmbedding.from_float(broken)


# ---- the weight


def test_the_weight_is_read_like_a_float_one() -> None:
    module = QEmbedding(30, 20, dtype=torch.bfloat16)
    assert isinstance(module.weight, QTensor)
    assert (module.weight.dtype, module.weight.shape) == (torch.bfloat16, (30, 20))
    assert module.weight.int_repr().dtype == torch.int8
    x = torch.randn(4, 20)
    layer = QLinear(20, 30, bias=False)
    layer.weight = module.weight
    assert_same_bits(F.linear(x, module.weight), layer(x))
    assert_same_bits(F.embedding(IDS, layer.weight), module(IDS))
    assert not layer.weight.is_rows
    table = torch.randn(30, 20)
    module.weight = table
    assert is_close(module(IDS).float(), F.embedding(IDS, table), table)
    assert module.half()(IDS).dtype == torch.float16
    assert_same_bits(module.to_float()(IDS), module(IDS))


# ---- files and copies


@pytest.mark.parametrize("make", [QEmbedding, QEmbeddingBag])
def test_copies_and_files(make: Any) -> None:
    torch.manual_seed(0)
    module = make(30, 20, padding_idx=2)
    expected = module(IDS)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert {name: list(value.shape) for name, value in saved.items()} == {
        "weight": [30, 20, 1],
        "weight_scale": [30],
        "format": [4],
    }
    other = make(30, 20, padding_idx=2)
    other.load_state_dict(saved)
    on_meta = make(30, 20, padding_idx=2, device="meta")
    on_meta.load_state_dict(safetensors.load(safetensors.save(saved)), assign=True)
    for restored in (other, on_meta, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_bits(restored(IDS), expected)
        assert restored.weight.is_rows
        assert restored.padding_idx == 2
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.to_float().load_state_dict(saved, strict=False)


def test_float_files_are_quantized_on_loading() -> None:
    float_module = embedding()
    module = QEmbedding(30, 20)
    with pytest.warns(UserWarning, match="the state_dict holds float weights"):
        module.load_state_dict(float_module.state_dict())
    assert_same_bits(module(IDS), QEmbedding.from_float(float_module)(IDS))


def test_bad_files_leave_the_module_as_it_is() -> None:
    module = QEmbedding(30, 20)
    expected = module(IDS)
    good = module.state_dict()
    changes = {
        "weight": (good["weight"][:29], "expected weight of shape [30, 20, 1], got [29, 20, 1]"),
        "weight_scale": (-good["weight_scale"], "weight_scale to be finite and positive"),
        "format": (torch.tensor([9, 0, 1, 0]), "a newer dynquant may have written it"),
    }
    for name, (value, words) in changes.items():
        with pytest.raises(RuntimeError, match=re.escape(words)):
            module.load_state_dict(good | {name: value})
        assert_same_bits(module(IDS), expected)
    with pytest.raises(RuntimeError, match="the state_dict has format, but no weight_scale"):
        module.load_state_dict({name: good[name] for name in ("weight", "format")})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    module, bag = QEmbedding(30, 20), QEmbeddingBag(30, 20)
    torch._dynamo.reset()
    for part in (module, bag):
        assert_same_bits(torch.compile(part, fullgraph=True, backend=backend)(IDS), part(IDS))


def test_export_trace_and_functional_call() -> None:
    module = QEmbedding(30, 20)
    program = torch.export.export(module, (IDS,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_same_bits(program.module()(IDS[:1]), module(IDS[:1]))
    assert_same_bits(torch.jit.trace(module, IDS)(IDS.flip(0)), module(IDS.flip(0)))
    assert_same_bits(torch.func.functional_call(module, {}, IDS), module(IDS))
    half = QEmbedding(30, 20, dtype=torch.bfloat16)
    assert_same_bits(torch.jit.script(half)(IDS), half(IDS))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(module(IDS), module(IDS).float())


# ---- conversion


class Language(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def float_qparams() -> Any:
    from torch.ao.quantization import float_qparams_weight_only_qconfig

    return float_qparams_weight_only_qconfig


@pytest.mark.filterwarnings("error::UserWarning:dynquant")
def test_converted_where_asked_for() -> None:
    model = Language(tied=False)
    float_type, int8_type = nn.Embedding, QEmbedding
    for spec, options, kind in [
        (None, {}, float_type),
        ({nn.Linear}, {}, float_type),
        ({"embed"}, {}, int8_type),
        ({nn.Embedding}, {}, int8_type),
        ({nn.Embedding: dynquant.Config(), nn.Linear: dynquant.Config()}, {}, int8_type),
        ({nn.Embedding: float_qparams()}, {}, int8_type),
        ({"": float_qparams(), nn.Linear: None}, {}, int8_type),
        (None, {"embeddings": True}, int8_type),
        ({nn.Linear}, {"embeddings": True}, int8_type),
        (None, {"embeddings": True, "mapping": {nn.Linear: QLinear}}, int8_type),
        ({nn.Embedding: None}, {"embeddings": True}, float_type),
    ]:
        assert type(quantize_dynamic(model, spec, **options).embed) is kind, spec
    bags = nn.Sequential(nn.EmbeddingBag(30, 20), nn.Linear(20, 4))
    assert type(quantize_dynamic(bags, embeddings=True)[0]) is QEmbeddingBag


def test_left_float_with_a_reason() -> None:
    model = nn.Sequential(nn.Embedding(30, 20, max_norm=1.0), nn.Linear(20, 4))
    with pytest.warns(UserWarning, match=r"1 Embedding \('0'\): max_norm \(1\) would change rows"):
        assert type(quantize_dynamic(model, embeddings=True)[0]) is nn.Embedding
    four_bits = torch.ao.quantization.float_qparams_weight_only_qconfig_4bit
    with pytest.raises(ValueError, match=r"torch.qint8, got torch.quint4x2"):
        quantize_dynamic(model[1:] + nn.Sequential(nn.Embedding(4, 4)), {nn.Embedding: four_bits})


@pytest.mark.parametrize("scheme", [{}, {"rotation": "hadamard"}, {"activations": "per_tensor"}], ids=str)
def test_a_tied_head_and_its_embedding_hold_one_weight(scheme: dict[str, Any]) -> None:
    model = Language()
    quantized = quantize_dynamic(model, embeddings=True, **scheme)
    assert quantized.embed.weight is quantized.head.weight
    assert quantized.embed.weight_packed is quantized.head.packed_weight
    assert is_close(quantized.embed(IDS), model.embed(IDS), model.embed.weight, 3)
    expected = F.embedding(IDS, quantized.head.dequantize_weight())
    torch.testing.assert_close(quantized.embed(IDS), expected, rtol=1e-6, atol=1e-7)
    again = quantize_dynamic(Language(), embeddings=True, **scheme)
    again.load_state_dict(quantized.state_dict())
    assert again.embed.weight is again.head.weight
    assert_same_bits(again(IDS), quantized(IDS))
    moved = copy.deepcopy(quantized).to(torch.bfloat16)
    assert moved.embed.weight is moved.head.weight
    assert moved.embed(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_saved_to_one_file(tied: bool, tmp_path: Path) -> None:
    quantized = quantize_dynamic(Language(tied), embeddings=True)
    dynquant.save(quantized, tmp_path / "language.safetensors")
    torch.manual_seed(5)
    loaded = dynquant.load(Language(tied), tmp_path / "language.safetensors")
    assert_same_bits(loaded(IDS), quantized(IDS))
    assert type(loaded.embed) is QEmbedding
    assert (loaded.embed.weight is loaded.head.weight) == tied


def test_measured_and_reported() -> None:
    model = Language(tied=False)
    quantized, report = reported(model, IDS, embeddings=True, min_sqnr=20)
    row = next(layer for layer in report.layers if layer.name == "embed")
    assert (row.float_type, row.int8_type, row.n, row.k) == ("Embedding", "QEmbedding", 40, 32)
    assert row.sqnr_db > 30
    assert "embed" not in reasons(report)
    assert type(quantized.embed) is QEmbedding
    _, report = reported(model, IDS)
    assert "embeddings=True" in reasons(report)["embed"]
