"""What a build prints: one short line a compiled file; after an error also the whole command."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shortened(line: str) -> str:
    """A line of ``ninja -v``: "[3/14] csrc/torch/module.cpp" for "[3/14] c++ ... -c FILE -o ...".

    Other lines (messages of the compiler, the command after "FAILED:") stay as they are.
    """
    match = re.match(r"(\[\d+/\d+\]) (.*)", line)
    if match is None:
        return line
    try:
        words = shlex.split(match[2])
    except ValueError:
        return line
    sources = [word for flag, word in itertools.pairwise(words) if flag == "-c" and word != "-c"]
    return f"{match[1]} {in_repository(Path(sources[-1]))}\n" if sources else line


def in_repository(path: Path) -> str:
    """The path as seen from the repository's root, where it lies in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


@contextlib.contextmanager
def short_lines() -> Iterator[None]:
    """Shortens what this process and its children (torch has ninja print commands) write to descriptor 1."""
    sys.stdout.flush()
    original = os.dup(1)
    source, sink = os.pipe()
    os.dup2(sink, 1)
    os.close(sink)

    def pass_on() -> None:
        with os.fdopen(source, errors="replace") as lines, os.fdopen(original, "w", closefd=False) as out:
            for line in lines:
                out.write(shortened(line))
                out.flush()

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(original, 1)
        reader.join(timeout=10)  # a compiler's daemon may hold the pipe open
        os.close(original)
