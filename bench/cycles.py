"""A static clock: what a step of the training kernel takes by its machine code, in cycles; no GPU is needed.

    python -m bench.cycles --precision ieee --net 784-128-10 --barriers
    python -m bench.cycles --kernels cross_entropy

Three numbers of the loop over steps, from the surest to the weakest:

    floor       the larger of the stall counts of a warp, and of the slots in which 4 schedulers issue all warps
    chain       one warp alone, which waits for the scoreboards too; what it loads is in L1, and barriers are free
    estimate    all warps on schedulers, pipes and load-store unit, with barriers: a range over what only a GPU can tell

`python -m bench.clock`, on a GPU, measures what only a GPU can tell, and the error of the estimate. Everything printed
here is predicted. --kernels ranks builds by the share of their instructions that move no memory instead.
"""

import argparse
import ast
import heapq
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton

from . import builds, resources, sass
from .sass import SCHEDULERS, Instruction, Loop

GHZ = 1.98
"""The highest clock of an H100 SXM5."""


class Constant(NamedTuple):
    """A number of the clock, at best and at worst, and where it is from."""

    best: float
    worst: float
    source: str


UNMEASURED = "unmeasured"

CONSTANTS = {
    # cycles, unless it says otherwise
    "L1 load": Constant(40, 41, "H100 40.2 (a public CUDA performance study), H800 40.7 (arXiv 2402.13499)"),
    "shared load": Constant(29, 29, "H100 28.6, H800 29.0 (the same)"),
    "load after store": Constant(40, 260, f"{UNMEASURED}: an L1 hit, or L2's 259.9 (the same)"),
    "ldmatrix": Constant(29, 37, f"{UNMEASURED}: a shared load's, and 8 more for four matrices"),
    "barrier": Constant(15, 30, f"{UNMEASURED}: from the last warp at it to the first behind it"),
    "special function": Constant(17, 23, f"{UNMEASURED}: 17 on sm_86 (the vendor's tables, by others)"),
    "tensor cores": Constant(24, 24, "HMMA m16n8k16 on H800 24.1 (arXiv 2402.13499)"),
    "warp group's product": Constant(24, 60, f"{UNMEASURED}: behind the cycles that its multiplications take"),
    "shuffle": Constant(23, 29, f"{UNMEASURED}: at most a shared load's"),
    "constant or register of the system": Constant(12, 29, UNMEASURED),
    "fence": Constant(5, 30, UNMEASURED),
    "load-store unit, bytes a cycle": Constant(124, 64, "H800 124 (arXiv 2402.13499); 64 in docs/performance.md"),
    "operands held": Constant(9, 14, "of loads and stores on sm_86 (arXiv 2503.20481, table 2)"),
}
"""What the clock goes by, for an H100. Each is one number, or a range from the best to the worst."""

RESULTS = {
    # name of an instruction: the constant that says when its result is there, of those that set a scoreboard
    "LDG": "load after store", "LD": "load after store", "LDGDEPBAR": "load after store", "LDL": "L1 load",
    "LDS": "shared load", "LDSM": "ldmatrix", "SHFL": "shuffle", "HMMA": "tensor cores", "DMMA": "tensor cores",
    "HGMMA": "warp group's product", "MUFU": "special function", "I2F": "special function", "F2I": "special function",
    "F2F": "special function", "FRND": "special function", "POPC": "special function", "FLO": "special function",
}  # fmt: skip

OTHER = "constant or register of the system"

MOVERS = ("LDG", "LD", "STG", "ST", "LDL", "STL", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "RED", "ATOM")
"""What goes through the load-store unit: 4 bytes a lane, unless the name says otherwise. That lanes share an address or
a bank is not seen."""

MEMORY = re.compile(r"(LD[GLS]?|ST[GLS]?|LDSM|STSM|LDGSTS|RED[GS]?|ATOM[GS]?|UTMA\w+|UBLK\w+)\b")
"""Instructions that move memory, global or shared."""

INTERVALS = {
    # cycles in which a scheduler issues no other one of the kind: 128 / results a clock and multiprocessor, by the
    # table of arithmetic instructions in NVIDIA's CUDA C++ Programming Guide
    "special": 8, "integer": 2, "float": 1, "double": 2,
}  # fmt: skip

