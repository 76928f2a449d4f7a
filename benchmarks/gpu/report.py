"""Results as Markdown, targets first, and as a picture. Needs no card; only the picture needs matplotlib."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..shared.pictures import new_picture, save
from ..shared.tables import table
from ..shared.targets import Target
from .results import BASELINE, Entry, is_bad

Results = dict[str, Any]
Row = Sequence[object]
Value = Callable[[Entry], float | None]
# Below this size the launch, not the memory traffic, bounds the time: shown, but not judged.
JUDGED_WEIGHT_BYTES = 16 << 20
SHOWN = 3  # forced kernels appear only among this many fastest
RATIOS = "µs, the fastest first; x: speed against bf16, for quantization time against the copy"
TIMED = {
    "large": "Large products",
    "few rows": "Few rows: GEMMs and forwards",
    "middle": "Whole forwards",
    "quantize": "Quantization and a copy of as many bytes",
    "layer": "Layers under a graph",
    "eager": "Layers, eager calls",
}


def write(paths: Sequence[Path]) -> list[Path]:
    """CARD.json, .md and .png of one card's result files, CARD-part1.json and so on, beside the first."""
    parts = [json.loads(path.read_text()) for path in paths]
    lists = {name: [one for part in parts for one in part[name]] for name in ("stages", "entries")}
    results: Results = parts[0] | lists | {"command": "`, `".join(part["command"] for part in parts)}
    card = re.sub(r"-part\d$", "", paths[0].stem)
    merged, text, picture = (paths[0].with_name(card + ending) for ending in (".json", ".md", ".png"))
    merged.write_text(json.dumps(results, indent=1) + "\n")
    text.write_text(markdown(results))
    draw(results, picture)
    return [merged, text, picture]


def entries(results: Results, *kinds: str) -> list[Entry]:
    return [entry for kind in kinds for entry in results["entries"] if entry["kind"] == kind]


def us(entry: Entry, name: str) -> float | None:
    """Time of a candidate; None if it did not run."""
    value: float | None = entry.get("times", {}).get(name, {}).get("us")
    return value


def ratio(entry: Entry, over: str, under: str) -> float | None:
    above, below = us(entry, over), us(entry, under)
    return above / below if above and below else None


def of_weight_read(entry: Entry) -> float | None:
    """Time of our GEMM, in multiples of a weight read at copy bandwidth; None for small weights."""
    if entry["N"] * entry["K"] < JUDGED_WEIGHT_BYTES:
        return None
    time = us(entry, "dynquant bf16")
    return time / entry["weight_read_us"] if time and "weight_read_us" in entry else None


def targets(results: Results) -> list[Target]:
    """Each target with its worst measurement."""
    large, layers = entries(results, "large"), entries(results, "layer")
    rows = [entry for entry in entries(results, "quantize") if not entry["rotation"]]
    speed: Value = partial(ratio, over=BASELINE, under="dynquant per_token")

    def against(baseline: str) -> Value:
        return partial(ratio, over=baseline, under="dynquant bf16")

    tops: Value = lambda entry: entry.get("times", {}).get("dynquant bf16", {}).get("tops")  # noqa: E731
    at_least: list[tuple[str, float, list[Entry], Value]] = [
        ("GEMM with epilogue against cuBLASLt int8", 0.95, large, against("cuBLASLt int8")),
        ("... torch._int_mm + dequantization", 1, large, against("torch._int_mm + dequantization")),
        ("... 8192³, TOPS", 1200, [entry for entry in large if entry["M"] == 8192], tops),
        ("QLinear, M ≤ 16, against bf16 nn.Linear", 1.4, [e for e in layers if e["M"] <= 16], speed),
        ("QLinear, M ≥ 1024, the same", 1.5, [e for e in layers if e["M"] >= 1024], speed),
    ]
    few = entries(results, "few rows")
    at_most: list[tuple[str, float, list[Entry], Value]] = [
        (
            "GEMM, M ≤ 16, weights from 16 MiB: time against their bytes at a copy's speed",
            1.3,
            few,
            of_weight_read,
        ),
        ("quantize, time against a copy", 1.15, rows, partial(ratio, over="dynquant", under="copy")),
    ]
    for activations, most in (("per_token", 2), ("per_tensor", 3)):
        chosen = [e for e in entries(results, "launches") if e["activations"] == activations]
        at_most.append((f"launches a forward, {activations}", most, chosen, lambda e: e.get("count") or None))
    found: list[Target] = []
    for sign, limits in (("≥", at_least), ("≤", at_most)):
        for name, limit, chosen, value in limits:
            measured = [(number, _shape(e)) for e in chosen if (number := value(e)) is not None]
            if not measured:
                found.append(Target(name, f"{sign} {limit:g}", "-", None, "not measured"))
                continue
            number, where = (min if sign == "≥" else max)(measured)
            met = number >= limit if sign == "≥" else number <= limit
            text = f"{number:.4g} ({where}; the worst of {len(measured)})"
            found.append(Target(name, f"{sign} {limit:g}", text, met, "met" if met else "NOT met"))
    return found


