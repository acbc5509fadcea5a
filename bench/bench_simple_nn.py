"""One training step of SimpleNN(64, 128, 10), forward, loss, backward and Adam, from Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fusednn import CrossEntropyLoss, SimpleNN, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(model: nn.Module, criterion: nn.Module, **adam: Any) -> Callable[[], None]:
    """A function that makes one step on one batch of 32. Its gradients are compared with those in float64 first."""
    model, optimizer = model.to(DEVICE), torch.optim.Adam(model.parameters(), lr=0.01, **adam)
    inputs, targets = torch.randn(32, 64, device=DEVICE), torch.randint(0, 10, (32,), device=DEVICE)
    exact = reference.SimpleNN(64, 128, 10).double().to(DEVICE)
    exact.load_state_dict(model.state_dict())
    losses = criterion(model(inputs), targets), nn.CrossEntropyLoss()(exact(inputs.double()), targets)
    ours, right = (
        torch.autograd.grad(loss, [*net.parameters()]) for loss, net in zip(losses, (model, exact), strict=True)
    )
    for one, other in zip(ours, right, strict=True):
        assert torch.linalg.vector_norm(one - other) <= 1e-4 * torch.linalg.vector_norm(other)

    def run() -> None:
        loss = criterion(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


IMPLEMENTATIONS: dict[str, Callable[[], Callable[[], None]]] = {
    "eager": lambda: step(reference.SimpleNN(64, 128, 10), nn.CrossEntropyLoss()),
    "fusednn": lambda: step(SimpleNN(64, 128, 10), CrossEntropyLoss()),
    "eager, fused Adam": lambda: step(reference.SimpleNN(64, 128, 10), nn.CrossEntropyLoss(), fused=True),
    "fusednn, fused Adam": lambda: step(SimpleNN(64, 128, 10), CrossEntropyLoss(), fused=True),
}


@pytest.mark.benchmark(group=f"training step, 64-128-10, batch 32, {DEVICE}", min_rounds=3000)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_step(implementation: str, benchmark: Any) -> None:
    """Time from Python; on a GPU the queue is drained once a round of many steps."""
    run = IMPLEMENTATIONS[implementation]()
    for _ in range(20):
        run()

    def steps() -> None:
        for _ in range(50):
            run()
        torch.cuda.synchronize()

    if DEVICE == "cuda":
        benchmark.extra_info["steps a round"] = 50
        benchmark.pedantic(steps, rounds=30, warmup_rounds=3)
    else:
        benchmark(run)
