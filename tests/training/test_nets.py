"""What is found in a model, and why nothing is."""

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusednn import Linear, LinearReLU, SimpleNN, fuse, reference
from fusednn.training.nets import Net, find_net, find_pure


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(5, 3), nn.Linear(4, 5, bias=False)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Method(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu_().relu())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True)), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Optional(Custom):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError
        hidden = F.relu(self.first(x))
        return self.second(hidden if mask is None else hidden * mask)


class Evaluating(Custom):
    """Another net where no gradient is wanted; train_steps always wants one."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        return self.second(hidden) if torch.is_grad_enabled() else hidden


FOUND = {
    "an argument left out": Optional,
    "what depends on the grad mode": Evaluating,
    "SimpleNN": lambda: SimpleNN(4, 5, 3),
    "the textbook's": lambda: reference.SimpleNN(4, 5, 3),
    "nn.Sequential": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
    "functions": Custom,
    "methods": Method,
    "nested": Nested,
    "LinearReLU": lambda: nn.Sequential(LinearReLU(4, 5), Linear(5, 3)),
    "fused": lambda: fuse(Nested()),
    "fused, not in a Sequential": lambda: fuse(reference.SimpleNN(4, 5, 3)),
    "in evaluation": lambda: SimpleNN(4, 5, 3).eval(),
    "copied": lambda: copy.deepcopy(fuse(Nested())),
    "a module in a list": lambda: Outer(Custom()),
    "twice inside": lambda: Outer(nn.Sequential(Outer(Nested()))),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    model = FOUND[name]()
    net = find_net(model)
    assert isinstance(net, Net)
    assert net.sizes == (4, 5, 3)
    assert {id(parameter) for parameter in net.parameters} == {id(parameter) for parameter in model.parameters()}
    x = torch.randn(6, 4)
    expected = F.linear(torch.relu(F.linear(x, net.w1, net.b1)), net.w2, net.b2)
    torch.testing.assert_close(model(x), expected)


class Dropping(Custom):
    """Drops the layer now and then."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        return self.second(3 * hidden) if self.draw() < 0.5 else self.second(hidden)


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(()).item()])
def test_a_forward_that_draws_is_not_known(draw: Any) -> None:
    """Whichever way it goes; and the numbers are drawn by the loop."""
    for seed in range(6):
        random.seed(seed)
        torch.manual_seed(seed)
        model = Dropping(draw)
        before = random.getstate(), torch.get_rng_state()
        assert isinstance(find_net(model), str)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


class Shortcut(Custom):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(F.relu(hidden) + hidden)


