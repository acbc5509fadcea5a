"""linear_relu on a GPU, forward and forward plus backward, beside eager PyTorch, torch.compile and other peers.

Three measures, each a group of its own for every shape and precision:

    CUDA graph         GPU time of a call among several that a graph replays, which leaves out what Python costs
    from Python        time of a call among many, the queue drained once after them; beside it, of one call: the
                       number of kernels, the sum of their times by the profiler, and the peak of memory
    cold first call    the first call of a process that finds nothing compiled on the disk

`cases` has them in the order of what is worth most; `Case.marks` says which `bench.gpu` leaves out without --all. By
itself `python -m pytest bench/bench_linear.py --benchmark-only` runs all, without a limit of time.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fusednn import functional

from .conftest import PRETEND, WARMUPS, Stamp, Told, amounts, capture, cold, compiled, need, occupy, peak, seconds_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # Inductor's, that TF32 is off, is no error here
]

Shape = tuple[int, int, int]

LEADING: list[Shape] = [(32, 128, 64), (32, 10, 128), (256,) * 3, (1024,) * 3, (4096,) * 3]
"""M, N, K: the output is [M, N]. The textbook network's two layers, and squares."""

MORE: list[Shape] = [(128,) * 3, (512,) * 3, (2048,) * 3]
LARGEST: list[Shape] = [(8192,) * 3]

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
"""The dtype of each; "tf32" and "ieee" are float32 products with TF32 allowed and not."""

AUTOTUNE_SECONDS = 60
"""What torch.compile or QuACK may need to try their configurations of one call."""

COLD_SECONDS = 30
"""What a cold process may need."""


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """What linear_relu replaces."""
    return torch.relu(F.linear(x, w, b))


def addmm_activation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """PyTorch's own fused forward. It has no derivative."""
    return torch._addmm_activation(b, x, w.t())


def quack(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """QuACK 0.6's; its fused ReLU has a derivative only together with the layer that follows, so not in training."""
    from quack.linear import linear_act_func, linear_func

    if torch.is_grad_enabled():
        return torch.relu(linear_func(x, w, bias=b))
    y: Tensor = linear_act_func(x, w, "relu", bias=b, store_preact=False)[1]
    return y


MODES = {
    # of torch.compile, in a CUDA graph of ours and from Python, where max-autotune makes CUDA graphs itself
    "torch.compile": (None, None),
    "torch.compile max-autotune": ("max-autotune-no-cudagraphs", "max-autotune"),
}

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "_addmm_activation": addmm_activation,
    "quack": quack,
    "fusednn": functional.linear_relu,
}


class Case(NamedTuple):
    """What one test measures."""

    shape: Shape
    precision: str
    backward: bool
    measure: str
    implementation: str

    def words(self) -> list[str]:
        """The fields as the names of groups and tests have them."""
        direction = "forward+backward" if self.backward else "forward"
        return ["x".join(map(str, self.shape)), self.precision, direction, self.measure, self.implementation]

    def group(self) -> str:
        """All but the implementation."""
        shape, precision, direction, measure, _ = self.words()
        return f"linear_relu {shape} {precision} {direction}, {measure}"

    def exists(self) -> bool:
        """Whether the implementation can do it at all."""
        if self.implementation == "quack":
            _, n, k = self.shape
            return self.precision in ("bf16", "fp16") and n % 8 == k % 8 == 0
        return not (self.implementation == "_addmm_activation" and self.backward)

    def marks(self) -> list[pytest.MarkDecorator]:
        """By which clock it is timed, and whether only who asks for all gets it."""
        timer = {"CUDA graph": Stamp, "cold first call": Told.now}.get(self.measure)
        is_extra = (
            self.measure == "cold first call"
            or self.implementation == "torch.compile max-autotune"
            or self.precision in ("fp16", "ieee")
            or (self.measure == "from Python" and max(self.shape) >= 1024)
        )
        marks = [pytest.mark.benchmark(timer=timer)] if timer else []
        return [*marks, pytest.mark.extra] if is_extra else marks

    def goals(self) -> dict[str, float]:
        """The most of each baseline's time that ours may take: less than theirs below 1024, else eager's within 2 %."""
        if self.measure == "cold first call":
            return {}
        return {"eager": 1.0, "torch.compile": 1.0} if max(self.shape) < 1024 else {"eager": 1.02}


