"""transformers models: converted, saved and loaded by transformers' own functions, or quantized on load."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch
import transformers
from torch import Tensor, nn

import dynquant
from dynquant import QLinear, quantize_dynamic
from dynquant.nn.merged import MergedLinear
from tests.support.nets import converted
from tests.support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.skipif(
        int(transformers.__version__.partition(".")[0]) < 5, reason="the quantizer is for transformers 5"
    ),
    pytest.mark.filterwarnings("ignore:dynquant:UserWarning"),
]

IDS = torch.tensor([[5, 9, 3, 17, 40, 2, 8], [11, 7, 33, 21, 6, 6, 30]])
SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
BERT = transformers.BertConfig(hidden_size=64, intermediate_size=96, **SMALL)
LLAMA = transformers.LlamaConfig(
    hidden_size=128, intermediate_size=192, num_key_value_heads=1, tie_word_embeddings=True, **SMALL
)
GPT2 = transformers.GPT2Config(
    n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=50, bos_token_id=0, eos_token_id=0
)
T5 = transformers.T5Config(
    d_model=32, d_kv=16, num_layers=1, num_heads=2, d_ff=64, vocab_size=50, decoder_start_token_id=0
)

MODELS: dict[str, tuple[type, Any]] = {
    "bert": (transformers.BertModel, BERT),
    "tied bert": (transformers.BertForMaskedLM, BERT),
    "tied llama": (transformers.LlamaForCausalLM, LLAMA),
    "gpt2": (transformers.GPT2LMHeadModel, GPT2),
    "t5": (transformers.T5ForConditionalGeneration, T5),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "default": {},
    "per_tensor": {"activations": "per_tensor", "weights": "per_tensor"},
    "rotated": {"rotation": "hadamard"},
    "fused": {"fuse": True},
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    return kind(copy.deepcopy(config)).eval().to(dtype)


def run(model: Any) -> Tensor:
    words = {"decoder_input_ids": IDS} if "T5" in type(model).__name__ else {}
    with torch.no_grad():
        return model(IDS, **words)[0]


def frozen(model: Any) -> Any:
    with dynquant.calibrate(model):
        run(model)
    return dynquant.freeze(model)


def load(kind: Any, path: Path, **arguments: Any) -> Any:
    """The model; nothing in the file is missing, left over or of another shape."""
    model, info = kind.from_pretrained(path, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    return model


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    **{
        scheme: lambda model, words=words: quantize_dynamic(model, **words)
        for scheme, words in SCHEMES.items()
    },
    "static": lambda model: frozen(quantize_dynamic(model)),
    "static, fused": lambda model: frozen(quantize_dynamic(model, fuse=True)),
    "in place": lambda model: quantize_dynamic(model, inplace=True),
    "fused later": lambda model: dynquant.fuse(quantize_dynamic(model)),
}


@every_model
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_converted_model_is_saved_and_loaded(name: str, conversion: str, tmp_path: Path) -> None:
    model = CONVERSIONS[conversion](made(name))
    expected = run(model)
    model.save_pretrained(tmp_path / "first")
    loaded = load(type(model), tmp_path / "first")
    assert_same_bits(run(loaded), expected)
    assert [str(module) for module in loaded.modules()] == [str(module) for module in model.modules()]
    assert converted(loaded) == converted(model) == list(model.config.quantization_config.modules)
    assert loaded.get_memory_footprint() == model.get_memory_footprint()

    loaded.save_pretrained(tmp_path / "second")
    assert_same_bits(run(load(type(model), tmp_path / "second")), expected)
    first, second = (
        json.loads((tmp_path / part / "config.json").read_text()) for part in ("first", "second")
    )
    assert first == second
    config = transformers.AutoConfig.from_pretrained(tmp_path / "first")
    assert config.quantization_config == model.config.quantization_config.to_dict()


@every_model
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_model_is_quantized_on_load(name: str, scheme: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path)
    expected = quantize_dynamic(model, **SCHEMES[scheme])
    config = dynquant.DynquantConfig(**SCHEMES[scheme])
    loaded = load(type(model), tmp_path, quantization_config=config)
    assert_same_bits(run(loaded), run(expected))
    assert loaded.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    loaded.save_pretrained(tmp_path / "int8")
    assert_same_bits(run(load(type(model), tmp_path / "int8")), run(expected))


def test_layers_that_are_to_stay_float(tmp_path: Path) -> None:
    model = made("tied llama")
    model.save_pretrained(tmp_path)
    config = dynquant.DynquantConfig(modules_to_not_convert=["lm_head", "model.layers.0", "up_proj"])
    loaded = load(type(model), tmp_path, quantization_config=config)
    names = converted(loaded)
    assert "model.layers.1.mlp.gate_proj" in names
    assert not [name for name in names if "up_proj" in name or "lm_head" in name or "layers.0" in name]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "int8")
    again = load(type(model), tmp_path / "int8")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same_bits(run(again), run(loaded))

    config = dynquant.DynquantConfig(modules_to_not_convert=["m_head"])
    with pytest.raises(
        ValueError, match="modules_to_not_convert names 'm_head', which the model does not have"
    ):
        type(model).from_pretrained(tmp_path, quantization_config=config)


def test_a_config_json_may_ask_for_quantization_itself(tmp_path: Path) -> None:
    model = made("bert")
    model.config.quantization_config = {"quant_method": "dynquant", "rotation": "hadamard"}
    model.save_pretrained(tmp_path)
    loaded = load(transformers.AutoModel, tmp_path)
    assert_same_bits(run(loaded), run(quantize_dynamic(model, rotation="hadamard")))


def test_the_config_of_the_float_model_stays_as_it_is() -> None:
    model = made("tied bert")
    quantize_dynamic(model)
    assert not hasattr(model.config, "quantization_config")
    quantize_dynamic(model, inplace=True)
    assert model.bert.config is model.config
    assert model.config.quantization_config.modules["bert.encoder.layer.0.output.dense"] == {}


def test_a_model_within_another_module(tmp_path: Path) -> None:
    """As sentence-transformers wraps it."""
    wrapped = nn.Sequential(nn.ModuleDict({"model": made("bert")}), nn.Linear(64, 8))
    result = quantize_dynamic(wrapped, fuse=True)
    inner = result[0]["model"]
    inner.save_pretrained(tmp_path)
    loaded = load(transformers.AutoModel, tmp_path)
    assert_same_bits(run(loaded), run(inner))
    assert sum(type(module) is MergedLinear for module in loaded.modules()) == 6
    assert isinstance(loaded.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        # The forward takes dt_proj apart unless the config says that the model is quantized.
        ("falcon_mamba", {}),
        # The file holds several projections as one tensor.
        ("lara_mini", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    ],
)
def test_families_with_ways_of_their_own(family: str, words: dict[str, Any], tmp_path: Path) -> None:
    try:
        config = transformers.AutoConfig.for_model(
            family, vocab_size=50, hidden_size=64, num_hidden_layers=2, intermediate_size=64, **words
        )
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    model = quantize_dynamic(transformers.AutoModelForCausalLM.from_config(config).eval(), fuse=True)
    model.save_pretrained(tmp_path / "first")
    loaded = load(type(model), tmp_path / "first")
    assert_same_bits(run(loaded), run(model))
    loaded.save_pretrained(tmp_path / "second")
    assert_same_bits(run(load(type(model), tmp_path / "second")), run(model))


def test_a_model_that_was_converted_part_by_part(tmp_path: Path) -> None:
    model = made("bert")
    model.encoder = quantize_dynamic(model.encoder)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModel.from_pretrained(tmp_path)
    model.config.quantization_config = dynquant.DynquantConfig.of(model)
    model.save_pretrained(tmp_path)
    loaded = load(transformers.AutoModel, tmp_path)
    assert_same_bits(run(loaded), run(model))
    assert type(loaded.pooler.dense) is nn.Linear


def test_the_activation_of_a_torch_layer_within(tmp_path: Path) -> None:
    """It is a function: there is no module of that name before conversion."""

    class Model(transformers.PreTrainedModel):
        config_class = transformers.BertConfig

        def __init__(self, config: transformers.BertConfig) -> None:
            super().__init__(config)
            self.embedding = nn.Embedding(50, 64)
            self.encoder = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True, activation="gelu")
            self.post_init()

        def forward(self, ids: Tensor) -> tuple[Tensor]:
            return (self.encoder(self.embedding(ids)),)

    torch.manual_seed(0)
    model = quantize_dynamic(Model(copy.deepcopy(BERT)).eval(), fuse=True)
    assert model.config.quantization_config.fused == ["encoder.activation"]
    model.save_pretrained(tmp_path)
    loaded = load(Model, tmp_path)
    assert_same_bits(run(loaded), run(model))
    assert loaded.encoder.activation_relu_or_gelu == 0


@pytest.mark.parametrize("fuse", [False, True])
def test_the_body_with_a_head_and_without(fuse: bool, tmp_path: Path) -> None:
    model = quantize_dynamic(made("tied bert"), fuse=fuse)
    model.save_pretrained(tmp_path / "whole")
    body = transformers.BertModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    assert_same_bits(run(body), run(model.bert))
    body.save_pretrained(tmp_path / "body")
    torch.manual_seed(3)
    classifier = transformers.BertForTokenClassification.from_pretrained(tmp_path / "body")
    assert_same_bits(run(classifier.bert), run(model.bert))
    assert type(classifier.classifier) is nn.Linear
    classifier.save_pretrained(tmp_path / "classifier")
    again = load(transformers.BertForTokenClassification, tmp_path / "classifier")
    assert_same_bits(run(again), run(classifier))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantize_dynamic(made("t5", torch.bfloat16), rotation="hadamard")
    model.save_pretrained(tmp_path)
    assert_same_bits(run(load(type(model), tmp_path)), run(model))
    loaded = load(type(model), tmp_path, dtype=dtype)
    expected = model.to(dtype)
    for name, layer in loaded.named_modules():
        if isinstance(layer, QLinear):
            kept = dtype == torch.float16 and name.endswith("wo")  # T5 keeps these in fp32
            assert layer.weight.dtype == (torch.float32 if kept else dtype), name
            assert layer.weight_scale.dtype == torch.float32
            assert_same_bits(layer.weight.int_repr(), expected.get_submodule(name).weight.int_repr())
    if dtype != torch.float16:
        assert_same_bits(run(loaded), run(expected))


@pytest.mark.parametrize("name", ["tied llama", "gpt2", "t5"])
def test_generation(name: str, tmp_path: Path) -> None:
    model = quantize_dynamic(made(name), fuse=True)
    model.save_pretrained(tmp_path)
    loaded = load(type(model), tmp_path)
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = loaded.generate(IDS, **words)
    assert torch.equal(generated, model.generate(IDS, **words))
    assert generated.shape[1] > 1


def test_the_memory_footprint_is_that_of_int8_weights(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=256, intermediate_size=512, **SMALL)
    model = transformers.BertModel(config).eval()
    int8 = quantize_dynamic(model)
    saved = sum(layer.weight.numel() * 3 for layer in int8.modules() if isinstance(layer, QLinear))
    assert int8.get_memory_footprint() == pytest.approx(model.get_memory_footprint() - saved, rel=0.03)
    int8.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert int8.get_memory_footprint() == pytest.approx(file, rel=0.03)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_loaded_model(duplicate: Callable[[Any], Any], tmp_path: Path) -> None:
    quantize_dynamic(made("bert"), fuse=True).save_pretrained(tmp_path)
    loaded = load(transformers.BertModel, tmp_path)
    other = duplicate(loaded)
    other.save_pretrained(tmp_path / "other")
    assert_same_bits(run(load(transformers.BertModel, tmp_path / "other")), run(loaded))


def test_a_loaded_model_is_trained_through(tmp_path: Path) -> None:
    quantize_dynamic(made("bert")).save_pretrained(tmp_path)
    loaded = load(transformers.BertModel, tmp_path)
    loaded(IDS)[0].sum().backward()
    assert loaded.encoder.layer[0].attention.self.query.bias.grad is not None
    assert loaded.embeddings.word_embeddings.weight.grad.abs().sum() > 0


# ---- where there is no dynquant


@pytest.mark.parametrize(
    ("name", "conversion"),
    [
        *((name, "default") for name in MODELS),
        *(("bert", conversion) for conversion in list(CONVERSIONS)[1:]),
    ],
)
def test_a_float_model_does_not_take_the_weights(name: str, conversion: str, tmp_path: Path) -> None:
    """Without a quantization_config, and with one that is not known."""
    model = CONVERSIONS[conversion](made(name))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for config in (None, {**content["quantization_config"], "quant_method": "no such method"}):
        (tmp_path / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
        with pytest.raises(RuntimeError, match="size mismatch|mismatched sizes|ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path)
    fresh = made(name)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(model.state_dict(), strict=False)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder = str(Path(dynquant.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": folder}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_a_process_that_never_imports_dynquant_stops(tmp_path: Path) -> None:
    quantize_dynamic(made("bert")).save_pretrained(tmp_path)
    code = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1]); print('loaded')"
    done = python(code, str(tmp_path))
    assert done.returncode == 1
    assert "Unknown quantization type, got dynquant" in done.stderr
    assert "torch.Size([64, 64, 1])" in done.stderr
    assert "loaded" not in done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import dynquant; assert 'transformers' not in sys.modules; import transformers",
        "import transformers; transformers.BertModel; import dynquant; assert not hooks()",
        "from dynquant import *; from dynquant import DynquantConfig",
    ],
)
def test_the_quantizer_is_there_in_any_order_of_imports(imports: str) -> None:
    code = f"""
