"""NVIDIA's machine code as a schedule: its instructions with their control codes, its loops, and how often they run.

Since Volta the compiler writes the schedule into the code. Of the 128 bits of an instruction, from bit 105 on: how many
cycles the warp waits before its next one (4 bits), whether it may go on without a yield (1), the scoreboard that is set
until its result is there (3), the one until its operands were read (3), and the scoreboards that it waits for (6).

How often a loop runs is not in the machine code. It is in Triton's IR, whose loops have bounds: `step_loop` brings the
two together by order and nesting, and raises UnmatchedError where they are not alike. A loop that was unrolled in part
would be: it shows in barriers that are in the machine code more often than in PTX. (LLVM, between Triton's IR and PTX,
unrolls in part only bodies of a few dozen instructions; those of the training kernel have hundreds.)
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

BYTES = 16
"""Of an instruction."""

NO_SCOREBOARD = 7
"""Where an instruction sets none."""

LISTED = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
"""An instruction as nvdisasm lists it: address, perhaps a predicate, name and operands."""

CONSTANT = re.compile(r"(%\w+) = arith\.constant (-?\d+) : i(?:32|64)")

LOOP = re.compile(r"( *)(?:%\S+ = )?scf\.(for|while)\b(?: %\S+ = (%\S+) to (%\S+) step (%\S+))?")


class UnmatchedError(ValueError):
    """The loops of the machine code are not those of Triton's IR, or run nobody knows how often."""


class Instruction(NamedTuple):
    """One instruction without its predicate; `waits` has a bit for each scoreboard."""

    address: int
    name: str
    operands: str
    stall: int
    stays: bool
    written: int
    read: int
    waits: int


@dataclass(frozen=True)
class Loop:
    """A loop: the places of its first and last instruction (in Triton's IR: its lines), and how often it runs."""

    first: int
    last: int
    trips: int | None = None
    inside: tuple["Loop", ...] = ()

    def shape(self) -> str:
        """How loops are nested in it: two in one are (()())."""
        return f"({''.join(inner.shape() for inner in self.inside)})"


@dataclass
class Open:
    """A loop that has begun."""

    first: int
    last: int
    trips: int | None
    inside: list[Loop] = field(default_factory=list)

    def close(self) -> Loop:
        """It as a Loop."""
        return Loop(self.first, self.last, self.trips, tuple(self.inside))


def controls(word: bytes) -> tuple[int, bool, int, int, int]:
    """Stall count, no yield, scoreboard set when written and when read, and those waited for, of 16 bytes."""
    bits = int.from_bytes(word, "little") >> 105
    return bits & 15, bool(bits >> 4 & 1), bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63


def instructions(text: str, code: bytes) -> list[Instruction]:
    """Those that nvdisasm lists in `text` of `code`, with the control bits that it does not print."""
    found = ((int(address, 16), name, operands.strip()) for address, name, operands in LISTED.findall(text))
    return [Instruction(place, name, rest, *controls(code[place : place + BYTES])) for place, name, rest in found]


def loops(code: list[Instruction]) -> list[Loop]:
    """The outermost loops: what a branch back spans. Branches to itself fill the end of the code, and are none."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    ends: dict[int, int] = {}
    for place, (_, name, operands, *_) in enumerate(code):
        target = re.search(r"\b0x[0-9a-f]+$", operands) if name.split(".")[0] == "BRA" else None
        first = places.get(int(target[0], 16), place) if target else place
        if first < place:
            ends[first] = place
    return nested(Open(first, last, None) for first, last in sorted(ends.items()))


def nested(found: Iterable[Open]) -> list[Loop]:
    """Loops in the order in which they begin, each in the innermost that it lies in; the outermost."""
    around: list[Open] = [Open(-1, 2**62, None)]
    for loop in found:
        while loop.last > around[-1].last:
            inner = around.pop()
            around[-1].inside.append(inner.close())
        around.append(loop)
    while len(around) > 1:
        inner = around.pop()
        around[-1].inside.append(inner.close())
    return around[0].inside


def source_loops(ttgir: str, batch: int | None) -> list[Loop]:
    """The outermost loops of Triton's IR. One with the bound `size`, the rows of a step, is over tiles of `batch`."""
    constants = {name: int(value) for name, value in CONSTANT.findall(ttgir)}

    def number(name: str) -> int | None:
        return batch if re.fullmatch(r"%size(_\d+)?", name) else constants.get(name)

    begun: list[tuple[str, Open]] = []
    found: list[Open] = []
    for place, line in enumerate(ttgir.splitlines()):
        if loop := LOOP.match(line):
            indent, _, *bounds = loop.groups()
            begin, end, by = (number(bound) if bound else None for bound in bounds)
            known = begin is not None and end is not None and by
            found.append(Open(place, place, math.ceil((end - begin) / by) if known else None))  # type: ignore[operator]
            begun.append((indent, found[-1]))
        elif begun and line.startswith(begun[-1][0] + "}") and " do " not in line:  # of a while the body is to come
            begun.pop()[1].last = place
    return nested(found)


