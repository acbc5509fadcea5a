"""What the tests of training share: small nets, data, and two runs of one loop side by side."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn import reference
from fusednn.training import net as nets
from fusednn.training import plan

INPUTS, HIDDEN, OUTPUTS, ROWS = 20, 24, 10, 50


def net(device: str, sizes: tuple[int, int, int] = (INPUTS, HIDDEN, OUTPUTS), bias: bool = True) -> nn.Sequential:
    """Linear, ReLU, Linear, always with the same weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        inputs, hidden, outputs = sizes
        layers = nn.Linear(inputs, hidden, bias), nn.ReLU(), nn.Linear(hidden, outputs, bias)
        return nn.Sequential(*layers).to(device)


class Quickstart(nn.Module):
    """PyTorch's own first net."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        x = self.flatten(x)
        return self.linear_relu_stack(x)


def data(device: str, rows: int = ROWS, inputs: int = INPUTS, outputs: int = OUTPUTS) -> tuple[Tensor, Tensor]:
    """Random inputs and labels, always the same."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, inputs, generator=generator)
    return x.to(device), torch.randint(0, outputs, (rows,), generator=generator).to(device)


def one_call(device: str) -> str:
    """The engine that makes many steps in one call, of those that the fixture `device` lets serve."""
    return "native" if plan.on_plain_cpu(torch.empty(0, device=device)) else "resident"


def find_net(model: Any, features: tuple[int, ...] | None = None) -> nets.Net | str:
    """The net that a kernel trains of `model` where its parameters lie now, or why there is none."""
    found = nets.read(model, features)[0]
    return found if isinstance(found, str) else nets.memory_refusal(found.parameters) or found


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}  # fmt: skip


def compute(net: nets.Net, x: Tensor) -> Tensor:
    """What a net makes of x, in PyTorch."""
    for w, b, activation in zip(net.places[::2], net.places[1::2], net.activations, strict=True):
        assert w is not None
        x = ACTIVATIONS[activation.name](F.linear(x, w, b), *activation.numbers)
    return x


Make = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The textbook's."""
    return torch.optim.Adam(parameters, lr=0.01)


class Run(NamedTuple):
    """What a run leaves, all of which two engines must agree on."""

    losses: Tensor
    accuracies: Tensor
    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    schedule: Any
    engine: str


def train(
    loop: Callable[..., Any], model: nn.Module, x: Tensor, targets: Tensor, make: Make = adam,
    schedule: Callable[[Any], Any] | None = None, **arguments: Any,
) -> Run:  # fmt: skip
    """Train a copy of `model` by `loop`, reference.train_steps or fusednn.train_steps."""
    model = copy.deepcopy(model)
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    generator = torch.Generator().manual_seed(3)
    found: list[Any] = []

    def call() -> None:
        given = {"generator": generator, "return_accuracy": True, "lr_schedule": scheduler} | arguments
        made = loop(model, optimizer, x, targets, **given)
        found.append(made if given["return_accuracy"] else (made, made.new_empty(0)))

    if loop is reference.train_steps:
        call()
        engine = "reference"
    else:
        engine = fusednn.explain(call)[0].implementation
    return Run(*found[0], model, optimizer, generator, scheduler, engine)


def assert_alike(ours: Run, theirs: Run, **tolerance: float) -> None:
    """Losses, accuracies, parameters, the state of optimizer and schedule, and the generator's, to its bits."""
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ours.losses, theirs.losses, equal_nan=True, **tolerance)
    torch.testing.assert_close(ours.accuracies, theirs.accuracies, equal_nan=True, rtol=0, atol=0)
    ours_state, theirs_state = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), equal_nan=True, **tolerance)
    torch.testing.assert_close(ours_state["state"], theirs_state["state"], equal_nan=True, **tolerance)
    assert list(ours_state["state"]) == list(theirs_state["state"])
    assert str(ours_state["param_groups"]) == str(theirs_state["param_groups"])
    assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())
    if theirs.schedule is not None:
        assert str(ours.schedule.state_dict()) == str(theirs.schedule.state_dict())
