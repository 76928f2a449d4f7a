"""Small shapes through every kernel and nothing else: what compute-sanitizer runs. Needs torch, a card and a
build."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

from dynquant import reference
from dynquant.config import Config

from .bits import difference
from .build import LIBRARY
from .correctness import Judge, Layer, Setting, force_one, make_layer
from .probe import Probe

SHAPES = ((1, 40, 144), (6, 33, 100), (20, 70, 80), (140, 130, 272))


def run(device: torch.device, library: Path) -> list[str]:
    """Every op and every kernel once or twice; returns what differs from the reference.

    Inputs come from the CPU and outputs go there, so that hardly a kernel of torch's own is started.
    """
    torch.manual_seed(0)
    judge = Judge("sanitized")
    setting = Setting(device, 0, 0.0, library)
    for (m, n, k), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        x = torch.randn(m, k).to(dtype)
        for activations, static in (("per_token", False), ("per_tensor", False), ("per_token", True)):
            config = Config(activations=activations, rotation_block=0 if static else 4, epilogue="gelu")
            check(judge, make_layer(n, k, config, static=static), x, device)
        here = x.to(device)
        for per_token in (True, False):
            lo, hi = torch.ops.dynquant.min_max(here, per_token)
            qparams = torch.ops.dynquant.choose_qparams(lo, hi)
            q = torch.ops.dynquant.quantize(here, *qparams)
            expected = reference.quantize(x, *reference.choose_qparams(*reference.min_max(x, per_token)))
            judge.same(q.cpu(), expected, f"quantize {[m, k]} {dtype} per_token={per_token}")
        judge.same(
            torch.ops.dynquant.rotate(here, 4).cpu(), reference.rotate(x, 4), f"rotate {[m, k]} {dtype}"
        )
    probe = Probe(library)
    for one in probe.runnable():
        m, n, k = (140, 70, 272) if one.kernel in ("mma", "wgmma") else (6, 40, 272)
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        force_one(judge, probe, one, q, make_layer(n, k, Config()), setting)
    return judge.faults


def check(judge: Judge, layer: Layer, x: torch.Tensor, device: torch.device) -> None:
    """One linear, compared on the CPU."""
    operands = layer.on(torch.device("cpu"))
    on_card = (layer.weight, layer.weight.sum(1, dtype=torch.int32), *operands[2:])
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in on_card]
    if device.type == "cpu":
        moved[0] = operands[0]
    actual = getattr(torch.ops.dynquant, layer.op)(x.to(device), *moved).cpu()
    found = difference(actual, getattr(reference, layer.op)(x, *operands))
    judge.true(found is None, f"{layer.op} {list(x.shape)} {layer.config}: {found}")


if __name__ == "__main__":
    faults = run(torch.device("cuda"), LIBRARY)
    print("\n".join(faults))
    sys.exit(1 if faults else 0)
