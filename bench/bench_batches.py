"""A batch at a time on one thread of a CPU, 64-128-10 at batch 32, beside the plain loop: what a call costs.

    make_train_step   of SimpleNN, of a class of one's own, of a net that no kernel takes; the plain lines beside it
    train_steps       the same with one step a call; with on_chunk at every step; 50 and 2,000 steps in the loop
    inference         by the drop-in modules, and by what `fuse` made

All take turns, and what is compared is the median of the ratios of neighbours, as in bench_native.py. The goals are
printed beside what was found, and missed ones named: they are goals, and no budgets that a change could break.
"""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import make_train_step, reference, train_steps
from fusednn.training.engines import native

from .bench_native import DIGITS, ROWS, in_turns

SIZES, BATCH = DIGITS.sizes, DIGITS.batch

pytestmark = pytest.mark.skipif(not native.MACHINES, reason="the native engine was not built")

SPEEDS = {
    "make_train_step, SimpleNN": ("plain", 4.0),
    "make_train_step, own class": ("plain", 4.0),
    "make_train_step, looped": ("plain, looped", 0.9),
    "train_steps(steps=1), SimpleNN": ("plain", 1.5),
    "train_steps(steps=1), own class": ("plain", 1.5),
    "train_steps(steps=1), looped": ("plain, looped", 0.9),
    "train_steps(steps=50), looped": ("reference, 50", 0.98),
    "train_steps(steps=2000), looped": ("reference, 2000", 0.98),
    "inference, SimpleNN": ("inference, plain", 0.98),
    "inference, fused": ("inference, plain", 0.98),
}
"""Beside whom each is, and how many times as quick it should be."""

MOST_US = {"make_train_step, SimpleNN": 40, "on_chunk at every step": 60}
"""Microseconds that each should take beyond a step of the native engine in a long call."""


class Own(nn.Module):
    """A user's class; `activation` is torch.relu, or what no kernel knows."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        inputs, hidden, outputs = SIZES
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SimpleNN": lambda: fusednn.SimpleNN(*SIZES),
    "own class": lambda: Own(torch.relu),
    "looped": lambda: Own(torch.sin),
    "plain": lambda: reference.SimpleNN(*SIZES),
}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The textbook's."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
    """So many calls."""

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    return run


def plain(model: nn.Module, x: Tensor, targets: Tensor) -> Callable[[], None]:
    """The lines that people write."""
    optimizer, criterion = adam(model), nn.CrossEntropyLoss()

    def step() -> None:
        loss = criterion(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps_of(loop: Any, name: str, x: Tensor, targets: Tensor, **options: Any) -> Callable[[int], Any]:
    """A function that makes so many steps in one call of `loop`."""
    model = MODELS[name]()
    optimizer = adam(model)
    return lambda steps: loop(model, optimizer, x, targets, batch_size=BATCH, steps=steps, **options)


def calls_of(name: str, x: Tensor, targets: Tensor) -> Callable[[int], None]:
    """A function that makes so many calls of train_steps with one step."""
    run = steps_of(train_steps, name, x, targets, shuffle=False)
    return repeated(lambda: run(1))


def maker(name: str, x: Tensor, targets: Tensor) -> Callable[[int], None]:
    """A function that makes so many calls of a step."""
    model = MODELS[name]()
    step = make_train_step(model, adam(model))
    return repeated(lambda: step(x, targets))


def inference(model: nn.Module, x: Tensor) -> Callable[[int], None]:
    """A function that calls `model` so often."""

    def run(calls: int) -> None:
        with torch.no_grad():
            for _ in range(calls):
                model(x)

    return run


def runs() -> dict[str, tuple[Callable[[int], Any], int]]:
    """All of them, and how many steps a turn has."""
    torch.manual_seed(0)
    x, targets = torch.randn(ROWS, SIZES[0]), torch.randint(SIZES[2], (ROWS,))
    batch = x[:BATCH].clone(), targets[:BATCH].clone()
    found: dict[str, tuple[Callable[[int], Any], int]] = {
        "plain": (repeated(plain(MODELS["plain"](), *batch)), 100),
        "plain, looped": (repeated(plain(MODELS["looped"](), *batch)), 100),
    }
    for name in ("SimpleNN", "own class", "looped"):
        found[f"make_train_step, {name}"] = maker(name, *batch), 100
        found[f"train_steps(steps=1), {name}"] = calls_of(name, *batch), 100
    told = steps_of(train_steps, "SimpleNN", x, targets, chunk_steps=1, on_chunk=lambda done, losses: None)
    found |= {"native": (steps_of(train_steps, "SimpleNN", x, targets), 2000), "on_chunk at every step": (told, 200)}
    for steps in (50, 2000):
        found[f"reference, {steps}"] = steps_of(reference.train_steps, "looped", x, targets), steps
        found[f"train_steps(steps={steps}), looped"] = steps_of(train_steps, "looped", x, targets), steps
    for name, model in (
        ("plain", MODELS["plain"]()),
        ("SimpleNN", MODELS["SimpleNN"]()),
        ("fused", fusednn.fuse(MODELS["plain"]())),
    ):
        found[f"inference, {name}"] = inference(model, batch[0]), 1000
    return found


def test_batches(benchmark: Any) -> None:
    """All in one run."""
    us: dict[str, list[float]] = benchmark.pedantic(lambda: in_turns(runs(), 11), rounds=1)
    median = {name: statistics.median(times) for name, times in us.items()}
    print(f"\n64-128-10, batch 32, one thread, {native.Native.machine}: us a step, beside, times as quick, goal")
    found: dict[str, float] = {}
    for name, (beside, goal) in SPEEDS.items():
        found[name] = speed = statistics.median(b / a for a, b in zip(us[name], us[beside], strict=True))
        print(f"{name:34}{median[name]:8.1f}{median[beside]:8.1f}{speed:8.3f}{goal:8.2f}{' missed' * (speed < goal)}")
    for name, most in MOST_US.items():
        found[f"{name}, us beyond native"] = more = median[name] - median["native"]
        missed = " missed" * (more > most)
        print(f"{name:34}{median[name]:8.1f}{median['native']:8.1f} {more:.0f} us more, goal {most}{missed}")
    benchmark.extra_info |= {"found": found, "machine": native.Native.machine}
