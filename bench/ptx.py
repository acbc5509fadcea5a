"""PTX as Triton writes it: its instructions, and what the integer registers of every thread hold.

Only what addresses in shared memory are made of is evaluated: constants, the thread's number and integer arithmetic.
`global_smem` counts as 0. A register that a loop carries, such as the number of a stage, holds several values: all that
it can take are found by going round until no new one comes. An address is made of values of one moment: it is not seen
if a register of a loop changes while an address is made of it.
"""

import operator
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import product
from typing import NamedTuple

TEXT = re.compile(r"(?:(@!?[\w%.]+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
LABEL = re.compile(r"([\w$]+):(?!:)")
REGISTER = re.compile(r"%\w+(?:\.\w+)?")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
WARP = 32

Values = list[int]
"""Of each thread."""


class UnknownError(Exception):
    """A value depends on what is not known before the kernel runs, or on an instruction that is not understood."""


class Statement(NamedTuple):
    """An instruction with its predicate and operands, or a label; `where` is the comment of the last .loc before it."""

    name: str
    operands: tuple[str, ...] = ()
    predicate: str = ""
    where: str = ""


def statements(ptx: str) -> Iterator[Statement]:
    """The instructions and labels of the kernel, in order; a label has a colon at its end."""
    where = ""
    for line in ptx.splitlines():
        text, _, comment = line.strip().partition("//")
        if text.startswith(".section"):
            return
        if text.startswith(".loc"):
            where = comment.strip()
        if text.startswith("."):
            continue
        if label := LABEL.match(text):
            yield Statement(label[1] + ":")
            text = text[label.end() :]
        for found in TEXT.finditer(text):
            yield Statement(found[2], tuple(OPERAND.findall(found[3])), (found[1] or "")[1:], where)


def signed(value: int, bits: int) -> int:
    """The lowest bits as a number in two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def take_bytes(a: int, b: int, selector: int) -> int:
    """What prmt does without a mode: byte i is that of (a, b) which nibble i says, or only its sign."""
    both, result = (a & 0xFFFFFFFF) | b << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return result


def look_up(a: int, b: int, c: int, table: int) -> int:
    """What lop3 does: of each place of the operands' bits the table knows the result."""
    terms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1)
    return sum(terms)  # no two have a bit in common


