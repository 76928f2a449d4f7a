"""Implementations of one layer's product, ours and the libraries', on operands too large together for L2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dynquant import reference
from dynquant.config import Config

from ..shared.bits import difference
from . import cublaslt, probe
from .clock import Call, measure
from .probe import Layer, Probe, Tile, padded
from .results import short
from .setting import Setting

ROTATE_OVER = 3  # total weights of all copies, in multiples of the L2 size


def copies(bytes_of_one: int, device: torch.device) -> int:
    """Number of operands of this size that evict each other from L2; at least 2."""
    l2 = 4 << 10
    if device.type == "cuda":
        l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 50 << 20)
    return max(2, -(-ROTATE_OVER * l2 // max(bytes_of_one, 1)))


def copy_calls(count: int, device: torch.device) -> list[Call]:
    """Copies of ``count`` bytes on the device, between rotating buffers."""
    pairs = [
        [torch.ones(max(count, 1), dtype=torch.uint8, device=device) for _ in range(2)]
        for _ in range(copies(2 * count, device))
    ]
    return [partial(target.copy_, source) for source, target in pairs]


@dataclass
class Comparison:
    """Candidates of one shape: times of those that can run, reasons of the others."""

    setting: Setting
    calls: dict[str, Sequence[Call]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)

    def add(self, name: str, make: Callable[[], Sequence[Call]], *, ours: bool = False) -> None:
        """``ours``: a candidate that must run and give the right result."""
        self.ours += [name] if ours else []
        try:
            calls = make()
        except Exception as error:
            self.results[name] = {"left_out": short(error)}
            return
        if isinstance(calls[0], probe.Call):
            self.results[name] = {"plan": calls[0].plan}
        self.calls[name] = calls

    def run(self, seconds: float = 1.0) -> dict[str, Any]:
        """{"times": {candidate: {"us", ..., "plan" of ours} or {"left_out"}}, "faults"}"""
        for name, result in measure(self.calls, self.setting.device, seconds=seconds).items():
            self.results[name] = self.results.get(name, {}) | result
        faults = sum("left_out" in self.results[name] for name in self.ours)
        return {"times": self.results, "faults": faults}


class Operands:
    """int8 and bf16 operands of one shape, shared by all candidates.

    Attributes:
        q, x: int8 [M, K padded] and bf16 [M, K]. layers: enough to evict each other from L2.
    """

    def __init__(self, m: int, n: int, k: int, device: torch.device) -> None:
        self.m, self.n, self.k, self.device = m, n, k, device
        self.q = padded(torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device))
        self.x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        self.scale = torch.rand(m, device=device) * 0.02 + 0.001
        self.zero_point = torch.randint(-128, 128, (m,), dtype=torch.int32, device=device)
        self.layers = [self._layer() for _ in range(copies(n * k, device))]

    def _layer(self) -> Layer:
        """A layer with qparams of x, which a GEMM reads."""
        weight = torch.randint(-127, 128, (self.n, self.k), dtype=torch.int8, device=self.device)
        weight_scale = torch.rand(self.n, device=self.device) * 0.001 + 0.0001
        bias = torch.randn(self.n, device=self.device)
        weight_sum = weight.sum(1, dtype=torch.int32)
        return Layer(padded(weight), weight_sum, weight_scale, bias, self.scale, self.zero_point)

    def gemms(
        self, setting: Setting, library: Probe, dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None
    ) -> list[Call]:
        """Our GEMM: int32 accumulators, or floats with zero point, scales, bias and cast."""
        out = torch.empty(self.m, self.n, dtype=dtype, device=self.device)
        calls = [library.product(self.q, layer, self.k, out, tile) for layer in self.layers]
        expected = self.accumulators if dtype == torch.int32 else self.product
        return _checked(setting, calls, expected)

    def forwards(
        self, setting: Setting, library: Probe, tile: Tile | None = None, separate: bool = False
    ) -> list[Call]:
        """Our whole forward, bf16 in and out, per_token."""
        out = torch.empty(self.m, self.n, dtype=torch.bfloat16, device=self.device)
        config = Config().encode()
        layers = [replace(layer, scale=None, zero_point=None) for layer in self.layers]
        calls = [library.forward(self.x, layer, config, out, tile, separate) for layer in layers]
        return _checked(setting, calls, self.forward)

    # ---- expected results of the first layer; a product in fp64 is exact ----

    @cached_property
    def accumulators(self) -> Tensor:
        return self._exact(self.q).to(torch.int32)

    @cached_property
    def product(self) -> Tensor:
        return self._dequantized(self._exact(self.q), self.scale, self.zero_point)

    @cached_property
    def forward(self) -> Tensor:
        qparams = reference.choose_qparams(*reference.min_max(self.x, True))
        return self._dequantized(self._exact(padded(reference.quantize(self.x, *qparams))), *qparams)

    def _exact(self, q: Tensor) -> Tensor:
        return q.double() @ self.layers[0].weight.double().t()

    def _dequantized(self, acc: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        layer = self.layers[0]
        compensated = acc - zero_point[:, None].double() * layer.weight_sum.double()
        assert layer.bias is not None
        y = reference.dequantize(compensated, layer.weight_scale, scale, layer.bias)
        return y.to(torch.bfloat16)

    # ---- baselines ----

    def bf16_linear(self) -> list[Call]:
        bias = torch.randn(self.n, dtype=torch.bfloat16, device=self.device)
        weights = [
            torch.randn(self.n, self.k, dtype=torch.bfloat16, device=self.device)
            for _ in range(copies(2 * self.n * self.k, self.device))
        ]
        return [partial(torch.nn.functional.linear, self.x, weight, bias) for weight in weights]

    def int_mm(self) -> list[Call]:
        return [partial(torch._int_mm, self.q, layer.weight.t()) for layer in self.layers]

    def int_mm_and_dequantization(self) -> list[Call]:
        """torch._int_mm, then zero point, scales, bias and cast as torch ops."""

        def call(layer: Layer) -> Tensor:
            acc = torch._int_mm(self.q, layer.weight.t()) - self.zero_point[:, None] * layer.weight_sum
            assert layer.bias is not None
            y = acc.float() * self.scale[:, None] * layer.weight_scale + layer.bias
            return y.to(torch.bfloat16)

        return [partial(call, layer) for layer in self.layers]

    def fp8(self) -> list[Call]:
        one = torch.ones((), device=self.device)
        x = self.q.bfloat16().to(torch.float8_e4m3fn)
        weights = [layer.weight.bfloat16().to(torch.float8_e4m3fn).t() for layer in self.layers]
        scaled = partial(torch._scaled_mm, x, out_dtype=torch.bfloat16, use_fast_accum=True)
        return [partial(scaled, weight, scale_a=one, scale_b=one) for weight in weights]

    def cublaslt_int8(self) -> list[Call]:
        """By the algorithm that cuBLASLt's heuristic ranks first."""
        product = cublaslt.Int8Product(cublaslt.find_library(), self.m, self.n, self.k, self.device)
        out = torch.empty(self.m, self.n, dtype=torch.int32, device=self.device)
        calls = [partial(product.run, self.q, layer.weight, out) for layer in self.layers]
        if not torch.equal(calls[0](), self.accumulators):
            raise RuntimeError("cuBLASLt's int8 product is not exact: wrong arguments for this version?")
        return list(calls)


def _checked(setting: Setting, calls: list[probe.Call], expected: Tensor) -> list[Call]:
    plan = calls[0].plan
    if plan.startswith(tuple(f"{name}," for name in setting.distrusted)) or plan in setting.distrusted:
        raise RuntimeError(f"{plan} is skipped: it hung or crashed when it was judged")
    calls[0].out.fill_(-1)
    found = difference(calls[0](), expected)
    if found is not None:
        raise RuntimeError(f"{plan} gives a wrong result: {found}")
    return list(calls)
