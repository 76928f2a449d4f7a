"""Shapes, inputs and the count of faults for the checks on a card and the CUDA tests over the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynquant import reference
from dynquant.config import Config

from ..shared.bits import difference
from . import probe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, N, K: single elements, primes, tile sizes and their neighbours, K a multiple of 16 and not.
SHAPES = (
    (1, 1, 1),
    (1, 129, 4096),
    (1, 24, 30_000),
    (4, 96, 14336),
    (3, 40, 144),
    (4, 70, 129),
    (8, 33, 513),
    (16, 257, 272),
    (17, 31, 100),
    (64, 64, 128),
    (65, 130, 1040),
    (129, 257, 272),
    (200, 96, 48),
    (300, 520, 1152),
)
SMALL_SHAPES = ((3, 40, 144), (17, 31, 100))  # for a rehearsal
EMPTY = ((0, 5, 3), (5, 0, 3), (5, 4, 0), (1, 1, 0), (40, 20, 0))
# Rows for a warp, for blocks of 128, 256, 512 and 1024 threads, and longer ones; odd and even lengths.
ROW_LENGTHS = (1, 3, 64, 1000, 1024, 1025, 2048, 2049, 4090, 4096, 4097, 8192, 8193, 16384, 16385, 40000)
FAULTS_KEPT = 5


@dataclass
class Judge:
    """Counts cases and keeps the first faults."""

    cases: int = 0
    faults: int = 0
    first_faults: list[dict[str, Any]] = field(default_factory=list)

    def same(self, actual: Tensor, expected: Tensor, case: str) -> None:
        """One case: ``actual`` has the bits of ``expected``."""
        self._count(difference(actual, expected), case)

    def true(self, condition: bool, case: str) -> None:
        """One case without tensors."""
        self._count(None if condition else {}, case)

    def _count(self, found: dict[str, Any] | None, case: str) -> None:
        self.cases += 1
        if found is not None:
            self.faults += 1
            if len(self.first_faults) < FAULTS_KEPT:
                self.first_faults.append({"what": case} | found)


def awkward_rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows with edge cases: one sign, constants, largest and smallest values, NaN, infinities."""
    x = torch.randn(m, k)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    makers: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda row: row.abs(),
        lambda row: -row.abs(),
        torch.zeros_like,
        lambda row: torch.full_like(row, -3.25),
        lambda row: row.sign() * largest,
        lambda row: row * smallest * 2**-3,
        lambda row: row.index_fill(0, torch.tensor([k // 2]), float("nan")),
        lambda row: row.index_fill(0, torch.tensor([k - 1]), float("inf")),
        lambda row: row.index_fill(0, torch.tensor([0]), -float("inf")),
        lambda row: -torch.zeros_like(row),
    )
    for i in range(m):
        x[i] = makers[i % len(makers)](x[i])
    return x.to(dtype)


def guarded(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, offset: int = 0
) -> tuple[Tensor, Callable[[], bool]]:
    """A tensor of garbage inside a larger block of it, and a check that the bytes around it are untouched.

    Args:
        offset: elements from an aligned address to the first element.
    """
    element = torch.empty(0, dtype=dtype).element_size()
    start, size = 1024 + offset * element, shape[0] * shape[1] * element
    memory = torch.full((size + 2 * start,), 0xFF, dtype=torch.uint8, device=device)

    def is_whole() -> bool:
        return bool((memory[:start] == 0xFF).all()) and bool((memory[start + size :] == 0xFF).all())

    return memory[start : start + size].view(dtype).view(shape), is_whole


@dataclass(frozen=True)
class Int8Layer:
    """A quantized weight as plain int8 [N, K] on the CPU, the source of each device's packed operands."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    config: Config
    qparams: tuple[Tensor, Tensor] | None

    @property
    def op(self) -> str:
        return "linear_dynamic" if self.qparams is None else "linear_static"

    def arguments(self, device: torch.device) -> tuple[Any, ...]:
        """The arguments of the op after x."""
        operands = reference.pack_weight(self.weight.to(device))
        tensors = (self.weight_scale, self.bias, *(self.qparams or ()))
        on_device = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return (*operands, *on_device, self.config.encode(self.weight.shape[1]))

    def on(self, device: torch.device) -> probe.Layer:
        """The probe's operands."""
        weight = self.weight.to(device)
        tensors = (weight.sum(1, dtype=torch.int32), self.weight_scale, self.bias, *(self.qparams or ()))
        on_device = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return probe.Layer(probe.padded(weight), *on_device)  # type: ignore[arg-type]

    def expected(self, x: Tensor) -> Tensor:
        """The reference's result, on the CPU."""
        result: Tensor = getattr(reference, self.op)(x.cpu(), *self.arguments(torch.device("cpu")))
        return result


def make_layer(n: int, k: int, config: Config, *, bias: bool = True, static: bool = False) -> Int8Layer:
    """Random weights of N channels."""
    weight, scale = reference.quantize_weight(torch.randn(n, k), config.encode())
    qparams = (torch.tensor([0.021]), torch.tensor([-7], dtype=torch.int32)) if static else None
    bias_values = torch.randn(n) if bias else None
    return Int8Layer(weight, scale.expand(n).contiguous(), bias_values, config, qparams)
