"""Whether a product of a warp group, or of Blackwell's tensor cores, can read shared memory before it is written.

Such a product (wgmma, tcgen05.mma) reads its operands through the async proxy, and what threads store goes through the
generic one. So the thread that stored has to make a `fence.proxy.async`, and then all threads have to meet at a
barrier, before the product begins. Triton (3.6 and 3.7) puts the fence right before the product and leaves the barrier
to another pass, which is content with any barrier behind the store, as that of a sum in between. Then the order is
store, barrier, fence, product, and a warp's product may run before another warp's fence: PTX promises nothing there,
though no error of an H100's was traced to it. `races` finds that order, along every path through branches and loops.

What it goes by:
* A store and an operand meet if the store, of any thread, writes into the 16 bytes at which the operand's descriptor
  begins. The product surely reads those, so that right code is not blamed; and Triton stores a tile as a whole, so that
  a store to an operand's tile touches them, or its neighbours do that stand between the same fences and barriers.
* Where an address is not known before the kernel runs, it is taken for that of the operand.
* cp.async too writes through the generic proxy. But once a thread has waited for its copies, they are in shared memory:
  neither Triton 3.6 nor CUTLASS (sm90_mma_multistage_gmma_ss_warpspecialized.hpp) makes a fence there, and what threads
  copied they have only to meet behind the wait for. A copy that was not waited for counts as one for a later product.
* cp.async.bulk, and what else TMA writes, goes through the async proxy and needs no fence.
* Kernels are one function: calls are not followed.
"""

import re
from typing import NamedTuple

from .ptx import WARP, Registers, Statement, UnknownError, statements

PRODUCT = re.compile(r"wgmma\.mma_async|tcgen05\.mma\b")
STORE = re.compile(r"(st|red|atom)\.(?!async).*shared|stmatrix\.")
COPY = re.compile(r"cp\.async\.(ca|cg)\.")
WAIT = re.compile(r"cp\.async\.wait_")
EVENTS = re.compile(
    "|".join(one.pattern for one in (PRODUCT, STORE, WAIT)) + r"|fence\.proxy\.async|bar|br|ret|exit|.*:$"
)
ENDS = re.compile(r"(bra|brx|ret|exit)\b")

NEXT = {("stored", "fence"): "fenced", ("fenced", "barrier"): None, ("waited", "barrier"): None}
"""What becomes of a store or a copy at a fence or a barrier; None is safe to read."""

LACKS = {
    "stored": "no fence behind it",
    "fenced": "no barrier behind its fence",
    "waited": "no barrier behind its wait",
}

UNIT = 16
"""Bytes by which a descriptor counts addresses, in its lowest 14 bits."""


class Write(NamedTuple):
    """A store or a copy, by its place in the code, and what it has met since."""

    place: int
    state: str


def event(one: Statement) -> str | None:
    """Fence or barrier; those of a part of the threads are neither."""
    if one.predicate:
        return None
    if one.name.startswith("fence.proxy.async"):
        return "fence"
    return "barrier" if re.match(r"(bar|barrier)(\.cta)?\.sync", one.name) and one.operands == ("0",) else None


def races(ptx: str) -> list[str]:
    """Each line of the kernels whose product may read too early, with what is stored where; none if all is well."""
    if not PRODUCT.search(ptx):
        return []
    code = [*statements(ptx)]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    memory = Memory(code, int(threads[1]) if threads else 1024)
    found: dict[str, dict[str, None]] = {}
    for place, before in pending(code).items():
        product = f"{'.'.join(code[place].name.split('.')[:2])} at {lines(code[place])}"
        for write in sorted(before):
            if known := memory.meet(place, write.place):
                store = code[write.place]
                words = f"{product} {known} what was written with {LACKS[write.state]}"
                found.setdefault(words, {})[f"{store.name} at {lines(store).split(' < ')[0]}"] = None
    return [f"{words}: {', '.join(stores)}" for words, stores in found.items()]


