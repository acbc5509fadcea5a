"""Writes down, while a run on a GPU goes on, how each test ended and which kernels were compiled.

A pytest plugin (`-p bench.watch`), and `compilations()` for what is no test. Each line is written when it is known, to
the files that the environment names, so that a process that is killed has left all that it knew.
"""

import json
import os
import re
from typing import Any

import pytest

OUTCOMES, COMPILATIONS = "FUSEDNN_OUTCOMES", "FUSEDNN_COMPILATIONS"
"""The variables that name the files; without them nothing is written."""


def append(variable: str, **line: Any) -> None:
    """A line of JSON, written at once: several processes write to one file."""
    if name := os.environ.get(variable):
        with open(name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def compilations() -> None:
    """Note each kernel of ours that Triton compiles from now on, or finds compiled in its cache."""
    if COMPILATIONS not in os.environ:
        return
    from triton import knobs

    def listener(src: Any, metadata: dict[str, Any], cache_hit: bool, **more: Any) -> None:
        if getattr(getattr(src, "fn", None), "__module__", "").startswith("fusednn."):
            test = os.environ.get("PYTEST_CURRENT_TEST")
            append(COMPILATIONS, key=metadata["hash"], kernel=src.name, found=cache_hit, test=test)

    knobs.compilation.listener = listener


LOST = re.compile("illegal memory access|misaligned address|unspecified launch failure|illegal instruction|device-side")
"""CUDA errors after which nothing more runs in a process."""


class Worker:
    """A process of a pool. Once it has lost the GPU it would fail all tests: it ends, and xdist begins another."""

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """The outcome is written here, since this process will not report it."""
        if call.excinfo is not None and LOST.search(error := str(call.excinfo.value)):
            append(OUTCOMES, test=item.nodeid, outcome="failed", error=error)
            os._exit(1)


class Outcomes:
    """How each test ended. Setup and teardown are noted only if they failed or skipped."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a pool all come through here."""
        if report.when == "call" or not report.passed:
            append(OUTCOMES, test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3))


def pytest_configure(config: pytest.Config) -> None:
    """Each process compiles; the one that reports, which is no worker of a pool, has the outcomes."""
    compilations()
    config.pluginmanager.register(Worker() if hasattr(config, "workerinput") else Outcomes())
