"""The card, its driver and the software. Only ``describe`` imports torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .setting import Setting

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute
SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def card() -> tuple[str, str]:
    """Name and architecture (as in TORCH_CUDA_ARCH_LIST) of the first card, from the driver.

    Raises:
        RuntimeError: no driver, or a driver without a device.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"no CUDA device: the driver's library is missing ({error})") from error
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value == 0:
        raise RuntimeError(f"no CUDA device: the driver sees none, status {status}{hidden}")
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, 256, device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    suffix = "a" if (major.value, minor.value) == (9, 0) else ""
    return name.value.decode() or "gpu", f"{major.value}.{minor.value}{suffix}"


def card_state() -> dict[str, str]:
    """Driver, clocks, power and temperature of the first card by nvidia-smi; empty without it."""
    smi = shutil.which("nvidia-smi")
    command = [str(smi), "--id=0", f"--query-gpu={','.join(SMI_FIELDS.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(SMI_FIELDS):
        return {}
    return dict(zip(SMI_FIELDS, values, strict=True))


def describe(setting: Setting) -> None:
    """An entry on torch and the card; imports dynquant, so that its files are cached for the next stages."""
    import torch

    import dynquant

    torchao = "installed" if importlib.util.find_spec("torchao") else "not installed: no baseline"
    entry: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda, "torchao": torchao}
    if setting.on_card:
        properties = torch.cuda.get_device_properties(0)
        entry |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        }
    setting.record.add("machine", **entry, python=platform.python_version(), dynquant=dynquant.__version__)