KINDS = {
    "special": {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO"},
    "float": {"FFMA", "FADD", "FMUL"},
    "double": {"DFMA", "DADD", "DMUL"},
    "integer": {"IADD3", "LOP3", "ISETP", "FSETP", "FSEL", "SEL", "FMNMX", "SHF", "LEA", "PRMT", "IMNMX", "VIADD"},
}

PRODUCTS = {"TF32": 1024, "DMMA": 128, "": 2048}
"""Multiplications a cycle of a multiprocessor's tensor cores, by what is in the name; the last of 16-bit numbers. By an
H100's data sheet: 495, 67 and 989 TFLOP/s of 132 multiprocessors, at 1.83, 1.98 and 1.83 GHz."""


class Operation(NamedTuple):
    """An instruction as the clock sees it: the pipe that it takes and for how long, and when its result is there."""

    code: Instruction
    pipe: str
    interval: float
    transfer: float
    latency: float
    held: float


def name_of(code: Instruction) -> str:
    """The first part of the name."""
    return code.name.split(".")[0]


def multiplications(name: str) -> int:
    """Of a product of matrices: HGMMA.64x32x8 has 64 x 32 x 8, HMMA.16816 16 x 8 x 16."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", name) or re.search(r"\.(8|16)(8)(4|8|16|32)\b", name)
    return int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0


def operation(code: Instruction, clock: Mapping[str, float]) -> Operation:
    """An instruction by the constants of `clock`."""
    name = name_of(code)
    pipe = next((kind for kind, names in KINDS.items() if name in names), "")
    interval: float = INTERVALS.get(pipe, 0)
    if made := multiplications(code.name):
        rate = next(rate for part, rate in PRODUCTS.items() if part in code.name)
        pipe, interval = "tensor", made / rate * (1 if name == "HGMMA" else SCHEDULERS)
    transfer = 0.0
    if name in MOVERS:
        wide = re.search(r"\.(128|64)\b", code.name)
        several = re.search(r"\.MT?\d+\.([24])$", code.name)  # matrices of LDSM and STSM
        numbers = int(wide[1]) // 32 if wide else int(several[1]) if several else 1
        transfer = numbers * 128 / clock["load-store unit, bytes a cycle"]
    return Operation(
        code, pipe, interval, transfer, clock[RESULTS.get(name, OTHER)], clock["operands held"] if transfer else 6
    )


AHEAD = 8
"""Cycles of transfers that the load-store unit queues up before a scheduler has to wait; unmeasured."""


class Warp:
    """A warp: its next operation, the first cycle for that, and when its scoreboards and products are through."""

    def __init__(self) -> None:
        self.place, self.ready, self.group = 0, 0.0, 0.0
        self.boards: list[list[float]] = [[] for _ in range(6)]

    def waits_until(self, code: Instruction) -> float:
        """The first cycle in which the warp may issue `code`."""
        until = self.ready
        for board in range(6):
            if code.waits >> board & 1:
                until = max([until, *self.boards[board]])
        if code.name == "DEPBAR.LE" and (some := re.match(r"SB(\d), 0x([0-9a-f]+)", code.operands)):
            pending = sorted(self.boards[int(some[1])])
            until = max([until, *pending[: max(0, len(pending) - int(some[2], 16))]])
        return max(until, self.group) if code.name.startswith("WARPGROUP.DEPBAR") else until

    def set(self, board: int, now: float, until: float) -> None:
        """Set a scoreboard."""
        if board != sass.NO_SCOREBOARD:
            self.boards[board] = [*(time for time in self.boards[board] if time > now), until]


def simulate(operations: list[Operation], warps: int, clock: Mapping[str, float], alone: bool = False) -> float:
    """Cycles until all warps have made all operations. `alone` they need not share, and barriers are free."""
    all_warps = [Warp() for _ in range(warps)]
    schedulers = [0.0] * SCHEDULERS
    pipes: dict[tuple[int, str], float] = {}
    unit = 0.0
    barrier: list[int] = []
    queue = [(0.0, number) for number in range(warps)]
    while queue:
        now, number = heapq.heappop(queue)
        warp, scheduler = all_warps[number], number % SCHEDULERS
        code, pipe, interval, transfer, latency, held = operations[warp.place]
        until, busy = warp.waits_until(code), pipes.get((scheduler, pipe), 0.0)
        is_group = code.name.startswith("HGMMA")
        if not alone:
            waits = 0.0 if is_group or not pipe else busy  # products of warp groups queue up behind others
            until = max(until, schedulers[scheduler], waits, unit - AHEAD if transfer else 0.0)
        if until > now:  # others may be first
            heapq.heappush(queue, (until, number))
            continue
        schedulers[scheduler] = now + 1
        begin = now
        if is_group:
            begin = max(now, busy) + interval
            warp.group = begin + latency
        if pipe:
            pipes[scheduler, pipe] = max(begin, now + interval)
        if transfer and not alone:
            begin = max(now, unit)
            unit = begin + transfer
        warp.set(code.written, now, begin + latency)
        warp.set(code.read, now, begin + held)
        warp.ready = now + max(1, code.stall)
        if code.name.startswith(("MEMBAR", "FENCE")):
            warp.ready = max(warp.ready, now + clock["fence"])
        warp.place += 1
        ready = [number]
        if sass.is_barrier(code.name) and not alone:
            barrier.append(number)
            ready = barrier if len(barrier) == warps else []
            for other in ready:
                all_warps[other].ready = max(all_warps[other].ready, now + clock["barrier"])
            barrier = [] if ready else barrier
        for other in ready:
            if all_warps[other].place < len(operations):
                heapq.heappush(queue, (all_warps[other].ready, other))
    return max(warp.ready for warp in all_warps)


def best(fitted: Mapping[str, float] | None = None) -> dict[str, float]:
    """The clock at its fastest, but for what was measured."""
    return {name: constant.best for name, constant in CONSTANTS.items()} | dict(fitted or {})


def worst(fitted: Mapping[str, float] | None = None) -> dict[str, float]:
    """And at its slowest."""
    return {name: constant.worst for name, constant in CONSTANTS.items()} | dict(fitted or {})


class Reading(NamedTuple):
    """What is read of a build: its code, and the loop over steps."""

    code: list[Instruction]
    loop: Loop
    warps: int

    def run(self) -> list[Instruction]:
        """The instructions of a step in the order in which they run."""
        return [self.code[place] for places in sass.run_order(self.loop) for place in places]

    def counted(self, what: Any) -> tuple[int, int]:
        """How many instructions of a kind the loop has, and how many run in a step."""
        found = [count for place, count in sass.times(self.loop) if what(self.code[place].name)]
        return len(found), sum(found)

    def floor(self) -> sass.Floor:
        """The hard floor."""
        return sass.floor(self.code, self.loop, self.warps)

    def cycles(self, clock: Mapping[str, float], alone: bool = False) -> float:
        """By the clock, of all warps or of one alone."""
        operations = {one: operation(one, clock) for one in self.code}
        return simulate([operations[one] for one in self.run()], 1 if alone else self.warps, clock, alone)

    def chain(self) -> float:
        """The chain of one warp, at L1's latency."""
        return self.cycles(best(), alone=True)

    def estimate(self, fitted: Mapping[str, float] | None = None) -> tuple[float, float]:
        """At least and at most."""
        return self.cycles(best(fitted)), self.cycles(worst(fitted))


def read(compiled: Any, batch: int | None = None) -> Reading:
    """A compiled training build of a known batch; UnmatchedError if its loops are not understood."""
    ((_, code),) = resources.read_nvidia([compiled])
    loop = sass.step_loop(code, compiled.asm["ttgir"], compiled.asm["ptx"], batch)
    return Reading(code, loop, compiled.metadata.num_warps)


def report(reading: Reading, ghz: float) -> Iterator[str]:
    """The lines of a build."""

    def words(name: str, *cycles: float) -> str:
        us = " to ".join(f"{one / ghz / 1000:.2f}" for one in cycles)
        return f"  {name:<10} {' to '.join(f'{one:,.0f}' for one in cycles)} cycles, {us} us at {ghz} GHz, predicted"

    (length, run), (barriers, passed) = reading.counted(lambda name: True), reading.counted(sass.is_barrier)
    floor = reading.floor()
    yield f"  {length:,} instructions in the loop, of which {run:,} run; {barriers} barriers, passed {passed} times"
    yield words("floor", floor.cycles()) + f" (stall counts {floor.stalls:,}, issue slots {floor.slots:,})"
    yield words("chain", reading.chain())
    yield words("estimate", *reading.estimate())


def barriers(compiled: Any) -> list[str]:
    """Each barrier of the machine code: its address, the innermost device function and line, and the callers'.

    nvdisasm says from which line of PTX an instruction is, and Triton writes there where in the kernels that is from.
    """
    listing = resources.run_on(compiled.asm["cubin"], triton.knobs.nvidia.nvdisasm.path, "-gp", "-c")
    ptx = compiled.asm["ptx"].splitlines()
    named = re.findall(r'^\s*\.file\s+\d+ "(.*)"', compiled.asm["ptx"], re.MULTILINE)
    files = {Path(name).name: name for name in named}
    found, line = [], 0
    for text in listing.splitlines():
        if place := re.search(r'"\.nv_debug_ptx_txt", line (\d+)', text):
            line = int(place[1])
        elif (one := sass.LISTED.search(text)) and sass.is_barrier(one[2]):
            where = next((before for before in reversed(ptx[:line]) if before.lstrip().startswith(".loc")), "")
            calls = re.findall(r"([\w.]+\.py):(\d+):\d+", where)
            names = [f"{function_at(files.get(file, ''), int(at))} ({file}:{at})" for file, at in calls]
            found.append(f"{one[1]}  {' < '.join(names) or 'unknown'}")
    return found


@cache
def function_at(file: str, line: int) -> str:
    """The function around a line of a file."""
    if not Path(file).is_file():
        return "?"
    functions = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.FunctionDef)]
    return next((node.name for node in functions if node.lineno <= line <= (node.end_lineno or 0)), "?")


