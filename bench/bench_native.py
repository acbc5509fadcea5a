"""Training small nets on one thread of a CPU: train_steps beside PyTorch's loops and scikit-learn's.

    a step        of four nets by the native engine, the eager loop with Adam and fused Adam, a whole step under
                  torch.compile (gather, forward, loss, backward and Adam, in one graph), and MLPClassifier
    losses        a step of a probe of 1,000 classes, of a regression, of a binary classifier, and with clipping beside
                  one without, by the native engine and by the eager loops
    growth        of a step with the batch, the width and the depth, beside the eager loop
    crossover     wider nets and larger batches: from where on the loop, on one thread and on two, is quicker

A CPU that others use too wanders by more than what is looked for. So all take turns, some milliseconds each, and
what is compared is the median of the ratios of neighbours. Each is printed, and each goal that is missed is a failure.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from fusednn import explain, reference, train_steps
from fusednn.training.engines import native

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not native.MACHINES, reason="the native engine was not built"),
]

ROWS = 1792


class Case(NamedTuple):
    """A net of Linears with an activation between them, its batch, and how many times as long others take at least."""

    sizes: tuple[int, ...]
    activation: str
    batch: int
    goals: dict[str, float]

    def __str__(self) -> str:
        return f"{name_of(self.sizes)}, {self.activation}, batch {self.batch}"


DIGITS = Case((64, 128, 10), "relu", 32, {"eager": 12.0, "torch.compile": 4.0, "MLPClassifier": 8.0})
CASES = [
    DIGITS,
    Case((784, 512, 512, 10), "relu", 64, {"eager": 1.0, "eager, fused Adam": 1.0}),  # PyTorch's quickstart
    Case((4, 64, 64, 2), "tanh", 64, {"eager": 4.0, "torch.compile": 1.0}),
    Case((32,) * 9, "relu", 32, {"eager": 4.0, "torch.compile": 1.0}),
]

CROSSOVER = "784-512-10, 32"
"""With this net, at this batch, the native engine still is the quicker one."""

TURNS = 15


class Data:
    """The same net and data for each."""

    def __init__(
        self, sizes: tuple[int, ...], batch: int, activation: str = "relu", rows: int = ROWS,
        criterion: type[nn.Module] = nn.CrossEntropyLoss, **options: Any,
    ) -> None:  # fmt: skip
        """`options` are those of train_steps."""
        torch.manual_seed(0)
        self.options = {"criterion": criterion(), **options}
        self.batch, self.sizes, self.activation = batch, sizes, activation
        behind = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
        layers = [layer for shape in pairwise(sizes) for layer in (nn.Linear(*shape), behind())]
        self.model = nn.Sequential(*layers[:-1])
        self.x, self.targets = torch.randn(rows, sizes[0]), torch.randint(sizes[-1], (rows,))
        if criterion is not nn.CrossEntropyLoss:
            self.targets = torch.randint(2, (rows, sizes[-1])).float()

    def adam(self, **options: Any) -> torch.optim.Optimizer:
        """The textbook's."""
        return torch.optim.Adam(self.model.parameters(), lr=0.01, **options)

    def loop(self, train: Callable[..., Any] = reference.train_steps, **options: Any) -> Callable[[int], Any]:
        """A function that makes so many steps by `train`."""
        optimizer = self.adam(**options)
        given = {"batch_size": self.batch, **self.options}
        return lambda steps: train(self.model, optimizer, self.x, self.targets, steps=steps, **given)


def compiled_step(data: Data) -> Callable[[int], Any]:
    """Steps as one graph each: gather, forward, gradients by autograd's formulas and Adam, written out, in place."""
    parameters = [parameter.detach() for parameter in data.model.parameters()]
    firsts, seconds = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    weights, biases = parameters[::2], parameters[1::2]
    is_relu = data.activation == "relu"

    @torch.compile(fullgraph=True)
    def step(rows: Tensor, sizes: Tensor) -> Tensor:
        values, targets = [data.x[rows]], data.targets[rows]
        for w, b in zip(weights, biases, strict=True):
            z = torch.addmm(b, values[-1], w.t())
            values.append(z if len(values) == len(weights) else torch.relu(z) if is_relu else torch.tanh(z))
        log_p = torch.log_softmax(values.pop(), 1)
        dz = (log_p.exp() - nn.functional.one_hot(targets, log_p.shape[1])) / len(targets)
        gradients = []
        for w, a in zip(reversed(weights), reversed(values), strict=True):
            gradients += [dz.sum(0), dz.t() @ a]
            da = dz @ w
            dz = torch.where(a <= 0, 0.0, da) if is_relu else da * (1 - a * a)
        for p, m, v, g in zip(parameters, firsts, seconds, reversed(gradients), strict=True):
            m.add_(0.1 * (g - m))
            v.mul_(0.999).add_(0.001 * g * g)
            p.sub_(sizes[0] * m / (v.sqrt() * sizes[1] + 1e-8))
        return -log_p.gather(1, targets[:, None]).mean()

    done = 0

    def run(steps: int) -> None:
        nonlocal done
        order = torch.randperm(len(data.x)).split(data.batch)
        t = torch.arange(done + 1, done + steps + 1, dtype=torch.float64)
        sizes = torch.stack([0.01 / (1 - 0.9**t), (1 - 0.999**t).rsqrt()], dim=1).float()
        done += steps
        for i in range(steps):
            step(order[i % len(order)], sizes[i])

    return run


