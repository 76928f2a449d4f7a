"""Families of transformers' models that one call converts: outputs, generation, files. It takes minutes.

test_families.py has those that are tested each time, and what stays float in them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import dynquant
from dynquant import QModule, quantize_dynamic
from tests.support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        int(transformers.__version__.partition(".")[0]) < 5, reason="the quantizer is for transformers 5"
    ),
    pytest.mark.filterwarnings("ignore"),
]

Inputs = dict[str, Tensor]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


IDS = torch.tensor([[5, 9, 3, 17, 40, 2, 8, 12], [11, 7, 33, 21, 6, 6, 30, 4]])
TEXT: Inputs = {"input_ids": IDS}
BOTH: Inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
BOXES: Inputs = {"input_ids": IDS, "bbox": torch.zeros(2, 8, 4).long()}
PIXELS: Inputs = {"pixel_values": _random(2, 3, 64, 64)}
TEXT_AND_PIXELS: Inputs = TEXT | PIXELS
POINTS: Inputs = PIXELS | {"input_points": torch.tensor([[[[3.0, 4.0]]], [[[5.0, 6.0]]]])}
WAVE: Inputs = {"input_values": _random(2, 4000)}
MONO: Inputs = {"input_values": _random(2, 1, 400)}
WAVE_TO_TEXT: Inputs = WAVE | {"decoder_input_ids": IDS}
SPECTRUM: Inputs = {"input_features": _random(2, 16, 64), "decoder_input_ids": IDS}

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 2,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "n_positions": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_decoder_layers": 2,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "decoder_start_token_id": 2,
    "embedding_size": 32,
    "n_inner": 64,
    "n_layers": 2,
    "n_heads": 2,
    "rotary_dim": 8,
    "image_size": 64,
    "patch_size": 16,
    "attention_window": 8,
    "block_size": 4,
    "d_head": 16,
    "d_inner": 64,
    "num_encoder_layers": 2,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "max_source_positions": 64,
    "projection_dim": 32,
    "ffn_size": 64,
    "expand": 2,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "kv_lora_rank": 16,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "q_lora_rank": None,
    "ngram": 2,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "n_shared_experts": 1,
}
"""Sizes by the words of many configs; each takes those that it has."""
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Family(NamedTuple):
    """A model: the name of its class, inputs of a call, arguments of its config beside those of ``base``."""

    model: str
    inputs: Inputs
    config: dict[str, Any] = {}  # noqa: RUF012
    base: dict[str, Any] = SMALL
    generates: bool = False
    config_class: str = ""


FAMILIES = {
    "deberta-v2": Family(
        "DebertaV2ForMaskedLM", TEXT, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "deberta": Family("DebertaForMaskedLM", TEXT),
    "roformer": Family("RoFormerForMaskedLM", TEXT),
    "xlnet": Family(
        "XLNetLMHeadModel",
        TEXT,
        {"n_layer": 2, "n_head": 2, "d_model": 32, "d_inner": 64, "vocab_size": 64},
        base={},
    ),
    "longformer": Family("LongformerForMaskedLM", TEXT, {"attention_window": [4, 4]}),
    "bigbird": Family("BigBirdForMaskedLM", TEXT, {"attention_type": "original_full"}),
    "funnel": Family(
        "FunnelForMaskedLM",
        TEXT,
        {"block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "vocab_size": 64},
        base={},
    ),
    "reformer": Family(
        "ReformerModelWithLMHead",
        TEXT,
        {
            "axial_pos_embds": False,
            "is_decoder": True,
            "attn_layers": ["local", "lsh"],
            "attention_head_size": 16,
            "feed_forward_size": 64,
            "lsh_attn_chunk_length": 4,
            "local_attn_chunk_length": 4,
            "num_hashes": 1,
            "num_buckets": 2,
        },
    ),
    "opt": Family("OPTForCausalLM", TEXT, generates=True),
    "bloom": Family("BloomForCausalLM", TEXT, generates=True),
    "gpt-neox": Family("GPTNeoXForCausalLM", TEXT, generates=True),
    "gptj": Family("GPTJForCausalLM", TEXT, generates=True),
    "gpt-neo": Family(
        "GPTNeoForCausalLM",
        TEXT,
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
        generates=True,
    ),
    "codegen": Family("CodeGenForCausalLM", TEXT, {"n_head": 4}, generates=True),
    "phi": Family("PhiForCausalLM", TEXT, {"num_key_value_heads": 2}, generates=True),
    "phi3": Family("Phi3ForCausalLM", TEXT, generates=True),
    "mistral": Family("MistralForCausalLM", TEXT, generates=True),
    "qwen3": Family("Qwen3ForCausalLM", TEXT, generates=True),
    "gemma2": Family("Gemma2ForCausalLM", TEXT, generates=True),
    "gemma3": Family("Gemma3ForCausalLM", TEXT, generates=True, config_class="Gemma3TextConfig"),
    "olmo": Family("OlmoForCausalLM", TEXT, generates=True),
    "olmo2": Family("Olmo2ForCausalLM", TEXT, generates=True),
    "cohere": Family("CohereForCausalLM", TEXT, generates=True),
    "stablelm": Family("StableLmForCausalLM", TEXT, generates=True),
    "granite": Family("GraniteForCausalLM", TEXT, generates=True),
    "glm": Family("GlmForCausalLM", TEXT, generates=True),
    "nemotron": Family("NemotronForCausalLM", TEXT, generates=True),
    "mpt": Family("MptForCausalLM", TEXT, {"max_seq_len": 64, "expansion_ratio": 2}, generates=True),
    "persimmon": Family("PersimmonForCausalLM", TEXT, generates=True),
    "starcoder2": Family("Starcoder2ForCausalLM", TEXT, generates=True),
    "smollm3": Family("SmolLM3ForCausalLM", TEXT, generates=True),
    "ernie4_5": Family("Ernie4_5ForCausalLM", TEXT, generates=True),
    "mixtral": Family("MixtralForCausalLM", TEXT, generates=True),
    "olmoe": Family("OlmoeForCausalLM", TEXT, generates=True),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        TEXT,
        {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
        generates=True,
    ),
    "mamba": Family("MambaForCausalLM", TEXT, generates=True),
    "jamba": Family(
        "JambaForCausalLM",
        TEXT,
        {
            "use_mamba_kernels": False,
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        generates=True,
    ),
    "bamba": Family(
        "BambaForCausalLM",
        TEXT,
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1],
            "num_key_value_heads": 2,
        },
        generates=True,
    ),
    "pegasus": Family("PegasusForConditionalGeneration", BOTH, generates=True),
    "mbart": Family("MBartForConditionalGeneration", BOTH, generates=True),
    "m2m100": Family("M2M100ForConditionalGeneration", BOTH, generates=True),
    "marian": Family("MarianMTModel", BOTH, generates=True),
    "blenderbot": Family("BlenderbotForConditionalGeneration", BOTH, generates=True),
    "led": Family(
        "LEDForConditionalGeneration",
        BOTH,
        {
            "attention_window": [4, 4],
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        generates=True,
    ),
    "prophetnet": Family(
        "ProphetNetForConditionalGeneration",
        BOTH,
        {
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "vocab_size": 64,
            "hidden_size": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        base={},
    ),
    "bigbird_pegasus": Family(
        "BigBirdPegasusForConditionalGeneration", BOTH, {"attention_type": "original_full"}
    ),
    "longt5": Family("LongT5ForConditionalGeneration", BOTH, {"local_radius": 4, "global_block_size": 4}),
    "umt5": Family("UMT5ForConditionalGeneration", BOTH, generates=True),
    "albert": Family("AlbertForMaskedLM", TEXT),
    "xlm-roberta": Family("XLMRobertaForMaskedLM", TEXT),
    "esm": Family("EsmForMaskedLM", TEXT, {"mask_token_id": 3}),
    "nomic": Family("NomicBertModel", TEXT),
    "camembert": Family("CamembertForMaskedLM", TEXT),
    "convbert": Family("ConvBertForMaskedLM", TEXT),
    "mobilebert": Family(
        "MobileBertForMaskedLM", TEXT, {"intra_bottleneck_size": 32, "true_hidden_size": 32}
    ),
    "squeezebert": Family(
        "SqueezeBertForMaskedLM",
        TEXT,
        {
            "q_groups": 1,
            "k_groups": 1,
            "v_groups": 1,
            "post_attention_groups": 1,
            "intermediate_groups": 1,
            "output_groups": 1,
        },
    ),
    "ibert": Family("IBertForMaskedLM", TEXT),
    "fnet": Family("FNetForMaskedLM", TEXT),
    "nystromformer": Family(
        "NystromformerForMaskedLM", TEXT, {"segment_means_seq_len": 8, "num_landmarks": 8}
    ),
    "megatron-bert": Family("MegatronBertForMaskedLM", TEXT),
    "layoutlm": Family("LayoutLMForMaskedLM", BOXES),
    "xlm": Family("XLMWithLMHeadModel", TEXT, {"emb_dim": 32}),
    "flaubert": Family("FlaubertWithLMHeadModel", TEXT, {"emb_dim": 32}),
    "canine": Family("CanineModel", TEXT, {"num_hash_buckets": 64, "downsampling_rate": 2}),
    "swin": Family(
        "SwinModel",
        PIXELS,
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "patch_size": 4,
            "image_size": 64,
        },
        base={},
    ),
    "swinv2": Family(
        "Swinv2Model",
        PIXELS,
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "patch_size": 4,
            "image_size": 64,
        },
        base={},
    ),
    "beit": Family("BeitForImageClassification", PIXELS, base=VISION),
    "dinov2": Family("Dinov2Model", PIXELS, base=VISION),
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        PIXELS,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        base={},
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        PIXELS,
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        base={},
    ),
    "vit_mae": Family("ViTMAEModel", PIXELS, base=VISION),
    "yolos": Family("YolosModel", PIXELS, {"image_size": [64, 64], "num_detection_tokens": 4}, base=VISION),
    "siglip": Family(
        "SiglipModel",
        TEXT_AND_PIXELS,
        {
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 64,
                "max_position_embeddings": 16,
                "projection_size": 32,
            },
            "vision_config": VISION,
        },
        base={},
    ),
    "clip": Family(
        "CLIPModel",
        TEXT_AND_PIXELS,
        {
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 64,
                "max_position_embeddings": 16,
                "eos_token_id": 2,
            },
            "vision_config": VISION,
            "projection_dim": 32,
        },
        base={},
    ),
    "blip": Family(
        "BlipForConditionalGeneration",
        TEXT_AND_PIXELS,
        {
            "text_config": {
                "hidden_size": 32,
                "encoder_hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 64,
                "max_position_embeddings": 16,
                "projection_dim": 32,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "sep_token_id": 2,
                "pad_token_id": 0,
            },
            "vision_config": VISION,
            "image_text_hidden_size": 32,
        },
        base={},
    ),
    "sam": Family(
        "SamModel",
        POINTS,
        {
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 64,
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {
                "hidden_size": 16,
                "image_size": 64,
                "patch_size": 16,
                "image_embedding_size": 4,
            },
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
                "iou_head_depth": 2,
            },
        },
        base={},
    ),
    "detr": Family(
        "DetrForObjectDetection",
        PIXELS,
        {
            "use_timm_backbone": False,
            "backbone": None,
            "use_pretrained_backbone": False,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_queries": 5,
        },
        base={},
    ),
    "hubert": Family("HubertModel", WAVE, base=AUDIO),
    "wavlm": Family("WavLMModel", WAVE, base=AUDIO),
    "unispeech": Family("UniSpeechModel", WAVE, base=AUDIO),
    "sew": Family("SEWModel", WAVE, {"squeeze_factor": 2}, base=AUDIO),
    "wav2vec2": Family("Wav2Vec2ForCTC", WAVE, base=AUDIO),
    "data2vec-audio": Family("Data2VecAudioModel", WAVE, base=AUDIO),
    "unispeech-sat": Family("UniSpeechSatModel", WAVE, base=AUDIO),
    "wav2vec2-conformer": Family("Wav2Vec2ConformerModel", WAVE, base=AUDIO),
    "sew-d": Family("SEWDModel", WAVE, {"squeeze_factor": 2}, base=AUDIO),
    "speecht5": Family(
        "SpeechT5ForSpeechToText",
        WAVE_TO_TEXT,
        {
            "hidden_size": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 64,
            "vocab_size": 64,
            "conv_dim": (32, 32),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 8),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "speech_decoder_postnet_layers": 1,
        },
        base={},
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        SPECTRUM,
        {
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "vits": Family(
        "VitsModel",
        TEXT,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "flow_size": 32,
            "spectrogram_bins": 9,
            "prior_encoder_num_flows": 2,
            "prior_encoder_num_wavenet_layers": 2,
            "posterior_encoder_num_wavenet_layers": 2,
            "upsample_initial_channel": 32,
            "upsample_rates": [4, 2],
            "upsample_kernel_sizes": [8, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "duration_predictor_filter_channels": 32,
            "vocab_size": 64,
            "noise_scale": 0.0,
            "noise_scale_duration": 0.0,
        },
        base={},
    ),
    "encodec": Family(
        "EncodecModel",
        MONO,
        {
            "hidden_size": 32,
            "num_filters": 8,
            "num_lstm_layers": 2,
            "codebook_size": 16,
            "codebook_dim": 32,
            "upsampling_ratios": [4, 2],
        },
        base={},
    ),
}


def made(name: str) -> Any:
    family = FAMILIES[name]
    model_class = getattr(transformers, family.model)
    config_class = (
        getattr(transformers, family.config_class) if family.config_class else model_class.config_class
    )
    default = config_class()
    words = {word: value for word, value in family.base.items() if hasattr(default, word)} | family.config
    torch.manual_seed(0)
    return model_class(config_class(**copy.deepcopy(words))).eval()


def run(name: str, model: Any) -> list[Tensor]:
    family = FAMILIES[name]
    with torch.no_grad():
        torch.manual_seed(3)
        found = [value for value in model(**family.inputs).values() if isinstance(value, Tensor)]
        if family.generates:
            found.append(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))
    return found


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_call_converts_it(name: str, fuse: bool, tmp_path: Path) -> None:
    model = made(name)
    expected = run(name, model)
    int8 = quantize_dynamic(model, fuse=fuse, inplace=True)
    assert any(isinstance(module, QModule) for module in int8.modules())
    outputs = run(name, int8)
    for x, y in zip(outputs, expected, strict=True):
        if x.is_floating_point() and x.numel() > 1:
            assert torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0) > 0.98
    int8.save_pretrained(tmp_path / "pretrained")
    dynquant.save(int8, tmp_path / "file")
    for loaded in (
        type(int8).from_pretrained(tmp_path / "pretrained"),
        dynquant.load(made(name), tmp_path / "file"),
    ):
        for x, y in zip(run(name, loaded), outputs, strict=True):
            assert_same_bits(x, y, name)
