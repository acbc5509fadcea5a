"""Tiles, warps and stages of the training kernel that do not spill, timed on a GPU; prints the rows of a better table.

    python -m bench.sweep [--json FILE]

Every configuration of `GRID` that fits is compiled, by several processes, as train_steps would compile it; what takes
local memory is out. Each of the others trains as `bench_train_steps` does, after its first gradients and losses were
held to eager's, in turns with the row of the table of now. A table's row serves several sizes: the last lines say which
configuration is best at the size that stands for each.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from fusednn.kernels import mlp_training

from . import bench_train_steps, builds, resources, watch
from .bench_train_steps import DIGITS, MNIST, Case, Loop
from .conftest import PRETEND, seconds_left
from .launches import Driver

GRID = ((64, 32), (128, 64, 32), (64, 32), ((8, 1), (8, 2), (16, 1)))
"""The most rows of the batch, hidden units and inputs of a tile; warps and stages. Those of 128 rows spill."""

CASES = [
    # the first is what the goals are of; each stands for a row of the table
    (DIGITS, 32), (MNIST, 128), (DIGITS, 256),
]  # fmt: skip

PRECISIONS = ("tf32", "ieee")

ROUND_SECONDS, ROUNDS = 0.03, 5
"""How long a round of steps takes, and how many there are of each configuration."""

Config = tuple[int, int, int, int, int]


class Setting(NamedTuple):
    """What is trained: sizes, batch and precision, on what architecture."""

    sizes: tuple[int, int, int]
    batch: int
    precision: str
    architecture: str

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, batch {self.batch}, {self.precision}"

    def row(self) -> Config:
        """The table's own configuration, with the tiles that come of it."""
        sizes = mlp_training.Sizes(self.batch, *self.sizes)
        return self.cut(mlp_training.choose(sizes, self.architecture, self.precision))

    def cut(self, config: tuple[int, ...]) -> Config:
        """`config` with tiles no larger than the net and the batch, as the launcher takes it."""
        inputs, hidden, outputs = self.sizes
        widest = max(mlp_training.SMALLEST, mlp_training.MOST_WEIGHTS // mlp_training.block(outputs))
        tiles = zip(config[:3], (self.batch, hidden, inputs), (2**30, widest, 2**30), strict=True)
        b, h, i = (min(most, mlp_training.block(size), limit) for most, size, limit in tiles)
        return b, h, i, config[3], config[4]

    def configs(self) -> list[Config]:
        """The grid, each configuration once, and the table's own first."""
        grid = [self.cut((*tiles, *rest)) for *tiles, rest in product(*GRID)]
        return list(dict.fromkeys([self.row(), *grid]))[: 3 if PRETEND == "sample" else None]


@contextmanager
def table_of(setting: Setting, config: Config) -> Iterator[None]:
    """The table has this configuration alone."""
    key = setting.architecture, setting.precision
    with patch.dict(mlp_training.CONFIGS, {key: ((None, None, config),)}):
        mlp_training.plan_training.cache_clear()
        yield
    mlp_training.plan_training.cache_clear()


def stand_in(architecture: int) -> None:
    """A process that compiles needs no GPU; its kernels are those that Triton looks for on the GPU."""
    Driver(architecture).install()
    watch.compilations()


def compile_one(setting: Setting, config: Config) -> int:
    """Bytes of local memory that a thread takes; compiles, in Triton's cache, what train_steps will look for there."""
    launches: list[Any] = []
    with (
        table_of(setting, config),
        patch.object(mlp_training, "precision_of", lambda x: setting.precision),
        patch.object(mlp_training, "architecture_of", lambda x: setting.architecture),
        patch.object(mlp_training, "launch", lambda *launched: launches.append(launched)),
    ):
        builds.train(setting.sizes, setting.batch, torch.float32, builds.PLAIN)
    kernel, plan, *arguments = launches[0]
    compiled = kernel.warmup(*arguments, grid=plan.grid, **plan.options)
    return resources.usage(compiled.asm["cubin"])["STACK"]


def stacks(settings: list[Setting], architecture: int) -> dict[tuple[Setting, Config], int]:
    """That of every configuration, by as many processes as there are CPUs; what does not compile is left out."""
    tasks = [(setting, config) for setting in settings for config in setting.configs()]
    found = {}
    with resources.workers(min(14, os.cpu_count() or 1), stand_in, architecture) as pool:
        futures = [pool.submit(compile_one, *task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                found[task] = future.result()
            except Exception as error:
                print(f"{task[0]}: {task[1]} does not compile: {type(error).__name__}: {str(error)[:200]}")
    return found


class Timed(NamedTuple):
    """A configuration, and the microseconds of a step of each round."""

    config: Config
    loop: Loop
    steps: int
    rounds: list[float]

    def us(self) -> float:
        """The median."""
        return median(self.rounds)


def ready(setting: Setting, config: Config) -> Timed | None:
    """A loop that trains by `config` and was checked, and how many steps a round has; None if it is wrong."""
    loop = Loop(Case(setting.sizes, setting.batch, 0, setting.precision, "fusednn"))
    try:
        loop.check()
    except Exception as error:  # too much shared memory, or wrong
        print(f"{setting}: {config} fails: {type(error).__name__}: {str(error)[:200]}")
        return None
    return Timed(config, loop, max(3, int(loop.steps_a_round() * ROUND_SECONDS / bench_train_steps.ROUND_SECONDS)), [])


def measure(setting: Setting, configs: list[Config]) -> list[Timed]:
    """All configurations that are right, the fastest first; they take turns."""
    timed = []
    for config in configs:
        with table_of(setting, config):
            if (one := ready(setting, config)) is not None:
                timed.append(one)
    for _ in range(1 if PRETEND else ROUNDS):
        for one in timed:
            with table_of(setting, one.config):
                begin = time.perf_counter()
                one.loop.run(one.steps)
                one.rounds.append((time.perf_counter() - begin) / one.steps * 1e6)
    return sorted(timed, key=Timed.us)


def report(setting: Setting, timed: list[Timed]) -> None:
    """The times, and the row."""
    print(f"\n{setting}: us a step, median and range; (rows, hidden units, inputs of a tile, warps, stages)")
    for one in timed:
        now = "  the table's" if one.config == setting.row() else ""
        print(f"  {one.us():8.2f}  {min(one.rounds):8.2f} to {max(one.rounds):8.2f}  {one.config}{now}")
    best, us = timed[0], {one.config: one.us() for one in timed}
    ratio = f"{best.us() / us[setting.row()]:.3f} of" if setting.row() in us else "where there is no time of"
    words = f"{best.us():.2f} us on {torch.cuda.get_device_name()}, {ratio} the row of now"
    print(f'  ("{setting.architecture}", "{setting.precision}"): {best.config},  # {words}', flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Compile, time, print; 1 where nothing could be timed."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times to FILE")
    options = parser.parse_args(arguments)
    watch.compilations()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    architecture = mlp_training.architecture_of(torch.empty(0, device="cuda"))
    settings = [Setting(*case, precision, architecture) for precision, case in product(PRECISIONS, CASES)]
    major, minor = torch.cuda.get_device_capability()
    stack = stacks(settings, 10 * major + minor)
    results: list[dict[str, Any]] = []
    longest = 5.0  # seconds of a setting
    for setting in settings:
        begin = time.monotonic()
        if (left := seconds_left()) is not None and left < longest:
            print(f"{setting}: not reached: no time left")
            continue
        configs = [config for (whose, config), bytes_ in stack.items() if whose == setting and not bytes_]
        print(f"{setting}: {len(configs)} of {len(setting.configs())} configurations do not spill")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if setting.precision == "tf32" else "highest")
        timed = measure(setting, configs)
        torch.set_float32_matmul_precision(before)
        if timed:
            report(setting, timed)
        results += [{**setting._asdict(), "config": one.config, "us": one.rounds} for one in timed]
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        longest = max(longest, time.monotonic() - begin)
    return int(not results)


if __name__ == "__main__":
    sys.exit(main())
