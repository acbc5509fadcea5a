"""What the tests of the rules share: their formulas in plain PyTorch, and an optimizer of torch.optim that has each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, NAdam, Optimizer, RAdam, RMSprop

from fusednn.kernels import step as names
from fusednn.kernels.step import Rule

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda p: Adam(p, lr=0.01),
    "amsgrad": lambda p: Adam(p, lr=0.01, betas=(0.9, 0.5), amsgrad=True),
    "nadam": lambda p: NAdam(p, lr=0.01, momentum_decay=0.1),
    "radam": lambda p: RAdam(p, lr=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, alpha=0.9),
    "rmsprop_momentum": lambda p: RMSprop(p, lr=0.01, momentum=0.8),
    "rmsprop_centered": lambda p: RMSprop(p, lr=0.01, alpha=0.8, centered=True),
    "rmsprop_centered_momentum": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


def expected(rule: Rule, row: Tensor, w: Tensor, g: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """A parameter and its states after a step with the numbers of a row of the table."""
    n = dict(zip(range(names.ROW), row, strict=True))
    g = n[names.SIGN] * g if rule.maximize else g
    g = g + n[names.DECAY] * w if rule.coupled else g
    w = n[names.SHRINK] * w if rule.decoupled else w
    kept, part, lr = n[names.SQUARE_KEPT], n[names.SQUARE_PART], n[names.STEP_SIZE]
    if rule.name in ("adam", "amsgrad", "nadam", "radam"):
        m = states[0] + n[names.GRAD_PART] * (g - states[0])
        v = kept * states[1] + part * g * g
        kept_states = [m, v, *(torch.maximum(top, v) for top in states[2:])]
        change = lr * m + n[names.GRAD_STEP] * g if rule.name == "nadam" else lr * m
        return [w - change / (kept_states[-1].sqrt() * n[names.ROOT] + n[names.EPS]), *kept_states]
    if rule.name == "adagrad":
        v = states[0] + g * g
        return [w - lr * g / (v.sqrt() + n[names.EPS]), v]
    if rule.name.startswith("rmsprop"):
        v = kept * states[0] + part * g * g
        mean = [a + n[names.GRAD_PART] * (g - a) for a in states[-1:] if "centered" in rule.name]
        g = g / ((v - sum(a * a for a in mean)).sqrt() + n[names.EPS])
        heavy = [n[names.MOMENTUM] * states[1] + g] if "momentum" in rule.name else []
        return [w - lr * (heavy or [g])[0], v, *heavy, *mean]
    if rule.name == "sgd":
        return [w - lr * g]
    m = n[names.MOMENTUM] * states[0] + n[names.UNDAMPED] * g
    return [w - lr * (m if rule.name == "momentum" else g + n[names.MOMENTUM] * m), m]


def random_states(rule: Rule, w: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Of a centered rule with a variance that is positive."""
    kept = names.RULES[rule.name].states
    states = [torch.rand(w.shape, generator=generator, dtype=w.dtype).to(w.device) for _ in kept]
    if "centered" in rule.name:
        states[0] += 2 + 8 * states[-1] ** 2
    return states
