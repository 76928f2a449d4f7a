"""Layers without the rotation's signs, as earlier files have them: saved and loaded, they stay so."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import Config, QLinear, QTensor
from dynquant.patterns import SharedInput, registry
from tests.support.same_bits import assert_same_bits

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
WITHOUT = Config(rotation_block=64, rotation_signs=False)


def without_signs(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, QLinear):
            layer.weight = QTensor.quantize(layer.dequantize_weight(), WITHOUT)
            assert layer.config == WITHOUT
    return model


@pytest.fixture
def old() -> nn.Module:
    torch.manual_seed(0)
    return without_signs(
        dynquant.quantize_dynamic(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), rotation=64)
    )


def test_they_compute_something_else_on_the_way(old: nn.Module) -> None:
    fresh = QLinear.from_float(nn.Linear(64, 64), rotation=64)
    assert not torch.equal(
        fresh.weight.int_repr(), QTensor.quantize(fresh.dequantize_weight(), WITHOUT).int_repr()
    )
    assert_same_bits(
        torch.ops.dynquant.rotate(X, 64),
        dynquant.reference.rotate(X, 64, signs=False),
        "the default of the op",
    )


@pytest.mark.parametrize(
    "way", ["deepcopy", "pickle", "state_dict", "assign", "save", "export", "from_float"]
)
def test_every_way_to_save_and_load_keeps_them(old: nn.Module, way: str, tmp_path: Path) -> None:
    expected = old(X)
    fresh = nn.Sequential(QLinear(64, 64, rotation=64), QLinear(64, 8)).eval()
    if way == "deepcopy":
        loaded = copy.deepcopy(old)
    elif way == "pickle":
        loaded = pickle.loads(pickle.dumps(old))
    elif way in ("state_dict", "assign"):
        fresh.load_state_dict(old.state_dict(), assign=way == "assign")
        loaded = fresh
    elif way == "save":
        dynquant.save(old, tmp_path / "model.safetensors")
        floats = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).eval()
        loaded = dynquant.load(floats, tmp_path / "model.safetensors")
    elif way == "export":
        loaded = torch.export.export(old, (X,)).module()
    else:
        loaded = nn.Sequential(*(layer.to_float() for layer in old))
        torch.testing.assert_close(loaded(X), expected, atol=0.1, rtol=0)
        return
    assert_same_bits(loaded(X), expected)
    if way != "export":
        assert [layer.config for layer in loaded] == [WITHOUT, WITHOUT]


class Projections(nn.Module):
    """Three layers of one input, which a pattern says."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A float model and its int8 one, in which k alone has no signs."""
    name = registry.type_name(Projections())
    monkeypatch.setitem(registry.PATTERNS, name, [SharedInput(("q", "k", "v"))])
    torch.manual_seed(0)
    model = Projections().eval()
    int8: Any = dynquant.quantize_dynamic(model, rotation=64)
    int8.k.weight = QTensor.quantize(model.k.weight.detach(), WITHOUT)
    assert [layer.config.rotation_signs for layer in (int8.q, int8.k, int8.v)] == [True, False, True]
    with torch.no_grad():
        assert (int8(X) - model(X)).norm() < 0.02 * model(X).norm()
    return model, int8


def test_layers_of_one_input_with_and_without_signs_keep_their_values(mixed: tuple[Any, Any]) -> None:
    _, int8 = mixed
    with torch.no_grad():
        expected = int8(X)
        merged = dynquant.fuse(copy.deepcopy(int8))
        assert merged.k.config == WITHOUT
        assert_same_bits(merged(X), expected, "merged by modules")
        graph = dynquant.fuse_graph(torch.fx.symbolic_trace(copy.deepcopy(int8)))
        assert_same_bits(graph(X), expected, "merged in a graph")
        compiled = torch.compile(int8, backend="dynquant", fullgraph=True, options={"backend": "eager"})
        assert_same_bits(compiled(X), expected, "merged by torch.compile")


@pytest.mark.parametrize("way", ["state_dict", "assign", "one weight"])
def test_a_merged_layer_takes_a_weight_without_signs(mixed: tuple[Any, Any], way: str) -> None:
    model, int8 = mixed
    merged: Any = dynquant.quantize_dynamic(model, rotation=64, fuse=True)
    assert merged.q.merged_count == 3
    if way == "one weight":
        merged.k.weight = QTensor.quantize(model.k.weight.detach(), WITHOUT)
    else:
        merged.load_state_dict(int8.state_dict(), assign=way == "assign")
    with torch.no_grad():
        assert merged.k.config == WITHOUT
        assert merged.q.merged_count == 1  # no longer one product
        assert_same_bits(merged(X), int8(X))
        compiled = torch.compile(merged, backend="dynquant", fullgraph=True, options={"backend": "eager"})
        assert_same_bits(compiled(X), int8(X))
        merged.k.weight = QTensor.quantize(model.k.weight.detach(), merged.q.config)
        assert merged.q.merged_count == 3
        assert_same_bits(merged.k(X), dynquant.quantize_dynamic(model, rotation=64).k(X))


@pytest.mark.parametrize("name", ["self_attn.out_proj", "linear1", "linear2"])
def test_an_encoder_layer_takes_a_layer_without_signs(name: str) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu").eval()
    fused: Any = dynquant.quantize_dynamic(model, rotation=64, fuse=True)
    weight = model.get_submodule(name).weight.detach()
    layer = fused.get_submodule(name)
    layer.weight = QTensor.quantize(weight, Config(rotation_block=64, rotation_signs=False))
    assert not layer.config.rotation_signs
    x = torch.randn(2, 7, 64)
    parts = copy.deepcopy(fused)
    parts.restore()
    with torch.no_grad():
        assert fused.why_parts() is None
        out, expected = fused(x), model(x)
        assert (out - expected).norm() < 0.02 * expected.norm()
        assert (out - parts(x)).norm() < 0.01 * expected.norm()


def test_gate_and_up_with_and_without_signs_are_no_one_op() -> None:
    layer = transformers_layer()
    assert layer.why_parts() is None
    up = layer.mlp.up_proj
    up.weight = QTensor.quantize(up.dequantize_weight(), WITHOUT)
    assert layer.why_parts() == "mlp.gate_proj and mlp.up_proj have different rotations"
    layer.mlp.gate_proj.weight = QTensor.quantize(layer.mlp.gate_proj.dequantize_weight(), WITHOUT)
    assert layer.why_parts() is None


def transformers_layer() -> Any:
    transformers = pytest.importorskip("transformers", "5")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    torch.manual_seed(0)
    return dynquant.quantize_dynamic(transformers.LlamaModel(config).eval(), rotation=64, fuse=True).layers[0]


def test_gradients_are_of_the_dequantized_weight(old: nn.Module) -> None:
    x = X.clone().requires_grad_()
    old[0](x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, old[0].dequantize_weight().sum(0).expand(5, 64))


def test_a_config_json_from_before_the_signs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    torch.manual_seed(0)
    model = without_signs(dynquant.quantize_dynamic(transformers.BertModel(config), rotation=64)).eval()
    model.config.quantization_config.modules = {
        name: {"rotation_block": 64} for name in model.config.quantization_config.modules
    }
    model.save_pretrained(tmp_path)
    assert "rotation_signs" not in (tmp_path / "config.json").read_text()
    ids = torch.arange(12)[None]
    loaded = transformers.BertModel.from_pretrained(tmp_path).eval()
    assert {layer.config for layer in loaded.modules() if isinstance(layer, QLinear)} == {WITHOUT}
    assert_same_bits(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
