"""Registers, spills, shared memory and instructions of every kernel, compiled ahead of time; no GPU is needed.

    python -m bench.resources --targets sm_90 --kernels linear_forward --check

`bench.builds` lists, as `builds(arch)`, what the launchers can ask Triton's JIT for. Each of those is compiled for
each target with the specialisations that the JIT would use, and the machine code is read: for NVIDIA with the
cuobjdump and nvdisasm that Triton brings, for AMD from the assembly. With --check, whatever breaks a budget below, or
does not compile, or takes more than its figures (figures.py) is named and the exit status is 1. A product that may
read shared memory before it is written (fences.py) breaks one, and so does a register that is read so (registers.py).
"""

import argparse
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import fences, figures, registers, sass

MODULES = ("bench.builds",)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

TENSOR_CORES = {"sm_80": {"fp64"}, "sm_90": {"fp64"}, "sm_100": set(), "gfx942": {"fp64"}}
"""Dtypes beside fp16, bf16 and tf32 whose products have tensor-core instructions (on sm_100 Triton 3.7 has none)."""

SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""The bytes of shared memory that a program may take; for sm_80 what its smaller relatives, sm_86 and sm_89, have."""

CLIFF = 32
"""Registers that ptxas may fall to, with thousands of spills, where a kernel does not fit its warps (see FACTS)."""


EXTENT = re.compile(r"[A-Z]|stride_\w+|size\w*|partials")
"""Arguments that masks and offsets are made of: only when 16 divides them can an access of 16 bytes be proved safe."""


@dataclass(frozen=True)
class Resources:
    """What one build takes. `spills` counts instructions that move local memory, LDL and STL or AMD's scratch_*."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    wide: int  # global accesses of 16 bytes or more a lane
    narrow: int  # ... and of less
    instructions: int
    warp_group: int  # tensor-core instructions of whole warp groups, wgmma and its successors
    dot_rows: int  # of the largest product, 0 without one
    barriers: int  # at which the warps of a program wait for one another
    races: tuple[str, ...]  # products that may read shared memory too early (fences.py)
    unwritten: tuple[str, ...]  # instructions that read a register which nothing has written (registers.py)


@dataclass(frozen=True)
class Task:
    """The build number `index` of a module on a target: a build itself, with its kernel, cannot be pickled."""

    module: str
    target: str
    index: int
    label: str


def uses_tensor_cores(build: Any, target: str) -> bool:
    """Whether the products of `build` should run on tensor cores."""
    dtype = build.constexprs.get("PRECISION") if build.dtype == "fp32" else build.dtype
    return dtype in {"fp16", "bf16", "tf32"} | TENSOR_CORES[target]


def is_aligned(build: Any) -> bool:
    """Whether 16 divides every pointer and extent of `build`: then some access should take 16 bytes."""
    specialised: set[Any] = set()
    for name, kind in build.signature.items():
        if isinstance(kind, tuple):
            specialised |= {(name, j) for j, element in enumerate(kind) if element != "constexpr"}
        elif kind.startswith("*") or (EXTENT.fullmatch(name) and kind != "constexpr"):
            specialised.add(name)
    return specialised <= set(build.divisible)


BUDGETS: dict[str, Callable[[Any, str, Resources], bool]] = {
    "no local memory": lambda build, target, used: used.spills == 0 or used.stack <= getattr(build, "stack", 0),
    "tensor cores": lambda build, target, used: (
        used.tensor_core > 0 or not used.dot_rows or not uses_tensor_cores(build, target)
    ),
    "wgmma": lambda build, target, used: (
        used.warp_group > 0
        or target != "sm_90"
        or used.dot_rows < 64
        or build.dtype == "fp64"
        or not uses_tensor_cores(build, target)
    ),
    "16-byte accesses": lambda build, target, used: used.wide > 0 or not is_aligned(build),
    "fitting shared memory": lambda build, target, used: used.shared <= SHARED[target],
    "fenced operands": lambda build, target, used: not used.races,
    "written registers": lambda build, target, used: not used.unwritten,
    "above the register cliff": lambda build, target, used: used.registers > CLIFF or used.spills == 0,
}
"""What every build must keep to."""


