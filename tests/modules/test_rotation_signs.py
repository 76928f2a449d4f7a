"""Layers without the rotation's signs, as earlier files have them: saved and loaded, they stay so."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import dynquant
from dynquant import Config, QLinear, QTensor
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
