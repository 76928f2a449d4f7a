"""EncoderLayer: transformer layers as three ops, against the float layers and their own parts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynquant
from dynquant import EncoderLayer, quantize_dynamic
from dynquant.nn import block_call, encoder
from dynquant.patterns import ActivationAfter, SharedInput, TransformerLayer, registry
from dynquant.patterns.registry import patterns_of
from tests.support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.skipif(
        int(transformers.__version__.partition(".")[0]) < 5, reason="the patterns are of transformers 5"
    ),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning"),
]


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.15,
}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 64}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = ("clip", "siglip", "vit", "deit")
HUGGING_FACE: dict[str, tuple[Any, Any]] = {
    "bert": (transformers.BertModel, transformers.BertConfig(**TEXT)),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig(**TEXT)),
    "xlm_roberta": (transformers.XLMRobertaModel, transformers.XLMRobertaConfig(**TEXT)),
    "electra": (transformers.ElectraModel, transformers.ElectraConfig(**TEXT, embedding_size=64)),
    "camembert": (transformers.CamembertModel, transformers.CamembertConfig(**TEXT)),
    "distilbert": (
        transformers.DistilBertModel,
        transformers.DistilBertConfig(
            dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=50, initializer_range=0.15
        ),
    ),
    "mpnet": (transformers.MPNetModel, transformers.MPNetConfig(**TEXT)),
    "albert": (
        transformers.AlbertModel,
        transformers.AlbertConfig(**TEXT, embedding_size=64, num_hidden_groups=2),
    ),
    "clip": (
        transformers.CLIPVisionModel,
        transformers.CLIPVisionConfig(**IMAGE, initializer_factor=2.0),
    ),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**IMAGE)),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**IMAGE)),
    "deit": (transformers.DeiTModel, transformers.DeiTConfig(**IMAGE)),
    "modernbert": (
        transformers.ModernBertModel,
        transformers.ModernBertConfig(
            **TEXT, **TOKENS, cls_token_id=1, sep_token_id=2, local_attention=8, global_attn_every_n_layers=2
        ),
    ),
    "t5": (transformers.T5EncoderModel, transformers.T5Config(**T5)),
    "t5, gated": (transformers.T5EncoderModel, transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "mt5": (transformers.MT5EncoderModel, transformers.MT5Config(**T5)),
}
PRE_NORM = (*IMAGES, "modernbert", "t5", "t5, gated", "mt5")
TORCH = {
    f"{'pre' if norm_first else 'post'}-norm, {'batch' if batch_first else 'tokens'} first": (
        norm_first,
        batch_first,
    )
    for norm_first in (False, True)
    for batch_first in (True, False)
}


NEAR = 0.9995
"""Cosine of the outputs of three ops and of the parts: attention may be int8 in the ops alone."""


def moved(model: Any) -> Any:
    """The model in eval mode, with norms and biases that are not 1 and 0."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def made(name: str) -> Any:
    torch.manual_seed(0)
    if name in TORCH:
        norm_first, batch_first = TORCH[name]
        layer = nn.TransformerEncoderLayer(
            64, 4, 128, activation="gelu", norm_first=norm_first, batch_first=batch_first
        )
        return moved(nn.TransformerEncoder(layer, 2))
    kind, config = HUGGING_FACE[name]
    return moved(kind(copy.deepcopy(config)))


def inputs(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    if name in IMAGES:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name in TORCH:
        shape = (3, 17, 64) if TORCH[name][1] else (17, 3, 64)
        return {"src": torch.randn(shape, generator=generator)}
    return {"input_ids": torch.randint(5, 50, (3, 17), generator=generator)}


LENGTHS = torch.tensor([17, 9, 3])
KEPT = torch.arange(17) < LENGTHS[:, None]


def padded(name: str) -> dict[str, Any]:
    if name in TORCH:
        return {**inputs(name), "src_key_padding_mask": ~KEPT}
    return {**inputs(name), "attention_mask": KEPT.long()}


def run(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**arguments)
    return out if isinstance(out, Tensor) else out[0]


def seen(name: str, out: Tensor) -> Tensor:
    """The outputs that padding has no part in."""
    return out[KEPT] if name not in TORCH or TORCH[name][1] else out.transpose(0, 1)[KEPT]


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


def encoder_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, EncoderLayer)]


