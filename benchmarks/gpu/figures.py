"""The targets, each beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]
NOT_MEASURED = "not measured"
OF_CUBLASLT, LEAST_TOPS = 0.95, 1200.0
OF_COPY, OF_WEIGHT_READ = 1.15, 1.3
SMALL_SPEED, LARGE_SPEED = 1.4, 1.5
LARGE_M = 1024  # from here on the second of these holds


@dataclass(frozen=True)
class Figure:
    """One target.

    Attributes:
        ratio: what was measured over the target, turned so that 1 and more means met; None: not measured.
    """

    number: str
    what: str
    target: str
    measured: str
    ratio: float | None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return NOT_MEASURED
        return "met" if self.ratio >= 1 else "not met"


def judge(results: Results) -> list[Figure]:
    """Every figure, in order; ``results`` is the whole result, in which any stage may be missing or cut
    short."""
    return [
        *_products(results),
        *_rows(results),
        *_small(results),
        *_layers(results),
        *_launches(results),
        _sanitizer(results),
        _correctness(results),
    ]


def of_stage(results: Results, stage: str, section: str) -> list[Results]:
    """The entries of a section, none where the stage has not come so far."""
    entries = results.get("stages", {}).get(stage, {}).get("results", {}).get(section, [])
    return list(entries) if isinstance(entries, list) else []


def _products(results: Results) -> list[Figure]:
    found = {entry["M"]: entry for entry in of_stage(results, "kernels", "large_product")}
    figures = []
    for size in (4096, 8192):
        contenders = found.get(size, {}).get("contenders", {})
        us = {name: entry["us"] for name, entry in contenders.items() if "us" in entry}
        ours = us.get("dynquant")
        for number, rival, target in (
            ("1a", "cuBLASLt int8", OF_CUBLASLT),
            ("1b", "torch._int_mm + dequantization", 1.0),
        ):
            what = f"GEMM with epilogue, {size}³, speed against {rival}"
            why = contenders.get(rival, {}).get("left_out")
            ratio = us[rival] / ours if ours and rival in us else None
            comparison = "≥" if number == "1a" else ">"
            measured = f"{ratio:.3f} x" if ratio is not None else why or NOT_MEASURED
            figures.append(
                Figure(number, what, f"{comparison} {target} x", measured, ratio and ratio / target)
            )
    tops = found.get(8192, {}).get("contenders", {}).get("dynquant", {}).get("tops")
    measured = f"{tops:.0f} TOPS" if tops is not None else NOT_MEASURED
    ratio = tops / LEAST_TOPS if tops is not None else None
    figures.append(Figure("1c", "GEMM with epilogue, 8192³", f"≥ {LEAST_TOPS:.0f} TOPS", measured, ratio))
    return figures


def _worst(
    number: str,
    what: str,
    target: str,
    entries: Iterable[tuple[float, str]],
    form: Callable[[float], str],
    ratio: Callable[[float], float],
) -> Figure:
    """A figure that the worst of its entries decides: (value, where)."""
    ordered = sorted(entries, key=lambda entry: ratio(entry[0]))
    if not ordered:
        return Figure(number, what, target, NOT_MEASURED, None)
    value, where = ordered[0]
    measured = f"{form(value)} ({where}, the worst of {len(ordered)})"
    return Figure(number, what, target, measured, ratio(value))


def _rows(results: Results) -> list[Figure]:
    entries = [entry for entry in of_stage(results, "kernels", "rows") if "of_copy" in entry]
    return [
        _worst(
            number,
            f"{name}, time against a copy that moves as many bytes",
            f"≤ {OF_COPY} x",
            (
                (entry["of_copy"], f"[{entry['M']}, {entry['K']}] {entry['dtype']}")
                for entry in entries
                if entry["name"] == name
            ),
            lambda value: f"{value:.2f} x",
            lambda value: OF_COPY / value,
        )
        for number, name in (("2a", "quantize per_token"), ("2b", "min_max per_tensor"))
    ]


def _small(results: Results) -> list[Figure]:
    return [
        _worst(
            "3a",
            "GEMM, M = 1 to 16, time against weight bytes / copy bandwidth",
            f"≤ {OF_WEIGHT_READ} x",
            ((entry["of_limit"], _shape(entry)) for entry in of_stage(results, "kernels", "small_product")),
            lambda value: f"{value:.2f} x",
            lambda value: OF_WEIGHT_READ / value,
        )
    ]


def speed(entry: Results, name: str = "per_token") -> float | None:
    """How many times as fast as bf16 nn.Linear a layer is; None where one of both did not run."""
    contenders = entry["contenders"]
    ours, floats = contenders.get(name, {}), contenders.get("bf16 nn.Linear", {})
    return floats["us"] / ours["us"] if "us" in ours and "us" in floats else None


def _layers(results: Results) -> list[Figure]:
    entries = of_stage(results, "kernels", "layer")
    figures = []
    for number, what, target, chosen in (
        ("3b", "QLinear, M = 1 to 16", SMALL_SPEED, [e for e in entries if e["M"] < LARGE_M]),
        ("4", f"QLinear, M ≥ {LARGE_M}", LARGE_SPEED, [e for e in entries if e["M"] >= LARGE_M]),
    ):
        speeds = [(value, _shape(e)) for e in chosen if (value := speed(e)) is not None]
        figures.append(
            _worst(
                number,
                f"{what}, per_token, speed against bf16 nn.Linear",
                f"≥ {target} x",
                speeds,
                lambda value: f"{value:.2f} x",
                lambda value, target=target: value / target,  # type: ignore[misc]
            )
        )
    return figures


def _launches(results: Results) -> list[Figure]:
    figures = []
    for activations, limit in (("per_token", 2), ("per_tensor", 3)):
        entries = [
            entry
            for entry in of_stage(results, "kernels", "launches")
            if entry["activations"] == activations and entry["count"] > 0
        ]
        figures.append(
            _worst(
                "5",
                f"launches a forward, {activations}",
                f"≤ {limit}",
                ((entry["count"], f"M = {entry['M']}") for entry in entries),
                lambda value: f"{value:.0f}",
                lambda value, limit=limit: limit / value,  # type: ignore[misc]
            )
        )
    return figures


def _sanitizer(results: Results) -> Figure:
    what, target = "compute-sanitizer, four tools, small shapes", "0 reports"
    entries = of_stage(results, "sanitizer", "tools")
    counted = {entry["name"]: entry["reports"] for entry in entries if entry["reports"] is not None}
    words = ", ".join(
        f"{entry['name']} {entry['reports'] if entry['name'] in counted else entry['status']}"
        for entry in entries
    )
    stage = results.get("stages", {}).get("sanitizer", {})
    if not entries:
        absent = stage.get("status") == "ok" and stage.get("results", {}).get("tool") is None
        return Figure("6", what, target, "the tool was not found" if absent else NOT_MEASURED, None)
    clean = all(entry["status"] == "ok" for entry in entries)
    if any(counted.values()):
        return Figure("6", what, target, words, 0.0)
    complete = len(counted) == 4 and clean
    return Figure("6", what, target, words, 1.0 if complete else None)


def _correctness(results: Results) -> Figure:
    what, target = "every op against the reference, bit for bit", "0 differences"
    groups = of_stage(results, "correctness", "groups")
    status = results.get("stages", {}).get("correctness", {}).get("status")
    cases, faults = sum(group["cases"] for group in groups), sum(group["faults"] for group in groups)
    broken = [group["group"] for group in groups if group["error"]]
    words = f"{faults} of {cases} cases in {len(groups)} groups"
    if broken:
        words += f"; ended by an error: {', '.join(broken)}"
    if faults or broken:
        return Figure("7", what, target, words, 0.0)
    if not groups or status != "ok":
        return Figure("7", what, target, f"{words}; the stage {status or 'did not run'}", None)
    return Figure("7", what, target, words, 1.0)


def _shape(entry: Results) -> str:
    return f"M, N, K = {entry['M']}, {entry['N']}, {entry['K']}"
