"""The extension module dynquant._C: sources, flags, and the record of what it was built for.

Imports torch, so only a build that makes the extension may import this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

from build_backend import nvcc
from build_backend.output import short_lines
from build_backend.torch_location import check_minimum, stop

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KERNELS = CSRC / "kernels"  # plain C++ and CUDA, without a torch header: the root of its includes
# The C++ standard is torch's choice. No -march: a file that needs an instruction set opens a target region.
# -ffp-contract=off: a written operation is one rounding, on every instruction set.
# -fopenmp: at::parallel_for is a header, and without it runs everything on one thread. It is not given to the
# linker: torch's own OpenMP runtime serves the calls, and a second one would have threads of its own.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fopenmp"]


def extension() -> Extension:
    """The extension as setuptools knows it; CUDA objects join it when they are built."""
    product = [path for path in CSRC.rglob("*.*") if path.relative_to(CSRC).parts[0] != "probes"]
    sources = [path for path in product if path.suffix == ".cpp" and not path.stem.endswith("_cuda")]
    depends = [*product, *ROOT.glob("build_backend/*.py")]
    # Python's own flags may ask for debug information, tens of megabytes of it; CFLAGS=-g keeps it.
    debug = [] if "-g" in os.environ.get("CFLAGS", "").split() else ["-g0"]
    return CppExtension(
        name="dynquant._C",
        sources=_in_repository(sources),
        depends=_in_repository(depends),
        include_dirs=[str(KERNELS)],
        extra_compile_args=[*FLAGS, *debug],
        extra_link_args=["-Wl,--exclude-libs,ALL"],
    )


class BuildWithCuda(BuildExtension):
    """torch's build_ext with the CUDA objects before it and the build record after it."""

    def run(self) -> None:
        _check_compiler()
        check_minimum(torch.__version__)
        # torch's ninja run would start two more jobs than there are cores, each of up to 2 GB.
        os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        (module,) = self.extensions
        cuda = self._add_cuda(module)
        folders = [Path(self.build_lib) / "dynquant"] + ([ROOT / "dynquant"] if self.inplace else [])
        record = build_record(Path(self.get_ext_filename(module.name)).name, cuda)
        if any(_without_interface(_read(folder / "_build.json")) != record for folder in folders):
            self.force = True  # the same sources for another torch, or other flags
        with short_lines():
            super().run()
        for folder in folders:
            complete = record | {"interface": _interface()}
            (folder / "_build.json").write_text(json.dumps(complete, indent=2) + "\n")

    def _add_cuda(self, module: Extension) -> dict[str, Any]:
        toolkit, reason = cuda_toolkit()
        if toolkit is None:
            if reason:
                print(f"dynquant-int8: {reason}", flush=True)
            return {"built": False, "reason": reason, "architectures": [], "nvcc": None}
        supported = toolkit.supported
        wanted = nvcc.architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), supported)
        build_dir = Path(self.build_temp) / "cuda"
        jobs = int(os.environ["MAX_JOBS"])
        module.extra_objects += nvcc.compile_objects(toolkit, KERNELS / "cuda", build_dir, wanted, jobs)
        module.sources += _in_repository([*CSRC.rglob("*_cuda.cpp")])
        module.include_dirs += toolkit.include_dirs
        module.library_dirs += toolkit.library_dirs
        # The static runtime shares the device's primary context with torch's own, whichever version that is.
        module.libraries += ["cudart_static", "dl", "rt", "pthread"]
        version = ".".join(map(str, toolkit.version))
        return {
            "built": True,
            "reason": "",
            "architectures": [str(entry) for entry in wanted],
            "nvcc": version,
        }


def _interface() -> str | None:
    """Of dynquant/_interface.py, without importing the package, which would load the extension."""
    spec = importlib.util.spec_from_file_location("_interface", ROOT / "dynquant" / "_interface.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    interface: str | None = module.interface_of(ROOT / "dynquant")
    return interface


def _without_interface(record: Any) -> Any:
    """A build record without what changes with the Python files: ninja knows what that compiles again."""
    return {k: v for k, v in record.items() if k != "interface"} if isinstance(record, dict) else record


def build_record(filename: str, cuda: dict[str, Any]) -> dict[str, Any]:
    """What dynquant/_extension.py compares with the running torch before it loads the file."""
    return {
        "file": filename,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "cuda": cuda,
    }


def cuda_toolkit() -> tuple[nvcc.Toolkit | None, str]:
    """The toolkit to compile the CUDA part with, or None and, where torch has CUDA, what is missing."""
    choice = os.environ.get("DYNQUANT_CUDA", "")
    if choice not in ("", "0", "1"):
        stop(f"DYNQUANT_CUDA: expected 0, 1 or nothing, got {choice!r}.")
    if choice == "0" or not (choice == "1" or torch.version.cuda):
        return None, ""
    if not any(CSRC.rglob("*.cu")):
        return None, ""
    toolkit = nvcc.find_toolkit()
    if toolkit is None:
        wanted = f"toolkit {torch.version.cuda}" if torch.version.cuda else "toolkit"
        missing = (
            "no nvcc found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda), so no CUDA kernels; "
            f"install the CUDA {wanted}, set CUDA_HOME and build again."
        )
        if choice == "1":
            stop(f"DYNQUANT_CUDA=1: {missing}")
        return None, missing
    if torch.version.cuda and choice != "1" and int(torch.version.cuda.split(".")[0]) != toolkit.version[0]:
        version = ".".join(map(str, toolkit.version))
        return None, (
            f"{toolkit.nvcc} is of CUDA {version}, torch of CUDA {torch.version.cuda}, so no CUDA kernels; "
            "set CUDA_HOME to a toolkit of torch's major version, or DYNQUANT_CUDA=1 to build with this one."
        )
    return toolkit, ""


def _in_repository(paths: list[Path]) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def _check_compiler() -> None:
    pure = "or set DYNQUANT_BUILD=0 for the pure-Python package (all on the slower PyTorch reference)."
    command = os.environ.get("CXX", "c++")
    if not command.strip():
        stop(f"CXX={command!r} names no compiler; unset it, or set it to a C++ compiler, {pure}")
    if " " in command.strip() and shutil.which(command.strip()):
        stop(
            f"CXX={command!r} is a path with a space, which torch's build splits there; set CXX to a link "
            f"to it without spaces, {pure}"
        )
    compiler = command.split()[0]
    if shutil.which(compiler) is None:
        stop(f"no C++ compiler {compiler!r} found; install one (on Debian: apt-get install g++), {pure}")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        stop(
            f"{header} is missing; install Python's headers (on Debian: apt-get install python3-dev), {pure}"
        )


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
