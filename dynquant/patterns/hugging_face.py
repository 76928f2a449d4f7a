"""Patterns of Hugging Face's transformers, by name: this module does not import that package.

Its model families repeat a few patterns word for word, each with classes of its own. The names are those of
transformers 4 and 5; a name that the installed version does not have matches nothing.
"""

from __future__ import annotations

import sys
from typing import Any

CONV1D = "transformers.pytorch_utils.Conv1D"
"""GPT-2's linear layer, whose weight is [K, N]."""

LINEAR_FORWARDS = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})
"""Subclasses of nn.Linear whose forward is another spelling of nn.Linear's: x @ weight.T + bias."""


def is_idle_hook(hook: Any) -> bool:
    """Whether a forward hook on a part of a layer has nothing to do in the present call: transformers leaves
    its own there once somebody has asked for attentions or hidden states."""
    if getattr(hook, "__module__", None) != _OUTPUT_CAPTURING:
        return False
    collected = sys.modules[_OUTPUT_CAPTURING]._active_collector.get()
    return not collected or all("hidden_states" in key for key in collected)


_OUTPUT_CAPTURING = "transformers.utils.output_capturing"

_BERT = {
    "bert": "Bert",
    "bert_generation": "BertGeneration",
    "camembert": "Camembert",
    "data2vec": "Data2VecText",
    "electra": "Electra",
    "ernie": "Ernie",
    "layoutlm": "LayoutLM",
    "layoutlmv3": "LayoutLMv3",
    "longformer": "Longformer",
    "nystromformer": "Nystromformer",
    "roberta": "Roberta",
    "roberta_prelayernorm": "RobertaPreLayerNorm",
    "splinter": "Splinter",
    "vit": "ViT",
    "xlm_roberta": "XLMRoberta",
    "xlm_roberta_xl": "XLMRobertaXL",
    "xmod": "Xmod",
    "yolos": "Yolos",
}
_BERT_INTERMEDIATE_ONLY = {
    "convbert": "ConvBert",
    "deberta": "Deberta",
    "deberta_v2": "DebertaV2",
    "mobilebert": "MobileBert",
    "mpnet": "MPNet",
    "rembert": "RemBert",
    "roformer": "RoFormer",
}
_LLAMA = {
    "cohere": "Cohere",
    "cwm": "Cwm",
    "ernie4_5": "Ernie4_5",
    "eurobert": "EuroBert",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "granite": "Granite",
    "gte": "Gte",
    "llama": "Llama",
    "ministral": "Ministral",
    "mistral": "Mistral",
    "nomic_bert": "NomicBert",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
}
_GEMMA = ("gemma", "gemma2", "gemma3")
_PROJECTIONS = {
    "clip": "CLIPAttention",
    "deit": "DeiTAttention",
    "dinov2": "Dinov2Attention",
    "gpt_neo": "GPTNeoSelfAttention",
    "gptj": "GPTJAttention",
    "opt": "OPTAttention",
    "phi": "PhiAttention",
    "siglip": "SiglipAttention",
    "starcoder2": "Starcoder2Attention",
    "vit": "ViTAttention",
}


# fc1 and activation_fn in the layer itself.
_BART_LAYERS = {
    "bart": "Bart",
    "blenderbot": "Blenderbot",
    "blenderbot_small": "BlenderbotSmall",
    "m2m_100": "M2M100",
    "marian": "Marian",
    "mbart": "MBart",
    "pegasus": "Pegasus",
    "plbart": "PLBart",
    "speech_to_text": "Speech2Text",
    "whisper": "Whisper",
}
_T5 = {"longt5": "LongT5", "mt5": "MT5", "pop2piano": "Pop2Piano", "t5": "T5", "udop": "Udop", "umt5": "UMT5"}
_WAV2VEC2 = {
    "hubert": "Hubert",
    "unispeech": "UniSpeech",
    "unispeech_sat": "UniSpeechSat",
    "wav2vec2": "Wav2Vec2",
    "wavlm": "WavLM",
}
_VISION_MLP = {
    "blip": "BlipMLP",
    "blip_2": "Blip2MLP",
    "clip": "CLIPMLP",
    "clipseg": "CLIPSegMLP",
    "deit": "DeiTMLP",
    "dinov2": "Dinov2MLP",
    "owlvit": "OwlViTMLP",
    "siglip": "SiglipMLP",
    "siglip2": "Siglip2MLP",
    "vit": "ViTMLP",
    "vit_mae": "ViTMAEMLP",
    "vit_msn": "ViTMSNMLP",
    "x_clip": "XCLIPMLP",
}


def _modeling(folder: str, name: str) -> str:
    module = f"{folder}_text" if name.startswith("Data2VecText") else folder
    return f"transformers.models.{folder}.modeling_{module}.{name}"


