"""Nets of any depth with any activations, each engine as the reference loop trains them; and who serves which."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fusednn
from fusednn import reference, train_steps

from .runs import Quickstart, adam, assert_alike, data, one_call, train
from .test_train_steps import BLUNT, OPTIMIZERS

MODULES: dict[str, Any] = {
    "identity": nn.Identity, "relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "elu": lambda: nn.ELU(1.5),
    "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus, "softplus, 2": lambda: nn.Softplus(2, 3), "leaky_relu, -0.5": lambda: nn.LeakyReLU(-0.5),
}  # fmt: skip


def chain(device: str, sizes: list[int], activations: list[str], biases: list[bool], seed: int = 1) -> nn.Sequential:
    """Linears with an activation behind each, always with the same weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, name in enumerate(activations):
            layers += [nn.Linear(sizes[i], sizes[i + 1], biases[i]), MODULES[name]()]
        return nn.Sequential(*layers).to(device)


@st.composite
def jobs(draw: Any, most: int) -> dict[str, Any]:
    """Nets of layers of at most so many units, and how to train them."""
    depth = draw(st.integers(1, 4) | st.integers(1, 8))
    sizes = [draw(st.integers(1, most) | st.sampled_from([1, 16, 17])) for _ in range(depth)]
    return {
        "sizes": [*sizes, draw(st.integers(2, 20))],
        "activations": [draw(st.sampled_from(sorted(MODULES))) for _ in range(depth)],
        "biases": [draw(st.booleans()) for _ in range(depth)],
        "make": draw(st.sampled_from([o for o in OPTIMIZERS if "groups" not in o and o != "Adam, lr a tensor"])),
        "batch_size": draw(st.integers(1, 40)),
        "double": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "seed": draw(st.integers(0, 100)),
    }


EACH = [
    {
        "sizes": [7, 17, 5, 10][: depth + 1] if depth < 4 else [3] * depth + [4], "activations": names[:depth],
        "biases": [True, False, True, True] * 2, "make": "Adam, options", "batch_size": 33, "double": True,
        "label_smoothing": 0.1, "seed": 0,
    }
    for depth, names in (
        (1, ["identity"]), (1, ["gelu"]), (3, ["relu", "gelu", "identity"]), (3, ["tanh", "silu", "sigmoid"]),
        (3, ["elu", "softplus", "leaky_relu"]), (8, [*sorted(MODULES)[:8]]), (2, ["gelu_tanh", "tanh"]),
    )
]  # fmt: skip


def check(job: dict[str, Any], device: str, steps: int) -> None:
    """Train by both loops, and hold one to the other."""
    names = job["activations"]
    model = chain(device, job["sizes"], names, job["biases"], job["seed"])
    x, targets = data(device, 40, job["sizes"][0], job["sizes"][-1])
    if job["double"]:
        model, x = model.double(), x.double()
    make: Any = OPTIMIZERS[job["make"]] if job["double"] else BLUNT  # in float32 others may blow up what is rounding
    arguments: dict[str, Any] = {
        "steps": steps, "batch_size": job["batch_size"], "make": make,
        "criterion": nn.CrossEntropyLoss(label_smoothing=job["label_smoothing"]),
    }  # fmt: skip
    ours, theirs = (train(loop, model, x, targets, **arguments) for loop in (train_steps, reference.train_steps))
    assert ours.engine == one_call(device)
    assert_alike(ours, theirs, **({"rtol": 1e-7, "atol": 1e-9} if job["double"] else {"rtol": 1e-4, "atol": 1e-5}))


@pytest.mark.parametrize("job", EACH, ids=lambda job: "-".join(map(str, job["sizes"])))
@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_as_the_loop(job: dict[str, Any], double: bool, device: str) -> None:
    check(job | {"double": double}, device, 3)


