"""MLPBlock: norm, MLP and residual of decoder layers and T5's feed-forward layers as one op."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynquant
from dynquant import MLPBlock, quantize_dynamic
from dynquant.nn import block_call
from dynquant.patterns import ActivationAfter, ResidualMLP, registry
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="the patterns are of transformers 5"
)

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
DECODERS: dict[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "mistral": ("MistralForCausalLM", "MistralConfig"),
    "ministral": ("MinistralForCausalLM", "MinistralConfig"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config"),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config"),
    "cwm": ("CwmForCausalLM", "CwmConfig"),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config"),
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eurobert": ("EuroBertModel", "EuroBertConfig", TEXT | {"mask_token_id": 3}),
    "umt5": ("UMT5EncoderModel", "UMT5Config", T5),
    "longt5": ("LongT5EncoderModel", "LongT5Config", T5),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5, gated": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
}
GENERATING = [*DECODERS, "t5", "t5, gated"]
NEAR = 0.9999
"""Cosine of the outputs of the op and of the parts: norm and activation differ by roundings."""

every_model = pytest.mark.parametrize("name", [*DECODERS, *OTHERS])


def made(name: str, **options: Any) -> Any:
    kind, config_kind, arguments = (*DECODERS[name], TEXT) if name in DECODERS else OTHERS[name]
    if name == "cwm":
        options = {"rope_parameters": None} | options
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config_kind)(**arguments | options))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


LENGTHS = torch.tensor([17, 9, 3])
KEPT = torch.arange(17) < LENGTHS[:, None]


def inputs(name: str, padded: bool = False) -> dict[str, Any]:
    ids = torch.randint(5, 50, (3, 17), generator=torch.Generator().manual_seed(0))
    words: dict[str, Any] = {"input_ids": ids}
    if padded:
        words["attention_mask"] = KEPT.long()
    if name.startswith("t5"):
        words["decoder_input_ids"] = ids[:, :7]
    return words


def run(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**arguments)
    return out if isinstance(out, Tensor) else out[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


def blocks(model: nn.Module) -> list[Any]:
    return [block for block in model.modules() if isinstance(block, MLPBlock)]


def in_parts(model: Any) -> Any:
    """A copy that calls the parts of its MLP blocks one by one."""
    model = copy.deepcopy(model)
    for block in blocks(model):
        block.restore()
    return model


class Ops(TorchDispatchMode):
    """How often the op ran, within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.dynquant.mlp.default
        return func(*args, **(kwargs or {}))


def count_ops(model: Any, arguments: dict[str, Any]) -> int:
    with Ops() as ops:
        run(model, arguments)
    return ops.count


@every_model
def test_output_is_near_the_float_model_and_nearer_the_parts(name: str) -> None:
    model = made(name)
    fused = quantize_dynamic(model, fuse=True, rotation="hadamard")
    assert [block.why_parts() for block in blocks(fused)] == [None, None]
    parts = in_parts(fused)
    for padded in (False, True):
        words = inputs(name, padded)
        assert count_ops(fused, words) == 2
        kept = KEPT if padded and not name.startswith("t5") else slice(None)
        expected, actual, by_parts = (run(each, words)[kept] for each in (model, fused, parts))
        assert cosine(actual, by_parts) > NEAR
        assert cosine(expected, actual) > 0.998


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3", "phi3", "t5", "t5, gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    fused = quantize_dynamic(made(name).to(dtype), fuse=True, rotation="hadamard")
    block = blocks(fused)[0]
    h = torch.randn(2, 5, 64).to(dtype)
    call = block._prepared()
    a = call.arguments
    weight = a.norm[0].float() + (1.0 if name.startswith("gemma") else 0.0)
    with torch.no_grad():
        expected = dynquant.reference.mlp(
            h, *a.layers, None if name == "gemma3" else h, [weight, None], [], a.eps, a.kind
        )
        if name == "gemma3":
            expected = h + block.post_feedforward_layernorm(expected)
        assert_same_bits(call._with_mlp(h), expected)


