"""Targets for whole encoders and for attention, by the kind of CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .baselines import OURS
from .encoder_versions import COMPILED, FLOAT_ATTENTION, INT8_RIVALS, ROTATED
from .target_list import Results, TargetList

MINILM = "all-MiniLM-L6-v2"
GOALS_ON_ZEN_4 = {
    # workload: speed of the rotated, fused model, that of the best int8 rival, torch.ao and fp32 being 1
    "1x16": (1.4, 2.4, 6.0),
    "1x128": (1.3, 1.6, 3.7),
    "8x128": (1.25, 1.5, 3.9),
    "32x64": (1.2, 1.5, 4.0),
}
ALLOWANCE_AT_2_THREADS = 0.93
GOAL_OF_THE_PRODUCTS = 1.4
GOALS_ON_AVX2 = (("torch.ao", 1.1), ("fp32", 1.9))


def _is_zen_4(machine: Results) -> bool:
    return machine.get("cpu_family") == "25" and "avx512vnni" in machine["available_isas"]


def _has_vnni(machine: Results) -> bool:
    return any("vnni" in isa for isa in machine["available_isas"])


def _threads(count: str | int) -> str:
    return f"{count} thread{'s' if int(count) != 1 else ''}"


def add_encoder_targets(targets: TargetList, results: Results) -> None:
    """Those of the sections "encoder" and "attention"."""
    machine = results["machine"]
    models = {model["name"]: model for model in results.get("encoder", {}).get("models", [])}
    minilm = models.get(MINILM, {})
    _unfused(targets, minilm)
    if _is_zen_4(machine):
        _beside_rivals(targets, minilm)
    elif _has_vnni(machine):
        _products(targets, minilm)
    else:
        for baseline, goal in GOALS_ON_AVX2:
            _speed(targets, minilm, "1", "8x128", (ROTATED,), (baseline,), goal)
    _compiled(targets, minilm)
    _cosines(targets, minilm)
    _attention(targets, results.get("attention", []), 0.35 if _is_zen_4(machine) else 0.5)


def _speed(
    targets: TargetList,
    model: Results,
    threads: str,
    workload: str,
    names: Sequence[str],
    baselines: Sequence[str],
    goal: float,
    *,
    number: str = "9",
    for_vnni: bool = False,
) -> None:
    """The slowest of these versions against the fastest of the baselines that ran."""
    times = model.get("threads", {}).get(threads, {}).get("milliseconds", {})
    ran = [name for name in baselines if workload in times.get(name, {})]
    ratio = None
    if ran and names and all(workload in times.get(name, {}) for name in names):
        fastest = min(ran, key=lambda name: float(times[name][workload]))
        ratio = times[fastest][workload] / max(times[name][workload] for name in names)
        against = f" ({fastest})" if len(baselines) > 1 else ""
    label = names[0].removeprefix("dynquant ") if len(names) == 1 else "slower scheme"
    count = _threads(threads)
    beside = baselines[0] if len(baselines) == 1 else "the best of ONNX Runtime and OpenVINO in int8"
    targets.add(
        number,
        f"MiniLM {workload} tokens, {count}, {label}, against {beside}",
        f">= {goal:.2f}",
        f"{ratio:.2f}{against}" if ratio else "-",
        ratio >= goal if ratio else None,
        for_vnni=for_vnni,
    )


def _unfused(targets: TargetList, model: Results) -> None:
    for workload, baseline, goal in (
        ("8x128", "torch.ao", 1.14),
        ("8x128", "fp32", 2.7),
        ("1x16", "torch.ao", 1.3),
    ):
        _speed(targets, model, "1", workload, tuple(OURS), (baseline,), goal, number="6", for_vnni=True)


def _beside_rivals(targets: TargetList, model: Results) -> None:
    for threads, allowance in (("1", 1.0), ("2", ALLOWANCE_AT_2_THREADS)):
        for workload, goals in GOALS_ON_ZEN_4.items():
            speed: Callable[..., None] = partial(_speed, targets, model, threads, workload, (ROTATED,))
            for baselines, goal in zip((INT8_RIVALS, ("torch.ao",), ("fp32",)), goals, strict=True):
                speed(baselines, allowance * goal)


def _products(targets: TargetList, model: Results) -> None:
    found = model.get("breakdown", {})
    groups = found.get("groups", {})
    limits = [groups.get(name, {}).get("limit_ms") for name in ("linear", "attention")]
    ratio = found["total_ms"] / sum(limits) if found.get("workload") == "8x128" and all(limits) else None
    targets.add(
        "9",
        "MiniLM 8x128 tokens, 1 thread, against its linear and attention products at the int8 limit",
        f"<= {GOAL_OF_THE_PRODUCTS} of their time",
        f"{ratio:.2f}" if ratio else "-",
        ratio <= GOAL_OF_THE_PRODUCTS if ratio else None,
    )


def _compiled(targets: TargetList, model: Results) -> None:
    times = model.get("threads", {}).get("1", {}).get("milliseconds", {})
    eager, compiled = times.get(ROTATED, {}), times.get(COMPILED, {})
    ratios = [(compiled[workload] / eager[workload], workload) for workload in compiled if workload in eager]
    worst = max(ratios, default=None)
    targets.add(
        "9",
        "MiniLM, 1 thread, compiled: time against eager",
        "<= 1.03",
        f"highest {worst[0]:.2f} ({worst[1]})" if worst else "-",
        worst[0] <= 1.03 if worst else None,
    )


def _cosines(targets: TargetList, model: Results) -> None:
    cosines = model.get("cosines", {})
    for version, kind, goal in (
        ("dynquant per_tensor", "min", 0.96),
        ("dynquant per_token", "min", 0.99),
        ("dynquant per_tensor, rotation", "min", 0.996),
        (FLOAT_ATTENTION, "min", 0.998),
        (ROTATED, "min", 0.998),
        (ROTATED, "min_512", 0.998),
    ):
        cosine = cosines.get(version, {}).get(kind)
        name = f"MiniLM min cosine, {version.removeprefix('dynquant ')}"
        name += ", 512 tokens" if kind == "min_512" else ""
        met = cosine >= goal if cosine is not None else None
        targets.add("6", name, f">= {goal}", f"{cosine:.4f}" if cosine is not None else "-", met)
    costs = [
        cosines[FLOAT_ATTENTION][kind] - cosines[ROTATED][kind]
        for kind in ("min", "mean", "min_512")
        if kind in cosines.get(FLOAT_ATTENTION, {}) and kind in cosines.get(ROTATED, {})
    ]
    highest = max(costs, default=None)
    targets.add(
        "9",
        "MiniLM, cosine that int8 attention and fused activations cost",
        "<= 0.0005",
        f"{highest:.5f}" if highest is not None else "-",
        highest <= 0.0005 if highest is not None else None,
    )


def _attention(targets: TargetList, rows: Sequence[Results], goal: float) -> None:
    measured = [
        row for row in rows if row["shape"] in ([8, 12, 128, 32], [8, 12, 512, 32]) and not row["padded"]
    ]
    ratios = [
        (row["us"]["dynquant"] / row["us"]["torch"], f"S {row['shape'][2]}, {_threads(row['threads'])}")
        for row in measured
    ]
    worst = max(ratios, default=None)
    targets.add(
        "9",
        "attention alone, B 8, H 12, D 32, S 128 and 512, of the time of torch's",
        f"<= {goal}",
        f"highest {worst[0]:.2f} ({worst[1]})" if worst else "-",
        worst[0] <= goal if worst else None,
    )
