"""Subclasses with a forward of their own: int8 where it calls F.linear or F.embedding, else float."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynquant import QEmbedding, QLinear, QModule, quantize_dynamic
from dynquant.nn.own_forward import OwnForward
from tests.support.nets import CountInt8
from tests.support.same_bits import assert_same_bits

X = torch.linspace(-2, 3, 64).reshape(4, 16)
IDS = torch.tensor([[3, 0, 9]])


class Whispers(nn.Linear):
    """As openai-whisper's Linear."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Timms(nn.Linear):
    """As timm's Linear."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(input, self.weight.to(dtype=input.dtype), self.bias)
        return F.linear(input, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class LoRA(nn.Linear):
    """A low-rank update beside the weight, with parameters and modules of its own."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.a, self.b = nn.Parameter(torch.randn(4, k)), nn.Linear(4, n, bias=False)
        self.scaling = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.b(x @ self.a.T) * self.scaling


class ScaledWords(nn.Embedding):
    """As transformers' ScaledWordEmbedding of Gemma and BART."""

    def __init__(self, *sizes: int, embed_scale: float) -> None:
        super().__init__(*sizes, padding_idx=0)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def make(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(10, 16, embed_scale=4.0) if kind is ScaledWords else kind(16, 8)


KINDS = [Whispers, Timms, Scaled, LoRA, ScaledWords]


@pytest.mark.parametrize("kind", KINDS)
def test_right_and_int8(kind: Any) -> None:
    model = nn.Sequential(make(kind))
    x = IDS if kind is ScaledWords else X
    quantized = quantize_dynamic(model, embeddings=True)
    layer = quantized[0]
    assert isinstance(layer, (OwnForward, kind))
    assert isinstance(layer, QEmbedding if kind is ScaledWords else QLinear)
    expected = model(x)
    with CountInt8() as count:
        out = quantized(x)
    assert count.calls == {LoRA: 2, ScaledWords: 0}.get(kind, 1)
    assert (out - expected).norm() / expected.norm() < 0.02
    assert layer.weight.int_repr().dtype == torch.int8
    assert not layer.takes_epilogue
    assert not layer.is_mergeable
    for restored in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert_same_bits(restored(x), out)
    torch.manual_seed(1)
    other = quantize_dynamic(copy.deepcopy(model), embeddings=True)
    other[0].weight = torch.randn(layer.weight.shape)
    other.load_state_dict(quantized.state_dict())
    assert_same_bits(other(x), out)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(quantized, fullgraph=True, backend="aot_eager")(x), out)
    wide = quantized.double()(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(wide.float(), out)


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Unused(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x) + y


class Merging(nn.Linear):
    """As loralib's, which writes to the weight when its mode changes."""

    def train(self, mode: bool = True) -> nn.Module:
        self.weight.data += 0.0
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Lookup(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class Counting(nn.Linear):
    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_the_look_at_a_forward_leaves_no_trace() -> None:
    model = nn.Sequential(Counting(16, 8))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    quantized = quantize_dynamic(model)
    assert not calls
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in state.items():
        assert_same_bits(model.state_dict()[name], value)
    quantized(X)
    assert calls == ["hook"], "the hook came along"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Transposed, "its forward is not that of Linear, and reads the weight by T"),
        (Normed, "its forward is not that of Linear, and reads the weight by"),
        (Unused, "its forward is not that of Linear, and calls no F.linear with its weight"),
        (TwoInputs, "its forward is not that of Linear, and a call of it with one input raises TypeError"),
        (Merging, "its forward is not that of Linear"),
        (Lookup, "its forward is not that of Embedding, and reads the weight by __getitem__"),
    ],
)
def test_float_with_a_reason(kind: Any, reason: str) -> None:
    model = nn.Sequential(kind(16, 8), nn.Linear(8, 8)).train()
    with pytest.warns(UserWarning, match=reason.replace("(", r"\(")):
        quantized = quantize_dynamic(model, embeddings=True)
    assert not isinstance(quantized[0], QModule)
    assert model[0].training, "the look at its forward leaves the mode as it was"


def test_falcons_layer_is_a_linear_one() -> None:
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    layer = falcon.FalconLinear(16, 8)
    quantized = quantize_dynamic(nn.Sequential(layer))[0]
    assert type(quantized) is QLinear
    with torch.no_grad():
        assert (quantized(X) - layer(X)).norm() / layer(X).norm() < 0.02


def test_scaled_word_embeddings_of_transformers() -> None:
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    for layer in (
        gemma.Gemma3TextScaledWordEmbedding(10, 16, 0, embed_scale=4.0),
        bart.BartScaledWordEmbedding(10, 16, 0, embed_scale=4.0),
        bart.BartLearnedPositionalEmbedding(10, 16),
    ):
        quantized = quantize_dynamic(nn.Sequential(layer), embeddings=True)[0]
        assert isinstance(quantized, QEmbedding), type(layer)
        with torch.no_grad():
            assert (quantized(IDS) - layer(IDS)).norm() / layer(IDS).norm() < 0.02
