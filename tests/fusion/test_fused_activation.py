"""A fused activation comes back where somebody looks between it and its layer, or changes one of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant.nn.fused_activation import FusedActivation
from tests.support.same_bits import assert_same_bits

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()


def _copies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded: nn.Module = torch.load(file, weights_only=False)
        return loaded

    return {
        "itself": lambda model: model,
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
    }


@pytest.fixture(params=list(_copies()))
def fused(request: pytest.FixtureRequest) -> nn.Module:
    model = dynquant.quantize_dynamic(_model(), fuse=True)
    model = _copies()[request.param](model)
    assert isinstance(model[1], FusedActivation)
    assert model[0].config.epilogue == "gelu"
    assert model[0].fused_activation is model[1]
    return model


@pytest.fixture
def unfused() -> nn.Module:
    return dynquant.quantize_dynamic(_model())


def test_a_hook_on_the_layer_sees_its_own_output(fused: nn.Module, unfused: nn.Module) -> None:
    seen: list[Tensor] = []
    fused[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same_bits(fused(X), unfused(X))
    assert_same_bits(seen[0], unfused[0](X))


def test_hooks_on_the_activation_see_its_input(fused: nn.Module, unfused: nn.Module) -> None:
    seen: list[Tensor] = []
    handle = fused[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert_same_bits(fused(X), unfused(X))
    assert_same_bits(seen[0], unfused[0](X))
    handle.remove()
    fused(X)
    assert len(seen) == 1


def test_another_activation_takes_the_place_of_the_first(fused: nn.Module, unfused: nn.Module) -> None:
    fused[1] = unfused[1] = nn.Tanh()
    assert_same_bits(fused(X), unfused(X))
    assert fused[0].config.epilogue == "none"


def test_another_layer_is_followed_by_the_activation(fused: nn.Module, unfused: nn.Module) -> None:
    fused[0] = unfused[0] = nn.Linear(16, 32)
    assert_same_bits(fused(X), unfused(X))
    assert isinstance(fused[1], nn.GELU)


def test_gradients_of_the_layers_own_output_reach_a_backward_hook() -> None:
    model, plain = dynquant.quantize_dynamic(_model(), fuse=True), dynquant.quantize_dynamic(_model())
    seen: list[Tensor] = []
    for m in (model, plain):
        m[0].register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0]))
        m(X.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(seen[0], seen[1])


def test_a_copy_of_the_layer_alone_does_not_take_the_model_along(fused: nn.Module) -> None:
    layer = copy.deepcopy(fused[0])
    assert layer.fused_activation is None
    assert_same_bits(layer(X), fused[0](X))
    assert len(pickle.dumps(fused[0])) < len(pickle.dumps(fused))


def test_a_function_comes_back_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    fused, plain = dynquant.quantize_dynamic(layer, fuse=True), dynquant.quantize_dynamic(layer)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    fused.linear1.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_same_bits(fused(x), plain(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert fused.activation is plain.activation
    assert fused.activation_relu_or_gelu == plain.activation_relu_or_gelu
    assert (seen[0] < 0).any()


def test_the_encoder_layer_runs_its_parts_then() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    float_model = transformers.BertModel(
        transformers.BertConfig(**sizes, vocab_size=40, _attn_implementation="eager")
    ).eval()
    model = dynquant.quantize_dynamic(float_model, fuse=True)
    plain = dynquant.quantize_dynamic(float_model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        model(ids)
        for m in (model, plain):
            m.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()
        assert model.encoder.layer[0].why_parts() is not None
        model.embeddings.restore()  # whose norm rounds otherwise than torch's
        assert_same_bits(model(ids)[0], plain(ids)[0])


def test_a_compiled_and_a_scripted_model_stay_fused(fused: nn.Module) -> None:
    torch._dynamo.reset()
    expected = fused(X)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert_same_bits(compiled(X), expected)
    scripted = torch.jit.script(fused)
    assert_same_bits(scripted(X), expected)
    assert_same_bits(torch.export.export(fused, (X,)).module()(X), expected)
    assert fused[0].config.epilogue == "gelu"
