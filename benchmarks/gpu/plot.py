"""The picture of a result: what was measured against each target, products, few rows, layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import Figure, Results, of_stage, speed


def plot(results: Results, figures: Sequence[Figure], path: Path) -> None:
    """PNG, or what the suffix says.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(16, 11), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(2, 2)
    _targets(panels[0][0], figures)
    _products(panels[0][1], results)
    _small(panels[1][0], results)
    _layers(panels[1][1], results)
    header = results["header"]
    picture.suptitle(f"{header['device']}, torch {header['torch']}, CUDA {header['cuda']}, {header['date']}")
    picture.savefig(path, dpi=110)


def _targets(panel: Any, figures: Sequence[Figure]) -> None:
    measured = [figure for figure in figures if figure.ratio is not None][::-1]
    values = [figure.ratio for figure in measured]
    colours = ["tab:green" if figure.verdict == "met" else "tab:red" for figure in measured]
    panel.barh(range(len(measured)), values, color=colours)
    labels = [f"{figure.number} {figure.what[:60]}" for figure in measured]
    panel.set_yticks(range(len(measured)), labels, fontsize=7)
    panel.axvline(1, color="grey", linewidth=0.8)
    panel.set_title("measured against the target (1 and more: met)")


def _products(panel: Any, results: Results) -> None:
    bars = [
        (f"{name}, {entry['M']}³", contender["tops"], name == "dynquant")
        for entry in of_stage(results, "kernels", "large_product")
        for name, contender in entry["contenders"].items()
        if "tops" in contender
    ][::-1]
    colours = ["tab:blue" if ours else "silver" for _, _, ours in bars]
    panel.barh(range(len(bars)), [tops for _, tops, _ in bars], color=colours)
    panel.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=7)
    panel.set_title("large products, TOPS (ours with its epilogue)")


def _small(panel: Any, results: Results) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in of_stage(results, "kernels", "small_product"):
        lines.setdefault(f"N, K = {entry['N']}, {entry['K']}", []).append((entry["M"], entry["of_limit"]))
    for label, points in lines.items():
        panel.plot([m for m, _ in points], [value for _, value in points], "o-", label=label)
    panel.axhline(1.3, color="grey", linewidth=0.8)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("M")
    panel.set_title("few rows: time against weight bytes / copy bandwidth")
    if lines:
        panel.legend(fontsize=8)


def _layers(panel: Any, results: Results) -> None:
    entries = of_stage(results, "kernels", "layer")
    places = range(len(entries))
    for offset, name in ((-0.2, "per_token"), (0.2, "per_tensor")):
        values = [speed(entry, name) or 0.0 for entry in entries]
        panel.bar([place + offset for place in places], values, 0.4, label=name)
    labels = [f"{entry['M']}, {entry['N']}, {entry['K']}" for entry in entries]
    panel.set_xticks(list(places), labels, rotation=60, ha="right", fontsize=7)
    panel.axhline(1, color="grey", linewidth=0.8)
    panel.set_title("whole layers: speed, bf16 nn.Linear = 1 (M, N, K)")
    if entries:
        panel.legend(fontsize=8)