@every_model
def test_state_class_copies_and_pickles(name: str) -> None:
    model = made(name)
    parts, fused = quantize_dynamic(model), quantize_dynamic(model, fuse=True)
    assert list(parts.state_dict()) == list(fused.state_dict())
    for path, before in model.named_modules():
        after = fused.get_submodule(path)
        if isinstance(after, MLPBlock):
            assert isinstance(after, type(before))
            assert type(after).__name__ == type(before).__name__
            assert repr(after).startswith(f"MLPBlock[{type(before).__name__}](")
    expected = run(fused, inputs(name))
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    copies = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(stream, weights_only=False)
    for other in copies:
        assert len(blocks(other)) == 2
        assert not any("_call" in vars(block) for block in blocks(other))
        assert_same_bits(run(other, inputs(name)), expected)


@every_model
def test_files(name: str, tmp_path: Path) -> None:
    model = made(name)
    fused = quantize_dynamic(model, fuse=True, rotation="hadamard")
    expected = run(fused, inputs(name))
    dynquant.save(fused, tmp_path / "model.safetensors")
    loaded = dynquant.load(made(name), tmp_path / "model.safetensors")
    fused.save_pretrained(tmp_path)
    for other in (loaded, type(fused).from_pretrained(tmp_path).eval()):
        assert len(blocks(other)) == 2
        assert_same_bits(run(other, inputs(name)), expected)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache(name: str) -> None:
    fused = quantize_dynamic(made(name), fuse=True)
    words: dict[str, Any] = {"input_ids": inputs(name)["input_ids"][:2, :6]}
    words |= {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), Ops() as ops:
        out = fused.generate(**words)
    assert ops.count == 2 * len(out.logits)
    with torch.no_grad():
        expected = in_parts(fused).generate(**words)
    assert torch.equal(out.sequences, expected.sequences)
    for actual, wanted in zip(out.logits, expected.logits, strict=True):
        assert cosine(actual, wanted) > NEAR


