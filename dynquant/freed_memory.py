"""Memory that a conversion has freed goes back to the system.

A converted model's float weights, and the plain int8 ones between quantizing and packing, leave holes in the
heap between the packed weights. glibc keeps such holes for later allocations, and the process as large as two
bytes a weight; malloc_trim returns their pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_LEAST_BYTES = 1 << 24


def return_freed_memory(size: int) -> None:
    """Have glibc return what is free. Does nothing with other C libraries; other allocators (jemalloc,
    tcmalloc) are not affected.

    Args:
        size: about how many bytes were freed; nothing is done for a few.
    """
    trim = _malloc_trim()
    if trim is not None and size >= _LEAST_BYTES:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return function
