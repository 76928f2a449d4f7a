"""The project's targets for the CPU kernels, each beside its measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ..shared.targets import Target
from . import recurrent
from .baselines import INT8_BASELINES, OURS
from .encoder_targets import add_encoder_targets
from .linear import best_of, times
from .target_list import Results, TargetList

TORCH_AO = tuple(name for name in INT8_BASELINES if name.startswith("torch.ao "))


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
        (limits[kind], f"{_name(row)} {name.removeprefix('dynquant ')}")
        for row in rows
        for name, limits in row["fractions"].items()
        if kind in limits
    )


def _constant(value: float, row: str) -> float:
    """The same goal for every row."""
    return value


def _lowest_fraction(
    targets: TargetList,
    number: str,
    name: str,
    rows: Sequence[Results],
    kind: str,
    goal: Callable[[str], float],
    goal_text: str,
    *,
    for_vnni: bool,
) -> None:
    """A fraction that every measurement has to reach; shows the lowest."""
    fractions = _fractions(rows, kind)
    met = all(fraction >= goal(row) for fraction, row in fractions) if fractions else None
    measured = f"lowest {fractions[0][0]:.2f} ({fractions[0][1]})" if fractions else "-"
    targets.add(number, name, goal_text, measured, met, for_vnni=for_vnni)


def evaluate(results: Results) -> list[Target]:
    """All targets, by the measured sections."""
    targets = TargetList(results)
    rows = results.get("linear", [])
    _roofline_targets(targets, rows)
    _small_m_targets(targets, rows)
    _baseline_targets(targets, rows)
    _avx2_target(targets, results.get("avx2", []))
    _option_cost_targets(targets, results.get("option_cost", []))
    _weight_targets(targets, results)
    add_encoder_targets(targets, results)
    recurrent.add_targets(targets, results.get("recurrent", []))
    _contention_targets(targets, results.get("contention", {}))
    return targets.targets


def _roofline_targets(targets: TargetList, rows: Sequence[Results]) -> None:
    tall = [row for row in rows if row["M"] >= 16]

    def one_thread(row: str) -> float:
        return 0.93 if row.startswith("1024x4096x4096") else 0.90

    _lowest_fraction(
        targets,
        "1",
        "whole QLinear call, M >= 16, 1 thread, of the measured int8 limit",
        _at(tall, 1),
        "int8",
        one_thread,
        ">= 0.90 (1024x4096x4096: 0.93)",
        for_vnni=True,
    )
    _lowest_fraction(
        targets,
        "1",
        "the same at 2 threads",
        _at(tall, 2),
        "int8",
        partial(_constant, 0.85),
        ">= 0.85",
        for_vnni=True,
    )


def _small_m_targets(targets: TargetList, rows: Sequence[Results]) -> None:
    name = "(1, 768, 768), 1 thread, µs"
    small, seed = _at(rows, 1, (1, 768, 768)), _at(rows, 1, (1, 3, 3))
    if small and seed and "fp32" in times(seed[0]) and (ours := _slower_of_ours(small[0])):
        allowed = 11 / 6 * times(seed[0])["fp32"]
        text = f"< 11/6 of nn.Linear(3, 3) = {allowed:.1f}"
        targets.add("2", name, text, f"{ours:.1f}", ours < allowed, for_vnni=True)
    else:
        targets.add("2", name, "< 11/6 of nn.Linear(3, 3)", "-", None)
    for k, n, fraction in ((768, 3072, 0.75), (4096, 4096, 0.95)):
        _lowest_fraction(
            targets,
            "2",
            f"(1, {k}, {n}), 1 thread, weight bytes of the best read probe",
            _at(rows, 1, (1, k, n)),
            "read",
            partial(_constant, fraction),
            f">= {fraction:.2f}",
            for_vnni=True,
        )


def _baseline_targets(targets: TargetList, rows: Sequence[Results]) -> None:
    compared = [
        (row, best[1] / ours)
        for row in rows
        if (best := best_of(row, list(INT8_BASELINES))) and (ours := _slower_of_ours(row))
    ]
    slower = [f"{_name(row)} at {row['threads']} ({ratio:.2f})" for row, ratio in compared if ratio < 1]
    targets.add(
        "3",
        "every row and thread count, slower of per_token and per_tensor, against the best int8 baseline",
        ">= 1.00 of its speed in each",
        f"{len(compared) - len(slower)} of {len(compared)}"
        + (f"; behind: {', '.join(slower)}" if slower else ""),
        not slower if compared else None,
        for_vnni=True,
    )
    one = _at(rows, 1)
    for name, names, goal in (
        ("geometric mean at 1 thread, best int8 baseline of each row", list(INT8_BASELINES), 1.24),
        ("geometric mean at 1 thread, best torch.ao engine of each row", list(TORCH_AO), 1.45),
    ):
        ratios = [
            best[1] / ours for row in one if (best := best_of(row, names)) and (ours := _slower_of_ours(row))
        ]
        mean = geometric_mean(ratios) if ratios else None
        measured = f"{mean:.2f} over {len(ratios)} rows" if mean else "-"
        targets.add("3", name, f">= {goal}", measured, mean >= goal if mean else None, for_vnni=True)
    ratios = [
        ours / times(row)["fp32"]
        for row in rows
        if _shape(row) == (1, 3, 3) and "fp32" in times(row) and (ours := _slower_of_ours(row))
    ]
    targets.add(
        "3",
        "the 3x3 layer, time against nn.Linear",
        "<= 1.20",
        f"{max(ratios):.2f}" if ratios else "-",
        max(ratios) <= 1.2 if ratios else None,
    )


def _avx2_target(targets: TargetList, rows: Sequence[Results]) -> None:
    _lowest_fraction(
        targets,
        "4",
        "AVX2, M >= 32, 1 thread, of the vpmaddubsw + vpmaddwd + vpaddd limit",
        [row for row in _at(rows, 1) if row["M"] >= 32],
        "int8",
        partial(_constant, 0.70),
        ">= 0.70",
        for_vnni=False,
    )


def _weight_targets(targets: TargetList, results: Results) -> None:
    packing = [
        entry
        for entry in results.get("kernels", [])
        if entry["op"] == "QLinear.from_float" and entry["shape"] == [4096, 4096] and entry["threads"] == 1
    ]
    ms = packing[0]["us"] / 1e3 if packing else None
    targets.add(
        "5",
        "4096 x 4096 from float to packed, 1 thread, ms",
        "< 60",
        f"{ms:.0f}" if ms else "-",
        ms < 60 if ms else None,
    )
    layers = results.get("memory", {}).get("layers", [])
    most = max((layer["bytes_a_weight"] for layer in layers), default=None)
    targets.add(
        "5",
        "resident int8 bytes per weight, N >= 256, K >= 128",
        "<= 1.10",
        f"{most:.3f}" if most else "-",
        most <= 1.1 if most else None,
    )


def _option_cost_targets(targets: TargetList, rows: Sequence[Results]) -> None:
    for shapes, measured, goal in (
        ("M >= 16, N >= 768", [row for row in rows if row["M"] >= 16 and row["N"] >= 768], 0.05),
        ("M = 1", [row for row in rows if row["M"] == 1], 0.15),
    ):
        shares = [(row["rotation_us"] / row["plain_us"], _name(row)) for row in measured]
        worst = max(shares, default=None)
        targets.add(
            "8",
            f"rotation, {shapes}, share of the whole call",
            f"<= {goal}",
            f"highest {worst[0]:.3f} ({worst[1]})" if worst else "-",
            worst[0] <= goal if worst else None,
        )
    gelus = [
        (row["epilogues"]["gelu"]["us"] / row["epilogues"]["gelu"]["torch_us"], _name(row)) for row in rows
    ]
    slowest = max(gelus, default=None)
    targets.add(
        "8",
        "gelu epilogue, time of torch's gelu",
        "<= 1/6",
        f"highest {slowest[0]:.2f} ({slowest[1]})" if slowest else "-",
        slowest[0] <= 1 / 6 if slowest else None,
        for_vnni=True,
    )


def _contention_targets(targets: TargetList, contention: Results) -> None:
    small, others = [], []
    for row in contention.get("rows", []):
        for name in OURS:
            if name not in row["quiet"]:
                continue
            label = f"{_name(row)} {name.removeprefix('dynquant ')}"
            quiet, loaded = row["quiet"][name], row["contended"][name]
            if row["one_thread_us"][name] < 50:
                small.append((loaded["us"] / quiet["us"], quiet["cores"], label))
            elif "torch.ao x86" in row["contended"]:
                others.append((loaded["us"] / row["contended"]["torch.ao x86"]["us"], label))
    worst = max(small, default=None)
    cores = max((entry[1] for entry in small), default=0.0)
    targets.add(
        "7",
        "contended machine, calls under 50 µs on one thread: median against quiet; cores used",
        "<= 3.0, one thread",
        f"{worst[0]:.2f} ({worst[2]}), {cores:.2f} cores" if worst else "-",
        worst[0] <= 3 and cores < 1.1 if worst else None,
    )
    behind = max(others, default=None)
    targets.add(
        "7",
        "contended machine, the other calls: median against torch.ao's",
        "<= 1.00",
        f"{behind[0]:.2f} ({behind[1]})" if behind else "-",
        behind[0] <= 1 if behind else None,
    )
