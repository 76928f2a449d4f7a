"""Whole layers, QLinear beside bf16 nn.Linear: under CUDA graphs, as eager calls, and their launches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

import dynquant
from dynquant import _extension

from .candidates import Comparison, copies
from .clock import Call, host_us
from .results import BASELINE
from .setting import Setting

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
WEIGHTS = ((4096, 4096), (14336, 4096))  # N, K
EAGER = ((768, 768), (4096, 4096))
LAUNCHES = (1, 16, 64, 512, 4096)


def run(setting: Setting) -> None:
    if setting.on_card and _extension.extension is None:
        raise SystemExit(_extension.status)
    with torch.inference_mode():
        for n, k in ((48, 64),) if setting.small else EAGER:
            setting.time("eager", {"M": 1, "N": n, "K": k}, partial(eager, setting, 1, n, k))
        for n, k in ((48, 64),) if setting.small else WEIGHTS:
            for m in (1, 40) if setting.small else ROWS:
                setting.time("layer", {"M": m, "N": n, "K": k}, partial(layer, setting, m, n, k))
        for activations in ("per_token", "per_tensor"):
            for m in LAUNCHES:
                named = {"activations": activations, "M": m}
                setting.time("launches", named, partial(launches, setting, m, activations))


def layer(setting: Setting, m: int, n: int, k: int) -> dict[str, Any]:
    """Enough layers of each kind to evict each other from L2, bf16 in and out."""
    comparison = Comparison(setting)
    floats = [float_layer(setting, n, k) for _ in range(copies(n * k, setting.device))]
    x = torch.randn(m, k, dtype=torch.bfloat16, device=setting.device)
    comparison.add(BASELINE, lambda: [partial(one, x) for one in floats])
    for activations in ("per_token", "per_tensor"):

        def quantized(activations: str = activations) -> list[Call]:
            return [partial(checked(one, x, activations), x) for one in floats]

        comparison.add(f"dynquant {activations}", quantized, ours=True)
    if importlib.util.find_spec("torchao"):  # a single layer, which may stay in L2
        comparison.add("torchao, compiled", lambda: [partial(torchao_layer(floats[0]), x)])
    return comparison.run()


def float_layer(setting: Setting, n: int, k: int) -> nn.Linear:
    linear = nn.Linear(k, n, device=setting.device, dtype=torch.bfloat16)
    return linear.requires_grad_(False).eval()


def checked(linear: nn.Linear, x: Tensor, activations: str) -> nn.Module:
    """The quantized layer.

    Raises:
        RuntimeError: its result is far from the float layer's.
    """
    quantized = dynquant.QLinear.from_float(linear, activations=activations)
    expected = linear(x).float()
    error = float((quantized(x).float() - expected).norm() / expected.norm())
    if not error < 0.05:
        raise RuntimeError(f"QLinear {activations} is off by {error:.3f} of nn.Linear's norm")
    return quantized


def torchao_layer(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """torchao's dynamic int8 layer, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    copied = nn.Linear(linear.in_features, linear.out_features, device="meta").eval()
    copied.load_state_dict(linear.state_dict(), assign=True)
    quantize_(copied, Int8DynamicActivationInt8WeightConfig())
    compiled: Callable[[Tensor], Tensor] = torch.compile(copied)
    return compiled


def eager(setting: Setting, m: int, n: int, k: int) -> dict[str, Any]:
    """Consecutive calls from Python; for a small layer the host, not the card, bounds the time."""
    linear = float_layer(setting, n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16, device=setting.device)
    calls: dict[str, Call] = {BASELINE: partial(linear, x)}
    for activations in ("per_token", "per_tensor"):
        calls[f"dynquant {activations}"] = partial(checked(linear, x, activations), x)
    return {"times": host_us(calls, setting.device, calls=5 if setting.small else 200)}


def launches(setting: Setting, m: int, activations: str) -> dict[str, Any]:
    """Kernels, copies and fills of one forward by the profiler; none without a card."""
    size = 64 if setting.small else 4096
    one = dynquant.QLinear(
        size, size, device=setting.device, dtype=torch.bfloat16, activations=activations
    ).requires_grad_(False)
    x = torch.randn(m, size, dtype=torch.bfloat16, device=setting.device)
    one(x)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setting.on_card else [])
    if setting.on_card:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        one(x)
        if setting.on_card:
            torch.cuda.synchronize()
    names = [event.name[:60] for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    return {"count": len(names), "names": names}
