"""quantize_dynamic(attention="int8"): which attention becomes int8, its report, its threshold."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import dynquant
from dynquant._extension import extension, status

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(extension is None, reason=f"no int8 attention: {status}")

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}
IDS = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def _bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()


def _t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4, "d_ff": 96, "vocab_size": 50}
    model: nn.Module = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0)
    )
    return model.eval()


def _attention_modules(model: nn.Module, **inputs: Any) -> list[str]:
    """Names of the modules whose attention runs in int8."""
    from dynquant.measurement.attention import measure_attention
    from dynquant.measurement.sample import Sample

    with torch.no_grad():
        return list(measure_attention(model, Sample.of(inputs), timed=False))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_decoder_has_int8_attention_where_it_is_asked_for(inplace: bool) -> None:
    model = _llama()
    plain = dynquant.quantize_dynamic(model, fuse=True)
    assert _attention_modules(plain, input_ids=IDS) == []
    int8 = dynquant.quantize_dynamic(model, fuse=True, attention="int8", inplace=inplace)
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    assert _attention_modules(int8, input_ids=IDS) == names
    assert (model.config._attn_implementation == "dynquant") == inplace
    with torch.no_grad():
        y, expected = int8(input_ids=IDS)[0], plain(input_ids=IDS)[0]
    assert 0 < (y - expected).norm() / expected.norm() < 0.02


def test_position_bias_is_added_to_the_scores() -> None:
    model = _t5()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :20], "attention_mask": (IDS > 4).long()}
    int8 = dynquant.quantize_dynamic(model, attention="int8")
    assert len(_attention_modules(int8, **inputs)) == 6
    with torch.no_grad():
        y, expected = int8(**inputs)[0], model(**inputs)[0]
    assert (y - expected).norm() / expected.norm() < 0.03


def test_the_report_has_a_row_for_the_attention_of_each_module() -> None:
    _, report = dynquant.quantize_dynamic(
        _llama(), attention="int8", sample={"input_ids": IDS}, report=True, min_sqnr=20
    )
    assert [entry.name for entry in report.attention] == [f"model.layers.{i}.self_attn" for i in range(2)]
    for entry in report.attention:
        assert (entry.calls, entry.shapes) == (1, ((2, 4, 24, 24, 16),))
        assert entry.sqnr_db > 30
        assert entry.us_float > 0
        assert entry.us_int8 > 0
    assert "2, 4, 24, 24, 16" in str(report)
    assert report.to_dict()["attention"][1]["shapes"] == [[2, 4, 24, 24, 16]]
    again = dynquant.report(_llama(), dynquant.quantize_dynamic(_llama(), attention="int8"), IDS)
    assert len(again.attention) == 2


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [_bert, _llama])
def test_attention_below_the_threshold_stays_float(make: Any, inplace: bool) -> None:
    """The threshold lies between the layers and attention, whose SQNR is above 45 dB here, except for 0."""
    model = make()
    options: dict[str, Any] = {"fuse": True} if make is _bert else {"attention": "int8"}
    chosen = copy.deepcopy(model)
    for layer in (chosen.encoder.layer if make is _bert else chosen.model.layers)[:1]:
        # Values of one key a thousand times larger take the precision of all others in its block.
        value = layer.attention.self.value if make is _bert else layer.self_attn.v_proj
        with torch.no_grad():
            value.weight[:] = torch.randn(value.weight.shape[0], 1) * torch.ones(value.weight.shape[1])
    sample = {"input_ids": IDS}
    spec = {nn.Linear: dynquant.Config()}
    _, first = dynquant.quantize_dynamic(chosen, spec, sample=sample, report=True, **options)
    sqnr = {entry.name: entry.sqnr_db for entry in first.attention}
    limit = (min(sqnr.values()) + max(sqnr.values())) / 2
    low = [name for name, value in sqnr.items() if value < limit]
    assert len(low) == 1
    from dynquant.measurement.attention import judge_attention
    from dynquant.measurement.sample import Sample

    int8 = dynquant.quantize_dynamic(chosen, spec, inplace=inplace, **options)
    with torch.no_grad():
        reasons = judge_attention(int8, Sample.of(sample), limit)
    assert list(reasons) == low
    assert f"below min_sqnr={limit:g}" in reasons[low[0]]
    assert low[0] not in _attention_modules(int8, input_ids=IDS)
    assert low[0] not in _attention_modules(copy.deepcopy(int8), input_ids=IDS)


def test_rejected_attention_is_reported_and_stays_float_in_place() -> None:
    model = _bert()
    # No layer is converted, so that the threshold judges attention alone.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that no layer was converted
        int8, report = dynquant.quantize_dynamic(
            model, set(), attention="int8", sample={"input_ids": IDS}, min_sqnr=300, report=True, inplace=True
        )
    assert int8 is model
    assert report.attention == ()
    names = [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert [entry.name for entry in report.skipped if "int8 attention has an SQNR" in entry.reason] == names
    assert _attention_modules(model, input_ids=IDS) == []


def _outside(name: str) -> nn.Module:
    """A transformers model that does not use the interface."""
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SIZES))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: _outside("MPNet"), "stays float in MPNetModel, which does not use"),
        (lambda: _outside("DebertaV2"), "stays float in DebertaV2Model, which does not use"),
        (lambda: _outside("RoFormer"), "stays float in RoFormerModel, which does not use"),
        (lambda: _outside("Falcon"), "stays float in FalconModel, which does not use"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "no attention was found in the model"),
    ],
)
def test_one_warning_names_attention_that_stays_float(make: Any, sentence: str) -> None:
    with pytest.warns(UserWarning, match=sentence) as caught:
        dynquant.quantize_dynamic(make(), attention="int8")
    with pytest.warns(UserWarning, match="stays float in nn.MultiheadAttention, whose function"):
        dynquant.quantize_dynamic(nn.TransformerDecoderLayer(16, 2), {nn.Linear}, attention="int8")
    assert len([w for w in caught if "attention" in str(w.message)]) == 1


def test_layers_that_a_pattern_makes_int8_need_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dynquant.quantize_dynamic(
            transformers.MPNetModel(transformers.MPNetConfig(**SIZES), add_pooling_layer=False),
            fuse=True,
            attention="int8",
        )
    assert _attention_modules(model, input_ids=IDS) == ["encoder.layer.0", "encoder.layer.1"]


def test_a_torch_decoder_layer_has_int8_attention_where_it_is_asked_for() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 2, 48, batch_first=True).eval()
    x, memory = torch.randn(2, 20, 32), torch.randn(2, 30, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(20)
    inputs = {"tgt": x, "memory": memory, "tgt_mask": mask, "tgt_is_causal": True}
    assert _attention_modules(dynquant.quantize_dynamic(layer), **inputs) == []
    int8, report = dynquant.quantize_dynamic(layer, attention="int8", sample=inputs, report=True)
    assert [entry.name for entry in report.attention] == ["self_attn", "multihead_attn"]
    assert _attention_modules(copy.deepcopy(int8), **inputs) == ["self_attn", "multihead_attn"]
    with torch.no_grad():
        y, expected = int8(**inputs), layer(**inputs)
    assert (y - expected).norm() / expected.norm() < 0.02
