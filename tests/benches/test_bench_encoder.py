"""The benchmark of whole encoders and of attention: models, versions, breakdown, report. No test asserts a
speed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cpu import (
    attention,
    breakdown,
    encoder,
    encoder_models,
    encoder_plot,
    encoder_report,
    encoder_targets,
    encoder_versions,
)
from benchmarks.cpu.baselines import Unavailable
from benchmarks.cpu.target_list import TargetList
from dynquant.demo.encoder import Embedder

transformers = pytest.importorskip("transformers")
VERSIONS = ("fp32", "torch.ao", encoder_versions.FLOAT_ATTENTION, encoder_versions.ROTATED)


def _tiny(quick: bool) -> encoder_models.Model:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=32,
    )
    module = Embedder(transformers.BertModel(config, add_pooling_layer=False)).eval()
    ids, mask = torch.randint(1, 50, (4, 16)), torch.ones(4, 16, dtype=torch.int64)
    sizes = {0: "batch", 1: "tokens"}
    return encoder_models.Model(
        name="all-MiniLM-L6-v2",
        module=module,
        input_names=("input_ids", "attention_mask"),
        dynamic_sizes={"input_ids": sizes, "attention_mask": sizes},
        workloads={"4x16": (ids, mask)},
        samples=tuple((row[None], mask[:1]) for row in ids),
        long_samples=((ids, mask),),
        fusion="bert",
        heads=2,
        hidden=32,
        versions=VERSIONS,
    )


def test_padded_batches_keep_the_longest_text_whole() -> None:
    ids, mask = encoder_models.padded((torch.full((4, 16), 7), torch.ones(4, 16, dtype=torch.int64)))
    assert mask.sum(1).tolist() == [4, 8, 12, 16]
    assert torch.equal(ids, 7 * mask)


def test_a_version_without_its_packages_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny(True)
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("onnxruntime", "openvino static", "openvino bf16"):
        with pytest.raises(Unavailable, match="not installed"):
            encoder_versions.prepare(name, model, 1)
    monkeypatch.setitem(encoder_versions.VERSIONS, "fp32", lambda model, threads: lambda inputs: 1 / 0)
    with pytest.raises(Unavailable, match="fails: ZeroDivisionError: division by zero"):
        encoder_versions.prepare("fp32", model, 1)


def test_every_version_of_dynquant_is_close_to_float() -> None:
    model = _tiny(True)
    expected = model.module(*model.samples[0])
    skipped = (encoder_versions.COMPILED, *encoder_versions.INT8_RIVALS, "openvino bf16")
    for name in encoder_versions.VERSIONS:
        if name not in skipped:
            with torch.inference_mode():
                got = encoder_versions.prepare(name, model, 1)(model.samples[0]).float()
                assert (got * expected).sum() > 0.97, name


def test_attention_is_checked_and_reported() -> None:
    rows = attention.run([1], rounds=1, seconds=1e-4, log=lambda line: None, shapes=[(2, 2, 20, 16)])
    assert [row["padded"] for row in rows] == [False, True]
    assert all(row["us"]["torch"] > 0 and 0 < row["error"] < 0.1 for row in rows)
    assert "| 2, 2, 20, 16 | padded | 1 |" in encoder_report.attention_text(rows)


def test_breakdown_counts_the_products_of_each_layer() -> None:
    found = breakdown.measure(_tiny(True), "4x16", rounds=1, seconds=1e-3)
    tokens, hidden, inner, layers = 4 * 16, 32, 64, 2
    macs = layers * tokens * (3 * hidden * hidden + hidden * hidden + 2 * hidden * inner)
    attention_macs = layers * 2 * 4 * 16 * 16 * hidden
    if found["int8_gops"] is not None:
        limits = {name: group["limit_ms"] for name, group in found["groups"].items()}
        assert limits["linear"] == pytest.approx(2 * macs / found["int8_gops"] / 1e6)
        assert limits["attention"] == pytest.approx(2 * attention_macs / found["int8_gops"] / 1e6)
    assert sum(group["ms"] for group in found["groups"].values()) >= found["total_ms"] * 0.999
    assert {entry["op"]: entry["calls"] for entry in found["ops"]} == {
        "linear_dynamic": 2,
        "attention": 2,
        "linear_mlp": 2,
        "embedding_norm": 1,
    }


def test_a_tiny_run_is_reported_and_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(encoder, "MODELS", (_tiny,))
    found = encoder.run([1], rounds=1, seconds=1e-3, quick=True, log=lambda line: None)
    (model,) = found["models"]
    assert set(model["threads"]["1"]["milliseconds"]) == set(VERSIONS)
    assert model["cosines"]["fp32"]["min_512"] == pytest.approx(1.0)
    text = encoder_report.encoder_text(found)
    assert "## all-MiniLM-L6-v2" in text
    assert "Cosine to fp32, over 4 sentences" in text
    assert "| whole forward |" in text
    machine = {"cpu": "a CPU", "isa": "avx2", "versions": {}, "date": "today", "available_isas": ["avx2"]}
    encoder_plot.plot({"encoder": found, "machine": machine}, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_without_the_models_package_the_section_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(quick: bool) -> Any:
        raise ImportError("no model here")

    monkeypatch.setattr(encoder, "MODELS", (missing,))
    found = encoder.run([1], rounds=1, seconds=1e-3, quick=True, log=lambda line: None)
    assert found == {"left_out": "no model here"}
    assert "Left out: no model here" in encoder_report.encoder_text(found)


def _results(machine: dict[str, Any]) -> dict[str, Any]:
    times = {
        "fp32": 400.0,
        "torch.ao": 150.0,
        "dynquant per_token": 120.0,
        "dynquant per_tensor": 125.0,
        encoder_versions.FLOAT_ATTENTION: 100.0,
        encoder_versions.ROTATED: 80.0,
        encoder_versions.COMPILED: 82.0,
        "onnxruntime": 120.0,
        "openvino static": 96.0,
    }
    cosines = {
        encoder_versions.FLOAT_ATTENTION: {"min": 0.9992, "mean": 0.9995},
        encoder_versions.ROTATED: {"min": 0.9989, "mean": 0.9994},
    }
    groups = {
        "linear": {"ms": 50.0, "limit_ms": 48.0},
        "attention": {"ms": 10.0, "limit_ms": 4.0},
        "norms, residuals": {"ms": 4.0, "limit_ms": None},
        "rest": {"ms": 6.0, "limit_ms": None},
    }
    model = {
        "name": "all-MiniLM-L6-v2",
        "threads": {"1": {"milliseconds": {name: {"8x128": ms} for name, ms in times.items()}}},
        "cosines": cosines,
        "breakdown": {"workload": "8x128", "total_ms": 70.0, "groups": groups},
    }
    row = {"shape": [8, 12, 128, 32], "padded": False, "threads": 1, "us": {"torch": 100.0, "dynquant": 40.0}}
    return {"machine": machine, "encoder": {"models": [model]}, "attention": [row]}


@pytest.mark.parametrize(
    ("family", "isas", "expected"),
    [
        (
            "25",
            ["avx2", "avx512vnni"],
            {
                "1 thread, per_token, rotation, fused, against the best of": (
                    "1.20 (openvino static)",
                    "missed",
                ),
                "8x128 tokens, 1 thread, per_token, rotation, fused, against torch.ao": ("1.88", "met"),
                "attention alone": ("highest 0.40 (S 128, 1 thread)", "missed"),
            },
        ),
        (
            "6",
            ["avx2", "avx512vnni"],
            {
                "products at the int8 limit": ("1.35", "met"),
                "attention alone": ("highest 0.40 (S 128, 1 thread)", "met"),
            },
        ),
        ("25", ["avx2"], {"1 thread, per_token, rotation, fused, against fp32": ("5.00", "met")}),
    ],
)
def test_targets_depend_on_the_kind_of_cpu(
    family: str, isas: list[str], expected: dict[str, tuple[str, str]]
) -> None:
    targets = TargetList(_results({"available_isas": isas}))
    encoder_targets.add_encoder_targets(targets, _results({"available_isas": isas, "cpu_family": family}))
    for words, outcome in expected.items():
        found = [t for t in targets.targets if words in t.name and t.measured != "-"]
        assert [(t.measured, t.verdict) for t in found] == [outcome], words
    compiled = next(target for target in targets.targets if "compiled" in target.name)
    assert (compiled.measured, compiled.verdict) == ("highest 1.02 (8x128)", "met")
