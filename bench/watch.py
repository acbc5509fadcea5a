"""Writes down, while a run on a GPU goes on, how each test ended and which kernels were compiled.

A pytest plugin (`-p bench.watch`), and `compilations()` for what is no test. Each line is written when it is known, to
the files that the environment names, so that a process that is killed has left all that it knew.
"""

import json
import os
import re
from typing import Any

import pytest

OUTCOMES, COMPILATIONS, AGAIN = "FUSEDNN_OUTCOMES", "FUSEDNN_COMPILATIONS", "FUSEDNN_AGAIN"
"""The variables that name the files; without them nothing is written. The third has the tests to run, if not all."""


def append(variable: str, **line: Any) -> None:
    """A line of JSON, written at once: several processes write to one file."""
    if name := os.environ.get(variable):
        with open(name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def compilations() -> None:
    """Note each kernel of ours that Triton compiles from now on, or finds compiled in its cache.

    Triton's key of a kernel depends on which kernels a process used before: here all are given theirs in one order.
    """
    if COMPILATIONS not in os.environ:
        return
    from triton import knobs

    for kernel in all_kernels():
        kernel.cache_key  # noqa: B018

    def listener(src: Any, metadata: dict[str, Any], cache_hit: bool, **more: Any) -> None:
        if getattr(getattr(src, "fn", None), "__module__", "").startswith("fusednn."):
            test = os.environ.get("PYTEST_CURRENT_TEST")
            append(COMPILATIONS, key=metadata["hash"], kernel=src.name, found=cache_hit, test=test)

    knobs.compilation.listener = listener


def all_kernels() -> list[Any]:
    """Each @triton.jit function of ours, device functions too, always in the same order."""
    from triton.runtime.jit import JITFunction

    from fusednn.kernels import (
        activations,
        cross_entropy,
        cross_entropy_kernels,
        linear,
        losses,
        mlp_training_kernels,
        mlp_training_on_chip,
        mlp_training_products,
        mlp_training_tiles,
        numerics,
        updates,
    )

    modules = (
        numerics,
        updates,
        activations,
        cross_entropy_kernels,
        losses,
        cross_entropy,
        linear,
        mlp_training_tiles,
        mlp_training_products,
        mlp_training_on_chip,
        mlp_training_kernels,
    )
    named = [value for module in modules for _, value in sorted(vars(module).items())]
    return [value for value in named if isinstance(value, JITFunction)]


LOST = re.compile(
    "illegal memory access|misaligned address|unspecified launch failure|illegal instruction|device-side|"
    "hardware stack error|invalid program counter|invalid address space"
)
"""CUDA errors after which nothing more runs in a process."""


class Worker:
    """A process of a pool. Once it has lost the GPU it would fail all tests: it ends, and xdist begins another."""

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """The outcome is written here, since this process will not report it."""
        if call.excinfo is not None and LOST.search(str(call.excinfo.value)):
            append(OUTCOMES, test=item.nodeid, outcome="failed", error=str(call.excinfo.getrepr(style="short")))
            os._exit(1)


class Outcomes:
    """That each test began, and how it ended. Setup and teardown are noted only if they failed or skipped."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test that hangs is known by that."""
        append(OUTCOMES, test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a pool all come through here."""
        if report.when == "call" or not report.passed:
            append(OUTCOMES, test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3))


def pytest_configure(config: pytest.Config) -> None:
    """Each process compiles; the one that reports, which is no worker of a pool, has the outcomes."""
    compilations()
    config.pluginmanager.register(Worker() if hasattr(config, "workerinput") else Outcomes())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests to run again; one that is no more is passed over."""
    if name := os.environ.get(AGAIN):
        with open(name, encoding="utf-8") as file:
            again = {*json.load(file)}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in again])
        items[:] = [item for item in items if item.nodeid in again]
