"""Single kernels: probe.cu through ctypes. Only functions with tensor arguments import torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KERNELS = ("small", "mma", "wgmma")
DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2, "torch.int32": 3}
EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu")
ERRORS = {
    1: "invalid value",
    2: "out of memory",
    35: "no driver, or too old a one",
    100: "no device",
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

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """ProbeTile's fields."""
        return KERNELS.index(self.kernel), self.m, self.n, self.parts

    def __str__(self) -> str:
        return self.name + (f", {self.parts} parts of K" if self.parts > 1 else "")


# Every kernel and tile that gemm_plan.h can choose.
TILES = (
    *(Tile("small", m, 16) for m in (8, 16, 32)),
    *(Tile("mma", size, size) for size in (64, 128)),
    *(Tile("wgmma", 128, n) for n in (32, 64, 128, 256)),
)
PLANNED = (-1, 0, 0, 0)  # ProbeTile's fields for the plan's choice


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
class Layer:
    """Operands on the device: weight int8 [N, K rounded up to 16] with zeros beyond K, weight_sum int32 and
    weight_scale fp32 [N], bias fp32 [N] or None; scale fp32 and zero_point int32 of x, [M] for a GEMM, [1]
    for a static forward, None for a dynamic one."""

    weight: Tensor
    weight_sum: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def fill(self, arguments: ctypes.Structure) -> None:
        """The pointers of these tensors."""
        for name, tensor in vars(self).items():
            setattr(arguments, name, None if tensor is None else tensor.data_ptr())


class Probe:
    """A library that ``build`` made from probe.cu.

    Attributes:
        capability: 90 for 9.0. code: the architecture of the kernels.
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
        """The tiles that this card can run."""
        return [tile for tile in TILES if tile.kernel != "wgmma" or self.capability == 90]

    def plan(self, name: str, arguments: ctypes.Structure) -> tuple[str, int]:
        """The plan of ``name`` (probe_gemm, probe_linear) as text, and its workspace in bytes."""
        tile, fused, workspace = (ctypes.c_int32 * 4)(), ctypes.c_int32(), ctypes.c_int64()
        numbers = tile, ctypes.byref(fused), ctypes.byref(workspace)
        self.call(f"{name}_plan", ctypes.byref(arguments), *numbers)
        plan = str(Tile(KERNELS[tile[0]], *tile[1:]))
        return f"{plan}, fused" if fused.value else plan, workspace.value

    def product(
        self,
        q: Tensor,
        layer: Layer,
        k: int,
        out: Tensor,
        tile: Tile | None = None,
        epilogue: str = "none",
    ) -> Call:
        """One GEMM.

        Args:
            q: int8 [M, K rounded up to 16], zeros beyond k.
            out: [M, N], contiguous; int32 for accumulators.
            tile: None for the plan's choice.
        """
        (m, row_bytes), n = q.shape, layer.weight.shape[0]
        dtype, function = DTYPES[str(out.dtype)], EPILOGUES.index(epilogue)
        arguments = ProbeGemm(*(tile.numbers if tile else PLANNED), q.data_ptr(), 0, row_bytes, m, n, k)
        arguments.out, arguments.out_dtype, arguments.function = out.data_ptr(), dtype, function
        layer.fill(arguments)
        return Call(self, "probe_gemm", arguments, out, (q, layer))

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
            tile: None for the plan's choice; a tile, like ``separate``, makes quantization a separate launch.
        """
        (m, k), n = x.shape, layer.weight.shape[0]
        dtypes = DTYPES[str(x.dtype)], DTYPES[str(out.dtype)]
        numbers = *(tile.numbers if tile else PLANNED), int(separate), 0
        arguments = ProbeLinear(*numbers, x.data_ptr(), *dtypes, m, n, k, config, out=out.data_ptr())
        layer.fill(arguments)
        return Call(self, "probe_linear", arguments, out, (x, layer))

    def quantize(self, x: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor, block: int = 0) -> None:
        """x [M, K] per_token, rotated if ``block``, into q int8 [M, K rounded up to 16], scale fp32 and
        zero_point int32 [M]."""
        numbers = ctypes.c_int32(DTYPES[str(x.dtype)]), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1])
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, q, scale, zero_point)]
        self.call(
            "probe_quantize",
            pointers[0],
            *numbers,
            ctypes.c_int32(block),
            ctypes.c_int32(block > 0),
            *pointers[1:],
            stream_of(x.device),
        )


class Call:
    """A launch with its operands and its workspace, ready to run.

    Attributes:
        out: its output. plan: its GEMM, as text.
    """

    def __init__(
        self, probe: Probe, name: str, arguments: ctypes.Structure, out: Tensor, operands: object
    ) -> None:
        import torch

        self._probe, self._name, self._arguments, self.out = probe, name, arguments, out
        self._operands = operands  # keeps them alive: the arguments hold only addresses
        self.plan, size = probe.plan(name, arguments)
        # Filled with garbage, as memory of torch's allocator is.
        self._workspace = torch.full((max(size, 16),), 0x5A, dtype=torch.uint8, device=out.device)

    def __call__(self) -> Tensor:
        """Launch on the current stream; returns ``out``."""
        workspace = ctypes.c_void_p(self._workspace.data_ptr())
        arguments = ctypes.byref(self._arguments)
        self._probe.call(self._name, arguments, workspace, stream_of(self.out.device))
        return self.out


def stream_of(device: torch.device) -> ctypes.c_void_p:
    """The current stream's handle."""
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)


def padded(rows: Tensor) -> Tensor:
    """int8 [M, K], padded with zeros to a K that is a multiple of 16."""
    import torch

    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 16)).contiguous()
