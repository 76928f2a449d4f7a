"""The demo's tables (rich) and picture (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .encoder import VersionResult
from .regression import Regression


def _numbers(values: Tensor, form: str) -> str:
    """[N, K] or [N] as one line a row, each value in this format."""
    rows = values.tolist()
    rows = rows if isinstance(rows[0], list) else [[value] for value in rows]
    return "\n".join(" ".join(format(value, form) for value in row) for row in rows)


def show_regression(result: Regression, console: Console) -> None:
    """Two tables: the tensors of each layer, and the losses. At most 80 columns wide."""
    title = "Seed example: 3 → 3 → 1, weights of layers 0 and 2 after training and in int8"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "fp32", "torch.ao", "scale", "dynquant", "scale"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in result.layers:
        table.add_row(
            layer.name,
            _numbers(layer.weight, "7.4f"),
            _numbers(layer.torch_ao_int8, "4d"),
            f"{layer.torch_ao_scale:.5f}",
            _numbers(layer.weight_int8, "4d"),
            _numbers(layer.weight_scale, ".5f"),
            end_section=True,
        )
    console.print(table)
    for layer in result.layers:
        console.print(
            f"Layer {layer.name}, input of the first test row: scale {layer.input_scale:.6f}, "
            f"zero_point {layer.input_zero_point}."
        )

    losses = Table(title="Mean squared error on the test rows", box=box.SIMPLE_HEAD)
    losses.add_column("")
    losses.add_column("test loss", justify="right")
    losses.add_column("more than float", justify="right")
    for name, loss in result.losses.items():
        losses.add_row(name, f"{loss:.4f}", f"{loss - result.losses['float']:+.4f}")
    console.print(losses)


def label(name: str) -> str:
    """A version's name in tables and pictures: dynquant, per_token unless the name says otherwise."""
    return name.removeprefix("dynquant ").removeprefix("per_token, ")


def show_encoder(results: Sequence[VersionResult], console: Console, *, threads: int, sentences: int) -> None:
    """One row a version: latency and ratio for each workload, size, closeness to the first version. At most
    80 columns wide."""
    title = f"all-MiniLM-L6-v2, {sentences} sentences, {threads} thread{'s' if threads > 1 else ''}"
    caption = "batch x tokens: milliseconds a call and speed (fp32 = 1); cosine to fp32"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for workload in results[0].milliseconds:
        table.add_column(workload, justify="right", no_wrap=True)
    for heading in ("MB", "cosine\nlowest", "\nmean"):
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = results[0]
    for result in results:
        times = (
            f"{ms:.1f} {baseline.milliseconds[workload] / ms:.2f}x"
            for workload, ms in result.milliseconds.items()
        )
        table.add_row(
            label(result.name),
            *times,
            f"{result.megabytes:.0f}",
            f"{result.min_cosine:.4f}",
            f"{result.mean_cosine:.4f}",
        )
    console.print(table)


def plot_encoder(results: Sequence[VersionResult], path: Path) -> None:
    """PNG: how many times as fast as the first version, weight megabytes, distance to its embeddings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    speed, size, distance = figure.subplots(1, 3, width_ratios=(2.2, 1, 1))
    workloads = list(results[0].milliseconds)
    colors = [f"C{index}" for index in range(len(results))]

    width = 0.84 / len(results)
    for index, result in enumerate(results):
        ratios = [results[0].milliseconds[w] / result.milliseconds[w] for w in workloads]
        places = [place + (index - (len(results) - 1) / 2) * width for place in range(len(workloads))]
        bars = speed.bar(places, ratios, width, label=label(result.name), color=colors[index])
        speed.bar_label(bars, fmt="%.2f", fontsize=7)
    speed.set_xticks(range(len(workloads)), [f"{workload} tokens" for workload in workloads])
    speed.set_ylabel("speed, fp32 = 1")
    # Within the axes, above the bars: room for a line of the legend for every two versions.
    lines = math.ceil(len(results) / 2)
    speed.set_ylim(0, speed.get_ylim()[1] * (1 + 0.07 * lines))
    speed.legend(loc="upper left", ncols=2, fontsize=8)

    rows = range(len(results))
    size.barh(rows, [result.megabytes for result in results], color="lightgrey")
    size.barh(rows, [result.linear_megabytes for result in results], color=colors)
    size.set_xlabel("weights MB (colour: Linear layers)")

    # Without the first version: a logarithmic axis does not show its distance to itself, 0.
    for alpha, cosines in (
        (0.35, [result.min_cosine for result in results]),
        (1.0, [result.mean_cosine for result in results]),
    ):
        distances = [1 - cosine for cosine in cosines]
        distance.barh(rows[1:], distances[1:], color=colors[1:], alpha=alpha)
    distance.set_xlabel("1 - cosine to fp32\n(dark: mean, light: worst)")
    distance.set_xscale("log")
    for panel in (size, distance):
        panel.set_yticks([])
        panel.set_ylim(len(results) - 0.5, -0.5)

    figure.suptitle("all-MiniLM-L6-v2, dynamic int8")
    figure.savefig(path, dpi=120)