def some(shapes: list[Shape], precisions: str, implementations: list[str]) -> Iterator[Case]:
    """Every combination that exists, one group after the other."""
    measures = ["CUDA graph", "from Python"]
    for parts in product(shapes, precisions.split(), [True, False], measures, implementations):
        case = Case(*parts)
        if case.exists():
            yield case


def cases() -> Iterator[Case]:
    """All, in the order of what is worth most; conftest.py puts what compiles for seconds behind the others."""
    every = ["eager", "_addmm_activation", "fusednn", "torch.compile"]
    yield from some(LEADING + LARGEST + MORE, "bf16 tf32", every)
    for implementation in ("eager", "torch.compile", "fusednn"):
        yield Case(LEADING[0], "ieee", True, "cold first call", implementation)
    yield from some(LEADING + MORE + LARGEST, "fp16 ieee", every)
    yield from some(LEADING + MORE + LARGEST, "bf16 fp16", ["quack"])
    yield from some([LEADING[0], LEADING[2], LEADING[4]], "bf16 tf32", ["torch.compile max-autotune"])


MOST = {"": 8192, "compile": 1024, "sample": 256}[PRETEND]
"""The largest size that is measured; above 1,024 PyTorch multiplies, and nothing of ours is compiled."""


@pytest.fixture(scope="session")
def _profiler_is_warm() -> None:
    """The first profile loads CUPTI, which stays and may slow what follows: so it is there from the first test on."""
    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CUDA]):
            torch.cuda.synchronize()


@lru_cache(maxsize=1)
def by_inductor(mode: str | None, shape: Shape, precision: str, backward: bool) -> Callable[..., Tensor]:
    """`eager`, compiled once for both measures of it, which are neighbours in `cases`."""
    return compiled(eager, mode)


def function_of(case: Case) -> Callable[..., Tensor]:
    """The implementation; skips where it is not installed, or where there is no time to tune it."""
    if case.implementation == "quack":
        if find_spec("quack") is None:
            pytest.skip("quack is not installed")
        need(AUTOTUNE_SECONDS)
    if case.implementation not in MODES:
        return FUNCTIONS[case.implementation]
    mode = MODES[case.implementation][case.measure == "from Python"]
    if mode is not None:
        need(AUTOTUNE_SECONDS)
    return by_inductor(mode, case.shape, case.precision, case.backward)


