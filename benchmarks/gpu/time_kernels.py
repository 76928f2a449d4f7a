"""Kernels and whole forwards through the probe, beside libraries, copies and other builds of the kernels.

One entry per shape. The first library, the product, is named "dynquant", each further one after its file.
Every candidate's result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dynquant import reference

from ..shared.bits import difference
from .candidates import Comparison, Operands, copies, copy_calls
from .clock import Call
from .probe import Probe, Tile
from .results import BASELINE
from .setting import Setting

SIZES = (8192, 4096)
FEW_ROWS = (1, 2, 4, 8, 16)
FEW_ROWS_WEIGHTS = ((768, 768), (3072, 768), (4096, 4096), (14336, 4096), (4096, 14336))  # N, K
MIDDLE = (17, 24, 32, 64, 128, 256, 300, 512, 1023, 1024, 4096)
MIDDLE_WEIGHTS = ((768, 768), (4096, 4096), (14336, 4096))
QUANTIZED = ((8192, 4096, torch.bfloat16), (4096, 8192, torch.bfloat16), (8192, 8192, torch.float32))
COPY_BYTES = 256 << 20


def libraries(setting: Setting) -> dict[str, Probe]:
    """The libraries by name."""
    opened = [Probe(path) for path in setting.probes]
    return {probe.name if i else "dynquant": probe for i, probe in enumerate(opened)}


def large(setting: Setting) -> None:
    """Our GEMM with epilogue, and without, against the libraries' products."""
    opened = libraries(setting)

    def measure(size: int) -> dict[str, Any]:
        comparison, operands = Comparison(setting), Operands(size, size, size, setting.device)
        for name, library in opened.items():
            comparison.add(f"{name} bf16", partial(operands.gemms, setting, library), ours=True)
            accumulators = partial(operands.gemms, setting, library, torch.int32)
            comparison.add(f"{name} int32", accumulators, ours=True)
        comparison.add("cuBLASLt int8", operands.cublaslt_int8)
        comparison.add("torch._int_mm", operands.int_mm)
        comparison.add("torch._int_mm + dequantization", operands.int_mm_and_dequantization)
        comparison.add(BASELINE, operands.bf16_linear)
        comparison.add("fp8 torch._scaled_mm", operands.fp8)
        result = comparison.run(4.0)
        for candidate in result["times"].values():
            if "us" in candidate:
                candidate["tops"] = 2 * size**3 / candidate["us"] / 1e6
        return result

    for size in (64,) if setting.small else SIZES:
        setting.time("large", {"M": size, "N": size, "K": size}, partial(measure, size))


def few_rows(setting: Setting) -> None:
    """Our GEMM alone and the whole forward, against the time of a copy of as many bytes as the weight."""
    opened = libraries(setting)
    copied = 1 << 16 if setting.small else COPY_BYTES
    copying = copy_calls(copied, setting.device)
    weights = ((48, 64),) if setting.small else FEW_ROWS_WEIGHTS

    def measure(m: int, n: int, k: int) -> dict[str, Any]:
        comparison, operands = Comparison(setting), Operands(m, n, k, setting.device)
        for name, library in opened.items():
            comparison.add(f"{name} bf16", partial(operands.gemms, setting, library), ours=True)
        add_forwards(comparison, operands, opened)
        comparison.add("copy", lambda: copying)
        comparison.add(BASELINE, operands.bf16_linear)
        result = comparison.run()
        bytes_per_us = 2 * copied / result["times"]["copy"]["us"]
        return result | {"copy_gbs": bytes_per_us / 1e3, "weight_read_us": n * k / bytes_per_us}

    for n, k in weights:
        for m in (1, 5) if setting.small else FEW_ROWS:
            setting.time("few rows", {"M": m, "N": n, "K": k}, partial(measure, m, n, k))


def middle(setting: Setting) -> None:
    """Whole forwards by the plan's choice, beside each other plausible kernel and tile."""
    opened = libraries(setting)

    def measure(m: int, n: int, k: int) -> dict[str, Any]:
        comparison, operands = Comparison(setting), Operands(m, n, k, setting.device)
        add_forwards(comparison, operands, opened)
        comparison.add(BASELINE, operands.bf16_linear)
        return comparison.run()

    for n, k in ((48, 64),) if setting.small else MIDDLE_WEIGHTS:
        for m in (40,) if setting.small else MIDDLE:
            setting.time("middle", {"M": m, "N": n, "K": k}, partial(measure, m, n, k))


def add_forwards(comparison: Comparison, operands: Operands, opened: dict[str, Probe]) -> None:
    """Forwards by each library's plan, and by forced kernels of the product."""
    setting, product = comparison.setting, opened["dynquant"]
    for name, library in opened.items():
        comparison.add(f"{name} forward", partial(operands.forwards, setting, library), ours=True)
    if comparison.results["dynquant forward"].get("plan", "").endswith("fused"):
        separate = partial(operands.forwards, setting, product, None, True)
        comparison.add("dynquant forward, not fused", separate, ours=True)
    for tile in alternative_tiles(product, operands.m, operands.n, operands.k):
        comparison.add(f"forced {tile}", partial(operands.forwards, setting, product, tile), ours=True)


def alternative_tiles(product: Probe, m: int, n: int, k: int) -> Sequence[Tile]:
    """Plausible kernels, tiles and parts of K for a shape."""
    found = []
    for tile in product.tiles():
        small = tile.kernel.startswith("small")
        if tile.m < min(m, 16) or (small and m > 64) or (not small and m <= 8):
            continue
        tiles = -(-m // tile.m) * -(-n // tile.n)
        for parts in (1, 2, 4, 8):
            fits = tiles * parts <= 2 * product.multiprocessors and k >= 512 * parts
            if parts == 1 or (fits and tile.kernel != "wgmma"):
                found.append(replace(tile, parts=parts))
    return found


def quantize(setting: Setting) -> None:
    """The quantize kernel against a copy with the same total of bytes read and written."""
    opened, device = libraries(setting), setting.device

    def measure(m: int, k: int, dtype: torch.dtype, block: int) -> dict[str, Any]:
        comparison = Comparison(setting)
        size = torch.empty(0, dtype=dtype).element_size()
        inputs = [torch.randn(m, k, device=device).to(dtype) for _ in range(copies(m * k * size, device))]
        q = torch.empty(m, -(-k // 16) * 16, dtype=torch.int8, device=device)
        scale, zero_point = torch.empty(m, device=device), torch.empty(m, dtype=torch.int32, device=device)

        def calls(library: Probe) -> list[Call]:
            library.quantize(inputs[0], q, scale, zero_point, block)
            rows = reference.rotate(inputs[0], block, signs=True) if block else inputs[0]
            qparams = reference.choose_qparams(*reference.min_max(rows, True))
            found = difference(q[:, :k], reference.quantize(rows, *qparams))
            if found is not None:
                raise RuntimeError(f"a wrong result: {found}")
            return [partial(library.quantize, x, q, scale, zero_point, block) for x in inputs]

        for name, library in opened.items():
            comparison.add(name, partial(calls, library), ours=True)
        comparison.add("copy", lambda: copy_calls(m * k * (size + 1) // 2, device))
        return comparison.run() | {"bytes": m * k * (size + 1)}

    for m, k, dtype in ((40, 64, torch.bfloat16),) if setting.small else QUANTIZED:
        for block in (0, 64):
            named = {"M": m, "K": k, "dtype": str(dtype).removeprefix("torch."), "rotation": block}
            setting.time("quantize", named, partial(measure, m, k, dtype, block))