def test_int8_attention_on_request() -> None:
    model = made("llama")
    fused = quantize_dynamic(model, fuse=True, attention="int8")
    assert fused.config._attn_implementation == "dynquant"
    with torch.no_grad(), Ops() as ops:
        out = fused(**inputs("llama")).logits
    assert ops.count == 2
    assert cosine(out, run(model, inputs("llama"))) > 0.998


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_hidden_states_and_attentions(name: str) -> None:
    model = made(name)
    model.set_attn_implementation("eager")
    fused = quantize_dynamic(model, fuse=True)
    words = inputs(name) | {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad(), Ops() as ops:
        out = fused(**words)
        expected = in_parts(fused)(**words)
    # The attention is called as ever; only the encoder layers of T5 have ops for it.
    assert ops.count == 2
    field = "decoder_" if name == "t5" else ""
    for kind, count in (("hidden_states", 3), ("attentions", 2)):
        found, wanted = (getattr(each, field + kind) for each in (out, expected))
        assert len(found) == count
        for actual, other in zip(found, wanted, strict=True):
            assert cosine(actual, other) > NEAR


def block_and_input(name: str = "t5, gated", **options: Any) -> tuple[Any, Tensor]:
    fused = quantize_dynamic(made(name), fuse=True, **options)
    return blocks(fused)[0], torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


def runs_op(block: Any, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad(), Ops() as ops:
        block(*args, **kwargs)
    return ops.count == 1


def decoder_layer() -> tuple[Any, Tensor, dict[str, Any]]:
    fused = quantize_dynamic(made("llama"), fuse=True)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    rotary = fused.model.rotary_emb(x, torch.arange(5)[None])
    return blocks(fused)[0], x, {"position_embeddings": rotary}


PLACES = {
    "mlp": False,
    "mlp.down_proj": False,
    "post_attention_layernorm": False,
    "self_attn": True,
    "self_attn.q_proj": True,
    "input_layernorm": True,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_parts_run(place: str, register: str) -> None:
    layer, x, words = decoder_layer()
    assert runs_op(layer, x, **words)
    calls: list[str] = []
    handle = getattr(layer.get_submodule(place), register)(lambda *_: calls.append(place))
    assert runs_op(layer, x, **words) == PLACES[place]
    assert calls == [place]
    handle.remove()
    assert runs_op(layer, x, **words)


def test_training_gradients_and_traces_run_the_parts() -> None:
    layer, x, words = decoder_layer()
    parts = in_parts(layer)
    with Ops() as ops:
        layer(x, **words).sum().backward()
    assert ops.count == 0
    in_parts_layer = copy.deepcopy(layer)
    in_parts_layer.zero_grad()
    in_parts_layer.restore()
    in_parts_layer(x, **words).sum().backward()
    for (name, actual), expected in zip(layer.named_parameters(), in_parts_layer.parameters(), strict=True):
        assert actual.grad is not None, name
        assert_same_bits(actual.grad, expected.grad)
    assert not runs_op(layer.train(), x, **words)
    layer.eval().requires_grad_(False)
    # A gradient that comes from outside: the layer's input, or an argument of the attention.
    with Ops() as ops:
        assert not layer(x, **words).requires_grad
        assert ops.count == 1
        assert layer(x.clone().requires_grad_(), **words).requires_grad
        cos, sin = words["position_embeddings"]
        out = layer(x, position_embeddings=(cos.clone().requires_grad_(), sin))
        assert ops.count == 1
    assert out.requires_grad
    with torch.no_grad():
        assert_same_bits(out, parts(x, **words))
        with torch.autocast("cpu", torch.bfloat16):
            assert not runs_op(layer, x, **words)
        traced = torch.jit.trace(lambda y: layer(y, **words), x, check_trace=False)
        assert_same_bits(traced(x), parts(x, **words))


def static(block: Any) -> None:
    block.DenseReluDense.wo.set_activation_qparams(torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32))


PARTS_ONLY: dict[str, tuple[Any, str]] = {
    "static": (static, "DenseReluDense.wo is static"),
    "an activation of its own": (
        lambda block: setattr(block.DenseReluDense, "act", nn.Tanh()),
        "DenseReluDense.act is no epilogue of the layer before it",
    ),
    "float": (
        lambda block: setattr(block.DenseReluDense, "wo", nn.Linear(128, 64)),
        "DenseReluDense.wo is a Linear",
    ),
    "forward": (
        lambda block: setattr(block.DenseReluDense, "forward", block.DenseReluDense.forward),
        "DenseReluDense.forward was replaced",
    ),
    "norm": (lambda block: setattr(block, "layer_norm", nn.Identity()), "layer_norm is a Identity"),
}


@pytest.mark.parametrize("change", PARTS_ONLY)
def test_changes_that_the_op_cannot_express(change: str) -> None:
    block, x = block_and_input()
    assert block.why_parts() is None
    apply, reason = PARTS_ONLY[change]
    apply(block)
    assert block.why_parts() == reason
    assert not runs_op(block, x)
    assert_same_bits(run(block, {"hidden_states": x}), run(in_parts(block), {"hidden_states": x}))


CHANGES: dict[str, Any] = {
    "a norm in place": lambda block: block.layer_norm.weight.data.mul_(2.0),
    "another norm": lambda block: setattr(block, "layer_norm", nn.LayerNorm(64, 1e-6)),
    "its eps": lambda block: setattr(block.layer_norm, "variance_epsilon", 0.5),
    "a weight": lambda block: setattr(block.DenseReluDense.wi_1, "weight", torch.randn(128, 64)),
    "an activation": lambda block: block.DenseReluDense.wi_0.set_epilogue("relu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_parts_reach_the_op(change: str) -> None:
    block, x = block_and_input()
    before = run(block, {"hidden_states": x})
    torch.manual_seed(0)
    CHANGES[change](block)
    assert runs_op(block, x)
    after = run(block, {"hidden_states": x})
    assert not torch.equal(before, after)
    assert cosine(after, run(in_parts(block), {"hidden_states": x})) > NEAR


def test_arguments_and_shapes() -> None:
    block, x = block_and_input()
    assert runs_op(block, hidden_states=x)
    assert runs_op(block, x[0, 0])
    assert runs_op(block, x[:, :0])
    with pytest.raises(RuntimeError, match="size of tensor"):  # of the norm's own forward
        block(x[..., :63])
    with pytest.raises(TypeError):
        block(x, unknown=1)
    layer, x, words = decoder_layer()
    assert runs_op(layer, x, None, **words)
    with pytest.raises(TypeError):
        layer(x)


@pytest.mark.parametrize(
    "scheme",
    [{"activations": "per_tensor"}, {"rotation": 8}, {"rotation": "auto"}, {"weights": "per_tensor"}],
)
def test_schemes(scheme: dict[str, Any]) -> None:
    model = made("llama")
    fused = quantize_dynamic(model, fuse=True, **scheme)
    assert len(blocks(fused)) == (0 if "activations" in scheme else 2)
    assert cosine(run(model, inputs("llama")), run(fused, inputs("llama"))) > 0.995


def test_layers_that_stay_as_they_are() -> None:
    assert not blocks(quantize_dynamic(made("llama", hidden_act="tanh"), fuse=True))
    # Halves that no panel ends with.
    assert not blocks(quantize_dynamic(made("phi3", intermediate_size=40), fuse=True))
    only = {"model.layers.0.mlp.down_proj": None, nn.Linear: dynquant.Config()}
    fused = quantize_dynamic(made("llama"), only, fuse=True)
    assert [name for name, part in fused.named_modules() if isinstance(part, MLPBlock)] == ["model.layers.1"]


def test_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = block_and_input()
    monkeypatch.setattr(block_call, "runs_on", lambda op, device_type: False)
    other = copy.deepcopy(block)
    assert other.why_parts() == "cpu has no kernel of mlp"
    assert not runs_op(other, x)


def test_a_fusion_that_changes_the_output_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    call = type(block_and_input()[0]._prepared())
    monkeypatch.setattr(call, "_with_mlp", lambda self, h: -h)
    with pytest.warns(UserWarning, match=r"norm, MLP and residual of model.layers.0"):
        fused = quantize_dynamic(model, fuse=True, sample=inputs("llama"))
    assert not blocks(fused)


def test_compiled() -> None:
    fused = quantize_dynamic(made("llama"), fuse=True)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert cosine(run(compiled, inputs("llama")), run(fused, inputs("llama"))) > NEAR


def test_calibrate_sees_the_parts() -> None:
    fused = quantize_dynamic(made("llama"), fuse=True)
    with dynquant.calibrate(fused) as ranges:
        run(fused, inputs("llama"))
    assert len(ranges) == 15
    dynquant.freeze(fused)
    assert blocks(fused)[0].why_parts() == "mlp.down_proj is static"


class Residual(nn.Module):
    """A feed-forward layer of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(64), nn.GELU()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.act(self.up(self.norm(x))))
        return y


def test_a_registered_module() -> None:
    layer = ResidualMLP(up="up", down="down", activation="act", norm="norm", arguments=("x",))
    name = registry.type_name(Residual())
    dynquant.register_pattern(Residual, ActivationAfter("up", "act"), layer)
    try:
        model = Residual().eval()
        fused: Any = quantize_dynamic(model, fuse=True)
        x = torch.randn(3, 7, 64)
        assert runs_op(fused, x)
        assert cosine(run(fused, {"x": x}), run(model, {"x": x})) > 0.999
    finally:
        registry.REGISTERED.discard(name)
        registry.PATTERNS.pop(name)
