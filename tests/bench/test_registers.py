"""Registers that are read before they are written, in machine code by hand."""

import pytest

from bench.registers import unwritten
from bench.sass import LISTED, Instruction


def code(*lines: str) -> list[Instruction]:
    """Instructions as nvdisasm lists them."""
    text = "\n".join(f"/*{16 * place:04x}*/ {line} ;" for place, line in enumerate(lines))
    found = LISTED.findall(text)
    assert len(found) == len(lines)
    return [Instruction(int(address, 16), name, rest.strip(), 1, True, 7, 7, 0) for address, name, rest in found]


WRITTEN = {
    "a chain": ["S2R R0, SR_TID.X", "IMAD.SHL.U32 R2, R0, 0x2, RZ", "IADD3 R2, R2, R0, RZ"],
    "64 bits": ["ULDC.64 UR4, c[0x0][0x208]", "LDC.64 R2, c[0x0][0x210]", "LDG.E.64 R6, desc[UR4][R2.64]",
                "IADD3 R8, P0, R6, R2, RZ", "IADD3.X R9, R7, R3, RZ, P0, !PT"],
    "128 bits": ["ULDC.64 UR4, c[0x0][0x208]", "LDC.64 R2, c[0x0][0x210]", "LDG.E.128 R4, desc[UR4][R2.64]",
                 "FADD R8, R7, R6", "STG.E desc[UR4][R2.64], R8"],
    "the stack": ["STL [R1+0x4], RZ", "LDL R2, [R1+0x4]", "MOV R3, R2"],
    "predicates": ["S2R R0, SR_TID.X", "ISETP.GE.AND P1, P2, R0, 0x20, PT", "@P1 SEL R1, R0, RZ, !P2",
                   "SHFL.BFLY PT, R2, R0, 0x1, 0x1f", "LOP3.LUT P3, R4, R0, 0x8, R2, 0xc0, !PT", "SEL R3, R4, RZ, P3"],
    "a barrier in memory": ["UMOV UR12, URZ", "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR12], RZ", "FSEL R3, RZ, RZ, P6"],
    "half a register": ["MOV R2, 0x1", "PRMT R5, R2, 0x7632, R5", "MOV R6, R5"],
    "predicates of a register": ["S2R R0, SR_TID.X", "R2P PR, R0, 0x7e", "FSEL R3, R0, RZ, P3"],
    "a predicate in a bit": ["LOP3.LUT R5, R5, 0xfffeffff, RZ, 0xc0, !PT", "MOV R6, R5"],
    "a product of a warp group": ["UMOV UR6, 0x1", "CS2R R8, SRZ", "CS2R R10, SRZ",
                                  "HGMMA.64x16x8.F32.TF32 R24, R8, gdesc[UR4], RZ, !UPT", "FADD R0, R31, R24"],
    "tensor cores": ["CS2R R8, SRZ", "LDSM.16.M88.4 R12, [R1]", "HMMA.1688.F32.TF32 R4, R12, R8, RZ",
                     "FADD R0, R7, R15"],
    "pairs": ["CS2R R4, SRZ", "FADD2 R6, R4.F32x2.HI_LO, R4.F32", "FADD R0, R7, R6"],
    "a subroutine": ["CALL.REL.NOINC 0x30", "MOV R2, R16", "EXIT", "MUFU.RCP64H R16, RZ", "RET.REL.NODEC R1 0x10"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read(name: str) -> None:
    assert unwritten(code(*WRITTEN[name])) == []


READ_TOO_SOON = {
    "nothing at all": (["IADD3 R7, P4, R7, 0x2, RZ", "R2UR UR6, R7"], ["R7"]),  # of 256-64-10, on an H100
    "later": (["UIADD3 UR22, UP0, UR22, 0x2, URZ", "UMOV UR22, URZ"], ["UR22"]),  # of 32-64-10
    "the carry": (["UMOV UR4, URZ", "UIADD3.X UR5, UR4, URZ, URZ, UP1, !UPT"], ["UP1"]),
    "a register beyond": (["LDC.64 R2, c[0x0][0x210]", "MOV R5, R4"], ["R4"]),
    "more than a bit": (["LOP3.LUT R5, R5, 0xfffefffe, RZ, 0xc0, !PT"], ["R5"]),
    "both operands in shared memory": (["UMOV UR6, 0x1", "HGMMA.64x16x8.F32.TF32 R24, gdesc[UR4], RZ, !UPT"], ["UR4"]),
    "B's descriptor": (["CS2R R8, SRZ", "HGMMA.64x16x8.F32.TF32 R24, R8, gdesc[UR4], RZ, !UPT"], ["UR6"]),
    "what is stored": (["STS [R1], R2"], ["R2"]),
    "once each": (["FADD R0, R2, R3", "FADD R0, R2, R3"], ["R2", "R3"]),
}


@pytest.mark.parametrize("name", READ_TOO_SOON)
def test_what_is_read_before_it_is_written_is_named(name: str) -> None:
    lines, registers = READ_TOO_SOON[name]
    found = unwritten(code(*lines))
    assert [line.rsplit(" ", 1)[1] for line in found] == registers
    assert all("nothing has written" in line for line in found)
