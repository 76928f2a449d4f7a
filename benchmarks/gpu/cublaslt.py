"""cuBLASLt's int8 product with the algorithm that its heuristic ranks first, through its C interface.

torch has loaded libcublasLt into the process. The constants are those of cublasLt.h and library_types.h.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA_R_8I, CUDA_R_32I, CUBLAS_COMPUTE_32I = 3, 10, 72
MATMUL_DESC_TRANSA, CUBLAS_OP_T = 3, 1
MATMUL_PREF_MAX_WORKSPACE_BYTES = 1
WORKSPACE = 64 << 20


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


def find_library() -> Any:
    """The libcublasLt of this process.

    Raises:
        RuntimeError: it is not loaded.
    """
    found = re.search(r"\S+/libcublasLt\.so\S*", Path("/proc/self/maps").read_text())
    if found is None:
        raise RuntimeError("libcublasLt is not loaded in this process")
    return ctypes.CDLL(found[0])


class Int8Product:
    """out[M, N] = q[M, K] @ weight[N, K].T in int32.

    In the library's column-major order: out^T [N, M] = weight (transposed, K down its columns) times q^T
    [K, M].
    """

    def __init__(self, library: Any, m: int, n: int, k: int, device: torch.device) -> None:
        """
        Raises:
            RuntimeError: a call fails or the heuristic has no algorithm for this shape.
        """
        self._library = library
        self._handle = self._new("cublasLtCreate")
        self._description = self._new(
            "cublasLtMatmulDescCreate", c_int(CUBLAS_COMPUTE_32I), c_int(CUDA_R_32I)
        )
        transposed = byref(c_int32(CUBLAS_OP_T)), c_size_t(4)
        self._call(
            "cublasLtMatmulDescSetAttribute", self._description, c_int(MATMUL_DESC_TRANSA), *transposed
        )
        self._weight, self._q, self._out = (
            self._new(
                "cublasLtMatrixLayoutCreate", c_int(dtype), c_uint64(rows), c_uint64(columns), c_int64(rows)
            )
            for dtype, rows, columns in ((CUDA_R_8I, k, n), (CUDA_R_8I, k, m), (CUDA_R_32I, n, m))
        )
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._algorithm = self._choose()

    def _choose(self) -> _Heuristic:
        preference = self._new("cublasLtMatmulPreferenceCreate")
        allowed = c_int(MATMUL_PREF_MAX_WORKSPACE_BYTES), byref(c_uint64(WORKSPACE)), c_size_t(8)
        self._call("cublasLtMatmulPreferenceSetAttribute", preference, *allowed)
        found, count = _Heuristic(), c_int()
        layouts = self._weight, self._q, self._out, self._out
        wanted = preference, c_int(1), byref(found), byref(count)
        self._call("cublasLtMatmulAlgoGetHeuristic", self._handle, self._description, *layouts, *wanted)
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if count.value == 0 or found.state != 0:
            raise RuntimeError("cuBLASLt's heuristic knows no int8 algorithm for this shape")
        return found

    def run(self, q: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """Launch on the current stream; q int8 [M, K], weight int8 [N, K], out int32 [M, N]."""
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
        one, zero = c_int32(1), c_int32(0)
        result = c_void_p(out.data_ptr()), self._out
        self._call(
            "cublasLtMatmul",
            *(self._handle, self._description),
            *(byref(one), c_void_p(weight.data_ptr()), self._weight, c_void_p(q.data_ptr()), self._q),
            *(byref(zero), *result, *result, byref(self._algorithm.algo)),
            *(c_void_p(self._workspace.data_ptr()), c_size_t(WORKSPACE), c_void_p(stream)),
        )
        return out

    def _new(self, name: str, *arguments: object) -> c_void_p:
        """The handle that a function of the library creates."""
        created = c_void_p()
        self._call(name, byref(created), *arguments)
        return created

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: cuBLAS status {status}")
