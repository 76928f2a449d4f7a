"""Each instruction set of isa.h stands wherever docs/map.md says that one has to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import dynquant
from dynquant.environment import isa as isa_function
from tests.support.isas import EMULATED, EVERY_ISA, ISAS
from tests.support.paths import CPU_SOURCES, CSRC, EMULATED_ISAS, ISA_LIST, KERNEL_SOURCES, ROOT, TESTS

TABLES = dict(re.findall(r"ISA\((\w+), (k\w+), ", ISA_LIST.read_text()))
"""The kernel table of each instruction set."""


def section(path: Path, start: str, end: str) -> str:
    return path.read_text().split(start, 1)[1].split(end, 1)[0]


def has_file(isa: str) -> bool:
    """A file that exports the table of isa.h, with the name of isa.h."""
    path = CPU_SOURCES / "isa" / f"{isa}.cpp"
    exported = rf'extern const KernelTable {TABLES.get(isa, "kNone")} = make_kernels\("{isa}",'
    return path.exists() and re.search(exported, path.read_text()) is not None


def setuptools_compiles_it(isa: str) -> bool:
    from build_backend.extension import extension

    return f"csrc/kernels/cpu/isa/{isa}.cpp" in extension().sources


def cmake_compiles_it(isa: str) -> bool:
    """By a pattern over all files, in the library and in the tests of primitives."""
    library, tests = KERNEL_SOURCES / "CMakeLists.txt", TESTS / "kernels" / "cpp" / "CMakeLists.txt"
    left_out = re.findall(r"EXCLUDE REGEX .*\((.*?)\)", tests.read_text())
    return (
        "CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cpu/*.cpp" in library.read_text()
        and "CONFIGURE_DEPENDS ${kernels}/cpu/isa/*.cpp" in tests.read_text()
        and isa in EVERY_ISA
        and all(isa not in names.split("|") for names in left_out)
    )


def has_a_row_in_the_map(isa: str) -> bool:
    rows = re.findall(
        r"^\| `(\w+)` \|", section(ROOT / "docs" / "map.md", "## Add an instr", "\n## "), re.MULTILINE
    )
    return isa in rows


def is_named_by_info(isa: str) -> bool:
    return f"``{isa}``" in str(isa_function.__doc__)


def is_named_by_contributing(isa: str) -> bool:
    text = section(ROOT / "CONTRIBUTING.md", "At run time `DYNQUANT_ISA`", "\n\n")
    return f"`{isa}`" in text


def has_a_peak(isa: str) -> bool:
    return isa == "scalar" or f'{{"{isa}",' in (CSRC / "probes" / "probes.cpp").read_text()


def is_emulated_where_ci_may_lack_it(isa: str) -> bool:
    """``scalar`` and ``avx2`` run on every machine of CI; the others over intrinsics written as loops."""
    if isa in ("scalar", "avx2"):
        return True
    tables = (TESTS / "kernels" / "cpp" / "isas.cpp").read_text()
    compared = (EMULATED_ISAS / "compare.cpp").read_text()
    return (
        isa in EMULATED
        and f"emulated_primitives::cpu::{TABLES.get(isa, 'kNone')}," in tables
        and TABLES.get(isa, "kNone") in compared
    )


PLACES: list[Callable[[str], bool]] = [
    has_file,
    setuptools_compiles_it,
    cmake_compiles_it,
    has_a_row_in_the_map,
    is_named_by_info,
    is_named_by_contributing,
    has_a_peak,
    is_emulated_where_ci_may_lack_it,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_each_instruction_set_stands_in_every_place(place: Callable[[str], bool]) -> None:
    assert list(TABLES) == EVERY_ISA
    assert len(EVERY_ISA) >= 5
    assert not [isa for isa in EVERY_ISA if not place(isa)]
    assert not place("avx10"), "a place that a new instruction set would not be missed in"


def test_the_order_is_one() -> None:
    """From slow to fast in isa.h, in the map and at run time."""
    text = section(ROOT / "docs" / "map.md", "## Add an instruction set", "\n## ")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == EVERY_ISA
    if dynquant.available_isas():
        assert [isa for isa in EVERY_ISA if isa in ISAS] == dynquant.available_isas()


def test_no_file_is_left_without_a_row() -> None:
    with_target = {
        path.stem for path in (CPU_SOURCES / "isa").glob("*.cpp") if "generic/kernels.h" in path.read_text()
    }
    assert with_target == set(EVERY_ISA)
