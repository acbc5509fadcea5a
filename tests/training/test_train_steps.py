"""train_steps against the reference loop: every engine, optimizer, option and corner of the data."""

import copy
import warnings
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

import fusednn
from fusednn import FallbackError, reference, train_steps

from .runs import HIDDEN, INPUTS, OUTPUTS, ROWS, adam, assert_alike, data, net, one_call, train

SIZES = [(64, 128, 10), (64, 64, 10), (32, 64, 10), (128, 128, 10), (64, 256, 10), (256, 64, 10)]


def in_a_loop(model: nn.Module) -> nn.Module:
    """The model with a hook, which no kernel would call."""
    model.register_forward_hook(lambda module, args, output: None)
    return model


@pytest.fixture(params=["resident", "looped"])
def engine(request: pytest.FixtureRequest) -> str:
    """The one of the two kinds of engine; of the first, "resident" stands for the native one too."""
    return request.param


def model_for(engine: str, device: str, **arguments: Any) -> nn.Module:
    model = net(device, **arguments)
    return in_a_loop(model) if engine == "looped" else model


def compare(model: nn.Module, device: str, *, engine: str = "resident", **arguments: Any) -> None:
    """Train by both loops on the same data, and hold one to the other."""
    tolerance = arguments.pop("tolerance", {})
    x, targets = arguments.pop("on", None) or data(device)
    given = {"epochs": 2} if "steps" not in arguments and "epochs" not in arguments else {}
    ours, theirs = (
        train(loop, model, x, targets, **given | arguments) for loop in (train_steps, reference.train_steps)
    )
    assert ours.engine == (one_call(device) if engine == "resident" else engine)
    assert_alike(ours, theirs, **tolerance)
    assert all(parameter.grad is None for parameter in ours.model.parameters())


BLUNT = lambda p: Adam(p, lr=0.01, eps=1e-3)  # noqa: E731
"""An Adam for many weights: the textbook's first step is the sign of a gradient, also of one that is all rounding."""

OPTIMIZERS = {
    "Adam": adam,
    "Adam, options": lambda p: Adam(p, lr=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
    "Adam, maximize": lambda p: Adam(p, lr=0.01, maximize=True),
    "Adam, foreach": lambda p: Adam(p, lr=0.01, foreach=True),
    "Adam, fused": lambda p: Adam(p, lr=0.01, fused=True),
    "Adam, lr a tensor": lambda p: Adam(p, lr=torch.tensor(0.01)),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.5),
    "AdamW, groups": lambda p: (
        lambda q: AdamW([{"params": q[:1], "lr": 0.1, "weight_decay": 0.0}, {"params": q[1:]}], lr=0.01)
    )(list(p)),
    "Adam, groups": lambda p: (
        lambda q: Adam([{"params": q[2:], "maximize": True}, {"params": q[:2], "weight_decay": 0.2, "eps": 1e-2}])
    )(list(p)),
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD, weight decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "SGD, momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "SGD, dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.4, weight_decay=0.1, maximize=True),
    "SGD, Nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(device: str, name: str) -> None:
    compare(net(device), device, make=OPTIMIZERS[name], batch_size=32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 50, 1000])
def test_batch_sizes(device: str, batch_size: int, bias: bool) -> None:
    compare(net(device, bias=bias), device, batch_size=batch_size, steps=5)


@pytest.mark.parametrize("batch_size", [1, 32, 256])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_of_the_contract_is_resident(device: str, sizes: tuple[int, int, int], batch_size: int) -> None:
    on = data(device, 300, sizes[0])
    compare(net(device, sizes), device, on=on, make=BLUNT, batch_size=batch_size, steps=1)


@pytest.mark.parametrize("batch_size", [128, 256])
def test_the_size_of_mnist_is_resident(device: str, batch_size: int) -> None:
    on = data(device, 300, 784)
    compare(net(device, (784, 128, 10)), device, on=on, make=BLUNT, batch_size=batch_size, steps=1)


