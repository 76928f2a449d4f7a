"""A progress bar for loops of more than a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def layer_bar(description: str, total: int) -> Iterator[Callable[[], object]]:
    """Yields a function to call after each of ``total`` layers. Silent if tqdm is not installed."""
    try:
        from tqdm import tqdm  # here, so that import dynquant imports torch alone
    except ModuleNotFoundError:
        tqdm = None
    if tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc=description, unit="layer", delay=1) as bar:
        yield bar.update
