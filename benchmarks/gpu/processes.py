"""Stages as processes, each with a time limit, all within a budget; each entry is written to disk at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Entry, is_bad, new_entries

TAIL = 1500  # characters at the end of a stage's output, quoted by its failure
START_S = 150.0  # limit for the import of torch, slow from a cold disk
KILL_S = 5.0  # limit from SIGKILL to the end of a process; a driver can delay it


@dataclass(frozen=True)
class Stage:
    """A command to run as a process.

    Attributes:
        limit_s: time limit, from its entry "ready" or, if it writes no entries, from its start.
        writes: whether it writes entries.
        environment: variables in addition to the suite's.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    writes: bool = True
    environment: tuple[tuple[str, str], ...] = ()


class Running:
    """A started stage.

    Attributes:
        outcome: None while it runs; then {"stage", "status": "ok" | "failed" | "timed out" | "left out",
            "reason", "seconds", "ready_s"}.
    """

    def __init__(self, stage: Stage, folder: Path, number: int) -> None:
        self.stage = stage
        stem = f"{number:02}-{stage.name.replace(' ', '-').replace('/', '-')}"
        self.log, self.entries = folder / f"{stem}.log", folder / f"{stem}.jsonl"
        self.start = time.monotonic()
        self.ready: float | None = None if stage.writes else self.start
        self.offset = 0
        self.outcome: dict[str, Any] | None = None
        entries = ["--entries", str(self.entries)] if stage.writes else []
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*stage.command, *entries],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | dict(stage.environment),
                start_new_session=True,  # its children are killed with it
            )

    def poll(self, deadline: float) -> list[Entry]:
        """New entries. Sets ``outcome`` once the stage has ended or is over its limit."""
        code, now = self.process.poll(), time.monotonic()
        found, self.offset = new_entries(self.entries, self.offset)
        if self.ready is None and any(entry["kind"] == "ready" for entry in found):
            self.ready = now
        limit = self.start + START_S if self.ready is None else self.ready + self.stage.limit_s
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._end("ok" if code == 0 else "failed", "" if code == 0 else f"it ended with {how}")
        elif now > min(limit, deadline):
            where = "" if self.ready else ", before it had imported torch and reached the card"
            self._end("timed out", f"stopped after {now - self.start:.0f} s{where}")
        return [entry | {"stage": self.stage.name} for entry in found if entry["kind"] != "ready"]

    def stop(self) -> None:
        """Kill the process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_S)

    def _end(self, status: str, reason: str) -> None:
        self.stop()
        tail = self.log.read_text(errors="replace").strip()[-TAIL:] or "(nothing)"
        ready_s = None if self.ready is None else round(self.ready - self.start, 1)
        self.outcome = {
            "stage": self.stage.name,
            "status": status,
            "reason": f"{reason}; its output ends: {tail}" if reason else "",
            "seconds": round(time.monotonic() - self.start, 1),
            "ready_s": ready_s,
        }


class Runner:
    """Runs stages, collects their entries, keeps OUT/STEM.json and OUT/logs.tar.gz up to date.

    Attributes:
        results: {"stages": [outcome], "entries": [entry with its stage], further keys of the caller}.
    """

    def __init__(self, out: Path, stem: str, budget_s: float, head: dict[str, Any]) -> None:
        self._start = time.monotonic()
        self.deadline = self._start + budget_s
        self._file, self._logs = out / f"{stem}.json", out / "logs.tar.gz"
        out.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="gpu_suite_"))
        self._running: list[Running] = []
        self._number = 0
        self.results: dict[str, Any] = head | {"seconds": 0.0, "stages": [], "entries": []}
        self.flush()

    @property
    def is_good(self) -> bool:
        stages, entries = self.results["stages"], self.results["entries"]
        return all(stage["status"] == "ok" for stage in stages) and not any(map(is_bad, entries))

    def run(self, stages: Sequence[Stage], at_once: int = 1) -> None:
        """Run all stages, at most ``at_once`` at a time."""
        waiting, alive = list(stages), list[Running]()
        while waiting or alive:
            while waiting and len(alive) < at_once and time.monotonic() < self.deadline:
                alive.append(self.start(waiting.pop(0)))
            if not alive:
                stage = waiting.pop(0)
                self._note({"stage": stage.name, "status": "left out", "reason": "the budget is used up"})
                continue
            self._pump()
            alive = [running for running in alive if running.outcome is None]

    def start(self, stage: Stage) -> Running:
        """Start a stage without waiting for it."""
        self._number += 1
        running = Running(stage, self._folder, self._number)
        self._running.append(running)
        return running

    def wait(self, running: Running) -> bool:
        """Wait for the end of a started stage; whether it succeeded."""
        while running.outcome is None:
            self._pump()
        return running.outcome["status"] == "ok"

    def flush(self) -> None:
        """Replace the result file; a reader never sees half of it."""
        self.results["seconds"] = round(time.monotonic() - self._start, 1)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(part, self._file)

    def close(self) -> None:
        """Stop the running stages, write everything, remove the temporary folder."""
        for running in self._running:
            if running.outcome is None:
                running.stop()
                reason = "stopped with the suite"
                self._note({"stage": running.stage.name, "status": "timed out", "reason": reason})
        self.flush()
        self._archive()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _pump(self) -> None:
        """Poll every process once, then sleep briefly."""
        changed = False
        for running in self._running:
            if running.outcome is None:
                found = running.poll(self.deadline)
                self.results["entries"] += found
                changed |= bool(found)
                if running.outcome is not None:
                    self._note(running.outcome)
        if changed:
            self.flush()
        time.sleep(0.05)

    def _note(self, outcome: dict[str, Any]) -> None:
        self.results["stages"].append(outcome)
        reason = outcome["reason"].split("; its output")[0]
        bad = sum(is_bad(entry) for entry in self.results["entries"] if entry["stage"] == outcome["stage"])
        line = f"{outcome['stage']}: {outcome['status']}, {outcome.get('seconds', 0):.0f} s"
        print(f"{line}{f', {bad} bad entries' if bad else ''}{f': {reason}' if reason else ''}", flush=True)
        self.flush()
        self._archive()

    def _archive(self) -> None:
        part = self._logs.with_suffix(".part")
        with tarfile.open(part, "w:gz") as archive:
            for log in sorted(self._folder.glob("*.log")):
                archive.add(log, log.name)
        os.replace(part, self._logs)