def work_share(code: list[Instruction]) -> tuple[int, float]:
    """Instructions of the longest loop, or of all code without one, and the share that moves no memory."""
    some = sass.inside(code)
    return len(some), sum(not MEMORY.match(one.name) for one in some) / len(some)


def rank(target: str, substring: str) -> Iterator[str]:
    """A line for each build with `substring` in its label, the largest share first."""
    chosen = [build for build in builds.builds(target) if substring in build.label]
    compiled = [resources.compile_build(build, target) for build in chosen]
    found = [work_share(code) for _, code in resources.read_nvidia(compiled)]
    yield "share of issue slots that move no memory, instructions of the longest loop or of all code; predicted"
    for (length, share), build in sorted(zip(found, chosen, strict=True), key=lambda pair: -pair[0][1]):
        yield f"  {share:6.1%} {length:>6,}  {build.label}"


def main(arguments: list[str] | None = None) -> int:
    """Print the numbers of a build; 1 if its loops are not understood."""
    parser = argparse.ArgumentParser(prog="python -m bench.cycles", description=__doc__.splitlines()[0])
    known = [name for name, target in resources.TARGETS.items() if target.backend == "cuda"]
    parser.add_argument("--target", default="sm_90", choices=known, help="default: %(default)s")
    parser.add_argument("--precision", default="tf32", choices=("tf32", "ieee"), help="default: %(default)s")
    parser.add_argument("--net", default="64-128-10", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--kind", default="default", choices=builds.KINDS, help="what a step computes")
    parser.add_argument("--ghz", type=float, default=GHZ, help="default: %(default)s, an H100 SXM5's highest")
    parser.add_argument("--barriers", action="store_true", help="also where in the kernel each barrier is from")
    parser.add_argument("--kernels", metavar="SUBSTRING", help="rank the builds with this in their label instead")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("kernels cannot be compiled in the interpreter: unset TRITON_INTERPRET")
    if options.kernels:
        if not any(options.kernels in build.label for build in builds.builds(options.target)):
            parser.error(f"no build has {options.kernels!r} in its label")
        print(*rank(options.target, options.kernels), sep="\n")
        return 0
    sizes = tuple(map(int, options.net.split("-")))
    kind = builds.KINDS[options.kind]
    build = builds.training_build(options.target, options.precision, sizes, options.batch, kind)
    compiled = resources.compile_build(build, options.target)
    print(f"{options.target} {build.label}, Triton {triton.__version__}")
    status = 0
    try:
        print(*report(read(compiled, options.batch), options.ghz), sep="\n")
    except sass.UnmatchedError as error:
        print(f"  no prediction: {error}")
        status = 1
    if options.barriers:
        print(*(f"  {line}" for line in barriers(compiled)), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
