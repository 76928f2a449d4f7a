"""transformers models with quantized embeddings, attention and layers of their own: saved, loaded, tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynquant
from dynquant import QLSTM, QEmbedding, QModule, QMultiheadAttention, quantize_dynamic
from tests.support.same_bits import assert_same_bits

transformers = pytest.importorskip("transformers", minversion="5.0")

IDS = torch.arange(24).reshape(2, 12)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def gemma() -> Any:
    config = transformers.Gemma3TextConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True
    )
    return transformers.Gemma3ForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, intermediate_size=48))


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        scale_embedding=True,
    )
    return transformers.BartForConditionalGeneration(config)


def falcon() -> Any:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES))


def siglip() -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    config = transformers.SiglipVisionConfig(**sizes, intermediate_size=48, image_size=32, patch_size=16)
    return transformers.SiglipVisionModel(config)


def output(model: Any) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    words = {"pixel_values": pixels} if "Siglip" in type(model).__name__ else {"input_ids": IDS}
    with torch.no_grad():
        out = model(**words)
    tensor: torch.Tensor = out.pooler_output if "pixel_values" in words else out.logits
    return tensor


@pytest.mark.parametrize("make", [gemma, bert, bart, falcon, siglip])
def test_saved_and_loaded(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    quantized = quantize_dynamic(model, embeddings=True)
    expected = output(model)
    assert (output(quantized) - expected).norm() / expected.norm() < 0.04
    quantized.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_bits(output(loaded), output(quantized))

    def kinds(of: Any) -> dict[str, str]:
        return {name: repr(type(part)) for name, part in of.named_modules() if isinstance(part, QModule)}

    assert kinds(loaded) == kinds(quantized)
    if make is siglip:
        assert any(type(part) is QMultiheadAttention for part in loaded.modules())
        return
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, QEmbedding)
    assert isinstance(quantized.get_input_embeddings(), QEmbedding)
    assert embedding.weight.dtype == torch.float32
    head = loaded.get_output_embeddings()
    assert head.weight is embedding.weight, "a tied weight is in memory once"
    assert quantized.get_output_embeddings().weight is quantized.get_input_embeddings().weight


def test_embeddings_are_quantized_on_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gemma().eval()
    model.save_pretrained(tmp_path)
    config = dynquant.DynquantConfig(embeddings=True)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert isinstance(loaded.get_input_embeddings(), QEmbedding)
    assert_same_bits(output(loaded), output(quantize_dynamic(model, embeddings=True)))


def test_resizing_is_refused_by_transformers() -> None:
    quantized = quantize_dynamic(bert().eval(), embeddings=True)
    with pytest.raises(TypeError, match="Old embeddings are of type .*QEmbedding"):
        quantized.resize_token_embeddings(70)


class TaggerConfig(transformers.PretrainedConfig):
    model_type = "tagger"


class Tagger(transformers.PreTrainedModel):
    """A model of a user, with torch.nn's recurrent layers."""

    config_class = TaggerConfig

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(64, 24)
        self.lstm = nn.LSTM(24, 40, 2, bidirectional=True, batch_first=True)
        self.cell, self.head = nn.GRUCell(80, 16), nn.Linear(16, 3)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.lstm(self.embedding(input_ids))[0][:, 0]))

    def _init_weights(self, module: nn.Module) -> None:
        """They have torch's values."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [{}, {"rotation": "hadamard"}, {"weights": "per_tensor"}], ids=str)
def test_recurrent_layers(scheme: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tagger(TaggerConfig()).eval().to(dtype)
    quantized = quantize_dynamic(model, **scheme)
    quantized.save_pretrained(tmp_path / "int8")
    loaded, info = Tagger.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values()), info
    assert [str(module) for module in loaded.modules()] == [str(module) for module in quantized.modules()]
    assert type(loaded.lstm) is QLSTM
    assert loaded.lstm.weight_hh_l1_reverse.dtype == loaded.lstm.bias_hh_l1_reverse.dtype == dtype
    with torch.no_grad():
        assert_same_bits(loaded(IDS), quantized(IDS))
    model.save_pretrained(tmp_path / "float")
    config = dynquant.DynquantConfig(**scheme)
    on_load = Tagger.from_pretrained(tmp_path / "float", quantization_config=config)
    with torch.no_grad():
        assert_same_bits(on_load(IDS), quantized(IDS))
