"""Training 64-128-10 at batch 32, and MNIST's 784-128-10 at batch 128: train_steps beside PyTorch's loops, on a GPU.

Every loop trains the same net from the same parameters on the same data, shuffled anew each epoch on the device, so
each gathers its batches; before it is timed, its first gradients and losses are held to eager's. Times are from Python,
the queue drained once a round:

    a step             in long training: a round of many steps, which is one call of train_steps
    cold first call    of one step, in a process that finds nothing compiled on the disk
    calls              of 1, 100 and 10,000 steps
    growth             of a step with the batch, and with the width

A round has as many steps as ROUND_SECONDS hold. Without a GPU only test_loop_on_a_cpu runs: the overhead of train_steps
where it is a loop in Python. bench_native.py has the native one.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fusednn import CrossEntropyLoss, SimpleNN, explain, make_train_step, reference, train_steps
from fusednn.training import plan
from fusednn.training.engines import captured

from .conftest import PRETEND, Told, capture, cold, compiled, need

pytestmark = pytest.mark.filterwarnings("default")  # Inductor's, that TF32 is off, is no error here
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SAMPLE = PRETEND == "sample"

DIGITS, MNIST = (64, 128, 10), (144 if SAMPLE else 784, 128, 10)

ROWS = {64: 7 * 256, MNIST[0]: (4 if SAMPLE else 468) * 128}
"""By the number of inputs: about as many as the digits and MNIST have, in whole batches, which a CUDA graph needs."""

if SAMPLE:  # a run is long as soon as a graph is replayed
    captured.LEAST_STEPS = captured.UNCAPTURED + 1

CHECKED = {"tf32": 2e-2, "ieee": 1e-3}
"""How far the first losses may be from eager's, relative to them: Adam's first steps are as large for noise."""

CHECKED_STEPS = 2 if SAMPLE else 10
"""How many losses that is."""

CHECKED_GRADIENT = {"tf32": 0.1, "ieee": 1e-3}
"""How far the first gradient may be from eager's, by norm: a hidden unit near 0 may be on in one and off in the other,
which at batch 32 is 2 % of the gradient of W1. Of smaller batches, five times as far."""

ROUND_SECONDS = 0.1
"""How long a round of a step in long training takes."""

COMPILE_SECONDS = 25
"""What torch.compile may need for a whole step, or a cold process for its first."""


def plain(*sizes: int) -> nn.Module:
    """PyTorch's modules: SimpleNN, and of another depth Linear layers with ReLU between them."""
    if len(sizes) == 3:
        return reference.SimpleNN(*sizes)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Implementation(NamedTuple):
    """A net of given sizes, a loss, options of Adam, and how Python runs the steps.

    `way` is "eager", "compile", "graph", "train_steps" or "make_train_step".
    """

    network: Callable[..., nn.Module] = plain
    criterion: Callable[[], nn.Module] = nn.CrossEntropyLoss
    adam: tuple[str, ...] = ()
    way: str = "eager"


IMPLEMENTATIONS = {
    "eager": Implementation(),
    "fusednn": Implementation(way="train_steps"),
    "CUDA graph": Implementation(adam=("capturable",), way="graph"),
    "fusednn, a batch at a time": Implementation(way="make_train_step"),
    "CUDA graph, fused Adam": Implementation(adam=("capturable", "fused"), way="graph"),
    "eager, fused Adam": Implementation(adam=("fused",)),
    "drop-in modules": Implementation(SimpleNN, CrossEntropyLoss),
    "drop-in modules, CUDA graph": Implementation(SimpleNN, CrossEntropyLoss, ("capturable", "fused"), "graph"),
    "torch.compile": Implementation(way="compile"),
}

GOALS = {"eager": 1 / 50, "CUDA graph": 1 / 8, "CUDA graph, fused Adam": 1 / 8}
"""The most of each one's time that train_steps may take."""

MOST_US = {"tf32": 5, "ieee": 10}
"""Microseconds that a step of 64-128-10 at batch 32 may take."""


