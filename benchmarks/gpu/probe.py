"""The kernels one by one: probe.cu through ctypes. Only what is given tensors imports torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KERNELS = ("small_dp4a", "small_mma", "mma", "wgmma")
DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2, "torch.int32": 3}
EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu")
ERRORS = {
    1: "invalid value",
    2: "out of memory",
    98: "invalid device function",
    209: "no kernel image for this device",
    700: "illegal address",
    701: "too many resources for a launch",
    715: "illegal instruction",
    716: "misaligned address",
    719: "launch failure",
}


@dataclass(frozen=True)
class Tile:
    """A kernel, its tile and its number of parts of k."""

    kernel: str
    m: int
    n: int
    parts: int = 1

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.m}x{self.n}"

    def __str__(self) -> str:
        return self.name + (f", {self.parts} parts of K" if self.parts > 1 else "")


# Every kernel and tile that gemm_plan.h can choose.
TILES = tuple(
    Tile(kernel, m, n)
    for kernel, tiles in (
        ("small_dp4a", ((1, 16), (4, 16))),
        ("small_mma", ((8, 16), (16, 32))),
        ("mma", ((64, 64), (128, 128))),
        ("wgmma", ((128, 64), (128, 128), (128, 256))),
    )
    for m, n in tiles
)


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """``fields``: "name:type", i for int32, l for int64, p for a pointer."""
    types = {"i": ctypes.c_int32, "l": ctypes.c_int64, "p": ctypes.c_void_p}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, types[kind]) for field, kind in pairs]})


ProbeGemm = _structure(
    "ProbeGemm",
    "kernel:i tile_m:i tile_n:i parts:i q:p weight:p row_bytes:l m:l n:l k:l out:p out_dtype:i function:i "
    "scale:p zero_point:p weight_scale:p weight_sum:p bias:p",
)
ProbeLinear = _structure(
    "ProbeLinear",
    "kernel:i tile_m:i tile_n:i parts:i separate:i unused:i x:p x_dtype:i out_dtype:i m:l n:l k:l config:l "
    "weight:p weight_sum:p weight_scale:p bias:p scale:p zero_point:p out:p",
)


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


class Probe:
    """A library that ``build`` made of probe.cu.

    Attributes:
        capability: 90 for 9.0. code: what the kernels were compiled for.
    """

    def __init__(self, library: Path) -> None:
        self.name = library.stem
        self._library = ctypes.CDLL(str(library.resolve()))
        self._library.probe_allocate.restype = ctypes.c_void_p
        numbers = [ctypes.c_int32() for _ in range(3)]
        self.call("probe_device", *map(ctypes.byref, numbers))
        self.capability, self.multiprocessors, self.code = (number.value for number in numbers)

    def call(self, name: str, *arguments: object) -> None:
        """
        Raises:
            RuntimeError: with CUDA's number for an error.
        """
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: CUDA error {code} ({ERRORS.get(code, 'see driver_types.h')})")

    def allocate(self, size: int) -> int:
        """Device memory without torch."""
        address = self._library.probe_allocate(ctypes.c_int64(max(size, 1)))
        if not address:
            raise RuntimeError(f"probe_allocate: no device memory of {size} bytes")
        return int(address)

    def tiles(self) -> list[Tile]:
        """Those of TILES that this card can run."""
        return [tile for tile in TILES if tile.kernel != "wgmma" or self.capability == 90]

    def plan(self, m: int, n: int, k: int) -> Tile:
        """What gemm_plan.h chooses for this shape."""
        return self._plan("probe_plan", ProbeGemm(kernel=-1, m=m, n=n, k=k))[0]

    def _plan(self, name: str, arguments: ctypes.Structure, *more: ctypes.c_int32) -> tuple[Tile, int]:
        plan, workspace = (ctypes.c_int32 * 4)(), ctypes.c_int64()
        numbers = map(ctypes.byref, (*more, workspace))
        self.call(name, ctypes.byref(arguments), plan, *numbers)
        return Tile(KERNELS[plan[0]], plan[1], plan[2], plan[3]), workspace.value

    def product(
        self, q: Tensor, weight: Tensor, k: int, out: Tensor, values: Dequantization | None, tile: Tile | None
    ) -> Call:
        """One GEMM.

        Args:
            q, weight: int8 [M, row_bytes] and [N, row_bytes], zeros beyond k (``padded``).
            out: [M, N], contiguous; int32 accumulators where ``values`` is None.
            tile: None for the plan's choice.
        """
        if (str(out.dtype) == "torch.int32") != (values is None):
            raise ValueError(f"expected int32 accumulators or a dequantization, got {out.dtype} and {values}")
        arguments = ProbeGemm(
            *_numbers(tile),
            q=q.data_ptr(),
            weight=weight.data_ptr(),
            row_bytes=q.shape[1],
            m=q.shape[0],
            n=weight.shape[0],
            k=k,
            out=out.data_ptr(),
            out_dtype=DTYPES[str(out.dtype)],
        )
        if values is not None:
            arguments.function = EPILOGUES.index(values.epilogue)
            _set_pointers(arguments, values, ("scale", "zero_point", "weight_scale", "weight_sum", "bias"))
        plan, workspace = self._plan("probe_plan", arguments)
        return Call(self, "probe_gemm", arguments, workspace, out, (q, weight, values), str(plan))

    def forward(
        self,
        x: Tensor,
        layer: Layer,
        config: int,
        out: Tensor,
        tile: Tile | None = None,
        separate: bool = False,
    ) -> Call:
        """A whole forward of x [M, K].

        Args:
            tile: None for the plan's choice; else quantization is a launch of its own, as with ``separate``.
        """
        (m, k), n = x.shape, layer.weight.shape[0]
        arguments = ProbeLinear(
            *_numbers(tile),
            int(separate),
            x=x.data_ptr(),
            x_dtype=DTYPES[str(x.dtype)],
            out_dtype=DTYPES[str(out.dtype)],
            m=m,
            n=n,
            k=k,
            config=config,
            out=out.data_ptr(),
        )
        names = ("weight", "weight_sum", "weight_scale", "bias", "scale", "zero_point")
        _set_pointers(arguments, layer, names)
        fused = ctypes.c_int32()
        plan, workspace = self._plan("probe_linear_plan", arguments, fused)
        words = f"{plan}, fused" if fused.value else str(plan)
        return Call(self, "probe_linear", arguments, workspace, out, (x, layer), words)

    def quantize(self, x: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor, block: int = 0) -> None:
        """x [M, K] per_token into q int8 [M, K rounded up to 16], scale fp32 and zero_point int32 [M]."""
        numbers = ctypes.c_int32(DTYPES[str(x.dtype)]), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1])
        outputs = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, scale, zero_point)]
        pointer, rotation = ctypes.c_void_p(x.data_ptr()), ctypes.c_int32(block)
        self.call("probe_quantize", pointer, *numbers, rotation, *outputs, stream_of(x.device))


@dataclass(frozen=True)
class Layer:
    """Operands of a forward, on the device: weight int8 [N, K rounded up to 16] with zeros beyond K,
    weight_sum int32 and weight_scale fp32 [N], bias fp32 [N] or None; static: scale and zero_point [1]."""

    weight: Tensor
    weight_sum: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    zero_point: Tensor | None = None


class Call:
    """A launch with its operands and its workspace, ready to run.

    Attributes:
        out: what it writes. plan: the GEMM that runs, in words.
    """

    def __init__(
        self,
        probe: Probe,
        name: str,
        arguments: ctypes.Structure,
        workspace: int,
        out: Tensor,
        keep: object,
        plan: str,
    ) -> None:
        import torch

        self._probe, self._name, self._arguments, self._keep = probe, name, arguments, keep
        self.out, self.plan = out, plan
        # Garbage, as what torch's allocator hands out.
        self.workspace = torch.full((max(workspace, 16),), 0x5A, dtype=torch.uint8, device=out.device)

    def __call__(self) -> Tensor:
        """Launch on the current stream; returns ``out``."""
        workspace = ctypes.c_void_p(self.workspace.data_ptr())
        arguments = ctypes.byref(self._arguments)
        self._probe.call(self._name, arguments, workspace, stream_of(self.out.device))
        return self.out


def _numbers(tile: Tile | None) -> tuple[int, int, int, int]:
    """ProbeTile's fields."""
    return (KERNELS.index(tile.kernel), tile.m, tile.n, tile.parts) if tile else (-1, 0, 0, 0)


def _set_pointers(arguments: ctypes.Structure, tensors: object, names: tuple[str, ...]) -> None:
    for name in names:
        tensor = getattr(tensors, name)
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())


def stream_of(device: torch.device) -> ctypes.c_void_p:
    """The current stream as CUDA knows it."""
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)


def padded(rows: Tensor) -> Tensor:
    """int8 [M, K] with zeros up to a K that is a multiple of 16."""
    import torch

    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 16)).contiguous()
