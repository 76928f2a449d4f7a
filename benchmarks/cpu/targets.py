"""The project's targets, each with what was measured and whether it is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ..shared.targets import Target
from .baselines import INT8_RIVALS, OURS
from .linear import best_of, times

Results = dict[str, Any]

TORCH_AO = tuple(name for name in INT8_RIVALS if name.startswith("torch.ao "))


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log(values))); values positive, at least one."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _shape(row: Results) -> tuple[int, int, int]:
    return row["M"], row["K"], row["N"]


def _name(row: Results) -> str:
    return "x".join(str(size) for size in _shape(row))


def _at(rows: Sequence[Results], threads: int, shape: tuple[int, int, int] | None = None) -> list[Results]:
    return [row for row in rows if row["threads"] == threads and shape in (None, _shape(row))]


def _slower_of_ours(row: Results) -> float | None:
    """Microseconds of the slower of per_token and per_tensor."""
    ours = [us for name, us in times(row).items() if name in OURS]
    return max(ours, default=None)


def _fractions(rows: Sequence[Results], kind: str) -> list[tuple[float, str]]:
    """(fraction, row and scheme) of each of our measurements, lowest first."""
    return sorted(
        (shares[kind], f"{_name(row)} {name.removeprefix('dynquant ')}")
        for row in rows
        for name, shares in row["fractions"].items()
        if kind in shares
    )


def _constant(value: float, row: str) -> float:
    """The same target for every row."""
    return value


class _Judge:
    """Collects figures; knows whether this machine is of the kind that the targets are stated for."""

    def __init__(self, results: Results) -> None:
        self.isas: Sequence[str] = results["machine"]["available_isas"]
        self.targets: list[Target] = []

    def add(
        self, number: str, what: str, target: str, measured: str, met: bool | None, *, for_vnni: bool = False
    ) -> None:
        if met is None:
            verdict, measured = "not measured in this run", "-"
        elif for_vnni and "avx512vnni" not in self.isas:
            outcome = "met" if met else "missed"
            verdict = f"not measurable on this machine (no AVX512-VNNI; {outcome} by its own limits)"
        else:
            verdict = "met" if met else "missed"
        self.targets.append(Target(what, target, measured, met, verdict, number))

    def lowest_fraction(
        self,
        number: str,
        what: str,
        rows: Sequence[Results],
        kind: str,
        target: Callable[[str], float],
        text: str,
        *,
        for_vnni: bool,
    ) -> None:
        """A figure that every measurement's fraction has to reach; shows the lowest."""
        fractions = _fractions(rows, kind)
        met = all(share >= target(row) for share, row in fractions) if fractions else None
        measured = f"lowest {fractions[0][0]:.2f} ({fractions[0][1]})" if fractions else "-"
        self.add(number, what, text, measured, met, for_vnni=for_vnni)


def judge(results: Results) -> list[Target]:
    """All figures, from the sections that were run."""
    judge = _Judge(results)
    rows = results.get("linear", [])
    _roofline_figures(judge, rows)
    _small_m_figures(judge, rows)
    _rival_figures(judge, rows)
    _avx2_figure(judge, results.get("avx2", []))
    _addition_figures(judge, results.get("additions", []))
    _weight_figures(judge, results)
    _encoder_figures(judge, results.get("encoder", {}))
    _busy_figures(judge, results.get("busy", {}))
    return judge.targets


def _roofline_figures(judge: _Judge, rows: Sequence[Results]) -> None:
    tall = [row for row in rows if row["M"] >= 16]

    def one_thread(row: str) -> float:
        return 0.93 if row.startswith("1024x4096x4096") else 0.90

    judge.lowest_fraction(
        "1",
        "whole QLinear call, M >= 16, 1 thread, of the measured int8 limit",
        _at(tall, 1),
        "int8",
        one_thread,
        ">= 0.90 (1024x4096x4096: 0.93)",
        for_vnni=True,
    )
    judge.lowest_fraction(
        "1",
        "the same at 2 threads",
        _at(tall, 2),
        "int8",
        partial(_constant, 0.85),
        ">= 0.85",
        for_vnni=True,
    )


