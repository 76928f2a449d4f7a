"""Rules for imports within the repository."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import CSRC, ROOT, TESTS

# Rooms of dynquant/ from top to bottom, as docs/map.md has them: a file imports its own room and lower ones.
ROOMS = (
    {"__main__"},
    {"command_line"},
    {"demo"},
    {"__init__"},
    {"_saved_names"},
    {"quantize"},
    {"measurement"},
    {"conversion", "fusion", "calibration"},
    {"checkpoint"},
    {"nn"},
    {"qtensor", "ops"},
    {"reference", "traced_reads"},
    {"environment", "after_import", "own_thread", "freed_memory"},
    {"config"},
    {"patterns", "_extension", "_version", "extras", "progress"},
    {"_interface"},
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
PACKAGE = ROOT / "dynquant"


def imported(path: Path) -> set[str]:
    """Every part of the dotted names that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return names


def test_no_test_file_is_imported_by_another() -> None:
    """Shared code has modules of its own in tests/support."""
    assert "nets" in imported(TESTS / "conversion" / "test_convert.py")
    test_files = {path.stem for path in TESTS.rglob("test_*.py")}
    found = {path.name: names for path in TESTS.rglob("*.py") if (names := imported(path) & test_files)}
    assert not found


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of dynquant that a file of dynquant imports, as paths within the package."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            module = node.module.split(".") if node.module else []
            names = [("dynquant", *above, *module, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(*str(node.module).split("."), alias.name) for alias in node.names]
        yield from (name[1:] or ("__init__",) for name in names if name[0] == "dynquant")


def test_imports_run_down() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in files} == LEVEL.keys()
    up = []
    for path in files:
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for target in imports(path):
            # `from . import __version__` and the like name something of the package itself.
            other = target[0] if target[0] in LEVEL else "__init__"
            if other != room and LEVEL[other] <= LEVEL[room]:
                up.append(f"{path.relative_to(ROOT)} imports {'.'.join(target)}")
    assert not up


def test_the_kernel_library_knows_no_torch() -> None:
    """Nor do its CPU and CUDA parts know each other, and its headers know neither."""
    forbidden = {
        "cpu": r"torch/|ATen|c10/|pybind11|Python\.h|cuda",
        "cuda": r"torch/|ATen|c10/|pybind11|Python\.h|cpu/",
        "": r"torch/|ATen|c10/|pybind11|Python\.h|cuda|cpu/",
    }
    kernels = CSRC / "kernels"
    files = [path for path in kernels.rglob("*.*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 40
    found = []
    for path in files:
        part = path.relative_to(kernels).parts[0]
        for included in re.findall(r'^#include [<"]([^>"]+)', path.read_text(), re.MULTILINE):
            if re.search(forbidden.get(part, forbidden[""]), included):
                found.append(f"{path.relative_to(ROOT)} includes {included}")
    assert not found


CODE = [
    path
    for folder in ("dynquant", "csrc", "benchmarks", "build_backend", "docs")
    for path in sorted((ROOT / folder).rglob("*.*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and "results" not in path.parts
]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 110], "lines over 110 columns"
    assert len(lines) <= 500
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented else node.body
            if body:
                assert body[-1].end_lineno - body[0].lineno < 70, node.name


def test_no_function_hides_a_module() -> None:
    """An attribute of a package that has a module's name is that module; `dynquant.reference` names ops."""
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")} - {PACKAGE / "reference"}
    hidden = []
    for folder in packages:
        dotted = ".".join(("dynquant", *folder.relative_to(PACKAGE).parts))
        package = importlib.import_module(dotted)
        modules = [*folder.glob("*.py"), *(path.parent for path in folder.glob("*/__init__.py"))]
        names = {path.stem for path in modules} - {"__init__"}
        hidden += [
            f"{dotted}.{name}"
            for name in names & vars(package).keys()
            if not isinstance(getattr(package, name), ModuleType)
        ]
    assert not hidden
