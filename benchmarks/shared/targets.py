"""A target of the project beside its measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        goal: the required value, with its comparison sign.
        measured: the value that decides, with the row that gave it.
        met: None where no row for it was measured.
        verdict: ``met`` in the words of the report.
        number: groups targets in a report.
    """

    name: str
    goal: str
    measured: str
    met: bool | None
    verdict: str
    number: str = ""
