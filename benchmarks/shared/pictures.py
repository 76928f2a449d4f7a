"""Pictures of results, drawn without a display. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_picture(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def save(picture: Figure, title: str, path: Path) -> None:
    """PNG, or the format of the path's suffix."""
    picture.suptitle(title)
    picture.savefig(path, dpi=110)