def pending(code: list[Statement]) -> dict[int, set[Write]]:
    """For each product the writes that may not be safe to read: what reaches it along any path."""
    copies = [place for place, one in enumerate(code) if COPY.match(one.name)]
    events = [place for place, one in enumerate(code) if EVENTS.match(one.name)]
    labels: dict[str, list[int]] = {}
    for number, place in enumerate(events):
        if code[place].name.endswith(":"):
            labels.setdefault(code[place].name, []).append(number)
    reached: dict[int, set[Write]] = {0: set()}
    queue = [0]
    while queue:
        number = queue.pop()
        one, writes = code[events[number]], reached[number]
        if STORE.match(one.name):
            writes = writes | {Write(events[number], "stored")}
        elif WAIT.match(one.name):
            writes = writes | {Write(place, "waited") for place in copies}
        elif met := event(one):
            after = [(write.place, NEXT.get((write.state, met), write.state)) for write in writes]
            writes = {Write(place, state) for place, state in after if state}
        for successor in successors(one, number, labels):
            if successor < len(events) and not (successor in reached and writes <= reached[successor]):
                reached[successor] = reached.get(successor, set()) | writes
                queue.append(successor)
    return {
        events[number]: writes for number, writes in sorted(reached.items()) if PRODUCT.match(code[events[number]].name)
    }


def successors(one: Statement, number: int, labels: dict[str, list[int]]) -> list[int]:
    """Which events may follow the one of a number. Of labels in inline assembly, which several have, the nearest."""
    following = [] if ENDS.match(one.name) and not one.predicate else [number + 1]
    if one.name.startswith("brx"):
        return [number for numbers in labels.values() for number in numbers]
    if one.name.startswith("bra"):
        return [*following, min(labels[one.operands[0] + ":"], key=lambda target: abs(target - number))]
    return following


def lines(one: Statement) -> str:
    """The line of the kernels, and those of the calls that led there."""
    return " < ".join(re.findall(r"[\w.]+\.py:\d+", one.where)) or "an unknown line"


class Memory:
    """Which units of shared memory the writes of a kernel go to, and at which its products' operands begin."""

    def __init__(self, code: list[Statement], threads: int) -> None:
        self.code, self.registers = code, Registers(code, threads)
        self.begins: dict[int, list[set[int] | None]] = {}
        self.covers: dict[int, set[int] | None] = {}

    def meet(self, product: int, write: int) -> str | None:
        """Whether a product "reads" what a write wrote, or "may read" it; None if that goes elsewhere."""
        if product not in self.begins:
            text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", " ".join(self.code[product].operands))
            self.begins[product] = [self.begin(one) for one in re.findall(r"%rd\d+", text)]
        if write not in self.covers:
            self.covers[write] = self.cover(self.code[write])
        written = self.covers[write]
        if any(written and begin and begin & written for begin in self.begins[product]):
            return "reads"
        return "may read" if written is None or None in self.begins[product] else None

    def begin(self, descriptor: str) -> set[int] | None:
        """The units at which the operand of a descriptor begins, for all warps; None if unknown."""
        try:
            states = [*self.registers.states(descriptor)]
            return {value & (1 << 14) - 1 for known in states for value in self.registers.value(descriptor, known)}
        except UnknownError:
            return None

    def cover(self, one: Statement) -> set[int] | None:
        """The units that the threads write for which the predicate holds, or all threads if it is not known."""
        address = next(operand for operand in one.operands if operand.startswith("["))
        for predicate in [one.predicate, ""] if one.predicate else [""]:
            try:
                return self.touched(one, address, predicate)
            except UnknownError:
                continue
        return None

    def touched(self, one: Statement, address: str, predicate: str) -> set[int]:
        """The same with a predicate that is to be known."""
        units = set()
        for known in self.registers.states(address, predicate):
            holds = self.registers.value(predicate.lstrip("!") or "1", known)
            for thread, begin in enumerate(self.registers.value(address, known)):
                if holds[thread] != predicate.startswith("!") and thread % WARP < lanes(one):
                    units |= {*range(begin // UNIT, (begin + size(one) - 1) // UNIT + 1)}
        return units


def size(one: Statement) -> int:
    """How many bytes a lane writes, or has the address of."""
    if one.name.startswith("stmatrix"):
        return 16  # a row of a matrix
    if COPY.match(one.name):
        return int(one.operands[2], 0)
    vector, width = re.search(r"\.v(\d)", one.name), re.search(r"\.[bufs](8|16|32|64|128)\b", one.name)
    return (int(vector[1]) if vector else 1) * (int(width[1]) // 8 if width else 16)


def lanes(one: Statement) -> int:
    """Whose addresses count: of stmatrix those of 8 lanes a matrix."""
    matrices = re.match(r"stmatrix\..*\.x(\d)", one.name)
    return 8 * int(matrices[1]) if matrices else WARP
