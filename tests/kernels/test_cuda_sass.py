"""Machine code of the CUDA kernels for every default architecture: no local memory, no serialized wgmma, the
instructions that each kernel is named after, main loops without memory barriers, wide stores. Needs nvcc, no
GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from build_backend import nvcc
from tests.support import sass
from tests.support.paths import CUDA_SOURCES, KERNEL_SOURCES

SOURCES = sorted(CUDA_SOURCES.glob("*.cu"))
# By file and kernel (a part of its mangled name): its instructions; "*" matches parts that differ between
# architectures.
SMALL = ["IMMA.16832.S8.S8", "LDG.E.NA.128.CONSTANT*"]
INSTRUCTIONS = {
    "gemm_small": {"gemm_small_kernel": SMALL},
    "gemm_mma": {"gemm_mma_kernel": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128*"]},
    "gemm_wgmma_sm90": {
        f"gemm_wgmma_kernelILi{columns}E": [
            f"IGMMA.64x{columns}x32.S8.S8",
            "UTMALDG.2D",
            "UTMALDG.2D.MULTICAST",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT",
            "USETMAXREG.DEALLOC.CTAPOOL",
            "USETMAXREG.TRY_ALLOC.CTAPOOL",
        ]
        for columns in (32, 64, 128, 256)
    },
    "linear_small": {"linear_small_kernel": SMALL},
    "quantize": {
        name: ["LDG.E.NA.128.CONSTANT*"]
        for name in ("quantize_held_kernel", "quantize_any_kernel", "range_kernel", "rotate_kernel")
    },
}


@dataclass(frozen=True)
class Compiled:
    """One file, compiled for all its architectures."""

    object: Path
    log: str
    architectures: list[nvcc.Architecture]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    toolkit = nvcc.find_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc on this machine: whether the CUDA kernels compile was not checked")
    folder = tmp_path_factory.mktemp("sass")
    default_architectures = nvcc.architectures(None, toolkit.supported)

    def compile_one(source: Path) -> Compiled:
        architectures = nvcc.architectures_of(source, default_architectures)
        gencode = [flag for architecture in architectures for flag in architecture.gencode()]
        target = folder / f"{source.stem}.o"
        command = [
            toolkit.nvcc,
            *nvcc.FLAGS,
            "-Xptxas",
            "-v",
            f"-I{KERNEL_SOURCES}",
            *gencode,
            "-c",
            str(source),
        ]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Compiled(target, done.stderr, architectures)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return dict(zip([path.stem for path in SOURCES], pool.map(compile_one, SOURCES), strict=True))


@pytest.fixture(scope="session")
def cuobjdump() -> dict[str, str]:
    """The command and its PATH, from the toolkit or the packages nvidia-cuda-cuobjdump and -nvdisasm."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [os.environ["PATH"], "/usr/local/cuda/bin", *map(str, packages.glob("*/bin"))]
    path = os.pathsep.join(folders)
    found = shutil.which("cuobjdump", path=path)
    if found is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump and nvdisasm on this machine: the kernels' instructions were not checked")
    return {"command": found, "PATH": path}


@pytest.fixture(scope="session")
def kernels(compiled: dict[str, Compiled], cuobjdump: dict[str, str]) -> dict[str, list[sass.Kernel]]:
    """The kernels by file, of all architectures."""

    def disassembled(one: Compiled) -> list[sass.Kernel]:
        done = subprocess.run(
            [cuobjdump["command"], "-sass", str(one.object)],
            env={**os.environ, "PATH": cuobjdump["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        )
        return sass.parse(done.stdout)

    return {name: disassembled(compiled[name]) for name in INSTRUCTIONS}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_spills_and_no_serialized_wgmma(compiled: dict[str, Compiled], source: Path) -> None:
    one = compiled[source.stem]
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", one.log
    )
    assert all(frame == ("0", "0", "0") for frame in frames), one.log
    # C7508: setmaxnreg is ignored; C7510: wgmma is serialized.
    assert not re.search(r"warning|\(C\d+\)|Potential Performance Loss", one.log), one.log
    expected = {f"sm_{architecture.number}{architecture.suffix}" for architecture in one.architectures}
    if source.stem in INSTRUCTIONS:
        assert set(re.findall(r"for '(sm_\w+)'", one.log)) == expected


def test_every_file_with_kernels_is_listed() -> None:
    with_kernels = {
        path.stem for path in SOURCES if "_kernel" in path.read_text() or "launch_small" in path.read_text()
    }
    assert with_kernels == set(INSTRUCTIONS)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(
    compiled: dict[str, Compiled], kernels: dict[str, list[sass.Kernel]], name: str
) -> None:
    for part, required in INSTRUCTIONS[name].items():
        found = [kernel for kernel in kernels[name] if part in kernel.name]
        assert {kernel.architecture for kernel in found} == {
            f"sm_{a.number}{a.suffix}" for a in compiled[name].architectures
        }
        for kernel in found:
            for instruction in required:
                pattern = re.escape(instruction).replace(r"\*", ".*")
                assert any(re.fullmatch(pattern, present) for present in kernel.opcodes), (
                    f"{name_of(kernel)} has no {instruction}: {sorted(set(kernel.opcodes))}"
                )
            assert not {"LDL", "STL"} & {instruction.name for instruction in kernel.instructions}, name_of(
                kernel
            )


def test_main_loops_of_wgmma_do_not_wait_for_memory(kernels: dict[str, list[sass.Kernel]]) -> None:
    """A memory barrier or an invalidation of L1 in each step costs more than its products. R2UR, which makes
    a descriptor uniform, waits too; a descriptor of a uniform address needs none.
    """
    for kernel in kernels["gemm_wgmma_sm90"]:
        loops = kernel.innermost_loops("IGMMA")
        assert loops, f"{name_of(kernel)} has no loop around its products"
        for loop in loops:
            names = [instruction.name for instruction in loop]
            slow = {"MEMBAR", "CCTL", "ERRBAR", "CGAERRBAR"} & set(names)
            assert not slow, f"{name_of(kernel)}: {slow} in the loop from {loop[0].address:#x}"
            products = [i for i, name in enumerate(names) if name == "IGMMA"]
            assert "R2UR" not in names[products[0] : products[-1]], (
                f"{name_of(kernel)}: R2UR between the products from {loop[products[0]].address:#x}"
            )


@pytest.mark.parametrize("name", [name for name in INSTRUCTIONS if name != "quantize"])
def test_outputs_leave_by_16_bytes(kernels: dict[str, list[sass.Kernel]], name: str) -> None:
    """Eight bf16 outputs of a row leave by one store, from registers or through shared memory."""
    rounding = set()
    for kernel in kernels[name]:
        wide = {"STG.E.128", "UTMASTG"} & {opcode.removesuffix(".2D") for opcode in kernel.opcodes}
        assert wide, f"{name_of(kernel)} stores no 16 bytes at once"
        if any(opcode.startswith("F2FP.BF16") for opcode in kernel.opcodes):
            rounding.add(kernel.architecture)
            stores = kernel.stores_of("F2FP.BF16")
            assert any(store.startswith(("STG.E.128", "STS")) for store in stores), (
                f"{name_of(kernel)} stores bf16 by {sorted(stores)} alone"
            )
    assert rounding == {kernel.architecture for kernel in kernels[name]}


def name_of(kernel: sass.Kernel) -> str:
    return f"{kernel.name} for {kernel.architecture}"
