"""The optimizers' steps against PyTorch's own, on gradients that are numbers and on those that are not."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fusednn.kernels.step import RULES, Rule
from fusednn.kernels.updates import optimizer_step
from fusednn.training.tables import KernelOptimizer
from tests.kernels.rules import OPTIMIZERS

STRANGE = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e200, -1e200, 1e-200)  # some with a square that is not
STEPS = 8  # from the sixth on RAdam divides by a root


def test_every_rule_has_an_optimizer_that_has_it() -> None:
    assert [*OPTIMIZERS] == [*RULES]
    for name, make in OPTIMIZERS.items():
        parameter = nn.Parameter(torch.ones(3))
        taken = KernelOptimizer(make([parameter]), [parameter], None).take(1)
        assert taken.rule == Rule(name)
        assert len(taken.states) == len(RULES[name].states)
        assert all(state.shape == parameter.shape for group in taken.states for state in group if state is not None)


@pytest.mark.parametrize("option", [{}, {"weight_decay": 0.1, "maximize": True}], ids=["plain", "options"])
@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_of_torch_optim(device: str, name: str, option: dict[str, float]) -> None:
    """From the first on; a program has a ragged end."""
    generator = torch.Generator().manual_seed(1)
    ours = nn.Parameter(torch.randn(1500, generator=generator, dtype=torch.float64).to(device))
    theirs = copy.deepcopy(ours)
    optimizers = [OPTIMIZERS[name]([parameter]) for parameter in (ours, theirs)]
    for optimizer in optimizers:
        optimizer.param_groups[0].update(option)
    taker = KernelOptimizer(optimizers[0], [ours], None)
    for made in range(STEPS):
        g = torch.randn(1500, generator=generator, dtype=torch.float64).to(device)
        strange = STRANGE if made else STRANGE[::-1]
        if "centered" in name:  # of inf - inf PyTorch makes what the processor's fused multiply-add has, or has not
            strange = tuple(1e100 if abs(number) == 1e200 else number for number in strange)
        g[: len(STRANGE)] = g.new_tensor(strange)
        g[100:200] = 0  # of a centered rule with 0 in the place of the variance
        step(taker, g)
        theirs.grad = g.clone()
        optimizers[1].step()
    expected = optimizers[1].state_dict()["state"].get(0, {})
    assert torch.equal(ours.detach()[:8].isfinite(), theirs.detach()[:8].isfinite())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, equal_nan=True)
    found = {key: value for key, value in optimizers[0].state_dict()["state"].get(0, {}).items() if value is not None}
    expected = {key: value for key, value in expected.items() if value is not None}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, equal_nan=True)


def step(taker: KernelOptimizer, g: Tensor) -> None:
    """One of the optimizer's, on its only parameter."""
    taken = taker.take(1)
    w = taker.model.detach()
    states = [state for (state,) in taken.states if state is not None]
    optimizer_step(w, states, g, taken.table, torch.zeros(1, dtype=torch.int64, device=w.device), 0, taken.rule)
    taker.count(1)