class Case(NamedTuple):
    """What is trained, and by whom; `steps` a round, 0 for long training."""

    sizes: tuple[int, ...]
    batch: int
    steps: int
    precision: str
    implementation: str

    def words(self) -> list[str]:
        """The fields as the names of groups and tests have them."""
        steps = f"calls of {self.steps}" if self.steps else "long"
        return ["-".join(map(str, self.sizes)), f"batch {self.batch}", steps, self.precision, self.implementation]

    def group(self) -> str:
        """All but the implementation."""
        net, batch, steps, precision, _ = self.words()
        return f"training step, {net}, {batch}, {precision}{', ' + steps if self.steps else ''}"

    def notes(self) -> dict[str, Any]:
        """What `extra_info` gets: the goals where the design has some."""
        notes: dict[str, Any] = {}
        if self.implementation == "fusednn" and (self.sizes, self.batch, self.steps) in LEADING:
            notes["goals"] = GOALS
            if self.sizes == DIGITS:
                notes["most us"] = MOST_US[self.precision]
        return notes


LEADING = [(DIGITS, 32, 0), (MNIST, 128, 0)]
"""The nets of the goals, their batches, and long training."""


class Loop:
    """A model, its optimizer and its data, the same for all implementations, and the loop that trains it."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        """What has to be captured is captured here, and what has to be compiled is at the first step."""
        self.case, (network, criterion, adam, self.way) = case, IMPLEMENTATIONS[case.implementation]
        torch.manual_seed(0)
        self.start = plain(*case.sizes).to(device).state_dict()
        rows = ROWS.get(case.sizes[0], ROWS[64])
        self.inputs = torch.randn(rows, case.sizes[0], device=device)
        self.targets = torch.randint(case.sizes[-1], (rows,), device=device)
        self.model = network(*case.sizes).to(device)
        self.model.load_state_dict(self.start)
        self.criterion = criterion()
        options: dict[str, Any] = dict.fromkeys(adam, True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01, **options)
        self.generator = torch.Generator(device)
        self.advance = compiled(self.step) if self.way == "compile" else self.step
        self.ours = make_train_step(self.model, self.optimizer, self.criterion)
        if self.way == "make_train_step":
            self.advance = self.step_of_ours
        if self.way == "graph":
            self.rows = torch.arange(case.batch, device=device)
            self.graph = capture(self.captured, 1)
            self.advance = self.replay
        self.restart()

    def restart(self) -> None:
        """Parameters, Adam's state and the order of the batches are as before the first step."""
        self.model.load_state_dict(self.start)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.generator.manual_seed(0)
        self.batches = self.shuffled()

    def shuffled(self) -> Iterator[Tensor]:
        """The rows of each batch, epoch after epoch."""
        while True:
            order = torch.randperm(len(self.inputs), generator=self.generator, device=self.inputs.device)
            yield from order.split(self.case.batch)

    def step(self, rows: Tensor) -> Tensor:
        """One step on so many rows; its loss."""
        loss = self.criterion(self.model(self.inputs[rows]), self.targets[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        result: Tensor = loss.detach()
        return result

    def step_of_ours(self, rows: Tensor) -> Tensor:
        """The same by make_train_step."""
        loss: Tensor = self.ours(self.inputs[rows], self.targets[rows])
        return loss

    def captured(self) -> None:
        """What the graph replays: a step on the rows that lie in its buffer."""
        self.loss = self.step(self.rows)

    def replay(self, rows: Tensor) -> Tensor:
        """A step by the graph. Its next overwrites the loss."""
        self.rows.copy_(rows)
        self.graph.replay()
        return self.loss

    def train(self, steps: int) -> Tensor:
        """One call of train_steps, which begins an epoch; the losses."""
        losses = train_steps(
            self.model, self.optimizer, self.inputs, self.targets, batch_size=self.case.batch, steps=steps,
            generator=self.generator, criterion=self.criterion,
        )  # fmt: skip
        assert isinstance(losses, Tensor)
        return losses

    def losses(self, steps: int) -> Tensor:
        """So many steps, and the loss of each."""
        if self.way == "train_steps":
            return self.train(steps)
        return torch.stack([self.advance(rows).clone() for rows in islice(self.batches, steps)])

    def run(self, steps: int) -> None:
        """So many steps, after which the queue is drained. A loop leaves its losses, in favour of the peers."""
        if self.way == "train_steps":
            self.train(steps)
        else:
            for rows in islice(self.batches, steps):
                self.advance(rows)
        if self.inputs.is_cuda:
            torch.cuda.synchronize()

    def gradients(self) -> list[Tensor]:
        """Those of the first step, by making it: Adam's first moments are a share of them then."""
        self.losses(1)
        gradients = [self.optimizer.state[w]["exp_avg"] / (1 - 0.9) for w in self.model.parameters()]
        self.restart()
        return gradients

    def check(self) -> None:
        """Raise AssertionError unless the first gradients and losses are eager's."""
        eager = Loop(self.case._replace(implementation="eager"), self.inputs.device.type)
        for ours, theirs in zip(self.gradients(), eager.gradients(), strict=True):
            error = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
            most = CHECKED_GRADIENT[self.case.precision] * (1 if self.case.batch >= 32 else 5)
            assert error <= most, f"the first gradient is off by {error:.2e}"
        ours, theirs = self.losses(CHECKED_STEPS), eager.losses(CHECKED_STEPS)
        torch.testing.assert_close(ours, theirs, rtol=CHECKED[self.case.precision], atol=0)

    def steps_a_round(self) -> int:
        """What the case asks for, or what takes ROUND_SECONDS, by a first run of some steps."""
        if PRETEND or self.case.steps:
            few = 2 if SAMPLE else 3
            return min(self.case.steps or few, few) if PRETEND else self.case.steps
        steps = 100
        self.run(steps)
        for _ in range(2):  # of 100 steps a call of train_steps is the larger part
            begin = time.perf_counter()
            self.run(steps)
            steps = max(10, min(100_000, int(steps * ROUND_SECONDS / (time.perf_counter() - begin))))
        return steps

    def engine(self) -> str:
        """Who makes the steps of train_steps in a long run, as `explain` says; makes as many as that takes."""
        return str(explain(partial(self.train, captured.LEAST_STEPS if self.inputs.is_cuda else 1))[-1])


def measure(case: Case, benchmark: Any) -> None:
    """Time of a step, from Python."""
    if case.implementation == "torch.compile":
        need(COMPILE_SECONDS)
    loop = Loop(case)
    loop.check()
    steps = loop.steps_a_round()
    benchmark.group = case.group()
    benchmark.extra_info |= case.notes() | {"steps a round": steps}
    if loop.way == "train_steps":
        benchmark.extra_info["engine"] = engine = loop.engine()
        assert engine.startswith(("train_steps: resident", "train_steps: captured"))
    begin = time.perf_counter()
    loop.run(steps)
    rounds = 1 if PRETEND else max(5, min(100, int(5 * ROUND_SECONDS / (time.perf_counter() - begin))))
    benchmark.pedantic(loop.run, args=(steps,), rounds=rounds)


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """A test of each, with its fields as parameters."""
    ids = ["-".join(case.words()).replace(" ", "_") for case in cases]
    return pytest.mark.parametrize(Case._fields, cases, ids=ids, indirect=["precision"])


def long_cases() -> list[Case]:
    """The implementations at the nets of the goals."""
    parts = product(LEADING, ("tf32", "ieee"), IMPLEMENTATIONS)
    return [Case(*leading, precision, name) for leading, precision, name in parts]


@GPU
@each([case for case in long_cases() if case.implementation != "torch.compile"])
def test_step(
    sizes: tuple[int, ...], batch: int, steps: int, precision: str, implementation: str, benchmark: Any
) -> None:
    """A step in long training."""
    measure(Case(sizes, batch, steps, precision, implementation), benchmark)


def call_cases() -> list[Case]:
    """Calls of few steps and of many. Of eager, which has no calls, a step of many costs the same."""
    some = [(1, "eager"), (1, "fusednn"), (100, "eager"), (100, "fusednn"), (10_000, "fusednn")]
    return [Case(DIGITS, 32, steps, precision, name) for precision in ("tf32", "ieee") for steps, name in some]


@GPU
@each(call_cases())
def test_call(
    sizes: tuple[int, ...], batch: int, steps: int, precision: str, implementation: str, benchmark: Any
) -> None:
    """A step's share of one call: what train_steps does once, in Python, is in it."""
    measure(Case(sizes, batch, steps, precision, implementation), benchmark)


@GPU
@each([case for case in long_cases() if case.implementation == "torch.compile"])
def test_compiled_step(
    sizes: tuple[int, ...], batch: int, steps: int, precision: str, implementation: str, benchmark: Any
) -> None:
    """The same by Inductor, which takes seconds to compile, and so comes later."""
    measure(Case(sizes, batch, steps, precision, implementation), benchmark)


COLD = """
import sys, time, torch
from bench.bench_train_steps import DIGITS, Case, Loop

implementation, precision, device = sys.argv[1:]
torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
loop = Loop(Case(DIGITS, 32, 1, precision, implementation), device)
begin = time.perf_counter()
loop.run(1)
print(time.perf_counter() - begin)
"""
"""A process that has model and data on the device, and prints what its first step takes, imports of Triton included."""


@GPU
@pytest.mark.extra
@pytest.mark.benchmark(timer=Told.now)
@pytest.mark.parametrize(
    ("precision", "implementation"),
    [("tf32", "eager"), ("tf32", "fusednn"), ("tf32", "torch.compile"), ("ieee", "eager"), ("ieee", "fusednn")],
    indirect=["precision"],
)
def test_cold_first_call(precision: str, implementation: str, benchmark: Any, tmp_path: Path) -> None:
    """One round: a process more is seconds more."""
    need(COMPILE_SECONDS)

    def process() -> None:
        Told.seconds += cold(COLD, [implementation, precision, "cuda"], tmp_path)

    benchmark.group = f"training step, 64-128-10, batch 32, {precision}, cold first call"
    benchmark.pedantic(process, rounds=1)


def growth_cases() -> list[Case]:
    """Batches and widths around those of the goals."""
    shapes = [(DIGITS, batch) for batch in (1, 8, 64, 128, 256)] + [((64, hidden, 10), 32) for hidden in (32, 64, 256)]
    parts = [*product(("tf32",), shapes, ("eager", "CUDA graph", "fusednn")), *product(("ieee",), shapes, ("fusednn",))]
    return [Case(sizes, batch, 0, precision, name) for precision, (sizes, batch), name in parts]


@GPU
@each(growth_cases())
def test_growth(
    sizes: tuple[int, ...], batch: int, steps: int, precision: str, implementation: str, benchmark: Any
) -> None:
    """A step in long training, as in `test_step`, which has batch 32 and width 128."""
    measure(Case(sizes, batch, steps, precision, implementation), benchmark)


def test_loop_on_a_cpu(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The looped engine, at most 1.05 of eager's loop, the modules PyTorch's: an epoch, and one call.

    They take turns, since a CPU's clock wanders by more than what is looked for. Time and ratio are printed.
    """
    monkeypatch.setattr(plan, "MACHINES", {})  # as where the native engine was not built
    eager, ours = (Loop(Case(DIGITS, 32, 0, "ieee", name), "cpu") for name in ("eager", "fusednn"))
    ours.check()
    engine, steps = ours.engine(), ROWS[64] // 32
    assert engine.startswith("train_steps: looped")
    seconds: dict[str, list[float]] = {"eager": [], "fusednn": []}

    def turn(loop: Loop, name: str) -> None:
        begin = time.perf_counter()
        loop.run(steps)
        seconds[name].append(time.perf_counter() - begin)

    eager.run(steps)
    eager_first = {"setup": partial(turn, eager, "eager"), "rounds": 100, "warmup_rounds": 5}
    benchmark.pedantic(turn, args=(ours, "fusednn"), **eager_first)
    ratio = statistics.median(b / a for a, b in zip(seconds["eager"], seconds["fusednn"], strict=True))
    us, theirs = (statistics.median(seconds[name]) / steps * 1e6 for name in ("fusednn", "eager"))
    benchmark.extra_info |= {"engine": engine, "steps a round": steps, "of eager, in turns": ratio}
    print(f"\ntrain_steps on a CPU: {us:.0f} us a step, {ratio:.3f} of eager's {theirs:.0f} us (budget 1.05)")
