"""Entries on their way from a stage to the suite: a JSON object a line, whole also if the stage is killed."""

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
    """The entries of a file from ``offset`` on, without a line in the making; and the next offset."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        whole = file.read().rpartition(b"\n")[0]
    if not whole:
        return [], offset
    return [json.loads(line) for line in whole.split(b"\n") if line], offset + len(whole) + 1


def is_bad(entry: Entry) -> bool:
    """Whether an entry tells of a wrong result or an error."""
    return bool(entry.get("faults") or entry.get("error"))


def short(error: BaseException) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]
