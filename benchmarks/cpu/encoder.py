"""Whole encoders: times, cosines to float, and where the time of one forward goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dynquant.measurement.timing import compare

from . import breakdown, encoder_versions
from .baselines import Unavailable
from .encoder_models import MODELS, Inputs, Model
from .encoder_versions import Call

BREAKDOWN = {"all-MiniLM-L6-v2": "8x128", "BERT-base, random": "8x128", "ViT-B/16, random": "8x197"}
"""Workload of the breakdown by model; where it was not run, the first."""


def run(
    threads: Sequence[int], *, rounds: int, seconds: float, quick: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    """Time every version of every model.

    Returns:
        {"models": [{"name", "samples", "threads": {count: {"milliseconds": {version: {workload: ms}},
        "left_out": {version: reason}}}, "cosines": {version: {"min", "mean", "min_512"}},
        "breakdown": see :func:`benchmarks.cpu.breakdown.measure`}]}, or {"left_out": reason}.
    """
    results = []
    for make in MODELS:
        try:
            model = make(quick)
        except ImportError as error:
            return {"left_out": str(error)}
        results.append(_model(model, threads, rounds, seconds, log))
    return {"models": results}


def _model(
    model: Model, threads: Sequence[int], rounds: int, seconds: float, log: Callable[[str], None]
) -> dict[str, Any]:
    kind = "sentences" if "input_ids" in model.input_names else "random images"
    samples = f"{len(model.samples)} {kind}"
    result: dict[str, Any] = {"name": model.name, "samples": samples, "threads": {}, "cosines": {}}
    for count in threads:
        calls: dict[str, Call] = {}
        left_out: dict[str, str] = {}
        for name in model.versions or encoder_versions.VERSIONS:
            try:
                calls[name] = encoder_versions.prepare(name, model, count)
            except Unavailable as reason:
                left_out[name] = str(reason)
        if not result["cosines"]:
            result["cosines"] = _cosines(model, calls)
        milliseconds: dict[str, dict[str, float]] = {name: {} for name in calls}
        for workload, inputs in model.workloads.items():
            bound = {name: _bind(call, inputs) for name, call in calls.items()}
            for name, timing in compare(bound, threads=count, rounds=rounds, seconds=seconds).items():
                milliseconds[name][workload] = timing.median_us / 1e3
            log(f"{model.name}  threads {count}  {workload} done")
        result["threads"][str(count)] = {"milliseconds": milliseconds, "left_out": left_out}
    workload = BREAKDOWN.get(model.name, "")
    if workload not in model.workloads:
        workload = next(iter(model.workloads))
    result["breakdown"] = breakdown.measure(model, workload, rounds=rounds, seconds=seconds)
    return result


def _bind(call: Call, inputs: Inputs) -> Callable[[], object]:
    return lambda: call(inputs)


def _cosines(model: Model, calls: dict[str, Call]) -> dict[str, dict[str, float]]:
    """By version: the lowest and the mean cosine of its vectors to those of the first version."""

    def vectors(call: Call, samples: Sequence[Inputs]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([call(inputs).float().clone() for inputs in samples])

    first = next(iter(calls))
    expected = vectors(calls[first], model.samples)
    expected_long = vectors(calls[first], model.long_samples) if model.long_samples else None
    found = {}
    for name, call in calls.items():
        if name == encoder_versions.COMPILED:  # would compile for each length
            continue
        cosines = (vectors(call, model.samples) * expected).sum(1)
        found[name] = {"min": cosines.min().item(), "mean": cosines.mean().item()}
        if expected_long is not None:
            long = (vectors(call, model.long_samples) * expected_long).sum(1)
            found[name]["min_512"] = long.min().item()
    return found
