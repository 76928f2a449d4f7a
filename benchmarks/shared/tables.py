"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Line breaks become spaces and pipes become slashes, so that each row stays one line."""
    cells = [[str(cell).replace("\n", " ").replace("|", "/") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, ["---"] * len(heads), *cells])
