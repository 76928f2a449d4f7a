"""Eager fusion: patterns, bits equal to those of the parts, and models that must not be fused."""

from __future__ import annotations

import copy
import importlib
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch as safetensors
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import dynquant
from dynquant import QLinear
from dynquant.nn.fused_activation import FusedActivation
from dynquant.nn.merged import MergedLinear
from dynquant.patterns.activations import epilogue_of
from dynquant.patterns.hugging_face import ACTIVATION_AFTER, QKV_GROUPS
from dynquant.patterns.registry import PATTERNS, SharedInput
from tests.support.nets import CountInt8, Written, in_parts
from tests.support.same_bits import assert_same_bits

SCHEMES = [{}, {"activations": "per_tensor"}, {"weights": "per_tensor"}, {"rotation": "hadamard"}]
ACTIVATIONS = [
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.SiLU(), "silu"),
]


def as_written(model: nn.Module) -> nn.Module:
    """A copy of an unfused model whose activations are the reference's functions."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, value in {**vars(module), **module._modules}.items():
            epilogue = epilogue_of(value)
            if epilogue is not None:
                setattr(module, name, Written(epilogue))
    return model


@pytest.mark.parametrize(
    ("act", "epilogue"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("silu", "silu"), ("quick_gelu",) * 2]
)
def test_activations_of_transformers(act: str, epilogue: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    assert epilogue_of(activations.ACT2FN[act]) == epilogue


def layers(model: nn.Module) -> list[QLinear]:
    return [module for module in model.modules() if isinstance(module, QLinear)]


# ---- activations


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("activation", "epilogue"), ACTIVATIONS)
def test_pairs_in_sequentials(activation: nn.Module, epilogue: str, scheme: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), activation, nn.Dropout(), nn.Linear(33, 5), nn.Tanh())
    fused = dynquant.quantize_dynamic(model, fuse=True, **scheme)
    assert [layer.config.epilogue for layer in layers(fused)] == [epilogue, "none"]
    assert isinstance(fused[1], nn.Identity)
    x = torch.randn(7, 16) * 3
    plain = dynquant.quantize_dynamic(model, **scheme)
    assert_same_bits(fused(x), as_written(plain)(x))
    assert (fused(x) - plain(x)).abs().max() < 0.05
    assert set(fused.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("act", ["relu", "gelu", F.silu, nn.GELU(approximate="tanh")])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(act: str | Callable[[Tensor], Tensor], norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=act, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    fused, plain = in_parts(dynquant.quantize_dynamic(model, fuse=True)), dynquant.quantize_dynamic(model)
    x = torch.randn(2, 9, 32)
    epilogues = [encoder.linear1.config.epilogue for encoder in fused.layers]
    assert len(set(epilogues)) == 1
    assert epilogues[0] != "none"
    written = as_written(plain)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_bits(fused(x), written(x), mode.__name__)


@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_nn_transformer_encoder_calls_the_layers(nested: bool) -> None:
    """In eval mode without gradients torch would use nested tensors and one float kernel for the layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    fused = in_parts(dynquant.quantize_dynamic(model, fuse=True))
    x, padding = torch.randn(2, 9, 32), torch.arange(9).expand(2, 9) > 6
    for arguments in ({}, {"src_key_padding_mask": padding}):
        with torch.inference_mode(), CountInt8() as count:
            out = fused(x, **arguments)
        assert count.calls == 8  # in_proj, out_proj, linear1 and linear2 of both layers
        keep = ~padding if arguments else slice(None)
        assert (out - model(x, **arguments))[keep].abs().max() < 0.1


def test_transformer_decoder_layer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(32, 4, 64, activation="gelu", batch_first=True).eval()
    fused = dynquant.quantize_dynamic(model, fuse=True)
    assert fused.linear1.config.epilogue == "gelu"
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    assert_same_bits(fused(x, memory), as_written(dynquant.quantize_dynamic(model))(x, memory))


