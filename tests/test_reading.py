"""Models are read, not run: what stands in a forward is known, or said not to be; nothing of it happens meanwhile."""

import contextlib
import functools
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusednn import explain, fuse, fusions, reading, reference, train_steps
from fusednn.reading import Facts
from fusednn.training.net import Net, read_pure

from .training.runs import find_net


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x)))


class Frozen(Plain):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            hidden = F.relu(self.fc1(x))
        return self.fc2(hidden)


class Switched(Plain):
    def forward(self, x: Tensor) -> Any:
        torch.set_grad_enabled(False)
        hidden = F.relu(self.fc1(x))
        torch.set_grad_enabled(True)
        return self.fc2(hidden)


class Half(Plain):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.fc2(F.relu(self.fc1(x)))


class Decorated(Plain):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x)))


class Hooks(Plain):
    def forward(self, x: Tensor) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
            return self.fc2(F.relu(self.fc1(x)))


class NumPy(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x))) * np.random.rand()


class Python(Plain):
    def forward(self, x: Tensor) -> Any:
        scale = random.random()  # noqa: S311
        return self.fc2(F.relu(self.fc1(x))) * scale


class OwnGenerator(Plain):
    generator: Any = np.random.default_rng(3)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x))) * float(self.generator.random())


SEEN: list[Tensor] = []


class Appending(Plain):
    def forward(self, x: Tensor) -> Any:
        SEEN.append(x)
        return self.fc2(F.relu(self.fc1(x)))


class Counting(Plain):
    counts: Any = Counter()  # noqa: RUF012

    def forward(self, x: Tensor) -> Any:
        self.counts["calls"] += 1
        return self.fc2(F.relu(self.fc1(x)))


ELSEWHERE = SimpleNamespace(calls=0)


class Elsewhere(Plain):
    def forward(self, x: Tensor) -> Any:
        ELSEWHERE.calls += 1
        return self.fc2(F.relu(self.fc1(x)))


class OnALinear(Plain):
    def forward(self, x: Tensor) -> Any:
        self.fc1.last = x
        return self.fc2(F.relu(self.fc1(x)))


class IntoATensor(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(3)

    def forward(self, x: Tensor) -> Any:
        self.counts[0] += 1
        return self.fc2(F.relu(self.fc1(x)))


NOT_UNDERSTOOD = {
    Frozen: "with torch.no_grad():", Switched: "torch.set_grad_enabled(False)", Half: "with torch.autocast",
    Decorated: "", Hooks: "with torch.autograd.graph.saved_tensors_hooks", NumPy: "np.random.rand()",
    Python: "scale = random.random()", OwnGenerator: "float(self.generator.random())", Appending: "SEEN.append(x)",
    Counting: 'self.counts["calls"] += 1', Elsewhere: "ELSEWHERE.calls += 1", OnALinear: "self.fc1.last = x",
    IntoATensor: "self.counts[0] += 1",
}  # fmt: skip


def run(loop: Any, model: nn.Module) -> tuple[Tensor, ...]:
    """Losses and parameters after some steps."""
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = loop(model, optimizer, x, t, batch_size=10, epochs=2, generator=generator, criterion=nn.CrossEntropyLoss())
    return (losses, *model.parameters())


@pytest.mark.parametrize("kind", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_the_loops(kind: type[Plain]) -> None:
    """It trains as the plain loop does, nothing ran before, and `explain` quotes the line."""
    results: list[Any] = []
    for loop in (reference.train_steps, train_steps):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        SEEN.clear()
        kind.generator, kind.counts = np.random.default_rng(3), Counter()  # type: ignore[attr-defined]
        ELSEWHERE.calls = 0
        model = kind()
        results.append([
            *run(loop, model), random.random(), np.random.rand(), len(SEEN), all(type(x) is Tensor for x in SEEN),  # noqa: S311
            dict(kind.counts), ELSEWHERE.calls,  # type: ignore[attr-defined]
        ])  # fmt: skip
    torch.testing.assert_close(results[1], results[0])
    reason = find_net(kind())
    assert isinstance(reason, str)
    assert NOT_UNDERSTOOD[kind] in reason


def test_explain_quotes_the_line() -> None:
    model = Frozen()
    (decision,) = [d for d in explain(lambda: run(train_steps, model)) if d.operation == "train_steps"]
    assert decision.implementation == "looped"
    assert "Frozen.forward: with torch.no_grad():" in decision.reason


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_traced_and_a_compiled_model_are_told_what_to_do() -> None:
    traced = torch.jit.trace(Plain(), torch.randn(2, 6))
    assert "pass the one that it was made of" in find_net(traced)
    assert "pass the one that torch.compile was given" in find_net(torch.compile(Plain()))
    model = Plain()
    model.compile()
    assert "pass the one that torch.compile was given" in find_net(model)


@pytest.mark.parametrize(
    ("owner", "name"), [(nn.Linear, "forward"), (nn.ReLU, "forward"), (F, "linear"), (F, "relu"), (torch, "relu")]
)
def test_what_somebody_changed_is_not_taken_for_what_it_was(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    before = getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(before)(lambda *a, **k: 2 * before(*a, **k)))
    assert "was changed" in find_net(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


def wrapped(optimizer: torch.optim.Optimizer) -> None:
    step = optimizer.step
    optimizer.step = functools.wraps(type(optimizer).step)(lambda *a: step(*a))  # type: ignore[method-assign]


def replaced(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [wrapped, replaced])
def test_a_step_that_somebody_wrapped_is_called(change: Any) -> None:
    model = Plain()
    optimizer = torch.optim.Adam(model.parameters())
    change(optimizer)
    decisions = explain(lambda: train_steps(model, optimizer, torch.randn(4, 6), torch.zeros(4).long(), steps=1))
    assert "was replaced" in next(d.reason for d in decisions if d.operation == "train_steps")


def test_a_class_whose_step_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", functools.wraps(step)(lambda self, closure=None: step(self, closure)))
    model = Plain()
    optimizer = torch.optim.Adam(model.parameters())
    decisions = explain(lambda: train_steps(model, optimizer, torch.randn(4, 6), torch.zeros(4).long(), steps=1))
    assert "step was replaced" in next(d.reason for d in decisions if d.operation == "train_steps")


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watching, lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)])
def test_modes_around_the_call_see_the_loop(mode: Any) -> None:
    model = Plain()
    with mode():
        decisions = explain(lambda: run(train_steps, model))
    assert next(d.implementation for d in decisions if d.operation == "train_steps") == "looped"


