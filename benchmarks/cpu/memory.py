"""Resident bytes per weight: of a converted layer, and of the whole process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from torch import nn

import dynquant

SHAPES = ((128, 256), (768, 768), (768, 3072), (4096, 4096))  # K, N


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """All tensors reachable from the module through attributes and containers."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    stack: list[Any] = [module]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[id(item)] = item
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple, set)):
            stack += item
        elif isinstance(item, (nn.Module, torch.Tensor)) or type(item).__module__.startswith("dynquant"):
            stack += getattr(item, "__dict__", {}).values()
    return list(found.values())


def bytes_a_weight(k: int, n: int) -> float:
    """Bytes of all distinct int8 storages of a QLinear, divided by its weights."""
    layer = dynquant.QLinear.from_float(nn.Linear(k, n))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_of(layer)
        if tensor.dtype == torch.int8
    }
    return sum(storages.values()) / (k * n)


_GROWTH = """
import ctypes, gc, os, torch, dynquant
from torch import nn
def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
linear = nn.Linear(4096, 4096)
dynquant.QLinear.from_float(linear)
before = resident()
layers = [dynquant.QLinear.from_float(linear) for _ in range(4)]
print((resident() - before) / (4 * 4096 * 4096))
"""


def process_growth() -> float:
    """Growth of a fresh process per weight, in bytes, with each further 4096 x 4096 QLinear."""
    done = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True, check=True)
    return float(done.stdout)


def run() -> dict[str, Any]:
    """{"layers": [{"K", "N", "bytes_a_weight"}], "process_growth_4096x4096"}."""
    layers = [{"K": k, "N": n, "bytes_a_weight": bytes_a_weight(k, n)} for k, n in SHAPES]
    return {"layers": layers, "process_growth_4096x4096": process_growth()}
