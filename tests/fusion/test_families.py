"""Model families whose activations and inputs fuse keeps together, by the counts of their fused layers."""

from __future__ import annotations

import pytest
import torch
import transformers

import dynquant
from dynquant.nn.merged import MergedLinear
from tests.support.nets import in_parts
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:dynquant:UserWarning")

T5 = {"d_model": 64, "d_kv": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": 50}
BART = {
    "d_model": 64,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    **{
        f"{half}_{name}": size
        for half in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))
    },
}
IMAGE = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
AUDIO = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (32,),
    "conv_stride": (4,),
    "conv_kernel": (8,),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TOKENS = torch.arange(24).reshape(2, 12) % 40 + 2
BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
SOUND = {"input_values": torch.linspace(-1, 1, 400).sin().reshape(2, 200)}
FEATURES = {
    "input_features": torch.linspace(-1, 1, 80 * 40).reshape(1, 80, 40),
    "decoder_input_ids": TOKENS[:1],
}

# Config, inputs, layers with an epilogue, merged layers.
FAMILIES = {
    "t5": (transformers.T5Config(**T5), BOTH, 2, 9),
    "t5, gated": (transformers.T5Config(**T5, feed_forward_proj="gated-gelu"), BOTH, 2, 9),
    "mt5": (transformers.MT5Config(**T5), BOTH, 2, 9),
    "bart": (transformers.BartConfig(**BART), BOTH, 2, 9),
    "mbart": (transformers.MBartConfig(**BART), BOTH, 2, 9),
    "m2m_100": (transformers.M2M100Config(**BART), BOTH, 2, 9),
    "pegasus": (transformers.PegasusConfig(**BART), BOTH, 2, 9),
    "whisper": (
        transformers.WhisperConfig(
            **BART
            | {
                "num_mel_bins": 80,
                "max_source_positions": 20,
                "max_target_positions": 20,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
        ),
        FEATURES,
        2,
        0,
    ),
    "clip_vision_model": (transformers.CLIPVisionConfig(**IMAGE), IMAGES, 1, 3),
    "blip_vision_model": (transformers.BlipVisionConfig(**IMAGE), IMAGES, 1, 0),
    "hubert": (transformers.HubertConfig(**AUDIO), SOUND, 1, 3),
    "wavlm": (transformers.WavLMConfig(**AUDIO), SOUND, 1, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_and_inputs_are_fused(name: str) -> None:
    config, arguments, epilogues, merged = FAMILIES[name]
    torch.manual_seed(0)
    kind = {
        "clip_vision_model": transformers.CLIPVisionModel,
        "blip_vision_model": transformers.BlipVisionModel,
    }.get(name)
    model = (kind(config) if kind else transformers.AutoModel.from_config(config)).eval()
    fused, plain = dynquant.quantize_dynamic(model, fuse=True), dynquant.quantize_dynamic(model)
    encoder_layers = sum(isinstance(layer, dynquant.EncoderLayer) for layer in fused.modules())
    assert encoder_layers == (name in ("clip_vision_model", "hubert", "t5", "t5, gated", "mt5"))
    layers = [layer for layer in fused.modules() if isinstance(layer, dynquant.QLinear)]
    assert sum(layer.config.epilogue != "none" for layer in layers) == epilogues
    assert sum(isinstance(layer, MergedLinear) for layer in layers) == merged
    assert list(fused.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        expected, whole = plain(**arguments)[0], fused(**arguments)[0]
        actual = in_parts(fused)(**arguments)[0]
    if "relu" in {layer.config.epilogue for layer in layers}:
        assert_same_bits(actual, expected)
    for out in (actual, whole):
        assert torch.nn.functional.cosine_similarity(out.flatten(), expected.flatten(), 0) > 0.999