def test_other_threads_go_on() -> None:
    """A trace would patch nn.Module for all of them."""
    stop, errors, calls = threading.Event(), [], 0

    def other() -> None:
        nonlocal calls
        model, x = Plain(), torch.randn(2, 6)
        while not stop.is_set():
            try:
                model(x)
                calls += 1
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(200):
        find_net(Plain())
        read_pure(Plain())
        fuse(Plain())
    stop.set()
    thread.join()
    assert calls
    assert not errors


class Flat(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


class FlatAgain(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))


class Shaped(Plain):
    def forward(self, x: Tensor) -> Any:
        x = x.reshape(-1, 2 * 3)
        return self.fc2(torch.relu(self.fc1(x)))


class ByAttribute(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.activation = F.relu

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.activation(self.fc1(x)))


def test_a_function_as_an_attribute() -> None:
    """It is known as long as it is that one; fuse leaves it, since it may become another."""
    model = ByAttribute()
    assert isinstance(find_net(model), Net)
    assert all(fusion.relu is None for fusion in fusions(model))
    model.activation = torch.tanh
    assert find_net(model).activations[0].name == "tanh"
    model.activation = torch.sin
    assert "self.activation" in find_net(model)


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)])
        self.use_dropout = False

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        if self.use_dropout:
            x = F.dropout(x)
        return x


def flattened() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [Flat, FlatAgain, Shaped, flattened])
def test_inputs_that_the_model_makes_a_matrix(make: Any) -> None:
    results = []
    for loop in (reference.train_steps, train_steps):
        torch.manual_seed(1)
        model, x = make(), torch.randn(40, 2, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        t, generator = torch.arange(40) % 3, torch.Generator().manual_seed(3)
        results.append([
            loop(model, optimizer, x, t, batch_size=10, epochs=2, generator=generator),
            *(parameter.detach().clone() for parameter in model.parameters()),
        ])  # fmt: skip
    (decision, *_) = explain(lambda: train_steps(model, optimizer, x, t, steps=1))
    assert decision.implementation in ("native", "resident")
    torch.testing.assert_close(results[1], results[0])
    assert isinstance(find_net(make(), (2, 4)), str)
    if make is not Shaped:
        assert isinstance(find_net(make(), (6, 1)), Net)


def test_a_loop_over_modules_and_a_constant_attribute() -> None:
    model = Looping()
    assert isinstance(find_net(model), Net)
    model.use_dropout = True
    assert "no training kernel computes dropout" in find_net(model)
    model.use_dropout = False
    assert isinstance(find_net(model), Net)
    model.layers[1] = nn.Tanh()
    assert find_net(model).activations[0].name == "tanh"
    model.layers[1] = nn.Tanhshrink()
    assert "no training kernel computes Tanhshrink" in find_net(model)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.Dropout(0.0), nn.Identity()])
