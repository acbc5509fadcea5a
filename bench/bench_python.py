"""What Python costs: importing fusednn, and a call with the kernels replaced by nothing, next to PyTorch's call."""

import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusednn import dispatch, functional, make_train_step
from fusednn.kernels import cross_entropy, launch, linear, mlp_training
from fusednn.training.engines import chunks, resident

IMPORT = """
import time, torch
begin = time.perf_counter()
import fusednn
print(time.perf_counter() - begin)
"""


def test_import(benchmark: Any) -> None:
    """At most 50 ms over `import torch`; the median is in extra_info and printed."""
    over = []

    def run() -> None:
        over.append(float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout))

    benchmark.pedantic(run, rounds=7)
    benchmark.extra_info["ms over import torch"] = statistics.median(over) * 1000
    print(f"\nimport fusednn: {statistics.median(over) * 1000:.1f} ms over import torch (budget 50)")


class Nothing:
    """Stands where a kernel stood, and does nothing when it is launched."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """What launches on `grid`."""
        return self.run

    def run(self, *arguments: Any, **options: Any) -> None:
        """Nothing."""


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way that a GPU's take, up to the launch."""
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    operations = importlib.import_module("fusednn.ops.cross_entropy")  # the function hides its name
    for module in (operations, chunks, resident):
        monkeypatch.setattr(module, "check_range", lambda *arguments: None)  # which only CPU tensors are put to
    for module in (linear, cross_entropy, mlp_training):
        for name in dir(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Nothing())


def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What linear_relu replaces."""
    return torch.relu(F.linear(x, w, b))


IMPLEMENTATIONS = pytest.mark.parametrize(
    ("implementation", "call"), [("eager", eager), ("fusednn", functional.linear_relu)], ids=["eager", "fusednn"]
)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.benchmark(group="linear_relu forward under no_grad, Python alone", min_rounds=2000)
@IMPLEMENTATIONS
def test_forward(implementation: str, call: Callable[..., torch.Tensor], benchmark: Any) -> None:
    """8 x 8, so that eager computes next to nothing either."""
    x, w, b = torch.randn(8, 8), torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8))
    with torch.no_grad():
        benchmark(call, x, w, b)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.benchmark(group="linear_relu forward and backward, Python alone", min_rounds=2000)
@IMPLEMENTATIONS
def test_forward_and_backward(implementation: str, call: Callable[..., torch.Tensor], benchmark: Any) -> None:
    """The same with gradients of x, W and b."""
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((8, 8), (8, 8), (8,)))
    dy = torch.randn(8, 8)
    benchmark(lambda: torch.autograd.grad(call(x, w, b), (x, w, b), dy))


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.benchmark(group="cross_entropy forward and backward, Python alone", min_rounds=2000)
@pytest.mark.parametrize(
    ("implementation", "call"),
    [("eager", F.cross_entropy), ("fusednn", functional.cross_entropy)],
    ids=["eager", "fusednn"],
)
def test_cross_entropy(implementation: str, call: Callable[..., torch.Tensor], benchmark: Any) -> None:
    """8 rows of 10 classes, a gradient of one."""
    x, target = torch.randn(8, 10, requires_grad=True), torch.randint(0, 10, (8,))
    one = torch.ones(())
    benchmark(lambda: torch.autograd.grad(call(x, target), x, one))


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., torch.Tensor]:
    """What a step of make_train_step replaces."""
    criterion = nn.CrossEntropyLoss()

    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = criterion(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.benchmark(group="a step of make_train_step, Python alone", min_rounds=2000)
@pytest.mark.parametrize(
    ("implementation", "make"), [("eager", eager_step), ("fusednn", make_train_step)], ids=["eager", "fusednn"]
)
def test_train_step(
    implementation: str, make: Callable[..., Any], benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-8-8 at batch 8, and Adam. On a GPU the optimizer's numbers are sent to it besides."""
    monkeypatch.setattr(launch, "interpret", lambda *arguments: None)
    monkeypatch.setattr(launch, "readable", lambda argument: argument)  # which looks at each tensor of a CPU
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    step = make(model, torch.optim.Adam(model.parameters()))
    x, target = torch.randn(8, 8), torch.randint(0, 8, (8,))
    benchmark(lambda: step(x, target))
