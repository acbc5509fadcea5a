"""What is found in a model, and why nothing is."""

import copy
import importlib
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusednn import Linear, LinearReLU, SimpleNN, fuse, reference
from fusednn.kernels.step import Activation
from fusednn.training.net import Net, read_pure

from .runs import Quickstart, compute, find_net


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
    assert net.activations == (Activation("relu"), Activation())
    assert {id(parameter) for parameter in net.parameters} == {id(parameter) for parameter in model.parameters()}
    x = torch.randn(6, 4)
    torch.testing.assert_close(model(x), compute(net, x))


class Looping(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Spelled(nn.Module):
    """Activations as functions and methods, and what makes a row of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = self.fc1(x).tanh()
        return self.fc3(F.gelu(self.fc2(x), approximate="tanh")).sigmoid_()


ACTIVE: dict[str, tuple[Any, list[str]]] = {
    "one layer": (lambda: nn.Linear(4, 3), ["identity"]),
    "no activation": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), ["identity", "identity"]),
    "the quickstart": (lambda: Quickstart(2 * 2, 7, 3), ["relu", "relu", "identity"]),
    "Sequentials in one": (
        lambda: nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(4, 5)), nn.Sequential(nn.Tanh(), nn.Linear(5, 3))),
        ["tanh", "identity"],
    ),
    "a ModuleList": (lambda: Looping(2), ["tanh", "tanh", "identity"]),
    "functions and methods": (Spelled, ["tanh", "gelu_tanh", "sigmoid"]),
    "one behind the last": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), LinearReLU(5, 3)), ["relu", "relu"]),
    "eight": (lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))), ["identity"] * 8),
    "ReLU twice": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 3)), ["relu", "identity"]),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_found_with(name: str) -> None:
    model, names = ACTIVE[name][0](), ACTIVE[name][1]
    net = find_net(model, (2, 2))
    if isinstance(net, str):
        net = find_net(model)
    assert isinstance(net, Net)
    assert [activation.name for activation in net.activations] == names
    x = torch.randn(6, 4)
    torch.testing.assert_close(model(x.clone()), compute(net, x))


FORMS: dict[str, tuple[Any, Activation]] = {
    "nn.ReLU": (nn.ReLU(inplace=True), Activation("relu")),
    "nn.LeakyReLU": (nn.LeakyReLU(), Activation("leaky_relu", (0.01,))),
    "nn.LeakyReLU, 0.3": (nn.LeakyReLU(0.3, inplace=True), Activation("leaky_relu", (0.3,))),
    "nn.LeakyReLU, less than 0": (nn.LeakyReLU(-0.3), Activation("leaky_relu", (-0.3,))),
    "nn.ELU": (nn.ELU(2), Activation("elu", (2.0,))),
    "nn.GELU": (nn.GELU(), Activation("gelu")),
    "nn.GELU, tanh": (nn.GELU("tanh"), Activation("gelu_tanh")),
    "nn.SiLU": (nn.SiLU(), Activation("silu")),
    "nn.Tanh": (nn.Tanh(), Activation("tanh")),
    "nn.Sigmoid": (nn.Sigmoid(), Activation("sigmoid")),
    "nn.Softplus": (nn.Softplus(), Activation("softplus", (1.0, 20.0))),
    "nn.Softplus, 2, 5": (nn.Softplus(2, 5), Activation("softplus", (2.0, 5.0))),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_module_is_found(name: str) -> None:
    module, activation = FORMS[name]
    model = nn.Sequential(nn.Linear(4, 5), module, nn.Linear(5, 3))
    net = find_net(model)
    assert isinstance(net, Net)
    assert net.activations[0] == activation
    x = 3 * torch.randn(50, 4)
    torch.testing.assert_close(model(x), compute(net, x))


SPELLINGS = {
    "F.relu(z)": Activation("relu"),
    "F.relu(z, True)": Activation("relu"),
    "torch.relu_(z)": Activation("relu"),
    "F.leaky_relu(z)": Activation("leaky_relu", (0.01,)),
    "F.leaky_relu(z, 0.2, inplace=True)": Activation("leaky_relu", (0.2,)),
    "F.leaky_relu(input=z, negative_slope=-0.2)": Activation("leaky_relu", (-0.2,)),
    "F.leaky_relu_(z, 0.2)": Activation("leaky_relu", (0.2,)),
    "F.elu(z, alpha=0.5)": Activation("elu", (0.5,)),
    "F.elu_(z)": None,
    "F.elu(z, 1.0, True)": None,
    "F.gelu(z, 'tanh')": None,
    "torch.relu(z, True)": None,
    "z.relu(True)": None,
    "F.softplus(z, 1e39)": None,
    "F.gelu(z)": Activation("gelu"),
    "F.gelu(z, approximate='tanh')": Activation("gelu_tanh"),
    "F.silu(z)": Activation("silu"),
    "torch.tanh(z)": Activation("tanh"),
    "F.tanh(z)": Activation("tanh"),
    "torch.tanh_(z)": Activation("tanh"),
    "z.tanh()": Activation("tanh"),
    "torch.sigmoid(z)": Activation("sigmoid"),
    "F.sigmoid(z)": Activation("sigmoid"),
    "z.sigmoid_()": Activation("sigmoid"),
    "F.softplus(z, 2)": Activation("softplus", (2.0, 20.0)),
    "F.softplus(z, threshold=1)": Activation("softplus", (1.0, 1.0)),
    "F.leaky_relu(z, -0.2, True)": None,
    "F.leaky_relu(z, float('inf'))": None,
    "F.gelu(z, approximate='other')": None,
    "F.elu_(z, 1.0, 2.0)": None,
    "F.hardtanh(z)": None,
    "torch.sin(z)": None,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_is_found(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward in a file: the source is read."""
    (tmp_path / "spelled.py").write_text(SOURCE.format(spelling))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "spelled", raising=False)
    model, activation = importlib.import_module("spelled").Model(), SPELLINGS[spelling]
    monkeypatch.delitem(sys.modules, "spelled")
    net = find_net(model)
    if activation is None:
        assert isinstance(net, str)
        return
    assert isinstance(net, Net)
    assert net.activations[0] == activation
    x = 3 * torch.randn(50, 4)
    torch.testing.assert_close(model(x), compute(net, x))


SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        z = self.fc1(x)
        h = {}
        return self.fc2(h)
"""


def test_the_numbers_of_an_activation_are_read_again() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3))
    assert find_net(model).activations[0] == Activation("leaky_relu", (0.1,))
    model[1].negative_slope = 0.2
    assert find_net(model).activations[0] == Activation("leaky_relu", (0.2,))
    model[1].negative_slope = torch.tensor(0.2)
    assert isinstance(find_net(model), str)


def test_a_changed_activation_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3))
    assert isinstance(find_net(model), Net)
    monkeypatch.setattr(F, "softplus", torch.relu)
    assert find_net(model) == "torch.nn.functional.softplus was changed"


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


def empty() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 0), nn.Linear(0, 3))


def hooked(parameter: nn.Parameter) -> None:
    parameter.register_post_accumulate_grad_hook(lambda p: None)


LEFT = {
    "a function": (lambda: F.relu, "not a module"),
    "nine layers": (lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))), "has 9 Linears, and a"),
    "no layer": (nn.Tanh, "Tanh stands in front of the first Linear"),
    "nothing": (nn.Sequential, "the model has no Linear"),
    "an empty layer": (empty, "4-5-0-3 is empty"),
    "an activation before": (Twice, "relu stands in front of the first Linear"),
    "two activations": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.ReLU()), "ReLU stands behind another"),
    "ReLU6": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU6(), nn.Linear(5, 3)), "no training kernel computes ReLU6"),
    "ELU in place": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ELU(inplace=True)), "computes ELU with such options"),
    "LeakyReLU of a large number": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(10**400)), "with such options"),
    "ReLU in place on a ReLU": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.ReLU(True)), "works in place"),
    "no fit": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(4, 3)), "5] numbers meets a Linear that"),
    "a shortcut": (Shortcut, "F.relu(hidden) + hidden"),
    "scaled": (Scaled, "return 2 * self.second"),
    "two outputs": (TwoOutputs, "returns something else than what the last of it, Linear"),
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
    "parametrized": (lambda: changed(Custom(), lambda m: parametrize.register_parametrization(m.first, "weight", nn.Identity())), "computes ParametrizedLinear"),  # noqa: E501
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
    read_pure(whole)
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
    assert set(read_pure(deep)) == set(deep.parameters())
    for model, reason in (
        (nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)), "the model calls "),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), "the model calls "),
        (Shortcut(), "F.relu(hidden) + hidden"),
        (Unused(), "does not use what Linear computes"),
        (changed(Nested(), lambda m: setattr(m, "spare", nn.Linear(2, 2))), "does not use"),
        (changed(Nested(), lambda m: m.register_buffer("seen", torch.ones(1))), "buffers"),
        (changed(Nested(), lambda m: m.register_forward_pre_hook(print)), "has hooks"),
    ):
        assert reason in read_pure(model)
