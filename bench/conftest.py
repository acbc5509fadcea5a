"""How the benchmarks run: the timer, what is written beside each result, and the budgets printed at the end."""

import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

BUDGETS = {
    # group: how much of the baseline's time ours may take
    "linear_relu forward and backward, Python alone": 1.0,
    "training step, 64-128-10, batch 32, cpu": 1.05,
}
"""What the design allows. A benchmark may bring its own, as `extra_info["goals"]`: {baseline: the most of its time},
and `extra_info["most us"]`, the most of a call or step; other groups are printed without a verdict."""

COMPILED = {"liger": 1, "quack": 1, "cut-cross-entropy": 1, "torch.compile": 2, "torch.compile max-autotune": 3}
"""Implementations that compile for seconds, and how late they run. Inductor runs last for another reason too: it tells
Triton to use its ptxas in the whole process, and what is ours must be timed with Triton's own."""

PRETEND = os.environ.get("FUSEDNN_PRETEND", "")
"""`sample` or `compile` if tests/pretended_card.py stands in for a GPU, else empty. If so, sizes are small, rounds few,
and times mean nothing; the kernels are those of the real sizes."""

WARMUPS = 0 if PRETEND else 2
"""Rounds before those that count."""

ROUNDS_SECONDS = 0.2
"""About how long the rounds of a benchmark on a GPU take together."""

NOTED = ("kernels a call", "kernel us a call", "peak bytes over the inputs")
"""What of `extra_info` is printed beside the time, where the baseline has it too."""

DEADLINE = float(os.environ.get("FUSEDNN_BENCH_UNTIL", "inf"))
"""By time.time(). No benchmark starts later, so that a run with little time ends by itself and writes what it has."""


def pytest_runtest_setup() -> None:
    """Skip what there is no time for."""
    need(0)


def implementation(item: pytest.Item) -> str:
    """Whose time a benchmark takes; "" where there is one alone."""
    return str(item.callspec.params.get("implementation", "")) if hasattr(item, "callspec") else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Eager and ours at all sizes come before any peer that compiles. Under `--prepare` only ours run."""
    items.sort(key=lambda item: COMPILED.get(implementation(item), 0))
    if PRETEND == "compile":
        ours, theirs = [], []
        for item in items:
            (ours if re.match("fusednn|drop-in|$", implementation(item)) else theirs).append(item)
        config.hook.pytest_deselected(items=theirs)
        items[:] = ours


def amounts(seconds: float, most_calls: int) -> tuple[int, int]:
    """How many calls a round, and how many rounds, of a call of so many seconds: 3 to 30 rounds, ROUNDS_SECONDS."""
    if PRETEND:
        return 1, 1
    calls = max(1, min(most_calls, int(ROUNDS_SECONDS / 10 / seconds)))
    return calls, max(3, min(30, int(ROUNDS_SECONDS / (calls * seconds))))


def need(seconds: float) -> None:
    """Skip the benchmark that calls this where less time is left: one that is cut off takes all results with it."""
    if time.time() + seconds > DEADLINE:
        pytest.skip("no time left")


def seconds_left() -> float | None:
    """What is left until the deadline, as a timeout; None without one."""
    return None if math.isinf(DEADLINE) else max(DEADLINE - time.time(), 0.0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Drop a benchmark that was cut off before its first round: pytest-benchmark would fail, and write none."""
    benchmarks = session.config._benchmarksession.benchmarks
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark.stats]
    yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Card, driver, versions and commit into every JSON file."""
    import triton

    machine_info.pop("node", None)  # the name of the host is nobody's business
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
    """A point on the GPU's time line; the difference of two is in seconds.

    An idle GPU passes the first point at once and then waits for Python to launch: that gap is counted, and is as long
    as a small kernel. With `setup=occupy` it is not: the round is queued behind other work, and begins where that ends.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Stamp") -> float:
        """Seconds of GPU time since `earlier`."""
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def occupy() -> None:
    """About a millisecond of work for the GPU, which Python uses to queue what is timed."""
    torch.cuda._sleep(2_000_000)  # clock cycles


