"""make_train_step: a step a call, the same as the loop's, whatever was changed between two calls."""

import copy
import gc
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

import fusednn
from fusednn import explain, make_train_step, reference, strict, train_steps
from fusednn.training import driver

from .runs import HIDDEN, INPUTS, OUTPUTS, adam, data, net, one_call


class Sine(nn.Module):
    """A net that no kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x).sin())
        return y


def batches(device: str, sizes: tuple[int, ...] = (16, 16, 7, 1, 16)) -> list[tuple[Tensor, Tensor]]:
    """Some batches, one of them ragged."""
    x, targets = data(device, sum(sizes))
    return list(zip(x.split(sizes), targets.split(sizes), strict=True))


def plain_step(model: Any, optimizer: Any, criterion: Any = None, schedule: Any = None) -> Callable[..., Any]:
    """The lines that a step stands for."""
    criterion = criterion or nn.CrossEntropyLoss()

    def step(x: Tensor, targets: Tensor) -> Tensor:
        loss = criterion(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return loss.detach()

    return step


class Pair:
    """A net that our step trains, and its copy that the plain lines train."""

    def __init__(self, device: str, model: nn.Module | None = None, make: Any = adam, schedule: Any = None) -> None:
        self.models = [model or net(device)]
        self.models.append(copy.deepcopy(self.models[0]))
        self.optimizers = [make(model.parameters()) for model in self.models]
        self.schedules = [schedule and schedule(optimizer) for optimizer in self.optimizers]
        self.criteria: list[Any] = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss()]
        self.ours = make_train_step(self.models[0], self.optimizers[0], self.criteria[0], lr_schedule=self.schedules[0])
        self.theirs = plain_step(self.models[1], self.optimizers[1], self.criteria[1], self.schedules[1])

    def step(self, x: Tensor, targets: Tensor) -> None:
        """A step of each, which are alike."""
        losses = self.ours(x, targets), self.theirs(x, targets)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6, equal_nan=True)
        self.assert_alike()

    def assert_alike(self) -> None:
        """Parameters, states and options."""
        ours, theirs = (model.state_dict() for model in self.models)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        ours, theirs = (optimizer.state_dict() for optimizer in self.optimizers)
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-5, atol=1e-6)
        assert str(ours["param_groups"]) == str(theirs["param_groups"])

    def change(self, change: Callable[[Any, Any, Any], None]) -> None:
        """Change both."""
        for model, optimizer, criterion in zip(self.models, self.optimizers, self.criteria, strict=True):
            change(model, optimizer, criterion)


@pytest.mark.parametrize("schedule", [None, lambda o: lr_scheduler.ExponentialLR(o, 0.9)])
@pytest.mark.parametrize(
    "make",
    [
        adam,
        lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: SGD(p, lr=0.1),
        lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: (lambda q: Adam([{"params": q[:2], "lr": 0.02}, {"params": q[2:]}], betas=(0.8, 0.9)))(list(p)),
    ],
    ids=["Adam", "AdamW", "SGD", "momentum", "groups"],
)
def test_as_the_loop(device: str, make: Any, schedule: Any) -> None:
    pair = Pair(device, make=make, schedule=schedule)
    for x, targets in batches(device):
        pair.step(x, targets)
        assert pair.ours.engine == one_call(device)
        assert all(parameter.grad is None for parameter in pair.models[0].parameters())


def test_the_bits_of_train_steps(device: str) -> None:
    stepped, called = net(device), net(device)
    step, optimizer = make_train_step(stepped, adam(stepped.parameters())), adam(called.parameters())
    for x, targets in batches(device):
        loss = step(x, targets)
        expected = train_steps(called, optimizer, x, targets, batch_size=len(x), steps=1, shuffle=False)
        assert loss.shape == ()
        assert torch.equal(loss, expected[0])
    for ours, theirs in zip(stepped.parameters(), called.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_losses_are_not_written_over(device: str) -> None:
    model = net(device)
    step = make_train_step(model, adam(model.parameters()))
    losses = [step(*batch) for batch in batches(device, (16,) * 4)]
    assert len({loss.item() for loss in losses}) == 4


def test_what_no_kernel_takes_the_loop_makes(device: str) -> None:
    pair = Pair(device, Sine().to(device))
    for x, targets in batches(device):
        pair.step(x, targets)
        assert pair.ours.engine == "looped"
    assert all(parameter.grad is None for parameter in pair.models[0].parameters())


def test_accuracy(device: str) -> None:
    for model in (net(device), Sine().to(device)):
        before = copy.deepcopy(model)
        step = make_train_step(model, adam(model.parameters()), return_accuracy=True)
        x, targets = data(device)
        _, accuracy = step(x, targets)
        assert accuracy.shape == ()
        assert accuracy.item() == pytest.approx((before(x).argmax(1) == targets).float().mean().item())


CHANGES: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "a frozen layer": (lambda m, o, c: m[0].requires_grad_(False), "looped"),
    "a hook": (lambda m, o, c: m[1].register_forward_hook(lambda module, args, y: y * 2), "looped"),
    "a hook on a parameter": (lambda m, o, c: m[0].weight.register_hook(lambda g: g * 2), "looped"),
    "a hook on the optimizer": (lambda m, o, c: o.register_step_pre_hook(lambda *args: None), "looped"),
    "another activation": (lambda m, o, c: setattr(m, "1", nn.Tanh()), ""),
    "another module": (lambda m, o, c: setattr(m, "1", nn.Tanhshrink()), "looped"),
    "one activation more": (lambda m, o, c: m.append(nn.Tanh()), ""),
    "one module more": (lambda m, o, c: m.append(nn.Tanhshrink()), "looped"),
    "a learning rate": (lambda m, o, c: o.param_groups[0].update(lr=0.05), ""),
    "a learning rate of NumPy's": (lambda m, o, c: o.param_groups[0].update(lr=np.float32(0.05)), "looped"),
    "one in double": (lambda m, o, c: o.param_groups[0].update(lr=np.float64(0.05)), ""),
    "weight decay": (lambda m, o, c: o.param_groups[0].update(weight_decay=0.1), ""),
    "betas": (lambda m, o, c: o.param_groups[0].update(betas=[0.5, 0.6]), ""),
    "amsgrad": (lambda m, o, c: o.param_groups[0].update(maximize=True), ""),
    "parameters": (lambda m, o, c: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}), ""),
    "their memory": (lambda m, o, c: setattr(m[0].weight, "data", m[0].weight.data * 0.5), ""),
    "their order in memory": (
        lambda m, o, c: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()), "looped",
    ),
    "a state dict": (lambda m, o, c: o.load_state_dict(copy.deepcopy(o.state_dict())), ""),
    "a moment": (lambda m, o, c: o.state[m[0].weight].update(exp_avg=torch.ones_like(m[0].weight)), ""),
    "a moment's memory": (
        lambda m, o, c: setattr(o.state[m[0].weight]["exp_avg"], "data", torch.ones_like(m[0].weight.data)), "",
    ),
    "no state": (lambda m, o, c: o.state.clear(), ""),
    "a count": (lambda m, o, c: o.state[m[0].weight]["step"].add_(5), ""),
    "the reduction": (lambda m, o, c: setattr(c, "reduction", "sum"), ""),
    "the smoothing": (lambda m, o, c: setattr(c, "label_smoothing", 0.1), ""),
    "class weights": (lambda m, o, c: setattr(c, "weight", torch.ones_like(m[2].bias.data) * 2), ""),
    "a replaced step": (lambda m, o, c: setattr(o, "step", lambda: None), "looped"),
    "a replaced zero_grad": (lambda m, o, c: setattr(o, "zero_grad", type(o).zero_grad.__get__(o)), "looped"),
    "a replaced forward": (lambda m, o, c: setattr(m[1], "forward", torch.tanh), "looped"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_two_calls_are_noticed(device: str, name: str) -> None:
    change, engine = CHANGES[name]
    pair = Pair(device)
    for i, (x, targets) in enumerate(batches(device, (16,) * 4)):
        if i == 2:
            pair.change(change)
        pair.step(x, targets)
        assert pair.ours.engine == (engine if i >= 2 and engine else one_call(device))


def test_a_kernel_serves_again_some_steps_after_what_was_in_its_way_is_gone(device: str) -> None:
    pair = Pair(device)
    x, targets = data(device)
    pair.change(lambda m, o, c: m[0].requires_grad_(False))
    for _ in range(3):
        pair.step(x, targets)
    pair.change(lambda m, o, c: m[0].requires_grad_(True))
    engines = []
    for _ in range(driver.MOST_UNREAD + 1):
        pair.step(x, targets)
        engines.append(pair.ours.engine)
    assert engines[0] == "looped"
    assert engines[-1] == one_call(device)
    decision = explain(pair.ours, x, targets)[0]  # who asks is told at once
    assert (decision.operation, decision.implementation) == ("train_step", one_call(device))


def test_modes_and_other_data(device: str) -> None:
    pair = Pair(device)
    x, targets = data(device)
    pair.step(x, targets)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        torch.testing.assert_close(pair.ours(x, targets), pair.theirs(x, targets))
    assert pair.ours.engine == "looped"
    for model in pair.models:
        model.load_state_dict(pair.models[1].state_dict())
    pair.ours._wait = 0
    pair.step(x, targets)
    assert pair.ours.engine == one_call(device)
    pair.step(x[:, ::2].repeat_interleave(2, 1), targets)
    pair.step(torch.cat([x, x]), torch.cat([targets, targets]))
    pair.step(x[:0], targets[:0]) if device == "cpu" else None
    soft = torch.softmax(torch.randn(len(x), OUTPUTS), 1).to(device)
    pair.step(x, soft)
    assert pair.ours.engine == one_call(device)
    soft = soft.double()
    torch.testing.assert_close(pair.ours(x, soft), pair.theirs(x, soft), rtol=1e-5, atol=1e-6)
    assert pair.ours.engine == "looped"
    with torch.no_grad():
        loss = pair.ours(x, targets)
    torch.testing.assert_close(loss, pair.theirs(x, targets), rtol=1e-5, atol=1e-6)
    with pytest.raises(fusednn.FallbackError, match="train_step: looped"), strict():
        pair.ours(x, soft)


@pytest.mark.parametrize("make", [adam, lambda p: SGD(p, lr=0.1, momentum=0.9)], ids=["Adam", "momentum"])
def test_a_label_out_of_range_leaves_all_as_it_was(device: str, make: Any) -> None:
    if device != "cpu":
        pytest.skip("nobody looks at the labels on a GPU")
    x, targets = data("cpu")
    bad = targets.clone()
    bad[-1] = OUTPUTS
    for steps in (0, 2):
        model = net("cpu")
        optimizer = make(model.parameters())
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = make_train_step(model, optimizer, lr_schedule=schedule)
        for _ in range(steps):
            step(x, targets)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
        with pytest.raises(IndexError, match=f"Target {OUTPUTS} is out of bounds"):
            step(x, bad)
        after = model.state_dict(), optimizer.state_dict(), schedule.state_dict()
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        assert str(after[1:]) == str(before[1:])
        assert bool(optimizer.state) == bool(steps)


def test_wrong_arguments() -> None:
    model = net("cpu")
    optimizer = adam(model.parameters())
    x, targets = data("cpu")
    with pytest.raises(TypeError, match=r"optimizer needs a torch\.optim\.Optimizer, not int"):
        make_train_step(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model and criterion need to be modules or functions"):
        make_train_step(model, optimizer, "loss")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        make_train_step(model, optimizer, lr_schedule=lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="return_accuracy: MSELoss has no classes"):
        make_train_step(model, optimizer, nn.MSELoss(), return_accuracy=True)
    step = make_train_step(model, optimizer)
    with pytest.raises(TypeError, match=r"inputs need a torch\.Tensor, not list"):
        step([1.0], targets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inputs have 50 rows and targets 49"):
        step(x, targets[1:])
    with pytest.raises(ValueError, match="targets need a row for each example"):
        step(x, targets[0])
    for name, tensor in (("inputs", x), ("targets", targets)):
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"{name}: a tensor of .* has no memory"):
            step(x, targets)
        x = data("cpu")[0]


class Cyclic(nn.Module):
    """It has what leads back to it, in its own dict, in a cell and in its forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS)
        self.act = self.swish if kind == "a method of its own" else self.relu
        if kind == "a replaced forward":
            self.forward = MethodType(Cyclic.swish, self)  # type: ignore[method-assign]

    def swish(self, x: Tensor) -> Tensor:
        return self.relu(x) if x.shape[-1] == HIDDEN else self.forward_of(x)

    def forward_of(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.relu(self.fc1(x)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


@pytest.mark.parametrize("kind", ["plain", "a method of its own", "a replaced forward", "a replaced zero_grad"])
def test_cycles_are_freed(device: str, kind: str) -> None:
    model = Cyclic(kind).to(device)
    optimizer = adam(model.parameters())
    if kind == "a replaced zero_grad":
        zero_grad = optimizer.zero_grad
        optimizer.zero_grad = lambda *args: zero_grad()  # type: ignore[method-assign]
    step = make_train_step(model, optimizer)
    x, targets = data(device)
    for _ in range(3):
        step(x, targets)
        train_steps(model, optimizer, x, targets, steps=1)
    assert step.engine == (one_call(device) if kind == "plain" else "looped")
    left = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer, step
    if kind == "a replaced zero_grad":
        del zero_grad
    gc.collect()
    assert [found() for found in left] == [None, None]


def test_nobody_is_kept_alive(device: str) -> None:
    """A model that leads back to itself, its optimizer, the data."""
    model = net(device)
    object.__setattr__(model, "trainer", [model])
    optimizer = adam(model.parameters())
    optimizer.trainer = [optimizer]  # type: ignore[attr-defined]
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = make_train_step(model, optimizer, lr_schedule=schedule)
    x, targets = data(device)
    for _ in range(3):
        step(x, targets)
        train_steps(model, optimizer, x, targets, steps=2)
    left = [weakref.ref(x), weakref.ref(targets)]
    del x, targets
    gc.collect()
    assert [found() for found in left] == [None, None]
    left = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[0].weight)]
    del model, optimizer, schedule, step
    gc.collect()
    assert [found() for found in left] == [None, None, None]