import sys
def hooks(): return [f for f in sys.meta_path if getattr(f, "name", "") == "transformers.quantizers.auto"]
{imports}
import dynquant
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dynquant"] is dynquant.DynquantConfig
assert auto.AUTO_QUANTIZER_MAPPING["dynquant"].__module__.startswith("dynquant.")
assert not hooks()
assert "DynquantConfig" in dir(dynquant)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_dynquant_config_without_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import dynquant; dynquant.DynquantConfig"
    done = python(code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "dynquant.DynquantConfig needs the package transformers, which is not installed; "
        "`pip install '.[demo]'` in the repository installs it"
    )


# ---- what does not fit


def altered(path: Path, **changes: Any) -> None:
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 3}, "saved in format 3 by a newer dynquant; this one reads up to 2"),
        (
            {"smooth": 1, "bits": 4},
            "does not know bits, smooth in a quantization_config; a newer dynquant may",
        ),
        (
            {"modules": {"embeddings.LayerNorm": {}}},
            "'embeddings.LayerNorm' is quantized, but .* a LayerNorm",
        ),
        ({"modules": {"pooler.dense": {"epilogue": "softmax"}}}, "expected epilogue to be one of"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    quantize_dynamic(made("bert")).save_pretrained(tmp_path)
    altered(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_weights_that_the_file_does_not_hold_are_named(tmp_path: Path) -> None:
    quantize_dynamic(made("bert")).save_pretrained(tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    del weights["pooler.dense.weight_scale"], weights["pooler.dense.bias"]
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'pooler.dense' is quantized, but .* no weight_scale, bias of it"):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"activations": "per_row"}, "expected activations to be one of"),
        ({"weights": "int4"}, "expected weights to be one of"),
        ({"rotation": 3}, "expected rotation to be None, 'hadamard' or one of"),
    ],
)
def test_words_that_do_not_exist(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dynquant.DynquantConfig(**words)


@pytest.mark.parametrize("places", [{"embeddings": 0, "encoder": "cpu"}, {"": "disk"}])
def test_one_device_alone(places: dict[str, Any]) -> None:
    from dynquant.checkpoint.hugging_face_quantizer import DynquantHfQuantizer

    quantizer = DynquantHfQuantizer(dynquant.DynquantConfig())
    quantizer.validate_environment(device_map={"": 0})
    quantizer.validate_environment(device_map="auto")
    with pytest.raises(ValueError, match="expected device_map to put the model on one device, got it on .*"):
        quantizer.validate_environment(device_map=places)
