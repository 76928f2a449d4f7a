"""The main job on real input: a small net trained on the spot, and a real sentence encoder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..measurement.timing import keep_freed_memory
from . import encoder, regression
from .sentences import SENTENCES

if TYPE_CHECKING:
    from rich.console import Console


def run(
    png: Path, *, threads: int | None = None, every_version: bool = False, console: Console | None = None
) -> None:
    """Run both parts, print their tables and draw ``png``.

    Args:
        png: where the picture goes.
        threads: torch's by default.
        every_version: whether the encoder runs in all of its versions, or in those of
            :data:`dynquant.demo.encoder.SHORT_LIST`.
        console: stdout by default.

    Raises:
        ModuleNotFoundError: after the first part, if a package of the second is not installed.
    """
    from rich.console import Console

    from . import show

    if console is None:
        console = Console()
        if not console.is_terminal:  # a log has no window width
            console.width = 80
    keep_freed_memory()
    show.show_regression(regression.run(), console)
    importlib.import_module("matplotlib")  # fails before the minutes of timing, not after
    versions = encoder.VERSIONS
    if not every_version:
        versions = {name: versions[name] for name in encoder.SHORT_LIST}
    threads = threads or torch.get_num_threads()
    with console.status("Embedding and timing with all-MiniLM-L6-v2 (a minute or two) ..."):
        results = encoder.run(versions=versions, threads=threads)
    show.show_encoder(results, console, threads=threads, sentences=len(SENTENCES))
    show.plot_encoder(results, png)
    console.print(f"Picture: {png}")