def test_a_criterion_and_a_model_that_are_functions(device: str) -> None:
    model = net(device)
    theirs = copy.deepcopy(model)
    step = make_train_step(lambda x: model(x), adam(model.parameters()), nn.functional.cross_entropy)
    plain = plain_step(theirs, adam(theirs.parameters()))
    for x, targets in batches(device):
        torch.testing.assert_close(step(x, targets), plain(x, targets), rtol=1e-5, atol=1e-6)
    assert step.engine == "looped"


def test_images(device: str) -> None:
    """nn.Flatten in front."""
    model = nn.Sequential(nn.Flatten(), *net(device))
    step = make_train_step(model, adam(model.parameters()))
    for x, targets in batches(device):
        step(x.view(len(x), 4, 5), targets)
        assert step.engine == one_call(device)
    assert reference.as_long(targets) is targets


def test_a_square_weight_that_is_turned(device: str) -> None:
    pair = Pair(device, net(device, (INPUTS, INPUTS, OUTPUTS)), make=lambda p: SGD(p, lr=0.1))
    for i, (x, targets) in enumerate(batches(device, (16,) * 4)):
        if i == 2:
            pair.change(lambda m, o, c: setattr(m[0].weight, "data", m[0].weight.data.t()))
        pair.step(x, targets)
        assert pair.ours.engine == ("looped" if i >= 2 else one_call(device))