class Ops(TorchDispatchMode):
    """The names of dynquant's ops and of attention, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dynquant" or "attention" in str(func):
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def ops_of(model: Any, arguments: dict[str, Any]) -> list[str]:
    with Ops() as ops:
        run(model, arguments)
    return ops.names


every_model = pytest.mark.parametrize("name", [*HUGGING_FACE, *TORCH])


@every_model
@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_output_is_near_the_float_layer(name: str, rotation: str | None) -> None:
    model = made(name)
    fused = quantize_dynamic(model, fuse=True, rotation=rotation)
    assert [layer.why_parts() for layer in encoder_layers(fused)] == [None, None]
    assert cosine(run(model, inputs(name)), run(fused, inputs(name))) > 0.998
    if name in IMAGES:
        return
    expected, actual = (run(each, padded(name)) for each in (model, fused))
    assert cosine(seen(name, expected), seen(name, actual)) > 0.998


@every_model
def test_a_layer_is_three_ops_on_the_parts_own_values(name: str) -> None:
    model = made(name)
    parts, fused = quantize_dynamic(model), quantize_dynamic(model, fuse=True)
    first = "linear_norm" if name in PRE_NORM or "pre" in name else "linear_dynamic"
    run(fused, inputs(name))
    names = [each for each in ops_of(fused, inputs(name)) if "attention" not in each]
    ends = [place for place, each in enumerate(names) if each == "linear_mlp"]
    # The first layer of ModernBERT has no norm: that of the embeddings is enough.
    assert [names[end - 1] for end in ends] == ["linear_dynamic" if name == "modernbert" else first, first]
    assert ends[1] == ends[0] + 2
    assert cosine(run(parts, inputs(name)), run(fused, inputs(name))) > NEAR


@every_model
def test_state_and_class_stay_those_of_the_layer(name: str) -> None:
    model = made(name)
    parts, fused = quantize_dynamic(model), quantize_dynamic(model, fuse=True)
    assert list(parts.state_dict()) == list(fused.state_dict())
    for key, value in parts.state_dict().items():
        if not key.endswith("format"):
            assert_same_bits(value, fused.state_dict()[key])
    for path, before in model.named_modules():
        after = fused.get_submodule(path)
        if isinstance(after, EncoderLayer):
            assert isinstance(after, type(before))
            assert type(after).__name__ == type(before).__name__
    other = quantize_dynamic(made(name), fuse=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = quantize_dynamic(model, fuse=True)
    run(other, inputs(name))
    other.load_state_dict(changed.state_dict())
    assert_same_bits(run(other, inputs(name)), run(changed, inputs(name)))


@every_model
def test_copies_and_pickles(name: str) -> None:
    fused = quantize_dynamic(made(name), fuse=True)
    expected = run(fused, inputs(name))
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    copies = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(stream, weights_only=False)
    for other in copies:
        assert len(encoder_layers(other)) == 2
        assert not any("_call" in vars(layer) for layer in encoder_layers(other))
        assert_same_bits(run(other, inputs(name)), expected)


@pytest.mark.parametrize("name", [*HUGGING_FACE])
def test_save_pretrained(name: str, tmp_path: Path) -> None:
    fused = quantize_dynamic(made(name), fuse=True)
    fused.save_pretrained(tmp_path)
    loaded = type(fused).from_pretrained(tmp_path).eval()
    assert len(encoder_layers(loaded)) == 2
    assert loaded.config.quantization_config.to_dict() == fused.config.quantization_config.to_dict()
    assert_same_bits(run(loaded, inputs(name)), run(fused, inputs(name)))


@pytest.mark.parametrize("name", [*HUGGING_FACE])
def test_hidden_states_and_attentions(name: str) -> None:
    model = made(name)
    model.set_attn_implementation("eager")
    parts, fused = quantize_dynamic(model), quantize_dynamic(model, fuse=True)
    expected = run(fused, inputs(name))
    words = inputs(name) | {"output_hidden_states": True}
    with torch.no_grad(), Ops() as ops:
        out = fused(**words)
    assert ops.names.count("linear_mlp") == 2
    assert_same_bits(out[0], expected)
    assert len(out.hidden_states) == 3
    assert_same_bits(out.hidden_states[-1], out.last_hidden_state) if name not in IMAGES else None
    words = inputs(name) | {"output_attentions": True}
    with torch.no_grad(), Ops() as ops:
        attentions = fused(**words).attentions
    assert ops.names.count("linear_mlp") == 0
    assert len(attentions) == 2
    with torch.no_grad():
        for actual, wanted in zip(attentions, parts(**words).attentions, strict=True):
            assert cosine(actual, wanted) > NEAR
    # The hooks of transformers stay where they are, and are idle.
    assert ops_of(fused, inputs(name)).count("linear_mlp") == 2


def layer_and_input(name: str = "bert", spec: Any = None) -> tuple[Any, Tensor]:
    fused = quantize_dynamic(made(name), spec, fuse=True)
    return encoder_layers(fused)[0], torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


def runs_ops(layer: Any, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad(), Ops() as ops:
        layer(*args, **kwargs)
    return "linear_mlp" in ops.names


@pytest.mark.parametrize("place", ["attention.self.query", "attention", "intermediate.intermediate_act_fn"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_parts_run(place: str, register: str) -> None:
    layer, x = layer_and_input()
    assert runs_ops(layer, x)
    calls: list[str] = []
    handle = getattr(layer.get_submodule(place), register)(lambda *_: calls.append(place))
    assert not runs_ops(layer, x)
    assert calls == [place]
    handle.remove()
    if place.endswith("act_fn"):  # the hook brought the activation back
        dynquant.fuse(layer)
    assert runs_ops(layer, x)


def test_hooks_on_the_layer_do_not_matter() -> None:
    layer, x = layer_and_input()
    seen: list[Any] = []
    layer.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    assert runs_ops(layer, x)
    assert seen[0][0][0] is x


def test_global_hooks_run() -> None:
    layer, x = layer_and_input()
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.append(type(module).__name__)
    )
    try:
        assert not runs_ops(layer, x)
    finally:
        handle.remove()
    assert "BertSelfAttention" in names


def test_training_and_gradients_run_the_parts() -> None:
    layer, x = layer_and_input()
    parts = copy.deepcopy(layer)
    parts.restore()
    with Ops() as ops:
        out = layer(x)
        out.sum().backward()
    assert "linear_mlp" not in ops.names
    parts(x).sum().backward()
    for (name, actual), expected in zip(layer.named_parameters(), parts.parameters(), strict=True):
        assert actual.grad is not None, name
        assert_same_bits(actual.grad, expected.grad)
    assert not runs_ops(layer.train(), x)
    layer.eval().requires_grad_(False)
    with Ops() as ops:
        layer(x)
        assert "linear_mlp" in ops.names
        assert layer(x.requires_grad_()).requires_grad


def test_a_dropout_in_training_mode_drops() -> None:
    layer, x = layer_and_input()
    layer.output.dropout.train()
    assert not runs_ops(layer, x)
    layer.output.dropout.eval()
    assert runs_ops(layer, x)


def test_autocast_trace_and_transforms_run_the_parts() -> None:
    layer, x = layer_and_input()
    expected = run_parts(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_ops(layer, x)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        assert_same_bits(traced(x), expected)
        assert torch.func.vmap(layer, randomness="same")(x[None]).shape == (1, *x.shape)


def run_parts(layer: Any, x: Tensor) -> Tensor:
    parts = copy.deepcopy(layer)
    parts.restore()
    with torch.no_grad():
        out: Tensor = parts(x)
    return out


@pytest.mark.parametrize("through", ["data", "no_grad", "load_state_dict"])
def test_changes_of_in_proj_are_quantized(through: str) -> None:
    """Those of a float in_proj, which a conversion of the linear layers alone leaves."""
    layer, x = layer_and_input("post-norm, batch first", {nn.Linear})
    assert runs_ops(layer, x)
    weight = layer.self_attn.in_proj_weight
    if through == "data":
        weight.data.mul_(-2.0)
    elif through == "no_grad":
        with torch.no_grad():
            weight.mul_(-2.0)
    else:
        layer.load_state_dict(layer.state_dict() | {"self_attn.in_proj_weight": -2.0 * weight.detach()})
    assert cosine(run(layer, {"src": x}), run_parts(layer, x)) > 0.999


CHANGES: dict[str, Any] = {
    "a bias in place": lambda layer: layer.attention.self.value.bias.data.add_(1.0),
    "a bias by no_grad": lambda layer: torch.no_grad()(layer.attention.self.value.bias.mul_)(3.0),
    "another bias": lambda layer: setattr(layer.output.dense, "bias", nn.Parameter(torch.ones(64))),
    "a weight": lambda layer: setattr(layer.attention.self.query, "weight", torch.randn(64, 64)),
    "a norm": lambda layer: layer.output.LayerNorm.weight.data.mul_(2.0),
    "another norm": lambda layer: setattr(layer.output, "LayerNorm", nn.LayerNorm(64, 1e-12)),
    "the dtype": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "an activation": lambda layer: layer.intermediate.dense.set_epilogue("relu"),
    "another layer": lambda layer: setattr(
        layer.output, "dense", dynquant.QLinear.from_float(nn.Linear(128, 64))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_parts_reach_the_ops(change: str) -> None:
    layer, x = layer_and_input()
    before = run(layer, {"hidden_states": x})
    torch.manual_seed(0)
    CHANGES[change](layer)
    assert runs_ops(layer, x)
    after = run(layer, {"hidden_states": x})
    assert change == "the dtype" or not torch.equal(before, after)
    assert cosine(after, run_parts(layer, x)) > NEAR


def static(layer: Any) -> None:
    layer.output.dense.set_activation_qparams(torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32))


PARTS_ONLY: dict[str, tuple[Any, str]] = {
    "static": (static, "output.dense is static"),
    "an activation of its own": (
        lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.Tanh()),
        "intermediate.intermediate_act_fn is no epilogue of the layer before it",
    ),
    "float": (lambda layer: setattr(layer.output, "dense", nn.Linear(128, 64)), "output.dense is a Linear"),
    "causal": (
        lambda layer: setattr(layer.attention.self, "is_causal", True),
        "attention.self.is_causal is set",
    ),
    "chunked": (lambda layer: setattr(layer, "chunk_size_feed_forward", 1), "chunk_size_feed_forward is set"),
    "eps": (lambda layer: setattr(layer.output.LayerNorm, "eps", 1e-3), "its norms differ in kind or eps"),
    "forward": (
        lambda layer: setattr(layer.output, "forward", layer.output.forward),
        "output.forward was replaced",
    ),
    "another type": (
        lambda layer: setattr(layer.output, "dense", nn.ReLU()),
        "output.dense is a ReLU",
    ),
}


@pytest.mark.parametrize("change", PARTS_ONLY)
def test_changes_that_the_ops_cannot_express(change: str) -> None:
    layer, x = layer_and_input()
    assert layer.why_parts() is None
    apply, reason = PARTS_ONLY[change]
    apply(layer)
    assert layer.why_parts() == reason
    if change != "another type":
        assert not runs_ops(layer, x)
        assert_same_bits(run(layer, {"hidden_states": x}), run_parts(layer, x))


def test_arguments_that_the_ops_do_not_take() -> None:
    layer, x = layer_and_input()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    assert runs_ops(layer, x, mask)
    assert runs_ops(layer, hidden_states=x, attention_mask=mask, cache=None, output_attentions=False)
    assert not runs_ops(layer, x, mask, output_attentions=True)
    with pytest.raises(RuntimeError, match="in_features"):
        layer(x[..., :63])
    layer, x = layer_and_input("post-norm, batch first")
    assert runs_ops(layer, x, src_key_padding_mask=mask[0, 0, :2])
    assert runs_ops(layer, x, src_key_padding_mask=torch.zeros(2, 5))
    assert not runs_ops(layer, x[0])
    assert not runs_ops(layer, x, torch.zeros(5, 5))
    assert not runs_ops(layer, x, nn.Transformer.generate_square_subsequent_mask(5), is_causal=True)


@pytest.mark.parametrize(
    "scheme", [{"activations": "per_tensor"}, {"rotation": 8}, {"weights": "per_tensor"}]
)
def test_schemes(scheme: dict[str, Any]) -> None:
    model = made("bert")
    fused = quantize_dynamic(model, fuse=True, **scheme)
    assert len(encoder_layers(fused)) == (0 if "activations" in scheme else 2)
    assert cosine(run(model, inputs("bert")), run(fused, inputs("bert"))) > 0.995


def test_layers_that_stay_as_they_are() -> None:
    config = transformers.BertConfig(**TEXT, is_decoder=True)
    assert not encoder_layers(quantize_dynamic(transformers.BertModel(config), fuse=True))
    config = transformers.BertConfig(**TEXT | {"hidden_act": "tanh"})
    assert not encoder_layers(quantize_dynamic(transformers.BertModel(config), fuse=True))
    fused = quantize_dynamic(
        made("bert"), {"encoder.layer.0.output.dense": None, nn.Linear: dynquant.Config()}, fuse=True
    )
    assert [name for name, part in fused.named_modules() if isinstance(part, EncoderLayer)] == [
        "encoder.layer.1"
    ]


def test_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input()
    monkeypatch.setattr(block_call, "runs_on", lambda op, device_type: False)
    other = copy.deepcopy(layer)
    assert other.why_parts() == "cpu has no kernel of linear_mlp"
    assert not runs_ops(other, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = made("bert").to(dtype)
    fused = quantize_dynamic(model, fuse=True)
    out = run(fused, padded("bert"))
    assert out.dtype == dtype
    assert cosine(seen("bert", run(model, padded("bert"))), seen("bert", out)) > 0.999


def test_compiled() -> None:
    fused = quantize_dynamic(made("bert"), fuse=True)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert cosine(run(compiled, padded("bert")), run(fused, padded("bert"))) > NEAR


def test_calibrate_sees_the_parts() -> None:
    fused = quantize_dynamic(made("bert"), fuse=True)
    with dynquant.calibrate(fused) as ranges:
        run(fused, inputs("bert"))
    assert len(ranges) == 13
    dynquant.freeze(fused)
    assert encoder_layers(fused)[0].why_parts() == "attention.output.dense is static"
    assert "linear_mlp" not in ops_of(fused, inputs("bert"))


def test_report_and_sample() -> None:
    model = made("bert")
    fused, report = quantize_dynamic(model, fuse=True, sample=inputs("bert"), report=True)
    assert len(encoder_layers(fused)) == 2
    assert len(report.layers) == 13
    assert report.model.cosine > 0.999


class Residual(nn.Module):
    """A layer of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 2
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
        self.act = nn.SiLU()
        self.norm1, self.norm2 = nn.RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n = self.norm1(x)
        q, k, v = (
            layer(n).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        h = x + self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        n = self.norm2(h)
        return h + self.down(self.act(self.gate(n)) * self.up(n))


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    name = registry.type_name(Residual())
    before = registry.PATTERNS.get(name)
    layer = TransformerLayer(
        query="q",
        key="k",
        value="v",
        out="o",
        gate="gate",
        up="up",
        down="down",
        activation="act",
        first_norm="norm1",
        second_norm="norm2",
        heads="n_heads",
        pre_norm=True,
        arguments=("x", "mask"),
        masks=("mask",),
    )
    dynquant.register_pattern(Residual, SharedInput(("q", "k", "v")), ActivationAfter("gate", "act"), layer)
    yield
    registry.REGISTERED.discard(name)
    registry.PATTERNS.pop(name) if before is None else None


@pytest.mark.usefixtures("_registered")
def test_a_registered_layer_with_gate_and_rms_norm() -> None:
    torch.manual_seed(0)
    model = moved(Residual())
    fused = quantize_dynamic(model, fuse=True)
    x = torch.randn(3, 17, 64)
    assert fused.why_parts() is None
    assert runs_ops(fused, x)
    assert cosine(run(model, {"x": x}), run(fused, {"x": x})) > 0.999
    assert patterns_of(fused, TransformerLayer) == []
    assert repr(fused).startswith("EncoderLayer[Residual](")


def test_a_replaced_method_runs() -> None:
    model = transformers.BertModel(HUGGING_FACE["bert"][1]).eval()
    layer = dynquant.quantize_dynamic(model, fuse=True).encoder.layer[0]
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        assert layer.why_parts() is None
        layer(x)
        layer.feed_forward_chunk = lambda y: y * 0 + 3.0
        assert layer.why_parts() == "its feed_forward_chunk was replaced"
        out = layer(x)
        assert (out[0] if isinstance(out, tuple) else out).eq(3.0).all()
        del layer.feed_forward_chunk
        assert layer.why_parts() is None


def test_a_bool_mask_is_added_where_the_float_layer_adds_it() -> None:
    """Written-out attention adds True and False to the scores as 1 and 0."""
    model = transformers.BertModel(HUGGING_FACE["bert"][1]).eval()
    model.set_attn_implementation("eager")
    layer = dynquant.quantize_dynamic(model, fuse=True).encoder.layer[0]
    x, mask = torch.randn(2, 5, 64), torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    with torch.no_grad():
        out, expected = layer(x, mask), model.encoder.layer[0](x, mask)
        out, expected = (y[0] if isinstance(y, tuple) else y for y in (out, expected))
        assert torch.cosine_similarity(out, expected, dim=-1).min() > 0.998


def test_t5_adds_the_bias_that_it_is_given_or_computes() -> None:
    model = made("t5, gated")
    fused = quantize_dynamic(model, fuse=True)
    first, second = encoder_layers(fused)
    x, mask = (
        torch.randn(2, 9, 64),
        torch.arange(9)[None, None, None] < torch.tensor([9, 4])[:, None, None, None],
    )
    with torch.no_grad(), Ops() as ops:
        out, bias, of_cross_attention = first(x, attention_mask=mask)
        assert ops.names.count("linear_mlp") == 1
        assert of_cross_attention is None
        expected, expected_bias, _ = model.encoder.block[0](x, attention_mask=mask)
        assert_same_bits(bias, expected_bias)
        assert cosine(out, expected) > 0.998
        expected, *_ = model.encoder.block[1](x, attention_mask=mask, position_bias=bias)
        out, same, _ = second(x, attention_mask=mask, position_bias=bias)
        assert same is bias
        assert cosine(out, expected) > 0.998
        # Without a bias of its own, and not given one, the layer's attention adds zeros.
        assert not runs_ops(second, x)
        assert not runs_ops(first, x, output_attentions=True)
        half = quantize_dynamic(made("t5").half(), fuse=True)
        assert not runs_ops(encoder_layers(half)[0], x.half())  # which clamps


def test_modernbert_turns_query_and_key() -> None:
    model = made("modernbert")
    layer = encoder_layers(quantize_dynamic(model, fuse=True))[1]
    x, places = torch.randn(2, 9, 64), torch.arange(9)[None]
    with torch.no_grad():
        rotary = model.rotary_emb(x, places, layer.attention_type)
        assert runs_ops(layer, x, position_embeddings=rotary)
        out, expected = (each(x, position_embeddings=rotary) for each in (layer, model.layers[1]))
        assert cosine(out, expected) > 0.998
        still = (torch.ones(1, 9, 16), torch.zeros(1, 9, 16))
        assert not torch.equal(layer(x, position_embeddings=still), out)
        assert (
            cosine(layer(x, position_embeddings=still), model.layers[1](x, position_embeddings=still)) > 0.998
        )
        with pytest.raises(RuntimeError, match="size of tensor"):  # of the layer's own forward
            layer(x, position_embeddings=tuple(each[:, :5] for each in rotary))


@pytest.mark.parametrize("bias", [False, True])
def test_halves_of_one_layer_are_gate_and_up(bias: bool) -> None:
    kind, config = HUGGING_FACE["modernbert"]
    config = copy.deepcopy(config)
    config.mlp_bias = bias
    layer = encoder_layers(quantize_dynamic(moved(kind(config)), fuse=True))[1]
    assert layer.why_parts() is None
    if bias:
        before = copy.deepcopy(layer)
        with torch.no_grad():
            layer.mlp.Wi.bias[128:].add_(1.0)
        still = (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))
        words = {"hidden_states": torch.randn(2, 5, 64), "position_embeddings": still}
        after = run(layer, words)
        assert not torch.equal(after, run(before, words))
        before.restore()
        with torch.no_grad():
            before.mlp.Wi.bias[128:].add_(1.0)
        assert cosine(after, run(before, words)) > NEAR
    layer.mlp.act = nn.Tanh()
    assert layer.why_parts() == "mlp.act is no epilogue"
    config.intermediate_size = 40
    layer = quantize_dynamic(kind(config), fuse=True).layers[1]
    assert not isinstance(layer, EncoderLayer)


class PickledBefore:
    """An EncoderLayer in a pickle of versions in which this was the only kind of block."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self.layer).items() if name != "_call"}
        return encoder._new, (self.layer._base, self.layer._pattern), state


def test_a_pickle_from_before_other_blocks() -> None:
    layer, x = layer_and_input()
    loaded = pickle.loads(pickle.dumps(PickledBefore(layer)))
    assert isinstance(loaded, EncoderLayer)
    assert loaded.why_parts() is None
    assert_same_bits(run(loaded, {"hidden_states": x}), run(layer, {"hidden_states": x}))
