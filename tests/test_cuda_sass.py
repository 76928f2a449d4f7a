"""What nvcc makes of the CUDA kernels, for every architecture of the default list: nothing in local memory,
nothing serialized, and the instructions that each kernel is named after. Needs nvcc, no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from build_backend import nvcc

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
# Of each file the kernels (a part of their mangled names) and the instructions that each must have; a "*"
# stands for what differs between architectures.
INSTRUCTIONS = {
    "gemm_dp4a": {"gemm_small_kernel": ["IDP.4A.S8.S8", "LDG.E.NA.128.CONSTANT*"]},
    "gemm_small_mma_sm80": {"gemm_small_kernel": ["IMMA.16832.S8.S8", "LDG.E.NA.128.CONSTANT*"]},
    "gemm_mma_sm80": {"gemm_mma_kernel": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128*"]},
    "gemm_wgmma_sm90": {
        f"gemm_wgmma_kernelILi{columns}E": [
            f"IGMMA.64x{columns}x32.S8.S8",
            "UTMALDG.2D",
            "UTMALDG.2D.MULTICAST",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT",
            "USETMAXREG.DEALLOC.CTAPOOL",
            "USETMAXREG.TRY_ALLOC.CTAPOOL",
        ]
        for columns in (64, 128, 256)
    },
    "quantize": {
        name: ["LDG.E.NA.128.CONSTANT*"] for name in ("quantize_kernel", "range_kernel", "rotate_kernel")
    },
}


@dataclass(frozen=True)
class Compiled:
    """One file, for all its architectures."""

    object: Path
    log: str
    architectures: list[nvcc.Architecture]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    toolkit = nvcc.find_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc on this machine: whether the CUDA kernels compile was not checked")
    folder = tmp_path_factory.mktemp("sass")
    wanted = nvcc.architectures(None, toolkit.supported)

    def compile_one(source: Path) -> Compiled:
        architectures = nvcc.architectures_of(source, wanted)
        gencode = [flag for architecture in architectures for flag in architecture.gencode()]
        target = folder / f"{source.stem}.o"
        command = [toolkit.nvcc, *nvcc.FLAGS, "-Xptxas", "-v", f"-I{CSRC}", *gencode, "-c", str(source)]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Compiled(target, done.stderr, architectures)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return dict(zip([path.stem for path in SOURCES], pool.map(compile_one, SOURCES), strict=True))


@pytest.fixture(scope="session")
def cuobjdump() -> dict[str, str]:
    """The command and its PATH: the toolkit's, or of the packages nvidia-cuda-cuobjdump and -nvdisasm."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [os.environ["PATH"], "/usr/local/cuda/bin", *map(str, packages.glob("*/bin"))]
    path = os.pathsep.join(folders)
    found = shutil.which("cuobjdump", path=path)
    if found is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump and nvdisasm on this machine: the kernels' instructions were not checked")
    return {"command": found, "PATH": path}


def disassemble(compiled: Compiled, cuobjdump: dict[str, str]) -> dict[tuple[str, str], Counter[str]]:
    """Instructions of each (architecture, kernel)."""
    done = subprocess.run(
        [cuobjdump["command"], "-sass", str(compiled.object)],
        env={**os.environ, "PATH": cuobjdump["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    kernels: dict[tuple[str, str], Counter[str]] = {}
    architecture = ""
    counter: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            counter = kernels.setdefault((architecture, match[1]), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\S*?);?\s", line):
            counter[match[1]] += 1
    return kernels


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_nothing_spills_and_nothing_is_serialized(compiled: dict[str, Compiled], source: Path) -> None:
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
def test_instructions(compiled: dict[str, Compiled], cuobjdump: dict[str, str], name: str) -> None:
    kernels = disassemble(compiled[name], cuobjdump)
    for part, required in INSTRUCTIONS[name].items():
        found = {key: counter for key, counter in kernels.items() if part in key[1]}
        assert {architecture for architecture, _ in found} == {
            f"sm_{a.number}{a.suffix}" for a in compiled[name].architectures
        }
        for (architecture, kernel), counter in found.items():
            for instruction in required:
                pattern = re.escape(instruction).replace(r"\*", ".*")
                assert any(re.fullmatch(pattern, present) for present in counter), (
                    f"{kernel} for {architecture} has no {instruction}: {sorted(counter)}"
                )
            assert not {"LDL", "STL"} & {present.split(".")[0] for present in counter}, (
                f"{kernel}, {architecture}"
            )
