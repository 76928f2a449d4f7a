"""The kernels beside the card's ceilings, light shapes first."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

import dynquant

from .ceilings import copy_calls
from .clock import Call, measure
from .contenders import Shape, copies, dynquant_gemm, prepare
from .environment import card_state
from .probe import DTYPES, Probe
from .stages import Recorder

LAUNCH_ROWS = (1, 16, 64, 512, 4096)
LAUNCH_LIMITS = {"per_token": 2, "per_tensor": 3}
SMALL_M = (1, 2, 4, 8, 16)
SMALL_WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336))  # N, K
LARGE_M = (1024, 4096, 8192)
LARGE_WEIGHTS = ((4096, 4096), (14336, 4096))
GEMM_SIZES = (4096, 8192)
ROWS = ((8192, 4096, torch.bfloat16), (16384, 4096, torch.bfloat16), (8192, 8192, torch.float32))


def run(record: Recorder, device: torch.device, probe: Probe, *, small: bool = False) -> None:
    """``small``: sizes for a look at the code, not for a result."""
    launches(record, device, LAUNCH_ROWS[:3] if small else LAUNCH_ROWS, 64 if small else 4096)
    weights = ((48, 64),) if small else SMALL_WEIGHTS
    for n, k in weights:
        for m in (1, 5) if small else SMALL_M:
            small_product(record, device, probe, Shape(m, n, k))
    for m, k, dtype in ((40, 64, torch.bfloat16),) if small else ROWS:
        rows(record, device, probe, m, k, dtype)
    for n, k in weights:
        for m in (1, 5) if small else SMALL_M:
            layer(record, device, Shape(m, n, k))
    for size in (64,) if small else GEMM_SIZES:
        large_product(record, device, probe, Shape(size, size, size))
    for n, k in ((48, 64),) if small else LARGE_WEIGHTS:
        for m in (40,) if small else LARGE_M:
            layer(record, device, Shape(m, n, k))
    record.set("card_after", card_state())


def small_product(record: Recorder, device: torch.device, probe: Probe, shape: Shape) -> None:
    """Our GEMM alone against the time in which a copy moves as many bytes as the weight has."""
    calls, plan = dynquant_gemm(probe, shape, device)
    weight_bytes = shape.n * shape.k
    # A copy of half as many bytes reads and writes as many as the weight has; a large one tells the
    # bandwidth.
    reference = 64 << 20 if device.type == "cuda" else 1 << 16
    result = measure({"dynquant": calls, "copy": copy_calls(reference, device)}, device)
    bytes_per_us = 2 * reference / result["copy"]["us"]
    limit_us = weight_bytes / bytes_per_us
    record.add(
        "small_product",
        _named(shape)
        | {
            "plan": plan,
            "us": result["dynquant"]["us"],
            "weight_read_us": limit_us,
            "copy_gbs": bytes_per_us / 1e3,
            "of_limit": result["dynquant"]["us"] / limit_us,
        },
    )


def rows(record: Recorder, device: torch.device, probe: Probe, m: int, k: int, dtype: torch.dtype) -> None:
    """Quantization and range against a copy that reads and writes as many bytes together."""
    size = torch.empty(0, dtype=dtype).element_size()
    inputs = [torch.randn(m, k, device=device).to(dtype) for _ in range(copies(m * k * size, device))]
    q = torch.empty(m, -(-k // 16) * 16, dtype=torch.int8, device=device)
    scale = torch.empty(m, device=device)
    zero_point = torch.empty(m, dtype=torch.int32, device=device)
    assert dtype in DTYPES
    cases: dict[str, tuple[list[Call], int]] = {
        "quantize per_token": (
            [partial(probe.quantize, x, q, scale, zero_point) for x in inputs],
            m * k * (size + 1),
        ),
        "quantize per_token, rotation 64": (
            [partial(probe.quantize, x, q, scale, zero_point, 64) for x in inputs],
            m * k * (size + 1),
        ),
        "min_max per_tensor": (
            [partial(torch.ops.dynquant.min_max, x, False) for x in inputs],
            m * k * size,
        ),
        "min_max per_token": (
            [partial(torch.ops.dynquant.min_max, x, True) for x in inputs],
            m * k * size,
        ),
    }
    for name, (calls, moved) in cases.items():
        result = measure({name: calls, "copy": copy_calls(moved // 2, device)}, device)
        if "us" not in result[name]:
            record.add("rows", {"name": name, "M": m, "K": k} | result[name])
            continue
        us, copy_us = result[name]["us"], result["copy"]["us"]
        record.add(
            "rows",
            {
                "name": name,
                "M": m,
                "K": k,
                "dtype": str(dtype).removeprefix("torch."),
                "us": us,
                "copy_us": copy_us,
                "bytes": moved,
                "gbs": moved / us / 1e3,
                "of_copy": us / copy_us,
            },
        )


def large_product(record: Recorder, device: torch.device, probe: Probe, shape: Shape) -> None:
    """Our GEMM with its epilogue against the libraries' int8 products without one."""
    names = ["cuBLASLt int8", "torch._int_mm", "torch._int_mm + dequantization", "bf16 matmul"]
    calls, left_out = prepare(names, shape, device)
    ours, plan = dynquant_gemm(probe, shape, device)
    result = measure({"dynquant": ours} | calls, device, seconds=4.0)
    contenders: dict[str, dict[str, Any]] = {name: {"left_out": why} for name, why in left_out.items()}
    for name, entry in result.items():
        contenders[name] = entry | ({"tops": shape.tops(entry["us"])} if "us" in entry else {})
    record.add("large_product", _named(shape) | {"plan": plan, "contenders": contenders})


def layer(record: Recorder, device: torch.device, shape: Shape) -> None:
    """The whole QLinear, bf16 in and out, against bf16 nn.Linear; as many layers as push each other out of
    L2."""
    count = copies(shape.n * shape.k, device)
    floats = [
        nn.Linear(shape.k, shape.n, device=device, dtype=torch.bfloat16).requires_grad_(False).eval()
        for _ in range(count)
    ]
    x = torch.randn(shape.m, shape.k, dtype=torch.bfloat16, device=device)
    contenders: dict[str, list[Call]] = {"bf16 nn.Linear": [partial(one, x) for one in floats]}
    for activations in ("per_token", "per_tensor"):
        layers = [dynquant.QLinear.from_float(one, activations=activations) for one in floats]
        contenders[activations] = [partial(one, x) for one in layers]
    with torch.inference_mode():
        result = measure(contenders, device)
    record.add("layer", _named(shape) | {"contenders": result})


def launches(record: Recorder, device: torch.device, numbers_of_rows: tuple[int, ...], size: int) -> None:
    """Kernels, copies and fills that the profiler sees of one forward."""
    for activations, limit in LAUNCH_LIMITS.items():
        one = dynquant.QLinear(
            size, size, device=device, dtype=torch.bfloat16, activations=activations
        ).requires_grad_(False)
        for m in numbers_of_rows:
            x = torch.randn(m, size, dtype=torch.bfloat16, device=device)
            with torch.inference_mode():
                names = seen_on_device(partial(one, x), device)
            record.add(
                "launches",
                {"activations": activations, "M": m, "limit": limit, "count": len(names), "names": names},
            )


def seen_on_device(call: Call, device: torch.device) -> list[str]:
    """What ran on the card during ``call``, by the profiler; empty where it sees no card."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_device = DeviceType.CUDA
    return [event.name[:80] for event in profiler.events() or [] if event.device_type == on_device]


def _named(shape: Shape) -> dict[str, Any]:
    return {"M": shape.m, "N": shape.n, "K": shape.k}
