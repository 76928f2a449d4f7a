"""What computes a product of this shape, each way that the card offers, on operands that rotate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import cublaslt
from .clock import Call
from .environment import l2_bytes
from .probe import Dequantization, Forced, Probe

ROTATE_OVER = 3  # the weights of all copies together are so many times the L2


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int

    @property
    def operations(self) -> int:
        """Two for each multiply-accumulate."""
        return 2 * self.m * self.n * self.k

    def tops(self, us: float) -> float:
        """10^12 operations a second."""
        return self.operations / us / 1e6


def copies(bytes_of_one: int, device: torch.device, least: int = 2) -> int:
    """How many operands of this size it takes to push each other out of L2."""
    return max(least, -(-ROTATE_OVER * l2_bytes(device) // max(bytes_of_one, 1)))


def int8(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)


def bf16_matmul(shape: Shape, device: torch.device) -> list[Call]:
    x = torch.randn(shape.m, shape.k, dtype=torch.bfloat16, device=device)
    count = copies(2 * shape.n * shape.k, device)
    weights = [torch.randn(shape.n, shape.k, dtype=torch.bfloat16, device=device).t() for _ in range(count)]
    return [partial(torch.matmul, x, w) for w in weights]


def int_mm(shape: Shape, device: torch.device) -> list[Call]:
    q = int8(shape.m, shape.k, device)
    weights = [int8(shape.n, shape.k, device) for _ in range(copies(shape.n * shape.k, device))]
    return [partial(torch._int_mm, q, w.t()) for w in weights]


def int_mm_and_dequantization(shape: Shape, device: torch.device) -> list[Call]:
    """torch._int_mm, then zero point, scales, bias and cast as torch ops: what dynquant's epilogue does."""
    q = int8(shape.m, shape.k, device)
    values = random_dequantization(shape, device)
    weights = [int8(shape.n, shape.k, device) for _ in range(copies(shape.n * shape.k, device))]

    def call(weight: Tensor) -> Tensor:
        acc = torch._int_mm(q, weight.t()) - values.zero_point[:, None] * values.weight_sum
        y = acc.float() * values.scale[:, None] * values.weight_scale
        return (y if values.bias is None else y + values.bias).bfloat16()

    return [partial(call, w) for w in weights]


def fp8(shape: Shape, device: torch.device) -> list[Call]:
    one = torch.ones((), device=device)
    x = torch.randn(shape.m, shape.k, device=device).to(torch.float8_e4m3fn)
    weights = [
        torch.randn(shape.n, shape.k, device=device).to(torch.float8_e4m3fn)
        for _ in range(copies(shape.n * shape.k, device))
    ]

    def call(weight: Tensor) -> Tensor:
        return torch._scaled_mm(
            x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return [partial(call, w) for w in weights]


def cublaslt_int8(shape: Shape, device: torch.device) -> list[Call]:
    product = cublaslt.Int8Product(cublaslt.find_library(), shape.m, shape.n, shape.k, device)
    q = int8(shape.m, shape.k, device)
    out = torch.empty(shape.m, shape.n, dtype=torch.int32, device=device)
    weights = [int8(shape.n, shape.k, device) for _ in range(copies(shape.n * shape.k, device))]
    product.run(q, weights[0], out)
    rows = torch.randint(0, shape.m, (4,), device=device)
    expected = (q[rows].double() @ weights[0].double().t()).to(torch.int32)
    if not torch.equal(out[rows], expected):
        raise RuntimeError("cuBLASLt's int8 product is not the exact one: the call is not understood")
    return [partial(product.run, q, w, out) for w in weights]


def dynquant_gemm(
    probe: Probe, shape: Shape, device: torch.device, forced: Forced | None = None
) -> tuple[list[Call], str]:
    """Our GEMM with its epilogue (zero point, scales, bias, cast to bf16), and the plan that runs, in words.

    Raises:
        RuntimeError: where its result is not the right one.
    """
    q = int8(shape.m, shape.k, device)
    values = random_dequantization(shape, device)
    out = torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device=device)
    weights = [int8(shape.n, shape.k, device) for _ in range(copies(shape.n * shape.k, device))]
    products = [probe.product(q, weight, out, values, forced) for weight in weights]
    products[0].run()
    rows = torch.randint(0, shape.m, (4,), device=device)
    zero_point = values.zero_point[rows][:, None].double()
    acc = q[rows].double() @ weights[0].double().t() - zero_point * values.weight_sum.double()
    y = (acc.float() * values.scale[rows][:, None]) * values.weight_scale
    y = y if values.bias is None else y + values.bias
    if not torch.equal(out[rows], y.to(torch.bfloat16)):
        raise RuntimeError(f"the kernel {products[0].plan} gives a wrong product")
    kernel, tile_m, tile_n, parts = products[0].plan
    calls: list[Call] = [product.run for product in products]
    return calls, f"{kernel} {tile_m}x{tile_n}" + (f", {parts} parts of K" if parts > 1 else "")


def random_dequantization(shape: Shape, device: torch.device) -> Dequantization:
    """Values in the range of real ones; ``weight_sum`` belongs to no weight, which the epilogue cannot
    tell."""
    return Dequantization(
        torch.rand(shape.m, device=device) * 0.02 + 0.001,
        torch.randint(-128, 128, (shape.m,), dtype=torch.int32, device=device),
        torch.rand(shape.n, device=device) * 0.001 + 0.0001,
        torch.randint(-1000, 1000, (shape.n,), dtype=torch.int32, device=device),
        torch.randn(shape.n, device=device),
    )


RIVALS: dict[str, Callable[[Shape, torch.device], list[Call]]] = {
    "bf16 matmul": bf16_matmul,
    "torch._int_mm": int_mm,
    "torch._int_mm + dequantization": int_mm_and_dequantization,
    "fp8 torch._scaled_mm": fp8,
    "cuBLASLt int8": cublaslt_int8,
}


def prepare(
    names: list[str], shape: Shape, device: torch.device
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """The calls of the named rivals, and for those that cannot be had the reason."""
    calls, left_out = {}, {}
    for name in names:
        try:
            calls[name] = RIVALS[name](shape, device)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            left_out[name] = str(error).strip().split("\n")[0][:300]
    return calls, left_out
