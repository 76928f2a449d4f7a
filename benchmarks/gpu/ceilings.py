"""What the card can do at most: bytes a second of a copy, operations a second of the libraries' products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .clock import Call, measure
from .contenders import RIVALS, Shape, copies, prepare
from .stages import Recorder

COPY_MIB = (64, 256, 1024)
SIZES = (4096, 8192)


def run(record: Recorder, device: torch.device, *, small: bool = False) -> None:
    """``small``: sizes for a look at the code, not for a result."""
    for mib in (1,) if small else COPY_MIB:
        record.add("copy", copy(mib << 20, device))
    for size in (64,) if small else SIZES:
        shape = Shape(size, size, size)
        for name in RIVALS:
            calls, left_out = prepare([name], shape, device)
            entry: dict[str, Any]
            entry = {"left_out": left_out[name]} if left_out else measure(calls, device)[name]
            if "us" in entry:
                entry["tops"] = shape.tops(entry["us"])
            record.add("products", {"name": name, "M": size, "N": size, "K": size} | entry)


def copy_calls(count: int, device: torch.device) -> list[Call]:
    """Copies of ``count`` bytes on the device, between buffers that rotate."""
    pairs = [
        tuple(torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
        for _ in range(copies(2 * count, device))
    ]
    for source, target in pairs:
        source.zero_()
        target.zero_()
    return [partial(target.copy_, source) for source, target in pairs]


def copy(count: int, device: torch.device) -> dict[str, object]:
    """{"bytes": copied, "us", "gbs": 10^9 bytes a second, read and written ones together, ...}"""
    result = measure({"copy": copy_calls(count, device)}, device)["copy"]
    return {"bytes": count, "gbs": 2 * count / result["us"] / 1e3} | result