def test_float64(device: str) -> None:
    x, targets = data(device)
    compare(net(device).double(), device, on=(x.double(), targets), tolerance={"rtol": 1e-12, "atol": 1e-13})


def test_ten_full_batches(device: str, engine: str) -> None:
    tolerance = {"rtol": 0.0, "atol": 1e-5}
    compare(model_for(engine, device), device, engine=engine, batch_size=ROWS, epochs=10, tolerance=tolerance)


@pytest.mark.parametrize("make", [adam, OPTIMIZERS["SGD, momentum"]])
def test_two_hundred_steps_stay_as_near_as_pytorch(device: str, make: Any) -> None:
    """At most four times as far from the float64 run as PyTorch's float32 run is."""
    x, targets = data(device)
    model, arguments = net(device), {"steps": 200, "batch_size": 16, "make": make}
    exact = train(reference.train_steps, copy.deepcopy(model).double(), x.double(), targets, **arguments)
    runs = [train(loop, model, x, targets, **arguments) for loop in (train_steps, reference.train_steps)]
    ours, theirs = (
        max((a.double() - b).abs().max() for a, b in zip(run.model.parameters(), exact.model.parameters(), strict=True))
        for run in runs
    )
    assert runs[0].engine == one_call(device)
    assert ours <= 4 * max(theirs, 1e-6)


SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "Lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


@pytest.mark.parametrize("make", ["Adam", "Adam, lr a tensor", "SGD"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(device: str, schedule: str, make: str) -> None:
    if schedule == "OneCycle" and make == "SGD":
        pytest.skip("OneCycleLR wants a momentum to cycle")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*epoch parameter in", UserWarning)  # SequentialLR's own
        compare(net(device), device, make=OPTIMIZERS[make], schedule=SCHEDULES[schedule], batch_size=16)


def test_a_schedule_that_cycles_the_momentum_is_looped(device: str) -> None:
    cycle = lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20)  # noqa: E731
    compare(net(device), device, engine="looped", make=OPTIMIZERS["SGD, momentum"], schedule=cycle, batch_size=16)


CRITERIA = {
    "default": {},
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1},
    "ignore_index": {"ignore_index": 3},
    "weight": {"weight": torch.rand(OUTPUTS, generator=torch.Generator().manual_seed(4)) + 0.1},
}
CRITERIA["all"] = CRITERIA["smoothing"] | CRITERIA["ignore_index"] | CRITERIA["weight"]


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, fusednn.CrossEntropyLoss])
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria(device: str, name: str, kind: Any, engine: str) -> None:
    criterion = kind(**CRITERIA[name]).to(device)
    compare(model_for(engine, device), device, engine=engine, criterion=criterion, batch_size=16)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels(device: str, dtype: torch.dtype, engine: str) -> None:
    x, targets = data(device)
    compare(model_for(engine, device), device, engine=engine, on=(x, targets.to(dtype)), batch_size=16)


def test_views_as_data(device: str) -> None:
    x, targets = data(device, 2 * ROWS, 40)
    compare(net(device), device, on=(x[::2, 1::2], targets[1::2]))
    compare(net(device, (50, 24, 10)), device, on=(x.t()[:, ::2][:30], targets[:30]), batch_size=8)


def test_a_batch_of_ignored_rows(device: str, engine: str) -> None:
    x, targets = data(device)
    targets[:16] = -100
    compare(model_for(engine, device), device, engine=engine, on=(x, targets), batch_size=8, shuffle=False)


def test_nan_in_the_data(device: str, engine: str) -> None:
    x, targets = data(device)
    x[40, 3] = float("nan")
    compare(model_for(engine, device), device, engine=engine, on=(x, targets), batch_size=8, shuffle=False, epochs=1)


