"""Builds the library that starts the kernels one by one; nvcc alone is needed, no torch and no card.

python -m benchmarks.gpu.build --probe OUT.so --arch 9.0a
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

ROOT = Path(__file__).resolve().parent.parent.parent
PROBE = Path(__file__).resolve().parent / "probe.cu"


def build_probe(library: Path, arch: str, define: Sequence[str] = (), sources: Path = ROOT / "csrc") -> None:
    """Links probe.cu with objects of ``sources``/cuda.

    Args:
        arch: as in TORCH_CUDA_ARCH_LIST. define: macros, "NAME" or "NAME=VALUE", for variants.
        sources: a copy of csrc, for variants.

    Raises:
        SystemExit: where there is no nvcc or a step fails; its output stands above.
    """
    toolkit = nvcc.find_toolkit()
    if toolkit is None:
        raise SystemExit("no nvcc found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    wanted = nvcc.architectures(arch, toolkit.supported)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for source in [PROBE, *sorted((sources / "cuda").glob("*.cu"))]:
            gencode = [flag for one in nvcc.architectures_of(source, wanted) for flag in one.gencode()]
            target = str(Path(folder) / f"{source.stem}.o")
            macros = [f"-D{name}" for name in define]
            flags = [*nvcc.FLAGS, *macros, f"-I{sources}", *gencode]
            jobs.append([toolkit.nvcc, *flags, "-c", str(source), "-o", target])
        waiting, running = list(jobs), list[subprocess.Popen[bytes]]()
        cores = len(os.sched_getaffinity(0))
        while waiting or running:
            while waiting and len(running) < cores:
                running.append(subprocess.Popen(waiting.pop(0)))
            if running.pop(0).wait() != 0:
                raise SystemExit("nvcc could not compile csrc/cuda or probe.cu; its messages are above")
        objects = [job[-1] for job in jobs]
        link = [toolkit.nvcc, "-shared", "-cudart=static", *objects, "-o", str(library)]
        if subprocess.run(link).returncode != 0:
            raise SystemExit(f"nvcc could not link {library}; its messages are above")


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.build", description=__doc__)
    parser.add_argument("--probe", type=Path, required=True, help="the library to write")
    parser.add_argument("--arch", default="9.0a", help="as in TORCH_CUDA_ARCH_LIST (default: %(default)s)")
    parser.add_argument("--define", nargs="*", default=[], help="macros, for a variant")
    parser.add_argument("--sources", type=Path, default=ROOT / "csrc", help="a copy of csrc, for a variant")
    given = parser.parse_args(words)
    build_probe(given.probe, given.arch, given.define, given.sources)


if __name__ == "__main__":
    main(sys.argv[1:])
