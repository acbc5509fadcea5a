"""What a kernel is given of torch.optim's optimizers, what is left in them, and which are refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusednn
from fusednn import reference, train_steps
from fusednn.kernels import step as places
from fusednn.reading import Facts
from fusednn.training.optimizers import refusal, refusal_now
from fusednn.training.tables import KernelOptimizer
from tests.kernels.rules import OPTIMIZERS

from .runs import ROWS, Run, adam, assert_alike, data, net, one_call, train


def one_cycle(optimizer: Optimizer) -> Any:
    """A schedule that changes beta 1 too, where there is one."""
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=300, cycle_momentum="betas" in optimizer.defaults)


LATER = ("amsgrad", "nadam", "radam", "adagrad")
"""Rules whose numbers depend on the step."""


def against(optimizer: Optimizer, parameters: list[Any]) -> str | None:
    """Why no kernel makes the steps of `optimizer`."""
    return refusal(optimizer, parameters, None, Facts()) or refusal_now(optimizer, parameters)


def refusal_behind(make: Callable[[Any], Optimizer], change: Callable[[Any, Any], Any]) -> str:
    """Why no kernel makes the steps of an optimizer of a small net that was changed."""
    parameters = list(net("cpu").parameters())
    optimizer = make(parameters)
    change(optimizer, parameters)
    return str(against(optimizer, parameters))


def tables(chunks: list[int], make: Callable[[Any], Optimizer], schedule: Any = None) -> Tensor:
    """The tables of runs of so many steps each, one after the other."""
    parameters = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (3, 5)]
    optimizer = make(parameters)
    taker = KernelOptimizer(optimizer, parameters, schedule and schedule(optimizer))
    taken = []
    for steps in chunks:
        taken.append(taker.take(steps).table)
        taker.count(steps)
    return torch.cat(taken)


@pytest.mark.parametrize("schedule", [None, one_cycle])
@pytest.mark.parametrize(
    "make",
    [Adam, lambda p: Adam(p, lr=0.3, betas=(0.93, 0.99), weight_decay=0.1), AdamW, *map(OPTIMIZERS.get, LATER)],
)
def test_no_bit_of_a_step_depends_on_the_chunk_it_is_in(make: Any, schedule: Any) -> None:
    """Else a run would not repeat: how long its chunks are depends on the clock."""
    whole = tables([200], make, schedule)
    for chunks in ([1] * 200, [7] * 28 + [4], [63, 65, 64, 8]):
        assert torch.equal(tables(chunks, make, schedule), whole)


def test_the_table_is_adams_formula_in_float64() -> None:
    table = tables([3], lambda p: Adam(p, lr=0.3, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5))
    for t, row in enumerate(table[:, 1].tolist(), 1):
        expected = {
            places.STEP_SIZE: 0.3 / (1 - 0.8**t), places.DECAY: 0.5, places.SHRINK: 1 - 0.3 * 0.5, places.SIGN: 1,
            places.LOSS_SCALE: 1, places.ROOT: (1 - 0.9**t) ** -0.5, places.EPS: 1e-3, places.GRAD_PART: 0.2,
            places.SQUARE_KEPT: 0.9, places.SQUARE_PART: 0.1,
        }  # fmt: skip
        assert row == pytest.approx([expected.get(place, 0) for place in range(places.ROW)], rel=1e-14)


@pytest.mark.parametrize("name", places.RULES)
def test_scales_and_decays_of_each_step(name: str) -> None:
    """In one chunk, or one by one, of which some are taken in a hurry; everything else is as without."""

    def rows(chunks: list[int], scales: Any, decays: Any, max_norm: float | None = None) -> Tensor:
        parameters = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (3, 5)]
        optimizer = OPTIMIZERS[name](parameters)
        optimizer.param_groups[0]["weight_decay"] = 0.5
        taker = KernelOptimizer(optimizer, parameters, None, max_norm)
        taker.facts = Facts()
        found, begin = [], 0
        for steps in chunks:
            part = slice(begin, begin + steps)
            found.append(taker.take(steps, scales and scales[part], decays and decays[part]).table)
            taker.count(steps)
            assert taker.has_kept() == (name != "nadam" and (len(found) > 1 or name in ("sgd", "adagrad")))
            begin += steps
        return torch.cat(found)

    scales, decays = [1.0, 0.5, 2.0, 3.0], [0.25, 1.0, 0.0, 2.0]
    plain, whole = rows([4], None, None), rows([4], scales, decays, 1.5)
    assert torch.equal(rows([1] * 4, scales, decays, 1.5), whole)
    assert (plain[:, :, places.LOSS_SCALE] == 1).all()
    assert (plain[:, :, places.MAX_NORM] == 0).all()
    lr = (1 - plain[:, :, places.SHRINK]) / 0.5
    plain[:, :, places.LOSS_SCALE] = torch.tensor(scales)[:, None]
    plain[:, :, places.MAX_NORM] = 1.5
    plain[:, :, places.DECAY] = 0.5 * torch.tensor(decays)[:, None]
    plain[:, :, places.SHRINK] = 1 - lr * plain[:, :, places.DECAY]
    torch.testing.assert_close(whole, plain, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("hook", [False, True], ids=["resident", "looped"])
def test_bits_do_not_depend_on_chunks(device: str, hook: bool) -> None:
    x, targets = data(device)
    runs = []
    for chunk_steps in (None, 1, 4):
        model = net(device).double()
        if hook:
            model.register_forward_hook(lambda module, args, output: None)
        runs.append(train(train_steps, model, x.double(), targets, steps=10, batch_size=16, chunk_steps=chunk_steps))
    assert {run.engine for run in runs} == {"looped" if hook else one_call(device)}
    for run in runs[1:]:
        assert_alike(run, runs[0], rtol=0.0, atol=0.0)


def distance(run: Run, exact: Run) -> Tensor:
    """How far the parameters of two runs lie apart."""
    pairs = zip(run.model.parameters(), exact.model.parameters(), strict=True)
    return torch.stack([(a.double() - b).abs().max() for a, b in pairs]).max()


@pytest.mark.parametrize("before", [0, 1, 20])
@pytest.mark.parametrize(
    "make",
    [lambda p: SGD(p, lr=0.5), lambda p: SGD(p, lr=0.5, momentum=0.9, dampening=0.5), AdamW],
    ids=["SGD", "SGD, momentum", "AdamW"],
)
def test_one_step_from_a_state_that_pytorch_left(device: str, make: Any, before: int) -> None:
    """Never further from the step in float64 than twice PyTorch's own step in float32, and 16 roundings."""
    x, targets = data(device)
    results = {}
    for name, loop in (("exact", reference.train_steps), ("ours", train_steps), ("theirs", reference.train_steps)):
        model = net(device)
        optimizer = make(model.parameters())
        generator = torch.Generator().manual_seed(before)
        if before:
            reference.train_steps(model, optimizer, x, targets, steps=before, generator=generator)
        inputs = x
        if name == "exact":
            model, inputs, states = model.double(), x.double(), optimizer.state_dict()
            optimizer = make(model.parameters())
            optimizer.load_state_dict(states)  # which makes them float64 too
        loop(model, optimizer, inputs, targets, steps=1, generator=generator)
        moments = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
        results[name] = [tensor.double() for tensor in (*model.parameters(), *moments)]
    for exact, ours, theirs in zip(*results.values(), strict=True):
        floor = 16 * 2.0**-24 * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