def compile_build(build: Any, target: str) -> Any:
    """Compile as the JIT would for arguments that `build` describes."""
    names = build.kernel.arg_names

    def path(name: Any) -> tuple[int, ...]:
        return (names.index(name),) if isinstance(name, str) else (names.index(name[0]), name[1])

    return triton.compile(
        ASTSource(
            build.kernel,
            signature={name: build.signature.get(name, "constexpr") for name in names},
            constexprs={path(name): value for name, value in build.constexprs.items()},
            attrs={path(name): [["tt.divisibility", 16]] for name in build.divisible},
        ),
        target=TARGETS[target],
        options=build.options,
    )


def read_nvidia(compiled: list[Any]) -> list[tuple[dict[str, int], list[sass.Instruction]]]:
    """What cuobjdump and nvdisasm say of cubins of one target, read together: nvdisasm takes 0.4 s to begin."""
    number = compiled[0].metadata.target.arch
    architecture = f"SM{number}{'a' if number >= 90 else ''}"
    codes = [machine_code(one.asm["cubin"]) for one in compiled]
    text = run_on(b"".join(codes), triton.knobs.nvidia.nvdisasm.path, "-ndf", "-b", architecture)
    everything = iter(sass.instructions(text, b"".join(codes)))
    read, end = [], 0
    for one, binary in zip(compiled, codes, strict=True):
        end += len(binary)
        code = list(islice(everything, len(binary) // sass.BYTES))
        assert code[-1].address == end - sass.BYTES, "an instruction is not listed"
        used = usage(one.asm["cubin"])
        found = Counter(instruction.name for instruction in code)
        numbers = {
            "registers": used["REG"],
            "stack": used["STACK"],
            "shared": used["SHARED"] + one.metadata.shared,
            "spills": total(found, r"LDL|STL"),
            "tensor_core": total(found, r"([HDIQO]|HG|IG|QG)MMA|UTC\w*MMA"),
            "warp_group": total(found, r"[HIQ]GMMA|UTC\w*MMA"),
            "wide": total(found, r"(LDG|STG|LDGSTS)\..*\b(128|256)\b|UTMALDG|UTMASTG"),
            "narrow": total(found, r"(LDG|STG|LDGSTS)\b(?!.*\b(128|256)\b)"),
            "instructions": found.total(),
            "barriers": sum(map(sass.is_barrier, found.elements())),
        }
        read.append((numbers, code))
    return read


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory of a thread, and bytes of shared memory: REG, STACK, SHARED."""
    text = run_on(cubin, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}


def run_on(content: bytes, *command: str) -> str:
    """What `command` prints of a file with `content`."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


def machine_code(cubin: bytes) -> bytes:
    """The instructions in a cubin, which is a 64-bit ELF file: its sections called .text and more."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    strings = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", strings + name)
    )


def read_amd(compiled: Any) -> dict[str, int]:
    """What the metadata and the instructions of an AMD assembly say."""
    text = compiled.asm["amdgcn"]
    usage = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", text, re.MULTILINE)}
    found = Counter(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
    return {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        "shared": usage["group_segment_fixed_size"] + compiled.metadata.shared,
        "spills": max(total(found, r"scratch_"), usage["vgpr_spill_count"]),
        "tensor_core": total(found, r"v_mfma_"),
        "warp_group": 0,
        "wide": total(found, r"(global|buffer)_(load|store)_(lds_)?dwordx4"),
        "narrow": total(found, r"(global|buffer)_(load|store)_(?!(lds_)?dwordx4)"),
        "instructions": found.total(),
        "barriers": total(found, r"s_barrier"),
    }


def total(found: Counter[str], pattern: str) -> int:
    """How many instructions start as `pattern` says."""
    return sum(count for name, count in found.items() if re.match(pattern, name))


@cache
def builds_of(module: str, target: str) -> tuple[Any, ...]:
    """What `module` lists for `target`, in the same order in every process."""
    return tuple(import_module(module).builds(target))


def measure(tasks: list[Task]) -> list[dict[str, Any]]:
    """Compile and read builds for one target, in a worker. An exception becomes an "error", and the others go on."""
    target, results, compiled = tasks[0].target, [], []
    for task in tasks:
        results.append({"label": task.label, "target": target, "error": None, "broken": []})
        try:
            build = builds_of(task.module, target)[task.index]
            compiled.append((results[-1], build, compile_build(build, target)))
        except Exception as error:
            results[-1]["error"] = f"{type(error).__name__}: {error}"
    if not compiled:
        return results
    binaries = [binary for _, _, binary in compiled]
    is_cuda = TARGETS[target].backend == "cuda"
    numbers = read_nvidia(binaries) if is_cuda else [(read_amd(binary), None) for binary in binaries]
    for (result, build, binary), (read, code) in zip(compiled, numbers, strict=True):
        result |= figures.of_amd(build.label, read) if code is None else figures.of_nvidia(build.label, binary, code)
        rows = re.findall(r"tt\.dot .*-> tensor<(\d+)x", binary.asm["ttir"])
        races = tuple(fences.races(binary.asm["ptx"])) if is_cuda else ()
        unwritten = tuple(registers.unwritten(code)) if code is not None else ()
        used = Resources(**read, dot_rows=max(map(int, rows), default=0), races=races, unwritten=unwritten)
        broken = [name for name, keeps in BUDGETS.items() if not keeps(build, target, used)]
        result |= asdict(used) | {"broken": broken}
    return results


def workers(jobs: int, *initializer: Any) -> ProcessPoolExecutor:
    """Processes that compile; spawned, since Triton's threads do not survive a fork. `initializer`: call, arguments."""
    first, *arguments = initializer or (None,)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=first, initargs=tuple(arguments))


TOGETHER = 16
"""Builds that a worker reads at a time."""


def measure_all(tasks: list[Task], jobs: int) -> Iterator[dict[str, Any]]:
    """The results, in order. A compiler that crashes takes all workers along: each build that is left runs alone."""
    parts = [part for _, some in groupby(tasks, lambda task: task.target) for part in batched(some, TOGETHER)]
    with workers(jobs) as pool:
        futures = [pool.submit(measure, part) for part in parts]
        for part, future in zip(parts, futures, strict=True):
            if future.exception() is None:
                yield from future.result()
                continue
            for task in part:
                with workers(1) as alone:
                    again = alone.submit(measure, [task])
                if (error := again.exception()) is None:
                    yield again.result()[0]
                    continue
                words = "the compiler crashed" if isinstance(error, BrokenProcessPool) else str(error)
                yield {"label": task.label, "target": task.target, "error": words, "broken": []}


def batched(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    """So many at a time (itertools.batched is there from Python 3.12)."""
    left = iter(tasks)
    while part := list(islice(left, size)):
        yield part


def find_tasks(modules: Iterable[str], targets: Iterable[str], substring: str) -> Iterator[Task]:
    """The builds of `modules` for `targets` that have `substring` in their label."""
    for target in targets:
        for module in modules:
            for index, build in enumerate(builds_of(module, target)):
                if substring in build.label:
                    yield Task(module, target, index, build.label)


COLUMNS = {"registers": 4, "stack": 6, "spills": 7, "shared": 7, "tensor_core": 7, "wide": 5, "narrow": 7}
"""The numbers of the table, and their widths."""


def show(result: dict[str, Any]) -> str:
    """One line of the table."""
    line = f"{result['label']:<64} {result['target']:<7}"
    if result["error"]:
        return f"{line} does not compile"
    numbers = "".join(f"{result[name]:>{width}}" for name, width in COLUMNS.items())
    notes = [*("not " + name for name in result["broken"]), *([figures.words(result)] if "figure" in result else [])]
    return f"{line}{numbers}  {', '.join(notes)}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if --check finds a broken budget, what grew or did not compile, or nothing to compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--modules", default=",".join(MODULES), help="default: %(default)s")
    parser.add_argument("--kernels", default="", metavar="SUBSTRING", help="only builds with this in their label")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a build breaks a budget")
    parser.add_argument("--write-figures", action="store_true", help="those of training builds, of all these targets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes; default: %(default)s")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("kernels cannot be compiled in the interpreter: unset TRITON_INTERPRET")
    targets = options.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"unknown targets {sorted(unknown)}; known are {list(TARGETS)}")

    tasks = list(find_tasks(options.modules.split(","), targets, options.kernels))
    print("label, target, " + ", ".join(COLUMNS))
    results = []
    for result in measure_all(tasks, options.jobs):
        results.append(result)
        print(show(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    bad = [result for result in results if result["error"] or result["broken"]]
    print(f"{len(results)} builds, {len(bad)} broken or not compiled")
    for result in bad:
        print(f"  {result['target']} {result['label']}: {result['error'] or ', '.join(result['broken'])}")
        print(*(f"    {what}\n" for what in (*result.get("races", ()), *result.get("unwritten", ()))), sep="", end="")
    if options.write_figures:
        figures.write(results)
    grown, summary = figures.compare(results)
    print(summary, *grown, sep="\n  ")
    return int(options.check and (bool(bad) or bool(grown) or not results))


if __name__ == "__main__":
    sys.exit(main())
