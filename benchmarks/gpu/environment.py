"""What the machine has: card, driver, versions, tools; and what is missing, in a sentence."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from build_backend import nvcc

ROOT = Path(__file__).resolve().parent.parent.parent
SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def missing() -> str | None:
    """One sentence that names what the suite cannot do without and does not find here; None if all is
    there."""
    if importlib.util.find_spec("torch") is None:
        return "no torch: install a CUDA build of torch and run this on a machine with an NVIDIA GPU."
    import torch

    if torch.version.cuda is None:
        return (
            f"no CUDA device: torch {torch.__version__} is built without CUDA; install a CUDA build of "
            "torch on a machine with an NVIDIA GPU."
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = f", or CUDA_VISIBLE_DEVICES={visible!r} hides it" if visible is not None else ""
        return (
            f"no CUDA device: torch {torch.__version__} (CUDA {torch.version.cuda}) sees none; the GPU or "
            f"its driver is missing{hidden}."
        )
    if importlib.util.find_spec("setuptools") is None:
        return "no setuptools: the extension is built with it; install setuptools>=77."
    if nvcc.find_toolkit() is None:
        return (
            "no nvcc (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda): the kernels are compiled with it; "
            f"install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME."
        )
    return missing_package()


def missing_package() -> str | None:
    """A sentence about a package that dynquant imports and that is not here."""
    try:
        importlib.import_module("dynquant")
    except ImportError as error:
        return f"no {error.name}: importing dynquant needs it ({error}); install it."
    return None


def describe() -> dict[str, Any]:
    """What heads the results. Without a CUDA device "device" is the processor's name (the suite's own
    tests)."""
    import torch

    toolkit = nvcc.find_toolkit()
    entry: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": ".".join(map(str, toolkit.version)) if toolkit else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        entry |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(l2_bytes(torch.device("cuda")) / 2**20, 1),
        }
    return entry | card_state()


def card_state() -> dict[str, str]:
    """Driver, clocks, power and temperature of the first card as nvidia-smi reads them; empty without it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    query = ",".join(SMI_FIELDS.values())
    command = [smi, "--id=0", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(SMI_FIELDS):
        return {}
    return {name: value for name, value in zip(SMI_FIELDS, values, strict=True) if not value.startswith("[")}


def l2_bytes(device: Any) -> int:
    """Size of the card's L2; 50 MiB, an H100's, where torch does not say. On a CPU 4 KiB."""
    import torch

    if device.type != "cuda":
        return 4 << 10
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 50 << 20)


def architecture(capability: tuple[int, int], supported: frozenset[int]) -> str:
    """The TORCH_CUDA_ARCH_LIST for one card: its own architecture, or PTX of the newest older one that this
    nvcc has where the card is newer than nvcc.

    Raises:
        RuntimeError: for a card that is older than every architecture that dynquant and nvcc share.
    """
    number = 10 * capability[0] + capability[1]
    if number in supported and number >= nvcc.OLDEST:
        return f"{capability[0]}.{capability[1]}{'a' if number == 90 else ''}"
    older = [known for known in supported if nvcc.OLDEST <= known < number]
    if not older:
        raise RuntimeError(
            f"compute capability {capability[0]}.{capability[1]}: dynquant's kernels need 7.5 or newer, and "
            f"an nvcc that has it (this one: {sorted(supported)})"
        )
    newest = max(older)
    return f"{newest // 10}.{newest % 10}+PTX"


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside nvcc, in the usual folder, or of a Python package."""
    toolkit = nvcc.find_toolkit()
    beside = [Path(toolkit.nvcc).resolve().parent] if toolkit else []
    if toolkit:
        beside += [Path(folder).parent / "bin" for folder in toolkit.include_dirs]
        beside += [Path(folder).parents[1].parent / "bin" for folder in toolkit.include_dirs]
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [
        os.environ.get("PATH", os.defpath),
        *map(str, beside),
        "/usr/local/cuda/bin",
        "/usr/local/cuda/compute-sanitizer",
        *map(str, sorted(packages.glob("*/bin"))),
    ]
    return shutil.which(name, path=os.pathsep.join(folders))


def file_stem(device: str) -> str:
    """The card's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu"


def _commit() -> str | None:
    """The commit of the checkout, None where it is not one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
