"""Checks of an instruction set that need no CPU with it: arithmetic, encoding and isolation."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dynquant import _extension
from tests.support.isas import EMULATED, EVERY_ISA
from tests.support.paths import CPU_SOURCES, EMULATED_ISAS, KERNEL_SOURCES

FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", f"-I{KERNEL_SOURCES}"]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the vector kernels are for x86-64")


def compile_object(folder: Path, name: str, *flags: str) -> Path:
    """``name``: of a file in CPU_SOURCES."""
    target = folder / f"{Path(name).name}.o"
    command = [
        os.environ.get("CXX", "g++"),
        *FLAGS,
        *flags,
        "-c",
        str(CPU_SOURCES / f"{name}.cpp"),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def on_every_core(tasks: list[tuple[object, ...]]) -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda task: compile_object(*task), tasks))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The file of each instruction set, compiled with the extension's flags, its written fma hidden."""
    folder = tmp_path_factory.mktemp("objects")
    flags = "-O3", "-include", str(EMULATED_ISAS / "explicit_fma.h")
    tasks = [(folder, f"isa/{name}", *flags) for name in EVERY_ISA]
    return dict(zip(EVERY_ISA, on_every_core(tasks), strict=True))


def test_emulated_kernels_give_the_bits_of_the_scalar_ones(tmp_path: Path) -> None:
    """AVX-VNNI and AVX512-VNNI over intrinsics written as loops, so that any x86-64 machine can run them."""
    shim = str(EMULATED_ISAS / "intrinsics.h")
    emulated = ["-O1", "-mavx2", "-mf16c", "-mfma", "-include", shim]
    library = [path.relative_to(CPU_SOURCES).with_suffix("") for path in CPU_SOURCES.rglob("*.cpp")]
    native = [str(name) for name in sorted(library) if name.name not in EMULATED]
    objects = on_every_core(
        [(tmp_path, f"isa/{name}", *emulated) for name in reversed(EMULATED)]
        + [(tmp_path, name, "-O1") for name in native]
    )
    program = tmp_path / "compare"
    source = str(EMULATED_ISAS / "compare.cpp")
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-O1", source, *map(str, objects), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "all the same bits" in run.stdout


def listing(path: Path) -> str:
    command = ["objdump", "-d", "-w", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(path: Path) -> list[tuple[str, str]]:
    """(first bytes, instruction) of each instruction."""
    return re.findall(r"^\s+[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(\S.*)$", listing(path), re.MULTILINE)


def functions_with(path: Path, instruction: str) -> set[str]:
    """Mangled names of the functions that contain an instruction."""
    bodies = re.split(r"^[0-9a-f]+ <(\S+)>:$", listing(path), flags=re.MULTILINE)
    return {name for name, body in zip(bodies[1::2], bodies[2::2], strict=True) if instruction in body}


def is_evex(code: str) -> bool:
    return code.startswith("62 ")


def is_vex(code: str) -> bool:
    return code.startswith(("c4 ", "c5 "))


def test_encodings(objects: dict[str, Path]) -> None:
    """Each file has the instruction that it is named after, and no instruction that its CPUs lack."""
    assert shutil.which("objdump"), "objdump comes with the compiler's binutils"
    code = {name: disassemble(path) for name, path in objects.items()}
    for name in ("scalar", "avx2", "avxvnni"):
        assert not [text for start, text in code[name] if is_evex(start)], (
            f"{name} holds AVX-512 instructions"
        )
    assert not [text for start, text in code["scalar"] if is_vex(start)], "scalar holds AVX instructions"
    assert any("vpmaddwd" in text and "ymm" in text for _, text in code["avx2"])
    assert any("vpdpbusd" in text and is_vex(start) for start, text in code["avxvnni"])
    assert any(
        "vpdpbusd" in text and "ymm" in text and is_evex(start) for start, text in code["avx512vl_vnni"]
    )
    assert any("vpdpbusd" in text and "zmm" in text for _, text in code["avx512vnni"])


def test_nothing_is_contracted(objects: dict[str, Path]) -> None:
    """Beside the multiply-adds that the kernels write, the objects hold none: one would change bits."""
    for path in objects.values():
        contracted = functions_with(path, "vfm") | functions_with(path, "vfnm")
        assert not contracted, f"{path.name} contracts products and sums in {contracted}"


def test_nothing_leaks(objects: dict[str, Path]) -> None:
    """A kernel file exports its table alone: its copy of an inline function could replace all others."""
    for name, path in objects.items():
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], check=True, capture_output=True, text=True
        )
        shared = [
            line.split(maxsplit=2)[2] for line in listing.stdout.splitlines() if line.split()[1] in "TWVuBDR"
        ]
        assert len(shared) == 1, f"{name} exports {shared}"
        assert shared[0].startswith("dynquant::cpu::k")


def test_parallel_regions_are_compiled_in() -> None:
    """at::parallel_for is a header: compiled without OpenMP it silently runs on one thread."""
    if _extension.extension is None:
        pytest.skip(f"no extension to look into: {_extension.status}")
    library = str(_extension.extension.__file__)
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    )
    assert re.search("GOMP_parallel|__kmpc_fork_call", listing.stdout)
