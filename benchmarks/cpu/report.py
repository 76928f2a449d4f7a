"""Results as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shared.tables import table
from ..shared.targets import Target
from . import recurrent
from .baselines import INT8_BASELINES, OURS
from .encoder_report import attention_text, encoder_text
from .linear import best_of, times

Results = dict[str, Any]


def write_json(results: Results, path: Path) -> None:
    """All results, unchanged."""
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def _us(value: float | None) -> str:
    """Three or four digits."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def markdown(results: Results, targets: Sequence[Target]) -> str:
    """The whole report, without the sections that were not run."""
    parts = [_head(results), _targets(targets)]
    if results.get("linear"):
        parts.append("## One linear layer\n")
        parts += [_linear(results["linear"], threads) for threads in _threads(results["linear"])]
        parts.append(_errors(results["linear"]))
    if results.get("avx2"):
        parts.append("## Forced to AVX2\n")
        parts += [_linear(results["avx2"], threads) for threads in _threads(results["avx2"])]
    if results.get("option_cost"):
        parts.append(_option_cost(results["option_cost"]))
    if results.get("kernels"):
        parts.append(_kernels(results["kernels"]))
    if results.get("memory"):
        parts.append(_memory(results["memory"]))
    if results.get("attention"):
        parts.append(attention_text(results["attention"]))
    if results.get("recurrent"):
        parts.append(recurrent.text(results["recurrent"]))
    if results.get("encoder"):
        parts.append(encoder_text(results["encoder"]))
    if results.get("contention"):
        parts.append(_contention(results["contention"]))
    return "\n".join(parts)