def test_modules_that_do_nothing(dropout: nn.Module) -> None:
    model = nn.Sequential(dropout, nn.Linear(6, 8), nn.ReLU(), dropout, nn.Linear(8, 3))
    active = isinstance(dropout, nn.Dropout) and dropout.p > 0
    assert isinstance(find_net(model), str if active else Net)
    assert isinstance(find_net(model.eval()), Net)
    assert isinstance(find_net(model.train()), str if active else Net)


def test_what_is_kept_is_read_again_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain()
    assert isinstance(find_net(model), Net)
    weight = model.fc1.weight = nn.Parameter(torch.zeros(8, 6))
    assert find_net(model).parameters[0] is weight
    handle = model.fc2.register_forward_hook(lambda *a: None)
    assert "hooks" in find_net(model)
    handle.remove()
    assert isinstance(find_net(model), Net)
    model.fc1 = nn.Linear(6, 8, bias=False)
    assert find_net(model).places[1] is None
    monkeypatch.setattr(Plain, "forward", Frozen.forward)
    assert "no_grad" in find_net(model)


def test_text_that_is_not_in_a_file() -> None:
    names: dict[str, Any] = {"Plain": Plain, "F": F}
    exec("class Typed(Plain):\n    def forward(self, x):\n        return self.fc2(F.relu(self.fc1(x)))\n", names)
    assert "a class in a file or in a cell of a notebook" in find_net(names["Typed"]())


def test_a_bias_of_another_shape_is_the_loops() -> None:
    for shape in ((1,), (), (1, 8)):
        model = Plain()
        model.fc1.bias = nn.Parameter(torch.zeros(shape))
        assert "another shape" in find_net(model)
        with contextlib.suppress(ZeroDivisionError):
            run(train_steps, model)


@pytest.fixture(params=["C++", "Python"])
def facts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Facts:
    if request.param == "Python":
        monkeypatch.setattr(reading.facts, "native", None)
    elif reading.facts.native is None:
        pytest.skip("the native engine was not built")
    return Facts()


class Thing(nn.Module):
    """With something of each kind."""

    number = 1

    def __init__(self) -> None:
        super().__init__()
        self.child, self.options = nn.Linear(2, 3), {"a": 1}


def looked_at(facts: Facts, thing: Thing) -> None:
    """Look at something of each kind."""
    assert facts.item(thing, "_modules", "child") is thing.child
    assert facts.item(thing.options, None, "a") == 1
    assert facts.item(thing.options, None, "b") is reading.GONE
    assert facts.attribute(thing.child, "weight") is thing.child.weight
    assert facts.attribute(thing, "nothing") is reading.GONE
    assert facts.attribute(Thing, "number") == 1
    assert facts.attribute(thing.child.bias, "requires_grad") is True
    assert facts.length(thing, "_forward_hooks") == 0
    assert facts.hold()


FACTS: dict[str, Callable[[Any], Any]] = {
    "an item": lambda thing: thing._modules.update(child=nn.Linear(2, 3)),
    "one that is gone": lambda thing: thing.options.pop("a"),
    "one that was not there": lambda thing: thing.options.update(b=None),
    "an attribute": lambda thing: setattr(thing.child, "weight", nn.Parameter(torch.ones(3, 2))),
    "one that is there now": lambda thing: setattr(thing, "nothing", None),
    "a flag": lambda thing: thing.child.bias.requires_grad_(False),
    "a length": lambda thing: thing.register_forward_hook(print),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_hold_until_something_changes(facts: Facts, name: str) -> None:
    thing = Thing()
    looked_at(facts, thing)
    FACTS[name](thing)
    assert not facts.hold()


def test_facts_of_a_class_and_of_what_is_gone(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    thing = Thing()
    looked_at(facts, thing)
    with monkeypatch.context() as patch:
        patch.setattr(Thing, "number", 2)
        assert not facts.hold()
    assert facts.hold()
    del thing
    assert not facts.hold()


def test_some_facts_never_hold(facts: Facts) -> None:
    facts.never()
    assert not facts.hold()


def test_a_defaultdict_is_not_filled_by_looking(facts: Facts) -> None:
    states: Any = defaultdict(dict)
    assert facts.item(states, None, "p") is reading.GONE
    assert facts.hold()
    assert not states
    states["p"]["step"] = 1
    assert not facts.hold()


def test_a_sequential_that_grows_is_read_again(device: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    assert isinstance(find_net(model), Net)
    model.append(nn.Tanh())
    assert [activation.name for activation in find_net(model).activations] == ["relu", "tanh"]
    model.append(nn.Softmax(1))
    assert find_net(model) == "no training kernel computes Softmax"
