"""The registry of patterns: its documented example, several patterns of a type, and mistakes."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import quantize_dynamic
from dynquant.nn.merged import MergedLinear
from dynquant.patterns import ActivationAfter, SharedInput, registry
from dynquant.patterns.registry import PATTERNS, REGISTERED, patterns_of, register_pattern, type_name
from tests.support.paths import ROOT
from tests.support.same_bits import assert_same_bits


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test registers in a copy."""
    monkeypatch.setattr(
        registry, "PATTERNS", patterns := {name: list(known) for name, known in PATTERNS.items()}
    )
    monkeypatch.setattr(registry, "REGISTERED", registered := set(REGISTERED))
    monkeypatch.setattr("dynquant.fusion.modules.PATTERNS", patterns)
    monkeypatch.setattr("dynquant.fusion.modules.REGISTERED", registered)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(64, 128), torch.nn.functional.silu


class Block(nn.Module):
    """An activation pair, another one in a part, and shared inputs, in one type."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.fc, self.relu = nn.Linear(64, 64), nn.ReLU()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.fc(self.q(x) + self.k(x) * self.v(x)))
        return self.inner.act(self.inner.up(y))


X = torch.linspace(-2, 3, 5 * 64).reshape(5, 64)


def test_the_documented_example() -> None:
    found = doctest.DocTestFinder().find(register_pattern, "register_pattern", globs={})
    assert [len(test.examples) for test in found] == [7]
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.summarize().failed == 0


def test_the_example_in_the_readme(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (block,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "register_pattern" in code
    ]
    scope = {"dynquant": dynquant, "torch": torch, "nn": nn, "__name__": "readme"}
    exec(block, scope)
    fused = scope["int8"]
    assert fused.up.config.epilogue == "gelu"
    assert type(fused.query) is MergedLinear


def test_a_type_with_several_patterns() -> None:
    register_pattern(Block, ActivationAfter("fc", "relu"))
    register_pattern(
        type_name(Block()), SharedInput(("q", "k", "v")), ActivationAfter("inner.up", "inner.act")
    )
    register_pattern(Block, ActivationAfter("fc", "relu"))
    assert patterns_of(Block(), ActivationAfter) == [("fc", "relu"), ("inner.up", "inner.act")]
    assert patterns_of(Block(), SharedInput) == [(("q", "k", "v"),)]
    plain, fused = quantize_dynamic(Block()), quantize_dynamic(Block(), fuse=True)
    assert fused.fc.config.epilogue == "relu"
    assert fused.inner.up.config.epilogue == "silu"
    assert all(type(layer) is MergedLinear for layer in (fused.q, fused.k, fused.v))
    assert_same_bits(fused.fc(X), plain.relu(plain.fc(X)))
    assert (fused(X) - plain(X)).abs().max() < 0.01
    checked = quantize_dynamic(Block(), fuse=True, sample=X)
    assert_same_bits(checked(X), fused(X))


def test_known_types_keep_all_of_their_patterns() -> None:
    from dynquant.patterns import hugging_face, torch_nn

    for name, pair in (torch_nn.ACTIVATION_AFTER | hugging_face.ACTIVATION_AFTER).items():
        assert ActivationAfter(*pair) in PATTERNS[name]
    for name, layers in hugging_face.QKV_GROUPS.items():
        assert SharedInput(layers) in PATTERNS[name]


def test_subclasses_have_no_pattern() -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(x) + x)

    register_pattern(Block, ActivationAfter("fc", "relu"))
    with pytest.warns(UserWarning, match="nothing was fused"):
        fused = quantize_dynamic(Other(), fuse=True)
    assert fused.fc.config.epilogue == "none"


def test_a_part_that_is_not_there_is_named() -> None:
    register_pattern(Block, ActivationAfter("fc", "relu"), SharedInput(("q", "key")))
    sentence = r"SharedInput\(layers=\('q', 'key'\)\) is registered for Block, but the model has no key"
    with pytest.warns(UserWarning, match=sentence):
        fused = quantize_dynamic(Block(), fuse=True)
    assert fused.fc.config.epilogue == "relu"


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            (Block(), ActivationAfter("fc", "relu")),
            TypeError,
            "expected a class or its dotted name, got Block",
        ),
        (
            (Block, ("fc", "relu")),
            TypeError,
            "of type ActivationAfter or SharedInput or TransformerLayer or ResidualMLP or EmbeddingStage, "
            "got .'fc', 'relu'.",
        ),
        ((Block, SharedInput("qk")), TypeError, "expected names of parts in a tuple, got SharedInput"),
        ((Block, ActivationAfter("fc", None)), TypeError, "expected names of parts in a tuple, got Activ"),
        ((Block, SharedInput(("q",))), ValueError, "expected two parts or more, got SharedInput"),
        ((Block, ActivationAfter("fc", "fc")), ValueError, "expected two parts or more, got ActivationAfter"),
    ],
)
def test_mistakes(arguments: tuple, error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        register_pattern(*arguments)
    assert type_name(Block()) not in registry.PATTERNS


def test_public_names() -> None:
    assert dynquant.register_pattern is register_pattern
    assert dynquant.patterns.ActivationAfter is ActivationAfter