ACTIVATION_AFTER: dict[str, tuple[str, str]] = {
    **{
        _modeling(folder, f"{prefix}Intermediate"): ("dense", "intermediate_act_fn")
        for folder, prefix in (_BERT | _BERT_INTERMEDIATE_ONLY).items()
    },
    # gate_proj and up_proj read the same tensor, but ops with different epilogues cannot be merged.
    # At K = 256, N = 704 (one thread, AVX2) the MLP's first half takes 17.7 us with the epilogue, 21.6 us as
    # one wide op with silu after it, 20.4 us unfused for M = 1; 757, 820 and 796 us for M = 128. At K = 2048,
    # N = 5632 they differ by no more than two runs of one of them: there the product takes all of the time.
    **{_modeling(folder, f"{prefix}MLP"): ("gate_proj", "act_fn") for folder, prefix in _LLAMA.items()},
    **{
        _modeling(folder, f"{prefix}{half}Layer"): ("fc1", "activation_fn")
        for folder, prefix in _BART_LAYERS.items()
        for half in ("Encoder", "Decoder")
    },
    **{_modeling(folder, f"{prefix}DenseActDense"): ("wi", "act") for folder, prefix in _T5.items()},
    **{_modeling(folder, f"{prefix}DenseGatedActDense"): ("wi_0", "act") for folder, prefix in _T5.items()},
    **{
        _modeling(folder, f"{prefix}FeedForward"): ("intermediate_dense", "intermediate_act_fn")
        for folder, prefix in _WAV2VEC2.items()
    },
    **{_modeling(folder, name): ("fc1", "activation_fn") for folder, name in _VISION_MLP.items()},
    "transformers.models.blip.modeling_blip_text.BlipTextIntermediate": ("dense", "intermediate_act_fn"),
    _modeling("albert", "AlbertLayer"): ("ffn", "activation"),
    _modeling("codegen", "CodeGenMLP"): ("fc_in", "act"),
    _modeling("distilbert", "FFN"): ("lin1", "activation"),
    _modeling("falcon", "FalconMLP"): ("dense_h_to_4h", "act"),
    _modeling("gpt2", "GPT2MLP"): ("c_fc", "act"),
    _modeling("gpt_bigcode", "GPTBigCodeMLP"): ("c_fc", "act"),
    _modeling("gpt_neo", "GPTNeoMLP"): ("c_fc", "act"),
    _modeling("gpt_neox", "GPTNeoXMLP"): ("dense_h_to_4h", "act"),
    _modeling("gptj", "GPTJMLP"): ("fc_in", "act"),
    _modeling("opt", "OPTDecoderLayer"): ("fc1", "activation_fn"),
    _modeling("phi", "PhiMLP"): ("fc1", "activation_fn"),
    _modeling("starcoder2", "Starcoder2MLP"): ("c_fc", "act"),
}
"""By type: a layer and the activation of its output."""

RMS_NORMS: dict[str, str] = {
    **{
        _modeling(folder, f"{prefix}RMSNorm"): "variance_epsilon"
        for folder, prefix in (_LLAMA | {"phi3": "Phi3"}).items()
        if folder not in _GEMMA
    },
    **{_modeling(folder, f"{prefix}LayerNorm"): "variance_epsilon" for folder, prefix in _T5.items()},
}
"""By type of a norm that is RMSNorm: the name of its eps."""

OFFSET_RMS_NORMS: dict[str, str] = {_modeling(folder, f"{_LLAMA[folder]}RMSNorm"): "eps" for folder in _GEMMA}
"""By type of an RMSNorm that multiplies by 1 + weight: the name of its eps."""

QKV_GROUPS: dict[str, tuple[str, ...]] = {
    **{
        _modeling(folder, f"{prefix}SelfAttention"): ("query", "key", "value")
        for folder, prefix in _BERT.items()
    },
    _modeling("albert", "AlbertAttention"): ("query", "key", "value"),
    _modeling("distilbert", "DistilBertSelfAttention"): ("q_lin", "k_lin", "v_lin"),
    _modeling("distilbert", "MultiHeadSelfAttention"): ("q_lin", "k_lin", "v_lin"),
    _modeling("mpnet", "MPNetSelfAttention"): ("q", "k", "v"),
    **{_modeling(folder, f"{prefix}Attention"): ("q", "k", "v") for folder, prefix in _T5.items()},
    **{
        _modeling(folder, f"{prefix}Attention"): ("q_proj", "k_proj", "v_proj")
        for folder, prefix in (_BART_LAYERS | _WAV2VEC2).items()
        if prefix not in ("Whisper", "WavLM")  # key without bias; a function of torch that takes the weights
    },
    **{_modeling(folder, name): ("q_proj", "k_proj", "v_proj") for folder, name in _PROJECTIONS.items()},
    **{
        _modeling(folder, f"{prefix}Attention"): ("q_proj", "k_proj", "v_proj")
        for folder, prefix in _LLAMA.items()
    },
}
"""By type: the layers that read the same tensor, in the order of their calls."""