def test_as_the_loop_at_random(device: str, request: pytest.FixtureRequest) -> None:
    """The interpreter is slow: few and small nets; the native engine takes more."""
    native = one_call(device) == "native"

    @settings(max_examples=150 if native else 8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(jobs(40 if native else 17))
    @example(EACH[0])
    def run(job: dict[str, Any]) -> None:
        check(job, device, 4 if native else 2)

    run()


class Listed(nn.Module):
    """A loop over a ModuleList, a view in front, and functions as activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 12), nn.Linear(12, 12)])
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


SERVED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "the quickstart": (lambda: Quickstart(28 * 28, 512, 10), (1, 28, 28)),
    "nn.Linear alone": (lambda: nn.Linear(16, 10), (16,)),
    "Sequentials in one": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(16, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 10))), (16,)
    ),
    "a ModuleList, a view and tanh": (Listed, (4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_who_serves(name: str, device: str) -> None:
    make, shape = SERVED[name]
    model = make().to(device)
    x, targets = torch.randn(64, *shape, device=device), torch.randint(10, (64,), device=device)
    optimizer = SGD(model.parameters(), lr=1e-3)
    decision = fusednn.explain(train_steps, model, optimizer, x, targets, batch_size=64, steps=0)[0]
    is_large = name == "the quickstart"  # on a GPU a graph is quicker than one program
    assert decision.implementation == ("captured" if is_large and device == "cuda" else one_call(device))
    if is_large and decision.implementation == "resident":
        return  # it takes minutes in the interpreter
    ours, theirs = (
        train(loop, model, x, targets, steps=2, make=lambda p: SGD(p, lr=0.1), batch_size=48)
        for loop in (train_steps, reference.train_steps)
    )
    assert_alike(ours, theirs)


def test_ten_layers_are_refused(device: str) -> None:
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(9)), nn.Linear(20, 10)).to(device)
    decision = fusednn.explain(train_steps, model, adam(model.parameters()), *data(device), steps=0)[0]
    assert decision.implementation in ("looped", "captured")
    assert decision.reason == "the model has 10 Linears, and a training kernel takes 8"


def test_going_on_in_pytorch_and_back(device: str) -> None:
    """State and steps are the optimizer's, whoever made them."""
    x, targets = data(device)
    states = []
    for loops in ([train_steps, reference.train_steps, train_steps], [reference.train_steps] * 3):
        model = chain(device, [20, 12, 8, 10], ["gelu", "tanh", "identity"], [True, False, True])
        optimizer = Adam(model.parameters(), lr=0.01, eps=1e-3)
        losses = [loop(model, optimizer, x, targets, steps=2, shuffle=False) for loop in loops]
        states.append((torch.cat(losses), optimizer.state_dict()["state"], list(model.parameters())))
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_a_step_of_another_net_after_a_change(device: str) -> None:
    """make_train_step reads again: a layer more, another activation, another slope."""
    step_of: dict[bool, Any] = {True: fusednn.make_train_step, False: reference.make_train_step}
    results = []
    for ours in (True, False):
        model = chain(device, [20, 12, 10], ["leaky_relu", "identity"], [True, True])
        optimizer = SGD(model.parameters(), lr=0.1)
        step, (x, targets) = step_of[ours](model, optimizer), data(device)
        losses = [step(x, targets)]
        model[1].negative_slope = 0.7
        losses.append(step(x, targets))
        model[1] = nn.Tanh()
        losses.append(step(x, targets))
        extra = nn.Linear(10, 10, device=device)
        with torch.no_grad():
            extra.weight.copy_(torch.eye(10))
            extra.bias.zero_()
        model.extend([nn.GELU(), extra])
        optimizer.add_param_group({"params": extra.parameters()})
        losses += [step(x, targets), step(x, targets)]
        if ours:
            assert step.engine == one_call(device)
        results.append(torch.stack(losses))
    torch.testing.assert_close(*results)


class Optional(nn.Module):
    """An argument that is left out, and a view in front."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = torch.tanh(self.fc1(x.view(x.size(0), -1)))
        return self.fc2(h if mask is None else h * mask)


def test_arguments_with_defaults_are_no_reason_to_read_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Optional().to(device)
    step, (x, targets) = fusednn.make_train_step(model, adam(model.parameters())), data(device)
    for _ in range(3):
        step(x, targets)
    monkeypatch.setattr("fusednn.reading.read", None)
    step(x, targets)
    assert step.engine == one_call(device)


def test_no_rows_behind_a_view_raise_as_in_the_loop(device: str) -> None:
    """PyTorch makes no matrix of them, and no step is counted."""
    model = Optional().to(device)
    optimizer, (x, targets) = adam(model.parameters()), data(device)
    step = fusednn.make_train_step(model, optimizer)
    for _ in range(2):
        step(x, targets)
        with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            step(x[:0], targets[:0])
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_images_that_on_chunk_exchanges(device: str) -> None:
    """The steps behind it are made on the new ones, as in the loop."""
    runs = []
    for hooked in (False, True):
        model = nn.Sequential(nn.Flatten(), *chain(device, [20, 12, 10], ["silu", "identity"], [True, True]))
        if hooked:
            model.register_forward_hook(lambda module, args, output: None)
        x, targets = data(device)
        images, other = x.view(-1, 4, 5).clone(), x.flip(0).view(-1, 4, 5).clone()

        def exchange(done: int, losses: Tensor, images: Tensor = images, other: Tensor = other) -> None:
            images.data = other

        given: Any = {"steps": 4, "chunk_steps": 2, "on_chunk": exchange, "shuffle": False, "batch_size": 16}
        runs.append(train_steps(model, SGD(model.parameters(), lr=0.1), images, targets, **given))
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("hidden", [2, 30])
def test_weights_of_another_shape_between_two_steps(device: str, hidden: int) -> None:
    losses = []
    for make in (fusednn.make_train_step, reference.make_train_step):
        model: Any = chain(device, [20, 12, 10], ["tanh", "identity"], [True, True])
        step, (x, targets) = make(model, SGD(model.parameters(), lr=0.1)), data(device)
        losses.append(step(x, targets))
        model[0].weight.data, model[0].bias.data = (
            torch.ones(hidden, 20, device=device),
            torch.ones(hidden, device=device),
        )
        model[2].weight.data = torch.linspace(-1, 1, 10 * hidden, device=device).view(10, hidden)
        losses += [step(x, targets), step(x, targets)]
    torch.testing.assert_close(losses[:3], losses[3:])


@pytest.mark.parametrize(
    "name", sorted(set(MODULES) - {"gelu", "gelu_tanh"})
)  # of inf PyTorch's gelu depends on the size
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_infinite_numbers_go_where_the_loop_sends_them(name: str, depth: int, device: str) -> None:
    """In the inputs, and in a weight; the units of a layer fill no tile, and the last batch is ragged."""
    x, targets = data(device, 18, 5, 3)
    x[3, 2], x[9, 1] = float("inf"), -float("inf")
    model: Any = chain(device, [*[5, 3, 4][:depth], 3], [name] * (depth - 1) + ["identity"], [True] * depth)
    with torch.no_grad():
        model[0].weight.clamp_(min=0.1)
        model[0].weight[1] = -0.2
    for infinite in (False, True):
        if infinite:
            with torch.no_grad():
                model[2 * depth - 2].weight[0, 0] = float("inf")
        ours, theirs = (
            train(loop, model, x, targets, make=lambda p: SGD(p, lr=0.1), steps=2, batch_size=16, shuffle=False)
            for loop in (train_steps, reference.train_steps)
        )
        assert_alike(ours, theirs)


@pytest.mark.parametrize("depth", [2, 3])
def test_rows_that_are_not_there_leave_biases_as_they_are(depth: int, device: str) -> None:
    """An empty batch has no gradient, whatever a weight is: here infinite, which 0 makes NaN."""
    x, targets = data(device, 4, 5, 3)
    model: Any = chain(device, [*[5, 3, 4][:depth], 3], ["tanh"] * (depth - 1) + ["identity"], [True] * depth)
    with torch.no_grad():
        model[2].weight[0, 0] = model[-2].weight[0, 0] = float("inf")
    ours, theirs = (
        train(loop, model, x[:0], targets[:0], make=lambda p: SGD(p, lr=0.1), steps=1)
        for loop in (train_steps, reference.train_steps)
    )
    assert ours.engine == one_call(device)
    assert_alike(ours, theirs)