# ---- Hugging Face

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WIDER = {**SMALL, "hidden_size": 128}
MODELS: dict[str, tuple[transformers.PretrainedConfig, int, int]] = {
    # model, number of layers with an epilogue, number of layers that share their input
    "bert": (transformers.BertConfig(vocab_size=50, **SMALL), 2, 6),
    "roberta": (transformers.RobertaConfig(vocab_size=50, hidden_act="gelu_new", **SMALL), 2, 6),
    "mpnet": (transformers.MPNetConfig(vocab_size=50, **SMALL), 2, 6),
    "distilbert": (
        transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
        2,
        6,
    ),
    "gpt2": (transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2), 2, 0),
    "gpt_neox": (transformers.GPTNeoXConfig(vocab_size=50, **SMALL), 2, 0),
    "opt": (
        transformers.OPTConfig(
            vocab_size=50,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
        ),
        2,
        6,
    ),
    "llama": (transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **WIDER), 2, 6),
    "qwen2": (transformers.Qwen2Config(vocab_size=50, num_key_value_heads=1, **WIDER), 2, 6),
}


def hugging_face(name: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(MODELS[name][0]).eval()


TOKENS = torch.arange(24).reshape(2, 12) % 47 + 2


@pytest.mark.parametrize("scheme", [{}, {"activations": "per_tensor", "weights": "per_tensor"}])
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_models(name: str, scheme: dict[str, str]) -> None:
    model = hugging_face(name)
    _, epilogues, sharing = MODELS[name]
    fused, plain = (
        in_parts(dynquant.quantize_dynamic(model, fuse=True, **scheme)),
        dynquant.quantize_dynamic(model, **scheme),
    )
    assert sum(layer.config.epilogue != "none" for layer in layers(fused)) == epilogues
    assert sum(isinstance(layer, MergedLinear) for layer in layers(fused)) == sharing
    assert all(layer.group.merged for layer in layers(fused) if isinstance(layer, MergedLinear))
    assert set(fused.state_dict()) == set(plain.state_dict())
    with torch.no_grad():
        out, exact = fused(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state
        assert_same_bits(out, as_written(plain)(TOKENS).last_hidden_state)
    assert (out - exact).abs().max() < 0.2


def test_gpt2_layers_are_converted_without_fusing_too() -> None:
    model = hugging_face("gpt2")
    plain = dynquant.quantize_dynamic(model)
    assert len(layers(plain)) == 8
    with torch.no_grad():
        out, expected = plain(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state
    assert (out - expected).abs().max() < 0.1
    assert all(type(layer.bias) is nn.Parameter for layer in layers(plain))


def test_the_names_in_the_table_are_names_of_transformers() -> None:
    found = set()
    for name in ACTIVATION_AFTER.keys() | QKV_GROUPS.keys():
        module, _, cls = name.rpartition(".")
        try:
            if hasattr(importlib.import_module(module), cls):
                found.add(name)
        except ImportError:
            continue
    missing = (ACTIVATION_AFTER.keys() | QKV_GROUPS.keys()) - found
    assert len(found) > 80
    assert len(missing) < 10, missing


# ---- shared inputs


class Attention(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (64, 64, 64), bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(24, width, bias) for width in widths)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return torch.cat([self.q(x), self.k(memory), self.v(memory)], -1)


@pytest.fixture(autouse=True)
def _rule_of_attention():
    name = f"{Attention.__module__}.{Attention.__qualname__}"
    PATTERNS[name] = [SharedInput(("q", "k", "v"))]
    yield
    del PATTERNS[name]


def both(widths: tuple[int, ...] = (64, 64, 64), bias: bool = True, **scheme) -> tuple[nn.Module, nn.Module]:
    model = Attention(widths, bias)
    return dynquant.quantize_dynamic(model, fuse=True, **scheme), dynquant.quantize_dynamic(model, **scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("widths", [(64, 64, 64), (128, 64, 64), (64, 64, 50), (16, 16, 16)])
def test_sharing_gives_the_same_bits(widths, scheme, bias, dtype) -> None:
    shared, plain = both(widths, bias, **scheme)
    for shape in ((24,), (1, 24), (3, 5, 24), (0, 24)):
        x = torch.randn(shape).to(dtype)
        assert_same_bits(shared(x), plain(x))
    assert shared.q.group.merged is not None


def test_the_wide_weight_is_that_of_one_wider_layer() -> None:
    shared, plain = both((128, 64, 50))
    x = torch.randn(3, 24)
    biases = torch.cat([layer.bias for layer in layers(plain)])
    wide = shared.q.group.merged
    y = torch.ops.dynquant.linear_dynamic(x, *wide[:3], biases, wide.config)
    assert_same_bits(y, plain(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_holds_no_slices(scheme, tmp_path) -> None:
    """safetensors' save_model refuses slices, and torch.save would write the wide tensor with each."""
    shared, plain = both(**scheme)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in shared.state_dict().values())
    safetensors.save_model(shared, str(tmp_path / "shared.safetensors"))
    again = both(**scheme)[0]
    safetensors.load_model(again, tmp_path / "shared.safetensors")
    x = torch.randn(3, 24)
    assert_same_bits(again(x), plain(x))


def test_widths_that_are_no_whole_panels_compute_for_themselves() -> None:
    shared, plain = both((40, 40, 40))
    assert type(shared.q) is QLinear
    x = torch.randn(2, 24)
    assert_same_bits(shared(x), plain(x))


def test_a_layer_of_a_group_depends_on_its_own_arguments_alone() -> None:
    shared, plain = both()
    x, memory = torch.randn(2, 24), torch.randn(3, 24)
    assert_same_bits(shared.q(x), plain.q(x))
    assert_same_bits(shared.k(memory), plain.k(memory))
    assert_same_bits(shared.v(x), plain.v(x))

    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            written = x.clone()
            shared.q(written)
            written.mul_(-3)
            assert_same_bits(shared.k(written), plain.k(written), mode.__name__)
    with torch.no_grad():
        shared.q(x)
    assert shared.k(x).requires_grad
    shared.q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shared.k(x).dtype == torch.bfloat16
    shared.q(x)
    for model in (shared, plain):
        model.k.bias.data.fill_(2.0)
    assert_same_bits(shared.k(x), plain.k(x))
    with pytest.raises(RuntimeError, match=r"expected input.shape\[-1\] == in_features \(24\), got 5"):
        shared(x, torch.randn(2, 5))
    assert_same_bits(shared.v(x), plain.v(x))


def test_nothing_of_a_forward_is_kept() -> None:
    shared, _ = both()
    x = torch.randn(2, 24)
    seen = [weakref.ref(x), weakref.ref(shared.q(x))]
    del x
    assert [ref() for ref in seen] == [None, None]


def test_threads_serve_one_fused_model() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 1).eval()
    shared, _ = both()
    inputs = [torch.randn(2, 24) for _ in range(4)] * 50
    sequences = [torch.randn(1, 3, 32) for _ in range(4)] * 10
    for model, xs in ((shared, inputs), (dynquant.quantize_dynamic(encoder, fuse=True), sequences)):
        with torch.no_grad():
            expected = [model(x) for x in xs]

        def call(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.no_grad():
                return model(x)

        with ThreadPoolExecutor(4) as pool:
            for got, want in zip(pool.map(call, xs), expected, strict=True):
                assert_same_bits(got, want)


def test_functorch_transforms() -> None:
    shared, plain = both()
    x = torch.randn(3, 2, 24)
    assert_same_bits(torch.func.vmap(shared)(x), plain(x))
    gradient = torch.func.grad(lambda x: shared(x).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: plain(x).sum())(x))
    assert gradient.abs().max() > 0


def test_weights_are_held_once() -> None:
    shared, plain = both()
    for name in ("q", "k", "v"):
        merged, other = getattr(shared, name), getattr(plain, name)
        storage = merged.weight.packed_weight.untyped_storage().data_ptr()
        assert storage == shared.q.group.merged.packed_weight.untyped_storage().data_ptr()
        assert_same_bits(merged.weight.int_repr(), other.weight.int_repr())
        assert_same_bits(merged.dequantize_weight(), other.dequantize_weight())
        assert_same_bits(merged.weight_scale, other.weight_scale)
    assert "input shared by 3 layers" in repr(shared.k)


def test_state_dicts_go_both_ways() -> None:
    shared, plain = both()
    x = torch.randn(2, 24)
    torch.manual_seed(1)
    other = dynquant.quantize_dynamic(Attention())
    for layer in layers(other):
        layer.weight = torch.randn(64, 24)
        layer.bias.data.normal_()
    for assign in (False, True):
        shared.load_state_dict(other.state_dict(), assign=assign)
        assert shared.q.group.merged is not None
        assert_same_bits(shared(x), other(x))
    plain.load_state_dict(shared.state_dict())
    assert_same_bits(plain(x), other(x))


def test_copies_pickles_moves_and_new_weights_share_again() -> None:
    shared, plain = both()
    x = torch.randn(2, 24)
    for other, expected in (
        (copy.deepcopy(shared), plain),
        (pickle.loads(pickle.dumps(shared)), plain),
        (copy.deepcopy(shared).half().cpu(), copy.deepcopy(plain).half()),
    ):
        assert other.q.group is not shared.q.group
        assert other.q.group is other.v.group
        assert other.q.group.merged is not None
        assert_same_bits(other(x), expected(x))
        assert set(other.state_dict()) == set(plain.state_dict())
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(shared).to(dtype)
        assert other.q.group.merged is not None
        assert_same_bits(other(x.to(dtype)), copy.deepcopy(plain).to(dtype)(x.to(dtype)))
    new = torch.randn(64, 24)
    shared.k.weight, plain.k.weight = new, new
    shared.v.bias.data, plain.v.bias.data = new[0].repeat(3)[:64], new[0].repeat(3)[:64]
    assert shared.q.group.merged is not None
    assert_same_bits(shared(x), plain(x))
    assert shared.to("meta")(x.to("meta")).shape == (2, 192)


def test_gradients_are_those_of_the_parts() -> None:
    shared, plain = both()
    grads = []
    for model in (shared, plain):
        x = torch.linspace(-1, 1, 48).reshape(2, 24).requires_grad_()
        (model(x) * torch.linspace(0, 1, 192)).sum().backward()
        grads.append([x.grad, *(layer.bias.grad for layer in layers(model))])
    for merged, other in zip(*grads, strict=True):
        torch.testing.assert_close(merged, other)


def test_outputs_may_be_changed_in_place() -> None:
    shared, plain = both()
    x = torch.randn(2, 24)
    for model in (shared, plain):
        q = model.q(x)
        q /= 3.0
    assert_same_bits(shared.k(x), plain.k(x))


def test_functional_call_with_other_biases() -> None:
    shared, plain = both()
    x, parameters = torch.randn(2, 24), {"k.bias": torch.randn(64)}
    expected = torch.func.functional_call(plain, parameters, (x,))
    assert_same_bits(torch.func.functional_call(shared, parameters, (x,)), expected)


@pytest.mark.parametrize("observer", ["min_max", "mse"])
def test_static_layers_share_too(observer: str) -> None:
    models = both()
    x = torch.randn(64, 24)
    for model in models:
        with dynquant.calibrate(model, observer):
            model(x)
        dynquant.freeze(model)
    shared, plain = models
    assert shared.q.group.merged.qparams is not None
    assert_same_bits(shared(x), plain(x))
    shared.k.set_activation_qparams(None, None)
    assert shared.q.group.merged is None
    plain.k.set_activation_qparams(None, None)
    assert_same_bits(shared(x), plain(x))


# ---- not fused


def test_not_fused() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x)) + self[0](x)

    class Sub(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, out: None)
    shared = nn.Linear(4, 4)
    for model in (
        Own(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), Sub()),
        nn.Sequential(nn.Linear(4, 4), nn.GELU("none"), nn.Linear(4, 4), nn.ELU())[2:],
        nn.Sequential(hooked, nn.ReLU()),
        nn.Sequential(shared, nn.ReLU(), shared),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU()),
    ):
        fused = dynquant.quantize_dynamic(model, fuse=True)
        assert {layer.config.epilogue for layer in layers(fused)} == {"none"}
        x = torch.randn(3, 4)
        assert_same_bits(fused(x), dynquant.quantize_dynamic(model)(x))


def test_float_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    fused = dynquant.quantize_dynamic(model, {"2"}, fuse=True)
    assert [type(module) for module in fused] == [nn.Linear, nn.ReLU, QLinear, FusedActivation]


def test_fuse_by_itself_and_twice() -> None:
    model = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU()))
    assert dynquant.fuse(model) is model
    dynquant.fuse(model)
    assert model[0].config.epilogue == "relu"
    assert type(model[2]) is nn.ReLU