def _small_m_figures(judge: _Judge, rows: Sequence[Results]) -> None:
    what = "(1, 768, 768), 1 thread, µs"
    small, seed = _at(rows, 1, (1, 768, 768)), _at(rows, 1, (1, 3, 3))
    if small and seed and "fp32" in times(seed[0]) and (ours := _slower_of_ours(small[0])):
        allowed = 11 / 6 * times(seed[0])["fp32"]
        text = f"< 11/6 of nn.Linear(3, 3) = {allowed:.1f}"
        judge.add("2", what, text, f"{ours:.1f}", ours < allowed, for_vnni=True)
    else:
        judge.add("2", what, "< 11/6 of nn.Linear(3, 3)", "-", None)
    for k, n, share in ((768, 3072, 0.75), (4096, 4096, 0.95)):
        judge.lowest_fraction(
            "2",
            f"(1, {k}, {n}), 1 thread, weight bytes of the best read probe",
            _at(rows, 1, (1, k, n)),
            "read",
            partial(_constant, share),
            f">= {share:.2f}",
            for_vnni=True,
        )


def _rival_figures(judge: _Judge, rows: Sequence[Results]) -> None:
    compared = [
        (row, best[1] / ours)
        for row in rows
        if (best := best_of(row, list(INT8_RIVALS))) and (ours := _slower_of_ours(row))
    ]
    slower = [f"{_name(row)} at {row['threads']} ({ratio:.2f})" for row, ratio in compared if ratio < 1]
    judge.add(
        "3",
        "every row and thread count, slower of per_token and per_tensor, against the best int8 rival",
        ">= 1.00 of its speed in each",
        f"{len(compared) - len(slower)} of {len(compared)}"
        + (f"; behind: {', '.join(slower)}" if slower else ""),
        not slower if compared else None,
        for_vnni=True,
    )
    one = _at(rows, 1)
    for what, names, target in (
        ("geometric mean at 1 thread, best int8 rival of each row", list(INT8_RIVALS), 1.24),
        ("geometric mean at 1 thread, best torch.ao engine of each row", list(TORCH_AO), 1.45),
    ):
        ratios = [
            best[1] / ours for row in one if (best := best_of(row, names)) and (ours := _slower_of_ours(row))
        ]
        mean = geometric_mean(ratios) if ratios else None
        measured = f"{mean:.2f} over {len(ratios)} rows" if mean else "-"
        judge.add("3", what, f">= {target}", measured, mean >= target if mean else None, for_vnni=True)
    ratios = [
        ours / times(row)["fp32"]
        for row in rows
        if _shape(row) == (1, 3, 3) and "fp32" in times(row) and (ours := _slower_of_ours(row))
    ]
    judge.add(
        "3",
        "the 3x3 layer, time against nn.Linear",
        "<= 1.20",
        f"{max(ratios):.2f}" if ratios else "-",
        max(ratios) <= 1.2 if ratios else None,
    )


def _avx2_figure(judge: _Judge, rows: Sequence[Results]) -> None:
    judge.lowest_fraction(
        "4",
        "AVX2, M >= 32, 1 thread, of the vpmaddubsw + vpmaddwd + vpaddd limit",
        [row for row in _at(rows, 1) if row["M"] >= 32],
        "int8",
        partial(_constant, 0.70),
        ">= 0.70",
        for_vnni=False,
    )


def _weight_figures(judge: _Judge, results: Results) -> None:
    packing = [
        entry
        for entry in results.get("kernels", [])
        if entry["op"] == "QLinear.from_float" and entry["shape"] == [4096, 4096] and entry["threads"] == 1
    ]
    ms = packing[0]["us"] / 1e3 if packing else None
    judge.add(
        "5",
        "4096 x 4096 from float to packed, 1 thread, ms",
        "< 60",
        f"{ms:.0f}" if ms else "-",
        ms < 60 if ms else None,
    )
    layers = results.get("memory", {}).get("layers", [])
    most = max((layer["bytes_a_weight"] for layer in layers), default=None)
    judge.add(
        "5",
        "resident int8 bytes a weight, N >= 256, K >= 128",
        "<= 1.10",
        f"{most:.3f}" if most else "-",
        most <= 1.1 if most else None,
    )


