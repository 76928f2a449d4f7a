"""Every kernel on small ragged shapes, without torch, for compute-sanitizer's memcheck.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.memcheck LIBRARY

Each operand has its own allocation, so that memcheck sees an access outside of it. Accumulators are
compared with sums in Python; the other outputs are not compared.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from operator import mul
from pathlib import Path

from .probe import Probe, ProbeGemm, ProbeLinear, Tile

SHAPES = ((1, 40, 144), (3, 33, 100), (20, 70, 80), (140, 130, 272))
FLOATS = ((0, 4), (1, 2))  # number and size of fp32 and bf16
NULL = ctypes.c_void_p()
SCHEMES = (0, 1, 4 << 2)  # of dynquant/config.py: per_token, per_tensor, rotation by 8


class Operands:
    """Random operands of one shape on the device, and their exact accumulators."""

    def __init__(self, probe: Probe, m: int, n: int, k: int, rng: random.Random) -> None:
        self._probe, self.m, self.n, self.k = probe, m, n, k
        self.row_bytes = -(-k // 16) * 16
        q, weight = ([[rng.randrange(-127, 128) for _ in range(k)] for _ in range(rows)] for rows in (m, n))
        self.sums = [sum(map(mul, row, column)) for row in q for column in weight]
        self.q, self.weight = self._rows(q), self._rows(weight)
        self.scale, self.weight_scale, self.bias = (
            self._put(struct.pack(f"{count}f", *[rng.random() for _ in range(count)])) for count in (m, n, n)
        )
        self.zero_point, self.weight_sum = (
            self._put(struct.pack(f"{count}i", *range(count))) for count in (m, n)
        )
        self.x = {size: self._put(rng.randbytes(m * k * size)) for _, size in FLOATS}

    def _rows(self, rows: Sequence[Sequence[int]]) -> int:
        padding = bytes(self.row_bytes - self.k)
        return self._put(b"".join(struct.pack(f"{self.k}b", *row) + padding for row in rows))

    def _put(self, values: bytes) -> int:
        address = self._probe.allocate(len(values))
        self._probe.call("probe_copy", ctypes.c_void_p(address), values, ctypes.c_int64(len(values)))
        return address

    def run(self, name: str, arguments: ctypes.Structure, element: int) -> bytes:
        """The output of one product or forward."""
        _, workspace = self._probe.plan(name, arguments)
        reference = ctypes.byref(arguments)
        size = self.m * self.n * element
        scratch, out = self._probe.allocate(workspace), self._probe.allocate(size)
        arguments.out = out
        self._probe.call(name, reference, ctypes.c_void_p(scratch), NULL)
        result = ctypes.create_string_buffer(size)
        self._probe.call("probe_copy", result, ctypes.c_void_p(out), ctypes.c_int64(size))
        for address in (scratch, out):
            self._probe.call("probe_free", ctypes.c_void_p(address))
        return result.raw


def main(library: Path, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> int:
    """1 after wrong accumulators, else 0."""
    probe, wrong = Probe(library), 0
    for shape in shapes:
        operands = Operands(probe, *shape, random.Random(1))
        for tile in probe.tiles():
            for parts in (1,) if tile.kernel == "wgmma" else (1, 2):
                wrong += not gemms(operands, replace(tile, parts=parts))
        forwards(operands)
        print(shape, "wrong so far:", wrong, flush=True)
    return 1 if wrong else 0


def gemms(operands: Operands, tile: Tile) -> bool:
    """Whether the accumulators are right; runs float outputs with every epilogue too."""
    numbers = *tile.numbers, operands.q, operands.weight
    arguments = ProbeGemm(*numbers, operands.row_bytes, operands.m, operands.n, operands.k, out_dtype=3)
    sums = struct.unpack(f"{len(operands.sums)}i", operands.run("probe_gemm", arguments, 4))
    for name in ("scale", "zero_point", "weight_scale", "weight_sum", "bias"):
        setattr(arguments, name, getattr(operands, name))
    for (dtype, size), function in itertools.product(FLOATS, range(5)):
        arguments.out_dtype, arguments.function = dtype, function
        operands.run("probe_gemm", arguments, size)
    if list(sums) != operands.sums:
        print(f"{tile}: wrong accumulators", flush=True)
    return list(sums) == operands.sums


def forwards(operands: Operands) -> None:
    """Whole forwards of every scheme, fused and not, x random bits."""
    m, n, k = operands.m, operands.n, operands.k
    for dtype, size in FLOATS:
        arguments = ProbeLinear(-1, x_dtype=dtype, out_dtype=dtype, m=m, n=n, k=k, x=operands.x[size])
        for name in ("weight", "weight_sum", "weight_scale", "bias"):
            setattr(arguments, name, getattr(operands, name))
        for config, separate in itertools.product(SCHEMES if k % 8 == 0 else SCHEMES[:2], (0, 1)):
            arguments.config, arguments.separate = config, separate
            operands.run("probe_linear", arguments, size)
        arguments.config, arguments.scale, arguments.zero_point = 0, operands.scale, operands.zero_point
        operands.run("probe_linear", arguments, size)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), SHAPES[:1] if "--small" in sys.argv else SHAPES))