def _head(results: Results) -> str:
    machine = results["machine"]
    caches = ", ".join(f"{level} {size} KB" for level, size in machine["caches_kb"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# {machine['cpu']}, {machine['isa']}, torch {machine['versions'].get('torch', '?')}\n",
        f"- {machine['date']}, {machine['cores']} cores, load {machine['load_average']} before the start",
        f"- CPU family {machine['cpu_family']} model {machine['cpu_model']}, {caches}; "
        f"flags: {', '.join(machine['flags']) or '-'}",
        f"- dynquant {machine['dynquant']} on {machine['isa']} ({machine['dynquant_status']}); {versions}; "
        f"Python {machine['python']}",
        f"- `{results['command']}`",
    ]
    for threads, peaks in results.get("peaks", {}).items():
        numbers = ", ".join(f"{name} {value:.0f}" for name, value in peaks.items())
        lines.append(f"- limits at {threads} thread{'s' if threads != '1' else ''}: {numbers}")
    if results.get("keeps_freed_memory"):
        lines.append("- malloc keeps freed memory, as tcmalloc and jemalloc do: no fresh pages in a call")
    if results.get("quick"):
        lines.append("- **quick run: too few and too short samples to be a result**")
    return "\n".join(lines) + "\n"


def _targets(targets: Sequence[Target]) -> str:
    rows = [[t.number, t.name, t.goal, t.measured, t.verdict] for t in targets]
    return "## Targets\n\n" + table(("", "target", "goal", "measured", "verdict"), rows)


def _threads(rows: Sequence[Results]) -> list[int]:
    return sorted({row["threads"] for row in rows})


def _linear(rows: Sequence[Results], threads: int) -> str:
    rows = [row for row in rows if row["threads"] == threads]
    names = list(dict.fromkeys(name for row in rows for name in row["candidates"]))
    ran = [name for name in names if any(name in times(row) for row in rows)]
    heads = ["M, K, N", *(f"{name} µs" for name in ran), "against best int8 baseline", "GOPS", "of the limit"]
    body = []
    for row in rows:
        us = times(row)
        ours = [us[name] for name in OURS if name in us]
        best = best_of(row, list(INT8_BASELINES))
        ratio = f"{best[1] / max(ours):.2f} x ({best[0]})" if best and ours else "-"
        fractions = [max(limits.values()) for limits in row["fractions"].values() if limits]
        gops = 2 * row["M"] * row["K"] * row["N"] / max(ours) / 1e3 if ours else None
        body.append(
            [
                f"{row['M']}, {row['K']}, {row['N']}",
                *(_us(us.get(name)) for name in ran),
                ratio,
                _us(gops),
                _percent(min(fractions) if fractions else None),
            ]
        )
    text = (
        f"{threads} thread{'s' if threads > 1 else ''}, medians; ratio, GOPS and fraction of the limit are "
        "those of the slower of per_token and per_tensor. The limit is the measured int8 peak or the time to "
        "read the weight once, whichever is nearer.\n\n"
    )
    text += table(heads, body)
    reasons = dict.fromkeys(
        f"{name}: {entry['left_out']}"
        for row in rows
        for name, entry in row["candidates"].items()
        if "left_out" in entry
    )
    if reasons:
        text += "\nLeft out: " + "; ".join(reasons) + ".\n"
    return text


def _errors(rows: Sequence[Results]) -> str:
    """Range of the relative error of each candidate over the rows."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        for name, entry in row["candidates"].items():
            if "error" in entry:
                errors.setdefault(name, []).append(entry["error"])
    body = [[name, f"{100 * min(values):.2f} - {100 * max(values):.2f} %"] for name, values in errors.items()]
    return "Relative error of the output against float64, normal data:\n\n" + table(("", "error"), body)


def _option_cost(rows: Sequence[Results]) -> str:
    body = [
        [
            f"{row['M']}, {row['K']}, {row['N']}",
            _us(row["plain_us"]),
            f"{row['rotation_us']:.1f} ({_percent(row['rotation_us'] / row['plain_us'])})",
            *(f"{cost['us']:.1f} ({cost['torch_us']:.1f})" for cost in row["epilogues"].values()),
        ]
        for row in rows
    ]
    heads = (
        "M, K, N",
        "per_token µs",
        "rotation adds µs",
        *(f"{name} adds µs" for name in rows[0]["epilogues"]),
    )
    note = (
        "1 thread, medians of the differences between interleaved calls; in brackets the rotation's share of "
        "the call and the time of torch's own function on the same output.\n\n"
    )
    return "## Cost of options\n\n" + note + table(heads, body)


def _kernels(kernels: Sequence[Results]) -> str:
    body = []
    for entry in kernels:
        limit = f"{entry['limit']:.0f}" if entry["limit"] else "-"
        body.append(
            [
                entry["op"],
                "x".join(str(size) for size in entry["shape"]),
                str(entry["threads"]),
                _us(entry["us"]),
                f"{entry['rate']:.1f} {entry['unit']}",
                limit,
            ]
        )
    heads = ("op", "shape", "threads", "µs", "rate", "limit")
    note = (
        "Rates count the bytes read and written once, or two operations a multiply-accumulate; the limit is "
        "the best read probe over the input's bytes, or the int8 peak.\n\n"
    )
    return "## Each op alone\n\n" + note + table(heads, body)


def _memory(memory: Results) -> str:
    body = [[f"{layer['N']} x {layer['K']}", f"{layer['bytes_a_weight']:.3f}"] for layer in memory["layers"]]
    growth = memory["process_growth_4096x4096"]
    return (
        "## Memory\n\n"
        + table(("weight [N, K]", "resident int8 bytes per weight"), body)
        + f"\nA fresh process grows by {growth:.3f} bytes per weight with each further 4096 x 4096 layer.\n"
    )


def _contention(contention: Results) -> str:
    names = list(dict.fromkeys(name for row in contention["rows"] for name in row["contended"]))
    body = []
    for row in contention["rows"]:
        cells = []
        for name in names:
            if name not in row["contended"]:
                cells.append("-")
                continue
            quiet, loaded = row["quiet"][name], row["contended"][name]
            cells.append(f"{_us(quiet['us'])} → {_us(loaded['us'])} ({_us(loaded['p90_us'])})")
        body.append([f"{row['M']}, {row['K']}, {row['N']}", *cells])
    return (
        "## Contended machine\n\n"
        f"{contention['spinning']} spinning processes, {contention['threads']} threads: median µs alone → "
        "median beside them (90th percentile).\n\n" + table(("M, K, N", *names), body)
    )
