"""Builds the library that starts single kernels; needs nvcc, but neither torch nor a card.

python -m benchmarks.gpu.build --probe OUT.so --arch 9.0a
NVCC_APPEND_FLAGS=-DNAME=VALUE python -m benchmarks.gpu.build --probe VARIANT.so --sources COPY_OF_KERNELS
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build_backend import nvcc

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "kernels"
PROBE = ROOT / "benchmarks" / "gpu" / "probe.cu"


def build_probe(library: Path, arch: str, sources: Path) -> None:
    """Links probe.cu with the objects of ``sources``/cuda.

    Raises:
        SystemExit: nvcc is missing or a step fails, after that step's output.
    """
    toolkit = nvcc.find_toolkit()
    if toolkit is None:
        raise SystemExit("no nvcc found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    wanted = nvcc.architectures(arch, toolkit.supported)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = len(os.sched_getaffinity(0))
        objects = nvcc.compile_objects(toolkit, sources / "cuda", Path(folder), wanted, jobs)
        gencode = [flag for one in wanted for flag in one.gencode()]
        command = [toolkit.nvcc, *nvcc.FLAGS, f"-I{sources}", *gencode, "-shared", "-cudart=static"]
        if subprocess.run([*command, str(PROBE), *objects, "-o", str(library)]).returncode != 0:
            raise SystemExit(f"nvcc could not build {library}; its messages are above")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.build")
    parser.add_argument("--probe", type=Path, required=True, help="the library to write")
    parser.add_argument("--arch", default="9.0a", help="as in TORCH_CUDA_ARCH_LIST (default: %(default)s)")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="a copy of csrc/kernels, for a variant")
    options = parser.parse_args(arguments)
    build_probe(options.probe, options.arch, options.sources)


if __name__ == "__main__":
    main(sys.argv[1:])
