"""Rules for imports within the repository."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.paths import TESTS


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