@pytest.mark.parametrize("arguments", [{"steps": 7}, {"epochs": 2}, {"steps": 0}, {"epochs": 0}], ids=str)
@pytest.mark.parametrize("drop_last", [True, False])
def test_lengths(device: str, engine: str, drop_last: bool, arguments: dict[str, int]) -> None:
    ours = train(train_steps, model_for(engine, device), *data(device), drop_last=drop_last, **arguments)
    batches = ROWS // 32 if drop_last else -(-ROWS // 32)
    assert ours.losses.shape == ours.accuracies.shape == (arguments.get("steps", arguments.get("epochs", 0) * batches),)
    if ours.losses.numel():
        compare(model_for(engine, device), device, engine=engine, drop_last=drop_last, **arguments)


def test_empty_data(device: str, engine: str) -> None:
    """As in the loop: one batch of no rows an epoch, whose mean is NaN and whose gradients are zero."""
    x, targets = data(device)
    model = model_for(engine, device)
    compare(model, device, engine=engine, on=(x[:0], targets[:0]), epochs=3)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_a_batch_that_weighs_nothing(label_smoothing: float, device: str) -> None:
    """Its loss is 0 / 0, as in PyTorch, and all parameters are NaN after it; with a sum it is like any other."""
    if label_smoothing and one_call(device) == "resident":
        pytest.skip("the mean of the Triton kernels is infinite there")
    x, targets = data(device)
    targets[8:16] = 3
    weight = torch.ones(OUTPUTS, device=device)
    weight[3] = 0.0
    for reduction in ("mean", "sum"):
        criterion = nn.CrossEntropyLoss(weight, label_smoothing=label_smoothing, reduction=reduction)
        given = {"steps": 2, "batch_size": 8, "shuffle": False, "criterion": criterion, "make": OPTIMIZERS["SGD"]}
        compare(net(device), device, on=(x, targets), **given)


def test_data_smaller_than_a_batch_that_must_be_full(device: str) -> None:
    ours = train(train_steps, net(device), *data(device), batch_size=64, drop_last=True, epochs=3)
    assert ours.losses.shape == (0,)
    with pytest.raises(ValueError, match="50 rows make no batch of 64"):
        train(train_steps, net(device), *data(device), batch_size=64, drop_last=True, steps=3)


@pytest.mark.parametrize("arguments", [{"shuffle": False}, {"order": "philox", "seed": 2**64 - 1}], ids=str)
def test_orders(device: str, engine: str, arguments: dict[str, Any]) -> None:
    compare(model_for(engine, device), device, engine=engine, **arguments)


def test_philox() -> None:
    """The words of Salmon et al.'s known answer for counter and key 0, and orders that differ."""
    assert reference.philox(0, 0, torch.tensor([0])).item() == 0x6627E8D5E169C58D
    orders = [reference.draw_order(100, e, True, None, "philox", s) for e, s in ((0, 0), (1, 0), (0, 1), (0, 2**32))]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)


