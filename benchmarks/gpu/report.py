"""Results as Markdown, targets first, and as a picture. Needs no card; matplotlib only for the picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .results import Entry, is_bad

Results = dict[str, Any]
RIVAL = "bf16 linear"
LARGE_M = 1024  # from here on the second target of layers holds


@dataclass(frozen=True)
class Target:
    """A target beside the worst of what was measured.

    Attributes:
        ratio: of both, turned so that 1 and more means met; None: not measured.
    """

    what: str
    target: str
    measured: str
    ratio: float | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.ratio is None else "met" if self.ratio >= 1 else "NOT met"


def write(paths: Sequence[Path]) -> list[Path]:
    """CARD.md and CARD.png beside the first of the result files, of one card, that are reported together."""
    parts = [json.loads(path.read_text()) for path in paths]
    results: Results = parts[0] | {
        name: [one for part in parts for one in part[name]] for name in ("stages", "entries")
    }
    results["command"] = "`, `".join(part["command"] for part in parts)
    text, picture = paths[0].with_suffix(".md"), paths[0].with_suffix(".png")
    text.write_text(markdown(results))
    draw(results, picture)
    return [text, picture]


def entries(results: Results, kind: str) -> list[Entry]:
    return [entry for entry in results["entries"] if entry["kind"] == kind]


def us(entry: Entry, name: str) -> float | None:
    """A contender's time; None where it did not run."""
    value: float | None = entry.get("times", {}).get(name, {}).get("us")
    return value


def ratio(entry: Entry, over: str, under: str) -> float | None:
    above, below = us(entry, over), us(entry, under)
    return above / below if above and below else None


def targets(results: Results) -> list[Target]:
    large = entries(results, "large")
    few, layers = entries(results, "few rows"), entries(results, "layer")
    rows = [entry for entry in entries(results, "quantize") if not entry["rotation"]]
    ours = "dynquant bf16"
    found = [
        _worst(f"GEMM with epilogue against {rival}", least, large, partial(ratio, over=rival, under=ours))
        for rival, least in (("cuBLASLt int8", 0.95), ("torch._int_mm + dequantization", 1.0))
    ]
    found += [
        _worst(
            "GEMM with epilogue, 8192³, TOPS",
            1200,
            [entry for entry in large if entry["M"] == 8192],
            lambda e: e.get("times", {}).get(ours, {}).get("tops"),
        ),
        _worst(
            "quantize, time against a copy", 1.15, rows, lambda e: ratio(e, "dynquant", "copy"), most=True
        ),
        _worst("GEMM, M ≤ 16, time against reading the weight", 1.3, few, _of_weight_read, most=True),
    ]
    for what, least, chosen in (
        ("QLinear, M ≤ 16, speed against bf16 nn.Linear", 1.4, [e for e in layers if e["M"] <= 16]),
        (f"QLinear, M ≥ {LARGE_M}, the same", 1.5, [e for e in layers if e["M"] >= LARGE_M]),
    ):
        found.append(_worst(what, least, chosen, lambda e: ratio(e, RIVAL, "dynquant per_token")))
    for activations, most in (("per_token", 2), ("per_tensor", 3)):
        chosen = [e for e in entries(results, "launches") if e["activations"] == activations]
        found.append(_worst(f"launches a forward, {activations}", most, chosen, _launches, most=True))
    return found


def _of_weight_read(entry: Entry) -> float | None:
    time = us(entry, "dynquant bf16")
    return time / entry["weight_read_us"] if time and "weight_read_us" in entry else None


def _launches(entry: Entry) -> float | None:
    return entry.get("count") or None


def _worst(
    what: str,
    target: float,
    chosen: Iterable[Entry],
    value: Callable[[Entry], float | None],
    *,
    most: bool = False,
) -> Target:
    """The entry that decides; ``most``: the target is an upper limit."""
    found = [(number, _shape(entry)) for entry in chosen if (number := value(entry)) is not None]
    words = f"{'≤' if most else '≥'} {target:g}"
    if not found:
        return Target(what, words, "-", None)
    number, where = (max if most else min)(found)
    met = target / number if most else number / target
    return Target(what, words, f"{number:.4g} ({where}; the worst of {len(found)})", met)