@pytest.mark.parametrize("columns", [INPUTS // 2, 100 * INPUTS])
def test_a_weight_of_other_columns_fails_as_in_the_loop(device: str, columns: int) -> None:
    pair = Pair(device)
    x, targets = data(device)
    pair.step(x, targets)
    pair.change(lambda m, o, c: setattr(m[0].weight, "data", torch.ones(HIDDEN, columns, device=device)))
    for step in (pair.ours, pair.theirs):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            step(x, targets)


def test_another_dtype(device: str) -> None:
    pair = Pair(device, make=lambda p: SGD(p, lr=0.1))
    for i, (x, targets) in enumerate(batches(device, (16,) * 6)):
        if i == 3:
            pair.change(lambda m, o, c: m.double())
        pair.step(x.double() if i >= 3 else x, targets)
        assert pair.ours.engine == one_call(device)


def test_an_error_of_the_schedule_is_raised_once(device: str) -> None:
    def factor(step: int) -> float:
        if step == 3 and not raised:
            raised.append(step)
            raise ArithmeticError
        return 0.9**step

    raised: list[int] = []
    model = net(device)
    optimizer = adam(model.parameters())
    step = make_train_step(model, optimizer, lr_schedule=lr_scheduler.LambdaLR(optimizer, factor))
    x, targets = data(device)
    step(x, targets)
    step(x, targets)
    with pytest.raises(ArithmeticError):
        step(x, targets)
    step(x, targets)
    assert step.engine == one_call(device)


def test_labels_are_looked_at_in_every_step(device: str) -> None:
    model = net(device)
    step = make_train_step(model, adam(model.parameters()))
    x, targets = data(device)
    for _ in range(3):
        step(x, targets)
    for _ in range(3):
        with pytest.raises(IndexError, match="Target 10 is out of bounds"), fusednn.check_labels():
            step(x, torch.full_like(targets, OUTPUTS))
    assert step(x, targets).isfinite()


def test_parameters_that_move_after_an_error_are_found(device: str) -> None:
    """The schedule lets nothing be kept of a step, so the labels are looked at before all else."""
    pair = Pair(device, schedule=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9))
    x, targets = data(device)
    for _ in range(3):
        pair.step(x, targets)
    with pytest.raises(IndexError), fusednn.check_labels():
        pair.ours(x, torch.full_like(targets, OUTPUTS))
    pair.change(lambda model, optimizer, criterion: setattr(model[0].weight, "data", model[0].weight.data + 1))
    pair.step(x, targets)
    assert pair.ours.engine == one_call(device)


def test_an_empty_batch_of_images(device: str) -> None:
    pair = Pair(device, nn.Sequential(nn.Flatten(), *net(device)))
    x, targets = data(device)
    for rows in (8, 0, 8):
        pair.step(x[:rows].view(rows, 4, 5), targets[:rows])


class Chosen(nn.Module):
    """A net that asks its attributes what to do."""

    use_relu = True
    mode: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def act(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        mode = self.mode or "relu"
        if mode == "tanh":
            x = torch.tanh(x)
        elif self.use_relu:
            x = self.act(x)
        y: Tensor = self.fc2(x)
        return y


class Inherits(Chosen):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


CHOSEN: dict[str, Callable[[Any], Any]] = {
    "a constant of the class, on the object": lambda m: setattr(m, "use_relu", False),
    "a mode": lambda m: setattr(m, "mode", "tanh"),
    "a function over a method": lambda m: setattr(m, "act", torch.tanh),
    "a bound method over a method": lambda m: setattr(m, "act", nn.Linear(HIDDEN, HIDDEN).to(m.fc1.weight).forward),
}


@pytest.mark.parametrize("kind", [Chosen, Inherits])
@pytest.mark.parametrize("name", CHOSEN)
def test_what_a_forward_asks_is_looked_at_again(device: str, name: str, kind: type[nn.Module]) -> None:
    pair = Pair(device, kind().to(device))
    for i, (x, targets) in enumerate(batches(device, (16,) * 4)):
        if i == 2:
            change = CHOSEN[name]
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(5)
                change(pair.models[0])
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(5)
                change(pair.models[1])
        pair.step(x.to(device), targets)
        assert pair.ours.engine == ("looped" if i >= 2 and name.startswith("a bound") else one_call(device))


@pytest.mark.parametrize("name", ["a method of the base", "the forward of the base", "the forward of ours"])
def test_classes_that_change(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(
        device, fusednn.SimpleNN(INPUTS, HIDDEN, OUTPUTS).to(device) if "ours" in name else Inherits().to(device)
    )
    for i, (x, targets) in enumerate(batches(device, (16,) * 4)):
        if i == 2:
            if name == "a method of the base":
                monkeypatch.setattr(Chosen, "act", lambda self, x: torch.tanh(x))
            else:
                kind: Any = Chosen if "base" in name else fusednn.SimpleNN
                monkeypatch.setattr(kind, "forward", lambda self, x: self.fc2(torch.tanh(self.fc1(x))))
        pair.step(x, targets)
        assert pair.ours.engine == ("looped" if i >= 2 else one_call(device))


def test_or_gives_an_operand(device: str) -> None:
    model = Chosen().to(device)
    model.mode = "tanh"
    pair = Pair(device, model)
    pair.step(*data(device))
    assert pair.ours.engine == one_call(device)


def test_memory_that_is_exchanged_while_the_loop_serves(device: str) -> None:
    """What a kernel was to write is not written any more."""
    pair = Pair(device, make=lambda p: SGD(p, lr=0.1))
    x, targets = data(device)
    pair.step(x, targets)
    pair.step(x, targets)
    soft = torch.softmax(torch.ones(len(x), OUTPUTS, device=device), 1)
    pair.step(x, soft)
    pair.step(x, targets)
    pair.change(lambda m, o, c: [setattr(p, "data", torch.zeros_like(p)) for p in m.parameters()])
    for _ in range(3):
        pair.step(x, targets)
    assert pair.ours.engine == one_call(device)


def test_on_chunk_that_changes_the_dtype_of_the_data(device: str) -> None:
    x, targets = data(device)
    model = net(device)

    def change(done: int, losses: Tensor) -> None:
        x.data = x.data.double()

    with pytest.raises(RuntimeError, match=r"on_chunk changed what is trained, .*dtype"):
        train_steps(model, adam(model.parameters()), x, targets, steps=4, chunk_steps=1, on_chunk=change)


def test_a_group_that_is_another_dict(device: str) -> None:
    pair = Pair(device)
    for i, (x, targets) in enumerate(batches(device, (16,) * 6)):
        if i >= 2:
            groups = {2: {"lr": 0.0}, 3: {"lr": 0.1, "weight_decay": 0.1}}.get(i, {})
            pair.change(lambda m, o, c, new=groups: o.param_groups.__setitem__(0, {**o.param_groups[0], **new}))
        pair.step(x, targets)
        assert pair.ours.engine == one_call(device)


@pytest.mark.parametrize("part", ["a class weight", "a moment", "a bias"])
def test_zeros_without_memory_are_the_loops(device: str, part: str) -> None:
    if device != "cpu":
        pytest.skip("it is PyTorch's to say what they are there")
    model, criterion = net(device), nn.CrossEntropyLoss(reduction="sum")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = make_train_step(model, optimizer, criterion)
    x, targets = data(device)
    step(x, targets)
    if part == "a class weight":
        criterion.weight = torch._efficientzerotensor((OUTPUTS,))
        assert step(x, targets) == 0
    elif part == "a moment":
        optimizer.state[model[0].weight]["momentum_buffer"] = torch._efficientzerotensor(model[0].weight.shape)
        with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
            step(x, targets)
    else:
        model[0].bias.data = torch._efficientzerotensor(model[0].bias.shape)
        with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
            step(x, targets)
    assert step.engine == "looped"


def test_a_step_is_copied_with_what_it_trains(device: str) -> None:
    model = net(device)
    step = make_train_step(model, adam(model.parameters()))
    x, targets = data(device)
    step(x, targets)
    twin = copy.deepcopy(step)
    assert torch.equal(step(x, targets), twin(x, targets))
    assert twin._training[0] is not model


def test_a_state_that_is_taken_away_again(device: str) -> None:
    """All is as it was before the first step, but for the memory that the engine knew."""
    pair = Pair(device)
    for i, (x, targets) in enumerate(batches(device, (16,) * 6)):
        if i in (2, 3):
            pair.change(lambda m, o, c: o.state.pop(m[2].weight))
        pair.step(x, targets)
        if i == 4:
            pair.change(lambda m, o, c: o.state.clear())
