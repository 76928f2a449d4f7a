"""Entries that a stage passes to the suite: one JSON object per line, readable after a kill too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
BASELINE = "bf16 linear"  # of layers, GEMMs and forwards


class Recorder:
    """Appends entries to a stage's file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def add(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, **fields})
        self._file.write(line + "\n")
        self._file.flush()
        print(line[:2000], flush=True)


def new_entries(path: Path, offset: int) -> tuple[list[Entry], int]:
    """The complete lines of a file from ``offset`` on, as entries, and the next offset."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        complete = file.read().rpartition(b"\n")[0]
    if not complete:
        return [], offset
    return [json.loads(line) for line in complete.split(b"\n") if line], offset + len(complete) + 1


def is_bad(entry: Entry) -> bool:
    """Whether an entry reports a wrong result or an error."""
    return bool(entry.get("faults") or entry.get("error"))


def short(error: BaseException) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]
