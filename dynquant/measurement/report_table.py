"""The tables of a Report, by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..extras import needs
from .report_text import arrow_text, cosine_text, decibel_text, rows_text, speed_text

if TYPE_CHECKING:
    from rich.table import Table

    from .report_data import Report

NOT_REACHED = "not reached by the sample"


def layer_table(report: Report) -> Table:
    """:meth:`Report.table`."""
    with needs("Report.table", extra="report"):
        from rich.markup import escape
        from rich.table import Table
    common = [
        word
        for word in (report.layers[0].scheme if report.layers else ())
        if all(word in layer.scheme for layer in report.layers)
    ]
    title = report.summary()
    if common:
        title += f"\nall layers: {', '.join(common)}"
    table = Table(title=escape(title), caption=escape(report.conditions()))
    table.add_column("layer", overflow="fold")
    for heading in ("N x K", "scheme", "calls", "M", "kB", "SQNR dB", "cosine", "µs", "speed"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for layer in report.layers:
        table.add_row(
            escape(layer.name or "(the model)"),
            layer.shape,
            ", ".join(word for word in layer.scheme if word not in common),
            str(layer.calls),
            rows_text(layer.rows) if layer.calls else NOT_REACHED,
            f"{layer.bytes_float / 1e3:.1f} → {layer.bytes_int8 / 1e3:.1f}",
            decibel_text(layer.sqnr_db),
            cosine_text(layer.cosine),
            arrow_text(layer.us_float, layer.us_int8),
            speed_text(layer.speedup),
        )
    if all(word in common for layer in report.layers for word in layer.scheme):
        table.columns = [column for column in table.columns if column.header != "scheme"]
    return table


def attention_table(report: Report) -> Table:
    """:meth:`Report.attention_table`."""
    with needs("Report.attention_table", extra="report"):
        from rich.markup import escape
        from rich.table import Table
    table = Table(title="int8 attention, beside torch's")
    table.add_column("module", overflow="fold")
    for heading in ("B, H, S, S_kv, D", "calls", "SQNR dB", "cosine", "µs", "speed"):
        table.add_column(heading, justify="right")
    for entry in report.attention:
        more = f" and {len(entry.shapes) - 1} more" if len(entry.shapes) > 1 else ""
        table.add_row(
            escape(entry.name or "(the model)"),
            ", ".join(map(str, entry.shapes[0])) + more,
            str(entry.calls),
            decibel_text(entry.sqnr_db),
            cosine_text(entry.cosine),
            arrow_text(entry.us_float, entry.us_int8),
            speed_text(entry.speedup),
        )
    return table


def skipped_table(report: Report) -> Table:
    """:meth:`Report.skipped_table`."""
    with needs("Report.skipped_table", extra="report"):
        from rich.markup import escape
        from rich.table import Table
    table = Table(title="Left float")
    for heading in ("layer", "type", "kB", "why"):
        table.add_column(heading, justify="right" if heading == "kB" else "left", overflow="fold")
    for layer in report.skipped:
        name = escape(layer.name or "(the model)")
        table.add_row(name, layer.type, f"{layer.bytes / 1e3:.1f}", escape(layer.reason))
    return table
