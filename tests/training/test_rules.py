"""Each rule beside torch.optim's own: PyTorch's samples, states that go back and forth, ages, schedules, refusals."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop, lr_scheduler

from fusednn import make_train_step, reference, train_steps
from fusednn.kernels.step import RULES
from tests.kernels.rules import OPTIMIZERS

from .runs import Run, assert_alike, data, net, one_call, train
from .test_optimizers import against, refusal_behind

SAMPLES = {"Adagrad": 7, "Adam": 5, "AdamW": 5, "NAdam": 7, "RAdam": 6, "RMSprop": 8, "SGD": 9}
"""How many each class has with torch 2.13."""

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def samples(name: str) -> list[dict[str, Any]]:
    """The options in PyTorch's OptimizerInfo of a class."""
    module = importlib.import_module("torch.testing._internal.common_optimizers")
    torch.backends.__allow_nonbracketed_mutation_flag = True  # importing it forbids that, which others do
    (info,) = [info for info in module.optim_db if info.optim_cls.__name__ == name]
    return [sample.kwargs for sample in info.optim_inputs_func(device="cpu")]


def both(device: str, make: Callable[[Any], Optimizer], dtype: torch.dtype = torch.float64, **arguments: Any) -> None:
    """Train by a kernel and by PyTorch, to the same end."""
    x, targets = data(device)
    model, x = net(device).to(dtype), x.to(dtype)
    runs = [train(loop, model, x, targets, make=make, **arguments) for loop in (train_steps, reference.train_steps)]
    assert runs[0].engine == one_call(device)
    assert_alike(*runs, **(EXACT if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SAMPLES)
def test_pytorchs_samples(
    device: str, name: str, dtype: torch.dtype, record_property: Callable[[str, Any], None]
) -> None:
    """Seven steps: of the first RAdam divides by no root."""
    options = samples(name)
    for kwargs in options:
        make = lambda p, kwargs=kwargs: getattr(torch.optim, name)(p, **kwargs)  # noqa: E731
        both(device, make, dtype, steps=7, batch_size=16)
    record_property("samples", (f"torch.optim.{name}", one_call(device), len(options)))
    assert len(options) >= SAMPLES[name]


@pytest.mark.parametrize("name", RULES)
def test_states_go_from_pytorch_to_a_kernel_and_back(device: str, name: str) -> None:
    """Also through a state dict, which brings NAdam's product into the dtype of the parameters."""
    x, targets = data(device)
    runs = []
    for loop in (train_steps, reference.train_steps):
        model, generator = net(device).double(), torch.Generator().manual_seed(1)
        optimizer = OPTIMIZERS[name](model.parameters())
        for part, steps in ((reference.train_steps, 3), (loop, 2), (loop, 4), (reference.train_steps, 2)):
            part(model, optimizer, x.double(), targets, batch_size=16, steps=steps, generator=generator)
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = OPTIMIZERS[name](model.parameters())
            optimizer.load_state_dict(saved)
        runs.append((model.state_dict(), optimizer.state_dict()))
    torch.testing.assert_close(*runs, **EXACT)


@pytest.mark.parametrize("name", RULES)
def test_groups_of_other_ages(device: str, name: str) -> None:
    """The second layer joins after three steps of the first alone, with a rate of its own."""
    x, targets = data(device)
    runs = []
    for loop in (train_steps, reference.train_steps):
        model, generator = net(device).double(), torch.Generator().manual_seed(1)
        optimizer = OPTIMIZERS[name](model[0].parameters())
        reference.train_steps(model, optimizer, x.double(), targets, batch_size=16, steps=3, generator=generator)
        model.zero_grad()
        optimizer.add_param_group({"params": [*model[2].parameters()], "lr": 0.03})
        if loop is train_steps:
            assert against(optimizer, [*model.parameters()]) is None
        loop(model, optimizer, x.double(), targets, batch_size=16, steps=5, generator=generator)
        runs.append((model.state_dict(), optimizer.state_dict()))
    torch.testing.assert_close(*runs, **EXACT)


@pytest.mark.parametrize("name", ["amsgrad", "nadam", "radam", "adagrad", "rmsprop_centered"])
def test_schedules(device: str, name: str) -> None:
    both(device, OPTIMIZERS[name], schedule=lambda o: lr_scheduler.ExponentialLR(o, 0.8), steps=7, batch_size=16)


def test_a_schedule_of_beta(device: str) -> None:
    schedule = lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=9)  # noqa: E731
    both(device, OPTIMIZERS["nadam"], schedule=schedule, steps=7, batch_size=16)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "nadam", "radam", "adagrad", "rmsprop", "rmsprop_momentum"])
