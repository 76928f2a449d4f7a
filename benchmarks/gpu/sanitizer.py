"""compute-sanitizer's four tools over the program in sanitized.py."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .environment import ROOT, find_tool
from .stages import Recorder

TOOLS = ("memcheck", "synccheck", "racecheck", "initcheck")
SHOWN = 3000  # characters of the reports


def run(record: Recorder, seconds: float) -> None:
    """Each tool for an equal share of what is left of ``seconds``."""
    program = find_tool("compute-sanitizer")
    if program is None:
        record.set("tool", None)
        return
    record.set("tool", _version(program))
    command = [sys.executable, "-m", "benchmarks.gpu.sanitized"]
    deadline = time.monotonic() + seconds
    for i, tool in enumerate(TOOLS):
        share = (deadline - time.monotonic()) / (len(TOOLS) - i)
        record.add("tools", {"name": tool} | one_tool(program, tool, command, max(share, 1.0)))


def one_tool(program: str, tool: str, command: list[str], limit_s: float) -> dict[str, Any]:
    """{"reports": number or None where none could be read, "status", "seconds", "text": the first
    reports}."""
    # The caching allocator would hand out pieces of one block, whose ends the tools cannot see.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [program, "--tool", tool, "--print-limit", "20", *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(limit_s)
            status = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {limit_s:.0f} s"
            kill_with_descendants(process)
        output.seek(0)
        text = output.read()
    reports = count_reports(text) if not status.startswith("stopped") else None
    shown = "" if reports == 0 and status == "ok" else text[-SHOWN:]
    return {
        "reports": reports,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "text": shown,
    }


def kill_with_descendants(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started: the tool's own child holds the card."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = [process.pid]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def count_reports(text: str) -> int | None:
    """The number in the summary line of a tool; None where there is no such line."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", text) or re.search(
        r"RACECHECK SUMMARY: (\d+) hazards? displayed", text
    )
    return int(found[1]) if found else None


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    found = re.search(r"Version \S+", done.stdout)
    return found[0] if found else program
