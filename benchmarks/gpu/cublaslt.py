"""cuBLASLt's int8 product with the algorithm that its heuristic puts first: the library's C interface by
ctypes.

torch loads libcublasLt, so it is in the process already. Numbers below are those of cublasLt.h and
library_types.h.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA_R_8I, CUDA_R_32I = 3, 10
CUBLAS_COMPUTE_32I = 72
CUBLAS_OP_T = 1
MATMUL_DESC_TRANSA = 3
MATMUL_PREF_MAX_WORKSPACE_BYTES = 1
WORKSPACE = 64 << 20


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def find_library() -> Any:
    """The libcublasLt that this process has loaded.

    Raises:
        RuntimeError: where it has loaded none.
    """
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    found = re.search(r"\S+/libcublasLt\.so\S*", text)
    if found is None:
        raise RuntimeError("libcublasLt is not loaded in this process")
    return ctypes.CDLL(found[0])


class Int8Product:
    """out[M, N] = q[M, K] @ weight[N, K].T in int32.

    Column-major, as the library sees it: out^T [N, M] = weight (transposed, K down its columns) times q^T [K,
    M].
    """

    def __init__(self, library: Any, m: int, n: int, k: int, device: torch.device) -> None:
        """
        Raises:
            RuntimeError: where a call fails or the heuristic has no algorithm for this shape.
        """
        self._library = library
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._description = ctypes.c_void_p()
        self._call(
            "cublasLtMatmulDescCreate",
            ctypes.byref(self._description),
            ctypes.c_int(CUBLAS_COMPUTE_32I),
            ctypes.c_int(CUDA_R_32I),
        )
        transposed = ctypes.c_int32(CUBLAS_OP_T)
        self._call(
            "cublasLtMatmulDescSetAttribute",
            self._description,
            ctypes.c_int(MATMUL_DESC_TRANSA),
            ctypes.byref(transposed),
            ctypes.c_size_t(4),
        )
        self._weight = self._layout(CUDA_R_8I, k, n)
        self._q = self._layout(CUDA_R_8I, k, m)
        self._out = self._layout(CUDA_R_32I, n, m)
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._algorithm = self._choose()

    def _layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate",
            ctypes.byref(layout),
            ctypes.c_int(dtype),
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(rows),
        )
        return layout

    def _choose(self) -> _Heuristic:
        preference, bytes_allowed = ctypes.c_void_p(), ctypes.c_uint64(WORKSPACE)
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference,
            ctypes.c_int(MATMUL_PREF_MAX_WORKSPACE_BYTES),
            ctypes.byref(bytes_allowed),
            ctypes.c_size_t(8),
        )
        found, count = _Heuristic(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle,
            self._description,
            self._weight,
            self._q,
            self._out,
            self._out,
            preference,
            ctypes.c_int(1),
            ctypes.byref(found),
            ctypes.byref(count),
        )
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if count.value == 0 or found.state != 0:
            raise RuntimeError("cuBLASLt's heuristic knows no int8 algorithm for this shape")
        return found

    def run(self, q: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """Launch on the current stream; q int8 [M, K], weight int8 [N, K], out int32 [M, N]."""
        one, zero = ctypes.c_int32(1), ctypes.c_int32(0)
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
        self._call(
            "cublasLtMatmul",
            self._handle,
            self._description,
            ctypes.byref(one),
            ctypes.c_void_p(weight.data_ptr()),
            self._weight,
            ctypes.c_void_p(q.data_ptr()),
            self._q,
            ctypes.byref(zero),
            ctypes.c_void_p(out.data_ptr()),
            self._out,
            ctypes.c_void_p(out.data_ptr()),
            self._out,
            ctypes.byref(self._algorithm.algo),
            ctypes.c_void_p(self._workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE),
            ctypes.c_void_p(stream),
        )
        return out

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: cuBLAS status {status}")
