"""Compiles csrc/kernels/cuda/*.cu with nvcc directly: they hold no torch header, so any torch, also one
without CUDA, can link the objects, and a file takes seconds."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_backend.output import in_repository
from build_backend.torch_location import stop

# Fixed by the arithmetic contract: no contraction, denormals kept, IEEE division and square root.
ARITHMETIC_FLAGS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
FLAGS = (*ARITHMETIC_FLAGS, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
OLDEST = 80


@dataclass(frozen=True)
class Architecture:
    """A compute capability: number 90 and suffix "a" is sm_90a; ptx adds PTX, for newer cards."""

    number: int
    suffix: str = ""
    ptx: bool = False

    def gencode(self) -> list[str]:
        name = f"{self.number}{self.suffix}"
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}"]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{self.number},code=compute_{self.number}")
        return flags

    def __str__(self) -> str:
        return f"{self.number // 10}.{self.number % 10}{self.suffix}{'+PTX' if self.ptx else ''}"


@dataclass(frozen=True)
class Toolkit:
    """An nvcc, its version, the architectures that it knows, and where its headers and libraries are."""

    nvcc: str
    version: tuple[int, int]
    supported: frozenset[int]
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]


def find_toolkit() -> Toolkit | None:
    """The nvcc of CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, in this order; None where there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((found for found in map(shutil.which, candidates) if found), None)
    if nvcc is None:
        return None
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    # nvcc may be a wrapper script, so that its own path does not tell where the toolkit is: a dry run does.
    dry_run = _output(nvcc, "-dryrun", "-x", "cu", "-c", os.devnull)
    folders = {
        name: tuple(
            str(Path(word[2:]).resolve())
            for line in re.findall(rf"^#\$ {name}=(.*)$", dry_run, re.M)
            for word in shlex.split(line)
        )
        for name in ("INCLUDES", "LIBRARIES")
    }
    if release is None or not folders["INCLUDES"] or not folders["LIBRARIES"]:
        stop(f"cannot read the version and the folders of {nvcc} from `nvcc --version` and `nvcc -dryrun`.")
    supported = frozenset(
        int(number) for number in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
    )
    version = (int(release[1]), int(release[2]))
    return Toolkit(nvcc, version, supported, folders["INCLUDES"], folders["LIBRARIES"])


def architectures(requested: str | None, supported: frozenset[int]) -> list[Architecture]:
    """The architectures of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a 12.0+PTX"; of the default list those that
    nvcc supports. 9.0 means 9.0a, the only form that has wgmma. Older ones than 8.0 are left out."""
    wanted = [_parse(word) for word in re.split(r"[;\s]+", requested or DEFAULT_ARCHITECTURES) if word]
    wanted = [architecture for architecture in wanted if architecture.number >= OLDEST]
    if requested:
        unknown = [str(architecture) for architecture in wanted if architecture.number not in supported]
        if unknown or not wanted:
            stop(
                f"TORCH_CUDA_ARCH_LIST={requested!r}: expected architectures from 8.0 that nvcc supports "
                f"({sorted(supported)}), got {unknown or 'none'}."
            )
    return [architecture for architecture in wanted if architecture.number in supported]


def architectures_of(source: Path, wanted: list[Architecture]) -> list[Architecture]:
    """The architectures that a file is compiled for: *_sm90.cu for 9.0a, wanted or not, so that every symbol
    exists; any other file for all of the wanted ones."""
    return [Architecture(90, "a")] if source.stem.endswith("_sm90") else wanted


def compile_objects(
    toolkit: Toolkit, folder: Path, build_dir: Path, wanted: list[Architecture], jobs: int
) -> list[str]:
    """Compiles each .cu file of `folder` that changed, or whose headers or flags did; returns all objects."""
    build_dir.mkdir(parents=True, exist_ok=True)
    headers = [*folder.glob("*.cuh"), *folder.glob("*.h"), *folder.parent.glob("*.h")]
    targets = {source: build_dir / f"{source.stem}.o" for source in sorted(folder.glob("*.cu"))}
    commands = {}
    for source, target in targets.items():
        gencode = [flag for one in architectures_of(source, wanted) for flag in one.gencode()]
        command = [toolkit.nvcc, *FLAGS, f"-I{folder.parent}", *gencode, "-c", str(source), "-o", str(target)]
        record = target.with_suffix(".command")
        newest = max(path.stat().st_mtime for path in [source, *headers])
        fresh = target.exists() and target.stat().st_mtime > newest
        if not (fresh and record.exists() and record.read_text() == shlex.join(command)):
            commands[source] = command
    finished = itertools.count(1)

    def compile_one(source: Path) -> None:
        command = commands[source]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(f"FAILED: {in_repository(source)}\n{shlex.join(command)}\n{done.stdout}", flush=True)
            stop(f"nvcc could not compile {source}; its messages are above.")
        line = f"[{next(finished)}/{len(commands)}] {in_repository(source)}"
        print(line, done.stdout.rstrip(), sep="\n" if done.stdout else "", flush=True)
        targets[source].with_suffix(".command").write_text(shlex.join(command))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, commands))
    return [str(target) for target in targets.values()]


def _parse(word: str) -> Architecture:
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
    if match is None:
        stop(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, got {word!r}.")
    number = int(match[1]) * 10 + int(match[2])
    return Architecture(number, "a" if number == 90 else match[3], bool(match[4]))


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout
