"""Picture of the section "encoder": speeds of the versions, parts of one forward beside their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..shared.pictures import new_picture, save

_COLORS = {"linear": "#4C72B0", "attention": "#DD8452", "norms, residuals": "#55A868", "rest": "#8C8C8C"}


def plot(results: dict[str, Any], path: Path) -> None:
    """A row of two panels for each model; PNG, or the format of the suffix."""
    models = results["encoder"]["models"]
    figure = new_picture(17, 4.5 * len(models))
    panels = figure.subplots(len(models), 2, squeeze=False)
    for (times, parts), model in zip(panels, models, strict=True):
        _plot_times(times, model)
        _plot_breakdown(parts, model)
    machine = results["machine"]
    torch_version = machine["versions"].get("torch", "?")
    title = f"{machine['cpu']}, {machine['isa']}, torch {torch_version}, {machine['date']}"
    save(figure, title, path)


def _plot_times(panel: Any, model: dict[str, Any]) -> None:
    """Speed of each version by workload, fp32 being 1."""
    threads, found = next(iter(model["threads"].items()))
    times = found["milliseconds"]
    workloads = list(times["fp32"])
    width = 0.8 / len(times)
    for index, (name, by_workload) in enumerate(times.items()):
        speeds = [times["fp32"][workload] / by_workload[workload] for workload in workloads]
        places = [place + index * width for place in range(len(workloads))]
        hatch = "" if name.startswith("dynquant") else "//"
        panel.bar(places, speeds, width, label=name, hatch=hatch, edgecolor="white", linewidth=0.3)
    panel.set_xticks([place + 0.4 for place in range(len(workloads))], workloads, fontsize=8)
    panel.set_ylabel("speed, fp32 = 1")
    panel.set_title(f"{model['name']}, {threads} thread{'s' if threads != '1' else ''}")
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _plot_breakdown(panel: Any, model: dict[str, Any]) -> None:
    """Two bars: one forward by group, and its products at the int8 limit."""
    found = model["breakdown"]
    for place, key in ((1, "ms"), (0, "limit_ms")):
        left = 0.0
        for name, group in found["groups"].items():
            ms = group[key]
            if ms:
                panel.barh(place, ms, left=left, color=_COLORS[name], label=name if key == "ms" else None)
                panel.text(left + ms / 2, place, f"{ms:.1f}", ha="center", va="center", fontsize=8)
                left += ms
    panel.set_yticks([0, 1], ["products at the\nint8 limit", "measured"])
    panel.set_xlabel("ms")
    panel.set_title(f"one forward, {found['workload']}, fused, rotated, 1 thread")
    panel.legend(fontsize=8)