def markdown(results: Results) -> str:
    """The whole report; what was not run is absent."""
    machine = next(iter(entries(results, "machine")), {})
    facts = [f"{key} {value}" for key, value in machine.items() if key not in ("kind", "stage", "device")]
    lines = [f"# {results['card']}, {results['date']}\n", f"- {', '.join(facts)}"]
    for name in ("card_before", "card_after"):
        if results.get(name):
            lines.append(f"- {name}: {', '.join(f'{key} {value}' for key, value in results[name].items())}")
    lines.append(f"- `{results['command']}`\n")
    if results.get("error"):
        lines.append(f"{results['error']}\n")
    sections = [
        _table("Targets", ("what", "target", "measured", ""), map(_target_row, targets(results))),
        _table("Judged", ("what", "cases", "differ", "first fault"), _judged(results)),
        _table("Large products", ("M, N, K", "contender", "µs", "TOPS", "plan"), _large(results)),
        _table(
            "Few rows: GEMM and forward against reading the weight",
            ("M, N, K", "plan", "GEMM µs", "weight read µs", "ratio", "forward µs", "bf16 µs"),
            map(_few, entries(results, "few rows")),
        ),
        _table(
            "Whole forwards: the plan's choice and the fastest of all",
            ("M, N, K", "plan", "µs", "fastest", "µs", "bf16 µs", "speed"),
            [_choice(entry) for kind in ("few rows", "middle") for entry in entries(results, kind)],
        ),
        _table("Other builds, time against the product's", ("M, N, K", "build", "ratio"), _variants(results)),
        _table(
            "Quantization against a copy of as many bytes",
            ("M, K", "dtype", "rotation", "µs", "copy µs", "ratio"),
            map(_quantize, entries(results, "quantize")),
        ),
        _table("Layers under a graph", ("M, N, K", "contender", "µs", "speed"), _layers(results, "layer")),
        _table("Layers, eager calls", ("M, N, K", "contender", "µs", "speed"), _layers(results, "eager")),
        _table(
            "Launches a forward",
            ("activations", "M", "launches", ""),
            [
                (e["activations"], e["M"], e.get("count", "-"), ", ".join(e.get("names", [])) or e["error"])
                for e in entries(results, "launches")
            ],
        ),
        _table("Stages", ("", "status", "s", "ready s", "reason"), map(_stage, results["stages"])),
    ]
    return "\n".join(lines + [section for section in sections if section])


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [[str(cell).replace("\n", " ").replace("|", "/") for cell in row] for row in rows]
    if not cells:
        return ""
    lines = [heads, ["---"] * len(heads), *cells]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _target_row(target: Target) -> Sequence[str]:
    return target.what, target.target, target.measured, target.verdict


def _judged(results: Results) -> list[Sequence[object]]:
    """A line for each thing that was judged, all its entries together; and for every other bad entry."""
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
            words = f"{entry['error']} {wrong or ''}"[:600]
            lines[f"{entry['kind']} {_shape(entry)}"] = [f"{entry['kind']} {_shape(entry)}", "", "", words]
    return list(lines.values())


def _large(results: Results) -> list[Sequence[object]]:
    return [
        (_shape(e), name, _us(t.get("us")), f"{t['tops']:.0f}" if "tops" in t else "-", _note(t))
        for e in entries(results, "large")
        for name, t in e.get("times", {}).items()
    ]


def _note(times: dict[str, Any]) -> str:
    """What ran, or why it did not."""
    return str(times.get("left_out") or times.get("plan") or "")[:200]


def _few(entry: Entry) -> Sequence[object]:
    plan = entry.get("times", {}).get("dynquant bf16", {}).get("plan", "-")
    times = [_us(us(entry, name)) for name in ("dynquant bf16", "dynquant forward", RIVAL)]
    read, over = entry.get("weight_read_us"), _of_weight_read(entry)
    return _shape(entry), plan, times[0], _us(read), _times(over), *times[1:]


def _choice(entry: Entry) -> Sequence[object]:
    chosen = entry.get("times", {}).get("dynquant forward", {})
    forwards = {name: t["us"] for name, t in entry.get("times", {}).items() if "us" in t and _is_ours(name)}
    best = min(forwards, key=lambda name: forwards[name], default="-")
    return (
        _shape(entry),
        chosen.get("plan", "-"),
        _us(chosen.get("us")),
        best,
        _us(forwards.get(best)),
        _us(us(entry, RIVAL)),
        _times(ratio(entry, RIVAL, "dynquant forward")),
    )


