"""The reader of disassembled kernels, on listings written by hand."""

from __future__ import annotations

import pytest

from tests.support import sass


def listing(body: str, architecture: str = "sm_90a") -> str:
    """cuobjdump's output for one kernel; ``body`` has one instruction per line, at 0x00, 0x10, 0x20 …"""
    lines = [f"arch = {architecture}", "\t\tFunction : _Zkernel"]
    for i, instruction in enumerate(body.strip().splitlines()):
        lines.append(f"        /*{16 * i:04x}*/    {instruction.strip()} ;      /* 0x00000a00ff017b82 */")
        lines.append("                                                         /* 0x000fe20000000800 */")
    return "".join(line + "\n" for line in lines)


def kernel(body: str) -> sass.Kernel:
    (found,) = sass.parse(listing(body))
    return found


def names(loop: list[sass.Instruction]) -> list[str]:
    return [instruction.name for instruction in loop]


def test_instructions_are_read() -> None:
    text = listing("@!P0 IGMMA.64x64x32.S8.S8 R24, gdesc[UR16], R24, UP0\nEXIT") + listing("ERRBAR", "sm_80")
    first, second = sass.parse("junk\n" + text)
    assert (first.architecture, first.name, second.architecture) == ("sm_90a", "_Zkernel", "sm_80")
    assert first.instructions[0] == sass.Instruction(
        0, "!P0", "IGMMA.64x64x32.S8.S8", ("R24", "gdesc[UR16]", "R24", "UP0")
    )
    assert first.opcodes[1:] == ["EXIT"]
    assert second.opcodes == ["ERRBAR"]


def test_a_loop_includes_instructions_behind_its_end() -> None:
    """As nvcc lays it out: the main loop inside a tile loop, with its waiting code behind the end."""
    found = kernel("""
        MOV R0, RZ
        IADD3 R1, R1, 0x1, RZ
        IGMMA.64x64x32.S8.S8 R24, gdesc[UR16], R24
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4
        @!P0 BRA 0xb0
        IGMMA.64x64x32.S8.S8 R24, gdesc[UR16], R24
        R2UR UR4, R2
        @P1 BRA !P2, 0x30
        STG.E.128 desc[UR6][R2.64], R12
        @P3 BRA 0x10
        EXIT
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4
        @!P0 BRA 0xb0
        MEMBAR.ALL.GPU
        BRA 0x50
        BRA 0xf0
    """)
    (loop,) = found.innermost_loops("IGMMA")
    assert names(loop) == ["SYNCS", "BRA", "IGMMA", "R2UR", "BRA", "SYNCS", "BRA", "MEMBAR", "BRA"]
    assert sorted(map(len, found.loops)) == [2, 9, 13]
    assert names(found.innermost_loops("STG")[0]).count("IGMMA") == 2
    assert found.innermost_loops("HMMA") == []


def test_a_jump_back_with_a_second_entry_is_no_loop() -> None:
    found = kernel("""
        @P0 BRA 0x20
        IADD3 R1, R1, 0x1, RZ
        IGMMA.64x64x32.S8.S8 R24, gdesc[UR16], R24
        @P1 BRA 0x10
        EXIT
    """)
    assert found.loops == []


def test_reconvergence_and_calls() -> None:
    found = kernel("""
        BSSY B0, 0x40
        @P0 BRA 0x30
        BSYNC B0
        CALL.REL.NOINC 0x60
        BRA.U UP0, 0x00
        EXIT
        RET.REL.NODEC R4 0x0
    """)
    assert found.successors == [[1], [3, 2], [4, 3], [6, 4], [0, 5], [], []]
    with pytest.raises(ValueError, match="cannot tell where"):
        _ = kernel("BRA `(.L_x_1)").successors


@pytest.mark.parametrize(
    ("body", "stores"),
    [
        ("STG.E.128 desc[UR8][R2.64], R12", {"STG.E.128"}),
        ("STG.E.128 desc[UR8][R2.64], R8", set()),
        ("MOV R13, R0\nSTG.E.128 desc[UR8][R2.64], R12", set()),
        ("@P0 MOV R13, R0\nSTG.E.128 desc[UR8][R2.64], R12", {"STG.E.128"}),
        ("LDS.128 R12, [R4]\nSTG.E.128 desc[UR8][R2.64], R12", set()),
        (
            "@P0 BRA 0x30\nSTG.E.U16 desc[UR8][R2.64], R13\nSTSM.16.M88.4 [R3], R10",
            {"STG.E.U16", "STSM.16.M88.4"},
        ),
        ("PRMT R5, R13, 0x7632, R5\nSTG.E.U16 desc[UR8][R2.64+0x2], R5", set()),
        ("BRA 0x10", set()),
    ],
)
def test_where_a_register_is_stored(body: str, stores: set[str]) -> None:
    found = kernel(f"F2FP.BF16.F32.PACK_AB R13, R9, R8\n{body}\nEXIT")
    assert found.stores_of("F2FP.BF16") == stores
    assert found.stores_of("F2FP.F16") == set()