@pytest.mark.slow
def test_two_hundred_steps_over_several_data(device: str) -> None:
    """At most four times as far from the float64 run as PyTorch: no luck of one order of rows."""
    x, targets = data(device)
    ours, theirs = [], []
    for seed in range(3):
        arguments: dict[str, Any] = {"steps": 200, "batch_size": 16, "order": "philox", "seed": seed}
        exact = train(reference.train_steps, net(device).double(), x.double(), targets, **arguments)
        for loop, found in ((train_steps, ours), (reference.train_steps, theirs)):
            found.append(distance(train(loop, net(device), x, targets, **arguments), exact))
    assert torch.stack(ours).median() <= 4 * torch.stack(theirs).median()


TENSOR_BETAS = (torch.tensor(0.8), torch.tensor(0.9))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, lr=torch.tensor(0.01), betas=TENSOR_BETAS, capturable=False, foreach=False),
        lambda p: AdamW(p, lr=torch.tensor(0.01), weight_decay=0.3, fused=True),
        lambda p: SGD(p, lr=torch.tensor(0.1), momentum=0.5, fused=True),
        lambda p: SGD(p, lr=0.1, momentum=0.5, nesterov=True, foreach=True, weight_decay=0.1),
        lambda p: (lambda q: SGD([{"params": q[:3]}, {"params": q[3:], "momentum": 0.1, "dampening": 0.3}], 0.1, 0.9))(
            list(p)
        ),
        lambda p: Adam(p, lr=0.01, decoupled_weight_decay=True, weight_decay=0.3),
    ],
    ids=["Adam, betas tensors", "AdamW, fused", "SGD, fused", "SGD, foreach", "SGD, groups", "Adam, decoupled"],
)
def test_more_of_torch_optim(make: Any, device: str) -> None:
    x, targets = data(device)
    ours, theirs = (
        train(loop, net(device), x, targets, make=make, epochs=3) for loop in (train_steps, reference.train_steps)
    )
    assert ours.engine == one_call(device)
    assert_alike(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.gpu
def test_capturable() -> None:
    """Step counts and learning rate lie on the GPU, and stay there."""
    x, targets = data("cuda")
    for make in (
        lambda p: Adam(p, lr=torch.tensor(0.01, device="cuda"), capturable=True),
        lambda p: Adam(p, fused=True),
    ):
        ours, theirs = (
            train(loop, net("cuda"), x, targets, make=make, epochs=3) for loop in (train_steps, reference.train_steps)
        )
        assert ours.engine == one_call("cuda")
        assert all(state["step"].is_cuda for state in ours.optimizer.state.values())
        assert_alike(ours, theirs, rtol=2e-5, atol=2e-6)


def test_mixed_decay_is_right(device: str) -> None:
    """One group with decoupled and one with coupled decay, which no one kernel does."""

    def make(parameters: Any) -> Adam:
        held = list(parameters)
        return Adam([{"params": held[:2], "decoupled_weight_decay": True}, {"params": held[2:]}], weight_decay=0.5)

    x, targets = data(device)
    runs = [train(loop, net(device), x, targets, make=make, epochs=2) for loop in (train_steps, reference.train_steps)]
    assert runs[0].engine == "looped"
    assert_alike(*runs)


def test_a_schedule_that_is_stepped_elsewhere_does_not_warn(device: str) -> None:
    """An epoch's, say: its first step looks whether the optimizer has made one."""
    model = net(device)
    optimizer = adam(model.parameters())
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train_steps(model, optimizer, *data(device), epochs=1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.005


class Halving(lr_scheduler.LRScheduler):
    """A schedule of a user's, which changes the weight decay too."""

    def get_lr(self) -> list[float]:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.1 * self.last_epoch
        return [0.01 * 0.5**self.last_epoch for _ in self.optimizer.param_groups]


class Warming(lr_scheduler.LRScheduler):
    """One that begins without momentum."""

    def get_lr(self) -> list[float]:
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9 if self.last_epoch > 1 else 0.0
        return [0.1 for _ in self.optimizer.param_groups]


@pytest.mark.parametrize(
    ("make", "schedule", "engine"),
    [(adam, Halving, "looped"), (lambda p: SGD(p, lr=0.1), Warming, "looped")],
    ids=["weight decay", "momentum from 0"],
)
def test_schedules_that_change_more_than_the_rate(make: Any, schedule: Any, engine: str, device: str) -> None:
    x, targets = data(device)
    ours, theirs = (
        train(loop, net(device), x, targets, make=make, schedule=schedule, steps=5)
        for loop in (train_steps, reference.train_steps)
    )
    assert ours.engine == engine
    assert_alike(ours, theirs)


def test_options_that_on_chunk_changes(device: str) -> None:
    """A learning rate set, then a checkpoint loaded: the next step is made with what is there."""
    x, targets = data(device)
    runs = []
    for ours in (True, False):
        model = net(device)
        optimizer, saved = adam(model.parameters()), []

        def change(done: int, optimizer: Any = optimizer, saved: list[Any] = saved) -> None:
            if done == 2:
                saved.append(copy.deepcopy(optimizer.state_dict()))
                optimizer.param_groups[0]["lr"] = 0.1
            elif done == 4:
                optimizer.load_state_dict(saved[0])
                optimizer.param_groups[0]["lr"] = 0.05

        arguments: dict[str, Any] = {"shuffle": False, "batch_size": ROWS}  # an epoch is a step
        if ours:
            on_chunk = lambda done, losses, change=change: change(done)  # noqa: E731
            train_steps(model, optimizer, x, targets, steps=6, chunk_steps=2, on_chunk=on_chunk, **arguments)
        else:
            for done in (2, 4, 6):
                reference.train_steps(model, optimizer, x, targets, steps=2, **arguments)
                change(done)
        runs.append((model.state_dict(), optimizer.state_dict()))
    assert runs[0][1]["state"][0]["step"] == 4
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


def put(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


def moment(optimizer: Optimizer, parameter: Tensor) -> None:
    """Keep the first moment in another dtype."""
    optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)


REFUSED: dict[str, tuple[Callable[[Any], Optimizer], Callable[[Any, Any], Any], str]] = {
    "differentiable": (lambda p: Adam(p, differentiable=True), lambda o, p: None, "the option differentiable"),
    "a pre-hook": (Adam, lambda o, p: o.register_step_pre_hook(print), "the optimizer has hooks"),
    "a post-hook": (SGD, lambda o, p: o.register_step_post_hook(print), "the optimizer has hooks"),
    "step put in": (Adam, lambda o, p: put(o, "step", print), "step was replaced"),
    "weight decay a tensor": (lambda p: SGD(p, weight_decay=torch.tensor(0.1)), lambda o, p: None, "lr is a tensor"),
    "an eps of almost nothing": (lambda p: Adam(p, eps=1e-40), lambda o, p: None, "the option eps is 1e-40"),
    "no eps": (lambda p: Adam(p, eps=0.0), lambda o, p: None, "the option eps is 0.0"),
    "an eps below nothing": (Adam, lambda o, p: o.param_groups[0].update(eps=-1e-3), "the option eps is -0.001"),
    "capturable": (lambda p: Adam(p, capturable=True), lambda o, p: None, "capturable on a CPU"),
    "of Adamax": (
        Adam, lambda o, p: o.state[p[0]].update(step=torch.ones(()), exp_avg=torch.zeros_like(p[0])),
        "the optimizer's state is not Adam's",
    ),
    "scaled": (Adam, lambda o, p: put(o, "grad_scale", torch.ones(())), "gradients are scaled"),
    "moments in bfloat16": (Adam, lambda o, p: moment(o, p[0]), "the optimizer's exp_avg has another dtype"),
    "one parameter more": (
        Adam, lambda o, p: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}), "not exactly the model's",
    ),
    "Nesterov's and not": (
        lambda p: SGD([{"params": p[:1]}, {"params": p[1:], "nesterov": True}], momentum=0.9), lambda o, p: None,
        "different rules: momentum, nesterov",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, change, reason = REFUSED[name]
    assert reason in refusal_behind(make, change)


def test_hooks_on_all_optimizers_are_heard() -> None:
    model, steps = net("cpu"), []
    handle = register_optimizer_step_pre_hook(lambda *args: steps.append(1))
    try:
        decision = fusednn.explain(train_steps, model, adam(model.parameters()), *data("cpu"), steps=3)[0]
    finally:
        handle.remove()
    assert decision.implementation == "looped"
    assert "hooks" in decision.reason
    assert len(steps) == 3


def test_what_torch_optim_has_wrapped_is_taken() -> None:
    """A scheduler replaces `step` by a wrapper of its own."""
    parameters = list(net("cpu").parameters())
    optimizer = Adam(parameters)
    lr_scheduler.StepLR(optimizer, 1)
    assert against(optimizer, parameters) is None
