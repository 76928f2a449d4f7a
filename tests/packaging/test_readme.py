"""README: its examples run, its tables name every option and the versions that the build accepts."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynquant
from build_backend.torch_location import MINIMUM
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    _, _, rest = README.partition(f"# {title}\n")
    assert rest, f"README has no section {title!r}"
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.M)[0]


def examples() -> str:
    """All examples but those that name a model to download."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    return "\n".join(block for block in blocks if "transformers" not in block and "peft" not in block)


def test_the_examples_run_one_after_the_other(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch\n" + examples().replace(
        'run = torch.compile(int8, backend="dynquant")', 'run = torch.compile(int8, backend="eager")'
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_table_says_what_each_option_buys() -> None:
    table = section("What each option buys")
    rows = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")}
    named = set(re.findall(r"(\w+)=", " ".join(rows)))
    keywords = {
        name
        for name, parameter in inspect.signature(dynquant.quantize_dynamic).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords <= named
    for name in ("calibrate", "freeze", "torch.compile"):
        assert any(name in row for row in rows)


def test_the_versions_are_those_that_the_build_accepts() -> None:
    supported = section("What is supported")
    python = re.search(r'^requires-python = ">=(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"| torch | {MINIMUM[0]}.{MINIMUM[1]} or newer" in supported
    assert f"| Python | {python} or newer" in supported
    tested = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert f"Tested: {tested}, all tests" in supported
    for name in ("macOS, Windows", "transformers", "x86-64", "CUDA"):
        assert name in supported


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_prose_has_lines_of_120_columns(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