def mlp_classifier(data: Data) -> Callable[[int], Any]:
    """scikit-learn's, in whole epochs."""
    epoch = len(data.x) // data.batch
    x, targets = data.x.numpy(), data.targets.numpy().astype(np.int64)
    model = MLPClassifier(
        data.sizes[1:-1], activation=data.activation, batch_size=data.batch, learning_rate_init=0.01, alpha=0.0,
        warm_start=True,
    )  # fmt: skip

    def run(steps: int) -> None:
        model.set_params(max_iter=max(1, steps // epoch), n_iter_no_change=10**6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, targets)

    return run


def in_turns(runs: dict[str, tuple[Callable[[int], Any], int]], turns: int = TURNS) -> dict[str, list[float]]:
    """Microseconds a step of each, a number of each turn; beside each its function is how many steps a turn has."""
    for run, steps in runs.values():
        run(steps)
    us: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (run, steps) in runs.items():
            begin = time.perf_counter()
            run(steps)
            us[name].append((time.perf_counter() - begin) / steps * 1e6)
    return us


def ratio(us: dict[str, list[float]], name: str) -> float:
    """How many times as long as the native engine's a step of `name` takes."""
    return statistics.median(theirs / ours for theirs, ours in zip(us[name], us["native"], strict=True))


def native_loop(data: Data, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """The steps of train_steps, by the native engine at any size."""
    monkeypatch.setattr(native, "most_products", lambda threads, fused: 2**62)
    monkeypatch.setattr(native, "MOST_UNITS", {True: 2**62, False: 2**62})
    run = data.loop(train_steps)
    assert explain(run, 1)[0].implementation == "native"
    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(case.sizes))
def test_step(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """The goals."""

    def data() -> Data:
        return Data(case.sizes, case.batch, case.activation)

    epoch = ROWS // case.batch
    ours = native_loop(data(), monkeypatch)
    products = 3 * case.batch * sum(a * b for a, b in pairwise(case.sizes))
    long = max(1, min(20, 10**9 // (products * epoch)))  # epochs of the native engine a turn
    few = max(1, long // 5)
    runs = {
        "native": (ours, long * epoch),
        "eager": (data().loop(), max(1, long // 10) * epoch),
        "eager, fused Adam": (data().loop(fused=True), max(1, long // 10) * epoch),
        "torch.compile": (compiled_step(data()), few * epoch),
        "MLPClassifier": (mlp_classifier(data()), few * epoch),
    }
    us = in_turns(runs)
    ratios = {name: ratio(us, name) for name in runs}
    print(f"\n{case}, one thread, {native.Native.machine}: us a step (best, median), ratio")
    for name, times in us.items():
        print(f"{name:20}{min(times):8.1f}{statistics.median(times):8.1f}{ratios[name]:8.1f}")
    medians = {name: statistics.median(times) for name, times in us.items()}
    benchmark.extra_info |= {"us a step": medians, "ratios": ratios, "machine": native.Native.machine}
    benchmark.pedantic(ours, args=(long * epoch,), rounds=5)
    missed = [f"{name}: {ratios[name]:.1f} of {goal}" for name, goal in case.goals.items() if ratios[name] < goal]
    assert not missed


LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    "a probe, 384-1000, batch 128": ({"sizes": (384, 1000), "batch": 128}, 1.0),
    "4-64-64-2, tanh, MSE, batch 64": (
        {"sizes": (4, 64, 64, 2), "batch": 64, "activation": "tanh", "criterion": nn.MSELoss}, 4.0
    ),
    "16-64-1, BCE, batch 32": ({"sizes": (16, 64, 1), "batch": 32, "criterion": nn.BCEWithLogitsLoss}, 8.0),
    "64-128-10, batch 32, clipped": ({"sizes": (64, 128, 10), "batch": 32, "max_grad_norm": 1.0}, 8.0),
}  # fmt: skip
"""Arguments of Data, and how many times as long the eager loop takes at least."""


@pytest.mark.parametrize("name", LOSSES)
def test_losses(benchmark: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Beside the eager loop, and what is clipped beside what is not."""
    given, goal = LOSSES[name]
    ours = native_loop(Data(**given), monkeypatch)
    steps = max(20, 2**29 // (3 * given["batch"] * sum(a * b for a, b in pairwise(given["sizes"]))))
    runs = {
        "native": (ours, steps),
        "eager": (Data(**given).loop(), max(5, steps // 10)),
        "eager, fused Adam": (Data(**given).loop(fused=True), max(5, steps // 10)),
    }
    if "max_grad_norm" in given:
        runs["native, not clipped"] = (native_loop(Data(**given | {"max_grad_norm": None}), monkeypatch), steps)
    us = in_turns(runs)
    ratios = {peer: ratio(us, peer) for peer in runs}
    print(f"\n{name}, one thread, {native.Native.machine}: us a step (best, median), ratio")
    for peer, times in us.items():
        print(f"{peer:20}{min(times):8.1f}{statistics.median(times):8.1f}{ratios[peer]:8.2f}")
    benchmark.extra_info |= {"ratios": ratios, "machine": native.Native.machine}
    benchmark.pedantic(ours, args=(steps,), rounds=5)
    assert ratios["eager"] >= goal


def test_growth(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed."""
    shapes = [((64, 128, 10), batch) for batch in (1, 8, 32, 128, 512)]
    shapes += [((64, hidden, 10), 32) for hidden in (32, 64, 256, 512, 1024)]
    shapes += [((784, 10000, 10), 1), ((2, 100000, 2), 1), ((784, 10000, 10), 4), ((2, 100000, 2), 4)]  # wide, few rows
    shapes += [((32,) * depth + (10,), 32) for depth in (1, 2, 4, 8)]

    def measure() -> dict[str, float]:
        print(f"\n{'net':>24}{'batch':>8}{'native us':>12}{'eager us':>12}{'ratio':>8}")
        ratios = {}
        for sizes, batch in shapes:
            ours = native_loop(Data(sizes, batch), monkeypatch)
            weights = sum(a * b for a, b in pairwise(sizes))
            steps = max(4, min(40, 2**29 // weights // 100))
            us = in_turns({"native": (ours, 10 * steps), "eager": (Data(sizes, batch).loop(), steps)}, 7)
            ratios[f"{name_of(sizes)}, {batch}"] = told(sizes, batch, "", us, "eager")
        return ratios

    benchmark.extra_info["ratios"] = benchmark.pedantic(measure, rounds=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_crossover(benchmark: Any, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """The loop with fused Adam, the quickest that a user would write, against the native engine, wider and wider."""
    torch.set_num_threads(threads)
    shapes = [((784, hidden, 10), 32) for hidden in (128, 512, 1024, 2048)]
    shapes += [((784, hidden, 10), batch) for hidden, batch in ((512, 128), (512, 512), (2048, 512))]

    def measure() -> dict[str, float]:
        print(f"\nthe loop on {threads} threads")
        print(f"{'net':>24}{'batch':>8}{'products':>15}{'native us':>12}{'fused us':>12}{'ratio':>8}")
        ratios = {}
        for sizes, batch in shapes:
            ours = native_loop(Data(sizes, batch, rows=2048), monkeypatch)
            products = 3 * batch * sizes[1] * (sizes[0] + sizes[2])
            steps = max(4, 2**31 // products)  # a call of few steps would be measured for what it does once
            loop = Data(sizes, batch, rows=2048).loop(fused=True)
            us = in_turns({"native": (ours, steps), "fused": (loop, steps)}, 9)
            ratios[f"{name_of(sizes)}, {batch}"] = told(sizes, batch, f"{products:15,}", us, "fused")
        return ratios

    ratios = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["ratios"] = ratios
    assert ratios[CROSSOVER] > 1


def name_of(sizes: tuple[int, ...]) -> str:
    """784-512-10."""
    return "-".join(map(str, sizes))


def told(sizes: tuple[int, ...], batch: int, more: str, us: dict[str, list[float]], name: str) -> float:
    """The ratio of `name` to the native engine, printed in a row of a table with the best times of both."""
    found = ratio(us, name)
    print(f"{name_of(sizes):>24}{batch:8}{more}{min(us['native']):12.1f}{min(us[name]):12.1f}{found:8.2f}")
    return found
