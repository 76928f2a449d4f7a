"""Who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_no_test_file_is_imported_by_another() -> None:
    """What several need is in a module of its own: nets.py, isas.py, reporting.py, same_bits.py ..."""
    assert "nets" in imported(TESTS / "test_convert.py")
    test_files = {path.stem for path in TESTS.rglob("test_*.py")}
    found = {path.name: names for path in TESTS.rglob("*.py") if (names := imported(path) & test_files)}
    assert not found
