"""The conversion report: its table, its JSON, its picture, its bar."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import dynquant
from dynquant import Config, QLinear, Report, quantize_dynamic
from tests.support.nets import net
from tests.support.reporting import X, reported

pytestmark = pytest.mark.usefixtures("quick_measuring")


def test_the_table_shows_every_figure_at_any_width() -> None:
    model = net()
    _, report = reported(model, qconfig_spec={nn.Linear: Config(), "head": None, "fc1": Config("per_tensor")})
    text = str(report)
    for layer in report.layers:
        assert layer.name in text
        assert f"{layer.sqnr_db:.1f}" in text
        assert f"{layer.n} x {layer.k}" in text
        assert f"{layer.speedup:.2f}x" in text
    assert report.summary() in text
    assert report.conditions() in text
    assert "per_tensor" in text
    assert "all layers: per_channel" in text
    assert "the spec leaves it float" in text
    assert "…" not in text
    assert repr(report) == "<Report of Net: 3 layers int8, 1 float>"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report)
    assert "block" in console.export_text()
    assert report.table().row_count == 3
    assert report.skipped_table().row_count == 1


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    model = nn.ModuleDict({"[red]": nn.Linear(12, 12)})
    model.forward = lambda x: model["[red]"](x)
    quantized = nn.ModuleDict({"[red]": QLinear.from_float(model["[red]"])})
    quantized.forward = lambda x: quantized["[red]"](x)
    assert "[red]" in str(dynquant.report(model, quantized, X))


def test_dict_json_and_pandas() -> None:
    import pandas

    _, report = reported(net(), qconfig_spec={nn.Linear: Config(), "head": None})
    parts = report.to_dict()
    assert set(parts) == {"model", "layers", "attention", "skipped", "sample", "threads", "isa"}
    assert parts["layers"][0]["name"] == "fc1"
    assert parts["layers"][0]["speedup"] == report.layers[0].speedup
    assert parts["skipped"] == [
        {"name": "head", "type": "Linear", "bytes": 4 * (4 * 16 + 4), "reason": "the spec leaves it float"}
    ]
    assert json.loads(report.to_json()) == parts
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == ["fc1", "block.0", "block.2", "head"]
    assert frame["sqnr_db"][:3].tolist() == [layer.sqnr_db for layer in report.layers]
    assert frame["reason"][3] == "the spec leaves it float"
    assert frame["bytes_float"][3] == 4 * (4 * 16 + 4)
    assert frame["rotation_block"].dtype == "Int64"
    assert frame["bytes_int8"].isna().tolist() == [False, False, False, True]


def test_infinities_in_json() -> None:
    model = nn.Sequential(nn.Linear(12, 3, bias=False))
    _, report = reported(model, torch.zeros(2, 12))
    assert report.layers[0].sqnr_db == math.inf
    parts = json.loads(report.to_json(indent=None), parse_constant=lambda word: pytest.fail(word))
    assert parts["layers"][0]["sqnr_db"] is None
    assert parts["layers"][0]["cosine"] == 1.0


@pytest.mark.parametrize("kind", ["plain", "nothing", "unreached", "exact"])
def test_picture(tmp_path: Path, kind: str) -> None:
    from matplotlib.image import imread

    if kind == "unreached":
        model = nn.ModuleDict({"a": nn.Linear(12, 3), "b": nn.Linear(12, 3)})
        model.forward = lambda x: x
        quantized = quantize_dynamic(model)
        report = dynquant.report(model, quantized, X)
    else:
        spec = {} if kind == "nothing" else None
        report = reported(net(), torch.zeros(2, 12) if kind == "exact" else X, qconfig_spec=spec)[1]
    path = tmp_path / "report.png"
    report.save_png(path)
    picture = imread(path)
    assert picture.shape[0] > 200
    assert picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.01
    report.save_png(str(tmp_path / "no_suffix"))
    assert (tmp_path / "no_suffix").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("package", "method", "sentence"),
    [
        (
            "pandas",
            lambda report, path: report.to_pandas(),
            "Report.to_pandas needs the package pandas, which is not installed; `pip install '.[report]'` in "
            "the repository installs it; to_dict() and to_json() do without",
        ),
        (
            "matplotlib",
            lambda report, path: report.save_png(path),
            "Report.save_png needs the package matplotlib, which is not installed; `pip install '.[report]'` "
            "in the repository installs it; print(report) shows the same figures",
        ),
        ("rich", lambda report, path: report.table(), "Report.table needs the package rich, which is not"),
        ("rich", lambda report, path: report.skipped_table(), "Report.skipped_table needs the package rich"),
    ],
)
def test_optional_packages_that_are_missing(monkeypatch, tmp_path, package, method, sentence) -> None:
    _, report = reported(net())
    monkeypatch.delitem(sys.modules, "dynquant.measurement.report_picture", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        method(report, tmp_path / "report.png")
    assert str(caught.value).startswith(sentence)
    assert caught.value.name == package


def test_without_rich_the_whole_model_is_printed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, report = reported(net())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(report).splitlines() == [
        report.summary(),
        report.conditions(),
        "(the table needs the package rich, which is not installed; `pip install '.[report]'` in the "
        "repository installs it)",
    ]


def test_a_bar_is_shown_where_measuring_takes_long(capsys, monkeypatch) -> None:
    reported(net())
    assert "measuring" not in capsys.readouterr().err
    times = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(times)))
    reported(net())
    assert "measuring: 100%" in capsys.readouterr().err


def test_public_names() -> None:
    assert dynquant.report is importlib.import_module("dynquant.measurement.report").report
    assert dynquant.Report is Report
