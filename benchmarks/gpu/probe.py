"""The kernels one by one: probe.cu through ctypes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynquant.config import EPILOGUES

KERNELS = ("small_dp4a", "small_mma", "mma", "wgmma")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}
Tile = tuple[int, int]
# Every kernel and tile that gemm_plan.h can choose.
TILES: dict[str, tuple[Tile, ...]] = {
    "small_dp4a": ((1, 16), (4, 16), (16, 16)),
    "small_mma": ((8, 16), (16, 32)),
    "mma": ((64, 64), (128, 128)),
    "wgmma": ((128, 64), (128, 128), (128, 256)),
}


class _Gemm(ctypes.Structure):
    """ProbeGemm of probe.cu."""

    _fields_ = (
        ("kernel", ctypes.c_int32),
        ("tile_m", ctypes.c_int32),
        ("tile_n", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("q", ctypes.c_void_p),
        ("q_row_bytes", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int32),
        ("function", ctypes.c_int32),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
        ("weight_sum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Forced:
    """A kernel, its tile and its number of parts of k, instead of the plan's choice."""

    kernel: str
    tile: Tile
    parts: int = 1


@dataclass(frozen=True)
class Dequantization:
    """What the epilogue reads: scale fp32 and zero_point int32 [M]; weight_scale fp32, weight_sum int32 [N];
    bias fp32 [N] or None."""

    scale: Tensor
    zero_point: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    bias: Tensor | None
    epilogue: str = "none"


class Product:
    """One GEMM, ready to run: its tensors, its workspace, the plan.

    Attributes:
        out: [M, N], int32 accumulators, or floats with a Dequantization.
        plan: (kernel, tile_m, tile_n, parts) that runs.
    """

    def __init__(
        self,
        probe: Probe,
        q: Tensor,
        weight: Tensor,
        out: Tensor,
        dequantization: Dequantization | None,
        forced: Forced | None,
    ) -> None:
        """
        Args:
            q: int8 [M, K rounded up to a multiple of 16], zeros beyond K.
            weight: int8 [N, K]. out: [M, N], contiguous.

        Raises:
            ValueError: for an output dtype that does not go with the dequantization.
        """
        if (out.dtype == torch.int32) != (dequantization is None):
            raise ValueError(
                f"expected int32 accumulators or a dequantization, got {out.dtype} and {dequantization}"
            )
        self._probe, self._keep = probe, (q, weight, dequantization)
        self.out = out
        (m, row_bytes), (n, k) = q.shape, weight.shape
        kernel = forced or Forced("", (0, 0))
        arguments = _Gemm(
            kernel=KERNELS.index(kernel.kernel) if forced else -1,
            tile_m=kernel.tile[0],
            tile_n=kernel.tile[1],
            parts=kernel.parts,
            q=q.data_ptr(),
            q_row_bytes=row_bytes,
            weight=weight.data_ptr(),
            m=m,
            n=n,
            k=k,
            out=out.data_ptr(),
            out_dtype=DTYPES[out.dtype],
        )
        if dequantization is not None:
            arguments.function = EPILOGUES.index(dequantization.epilogue)
            for name in ("scale", "zero_point", "weight_scale", "weight_sum"):
                setattr(arguments, name, getattr(dequantization, name).data_ptr())
            if dequantization.bias is not None:
                arguments.bias = dequantization.bias.data_ptr()
        self._arguments = arguments
        plan, workspace = (ctypes.c_int32 * 4)(), ctypes.c_int64()
        probe.call("probe_plan", ctypes.byref(arguments), plan, ctypes.byref(workspace))
        self.plan: tuple[str, int, int, int] = (KERNELS[plan[0]], plan[1], plan[2], plan[3])
        self.workspace = torch.full((workspace.value,), 0x5A, dtype=torch.uint8, device=q.device)

    def run(self) -> Tensor:
        """Launch on the current stream; returns ``out``."""
        stream = stream_of(self.out.device)
        workspace = ctypes.c_void_p(self.workspace.data_ptr())
        self._probe.call("probe_gemm", ctypes.byref(self._arguments), workspace, stream)
        return self.out


class Probe:
    """The library that ``build`` made of probe.cu.

    Attributes:
        capability: 90 for 9.0. code: what the kernels were compiled for.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        numbers = [ctypes.c_int32() for _ in range(3)]
        self.call("probe_device", *map(ctypes.byref, numbers))
        self.capability, self.multiprocessors, self.code = (number.value for number in numbers)

    def call(self, name: str, *arguments: object) -> None:
        """RuntimeError with CUDA's number for an error, where there is one."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: CUDA error {code}")

    def product(
        self,
        q: Tensor,
        weight: Tensor,
        out: Tensor,
        dequantization: Dequantization | None = None,
        forced: Forced | None = None,
    ) -> Product:
        return Product(self, q, weight, out, dequantization, forced)

    def runnable(self) -> list[Forced]:
        """Every kernel and tile that this card can run."""
        least = {"small_dp4a": 75, "small_mma": 80, "mma": 80, "wgmma": 90}
        kernels = [
            name
            for name in KERNELS
            if self.capability >= least[name] and (name != "wgmma" or self.capability == 90)
        ]
        return [Forced(kernel, tile) for kernel in kernels for tile in TILES[kernel]]

    def quantize(
        self, x: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor, rotation_block: int = 0
    ) -> None:
        """x [M, K] per_token into q int8 [M, K rounded up to 16], scale fp32 and zero_point int32 [M]."""
        m, k = x.shape
        self.call(
            "probe_quantize",
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int32(DTYPES[x.dtype]),
            ctypes.c_int64(m),
            ctypes.c_int64(k),
            ctypes.c_int32(rotation_block),
            ctypes.c_void_p(q.data_ptr()),
            ctypes.c_void_p(scale.data_ptr()),
            ctypes.c_void_p(zero_point.data_ptr()),
            stream_of(x.device),
        )


def stream_of(device: torch.device) -> ctypes.c_void_p:
    """The current stream as CUDA knows it."""
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)


def padded(q: Tensor) -> Tensor:
    """int8 [M, K] with zeros up to a K that is a multiple of 16."""
    return torch.nn.functional.pad(q, (0, -q.shape[1] % 16)).contiguous()
