"""Faults of the environment are sentences: DYNQUANT_ISA, a damaged extension, a compiler that is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dynquant
from tests.support.paths import ROOT


@pytest.mark.parametrize("name", ["nonsense", "AVX2", "avx512vnni "])
def test_an_isa_variable_that_names_nothing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNQUANT_ISA", name)
    if dynquant.info().path != "extension":
        pytest.skip("without the extension there is no instruction set to choose")
    code = (
        "import torch, dynquant; print(dynquant.isa()); print(dynquant.QLinear(3, 3)(torch.ones(1, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = dynquant.available_isas()[-1]
    assert done.stdout == f"{best}\ntorch.Size([1, 3])\n"
    assert f"RuntimeWarning: DYNQUANT_ISA={name!r}: expected reference or an instruction set" in done.stderr
    done = subprocess.run([sys.executable, "-m", "dynquant", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"DYNQUANT_ISA={name!r}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["", "scalar"])
def test_an_isa_variable_that_is_empty_or_right_is_no_warning(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNQUANT_ISA", name)
    done = subprocess.run([sys.executable, "-m", "dynquant", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DYNQUANT_ISA" not in done.stdout + done.stderr


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_extension_is_a_sentence(kept: float, tmp_path: Path) -> None:
    """The dynamic linker would map it, and the first access beyond its end kill the process."""
    if dynquant.info().path != "extension":
        pytest.skip("there is no extension to truncate")
    source = Path(dynquant.__file__).parent
    package = tmp_path / "dynquant"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    (file,) = package.glob("_C*.so")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "dynquant", "info"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sentence = f"{file.name} is truncated, so every op runs on the PyTorch reference"
    assert f"reference: {sentence}" in done.stdout
    assert f"RuntimeWarning: {sentence}" in done.stderr


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        ("", "dynquant-int8: CXX='' names no compiler; unset it"),
        ("  ", "dynquant-int8: CXX='  ' names no compiler; unset it"),
        (
            "{folder}/my tools/c++",
            "is a path with a space, which torch's build splits there; set CXX to a link",
        ),
        ("{folder}/no tools/c++", "no C++ compiler '{folder}/no' found"),
    ],
)
def test_a_compiler_that_cannot_be_run_is_a_sentence(compiler: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "my tools").mkdir()
    program = tmp_path / "my tools" / "c++"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib")],
        env={**os.environ, "CXX": compiler.format(folder=tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert sentence.format(folder=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
