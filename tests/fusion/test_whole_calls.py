"""Only what surely follows in a model is fused: an nn.Sequential that is called as a whole."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from dynquant import QLinear, fuse, quantize_dynamic
from dynquant.patterns.registry import PATTERNS, ActivationAfter
from tests.support.same_bits import assert_same_bits

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = pair()
        self.layers = nn.ModuleList([pair(), nn.Sequential(pair(), nn.Identity())])
        self.named = nn.ModuleDict({"a": pair()})
        self.inner: nn.Module | None = None


class Whole(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WholeWhereThere(Holder):
    def forward(self, x: Tensor) -> Tensor:
        if self.net is not None:
            x = self._run(x)
        return x

    def _run(self, x: Tensor) -> Tensor:
        return self.net(x) + x


class PartByPart(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0](x) + 3.0))


class WholeAndPart(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.net[0](x)


class Loop(Holder):
    def forward(self, x: Tensor) -> Tensor:
        for part in self.net:
            x = part(x) + 1.0
        return x


class ByName(Holder):
    def forward(self, x: Tensor) -> Tensor:
        net = getattr(self, "net")  # noqa: B009
        return net[2](net[1](net[0](x) + 3.0))


class ByChildren(Holder):
    def forward(self, x: Tensor) -> Tensor:
        net = next(iter(self.children()))
        return net[2](net[1](net[0](x) + 3.0))


class Alias(Holder):
    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        return net[2](net[1](net[0](x) + 3.0))


class ReachesIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Whole()

    def forward(self, x: Tensor) -> Tensor:
        net = self.holder.net
        return self.holder(x) + self.holder.net[1](self.holder.net[0](x) + 3.0) + net[2](x)


class Lists(Holder):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Enumerated(Holder):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) * i
        return x


class Indexed(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


class Comprehension(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers])


class ListPartByPart(Holder):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer[0](x) + 1.0
        return x


class NamedParts(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.named["a"](x)


class Inherits(Whole):
    pass


class OverridesPartByPart(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[1](self.net[0](x) + 3.0)


CASES = [
    (Whole, {"net.0"}),
    (Inherits, {"net.0"}),
    (WholeWhereThere, {"net.0"}),
    (PartByPart, set()),
    (OverridesPartByPart, set()),
    (WholeAndPart, set()),
    (Loop, set()),
    (ByName, set()),
    (ByChildren, set()),
    (Alias, set()),
    (ReachesIn, set()),
    (Lists, {"layers.0.0", "layers.1.0.0"}),
    (Enumerated, {"layers.0.0", "layers.1.0.0"}),
    (Indexed, {"layers.0.0", "layers.1.0.0"}),
    (Comprehension, {"layers.0.0", "layers.1.0.0"}),
    (ListPartByPart, set()),
    (NamedParts, {"named.a.0"}),
]


def fused(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, QLinear) and module.config.epilogue != "none"
    }


@pytest.mark.parametrize("sample", [None, X], ids=["no sample", "sample"])
@pytest.mark.parametrize(("kind", "expected"), CASES)
def test_what_is_fused(kind, expected, sample) -> None:
    model = kind()
    result = quantize_dynamic(model, fuse=True, sample=sample)
    assert fused(result) == expected
    assert_same_bits(result(X), quantize_dynamic(model)(X))


def test_the_model_itself() -> None:
    model = nn.Sequential(pair(), nn.ReLU())
    result = fuse(quantize_dynamic(model))
    assert fused(result) == {"0.0"}
    assert_same_bits(result(X), quantize_dynamic(model)(X))


def test_a_module_without_source_is_left_alone() -> None:
    namespace = {"Holder": Holder}
    exec("class Unwritten(Holder):\n    def forward(self, x):\n        return self.net(x)", namespace)
    assert fused(quantize_dynamic(namespace["Unwritten"](), fuse=True)) == set()


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.activation = nn.Linear(12, 12), nn.GELU()
        self.other, self.last = nn.Linear(12, 12), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.other(self.activation(self.layer(x) + 1.0)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_sample_undoes_what_changes_the_output(monkeypatch, inplace) -> None:
    """A pattern that claims too much: the sample tells, and what is right stays fused."""
    pairs = (("layer", "activation"), ("other", "last"))
    monkeypatch.setitem(PATTERNS, f"{__name__}.Between", [ActivationAfter(*pair) for pair in pairs])
    model = Between()
    plain = quantize_dynamic(model)(X)
    sentence = "fuse: left apart, since the output of the model would change: layer and activation$"
    with pytest.warns(UserWarning, match=sentence) as caught:
        result = quantize_dynamic(model, fuse=True, sample=X, inplace=inplace)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert fused(result) == {"other"}
    assert isinstance(result.activation, nn.GELU)
    assert_same_bits(result(X), plain)


def test_a_transformer_layer_whose_fusion_is_undone_is_as_before() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu").eval()
    quantized = quantize_dynamic(model)
    before = quantized.activation_relu_or_gelu, quantized.activation
    from dynquant.fusion.modules import fuse_steps

    for fusion in list(fuse_steps(quantized)):
        fusion.undo()
    assert (quantized.activation_relu_or_gelu, quantized.activation) == before
    assert quantized.linear1.config.epilogue == "none"


def test_nothing_is_said_where_all_is_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_dynamic(Whole(), fuse=True, sample=X)
