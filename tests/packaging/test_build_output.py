"""A build prints one short line a compiled file; a failed one the whole command and its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from build_backend import nvcc, output
from tests.support.paths import ROOT

COMMAND = f"c++ -MMD -MF build/a.o.d -O3 -I'/a b' -c -c {ROOT}/csrc/torch/module.cpp -o build/a.o -std=c++20"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"[3/14] {COMMAND}\n", "[3/14] csrc/torch/module.cpp\n"),
        ("[3/14] nvcc -c '/else where/a.cu' -o a.o\n", "[3/14] /else where/a.cu\n"),
        ("[4/14] c++ a.o b.o -shared -o _C.so\n", "[4/14] c++ a.o b.o -shared -o _C.so\n"),
        ("[4/14] an odd ' quote -c a.cpp\n", "[4/14] an odd ' quote -c a.cpp\n"),
        ("a.cpp:1:2: error: expected ';'\n", "a.cpp:1:2: error: expected ';'\n"),
        (f"{COMMAND}\n", f"{COMMAND}\n"),  # what ninja prints after "FAILED:"
    ],
)
def test_lines_of_ninja(line: str, expected: str) -> None:
    assert output.shortened(line) == expected


def test_what_children_print_is_shortened() -> None:
    """torch lets ninja write to file descriptor 1, so that is where the lines are taken."""
    code = (
        "import os, subprocess; from build_backend.output import short_lines\n"
        "with short_lines():\n"
        "    print('before')\n"
        f"    subprocess.run(['echo', {f'[1/2] {COMMAND}'!r}])\n"
        "    os.write(1, b'without an end of line')\n"
        "print('\\nafter')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "before\n[1/2] csrc/torch/module.cpp\nwithout an end of line\nafter\n"


def test_cuda_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compiler, folder = tmp_path / "nvcc", tmp_path / "cuda"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho "a warning"; touch "$last"\n')
    compiler.chmod(0o755)
    folder.mkdir()
    (folder / "a.cu").touch()
    (folder / "b.cu").touch()
    toolkit = nvcc.Toolkit(str(compiler), (13, 0), frozenset((80,)), (), ())
    wanted = nvcc.architectures("8.0", toolkit.supported)
    nvcc.compile_objects(toolkit, folder, tmp_path / "objects", wanted, jobs=1)
    assert capfd.readouterr().out == f"[1/2] {folder}/a.cu\na warning\n[2/2] {folder}/b.cu\na warning\n"

    compiler.write_text("#!/bin/sh\necho 'a.cu: error' >&2; exit 1\n")
    os.utime(folder / "a.cu")
    with pytest.raises(SystemExit, match=r"nvcc could not compile .*a\.cu; its messages are above"):
        nvcc.compile_objects(toolkit, folder, tmp_path / "more", wanted, jobs=1)
    printed = capfd.readouterr().out
    assert printed.startswith(f"FAILED: {folder}/a.cu\n{compiler} -fmad=false")
    assert "a.cu: error\n" in printed
