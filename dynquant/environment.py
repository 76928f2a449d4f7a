"""Which path runs, the extension or the PyTorch reference, and why."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from . import _extension
from ._version import __version__

OLDEST_CUDA_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Info:
    """The result of :func:`info`; ``python -m dynquant info`` prints ``str()`` of it."""

    version: str
    path: str  # "extension" or "reference"
    reason: str  # one sentence: why this path
    isa: str
    available_isas: tuple[str, ...]
    cuda: str  # one sentence on the CUDA kernels
    torch: str
    python: str
    threads: int

    def __str__(self) -> str:
        isas = ", ".join(self.available_isas) or "none"
        rows = {
            "dynquant": self.version,
            "path": f"{self.path}: {self.reason}",
            "CPU kernels": f"{self.isa} (available: {isas})",
            "CUDA kernels": self.cuda,
            "torch": f"{self.torch}, {self.threads} threads",
            "python": self.python,
        }
        return "\n".join(f"{name:<13}{text}" for name, text in rows.items())


def available_isas() -> list[str]:
    """The instruction sets of this processor that the extension has kernels for, lowest first.

    Empty if the reference runs.
    """
    if _extension.extension is None:
        return []
    return list(_extension.extension.available_isas())


def isa() -> str:
    """The instruction set that the CPU kernels run on; ``"reference"`` without the extension.

    The environment variable ``DYNQUANT_ISA``, read when dynquant is imported, lowers it to one of
    ``scalar``, ``avx2``, ``avxvnni``, ``avx512vl_vnni``, ``avx512vnni``; ``reference`` leaves the extension
    out. Any other word is ignored, with a warning that names the variable.
    """
    return "reference" if _extension.extension is None else str(_extension.extension.isa())


def info() -> Info:
    """Which path runs and why, with the versions that a fault report needs."""
    loaded = _extension.extension is not None
    return Info(
        version=__version__,
        path="extension" if loaded else "reference",
        reason=_extension.status,
        isa=isa(),
        available_isas=tuple(available_isas()),
        cuda=_cuda_sentence(loaded),
        torch=f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        python=f"{platform.python_version()} on {platform.machine()}",
        threads=torch.get_num_threads(),
    )


def _cuda_sentence(loaded: bool) -> str:
    if not loaded:
        return "none, the reference runs on every device"
    built = _extension.read_record().get("cuda", {})
    if not built.get("built"):
        return f"not built; {built['reason']}" if built.get("reason") else "not built"
    architectures = ", ".join(built.get("architectures", ())) or "architectures that the record does not name"
    text = f"built with nvcc {built.get('nvcc', '(unknown)')} for {architectures}"
    if not torch.cuda.is_available():
        return f"{text}; no CUDA device here"
    devices = range(torch.cuda.device_count())
    cards = {torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in devices}
    too_old = [
        f"{name} ({major}.{minor})"
        for name, (major, minor) in cards.items()
        if (major, minor) < OLDEST_CUDA_CAPABILITY
    ]
    if not too_old:
        return text
    oldest = ".".join(map(str, OLDEST_CUDA_CAPABILITY))
    on = ", ".join(too_old)
    return f"{text}; they need compute capability {oldest} or newer: on {on} the reference runs"