def _is_ours(name: str) -> bool:
    return name.startswith(("forced ", "dynquant forward"))


def _variants(results: Results) -> list[Sequence[object]]:
    """Contenders that are named after another library, each against the product's of the same kind."""
    found: list[Sequence[object]] = []
    for entry in results["entries"]:
        times = entry.get("times", {})
        for name in times:
            library, _, kind = name.partition(" ")
            own = f"dynquant {kind}".strip()
            if library not in ("dynquant", "copy") and name != own and own in times:
                value = ratio(entry, name, own)
                found.append(
                    (f"{_shape(entry)} {kind}", library, _times(value) if value else _note(times[name]))
                )
    return found


def _quantize(entry: Entry) -> Sequence[object]:
    times = [_us(us(entry, name)) for name in ("dynquant", "copy")]
    where = f"{entry['M']}, {entry['K']}", entry["dtype"], entry["rotation"]
    return *where, *times, _times(ratio(entry, "dynquant", "copy"))


def _layers(results: Results, kind: str) -> list[Sequence[object]]:
    return [
        (_shape(e), name, _us(t.get("us")) if "us" in t else _note(t), _times(ratio(e, RIVAL, name)))
        for e in entries(results, kind)
        for name, t in e.get("times", {}).items()
    ]


def _stage(outcome: dict[str, Any]) -> Sequence[object]:
    numbers = [outcome.get(name, "-") for name in ("seconds", "ready_s")]
    return outcome["stage"], outcome["status"], *numbers, outcome["reason"][-300:]


def _us(value: float | None) -> str:
    """Three or four digits, whatever the size."""
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _shape(entry: Entry) -> str:
    return ", ".join(str(entry[name]) for name in ("M", "N", "K", "dtype") if name in entry)


def draw(results: Results, path: Path) -> None:
    """Targets, large products, few rows, layers; PNG, or what the suffix says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(16, 11), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(2, 2)
    measured = [target for target in targets(results) if target.ratio is not None]
    bars = [(target.what, target.ratio or 0.0, target.verdict == "met") for target in measured]
    _bars(panels[0][0], "measured against the target (1 and more: met)", bars)
    panels[0][0].axvline(1, color="grey", linewidth=0.8)
    products = [
        (f"{name}, {entry['M']}³", times["tops"], name.startswith("dynquant"))
        for entry in entries(results, "large")
        for name, times in entry.get("times", {}).items()
        if "tops" in times
    ]
    _bars(panels[0][1], "large products, TOPS", products)
    few = [(e["M"], f"N, K = {e['N']}, {e['K']}", _of_weight_read(e)) for e in entries(results, "few rows")]
    _lines(panels[1][0], "few rows: GEMM's time against reading the weight, by M", few)
    layers = [
        (e["M"], f"N, K = {e['N']}, {e['K']}", ratio(e, RIVAL, name))
        for kind, name in (("layer", "dynquant per_token"), ("middle", "dynquant forward"))
        for e in entries(results, kind)
    ]
    _lines(panels[1][1], "whole layers: speed by M, bf16 nn.Linear = 1", layers)
    picture.suptitle(f"{results['card']}, {results['date']}")
    picture.savefig(path, dpi=110)


def _bars(panel: Any, title: str, bars: Sequence[tuple[str, float, bool]]) -> None:
    bars = list(bars)[::-1]
    colours = ["tab:blue" if marked else "silver" for _, _, marked in bars]
    panel.barh(range(len(bars)), [value for _, value, _ in bars], color=colours)
    panel.set_yticks(range(len(bars)), [label[:50] for label, _, _ in bars], fontsize=7)
    panel.set_title(title)


def _lines(panel: Any, title: str, points: Iterable[tuple[int, str, float | None]]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for x, label, y in points:
        if y is not None:
            lines.setdefault(label, []).append((x, y))
    for label, line in lines.items():
        panel.plot(*zip(*sorted(line), strict=True), "o-", label=label)
    panel.axhline(1, color="grey", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.set_title(title)
    if lines:
        panel.legend(fontsize=8)
