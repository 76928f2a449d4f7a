"""Description of the machine for the head of a result."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dynquant

from ..shared.file_names import file_stem

PACKAGES = ("torch", "onnxruntime", "openvino", "nncf", "torchao", "transformers", "numpy")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty without that file."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _cache_kilobytes() -> dict[str, int]:
    """Size of each data cache that core 0 sees, e.g. {"L1": 32, "L2": 512, "L3": 32768}."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (folder / "type").read_text().strip()
            level, size = (folder / "level").read_text().strip(), (folder / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.rstrip("KMG")) * {"K": 1, "M": 1024, "G": 1024**2}[size[-1]]
    return sizes


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """CPU, caches, ISA, versions, date."""
    cpu = _cpuinfo()
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "caches_kb": _cache_kilobytes(),
        "isa": dynquant.isa(),
        "available_isas": dynquant.available_isas(),
        "dynquant": dynquant.__version__,
        "dynquant_status": str(dynquant.info().reason),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.date.today().isoformat(),
    }


def results_stem(machine: dict[str, Any]) -> str:
    """A file name for this machine's results: CPU name, family and model (cloud names hide them), ISA."""
    name = re.sub(r"\((r|tm)\)|cpu|processor|@.*", "", machine["cpu"].lower())
    parts = [name]
    if machine["cpu_family"] and machine["cpu_model"]:
        parts.append(f"f{machine['cpu_family']}m{machine['cpu_model']}")
    parts.append(machine["isa"])
    return file_stem(" ".join(parts))