def matched(machine: Loop, source: Loop) -> Loop:
    """The loop of machine code with how often each loop in it runs, as the same one of Triton's IR says."""
    if machine.shape() != source.shape():
        raise UnmatchedError(f"loops are nested {machine.shape()} in the machine code, {source.shape()} in Triton's IR")
    if any(one.last >= other.first for one, other in pairwise(machine.inside)):
        raise UnmatchedError("loops of the machine code overlap")
    inside = []
    for inner, known in zip(machine.inside, source.inside, strict=True):
        if known.trips is None:
            raise UnmatchedError(f"the bounds of the loop on line {known.first + 1} of Triton's IR are unknown")
        inside.append(replace(matched(inner, known), trips=known.trips))
    return replace(machine, inside=tuple(inside))


def longest(found: list[Loop]) -> Loop | None:
    """The one of the most instructions."""
    return max(found, key=lambda loop: loop.last - loop.first, default=None)


def inside(code: list[Instruction]) -> list[Instruction]:
    """The instructions of the longest loop, or all where there is none."""
    loop = longest(loops(code))
    return code[loop.first : loop.last + 1] if loop else code


def step_loop(code: list[Instruction], ttgir: str, ptx: str, batch: int | None) -> Loop:
    """The loop over steps of a training kernel, the only outermost one, with how often the loops in it run."""
    source, machine = source_loops(ttgir, batch), longest(loops(code))
    if len(source) != 1 or machine is None:
        raise UnmatchedError(f"{len(source)} outermost loops in Triton's IR, {len(loops(code))} in the machine code")
    written, made = len(re.findall(r"\bbar(?:rier)?\.sync\b", ptx)), sum(is_barrier(one.name) for one in code)
    if written != made:
        raise UnmatchedError(f"{written} barriers in PTX are {made} in the machine code")
    return matched(machine, source[0])


def run_order(loop: Loop) -> Iterator[range]:
    """The places of the instructions of one trip in the order in which they run; no branch forward is taken."""
    place = loop.first
    for inner in loop.inside:
        yield range(place, inner.first)
        for _ in range(inner.trips or 1):
            yield from run_order(inner)
        place = inner.last + 1
    yield range(place, loop.last + 1)


def times(loop: Loop) -> Iterator[tuple[int, int]]:
    """Each place of a loop, and how often it runs in one trip."""
    place = loop.first
    for inner in loop.inside:
        yield from ((outside, 1) for outside in range(place, inner.first))
        yield from ((within, (inner.trips or 1) * count) for within, count in times(inner))
        place = inner.last + 1
    yield from ((outside, 1) for outside in range(place, loop.last + 1))


class Floor(NamedTuple):
    """Cycles that a trip takes at least: by the stall counts of a warp, and by the slots of the schedulers."""

    stalls: int
    slots: int

    def cycles(self) -> int:
        """The larger."""
        return max(self)


SCHEDULERS = 4
"""Of a multiprocessor. Each issues one instruction a cycle."""


def floor(code: list[Instruction], loop: Loop, warps: int) -> Floor:
    """The floor of one trip of a loop whose inner loops are matched."""
    stalls = sum(max(1, code[place].stall) * count for place, count in times(loop))
    issued = sum(count for _, count in times(loop))
    return Floor(stalls, issued * math.ceil(warps / SCHEDULERS))


def is_barrier(name: str) -> bool:
    """Whether warps wait for one another at it."""
    return name.startswith("BAR.")
