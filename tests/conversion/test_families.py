"""Model families of transformers: one call converts each; what stays float and why stands in the table.

Random weights, the sizes of toys: outputs, generation, pipelines, save_pretrained and from_pretrained.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import dynquant
from dynquant import quantize_dynamic
from dynquant.conversion.plan import NO_INT8_VERSION
from dynquant.conversion.select import EXPERTS, select
from dynquant.conversion.sources import default_mapping
from dynquant.conversion.spec import read_spec
from dynquant.nn.module import QModule
from tests.support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.skipif(
        int(transformers.__version__.partition(".")[0]) < 5, reason="the quantizer is for transformers 5"
    ),
    pytest.mark.filterwarnings("ignore:quantize_dynamic:UserWarning"),
    pytest.mark.filterwarnings("ignore:fuse:UserWarning"),
]

IDS = torch.tensor([[5, 9, 3, 17, 40, 2, 8], [11, 7, 33, 21, 6, 6, 30]])
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ENCODER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 16}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


class Family(NamedTuple):
    """A model and what becomes of it.

    Attributes:
        model: the class's name in transformers.
        config: arguments of its config class, whose name is the model's up to "For" and "Config".
        converted: the number of its layers that become int8.
        left: by type, why modules with a weight matrix stay float; embeddings are not among them.
        inputs: of a call.
        generates: whether it has ``generate``.
    """

    model: str
    config: dict[str, Any]
    converted: int
    left: dict[str, str] = {}  # noqa: RUF012
    inputs: dict[str, Tensor] = {"input_ids": IDS}  # noqa: RUF012
    generates: bool = False
    config_class: str = ""


FAMILIES = {
    "bert": Family("BertForMaskedLM", ENCODER, 14),
    "roberta": Family("RobertaForMaskedLM", ENCODER, 14),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        {"vocab_size": 50, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
        14,
    ),
    "mpnet": Family("MPNetForMaskedLM", ENCODER, 14),
    "modernbert": Family("ModernBertForMaskedLM", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}, 10),
    "t5": Family(
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 2,
            "d_ff": 64,
            "vocab_size": 50,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
        },
        33,
        inputs={"input_ids": IDS, "decoder_input_ids": IDS},
        generates=True,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        {
            "vocab_size": 50,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        17,
        generates=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0},
        9,
        generates=True,
        config_class="GPT2Config",
    ),
    "llama": Family("LlamaForCausalLM", DECODER, 15, generates=True),
    "qwen2": Family("Qwen2ForCausalLM", DECODER, 15, generates=True),
    "gemma": Family("GemmaForCausalLM", DECODER, 15, generates=True),
    "falcon": Family(
        "FalconForCausalLM",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        9,
        generates=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        9,
        {"MixtralExperts": EXPERTS, "MixtralTopKRouter": NO_INT8_VERSION},
        generates=True,
    ),
    "mamba": Family(
        "MambaForCausalLM",
        {"vocab_size": 50, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "eos_token_id": 2},
        9,
        {"MambaMixer": NO_INT8_VERSION, "Conv1d": NO_INT8_VERSION},
        generates=True,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 60,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        17,
        {"Conv1d": NO_INT8_VERSION},
        {
            "input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2)),
            "decoder_input_ids": IDS,
        },
        generates=True,
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForCTC",
        {
            "vocab_size": 20,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
        14,
        {"Conv1d": NO_INT8_VERSION, "ParametrizationList": NO_INT8_VERSION},
        {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(3))},
    ),
    "vit": Family(
        "ViTForImageClassification", VISION, 13, {"Conv2d": NO_INT8_VERSION}, {"pixel_values": PIXELS}
    ),
    "swinv2": Family(  # a buffer that no file holds has the dtype of a layer's first parameter
        "Swinv2ForImageClassification",
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "patch_size": 4,
            "image_size": 32,
        },
        18,
        {"Conv2d": NO_INT8_VERSION, "Swinv2SelfAttention": NO_INT8_VERSION},
        {"pixel_values": PIXELS},
    ),
    "clip": Family(
        "CLIPModel",
        {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 16},
        26,
        {"Conv2d": NO_INT8_VERSION},
        {"input_ids": IDS, "pixel_values": PIXELS},
        config_class="CLIPConfig",
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def made(name: str) -> Any:
    family = FAMILIES[name]
    config_class = family.config_class or f"{family.model.partition('For')[0]}Config"
    config = getattr(transformers, config_class)(**copy.deepcopy(family.config))
    torch.manual_seed(0)
    return getattr(transformers, family.model)(config).eval()


def run(name: str, model: Any) -> list[Tensor]:
    family = FAMILIES[name]
    with torch.no_grad():
        outputs = model(**family.inputs)
        found = [value for value in outputs.values() if isinstance(value, Tensor)]
        if family.generates:
            first = {key: value for key, value in family.inputs.items() if not key.startswith("decoder")}
            ids = model.generate(**first, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert ids.shape[1] > 1
            found.append(ids)
    return found


def assert_equal(name: str, a: Any, b: Any) -> None:
    for x, y in zip(run(name, a), run(name, b), strict=True):
        assert_same_bits(x, y, name)


def left_float(model: nn.Module) -> tuple[int, dict[str, str]]:
    """The number of layers that a conversion would convert, and the reasons for other types."""
    scheme = {"activations": "per_token", "weights": "per_channel", "rotation": None}
    mapping = default_mapping(model)
    plan = select(
        model, read_spec(model, None, torch.qint8, scheme, mapping), scheme, mapping, covers_all=True
    )
    reasons = {type(item.module).__name__: str(item.reason) for item in plan.left_float}
    return len(plan.converted), {kind: why for kind, why in reasons.items() if "Embedding" not in kind}


@every_family
def test_one_call_converts_it(name: str) -> None:
    model = made(name)
    assert left_float(model) == (FAMILIES[name].converted, FAMILIES[name].left)
    int8 = quantize_dynamic(model)
    assert sum(isinstance(module, QModule) for module in int8.modules()) == FAMILIES[name].converted
    for x, y in zip(run(name, int8), run(name, model), strict=True):
        if x.is_floating_point() and x.numel() > 1:
            assert torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0) > 0.97


@every_family
@pytest.mark.parametrize("fuse", [False, True])
def test_it_is_saved_and_loaded_by_its_own_functions(name: str, fuse: bool, tmp_path: Path) -> None:
    model = quantize_dynamic(made(name), fuse=fuse, inplace=True)
    model.save_pretrained(tmp_path / "pretrained")
    loaded, info = type(model).from_pretrained(tmp_path / "pretrained", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal(name, loaded, model)

    dynquant.save(model, tmp_path / "file")
    assert_equal(name, dynquant.load(made(name), tmp_path / "file"), model)


@every_family
def test_copies_compute_the_same(name: str) -> None:
    model = quantize_dynamic(made(name), rotation="hadamard", inplace=True)
    assert_equal(name, copy.deepcopy(model), model)


def tokenizer(mask: bool) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(47))]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"mask_token": "[MASK]"} if mask else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", **special
    )


PIPELINES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "fill-mask": ("bert", "w3 [MASK] w7 w1", lambda found: [item["token_str"] for item in found]),
    "feature-extraction": ("roberta", "w3 w9 w7 w1", lambda found: torch.tensor(found).shape[-1]),
    "text-generation": ("llama", "w3 w9 w7", lambda found: found[0]["generated_text"]),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(task: str) -> None:
    name, text, read = PIPELINES[task]
    words = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    results = []
    for model in (quantize_dynamic(made(name)), quantize_dynamic(made(name))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer(task == "fill-mask"))
            results.append(pipe(text, **words))
        assert read(results[-1])
    assert str(results[0]) == str(results[1])
