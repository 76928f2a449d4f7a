"""Builds the extension in place for this card, and the library that starts its kernels one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from build_backend import nvcc

from .environment import ROOT, architecture
from .stages import Recorder

LIBRARY = ROOT / "build" / "gpu" / "libdynquant_probe.so"
PROBE = Path(__file__).resolve().parent / "probe.cu"
# Runs in a fresh process: whether the extension fits this torch is decided when it is imported.
LOOK = """
import json
import benchmarks.gpu
from dynquant import _extension
print(json.dumps({"status": _extension.status, "loaded": _extension.extension is not None,
                  "cuda": _extension.read_record().get("cuda")}))
"""


def run(record: Recorder) -> None:
    """Build for the first card.

    Raises:
        RuntimeError: where a step fails; its output stands above.
    """
    wanted = architecture(torch.cuda.get_device_capability(0), _toolkit().supported)
    build_extension(record, wanted)
    build_probe(record, wanted)


def build_extension(record: Recorder, wanted: str) -> None:
    """``setup.py build_ext --inplace`` for the architectures ``wanted``, then whether it loads."""
    environment = os.environ | {"DYNQUANT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted}
    environment.pop("DYNQUANT_ISA", None)
    start = time.monotonic()
    _run([sys.executable, "setup.py", "build_ext", "--inplace"], environment)
    record.set("extension", {"architecture": wanted, "seconds": round(time.monotonic() - start, 1)})
    found = look(environment)
    record.set("loaded", found)
    if not found["loaded"] or not found["cuda"]["built"]:
        raise RuntimeError(f"the extension was built but is not used: {found['status']}; {found['cuda']}")


def look(environment: dict[str, str]) -> dict[str, Any]:
    """What a fresh process finds: {"status": sentence, "loaded", "cuda": of the build record}."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def build_probe(record: Recorder, wanted: str) -> None:
    """Link probe.cu with the extension's own CUDA objects."""
    toolkit = _toolkit()
    architectures = nvcc.architectures(wanted, toolkit.supported)
    objects = nvcc.compile_objects(
        toolkit, ROOT / "csrc" / "cuda", _objects(), architectures, len(os.sched_getaffinity(0))
    )
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    _run(link_command(toolkit, architectures, objects), dict(os.environ))
    record.set("probe", {"seconds": round(time.monotonic() - start, 1)})


def link_command(
    toolkit: nvcc.Toolkit, architectures: list[nvcc.Architecture], objects: list[str]
) -> list[str]:
    gencode = [flag for one in architectures for flag in one.gencode()]
    return [
        toolkit.nvcc,
        *nvcc.FLAGS,
        "-shared",
        f"-I{ROOT / 'csrc'}",
        *gencode,
        str(PROBE),
        *objects,
        "-o",
        str(LIBRARY),
    ]


def _objects() -> Path:
    """Where setup.py left the CUDA objects for this Python."""
    folders = sorted(ROOT.glob(f"build/temp.*{sys.implementation.cache_tag}/cuda"))
    if not folders:
        raise RuntimeError(f"no CUDA objects under {ROOT / 'build'}: setup.py did not compile them")
    return folders[-1]


def _toolkit() -> nvcc.Toolkit:
    toolkit = nvcc.find_toolkit()
    if toolkit is None:
        raise RuntimeError("no nvcc found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    return toolkit


def _run(command: list[str], environment: dict[str, str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} {command[1]} ended with exit code {done.returncode}")