class Layer:
    """The tensors of a case, and what is called: the implementation, and its gradients where they are measured."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        self.function = function_of(case)
        m, n, k = case.shape
        new = partial(torch.randn, device=device, dtype=PRECISIONS[case.precision])
        self.inputs = [new(*shape).requires_grad_() for shape in ((m, k), (n, k), (n,))]
        self.dy = new(m, n)
        self.backward = case.backward

    def results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """y, and with the backward the gradients of x, W and b."""
        with torch.set_grad_enabled(self.backward):
            y = function(*self.inputs)
            return [y.detach(), *torch.autograd.grad(y, self.inputs, self.dy)] if self.backward else [y]

    def check(self) -> None:
        """Raise AssertionError unless the results are eager's, by norm: rounding may turn a single ReLU over."""
        for ours, theirs in zip(self.results(self.function), self.results(eager), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            assert torch.linalg.vector_norm(ours.float() - theirs) <= 0.05 * torch.linalg.vector_norm(theirs.float())

    def call(self) -> None:
        """Once. Gradients are enabled by the caller, or not, so that switching them is in nobody's time."""
        y = self.function(*self.inputs)
        if self.backward:
            torch.autograd.grad(y, self.inputs, self.dy)

    def calls(self, number: int) -> None:
        """So many, after which the queue is drained."""
        with torch.set_grad_enabled(self.backward):
            for _ in range(number):
                self.call()
        torch.cuda.synchronize()


def in_a_graph(case: Case, benchmark: Any) -> None:
    """GPU time, the queue never empty."""
    layer = Layer(case)
    layer.check()
    calls, rounds = amounts(seconds_of(partial(layer.calls, 1)), 10)
    with torch.set_grad_enabled(case.backward):
        graph = capture(layer.call, calls)
    benchmark.extra_info["calls a round"] = calls
    benchmark.pedantic(graph.replay, setup=occupy, rounds=rounds, warmup_rounds=WARMUPS)


def from_python(case: Case, benchmark: Any) -> None:
    """Time on the clock, and what memory and profiler say of a call."""
    layer = Layer(case)
    layer.check()
    calls, rounds = amounts(seconds_of(partial(layer.calls, 1)), 50)
    benchmark.extra_info |= {"calls a round": calls, "peak bytes over the inputs": peak(partial(layer.calls, 1))}
    benchmark.pedantic(layer.calls, args=(calls,), rounds=rounds, warmup_rounds=WARMUPS)
    benchmark.extra_info |= kernels(layer.calls, min(calls, 10))


def kernels(run: Callable[[int], object], calls: int) -> dict[str, float]:
    """How many kernels a call launches, fills and copies among them, and the sum of their times; nothing if unseen."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(calls)
    times = [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return {"kernels a call": len(times) / calls, "kernel us a call": sum(times) / calls} if times else {}


COLD = """
import sys, time, torch
import torch.nn.functional as F
from fusednn import functional

implementation, device, dtype, m, n, k = *sys.argv[1:4], *map(int, sys.argv[4:])
sizes = ((m, k), (n, k), (n,))
inputs = [torch.randn(*size, device=device, dtype=getattr(torch, dtype), requires_grad=True) for size in sizes]
dy = torch.randn(m, n, device=device, dtype=getattr(torch, dtype))
eager = lambda x, w, b: torch.relu(F.linear(x, w, b))
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
wait()
begin = time.perf_counter()
function = functional.linear_relu if implementation == "fusednn" else eager
function = torch.compile(eager) if implementation == "torch.compile" else function
torch.autograd.grad(function(*inputs), inputs, dy)
wait()
print(time.perf_counter() - begin)
"""
"""A process that has imported everything and has its tensors on the device, and prints what its first call takes."""


def cold_first_call(case: Case, benchmark: Any, folder: Path) -> None:
    """One round: a process more is seconds more."""
    need(COLD_SECONDS)

    def process() -> None:
        dtype = str(PRECISIONS[case.precision]).removeprefix("torch.")
        Told.seconds += cold(COLD, [case.implementation, "cuda", dtype, *map(str, case.shape)], folder)

    benchmark.pedantic(process, rounds=1)


@pytest.mark.usefixtures("_profiler_is_warm")
@pytest.mark.parametrize(
    ("shape", "precision", "backward", "measure", "implementation"),
    [pytest.param(*case, id="-".join(case.words()), marks=case.marks()) for case in cases() if max(case.shape) <= MOST],
    indirect=["precision"],
)
def test_linear_relu(
    shape: Shape, precision: str, backward: bool, measure: str, implementation: str, benchmark: Any, tmp_path: Path
) -> None:
    """One case, after a check that its results are eager's."""
    case = Case(shape, precision, backward, measure, implementation)
    benchmark.group = case.group()
    if implementation == "fusednn":
        benchmark.extra_info["goals"] = case.goals()
    if measure == "CUDA graph":
        in_a_graph(case, benchmark)
    elif measure == "from Python":
        from_python(case, benchmark)
    else:
        cold_first_call(case, benchmark, tmp_path)
