"""The setting of a stage: its device, its record of entries, its libraries."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .correctness import Judge
from .probe import Probe
from .results import Recorder, short


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        probes: libraries of single kernels; the first is the product, the others are timed beside it.
        small: small sizes, to rehearse the code without a result.
        seed: of the random generator, which each entry resets.
        tile: the tile to judge. distrusted: tiles that hung or crashed in an earlier stage and are skipped.
    """

    record: Recorder
    device: torch.device
    probes: tuple[Path, ...] = ()
    small: bool = False
    seed: int = 0
    tile: str = ""
    distrusted: tuple[str, ...] = ()

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"

    def probe(self) -> Probe:
        return Probe(self.probes[0])

    def judge(self, case: str, shape: list[int], check: Callable[[Judge], None]) -> None:
        """An entry of compared cases, with the exception that ``check`` raises, if any."""
        judge, start = Judge(), time.monotonic()
        error = self._try(lambda: check(judge))
        self.record.add(
            "judged",
            what=case,
            shape=shape,
            cases=judge.cases,
            faults=judge.faults,
            first_faults=judge.first_faults,
            error=error,
            seconds=round(time.monotonic() - start, 2),
        )
        self._end_if_dead()

    def time(self, kind: str, named: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """An entry with the result of ``measure`` or its exception."""
        result: dict[str, Any] = {}
        error = self._try(lambda: result.update(measure()))
        self.record.add(kind, **named, **result, error=error)
        self._end_if_dead()

    def _try(self, body: Callable[[], object]) -> str:
        """The exception of ``body`` in one line; empty without one."""
        torch.manual_seed(self.seed)
        try:
            body()
            if self.on_card:
                torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exc()
            return short(error)
        return ""

    def _end_if_dead(self) -> None:
        """After a fault on the card every later call of this process fails too.

        Raises:
            SystemExit: the card no longer answers.
        """
        if self.on_card:
            try:
                torch.cuda.synchronize()
                torch.zeros(1, device=self.device).item()
            except Exception as dead:
                raise SystemExit(f"the card no longer answers in this process: {short(dead)}") from dead
