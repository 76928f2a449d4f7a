"""Figures of a report as text."""

from __future__ import annotations

from collections.abc import Sequence


def number_text(value: float) -> str:
    """At least three figures."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def size_text(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def decibel_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def cosine_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def arrow_text(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{number_text(before)} → {number_text(after)}"


def speed_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x" if value >= 1 else f"[red]{value:.2f}x[/red]"


def rows_text(rows: Sequence[int]) -> str:
    """The M of a layer's inputs: up to three of them, or the smallest and the largest."""
    if len(rows) <= 3:
        return ", ".join(map(str, rows))
    return f"{rows[0]} ... {rows[-1]}"