COMPARE: dict[str, Callable[[int, int], int]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip

ARITHMETIC: dict[str, Callable[..., int]] = {
    "mov": operator.pos, "cvt": operator.pos, "cvta": operator.pos, "neg": operator.neg, "not": operator.invert,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "mad": lambda a, b, c: a * b + c,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "min": min, "max": max,
    "shl": lambda a, b: a << min(b, 64), "shr": lambda a, b: a >> min(b, 64), "selp": lambda a, b, p: a if p else b,
    "bfe": lambda a, b, c: a >> b & (1 << c) - 1, "prmt": take_bytes, "lop3": look_up,
    "bfi": lambda a, b, c, d: b & ~((1 << d) - 1 << c) | (a & (1 << d) - 1) << c,
}  # fmt: skip
"""Of whole numbers: the result is cut to the width of its register afterwards."""

COUNT, PREDICATE, RESULT = 32, 1, 0

OTHER_WIDTHS = {
    # operands that have not the width in the instruction's name, by their places
    "shl": {1: COUNT}, "shr": {1: COUNT}, "bfe": {1: COUNT, 2: COUNT}, "bfi": {2: COUNT, 3: COUNT},
    "selp": {2: PREDICATE}, "mad": {2: RESULT},
}  # fmt: skip

FLOAT = re.compile(r"(f|bf|tf)\d")

UNFOLLOWED = {"hi", "sat", "cc", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}
"""Parts of names of instructions that do something else than `ARITHMETIC` says."""

MOST = 16
"""Values that a register of a loop is followed through."""


class Registers:
    """What registers hold, of each of `threads` threads."""

    def __init__(self, code: list[Statement], threads: int) -> None:
        self.threads = threads
        self.made: dict[str, list[Statement]] = {}
        for one in code:
            if one.operands and not one.operands[0].startswith("["):  # that is where something is stored
                for name in re.findall(r"%\w+", one.operands[0]):
                    self.made.setdefault(name, []).append(one)
        self.carried: dict[str, list[Values]] = {}

    @cached_property
    def constants(self) -> dict[str, Values]:
        """What is known without any instruction."""
        return {"%tid.x": [*range(self.threads)], "global_smem": [0] * self.threads}

    def states(self, *terms: str) -> Iterator[dict[str, Values]]:
        """All values that the registers of loops behind `terms` can have, in every combination."""
        roots = sorted(self.roots(*terms))
        self.go_round({*roots})
        for root in roots:
            if not self.carried[root]:
                raise UnknownError(root)
        for values in product(*(self.carried[root] for root in roots)):
            yield dict(zip(roots, values, strict=True))

    def roots(self, *terms: str) -> set[str]:
        """The registers behind `terms` that are written at several places."""
        found: set[str] = set()
        seen: set[str] = set()
        queue = [*terms]
        while queue:
            for name in set(REGISTER.findall(queue.pop())) - seen:
                seen.add(name)
                made = self.made.get(name, [])
                if len(made) > 1:
                    found.add(name)
                else:
                    queue += [operand for one in made for operand in one.operands[1:]]
        return found

    def go_round(self, roots: set[str]) -> None:
        """Find all values of `roots`, and of those that they are made of, as `carried`; none where they are unknown."""
        family, new = set(), roots - self.carried.keys()
        while new:
            family |= new
            new = {root for name in new for root in self.roots(*self.sources(name))} - family - self.carried.keys()
        values: dict[str, list[Values]] = self.carried | {root: [] for root in family}
        unknown = {root for root in self.carried if not self.carried[root]}
        grown = True
        while grown:
            grown = False
            for root in sorted(family - unknown):
                try:
                    made = [value for one in self.made[root] for value in self.made_by_all(one, values, unknown)]
                except UnknownError:
                    made = []
                    unknown.add(root)
                fresh = [value for place, value in enumerate(made) if value not in values[root] + made[:place]]
                values[root] += fresh
                grown |= bool(fresh) or root in unknown
                if len(values[root]) > MOST:
                    unknown.add(root)
        self.carried = {root: [] if root in unknown else found for root, found in values.items()}

    def sources(self, register: str) -> list[str]:
        """The operands of all instructions that write it."""
        return [operand for one in self.made[register] for operand in one.operands[1:]]

    def made_by_all(self, one: Statement, values: dict[str, list[Values]], unknown: set[str]) -> Iterator[Values]:
        """The results of an instruction for all `values` of the registers of loops behind it."""
        roots = sorted(self.roots(*one.operands[1:]))
        if unknown & {*roots}:
            raise UnknownError(one.name)
        for each in product(*(values[root] for root in roots)):
            yield self.made_by(one, dict(zip(roots, each, strict=True)))

    def value(self, term: str, known: dict[str, Values]) -> Values:
        """Of a number, a register or a sum of some; `known` has those of loops and keeps all others."""
        parts = re.split(r"\s*\+\s*", term.strip("[] "))
        if len(parts) > 1:
            return [sum(each) for each in zip(*(self.value(part, known) for part in parts), strict=True)]
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", term := parts[0]):
            return [int(term, 0)] * self.threads
        if term in self.constants:
            return self.constants[term]
        if term not in known:
            made = self.made.get(term, [])
            if len(made) != 1 or made[0].operands[0].split("|")[0] != term:
                raise UnknownError(term)
            known[term] = self.made_by(made[0], known)
        return known[term]

    def made_by(self, one: Statement, known: dict[str, Values]) -> Values:
        """The result of an instruction."""
        name, *kinds = one.name.split(".")
        types = [(kind[0], int(kind[1:])) for kind in kinds if re.fullmatch(r"[sub](8|16|32|64)", kind)]
        types += [("b", 1)] * kinds.count("pred")
        if name == "setp":
            function = COMPARE.get(kinds[0]) if len(kinds) == 2 else None
        else:
            function = None if UNFOLLOWED & {*kinds} else ARITHMETIC.get(name)
        lanes = name == "shfl" and "idx" in kinds
        if one.predicate or not types or any(map(FLOAT.match, kinds)) or not (function or lanes):
            raise UnknownError(f"{one.name} {', '.join(one.operands)}")
        kind, width = types[-1]
        made_width = 1 if name == "setp" else 2 * width if "wide" in kinds else types[0][1]
        terms = [self.value(term, known) for term in one.operands[1:]]
        widths = [width] * len(terms)
        for place, bits in OTHER_WIDTHS.get(name, {}).items():
            widths[place] = bits or made_width
        cut = [
            [signed(value, bits) if kind == "s" else value & (1 << bits) - 1 for value in values]
            for values, bits in zip(terms, widths, strict=True)
        ]
        if function:
            made = [function(*each) for each in zip(*cut, strict=True)]
        else:
            made = [cut[0][thread // WARP * WARP + lane % WARP] for thread, lane in enumerate(cut[1])]
        if name == "bfe" and kind == "s":
            made = [signed(value, count) if count else 0 for value, count in zip(made, cut[2], strict=True)]
        return [value & (1 << made_width) - 1 for value in made]
