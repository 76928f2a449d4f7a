"""The probes of csrc/probes: measured limits of this CPU. A library of its own, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "probes"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden")


class Probes:
    """The functions of probes.cpp. Each runs on the calling thread; ctypes releases the GIL."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("probe_isas", "probe_read_patterns"):
            getattr(self._library, name).restype = ctypes.c_char_p
        for name in ("probe_int8", "probe_fp32", "probe_read"):
            getattr(self._library, name).restype = ctypes.c_double
        self.isas = self._names("probe_isas")
        self.read_patterns = self._names("probe_read_patterns")

    def _names(self, function: str) -> list[str]:
        return [name for name in getattr(self._library, function)().decode().split(",") if name]

    def int8(self, isa: str, seconds: float) -> float:
        """GOPS of one core, 2 operations a multiply-accumulate."""
        if isa not in self.isas:
            raise ValueError(
                f"int8: expected isa to be one this CPU has ({', '.join(self.isas) or 'none'}), got {isa!r}"
            )
        return float(self._library.probe_int8(isa.encode(), _duration("int8", seconds)))

    def fp32(self, seconds: float) -> float:
        """GFLOPS of one core: FMA, widest vectors."""
        return float(self._library.probe_fp32(_duration("fp32", seconds)))

    def read(self, pattern: str, size: int, seconds: float) -> float:
        """GB/s of one core, a buffer of ``size`` bytes read again and again."""
        if pattern not in self.read_patterns:
            raise ValueError(
                f"read: expected pattern to be one of {', '.join(self.read_patterns)}, got {pattern!r}"
            )
        if size < 1:
            raise ValueError(f"read: expected size >= 1, got {size}")
        duration = _duration("read", seconds)
        rate = float(self._library.probe_read(pattern.encode(), ctypes.c_int64(size), duration))
        if math.isnan(rate):
            raise MemoryError(f"read: no memory for a buffer of {size} bytes")
        return rate


def _duration(function: str, seconds: float) -> ctypes.c_double:
    if not 0 <= seconds <= 60:
        raise ValueError(f"{function}: expected seconds from 0 to 60, got {seconds}")
    return ctypes.c_double(seconds)


def build(folder: Path) -> Path:
    """The library in ``folder``, compiled unless one of the same sources, flags and compiler is there.

    Raises:
        RuntimeError: where there is no compiler, or where it fails.
    """
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"no C++ compiler {compiler[0]!r} found")
    text = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    digest = hashlib.sha256(b"\0".join([*text, repr((compiler, FLAGS)).encode()])).hexdigest()
    library = folder / f"probes-{digest[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [*compiler, *FLAGS, str(SOURCES / "probes.cpp"), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        unfinished.replace(library)
    return library


@functools.cache
def load() -> Probes | None:
    """The probes; None, and a sentence on stderr, where they cannot be compiled."""
    try:
        return Probes(build(ROOT / "build" / "probes"))
    except (RuntimeError, OSError) as error:
        print(f"benchmarks: the machine's limits are not measured: {error}", file=sys.stderr)
        return None
