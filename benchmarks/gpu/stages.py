"""Stages as processes: each with a time limit, all within a budget, results written after each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL = 4000  # characters of a stage's output that a failure quotes
GRACE_S = 3.0  # from SIGTERM to SIGKILL
KILL_S = 10.0  # from SIGKILL to the end, which a driver can hold up
LEAST_S = 2.0  # with less than this left a stage is not started


@dataclass(frozen=True)
class Stage:
    """A process of its own.

    Attributes:
        command: run with two more words, ``--results FILE``: a JSON object that the stage may write as it
            goes.
        limit_s: seconds after which it is stopped; what it has written counts all the same.
        needs: stages without whose success it is not run.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()


Outcome = dict[str, Any]


def run(
    stages: Sequence[Stage],
    *,
    budget_s: float,
    folder: Path,
    environment: dict[str, str],
    cwd: Path,
    flush: Callable[[dict[str, Outcome]], None],
    tell: Callable[[str], None],
) -> dict[str, Outcome]:
    """Run the stages one after the other.

    Args:
        budget_s: for all of them together; a stage gets its limit or what is left, whichever is less.
        folder: for each stage's results and output, ``NAME.json`` and ``NAME.log``.
        flush: hears all outcomes so far after each stage.

    Returns:
        {name: {"status": "ok" | "failed" | "timed out" | "left out", "reason": sentence or "", "seconds",
        "limit_s", "results": what the stage wrote}}
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_s
    outcomes: dict[str, Outcome] = {}
    for stage in stages:
        unmet = [name for name in stage.needs if outcomes.get(name, {}).get("status", "ok") != "ok"]
        left_s = deadline - time.monotonic()
        if unmet:
            outcome = _left_out(stage, f"it needs the stage {unmet[0]!r}, which did not succeed")
        elif left_s < LEAST_S:
            outcome = _left_out(stage, f"the {budget_s:.0f} s for all stages are used up")
        else:
            tell(f"{stage.name}: at most {min(stage.limit_s, left_s):.0f} s")
            outcome = _run_one(stage, min(stage.limit_s, left_s), folder, environment, cwd)
        outcomes[stage.name] = outcome
        reason = f": {outcome['reason']}" if outcome["reason"] else ""
        tell(f"{stage.name}: {outcome['status']} after {outcome['seconds']:.0f} s{reason}")
        flush(outcomes)
    return outcomes


def _left_out(stage: Stage, reason: str) -> Outcome:
    return {
        "status": "left out",
        "reason": reason,
        "seconds": 0.0,
        "limit_s": stage.limit_s,
        "results": {},
    }


def _run_one(stage: Stage, limit_s: float, folder: Path, environment: dict[str, str], cwd: Path) -> Outcome:
    results, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    results.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*stage.command, "--results", str(results)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=cwd,
            start_new_session=True,  # so that what it starts can be stopped with it
        )
        status, reason = "ok", ""
        try:
            code = process.wait(limit_s)
            if code != 0:
                status = "failed"
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                reason = f"it ended with {how}; its output ends: {_tail(log)}"
        except subprocess.TimeoutExpired:
            status, reason = "timed out", f"stopped at its limit of {limit_s:.0f} s"
        finally:
            _stop(process)
    return {
        "status": status,
        "reason": reason,
        "seconds": round(time.monotonic() - start, 1),
        "limit_s": stage.limit_s,
        "results": read_results(results),
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything of its group that still runs; the next stage has the card to itself."""
    for sign, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILL_S)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    end = time.monotonic() + KILL_S
    while _runs(process.pid) and time.monotonic() < end:
        time.sleep(0.01)


def _runs(group: int) -> bool:
    """Whether a process of a group still runs; one that has ended may wait to be reaped by another."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent, group.
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-TAIL:] or "(nothing)"


def read_results(path: Path) -> dict[str, Any]:
    """What a stage has written, empty where that is nothing."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


class Recorder:
    """A stage's results on their way to its file: sections, each a list of entries, written after every
    entry."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Any] = {}

    def add(self, section: str, entry: dict[str, Any]) -> None:
        self.results.setdefault(section, []).append(entry)
        self._write()
        print(f"{section}: {json.dumps(entry)}", flush=True)

    def set(self, name: str, value: Any) -> None:
        self.results[name] = value
        self._write()

    def _write(self) -> None:
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(draft, self._path)  # whoever stops this process finds whole entries
