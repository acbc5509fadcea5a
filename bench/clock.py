"""Measures on a GPU what only a GPU can tell the static clock (cycles.py), and how far its estimates are off.

    python -m bench.clock [--json FILE]

Small kernels of one program make one thing many times. Each is timed at two trip counts, so that the difference is of
the loop alone, and read by the static clock; a constant is what brings the clock to the measured time. How long a cycle
is comes from a chain of multiplications, which the compiler's stall counts hold to 4 cycles each. Then training steps
are timed, beside the estimates by the published constants and by the fitted ones.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from fusednn.kernels import mlp_training
from fusednn.training.engines import resident

from . import builds, cycles, resources, sass
from .bench_train_steps import Case, Loop
from .conftest import PRETEND, Stamp, float32_products, seconds_left
from .gpu import MOST_WORKERS
from .sweep import readable_gpu, stand_in

NETS = [(64, 128, 10), (32, 64, 10), (784, 128, 10)]

BATCH = 32

CASES = list(product(NETS, ("tf32", "ieee")))[: 1 if PRETEND == "sample" else None]
"""The training builds that are timed."""

TRIPS = (1, 2) if PRETEND else (2_000, 10_000)
"""A trip takes some 500 cycles."""

ROUNDS = 1 if PRETEND else 5

STEPS = (1, 2) if PRETEND else (500, 2_500)
"""Steps of the two runs of a net."""

REPEATS = tl.constexpr(8)
"""How often a trip makes its thing."""

LONGEST = 5
"""Seconds that a net may take to time."""


@triton.jit(do_not_specialize=["trips"])
def multiplications_kernel(x_ptr, trips, BLOCK: tl.constexpr):
    """A chain of multiplications."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    a = tl.load(x_ptr + BLOCK + offs)
    for _ in tl.range(trips, num_stages=1):
        for _ in tl.static_range(8 * REPEATS):
            x = tl.fma(x, a, a)
    tl.store(x_ptr + offs, x)


@triton.jit(do_not_specialize=["trips"])
def special_functions_kernel(x_ptr, trips, BLOCK: tl.constexpr):
    """A chain of special functions, three each time."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in tl.range(trips, num_stages=1):
        for _ in tl.static_range(REPEATS):
            x = tl.rsqrt(tl.sqrt(tl.exp(x)))
    tl.store(x_ptr + offs, x)


@triton.jit(do_not_specialize=["trips"])
def loads_kernel(x_ptr, trips, BLOCK: tl.constexpr):
    """A chain of loads: each says where the next one is, which is always the same place."""
    offs = tl.arange(0, BLOCK)
    place = offs
    for _ in tl.range(trips, num_stages=1):
        for _ in tl.static_range(REPEATS):
            place = tl.load(x_ptr + place)
    tl.store(x_ptr + offs, place)


@triton.jit(do_not_specialize=["trips"])
def barriers_kernel(x_ptr, trips, BLOCK: tl.constexpr):
    """Barriers, at which all warps arrive together."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in tl.range(trips, num_stages=1):
        for _ in tl.static_range(REPEATS):
            x = tl.fma(x, x, x)
            tl.debug_barrier()
    tl.store(x_ptr + offs, x)