def test_the_default_generator(device: str, engine: str) -> None:
    states = []
    for loop in (train_steps, reference.train_steps):
        torch.manual_seed(5)
        model = model_for(engine, device)
        losses = loop(model, adam(model.parameters()), *data(device), epochs=2)
        states.append((losses, torch.get_rng_state()))
    torch.testing.assert_close(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_in_and_out_of_plain_pytorch(device: str, engine: str) -> None:
    """The loop, train_steps, the loop again; against the loop alone."""
    x, targets = data(device)
    runs = []
    for second in (train_steps, reference.train_steps):
        model = model_for(engine, device)
        optimizer, generator = adam(model.parameters()), torch.Generator().manual_seed(6)
        losses = [
            loop(model, optimizer, x, targets, steps=5, batch_size=16, generator=generator)
            for loop in (reference.train_steps, second, reference.train_steps)
        ]
        runs.append((torch.cat(losses), model.state_dict(), optimizer.state_dict()["state"]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", ["Adam", "SGD, dampening"])
def test_a_checkpoint_resumes_to_the_same_bits(device: str, engine: str, make: str) -> None:
    """Four epochs at once; and two, a checkpoint into fresh objects, and two more, in chunks of another length."""
    x, targets = data(device)
    model = model_for(engine, device)
    optimizer, generator = OPTIMIZERS[make](model.parameters()), torch.Generator().manual_seed(7)
    schedule = lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    arguments: dict[str, Any] = {"batch_size": 16, "generator": generator, "lr_schedule": schedule}
    whole = train_steps(model, optimizer, x, targets, epochs=4, chunk_steps=5, **arguments)

    first = model_for(engine, device)
    objects = [first, OPTIMIZERS[make](first.parameters()), torch.Generator().manual_seed(7)]
    schedule = lr_scheduler.StepLR(objects[1], 3, gamma=0.5)
    arguments |= {"generator": objects[2], "lr_schedule": schedule}
    losses = [train_steps(first, objects[1], x, targets, epochs=2, **arguments)]
    saved = [first.state_dict(), objects[1].state_dict(), schedule.state_dict()]
    saved = copy.deepcopy(saved)
    second = model_for(engine, device)
    second.load_state_dict(saved[0])
    resumed = OPTIMIZERS[make](second.parameters())
    schedule = lr_scheduler.StepLR(resumed, 3, gamma=0.5)
    resumed.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    arguments |= {"lr_schedule": schedule}
    losses.append(train_steps(second, resumed, x, targets, epochs=2, chunk_steps=1, **arguments))

    assert torch.equal(torch.cat(losses), whole)
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, resumed.state[b][name])


def frozen(model: nn.Module) -> nn.Module:
    next(model.parameters()).requires_grad_(False)
    return model


LEFT_TO_THE_LOOP: dict[str, tuple[Any, str]] = {
    "no eps": (lambda m, p: (m, Adam(p, eps=0.0)), "the option eps is 0.0"),
    "another optimizer": (lambda m, p: (m, torch.optim.Adamax(p)), "Adamax"),
    "a subclass": (lambda m, p: (m, type("Mine", (Adam,), {})(p)), "Mine"),
    "a hook on the model": (lambda m, p: (in_a_loop(m), Adam(p)), "hooks"),
    "frozen": (lambda m, p: (frozen(m), Adam(p)), "frozen"),
    "half the parameters": (lambda m, p: (m, Adam(p[:2])), "not exactly the model's"),
    "dropout": (lambda m, p: (nn.Sequential(m, nn.Dropout(0.5)), Adam(p)), "no training kernel computes Dropout"),
    "ten layers": (lambda m, p: (m.extend(nn.Linear(10, 10) for _ in range(8)), Adam(p)), "10 Linears"),
    "mixed momentum": (lambda m, p: (m, SGD([{"params": p[:2]}, {"params": p[2:], "momentum": 0.5}])), "momentum"),
}


@pytest.mark.parametrize("name", LEFT_TO_THE_LOOP)
def test_what_no_kernel_takes_is_looped_and_says_why(name: str) -> None:
    make, reason = LEFT_TO_THE_LOOP[name]
    model, optimizer = make(*(lambda m: (m, list(m.parameters())))(net("cpu")))
    x, targets = data("cpu")
    decision = fusednn.explain(lambda: train_steps(model, optimizer, x, targets, steps=1))[0]
    assert decision.implementation == "looped"
    assert reason in decision.reason
    with fusednn.strict(), pytest.raises(FallbackError, match="train_steps: looped"):
        train_steps(model, optimizer, x, targets, steps=1)


def test_other_data_and_criteria_are_looped() -> None:
    x, targets = data("cpu")
    probabilities = torch.nn.functional.one_hot(targets, OUTPUTS).float()
    cases: list[tuple[Any, Any, Any, str]] = [
        (x, probabilities.double(), None, "the targets are not torch.float32"),
        (
            x[:, None],
            targets[:, None],
            lambda y, t: nn.functional.cross_entropy(y[:, 0], t[:, 0]),
            "a Linear that takes 20",
        ),
        (x, targets, lambda y, t: nn.functional.cross_entropy(y, t), "criterion"),
        (x, targets, nn.MultiMarginLoss(), "criterion MultiMarginLoss"),
        (x.clone().requires_grad_(), targets, None, "gradient"),
    ]
    for inputs, labels, criterion, reason in cases:
        assert reason in reason_for_the_loop(net("cpu"), inputs, labels, criterion=criterion)
    assert "bfloat16" in reason_for_the_loop(net("cpu").bfloat16(), x.bfloat16(), targets)
    with torch.autocast("cpu"):
        assert "autocast" in reason_for_the_loop(net("cpu"), x, targets)


def reason_for_the_loop(model: nn.Module, *on: torch.Tensor, **arguments: Any) -> str:
    decision = fusednn.explain(train_steps, model, adam(model.parameters()), *on, steps=1, **arguments)[0]
    assert decision.implementation == "looped"
    return decision.reason


def test_inputs_that_negate_are_looped() -> None:
    """Such a view has the memory of what it negates."""
    x, targets = data("cpu")
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert "negates" in reason_for_the_loop(net("cpu"), negated, targets)


def test_numbers_of_numpy(device: str) -> None:
    losses = [
        train(train_steps, net(device), *data(device), batch_size=kind(16), steps=kind(3)).losses
        for kind in (int, np.int64)
    ]
    assert torch.equal(*losses)


def test_a_launch_that_fails_counts_no_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = net(device), torch.Generator()
    optimizer = adam(model.parameters())
    train_steps(model, optimizer, *data(device), steps=2, generator=generator)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    engines = {"native": "training.engines.native.native.train", "resident": "kernels.mlp_training.launch"}
    monkeypatch.setattr(f"fusednn.{engines[one_call(device)]}", fail)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MemoryError):
        train_steps(model, optimizer, *data(device), steps=2, generator=generator)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_strict_passes_what_is_resident(device: str) -> None:
    model = net(device)
    with fusednn.strict():
        train_steps(model, adam(model.parameters()), *data(device), steps=1)


@pytest.mark.parametrize("label", [-1, OUTPUTS, 2**40])
def test_a_label_out_of_range_raises_before_anything_happens(label: int) -> None:
    x, targets = data("cpu")
    targets[-1] = label
    model, generator = net("cpu"), torch.Generator().manual_seed(8)
    optimizer = adam(model.parameters())
    before, state = copy.deepcopy(model.state_dict()), generator.get_state()
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        train_steps(model, optimizer, x, targets, epochs=1, generator=generator)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(generator.get_state(), state)
    assert not optimizer.state


def test_a_stale_graph_is_noticed(device: str) -> None:
    model = net(device)
    x, targets = data(device)
    loss = model(x).sum()
    train_steps(model, adam(model.parameters()), x, targets, steps=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "neither": ({"steps": None}, ValueError, "exactly one of epochs and steps"),
    "both": ({"epochs": 1}, ValueError, "exactly one of epochs and steps"),
    "negative": ({"steps": -1}, ValueError, "steps needs to be at least 0, not -1"),
    "no number": ({"steps": 1.5}, TypeError, "steps needs a whole number, not 1.5"),
    "a truth": ({"steps": True}, TypeError, "steps needs a whole number, not True"),
    "negative epochs": ({"steps": None, "epochs": -1}, ValueError, "epochs needs to be at least 0, not -1"),
    "half a batch": ({"batch_size": 0.5}, TypeError, "batch_size needs a whole number, not 0.5"),
    "a large seed": ({"order": "philox", "seed": 2**64}, ValueError, "needs a seed from 0 to 2"),
    "a negative seed": ({"order": "philox", "seed": -1}, ValueError, "seed needs to be at least 0, not -1"),
    "half a seed": ({"order": "philox", "seed": 0.5}, TypeError, "seed needs a whole number, not 0.5"),
    "half a chunk": ({"chunk_steps": 0.5}, TypeError, "chunk_steps needs a whole number, not 0.5"),
    "no batch": ({"batch_size": 0}, ValueError, "batch_size needs to be at least 1"),
    "order": ({"order": "sorted"}, ValueError, "'torch' or 'philox', not 'sorted'"),
    "no seed": ({"order": "philox"}, ValueError, "needs a seed"),
    "a seed": ({"seed": 1}, ValueError, "a seed is for order='philox'"),
    "chunk": ({"chunk_steps": 0}, ValueError, "chunk_steps needs"),
    "rows": ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "inputs have 50 rows and targets 3"),
    "list": ({"targets": [1] * 50}, TypeError, "targets need a torch.Tensor, not list"),
    "scalar": ({"inputs": torch.zeros(())}, ValueError, "0-d"),
    "optimizer": ({"optimizer": None}, TypeError, "needs a torch.optim.Optimizer, not NoneType"),
    "callback": ({"on_chunk": 3}, TypeError, "on_chunk needs a function, not int"),
    "generator": ({"generator": 3}, TypeError, "generator needs a torch.Generator, not int"),
    "criterion": ({"criterion": "mse"}, TypeError, "modules or functions"),
    "schedule": ({"lr_schedule": 0.1}, TypeError, "needs a scheduler of torch.optim, not float"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changed, error, match = WRONG[name]
    model, (x, targets) = net("cpu"), data("cpu")
    arguments = {"optimizer": adam(model.parameters()), "inputs": x, "targets": targets, "steps": 1} | changed
    with pytest.raises(error, match=match):
        train_steps(model, **arguments)


def test_schedules_that_do_not_fit() -> None:
    model, other = net("cpu"), net("cpu")
    optimizer = adam(model.parameters())
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        train_steps(model, optimizer, *data("cpu"), steps=1, lr_schedule=lr_scheduler.ReduceLROnPlateau(optimizer))
    schedule = lr_scheduler.StepLR(adam(other.parameters()), 1)
    with pytest.raises(ValueError, match="another optimizer"):
        train_steps(model, optimizer, *data("cpu"), steps=1, lr_schedule=schedule)


def test_losses_stay_on_the_device_in_the_dtype_of_the_loss(device: str) -> None:
    model = net(device)
    losses = train_steps(model, adam(model.parameters()), *data(device), steps=3)
    assert losses.device == next(model.parameters()).device
    assert losses.dtype == torch.float32
    assert not losses.requires_grad


def one_column(model: nn.Module, x: Tensor, targets: Tensor, criterion: Any, shape: tuple[int, ...]) -> float:
    """The accuracy of one step with targets of 0 and 1."""
    wanted = (targets < OUTPUTS // 2).to(x.dtype).view(len(x), *shape)
    arguments: dict[str, Any] = {"criterion": criterion, "steps": 1, "batch_size": len(x), "return_accuracy": True}
    found = []
    for loop in (train_steps, reference.train_steps):
        twin = copy.deepcopy(model)
        found.append(loop(twin, adam(twin.parameters()), x, wanted, **arguments)[1].item())
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("shape", [(1,), ()], ids=["[N, 1]", "[N]"])
@pytest.mark.parametrize(
    ("criterion", "middle"),
    [
        (nn.BCEWithLogitsLoss(), 0.0),
        (nn.functional.binary_cross_entropy_with_logits, 0.0),
        (nn.BCELoss(), 0.5),
        (lambda y, t: ((1 - (2 * t - 1) * y).clamp(min=0)).mean(), 0.0),
    ],
    ids=["BCEWithLogitsLoss", "function", "BCELoss", "hinge"],
)
def test_the_accuracy_of_one_column_is_the_share_on_the_right_side(
    device: str, criterion: Any, middle: float, shape: tuple[int, ...]
) -> None:
    x, targets = data(device)
    more: list[nn.Module] = [nn.Sigmoid()] * (middle > 0) + [nn.Flatten(0)] * (shape == ())
    model = nn.Sequential(net(device, (INPUTS, HIDDEN, 1)), *more)
    right = ((model(x).view(-1) > middle) == (targets < OUTPUTS // 2)).float().mean().item()
    assert 0.2 < right < 0.8
    assert one_column(model, x, targets, criterion, shape) == pytest.approx(right)


def test_the_accuracy_of_several_labels_at_once_is_that_of_all(device: str) -> None:
    x, _ = data(device)
    model = net(device)
    wanted = (torch.rand(len(x), OUTPUTS) < 0.5).to(x)
    right = ((model(x) > 0) == (wanted > 0.5)).float().mean().item()
    arguments: dict[str, Any] = {"steps": 1, "batch_size": len(x), "criterion": nn.BCEWithLogitsLoss()}
    _, accuracies = train_steps(model, adam(model.parameters()), x, wanted, return_accuracy=True, **arguments)
    assert accuracies.item() == pytest.approx(right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=["classes", "sides"])
def test_the_accuracy_is_the_nearest_number(criterion: nn.Module, dtype: torch.dtype, device: str) -> None:
    """A product with the reciprocal is not; and a half has no room for the numbers of rows and of right ones."""
    for rows, right in ((49, 41), (49, 47), (70_000, 66_000)):
        outputs = torch.ones(rows, 2, dtype=dtype, device=device)
        outputs[right:, 0] = outputs[:right, 1] = -1
        targets = torch.zeros(rows, dtype=torch.int64, device=device)
        probabilities = torch.tensor([1.0, 0.0], dtype=dtype, device=device).expand_as(outputs)
        expected = torch.tensor(right / rows, dtype=torch.float64, device=device).to(dtype)
        if isinstance(criterion, nn.CrossEntropyLoss):
            assert torch.equal(reference.accuracy(outputs, targets, criterion), expected)
        assert torch.equal(reference.accuracy(outputs, probabilities, criterion), expected)


@pytest.mark.parametrize("loop", [train_steps, reference.train_steps])
@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (nn.MSELoss(), "MSELoss has no classes"),
        (nn.functional.l1_loss, "l1_loss has no classes"),
        (partial(nn.functional.mse_loss, reduction="sum"), "partial has no classes"),
        (lambda y, t: (y.sum(1) - t).square().mean(), "neither classes and labels nor one column"),
    ],
    ids=["MSELoss", "l1_loss", "partial", "a function"],
)
def test_where_there_are_no_classes_accuracy_raises_before_the_first_step(
    loop: Any, criterion: Any, words: str
) -> None:
    x, targets = data("cpu")
    model = net("cpu")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        loop(model, adam(model.parameters()), x, targets.float(), steps=1, criterion=criterion, return_accuracy=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("betas", (0.9, 0.99, 0.999)), ("betas", (0.9, 2.0)), ("lr", Decimal("0.01")), ("eps", "1"), ("betas", 0.9)],
)
def test_options_that_torch_refuses_raise_its_error(device: str, name: str, value: Any) -> None:
    x, targets = data(device)
    errors = []
    for loop in (train_steps, reference.train_steps):
        model = net(device)
        optimizer = adam(model.parameters())
        loop(model, optimizer, x, targets, steps=1)
        optimizer.param_groups[0][name] = value
        with pytest.raises(Exception) as error:  # noqa: PT011 (whatever torch raises)
            loop(model, optimizer, x, targets, steps=1)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_explain_with_no_steps_trains_nothing(device: str) -> None:
    x, targets = data(device)
    model = net(device)
    optimizer = adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    decisions = fusednn.explain(train_steps, model, optimizer, x, targets, steps=0)
    assert decisions[0].implementation == one_call(device)
    assert str(decisions).startswith("train_steps  " + one_call(device))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not optimizer.state
    assert all(parameter.grad is not None for parameter in model.parameters())
