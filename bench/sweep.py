"""Times the training kernel's ways, tiles, warps and stages on a GPU, and prints the row that its table should have.

    python -m bench.sweep [--json FILE]

For each case several processes compile every configuration of `STREAMED` and `ON_CHIP` that fits, as train_steps would.
What spills is left out, on chip what spills much. The rest train as in bench_train_steps.py, in turns with the current
row of the table; before that their first gradients and losses are compared with eager's. The fastest is printed as a
row, with the time that chose it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from fusednn.kernels import mlp_training
from fusednn.kernels.mlp_training import Config
from fusednn.kernels.step import Step
from fusednn.training.engines import resident

from . import bench_train_steps, builds, resources, watch
from .bench_train_steps import DIGITS, MNIST, Case, Loop
from .conftest import PRETEND, float32_products, seconds_left
from .gpu import MOST_WORKERS
from .launches import Driver
from .resources import workers

STREAMED = (("streamed",), (64, 32), (128, 64, 32), (64, 32), ((8, 1), (8, 2)))
"""The way; the most rows of the batch, hidden units and inputs of a tile; warps and stages. Those of 128 rows spill.
On an H100 those of 16 warps took 1.4 times as long as the best, and more (bench/results)."""

ON_CHIP = (("columns", "rows", "held", "held rows"), (128,), (128,), (64, 32), ((8, 1),))
"""On chip the batch is one tile, and so are the hidden units: with more than 128 of either it does not fit. In exact
float32 each way is tried with split products too."""

MOST_STACK = 1200
"""Bytes of local memory that a thread may take on chip, if the current row of the table takes no more. The quickest
exact step of 64-128-10 on an H100 takes some 570 (bench/results)."""

DEEP, WIDE = (4, 64, 64, 2), (784, 64, 64, 2)

CASES = {
    # the first two are the nets of the goals; on an H100 each row of the table has a case, but those of deeper nets
    "tf32": [(DIGITS, 32), (MNIST, 128), (DEEP, 32), (WIDE, 32), (DIGITS, 256), ((64, 256, 10), 32), (MNIST, 256)],
    "ieee": [(DIGITS, 32), (MNIST, 128), (DEEP, 32), (WIDE, 32), (MNIST, 32), ((784, 32, 32, 2), 32)],
}

ROUND_SECONDS, ROUNDS = 0.03, 5
"""How long a round of steps takes, and how many there are of each configuration."""


class Setting(NamedTuple):
    """What is trained: sizes, batch and precision, on what architecture."""

    sizes: tuple[int, ...]
    batch: int
    precision: str
    architecture: str

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, batch {self.batch}, {self.precision}"

    def row(self) -> tuple[Any, ...]:
        """The row of the table that serves: the most layers, rows of a batch and inputs, and the configuration."""
        config = mlp_training.choose(self.step(), self.batch, self.architecture, self.precision)
        return next(row for row in mlp_training.CONFIGS[self.architecture, self.precision] if row[-1] is config)

    def current(self) -> Config:
        """The configuration of that row, with the tiles that come of it."""
        return self.cut(self.row()[-1])

    def cut(self, config: Config) -> Config:
        """`config` with tiles no larger than the net and the batch, as the launcher takes it."""
        tiles = mlp_training.tiles(config, self.step(), self.batch, self.precision)
        return config[0], tiles.batch, tiles.hidden, tiles.inputs, *config[-2:]

    def step(self) -> Step:
        """With PyTorch's default options."""
        return builds.DEFAULT.step(self.sizes)

    def configs(self) -> list[Config]:
        """What fits of the grids, each configuration once, and the current one first."""
        grid = [(*most, *rest) for *most, rest in (*product(*ON_CHIP), *product(*STREAMED))]
        if self.precision == "ieee":
            grid = [(f"{way} split", *rest) for way, *rest in grid if way != "streamed"] + grid
        fitting = [self.cut(config) for config in grid if self.holds(config)]
        tried = dict.fromkeys([self.current(), *fitting])
        if PRETEND == "sample":  # the current one, and in TF32 the first of another way
            others = [config for config in tried if config[0] != self.current()[0] and self.precision == "tf32"]
            return [self.current(), *others[:1]]
        return [*tried]

    def holds(self, config: Config) -> bool:
        """Whether `config` can serve."""
        return config[0] == "streamed" or mlp_training.fits_on_chip(config, self.step(), self.batch)


@contextmanager
def table_of(setting: Setting, config: Config) -> Iterator[None]:
    """The table has this configuration alone, and no CUDA graph is made instead."""
    key = setting.architecture, setting.precision
    with (
        patch.dict(mlp_training.CONFIGS, {key: ((None, None, None, config),)}),
        patch.object(resident, "MOST_BEFORE_GRAPH", 2**62),
    ):
        mlp_training.plan_training.cache_clear()
        try:
            yield
        finally:
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
        builds.train(setting.step(), setting.batch, torch.float32)
    kernel, plan, *arguments = launches[0]
    compiled = kernel.warmup(*arguments, grid=plan.grid, **plan.options)
    return resources.usage(compiled.asm["cubin"])["STACK"]


