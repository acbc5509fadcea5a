"""Registers that machine code reads before anything has written them: there the assembler went wrong.

ptxas 12.8, which Triton 3.6 brings, moves what no trip of a loop changes in front of it. Twice it moved the descriptor
of an operand of wgmma in front of what it is made of. The training kernel of 32-64-10 (TF32, an earlier formulation)
then multiplied what lay elsewhere in shared memory: gradients of the first layer were off by more than their norm. That
of 256-64-10 read beyond shared memory: the CUDA context was lost. On an H100 both were right with ptxas at -O0.

What it goes by: before the first branch back is taken, what runs has smaller addresses than what runs later. So a
register that no instruction before wrote, on any path, is not written. How many registers an instruction writes is in
its name. A predicate that is packed into a bit of a register begins by clearing that bit, of whatever is there. What
subroutines write, which lie behind all else, they are taken to have written when one is called.
"""

import re
from collections.abc import Iterator

from .sass import Instruction

REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)\b")

WRITES_NOTHING = frozenset({
    "ST", "STG", "STS", "STL", "STSM", "BAR", "BRA", "BRX", "EXIT", "RED", "MEMBAR", "FENCE", "WARPGROUP", "DEPBAR",
    "NOP", "CCTL", "ERRBAR", "BSYNC", "BREAK", "WARPSYNC", "LDGSTS", "LDGDEPBAR", "RET", "CALL", "BPT", "KILL",
    "UTMASTG", "UTMALDG", "UTMACMDFLUSH", "BMOV", "YIELD", "NANOSLEEP", "UTCBAR",
})  # fmt: skip

TWO_RESULTS = frozenset({
    "ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3", "UISETP", "PSETP", "VOTE", "VOTEU", "SHFL", "MATCH",
})  # fmt: skip
"""What has two results in front, of which one may be a predicate."""

CARRIES = frozenset({"IADD3", "UIADD3", "LEA", "ULEA", "LOP3", "ULOP3", "IMAD", "UIMAD", "FCHK"})
"""What may have predicates among its results."""

WIDE = re.compile(r"\.(64|128)\b")

PAIRS = ("CS2R", "DADD", "DMUL", "DFMA", "F2F", "I2F", "F2I", "MUFU", "LEPC", "FADD2", "FMUL2", "FFMA2")

WIDTHS = dict.fromkeys(PAIRS, 2) | dict.fromkeys(("HMMA", "DMMA", "IMMA", "QGMMA"), 4) | {"LDTM": 128}
"""How many registers is written by what does not say so in its name, or how many may be."""

PACKED = re.compile(r"(R\d+), (R\d+), 0x([0-9a-f]+), RZ, 0xc0\b")


def width(name: str) -> int:
    """How many registers the first result of an instruction has."""
    kind = name.split(".")[0]
    if kind == "HGMMA" and (shape := re.search(r"\.\d+x(\d+)x\d+", name)):
        return int(shape[1]) // 2
    if kind in WIDTHS:
        return WIDTHS[kind]
    if kind == "LDSM" and (several := re.search(r"\.(\d)$", name)):
        return int(several[1])
    if "WIDE" in name:
        return 2
    return int(wide[1]) // 32 if (wide := WIDE.search(name)) else 1


def operands_of(one: Instruction) -> tuple[list[str], list[str]]:
    """The results of an instruction, and what it reads."""
    kind = one.name.split(".")[0]
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", one.operands) if part.strip()]
    if kind in WRITES_NOTHING or not parts:
        return [], parts
    results = 2 if kind in TWO_RESULTS else 1
    while kind in CARRIES and results < len(parts) and re.fullmatch(r"U?P(\d|T)", parts[results]):
        results += 1
    if kind in ("LOP3", "ULOP3", "ELECT") and re.fullmatch(r"U?P(\d|T)", parts[0]):
        results = max(results, 2)
    return parts[:results], parts[results:]


def named(operands: list[str]) -> Iterator[tuple[str, int]]:
    """The registers that stand there."""
    for operand in operands:
        for kind, number in REGISTER.findall(operand):
            yield kind, int(number)


def written_by(one: Instruction) -> Iterator[tuple[str, int]]:
    """The registers that an instruction writes."""
    if one.name.startswith("R2P"):  # as many predicates as its mask has bits
        yield from (("P", number) for number in range(7))
    for place, (kind, number) in enumerate(named(operands_of(one)[0])):
        count = width(one.name) if place == 0 else 1
        yield from ((kind, number + more) for more in range(count))


def unwritten(code: list[Instruction]) -> list[str]:
    """Each instruction that reads a register which none before it writes, and that register."""
    written, found = {("R", 1)}, []  # R1 is the stack's
    last = max((place for place, one in enumerate(code) if one.name.startswith("EXIT")), default=0)
    for one in code:
        if one.name.startswith("CALL"):
            written |= {register for other in code[last:] for register in written_by(other)}
        results, reads = operands_of(one)
        if (packed := PACKED.match(one.operands)) and packed[1] == packed[2]:
            reads = reads[1:] if (~int(packed[3], 16) & 0xFFFFFFFF).bit_count() == 1 else reads
        if one.name.startswith("PRMT"):  # one half of a register, where the other is whatever was there
            reads = [part for part in reads if part != results[0]]
        if one.name.startswith("HGMMA") and reads and re.fullmatch(r"R\d+.*", reads[0]):
            # of gdesc[UR4] the second pair is B's descriptor; of A in registers there is no first
            reads = [re.sub(r"gdesc\[UR(\d+)\]", lambda place: f"UR{int(place[1]) + 2}", part) for part in reads]
        for register in named(reads):
            if register not in written:
                found.append(
                    f"{one.address:x} {one.name} {one.operands}: nothing has written {register[0]}{register[1]}"
                )
                written.add(register)
        written |= set(written_by(one))
    return found