def peak(run: Callable[[], object]) -> int:
    """The most bytes allocated while `run` runs, above those before; what Inductor's CUDA graphs hold is not in it."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - held


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """`function` by Inductor, for the shapes it meets first; what was compiled before is forgotten."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, mode=mode)


def repeat(call: Callable[[], Any], calls: int) -> None:
    """So many calls, as a captured graph has."""
    for _ in range(calls):
        call()


def capture(call: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    """So many calls as a CUDA graph: what is timed then is the GPU's work and not Python's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeat(call, 1 if PRETEND else 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat(call, calls)
    return graph


def seconds_of(call: Callable[[], Any]) -> float:
    """About what a call takes when it is warm."""
    if PRETEND:
        return 1.0
    repeat(call, 3)
    torch.cuda.synchronize()
    begin = Stamp()
    call()
    return Stamp() - begin


class Told:
    """A clock that goes by what the processes have said that they took."""

    seconds = 0.0

    @classmethod
    def now(cls) -> float:
        """All that they said so far."""
        return cls.seconds


def cold(program: str, arguments: list[str], folder: Path) -> float:
    """The seconds that a Python process says it took whose caches of Triton and Inductor, in `folder`, are empty."""
    caches = {name: str(folder / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")}
    options: dict[str, Any] = {"env": os.environ | caches, "timeout": seconds_left()}  # its errors go to the log
    command = [sys.executable, "-c", program, *arguments]
    root = Path(__file__).resolve().parent.parent
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root, **options).stdout
    return float(said.splitlines()[-1])


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """float32 products may use TF32 if `precision` is "tf32".

    By the older of PyTorch's two settings, which sets the newer too: Inductor still reads both, and the newer alone
    makes max-autotune raise.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """The parameter: "tf32" where float32 products may use TF32."""
    with float32_products(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """CPU comparisons are of one thread: a second one adds noise, not work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Each group as time of one call and ratio to its baseline, the benchmark whose parameter is "eager"."""
    groups: dict[str, dict[str, Any]] = {}
    for benchmark in config._benchmarksession.benchmarks:
        if benchmark.group and benchmark.params and not benchmark.has_error:
            groups.setdefault(benchmark.group, {})[benchmark.params["implementation"]] = benchmark
    for group, benchmarks in groups.items():
        for line in summary(group, benchmarks):
            terminalreporter.write_line(line)


def per_call(benchmark: Any) -> float:
    """Median seconds of one call, or one step, of those that a round has."""
    info = benchmark.extra_info
    seconds: float = benchmark.stats.median / info.get("calls a round", info.get("steps a round", 1))
    return seconds


def summary(group: str, benchmarks: dict[str, Any]) -> list[str]:
    """A line for each of a group's `benchmarks`, by implementation, but for the baseline."""
    times = {name: per_call(benchmark) for name, benchmark in benchmarks.items()}
    lines = []
    for name, seconds in times.items():
        line = f"{group}: {name} {seconds * 1e6:.2f} us"
        if (most := benchmarks[name].extra_info.get("most us")) is not None:
            line += f" (budget {most} us: {'kept' if seconds * 1e6 <= most else 'BROKEN'})"
        if "eager" in times:
            line += f", {seconds / times['eager']:.3f} of eager's {times['eager'] * 1e6:.2f} us"
        goals = benchmarks[name].extra_info.get("goals", {})
        if name == "fusednn" and group in BUDGETS:
            goals = {"eager": BUDGETS[group]}
        for baseline, most in goals.items():
            if baseline in times:
                ratio = seconds / times[baseline]
                line += "" if baseline == "eager" else f", {ratio:.3f} of {baseline}'s"
                line += f" (budget {most}: {'kept' if ratio <= most else 'BROKEN'})"
        info, theirs = benchmarks[name].extra_info, benchmarks["eager"].extra_info if "eager" in benchmarks else {}
        for what in NOTED:
            if what in info and what in theirs:
                line += f"; {what}: {info[what]:.6g}, eager's {theirs[what]:.6g}"
        if name != "eager":
            lines.append(line)
    return lines