class Scaled(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.second(F.relu(self.first(x)))


class Counting(Custom):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(F.relu(self.first(x)))


class Keeping(Custom):
    def forward(self, x: Tensor) -> Tensor:
        self.hidden = F.relu(self.first(x))
        return self.second(self.hidden)


class Listing(Custom):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.counts = [], {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.second(F.relu(self.first(x)))


class Tallying(Listing):
    def forward(self, x: Tensor) -> Tensor:
        self.counts["calls"] += 1
        return self.second(F.relu(self.first(x)))


class Buffering(Custom):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.second(F.relu(self.first(x)))


class Outside(Custom):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) / 10


class Outer(nn.Module):
    """Has another module inside, beside a list of modules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([inner])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


class TwoOutputs(Custom):
    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.first(x))
        return self.second(hidden), hidden


class Branching(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x if x.sum() > 0 else -x)))


class Twice(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(x))))


def changed(model: Any, change: Any) -> Any:
    change(model)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def hooked(parameter: nn.Parameter) -> None:
    parameter.register_post_accumulate_grad_hook(lambda p: None)


LEFT = {
    "a function": (lambda: F.relu, "not a module"),
    "one layer": (lambda: nn.Linear(4, 3), "not Linear, ReLU, Linear"),
    "no ReLU": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "not Linear, ReLU, Linear"),
    "a ReLU behind": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), LinearReLU(5, 3)), "not Linear, ReLU, Linear"),
    "a ReLU before": (Twice, "not Linear, ReLU, Linear"),
    "another activation": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "not Linear, ReLU"),
    "ReLU6": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU6(), nn.Linear(5, 3)), "not Linear, ReLU"),
    "a shortcut": (Shortcut, "F.relu(hidden) + hidden"),
    "scaled": (Scaled, "return 2 * self.second"),
    "two outputs": (TwoOutputs, "not Linear, ReLU, Linear"),
    "counting": (Counting, "self.calls += 1"),
    "counting inside": (lambda: Outer(Counting()), "self.calls += 1"),
    "counting in a dict": (Tallying, 'self.counts["calls"] += 1'),
    "keeping": (Keeping, "self.hidden = F.relu"),
    "keeping inside": (lambda: nn.Sequential(Outer(Keeping())), "self.hidden = F.relu"),
    "a list": (Listing, "self.seen.append(x)"),
    "a buffer": (Buffering, "self.calls.add_(1)"),
    "a __call__": (Outside, "a __call__ of its own"),
    "a __call__ inside": (lambda: Outer(Outside()), "a __call__ of its own"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))), "scripted"),
    "parallel": (lambda: nn.DataParallel(Custom()), "spread over devices"),
    "branching": (Branching, "x.sum() > 0"),
    "compiled": (lambda: torch.compile(Custom()), "the model is compiled"),
    "a hook": (lambda: changed(Nested(), lambda m: m.net.register_forward_hook(print)), "has hooks"),
    "a backward hook": (lambda: changed(Nested(), lambda m: m.register_full_backward_hook(print)), "has hooks"),
    "a hook on a parameter": (lambda: changed(Custom(), lambda m: hooked(m.first.weight)), "a parameter has hooks"),
    "a forward put in": (lambda: changed(Custom(), lambda m: setattr(m.first, "forward", F.relu)), "was replaced"),
    "frozen": (lambda: changed(Custom(), lambda m: m.second.requires_grad_(False)), "frozen"),
    "tied": (tied, "share memory"),
    "two dtypes": (lambda: changed(Custom(), lambda m: m.second.double()), "several dtypes"),
    "parametrized": (lambda: changed(Custom(), lambda m: parametrize.register_parametrization(m.first, "weight", nn.Identity())), "not Linear"),  # noqa: E501
    "transposed": (lambda: changed(Custom(), lambda m: setattr(m.first, "weight", nn.Parameter(torch.randn(4, 5).t()))), "not contiguous"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    make, reason = LEFT[name]
    net = find_net(make())
    assert isinstance(net, str)
    assert reason in net


@pytest.mark.parametrize("outer", [lambda model: model, Outer, lambda model: Outer(Outer(model))])
@pytest.mark.parametrize("kind", [Counting, Keeping, Listing, Tallying, Buffering])
def test_looking_changes_nothing(kind: Any, outer: Any) -> None:
    """Not even deep inside."""
    model, state = kind(), torch.get_rng_state()
    before = copy.deepcopy(vars(model))
    whole = outer(model)
    find_net(whole)
    find_pure(whole)
    assert vars(model).keys() == before.keys()
    for name in {"calls", "seen", "counts"} & before.keys():
        assert getattr(model, name) == before[name]
    assert sum(buffer.sum().item() for buffer in model.buffers()) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_made_in_inference_mode_are_left() -> None:
    with torch.inference_mode():
        model = Custom()
    assert "plain nn.Parameter" in find_net(model)


def test_the_grad_mode_is_the_loops() -> None:
    with torch.no_grad():
        assert isinstance(find_net(Evaluating()), Net)


class Unused(Custom):
    def forward(self, x: Tensor) -> Tensor:
        self.second(x)
        return self.first(x)


def test_pure_nets() -> None:
    deep = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), LinearReLU(5, 5), Linear(5, 3))
    assert set(find_pure(deep)) == set(deep.parameters())
    for model, reason in (
        (nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)), "the model calls "),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), "the model calls "),
        (Shortcut(), "F.relu(hidden) + hidden"),
        (Unused(), "does not use what Linear computes"),
        (changed(Nested(), lambda m: setattr(m, "spare", nn.Linear(2, 2))), "does not use"),
        (changed(Nested(), lambda m: m.register_buffer("seen", torch.ones(1))), "buffers"),
        (changed(Nested(), lambda m: m.register_forward_pre_hook(print)), "has hooks"),
    ):
        assert reason in find_pure(model)