def test_gradients_whose_squares_overflow(device: str, name: str) -> None:
    """RAdam's first steps do not divide by the root of an infinite number."""
    x, targets = data(device)
    x[3, 2], x[7, 5] = 1e30, float("inf")
    for rows in (slice(0, 5), slice(0, 16)):
        runs = [
            train(loop, net(device), x[rows], targets[rows], make=OPTIMIZERS[name], steps=2, batch_size=16)
            for loop in (train_steps, reference.train_steps)
        ]
        assert_alike(*runs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_step_at_a_time(device: str, name: str) -> None:
    """By make_train_step, some of which look nothing up any more."""
    x, targets = data(device)
    runs = []
    for ours in (True, False):
        model = net(device).double()
        optimizer = OPTIMIZERS[name](model.parameters())
        if ours:
            step = make_train_step(model, optimizer)
            losses = torch.stack([step(x.double(), targets) for _ in range(7)])
            assert step.engine == one_call(device)
        else:
            losses, _ = reference.train_steps(
                model, optimizer, x.double(), targets, batch_size=len(x), steps=7, shuffle=False, return_accuracy=True
            )
        runs.append((losses, model.state_dict(), optimizer.state_dict()))
    torch.testing.assert_close(*runs, **EXACT)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, amsgrad=True, fused=True),
        lambda p: AdamW(p, amsgrad=True, foreach=True, maximize=True),
        lambda p: Adagrad(p, fused=True, lr_decay=0.1),
        lambda p: NAdam(p, foreach=True, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: RAdam(p, lr=torch.tensor(0.01), foreach=False, betas=(0.5, 0.6)),
        lambda p: RMSprop(p, foreach=True, momentum=0.5, weight_decay=0.1),
    ],
    ids=["Adam, fused", "AdamW, foreach", "Adagrad, fused", "NAdam, foreach", "RAdam, tensor", "RMSprop, foreach"],
)
def test_other_implementations(device: str, make: Any) -> None:
    both(device, make, steps=7, batch_size=16)


def dropped(optimizer: Optimizer, parameter: Any, name: str) -> None:
    """Make a state, but for one part of it."""
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.grad = None
    del optimizer.state[parameter][name]


REFUSED: dict[str, tuple[Callable[[Any], Optimizer], Callable[[Any, Any], Any], str]] = {
    "mixed": (
        lambda p: Adam([{"params": p[:1]}, {"params": p[1:], "amsgrad": True}]), lambda o, p: None, "adam, amsgrad"
    ),
    "momentum here and there": (
        lambda p: RMSprop([{"params": p[:1]}, {"params": p[1:], "momentum": 0.1}]), lambda o, p: None,
        "rmsprop, rmsprop_momentum",
    ),
    "decoupled and not": (
        lambda p: RAdam([{"params": p[:1]}, {"params": p[1:], "decoupled_weight_decay": True}]), lambda o, p: None,
        "with and without decoupled weight decay",
    ),
    "no largest square": (
        lambda p: Adam(p, amsgrad=True), lambda o, p: dropped(o, p[0], "max_exp_avg_sq"), "state is not Adam's"
    ),
    "no product": (NAdam, lambda o, p: dropped(o, p[0], "mu_product"), "state is not NAdam's"),
    "a sum in float16": (Adagrad, lambda o, p: o.state[p[0]].update(sum=p[0].detach().half()), "sum has another dtype"),
    "no eps": (lambda p: Adagrad(p, eps=0.0), lambda o, p: None, "the option eps is 0.0"),
    "lr_decay a tensor": (Adagrad, lambda o, p: o.param_groups[0].update(lr_decay=torch.ones(())), "lr is a tensor"),
    "momentum_decay": (NAdam, lambda o, p: o.param_groups[0].update(momentum_decay="x"), "no plain number"),
    "alpha": (RMSprop, lambda o, p: o.param_groups[0].update(alpha=None), "no plain number"),
    "beta": (RAdam, lambda o, p: o.param_groups[0].update(betas=(0.9, 1.0)), "the option betas is"),
    "differentiable": (lambda p: RMSprop(p, differentiable=True), lambda o, p: None, "the option differentiable"),
    "capturable": (lambda p: NAdam(p, capturable=True), lambda o, p: None, "capturable on a CPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, change, reason = REFUSED[name]
    assert reason in refusal_behind(make, change)


def test_a_schedule_of_momentum_is_the_loops(device: str) -> None:
    """RMSprop's may go to 0, where torch.optim leaves the buffer as it is."""
    schedule = lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=9)  # noqa: E731
    x, targets = data(device)
    run: Run = train(
        train_steps, net(device), x, targets, make=OPTIMIZERS["rmsprop_momentum"], schedule=schedule, steps=3
    )
    assert run.engine == "looped"