def stacks(pool: ProcessPoolExecutor, setting: Setting) -> dict[Config, int]:
    """Bytes of local memory of every configuration; what does not compile is left out."""
    configs, found = setting.configs(), {}
    for config, future in [(config, pool.submit(compile_one, setting, config)) for config in configs]:
        try:
            found[config] = future.result()
        except Exception as error:
            print(f"{setting}: {config} does not compile: {type(error).__name__}: {str(error)[:200]}")
    return found


def worth_timing(found: dict[Config, int], current: Config) -> list[Config]:
    """The current configuration, and those of a table of `stacks` that spill nothing, or on chip little."""
    on_chip = max(MOST_STACK, found.get(current, 0))
    return [
        config
        for config, stack in found.items()
        if config == current or stack <= (0 if config[0] == "streamed" else on_chip)
    ]


class Timed(NamedTuple):
    """A configuration, and the microseconds of a step of each round."""

    config: Config
    loop: Loop
    steps: int
    rounds: list[float]

    def us(self) -> float:
        """The median."""
        return median(self.rounds)


def ready(setting: Setting, config: Config, wrong: list[str]) -> Timed | None:
    """A loop that trains by `config`, checked, and how many steps a round has; None if the GPU does not take it.

    If it trains wrongly, or not by the training kernel, that goes to `wrong`.
    """
    loop = Loop(Case(setting.sizes, setting.batch, 0, setting.precision, "fusednn"))
    try:
        assert loop.engine().startswith("train_steps: resident")
        loop.restart()
        loop.check()
    except AssertionError as error:
        wrong.append(f"{setting}: {config} trains WRONGLY: {error}")
        print(wrong[-1])
        return None
    except Exception as error:  # such as too much shared memory
        print(f"{setting}: {config} does not run: {type(error).__name__}: {str(error)[:200]}")
        return None
    return Timed(config, loop, max(3, int(loop.steps_a_round() * ROUND_SECONDS / bench_train_steps.ROUND_SECONDS)), [])


def measure(setting: Setting, configs: list[Config], wrong: list[str]) -> list[Timed]:
    """All configurations that are right, the fastest first; they take turns."""
    timed = []
    for config in configs:
        with table_of(setting, config):
            if (one := ready(setting, config, wrong)) is not None:
                timed.append(one)
    for _ in range(1 if PRETEND else ROUNDS):
        for one in timed:
            with table_of(setting, one.config):
                begin = time.perf_counter()
                one.loop.run(one.steps)
                one.rounds.append((time.perf_counter() - begin) / one.steps * 1e6)
    return sorted(timed, key=Timed.us)


def report(setting: Setting, timed: list[Timed]) -> None:
    """Print the times, and the row."""
    print(f"\n{setting}: us a step, median and range; (way, rows, hidden units, inputs of a tile, warps, stages)")
    for one in timed:
        current = "  current" if one.config == setting.current() else ""
        print(f"  {one.us():8.2f}  {min(one.rounds):8.2f} to {max(one.rounds):8.2f}  {one.config}{current}")
    best, us = timed[0], {one.config: one.us() for one in timed}
    ratio = f", {best.us() / us[setting.current()]:.3f} of the current row" if setting.current() in us else ""
    words = f"{setting}: {best.us():.2f} us on {torch.cuda.get_device_name()}{ratio}"
    *most, current = setting.row()
    if best.config[0] == "streamed" != current[0]:  # on chip a row holds what fits, and this one all that it names
        most = [setting.step().layers, setting.batch, setting.sizes[0]]
    row = *most, best.config
    print(f'  ("{setting.architecture}", "{setting.precision}"): {row},  # {words}', flush=True)


def readable_gpu(parser: argparse.ArgumentParser) -> tuple[str, int] | None:
    """The architecture of the GPU, by its name in the tables and by its number, for a module that reads compiled code.

    From here on what is compiled is noted. None, once that is printed, if the GPU is not NVIDIA's.
    """
    watch.compilations()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    architecture = mlp_training.architecture_of(torch.empty(0, device="cuda"))
    if architecture == "other":
        print("left out: compiled kernels are read for NVIDIA's GPUs alone")
        return None
    major, minor = torch.cuda.get_device_capability()
    return architecture, 10 * major + minor


def main(arguments: list[str] | None = None) -> int:
    """Compile, time, print; 1 if nothing could be timed, or if a configuration trains wrongly."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times to FILE")
    options = parser.parse_args(arguments)
    if (gpu := readable_gpu(parser)) is None:
        return 0
    architecture, number = gpu
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    longest = 5.0  # seconds of a setting
    with workers(min(MOST_WORKERS, os.cpu_count() or 1), stand_in, number) as pool:
        for precision, case in [(precision, case) for precision, cases in CASES.items() for case in cases]:
            begin, setting = time.monotonic(), Setting(*case, precision, architecture)
            if (left := seconds_left()) is not None and left < longest:
                print(f"{setting}: not reached: no time left")
                continue
            found = stacks(pool, setting)
            configs = worth_timing(found, setting.current())
            print(f"{setting}: {len(configs)} of {len(found)} configurations do not spill, or little on chip")
            with float32_products(precision):
                timed = measure(setting, configs[:1] if PRETEND == "compile" else configs, wrong)
            if timed:
                report(setting, timed)
            results += [{**setting._asdict(), "config": one.config, "us": one.rounds} for one in timed]
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
            longest = max(longest, time.monotonic() - begin)
    print(*wrong, sep="\n")
    return int(not results or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
