"""Picture of a result: speed against each row's best int8 baseline, and fraction of the machine's limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..shared.pictures import new_picture, save
from .baselines import INT8_BASELINES, OURS
from .linear import best_of, times


def plot(results: dict[str, Any], path: Path) -> None:
    """The section "linear", a column of two panels per thread count; PNG, or the format of the suffix."""
    rows = results["linear"]
    counts = sorted({row["threads"] for row in rows})
    figure = new_picture(9 * len(counts), 8)
    panels = figure.subplots(2, len(counts), squeeze=False)
    for column, threads in enumerate(counts):
        speed, fraction = panels[0][column], panels[1][column]
        chosen = [row for row in rows if row["threads"] == threads and best_of(row, list(OURS))]
        labels = [f"{row['M']}, {row['K']}, {row['N']}" for row in chosen]
        positions = range(len(chosen))
        for name in ("fp32", *INT8_BASELINES, *OURS):
            ratios = []
            for row in chosen:
                best, us = (
                    best_of(row, list(INT8_BASELINES)) or best_of(row, list(OURS)),
                    times(row).get(name),
                )
                ratios.append(best[1] / us if best and us else float("nan"))
            ours = name in OURS
            speed.plot(positions, ratios, "o-" if ours else "x", label=name, zorder=3 if ours else 2)
        speed.axhline(1, color="grey", linewidth=0.8)
        speed.set_yscale("log")
        speed.set_title(f"{threads} thread{'s' if threads > 1 else ''}")
        speed.set_ylabel("speed, best int8 baseline of the row = 1")
        speed.legend(fontsize=8)
        for index, name in enumerate(OURS):
            values = [max(row["fractions"].get(name, {}).values(), default=0.0) for row in chosen]
            fraction.bar([position + (index - 0.5) * 0.4 for position in positions], values, 0.4, label=name)
        fraction.set_ylim(0, 1.05)
        fraction.set_ylabel("fraction of the nearer limit (int8 peak or weight read)")
        fraction.legend(fontsize=8, loc="lower right")
        for panel in (speed, fraction):
            panel.set_xticks(list(positions), labels, rotation=45, ha="right", fontsize=8)
    machine = results["machine"]
    torch_version = machine["versions"].get("torch", "?")
    title = f"{machine['cpu']}, {machine['isa']}, torch {torch_version}, {machine['date']}"
    save(figure, title, path)
