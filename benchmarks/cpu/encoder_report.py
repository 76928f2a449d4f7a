"""Markdown of the sections "attention" and "encoder"."""

from __future__ import annotations

from collections.abc import Sequence

from ..shared.tables import table
from .encoder_versions import INT8_RIVALS
from .target_list import Results


def attention_text(rows: Sequence[Results]) -> str:
    """int8 attention beside torch's."""
    body = [
        [
            ", ".join(str(size) for size in row["shape"]),
            "padded" if row["padded"] else "none",
            str(row["threads"]),
            f"{row['us']['torch']:.0f}",
            f"{row['us']['dynquant']:.0f}",
            f"{row['us']['dynquant'] / row['us']['torch']:.2f}",
            f"{100 * row['error']:.2f} %",
        ]
        for row in rows
    ]
    heads = ("B, H, S, D", "mask", "threads", "torch fp32 µs", "dynquant µs", "dynquant / torch", "error")
    return "## Attention alone\n\n" + table(heads, body)


def encoder_text(encoder: Results) -> str:
    """Times, cosines and the breakdown of each model."""
    if "left_out" in encoder:
        return f"## Encoders\n\nLeft out: {encoder['left_out']}\n"
    return "\n".join(_model(model) for model in encoder["models"])


def _model(model: Results) -> str:
    text = f"## {model['name']}\n\n"
    text += (
        "Milliseconds per call, medians; in brackets the speed against the best int8 version of ONNX Runtime "
        "and OpenVINO, against torch.ao and against fp32.\n"
    )
    for threads, results in model["threads"].items():
        times = results["milliseconds"]
        workloads = list(next(iter(times.values())))
        body = [[name, *(_cell(times, name, workload) for workload in workloads)] for name in times]
        text += f"\n{threads} thread{'s' if threads != '1' else ''}:\n\n" + table(("", *workloads), body)
        if results["left_out"]:
            text += (
                "\nLeft out: " + "; ".join(f"{n}: {why}" for n, why in results["left_out"].items()) + ".\n"
            )
    text += f"\nCosine to fp32, over {model['samples']}:\n\n"
    kinds = [kind for kind in ("min", "mean", "min_512") if any(kind in c for c in model["cosines"].values())]
    labels = {"min": "min", "mean": "mean", "min_512": "min of texts of 512 tokens"}
    rows = [[name, *(f"{found[kind]:.4f}" for kind in kinds)] for name, found in model["cosines"].items()]
    text += table(("", *(labels[kind] for kind in kinds)), rows)
    return text + _breakdown(model["breakdown"])


def _cell(times: Results, name: str, workload: str) -> str:
    ms = times[name][workload]
    rivals = [times[rival][workload] for rival in INT8_RIVALS if rival in times]
    beside = [
        min(rivals, default=None),
        *(times.get(other, {}).get(workload) for other in ("torch.ao", "fp32")),
    ]
    ratios = ", ".join(f"{other / ms:.2f} x" if other else "-" for other in beside)
    return f"{ms:.2f} ({ratios})" if ms < 10 else f"{ms:.1f} ({ratios})"


def _breakdown(found: Results) -> str:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    total = found["total_ms"]
    rows = [
        [name, ms(group["ms"]), f"{100 * group['ms'] / total:.0f} %", ms(group["limit_ms"])]
        for name, group in found["groups"].items()
    ]
    limits = [group["limit_ms"] for group in found["groups"].values() if group["limit_ms"]]
    rows.append(["whole forward", ms(total), "100 %", ms(sum(limits) if limits else None)])
    peak = f"{found['int8_gops']:.0f} GOPS" if found["int8_gops"] else "not measured"
    text = (
        f"\nOne forward of {found['workload']}, fused, rotated, 1 thread, by group. The limit is the time of "
        f"the int8 products at the measured peak ({peak}). Layers within fused ops count by the time that "
        "they take alone; what the op takes beyond it counts as norms.\n\n"
    )
    text += table(("", "ms", "of the whole", "limit ms"), rows) + "\n"
    ops = [[e["op"], str(e["calls"]), ms(e["ms"]), ms(e["limit_ms"])] for e in found["ops"]]
    return text + table(("op", "calls", "ms", "limit ms"), ops)
