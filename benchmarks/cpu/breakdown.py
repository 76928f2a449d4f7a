"""Where the time of one forward goes: linear layers, attention, norms, the rest, beside the int8 limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import dynquant
from dynquant.measurement.timing import interleave, sampler

from . import roofline
from .encoder_models import Model

GROUPS = ("linear", "attention", "norms, residuals", "rest")

_FUSED = {
    "linear_norm": ("layer",),
    "mlp": ("gate", "up", "down"),
    "linear_mlp": ("layer", "gate", "up", "down"),
}
"""The ops of several steps, with their layers in the order of their configs."""

_NORMS = {"aten::native_layer_norm", "aten::_fused_rms_norm", "aten::add", "aten::add_"}
_PROFILED_CALLS = 5


class _Call(NamedTuple):
    """A call of an op of dynquant, with its arguments by name."""

    op: str
    arguments: dict[str, Any]


class _Recorder(TorchDispatchMode):
    """Records the calls of dynquant's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "dynquant":
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls.append(_Call(func._schema.name.partition("::")[2], given))
        return result


class _Layer(NamedTuple):
    """A linear layer of a call: packed_weight, weight_sum, weight_scale and bias, config, K, N."""

    operands: Sequence[Any]
    config: int
    k: int

    @property
    def n(self) -> int:
        size: int = self.operands[2].numel()
        return size


def _layers(call: _Call) -> list[_Layer]:
    a = call.arguments
    if call.op == "linear_dynamic":
        operands = [a["packed_weight"], a["weight_sum"], a["weight_scale"], a["bias"]]
        return [_Layer(operands, a["config"], a["x"].shape[-1])]
    names = _FUSED.get(call.op, ())
    layers: dict[str, _Layer] = {}
    for name, config in zip(names, a.get("configs") or [a.get("config", 0)], strict=True):
        if a[name]:
            before = layers.get({"down": "up"}.get(name, "layer"))
            layers[name] = _Layer(a[name], config, before.n if before else a["x"].shape[-1])
    return list(layers.values())


def _products(call: _Call) -> int:
    """Multiply-accumulates in int8."""
    a = call.arguments
    if call.op == "attention":
        return 2 * a["q"].numel() * int(a["k"].shape[2])
    if call.op not in _FUSED and call.op != "linear_dynamic":
        return 0
    rows: int = a["x"].shape[:-1].numel()
    return sum(rows * layer.k * layer.n for layer in _layers(call))


def _layers_alone(call: _Call) -> list[Callable[[], object]]:
    """The linear layers of a fused op as calls of linear_dynamic."""
    rows = call.arguments["x"].shape[:-1].numel()
    return [
        partial(torch.ops.dynquant.linear_dynamic, torch.randn(rows, layer.k), *layer.operands, layer.config)
        for layer in _layers(call)
    ]


def _all(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _fraction_of_layers(call: _Call, rounds: int, seconds: float) -> float:
    """The share of a fused op that its linear layers take when they run alone; at most 1."""
    op = getattr(torch.ops.dynquant, call.op).default
    arguments = [call.arguments[argument.name] for argument in op._schema.arguments]
    layers = _all(_layers_alone(call))
    samplers = {
        "whole": sampler(partial(op, *arguments), threads=1, seconds=seconds / 4),
        "layers": sampler(layers, threads=1, seconds=seconds / 4),
    }
    samples = interleave(samplers, rounds)
    return min(median(samples["layers"]) / median(samples["whole"]), 1.0)


def measure(model: Model, workload: str, *, rounds: int, seconds: float) -> dict[str, Any]:
    """One forward of the fused, rotated model on one thread.

    The times of ops are those of the profiler within whole forwards. The linear layers of a fused op count
    as linear by the time that they take alone; what remains of it is norms, residuals and quantization.

    Returns:
        {"workload", "total_ms", "int8_gops", "groups": {name: {"ms", "limit_ms"}},
        "ops": [{"op", "calls", "ms", "limit_ms"}]}; "limit_ms" is the time of the products at the int8 peak,
        None where there are none or no peak was measured.
    """
    torch.set_num_threads(1)
    module = dynquant.quantize_dynamic(model.copy(), rotation="hadamard", fuse=True)
    inputs = model.workloads[workload]
    forward = partial(module, *inputs)
    with torch.inference_mode():
        with _Recorder() as recorder:
            forward()
        samplers = {"whole": sampler(forward, threads=1, seconds=seconds)}
        for isa in roofline.int8_isas():
            samplers[isa] = roofline.int8_sampler(isa, 1, seconds / 2)
        samples = interleave(samplers, rounds)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(_PROFILED_CALLS):
                forward()
    total = median(samples.pop("whole")) / 1e3
    gops = max((median(values) for values in samples.values()), default=None)
    milliseconds = {
        entry.key: entry.self_cpu_time_total / _PROFILED_CALLS / 1e3 for entry in profiled.key_averages()
    }

    products: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    example: dict[str, _Call] = {}
    for call in recorder.calls:
        products[call.op] += _products(call)
        calls[call.op] += 1
        example[call.op] = call

    def limit(macs: int) -> float | None:
        return 2 * macs / gops / 1e6 if gops and macs else None

    ms = dict.fromkeys(GROUPS, 0.0)
    ops = []
    for op, count in calls.items():
        time = milliseconds.get(f"dynquant::{op}", 0.0)
        ops.append({"op": op, "calls": count, "ms": time, "limit_ms": limit(products[op])})
        if op in _FUSED:
            with torch.inference_mode():
                share = _fraction_of_layers(example[op], rounds, seconds)
            ms["linear"] += share * time
            ms["norms, residuals"] += (1 - share) * time
        elif op == "attention":
            ms["attention"] += time
        elif op == "linear_dynamic":
            ms["linear"] += time
    ms["attention"] += sum(time for name, time in milliseconds.items() if "scaled_dot_product" in name)
    ms["norms, residuals"] += sum(milliseconds.get(name, 0.0) for name in _NORMS)
    ms["rest"] = max(total - sum(ms.values()), 0.0)
    attention = products.pop("attention", 0)
    limits = {"linear": limit(sum(products.values())), "attention": limit(attention)}
    return {
        "workload": workload,
        "total_ms": total,
        "int8_gops": gops,
        "groups": {name: {"ms": ms[name], "limit_ms": limits.get(name)} for name in GROUPS},
        "ops": sorted(ops, key=lambda entry: -float(entry["ms"])),
    }