def _addition_figures(judge: _Judge, rows: Sequence[Results]) -> None:
    for what, measured, target in (
        ("M >= 16, N >= 768", [row for row in rows if row["M"] >= 16 and row["N"] >= 768], 0.05),
        ("M = 1", [row for row in rows if row["M"] == 1], 0.15),
    ):
        shares = [(row["rotation_us"] / row["plain_us"], _name(row)) for row in measured]
        worst = max(shares, default=None)
        judge.add(
            "8",
            f"rotation, {what}, share of the whole call",
            f"<= {target}",
            f"highest {worst[0]:.3f} ({worst[1]})" if worst else "-",
            worst[0] <= target if worst else None,
        )
    gelus = [
        (row["epilogues"]["gelu"]["us"] / row["epilogues"]["gelu"]["torch_us"], _name(row)) for row in rows
    ]
    slowest = max(gelus, default=None)
    judge.add(
        "8",
        "gelu epilogue, time of torch's gelu",
        "<= 1/6",
        f"highest {slowest[0]:.2f} ({slowest[1]})" if slowest else "-",
        slowest[0] <= 1 / 6 if slowest else None,
        for_vnni=True,
    )


def _encoder_figures(judge: _Judge, encoder: Results) -> None:
    versions = {version["name"]: version for version in encoder.get("threads", {}).get("1", [])}
    ours = tuple(name for name in versions if name in OURS)
    fused, rotated = "dynquant per_token, fused", "dynquant per_token, rotation, fused"

    def slowest(names: Sequence[str], workload: str, baseline: str) -> float | None:
        """Speed of the slowest of these versions, the baseline's being 1."""
        if not names or any(workload not in _milliseconds(versions, name) for name in (*names, baseline)):
            return None
        times = [float(_milliseconds(versions, name)[workload]) for name in names]
        return float(_milliseconds(versions, baseline)[workload]) / max(times)

    for number, names, label, workload, baseline, target in (
        ("8", (fused,), ", per_token, fused", "8x128", "torch.ao", 1.42),
        ("8", (fused,), ", per_token, fused", "8x128", "fp32", 3.5),
        ("8", (rotated,), ", per_token, rotation, fused", "8x128", "torch.ao", 1.36),
        ("8", (rotated,), ", per_token, rotation, fused", "8x128", "fp32", 3.35),
        ("6", ours, "", "8x128", "torch.ao", 1.14),
        ("6", ours, "", "8x128", "fp32", 2.7),
        ("6", ours, "", "1x16", "torch.ao", 1.3),
    ):
        ratio = slowest(names, workload, baseline)
        what = f"MiniLM {workload} tokens, 1 thread{label}, against {baseline}"
        measured = f"{ratio:.2f}" if ratio else "-"
        judge.add(number, what, f">= {target}", measured, ratio >= target if ratio else None, for_vnni=True)
    for name, target in (
        ("dynquant per_tensor", 0.96),
        ("dynquant per_token", 0.99),
        ("dynquant per_tensor, rotation", 0.996),
        ("dynquant per_token, rotation", 0.998),
    ):
        cosine = versions[name]["min_cosine"] if name in versions else None
        what = f"MiniLM min cosine, {name.removeprefix('dynquant ')}"
        met = cosine >= target if cosine is not None else None
        judge.add("6", what, f">= {target}", f"{cosine:.4f}" if cosine is not None else "-", met)


def _milliseconds(versions: Results, name: str) -> Results:
    return versions[name]["milliseconds"] if name in versions else {}


def _busy_figures(judge: _Judge, busy: Results) -> None:
    small, others = [], []
    for row in busy.get("rows", []):
        for name in OURS:
            if name not in row["quiet"]:
                continue
            label = f"{_name(row)} {name.removeprefix('dynquant ')}"
            quiet, loaded = row["quiet"][name], row["busy"][name]
            if row["one_thread_us"][name] < 50:
                small.append((loaded["us"] / quiet["us"], quiet["cores"], label))
            elif "torch.ao x86" in row["busy"]:
                others.append((loaded["us"] / row["busy"]["torch.ao x86"]["us"], label))
    worst = max(small, default=None)
    cores = max((entry[1] for entry in small), default=0.0)
    judge.add(
        "7",
        "busy machine, calls under 50 µs on one thread: median against quiet; cores used",
        "<= 3.0, one thread",
        f"{worst[0]:.2f} ({worst[2]}), {cores:.2f} cores" if worst else "-",
        worst[0] <= 3 and cores < 1.1 if worst else None,
    )
    behind = max(others, default=None)
    judge.add(
        "7",
        "busy machine, the other calls: median against torch.ao's",
        "<= 1.00",
        f"{behind[0]:.2f} ({behind[1]})" if behind else "-",
        behind[0] <= 1 if behind else None,
    )