@triton.jit(do_not_specialize=["trips"])
def exchanges_kernel(x_ptr, trips, BLOCK: tl.constexpr):
    """Stores, each loaded by a thread of the next warp and stored again."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in tl.range(trips, num_stages=1):
        for _ in tl.static_range(REPEATS):
            tl.store(x_ptr + offs, x)
            tl.debug_barrier()  # all is there
            x = tl.load(x_ptr + (offs + 32) % BLOCK)
            tl.debug_barrier()  # all was read
    tl.store(x_ptr + offs, x)


@triton.jit(do_not_specialize=["trips"])
def right_products_kernel(x_ptr, trips, BLOCK: tl.constexpr):
    """A chain of products, whose result is brought to the layout of a right operand."""
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(x_ptr + offs).to(tl.float16)
    x = w
    for _ in tl.range(trips, num_stages=1):
        for _ in tl.static_range(REPEATS):
            x = tl.dot(w, x, out_dtype=tl.float32).to(tl.float16)
    tl.store(x_ptr + offs, x)


@triton.jit(do_not_specialize=["trips"])
def left_products_kernel(x_ptr, trips, BLOCK: tl.constexpr):
    """A chain of products, whose result stays in registers as a left operand."""
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(x_ptr + offs).to(tl.float16)
    x = w
    for _ in tl.range(trips, num_stages=1):
        for _ in tl.static_range(REPEATS):
            x = tl.dot(x, w, out_dtype=tl.float32).to(tl.float16)
    tl.store(x_ptr + offs, x)


class Probe(NamedTuple):
    """A kernel, its warps and block, the instruction that a trip repeats, and the constant that goes by it.

    A trip has REPEATS of the instruction, times `each`. `known` is the name under which the constant is kept, where the
    clock takes another for the instruction.
    """

    kernel: Any
    warps: int
    block: int
    instruction: str
    constant: str
    each: int = 1
    known: str = ""


SPEED = Probe(multiplications_kernel, 1, 32, "FFMA", "", each=8)

PROBES = [
    # a constant that another probe needs is fitted before
    Probe(special_functions_kernel, 1, 32, "MUFU", "special function", each=3),
    Probe(loads_kernel, 1, 32, "LDG", "load after store", known="L1 load"),
    Probe(barriers_kernel, 8, 256, "BAR", "barrier"),
    Probe(exchanges_kernel, 8, 256, "LDG", "load after store"),
    Probe(right_products_kernel, 1, 16, "SHFL", "shuffle", each=4),
    Probe(right_products_kernel, 4, 32, "LDSM", "ldmatrix", each=4),
    Probe(left_products_kernel, 4, 64, "HGMMA", "warp group's product", each=4),
]


def seconds_a_trip(run: Callable[[int], Any], few: int, many: int) -> float:
    """What a trip takes, by runs of few and of many: the median of some rounds."""
    run(few)

    def seconds(trips: int) -> float:
        begin = Stamp()
        run(trips)
        return Stamp() - begin

    return max(1e-12, median(seconds(many) - seconds(few) for _ in range(ROUNDS)) / (many - few))


def memory_of(probe: Probe) -> torch.Tensor:
    """Small numbers for a probe; for the chain of loads, places."""
    if probe.kernel is loads_kernel:
        return torch.arange(probe.block, dtype=torch.int32, device="cuda")
    return torch.full((4096,), 0.01, device="cuda")


def loop_of(probe: Probe, compiled: Any) -> tuple[cycles.Reading, int]:
    """The machine code of a probe, and how many trips of the source the compiler made one of its loop."""
    ((_, code),) = resources.read_nvidia([compiled])
    loop = sass.longest(sass.loops(code))
    assert loop is not None
    assert not loop.inside
    reading = cycles.Reading(code, loop, probe.warps)
    found, _ = reading.counted(lambda name: name.startswith(probe.instruction))
    return reading, max(1, round(found / (probe.each * REPEATS.value)))


def probed(probe: Probe) -> tuple[cycles.Reading, float]:
    """The machine code of a probe, and the seconds of a trip of its loop."""
    x, compiled = memory_of(probe), None

    def run(trips: int) -> None:
        nonlocal compiled
        compiled = probe.kernel[(1,)](x, trips, BLOCK=probe.block, num_warps=probe.warps)

    seconds = seconds_a_trip(run, *TRIPS)
    reading, unrolled = loop_of(probe, compiled)
    return reading, seconds * unrolled


def fit(probe: Probe, reading: cycles.Reading, measured: float, fitted: dict[str, float]) -> float:
    """The constant with which the clock says that a trip takes `measured` cycles: a line through two predictions."""
    constant = cycles.CONSTANTS[probe.constant]
    low, high = (
        reading.cycles(cycles.best({**fitted, probe.constant: value})) for value in (constant.best, constant.worst)
    )
    if high == low:
        raise ValueError(f"{probe.kernel.__name__} does not wait for its {probe.instruction}")
    return max(0.0, constant.best + (measured - low) * (constant.worst - constant.best) / (high - low))


def measure_constants() -> tuple[float, dict[str, float]]:
    """The clock in GHz, and the constants that were fitted."""
    if not PRETEND:
        torch.cuda._sleep(200_000_000)  # 0.1 s, to wake it up
    reading, seconds = probed(SPEED)
    ghz = reading.cycles(cycles.best()) / seconds / 1e9
    print(f"clock: {ghz:.3f} GHz by a chain of multiplications, 4 cycles each")
    fitted: dict[str, float] = {}
    for probe in PROBES:
        name = probe.known or probe.constant
        published = cycles.CONSTANTS[name]
        try:
            reading, seconds = probed(probe)
            fitted[name] = fit(probe, reading, seconds * ghz * 1e9, fitted)
        except Exception as error:  # the others are worth as much
            print(f"{name}: not measured: {type(error).__name__}: {error}", flush=True)
            continue
        range_of = f"{published.best} to {published.worst} ({published.source})"
        print(f"{name}: {fitted[name]:.1f} cycles measured; the clock had {range_of}", flush=True)
    return ghz, fitted


def compile_step(sizes: tuple[int, ...], precision: str, architecture: str) -> tuple[cycles.Reading, Any] | None:
    """In a worker: compile as train_steps would, and read it; with the estimate by the published constants.

    Compiled anew, since what `--prepare` left has the machine code alone; that is all there is while it prepares.
    """
    launches: list[Any] = []
    with (
        builds.training_on(architecture, precision),
        patch.object(mlp_training, "launch", lambda *launched: launches.append(launched)),
    ):
        builds.train(builds.DEFAULT.step(sizes), BATCH, torch.float32)
    kernel, plan, *arguments = launches[0]
    triton.knobs.compilation.always_compile = True
    compiled = kernel.warmup(*arguments, grid=plan.grid, **plan.options)
    if PRETEND == "compile":
        return None
    reading = cycles.read(compiled, BATCH)
    return reading, reading.estimate()


def us_a_step(sizes: tuple[int, int, int], precision: str) -> float:
    """Microseconds of a step of train_steps, by one program whatever the size."""
    with float32_products(precision), patch.object(resident, "MOST_BEFORE_GRAPH", 2**62):
        loop = Loop(Case(sizes, BATCH, 0, precision, "fusednn"))
        if not (engine := loop.engine()).startswith("train_steps: resident"):
            raise RuntimeError(engine)
        return seconds_a_trip(loop.run, *STEPS) * 1e6


def error_of(estimate: tuple[float, float], measured: float) -> str:
    """How far a range is from what was measured."""
    low, high = estimate
    nearest = min(max(measured, low), high)
    return f"{nearest / measured - 1:+.0%}"


def compare(
    pool: ProcessPoolExecutor, readings: dict[Any, "Future[Any]"], ghz: float, fitted: dict[str, float]
) -> list[dict[str, Any]]:
    """Time each net, and print it beside the estimates."""
    results: list[dict[str, Any]] = []
    again = {}
    for case, future in readings.items():
        try:
            reading, published = future.result()
            again[case] = published, pool.submit(reading.estimate, fitted)
        except Exception as error:
            print(f"{case}: no prediction: {type(error).__name__}: {error}")
    for (sizes, precision), (published, future) in again.items():
        name = f"{'-'.join(map(str, sizes))}, batch {BATCH}, {precision}"
        if (left := seconds_left()) is not None and left < LONGEST:
            print(f"{name}: not reached: no time left")
            continue
        try:
            us = us_a_step(sizes, precision)
        except Exception as error:
            print(f"{name}: not measured: {type(error).__name__}: {error}", flush=True)
            continue
        ranges = {"published": published, "fitted": future.result()}
        words = []
        for kind, estimate in ranges.items():
            low, high = ranges[kind] = tuple(value / ghz / 1000 for value in estimate)
            words.append(f"predicted {low:.2f} to {high:.2f} us by {kind} constants ({error_of((low, high), us)})")
        print(f"{name}: {us:.2f} us measured; {'; '.join(words)}", flush=True)
        results.append({"sizes": sizes, "batch": BATCH, "precision": precision, "us": us, **ranges})
    return results


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if no training step could be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.clock", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    options = parser.parse_args(arguments)
    if (gpu := readable_gpu(parser)) is None:
        return 0
    architecture, number = gpu
    count = min(MOST_WORKERS, os.cpu_count() or 1, len(CASES))
    with resources.workers(count, stand_in, number) as pool:
        begin = time.monotonic()
        readings = {case: pool.submit(compile_step, *case, architecture) for case in CASES}
        if PRETEND == "compile":
            print(f"{len([future.result() for future in readings.values()])} training steps compiled")
            return 0
        ghz, fitted = measure_constants()
        results = compare(pool, readings, ghz, fitted)
    found = {"card": torch.cuda.get_device_name(), "ghz": ghz, "constants": fitted, "steps": results}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(fitted)} constants and {len(results)} steps in {time.monotonic() - begin:.0f} s")
    return int(not results)


if __name__ == "__main__":
    sys.exit(main())
