"""The targets of a report, collected with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..shared.targets import Target

Results = dict[str, Any]


class TargetList:
    """Collects targets and gives each its verdict; some are stated for machines with AVX512-VNNI alone."""

    def __init__(self, results: Results) -> None:
        self.isas: Sequence[str] = results["machine"]["available_isas"]
        self.targets: list[Target] = []

    def add(
        self, number: str, name: str, goal: str, measured: str, met: bool | None, *, for_vnni: bool = False
    ) -> None:
        if met is None:
            verdict, measured = "not measured in this run", "-"
        elif for_vnni and "avx512vnni" not in self.isas:
            outcome = "met" if met else "missed"
            verdict = f"not measurable on this machine (no AVX512-VNNI; {outcome} by its own limits)"
        else:
            verdict = "met" if met else "missed"
        self.targets.append(Target(name, goal, measured, met, verdict, number))