def markdown(results: Results, *, last_first: bool = False) -> str:
    """The whole report, without the stages that were not run.

    Args:
        last_first: tables in reverse order, so that a terminal shows the targets.
    """
    lines = [f"# {results['card']}, {results['date']}\n"]
    found = (*entries(results, "machine"), results.get("card_before"), results.get("card_after"))
    facts = [
        f"- {', '.join(f'{k} {v}' for k, v in of.items() if k not in ('kind', 'stage'))}"
        for of in found
        if of
    ]
    lines += dict.fromkeys(facts)  # two parts on one machine repeat the same facts
    lines += [f"- `{results['command']}`\n", *([f"{results['error']}\n"] if "error" in results else [])]
    launches = [
        (e["activations"], e["M"], e.get("count", "-"), ", ".join(e.get("names", [])) or e["error"])
        for e in entries(results, "launches")
    ]
    tables: list[tuple[str, Sequence[str], Iterable[Row]]] = [
        (
            "Targets",
            ("", "target", "measured", ""),
            [(t.name, t.goal, t.measured, t.verdict) for t in targets(results)],
        ),
        ("Judged", ("what", "cases", "differ", "first fault"), _judged(results)),
        *((title, ("", RATIOS), _times(results, kind)) for kind, title in TIMED.items()),
        ("Launches a forward", ("activations", "M", "launches", ""), launches),
        ("Stages", ("", "status", "s", "ready s", "reason"), map(_stage, results["stages"])),
    ]
    texts = [text for one in tables if (text := _section(*one))]
    return "\n".join(lines + (texts[::-1] if last_first else texts))


def _section(title: str, heads: Sequence[str], rows: Iterable[Row]) -> str:
    found = list(rows)
    return f"## {title}\n\n{table(heads, found)}" if found else ""


def _judged(results: Results) -> list[Row]:
    """One row per judged kernel or group, over all its entries, and one per other bad entry."""
    lines: dict[str, list[Any]] = {}
    for entry in entries(results, "judged"):
        line = lines.setdefault(entry["what"], [entry["what"], 0, 0, ""])
        line[1] += entry["cases"]
        line[2] += entry["faults"]
        if is_bad(entry) and not line[3]:
            line[3] = f"{entry['shape']}: {entry['error']} {entry['first_faults'][:1]}"
    for entry in results["entries"]:
        if is_bad(entry) and entry["kind"] != "judged":
            wrong = {name: t["left_out"] for name, t in entry.get("times", {}).items() if "left_out" in t}
            name = f"{entry['kind']} {_shape(entry)}"
            lines[name] = [name, "", "", f"{entry['error']} {wrong or ''}"[:600]]
    return list(lines.values())


def _times(results: Results, kind: str) -> list[Row]:
    """One row per entry: candidates with their plan and the ratio to a copy or to bf16."""
    rows: list[Row] = []
    for entry in entries(results, kind):
        times = entry.get("times", {})
        texts = []
        for place, (number, name) in enumerate(sorted((t["us"], n) for n, t in times.items() if "us" in t)):
            if (place >= SHOWN and name.startswith("forced")) or (name == "copy" and kind != "quantize"):
                continue
            value = ratio(entry, name, "copy") if kind == "quantize" else ratio(entry, BASELINE, name)
            more = [times[name]["plan"]] if "plan" in times[name] and not name.startswith("forced") else []
            more += [f"{times[name]['tops']:.0f} TOPS"] if "tops" in times[name] else []
            more += [f"{value:.2f} x"] if value and name not in (BASELINE, "copy") else []
            texts.append(f"{name} **{number:.2f}**" + (f" ({'; '.join(more)})" if more else ""))
        texts += [f"{name}: {t['left_out'][:100]}" for name, t in times.items() if "left_out" in t]
        read = entry.get("weight_read_us")
        shape = _shape(entry) + (f"; weight at a copy's speed {read:.2f} µs" if read else "")
        rows.append((shape, ", ".join(texts) or entry["error"]))
    return rows


def _stage(outcome: dict[str, Any]) -> Row:
    numbers = [outcome.get(name, "-") for name in ("seconds", "ready_s")]
    return outcome["stage"], outcome["status"], *numbers, outcome["reason"][-300:]


def _shape(entry: Entry) -> str:
    return ", ".join(str(entry[name]) for name in ("M", "N", "K", "dtype", "rotation") if name in entry)


def draw(results: Results, path: Path) -> None:
    """Large products and, over M, few rows and forwards; PNG, or the format of the suffix."""
    picture = new_picture(16, 5)
    bars, *panels = picture.subplots(1, 3)
    products = [
        (f"{name}, {entry['M']}³", times["tops"], "tab:blue" if name.startswith("dynquant") else "silver")
        for entry in entries(results, "large")
        for name, times in entry.get("times", {}).items()
        if "tops" in times
    ][::-1]
    bars.barh(range(len(products)), [one[1] for one in products], color=[one[2] for one in products])
    bars.set_yticks(range(len(products)), [one[0] for one in products], fontsize=7)
    bars.set_title("large products, TOPS")
    speed: Value = partial(ratio, over=BASELINE, under="dynquant forward")
    for panel, title, kinds, value in (
        (
            panels[0],
            "few rows: GEMM's time, weight at a copy's speed = 1",
            ("few rows",),
            of_weight_read,
        ),
        (panels[1], "whole forwards: speed, bf16 linear = 1", ("few rows", "middle"), speed),
    ):
        lines: dict[str, list[tuple[int, float]]] = {}
        for entry in entries(results, *kinds):
            y = value(entry)
            if y is not None:
                lines.setdefault(f"N, K = {entry['N']}, {entry['K']}", []).append((entry["M"], y))
        for label, line in lines.items():
            panel.plot(*zip(*sorted(line), strict=True), "o-", label=label)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("M")
        panel.set_title(title)
        if lines:
            panel.legend(fontsize=8)
    save(picture, f"{results['card']}, {results['date']}", path)
