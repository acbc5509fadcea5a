"""How the benchmarks run: the timer, what is written beside each result, and the budgets printed at the end."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BUDGETS = {
    # group: how much of the baseline's time ours may take
    "linear_relu forward and backward, Python alone": 1.0,
    "training step, 64-128-10, batch 32, cpu": 1.05,
}
"""What the design allows; other groups are printed without a verdict."""


DEADLINE = time.monotonic() + float(os.environ.get("FUSEDNN_BENCH_SECONDS", "inf"))
"""No benchmark starts later, so that a run with little time ends by itself and writes what it has."""


def pytest_runtest_setup() -> None:
    """Skip what there is no time for."""
    if time.monotonic() > DEADLINE:
        pytest.skip("no time left")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Card, driver, versions and commit into every JSON file."""
    import triton

    commit = _said_by(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    machine_info |= {"torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    machine_info["python"] = platform.python_version()
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
        machine_info |= {"card": torch.cuda.get_device_name(), "nvidia-smi": _said_by(query)}


def _said_by(command: list[str]) -> str:
    """What `command` prints, or "unknown" where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Stamp:
    """A point on the GPU's time line; the difference of two is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Stamp") -> float:
        """Seconds of GPU time since `earlier`."""
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by Inductor, for the shapes it meets first; what was compiled before is forgotten."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Ten calls as a CUDA graph: what is timed then is the GPU's work and not Python's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    return graph


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """CPU comparisons are of one thread: a second one adds noise, not work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Each group as a ratio to its baseline, the benchmark whose parameter is "eager"."""
    groups: dict[str, dict[str, float]] = {}
    for benchmark in config._benchmarksession.benchmarks:
        if benchmark.group and benchmark.params and not benchmark.has_error:
            groups.setdefault(benchmark.group, {})[benchmark.params["implementation"]] = benchmark.stats.median
    for group, medians in groups.items():
        if "eager" not in medians:
            continue
        for name, median in medians.items():
            ratio = median / medians["eager"]
            line = f"{group}: {name} {median * 1e6:.2f} us, {ratio:.3f} of eager's {medians['eager'] * 1e6:.2f} us"
            if name == "fusednn" and group in BUDGETS:
                line += f" (budget {BUDGETS[group]}: {'kept' if ratio <= BUDGETS[group] else 'BROKEN'})"
            if name != "eager":
                terminalreporter.write_line(line)
