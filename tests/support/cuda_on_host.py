"""Builds csrc/kernels/cuda for the CPU (tests/kernels/cuda_host: fibers for threads), calls it with tensors.

Every tensor of a kernel lies between two guard pages, at random at the start or flush with the end of its own
pages, so that an access outside of it faults. Outputs and workspaces start as garbage.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.probe import DTYPES, KERNELS, padded
from dynquant.config import EPILOGUES, Config
from tests.support.paths import CUDA_HOST, CUDA_SOURCES, KERNEL_SOURCES

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-U_FORTIFY_SOURCE"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def _with_includes(source: Path) -> set[str]:
    """The names of a file and of its direct and indirect includes from the same folder."""
    names = {source.name}
    for name in re.findall(r'^#include "(\w+\.\w+)"', source.read_text(), re.M):
        if (source.parent / name).exists():
            names |= _with_includes(source.parent / name)
    return names


def build(folder: Path, sources: Path = CUDA_SOURCES, unchanged: Path | None = None) -> Path:
    """Compiles the emulator and all kernels of ``sources`` into a library in ``folder``.

    ``unchanged``: a folder built from CUDA_SOURCES, whose objects are reused for files with the same text.
    """
    same = {
        path.name for path in sources.iterdir() if path.read_text() == (CUDA_SOURCES / path.name).read_text()
    }
    cxx = compiler()
    assert cxx is not None, "no C++ compiler found"
    include = [f"-I{CUDA_HOST / 'include'}", f"-I{CUDA_HOST}", f"-I{KERNEL_SOURCES}"]
    kernel = ["-Wno-unknown-pragmas", "-Wno-psabi", "-include", "ptx.cuh", "-x", "c++"]
    jobs = [[str(path)] for path in sorted(CUDA_HOST.glob("*.cpp"))]
    jobs += [[*kernel, str(path)] for path in sorted(sources.glob("*.cu"))]

    def compile_one(job: list[str]) -> str:
        source = Path(job[-1])
        if unchanged is not None and (source.suffix == ".cpp" or _with_includes(source) <= same):
            return str(unchanged / f"{source.name}.o")
        target = str(folder / f"{source.name}.o")
        subprocess.run([cxx, *FLAGS, *include, "-c", *job, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "libcuda_on_host.so"
    subprocess.run([cxx, "-shared", *objects, "-o", str(library)], check=True)
    return library


class HostError(RuntimeError):
    """A fault found by the emulator, or the error of a launch."""


class Memory:
    """Tensors between guard pages, for one call."""

    def __init__(self, library: ctypes.CDLL, rng: random.Random) -> None:
        self._library = library
        self._rng = rng
        self._mapped: list[tuple[int, int]] = []

    def place(self, shape: Sequence[int], dtype: torch.dtype, alignment: int = 1) -> Tensor:
        """A tensor of garbage, at either end of its pages; ``alignment`` is in bytes."""
        empty = torch.empty(0, dtype=dtype)
        count = torch.Size(shape).numel()
        size = count * empty.element_size()
        start = self._library.host_map(size)
        assert start, "no memory"
        self._mapped.append((start, size))
        page = os.sysconf("SC_PAGESIZE")
        end = start + -(-size // page) * page
        address = start if self._rng.random() < 0.5 else (end - size) // alignment * alignment
        if size == 0:
            return torch.empty(list(shape), dtype=dtype)
        # Fill whole pages: stray reads beside the tensor must not find zeros.
        ctypes.memset(start, self._rng.randrange(1, 256), end - start)
        raw = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(raw, dtype=dtype).reshape(list(shape))

    def copy(self, tensor: Tensor | None, alignment: int = 1) -> Tensor | None:
        if tensor is None:
            return None
        return self.place(tensor.shape, tensor.dtype, alignment).copy_(tensor)

    def free(self) -> None:
        for start, size in self._mapped:
            self._library.host_unmap(start, size)


@dataclass(frozen=True)
class Dequantization:
    """The step from accumulators to outputs of ``dtype``: scale and zero_point [M], the other tensors [N]."""

    scale: Tensor
    zero_point: Tensor
    weight_sum: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    epilogue: str
    dtype: torch.dtype

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.scale, self.zero_point, self.weight_sum, self.weight_scale, self.bias]


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class CudaOnHost:
    """The functions of csrc/kernels/cuda/kernels.h.

    Attributes:
        seed: of the order of threads and the place of tensors.
        alignment: of x and of outputs, in bytes; 1 means the alignment of their elements.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.host_map.restype = ctypes.c_void_p
        self._library.host_map.argtypes = [ctypes.c_size_t]
        self._library.host_unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library.host_range_workspace.restype = ctypes.c_size_t
        self._library.host_descriptor_of_rows_of_128.restype = ctypes.c_uint64
        self.seed = 0
        self.alignment = 1
        self.set_device(90, 4)

    def set_device(self, capability: int, multiprocessors: int, code: int | None = None) -> None:
        """``code``: the architecture of the kernels, if older than the device."""
        self._library.host_set_device(capability, multiprocessors, capability if code is None else code)

    @property
    def launches(self) -> int:
        """Kernels launched by the last call."""
        return int(self._library.host_launches())

    def _memory(self) -> Memory:
        self.seed += 1
        return Memory(self._library, random.Random(self.seed))

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, f"host_{name}")
        function.restype = ctypes.c_char_p
        converted = [ctypes.c_int64(value) if type(value) is int else value for value in arguments]
        message = function(ctypes.c_uint64(self.seed), *converted).decode()
        if message:
            raise HostError(f"{name} with seed {self.seed}: {message}")

    def _with_workspace(self, memory: Memory, name: str, *arguments: object) -> None:
        size = ctypes.c_size_t()
        self._call(name, *arguments, ctypes.c_void_p(None), ctypes.byref(size))
        workspace = memory.place([max(size.value, 16)], torch.uint8, 16)
        self._call(name, *arguments, _pointer(workspace), ctypes.byref(size))

    @staticmethod
    def _rows(x: Tensor) -> list[object]:
        return [_pointer(x), ctypes.c_int(DTYPES[str(x.dtype)]), x.shape[:-1].numel(), x.shape[-1]]

    def min_max(self, x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
        memory = self._memory()
        rows = self._rows(memory.copy(x, self.alignment))
        count = x.shape[:-1].numel() if per_token else 1
        lo, hi = (memory.place([count], torch.float32) for _ in range(2))
        if per_token:
            self._call("min_max_rows", *rows, _pointer(lo), _pointer(hi))
        else:
            workspace = memory.place([self._library.host_range_workspace()], torch.uint8, 16)
            self._call("min_max_tensor", *rows, _pointer(lo), _pointer(hi), _pointer(workspace))
        result = lo.clone(), hi.clone()
        memory.free()
        return result

    def choose_qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        memory = self._memory()
        lo, hi = memory.copy(lo), memory.copy(hi)
        scale, zero_point = memory.place(lo.shape, torch.float32), memory.place(lo.shape, torch.int32)
        outputs = _pointer(scale), _pointer(zero_point)
        self._call("choose_qparams", _pointer(lo), _pointer(hi), lo.numel(), *outputs)
        result = scale.clone(), zero_point.clone()
        memory.free()
        return result

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        memory = self._memory()
        rows = self._rows(memory.copy(x, self.alignment))
        per_row = ctypes.c_bool(scale.numel() == x.shape[:-1].numel())
        scale, zero_point = memory.copy(scale), memory.copy(zero_point)
        q = memory.place(x.shape, torch.int8)
        self._call("quantize", *rows, _pointer(scale), _pointer(zero_point), per_row, _pointer(q))
        result = q.clone()
        memory.free()
        return result

    def rotate(self, x: Tensor, block: int, signs: bool) -> Tensor:
        memory = self._memory()
        out = memory.place(x.shape, torch.float32, 16)
        self._call(
            "rotate",
            *self._rows(memory.copy(x, self.alignment)),
            *(ctypes.c_int(block), ctypes.c_bool(signs)),
            _pointer(out),
        )
        result = out.clone()
        memory.free()
        return result

    def int8_mm(self, q: Tensor, weight: Tensor) -> Tensor:
        """``weight``: [N, K], padded here."""
        memory = self._memory()
        (m, k), n = q.shape, weight.shape[0]
        out = memory.place([m, n], torch.int32)
        operands = _pointer(memory.copy(q)), _pointer(memory.copy(padded(weight), 16))
        self._with_workspace(memory, "int8_mm", *operands, m, n, k, _pointer(out))
        result = out.clone()
        memory.free()
        return result

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_sum: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        config: Config,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
    ) -> Tensor:
        """linear_dynamic, or with scale and zero_point linear_static. ``weight``: [N, K], padded here."""
        memory = self._memory()
        n = weight.shape[0]
        out = memory.place([*x.shape[:-1], n], config.out_dtype or x.dtype, self.alignment)
        tensors = [memory.copy(padded(weight), 16)]
        tensors += [memory.copy(t) for t in (weight_sum, weight_scale, bias, scale, zero_point)]
        self._with_workspace(
            memory,
            "linear",
            *self._rows(memory.copy(x, self.alignment)),
            n,
            *map(_pointer, tensors[:4]),
            ctypes.c_int(DTYPES[str(torch.float32 if bias is None else bias.dtype)]),
            *map(_pointer, tensors[4:]),
            config.encode(),
            _pointer(out),
            ctypes.c_int(DTYPES[str(out.dtype)]),
        )
        result = out.clone()
        memory.free()
        return result

    def gemm(
        self,
        kernel: str,
        tile: tuple[int, int],
        parts: int,
        q: Tensor,
        weight: Tensor,
        dequantization: Dequantization | None = None,
    ) -> Tensor:
        """One kernel, with k in ``parts``: the int32 accumulators, or with ``dequantization`` the outputs."""
        memory = self._memory()
        (m, k), n = q.shape, weight.shape[0]
        out = memory.place([m, n], dequantization.dtype if dequantization else torch.int32, self.alignment)
        numbers = [ctypes.c_int(value) for value in (KERNELS.index(kernel), *tile, parts)]
        operands = [_pointer(memory.copy(padded(q), 16)), -(-k // 16) * 16]
        operands += [_pointer(memory.copy(padded(weight), 16))]
        tensors = dequantization.tensors if dequantization else [None] * 5
        epilogue = EPILOGUES.index(dequantization.epilogue) if dequantization else 0
        self._with_workspace(
            memory,
            "gemm",
            *numbers,
            *operands,
            m,
            n,
            k,
            *[_pointer(memory.copy(tensor)) for tensor in tensors],
            ctypes.c_int(epilogue),
            _pointer(out),
            ctypes.c_int(DTYPES[str(out.dtype)]),
        )
        result = out.clone()
        memory.free()
        return result

    def plan(self, m: int, n: int, k: int) -> tuple[str, int, int, int, int]:
        """kernel, tile_m, tile_n, parts of k, k of a part."""
        numbers = (ctypes.c_int64 * 5)()
        sizes = [ctypes.c_int64(value) for value in (m, n, k)]
        self._library.host_plan(*sizes, numbers)
        return KERNELS[numbers[0]], numbers[1], numbers[2], numbers[3], numbers[4]

    def tile_at(self, index: int, tiles_m: int, tiles_n: int, band: int) -> tuple[int, int]:
        numbers = (ctypes.c_int64 * 2)()
        arguments = [ctypes.c_int64(value) for value in (index, tiles_m, tiles_n, band)]
        self._library.host_tile_at(*arguments, numbers)
        return numbers[0], numbers[1]

    def offset_in_rows_of_64(self, row: int, chunk: int) -> int:
        return int(self._library.host_offset_in_rows_of_64(row, chunk))

    def descriptor_of_rows_of_128(self, address: int) -> int:
        return int(self._library.host_descriptor_of_rows_of_128(ctypes.c_uint32(address)))
