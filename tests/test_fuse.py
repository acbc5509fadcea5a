"""fuse and unfuse on the nets that people write: same values, gradients, keys and parameters; fewer kernels."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn import explain, fuse, fusions, unfuse


def vgg_head() -> nn.Module:
    """The classifier of VGG, small."""
    return nn.Sequential(
        nn.Linear(12, 8), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(8, 8), nn.ReLU(True), nn.Dropout(0.0),
        nn.Linear(8, 4),
    )  # fmt: skip


class Autoencoder(nn.Module):
    """Two nn.Sequentials, one in the other's mirror."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 12), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Layers(nn.Module):
    """What a textbook writes: Linears and one ReLU for all, called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))


class Shared(nn.Module):
    """One Linear twice, each time with a ReLU, of which one serves a third Linear too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(12, 8), nn.Linear(8, 8)
        self.again = self.shared
        self.a, self.b = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.again(self.a(self.shared(self.a(self.first(x))))))


class SharedWithout(Shared):
    """The same, but once nothing follows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.a(self.shared(self.a(self.first(x)))))


class PreActivation(Layers):
    """What the first ReLU gets is needed elsewhere as well."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.fc1(x)
        return self.fc3(self.relu(self.fc2(self.relu(before)))) + before[..., :4]


class Mixed(Layers):
    """The ReLU gets something else besides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)) * 2))) + self.relu(x[..., :4])


class InTraining(Layers):
    """Only in training is the pre-activation used."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.fc1(x)
        y = self.fc3(self.relu(self.fc2(self.relu(before))))
        return y + before[..., :4] if self.training else y


class Default(Layers):
    """What may be left out says what else gets the output."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        before = self.fc1(x)
        if skip is None:
            skip = before
        return self.fc3(self.relu(self.fc2(self.relu(before))) + skip)


class Kept(Layers):
    """The pre-activation is kept for somebody; and there is state that a run would move."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.before = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.calls += 1
        self.before = self.fc1(x)
        return self.fc3(self.relu(self.fc2(self.relu(self.before)))) + self.before[..., :4] * 0 + torch.rand(()) * 0


class CalledForward(Layers):
    """The Linear's forward is called too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)) + self.fc1.forward(x))))


class Lora(nn.Module):
    """A Linear with a low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LoraLinear(nn.Linear):
    """The same as a subclass."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Untraceable(nn.Module):
    """The data say which way it goes; it calls its nn.Sequential as a whole, and another's modules by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Sequential(nn.Linear(12, 8), nn.ReLU())
        self.parts = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.fc, self.relu = nn.Linear(8, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.whole(x)
        before = self.parts[0](x)
        if x.sum() < 0:
            return before
        return self.relu(self.fc(self.parts[1](before))) + before[..., :4]


class Functional(Layers):
    """A function stands for the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(torch.relu(self.fc1(x)))))


def weight_norm_by_hook() -> nn.Module:
    model = vgg_head()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    return model


def weight_norm() -> nn.Module:
    model = vgg_head()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def lora() -> nn.Module:
    return nn.Sequential(Lora(nn.Linear(12, 8)), nn.ReLU(), LoraLinear(8, 8), nn.ReLU(), nn.Linear(8, 4))


NETS: dict[str, tuple[Any, list[str]]] = {
    # a net, and the Linears that are fused
    "VGG head": (vgg_head, ["0", "3"]),
    "autoencoder": (Autoencoder, ["encoder.0", "decoder.0"]),
    "layers": (Layers, ["fc1", "fc2"]),
    "shared": (Shared, ["first", "shared"]),
    "shared, once without": (SharedWithout, ["first"]),
    "pre-activation": (PreActivation, ["fc2"]),
    "mixed": (Mixed, ["fc1", "fc2"]),
    "in training": (InTraining, ["fc2"]),
    "default": (Default, ["fc2"]),
    "kept": (Kept, ["fc2"]),
    "called forward": (CalledForward, ["fc2"]),
    "weight_norm": (weight_norm, ["3"]),
    "weight_norm by hook": (weight_norm_by_hook, ["0", "3"]),
    "LoRA": (lora, []),
    "untraceable": (Untraceable, ["whole.0", "parts.0"]),
    "functional": (Functional, ["fc1", "fc2"]),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(4)
    return NETS[name][0]().double()


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Values, and gradients of all parameters and of x."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.pow(2).sum(), (x, *model.parameters()))]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients(name: str, training: bool, device: str) -> None:
    plain, model = made(name).to(device).train(training), made(name).to(device).train(training)
    x = torch.randn(5, 12, dtype=torch.float64, device=device)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    modules = list(model.modules())
    assert fuse(model) is model
    assert [module.training for module in modules] == [training] * len(modules)
    assert [fusion.linear for fusion in fusions(model) if fusion.relu] == NETS[name][1]
    torch.testing.assert_close(results(model, x), results(plain, x))
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert unfuse(model) is model
    assert [type(module).__name__ for module in model.modules()] == [
        type(module).__name__ for module in plain.modules()
    ]
    assert all("fused_relus" not in vars(module) for module in model.modules())
    torch.testing.assert_close(results(model, x), results(plain, x))


@pytest.mark.parametrize(
    ("name", "relus"),
    [("VGG head", 2), ("autoencoder", 2), ("layers", 2), ("shared", 3), ("untraceable", 1), ("functional", 2)],
)
def test_the_kernels_apply_the_relu(name: str, relus: int, device: str) -> None:
    """As many fused calls as there were ReLUs, and no ReLU of PyTorch's."""
    model, x = made(name).to(device), torch.randn(5, 12, dtype=torch.float64, device=device)
    fuse(model)
    operations = [decision.operation for decision in explain(model, x)]
    assert operations.count("linear_relu") == relus
    with torch.profiler.profile() as profile:
        model(x)
    alone = sum(event.count for event in profile.key_averages() if event.key.startswith("aten::relu"))
    assert alone == (2 if name == "untraceable" else 0)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("where", ["Linear", "ReLU"])
@pytest.mark.parametrize("name", ["VGG head", "layers"])
def test_hooks_see_what_they_saw(name: str, where: str, register: str, device: str) -> None:
    """Also those that are registered later."""
    seen = []
    for model in (made(name), fuse(made(name))):
        caught: list[Any] = []

        def hook(module: nn.Module, inputs: Any, output: Any, caught: list[Any] = caught) -> None:
            caught.extend((inputs[0].clone(), output[0].clone()))

        layers = {"VGG head": ("0", "1"), "layers": ("fc1", "relu")}[name]
        module = model.get_submodule(layers[where == "ReLU"])
        for relu in model.modules():
            relu.inplace = False  # which PyTorch forbids behind a backward hook
        getattr(module, register)(hook)
        results(model.to(device), torch.ones(5, 12, dtype=torch.float64, device=device))
        seen.append(caught)
    assert seen[0]
    torch.testing.assert_close(seen[1], seen[0])
    decisions = explain(model, torch.ones(5, 12, dtype=torch.float64, device=device))
    assert any("hooks" in decision.reason for decision in decisions)


@pytest.mark.parametrize("name", ["autoencoder", "layers", "shared", "functional"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stay_fused_and_can_be_undone(name: str, how: str) -> None:
    model, x = fuse(made(name)), torch.randn(5, 12, dtype=torch.float64)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
    assert [d.operation for d in explain(other, x)] == [d.operation for d in explain(model, x)]
    torch.testing.assert_close(results(other, x), results(model, x))
    for linear in other.modules():
        for relu in getattr(linear, "fused_relus", ()):
            assert relu in set(other.modules())  # its own, not the original's
    unfuse(other)
    torch.testing.assert_close(results(other, x), results(made(name), x))


@pytest.mark.parametrize("name", ["VGG head", "layers", "mixed", "functional"])
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    model, plain = fuse(made(name)), made(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (5, 7, 1):
        x = torch.randn(rows, 12, dtype=torch.float64)
        torch.testing.assert_close(results(compiled, x), results(plain, x))


@pytest.mark.parametrize("name", ["layers", "functional"])
def test_compiled_graphs_have_no_relu_left(name: str) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(fuse(made(name)), fullgraph=True, backend=backend)(torch.randn(5, 12, dtype=torch.float64))
    assert len(graphs) == 1
    assert "functional.relu" not in graphs[0]
    assert "torch.relu" not in graphs[0]


def test_a_residual_added_in_place(device: str) -> None:
    """The ReLU hands on the Linear's output itself, so whatever is done to that must not pass the ReLU by later."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu = nn.Linear(12, 12), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.fc(x))
            y -= 1
            return self.relu(y)

    torch.manual_seed(0)
    model, x = Residual().to(device), torch.randn(5, 12, device=device)
    with torch.no_grad():
        right = model(x)
        assert fusions(fuse(model))[0].relu == "relu"
        torch.testing.assert_close(model(x), right)


def test_whoever_calls_the_modules_of_a_sequential_gets_what_they_got(device: str) -> None:
    plain, model = (net.to(device) for net in (made("VGG head"), fuse(made("VGG head"))))
    x = torch.randn(5, 12, dtype=torch.float64, device=device)
    torch.testing.assert_close(model[0](x), plain[0](x))
    torch.testing.assert_close(model[:1](x), plain[:1](x))
    torch.testing.assert_close(model[:2](x), plain[:2](x))
    model[1] = plain[1] = nn.GELU()
    torch.testing.assert_close(model(x), plain(x))


def test_reasons_are_given(caplog: pytest.LogCaptureFixture) -> None:
    assert "ParametrizedLinear" in str(fusions(made("weight_norm"))[0])
    assert "LoraLinear, not nn.Linear itself" in str(fusions(made("LoRA"))[3])
    assert "its output, but add" in str(fusions(made("LoRA"))[0])
    assert "its output, but relu, getitem" in str(fusions(made("pre-activation"))[0])
    assert "the forward of Untraceable that may call it is not understood: line" in str(fusions(made("untraceable"))[2])
    assert str(fusions(made("layers"))[0]) == "fc1 + relu: fused (as its forward says)"
    with caplog.at_level(logging.INFO, "fusednn"):
        fuse(made("autoencoder"))
    assert "encoder.0 + encoder.1: fused (in an nn.Sequential)" in caplog.text
    assert "decoder.2: left alone (no nn.ReLU follows it)" in caplog.text


def test_what_was_replaced_is_left_alone() -> None:
    model = made("layers")
    model.fc1.forward = lambda x: F.linear(x, model.fc1.weight)
    assert [fusion.relu for fusion in fusions(model)] == [None, "relu", None]
    model.forward = lambda x: x
    assert [fusion.relu for fusion in fusions(fuse(model))] == [None, None, None]
    assert all("replaced" in fusion.reason for fusion in fusions(model))
    assert fusions(nn.Linear(2, 2)) == (fusednn.Fusion("", None, "no forward calls it"),)
    assert fusions(fusednn.SimpleNN(2, 3, 4))[0].reason == "a fusednn.modules.Linear, not nn.Linear itself"


def test_twice_is_once(device: str) -> None:
    model, x = made("shared").to(device), torch.randn(5, 12, dtype=torch.float64, device=device)
    before = fusions(model)
    assert fusions(fuse(fuse(model))) == before
    torch.testing.assert_close(results(model, x), results(made("shared").to(device), x))


def test_nothing_runs() -> None:
    model = made("kept")
    random = torch.get_rng_state()
    fusions(fuse(model))
    assert (model.steps.item(), model.calls, model.before) == (0, 0, None)
    assert torch.equal(torch.get_rng_state(), random)


def test_symbolic_trace_of_a_fused_model() -> None:
    model, x = fuse(made("mixed")), torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), made("mixed")(x))


def test_a_parametrization_that_came_later(device: str) -> None:
    model = fuse(made("layers")).to(device)
    nn.utils.parametrizations.weight_norm(model.fc1)
    unfuse(model)
    x = torch.randn(5, 12, dtype=torch.float64, device=device)
    torch.testing.assert_close(model.fc1(x), F.linear(x, model.fc1.weight, model.fc1.bias))


class Written(nn.Module):
    """As people write it: names used again, a method of the class, a keyword, in place, with defaults."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(12, 12) for _ in range(4))

    def encode(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = F.relu(x)
        return self.fc2(x).relu()

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        x = F.relu(input=self.fc3(self.encode(x)), inplace=True)
        return torch.relu(self.fc4(x)) if twice else torch.relu_(self.fc4(x)) * self.scale


class Derived(Written):
    """A method of another class, by super()."""

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        return super().forward(x, twice=twice) + 1


class Indexing(nn.Module):
    """Calls a pair of its nn.Sequential by number, and another Linear by name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.fc = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(self.parts[2](self.parts(x))))


def test_a_fused_sequential_is_read_as_what_it_was(device: str) -> None:
    plain = Indexing().to(device)
    model, x = fuse(copy.deepcopy(plain)), torch.randn(5, 12, device=device)
    assert fusions(model) == fusions(plain)
    assert [fusion.relu is not None for fusion in fusions(model)] == [True, False, True]
    torch.testing.assert_close(model(x), plain(x))


def test_what_super_finds_is_left() -> None:
    model, x = Derived(), torch.randn(5, 12)
    y = model(x)
    assert ["super() finds" in fusion.reason for fusion in fusions(fuse(model))] == [False, False, True, True]
    torch.testing.assert_close(model(x), y)


def test_functions_and_methods_of_any_kind(device: str) -> None:
    """The class keeps its name, and is its own again after unfuse."""
    kind: Any = Written
    torch.manual_seed(4)
    plain = kind().to(device)
    model, x = copy.deepcopy(plain), torch.randn(5, 12, device=device)
    assert [fusion.relu is not None for fusion in fusions(fuse(model))] == [True] * 4
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    for arguments in ({}, {"twice": True}):
        torch.testing.assert_close(model(x, **arguments), plain(x, **arguments))
        with torch.profiler.profile() as profile:
            model(x, **arguments)
        assert not any(event.key.startswith("aten::relu") for event in profile.key_averages())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert type(other) is type(model)
        torch.testing.assert_close(other(x), plain(x))
    seen: list[Tensor] = []
    model.fc1.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    torch.testing.assert_close(model(x), plain(x))
    assert (seen[0] < 0).any()
    assert type(unfuse(model)) is kind
    torch.testing.assert_close(model(x), plain(x))


def test_a_pickle_of_another_source_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    plain = Layers()
    plain.__class__ = Functional
    model, x = fuse(copy.deepcopy(plain)), torch.randn(5, 12)
    saved = pickle.dumps(model)
    monkeypatch.setattr(Functional, "forward", Layers.forward)
    other = pickle.loads(saved)  # noqa: S301
    torch.testing.assert_close(other(x), plain(x))


def test_a_weight_with_ideas_of_its_own_is_left_alone() -> None:
    class Quantized(Tensor):
        pass

    model = made("VGG head")
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Quantized))
    assert (
        fusions(model)[0].reason
        == "its weight is a test_a_weight_with_ideas_of_its_own_is_left_alone.<locals>.Quantized"
    )


class Odd(nn.Module):
    """Forwards that a reader gets wrong easily: none of their ReLUs follows fc1 alone and always."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 3)
        self.options: Any = {}
        self.kind: str | None = None
        self.n, self.m = 0, 1


class UnknownIsNone(Odd):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        act = self.options.get("act")
        h = F.relu(h) if act is not None else torch.tanh(h)
        return self.fc2(h)


class GivenNone(Odd):
    def forward(self, x: Tensor, mask: Any = None) -> Any:
        h = self.fc1(x)
        h = F.relu(h) if mask is None else torch.tanh(h)
        return self.fc2(h)


class Or(Odd):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        kind = self.kind or "tanh"
        h = torch.tanh(h) if kind == "tanh" else F.relu(h)
        return self.fc2(h)


class WithoutGradient(Odd):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        with torch.no_grad():
            h = F.relu(h)
        return self.fc2(h)


class SwitchedOff(Odd):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        torch.set_grad_enabled(False)
        h = F.relu(h)
        torch.set_grad_enabled(True)
        return self.fc2(h)


class SameText(Odd):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        n = self.n
        if n > 0:
            return self.fc2(F.relu(h))
        n = self.m
        if n > 0:
            return self.fc2(torch.tanh(h))
        return self.fc2(F.relu(h))


class SetBetween(Odd):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        if self.n > 0:
            return self.fc2(F.relu(h))
        self.n = 1
        h = torch.tanh(h) if self.n > 0 else F.relu(h)
        self.n = 0
        return self.fc2(h)


class Features(Odd):
    def features(self, x: Tensor) -> Any:
        return self.fc1(x)


class OfSuper(Features):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(super().features(x).relu())


@pytest.mark.parametrize("kind", [
    UnknownIsNone, GivenNone, Or, WithoutGradient, SwitchedOff, SameText, SetBetween, OfSuper,
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"act": 1}], ids=["none", "some"])
def test_forwards_that_are_read_wrong_easily(device: str, kind: type[Odd], options: dict[str, int]) -> None:
    plain = kind().to(device)
    plain.options = options
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(5, 6, device=device)
    for arguments in [(x,), (x, 1)] if kind is GivenNone else [(x,)]:
        results = []
        for model in (plain, fused):
            model.zero_grad()
            y = model(*arguments)
            y.sum().backward()
            results.append([y.detach(), *(parameter.grad for parameter in model.parameters())])
        for ours, theirs in zip(*results, strict=True):
            if ours is None or theirs is None:
                assert ours is theirs
            else:
                torch.testing.assert_close(ours, theirs)


def test_two_calls_that_begin_at_one_place_are_told_apart(device: str) -> None:
    model = OfSuper().to(device)
    assert [str(fusion.linear) for fusion in fusions(model)][:1] == ["fc1"]
    fuse(model)
    assert model.fc1.applies_relu


class Registered(Odd):
    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name


class OfRegistered(Registered, name="it"):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x)))


def test_a_class_that_hears_of_subclasses_is_left_alone(device: str) -> None:
    model, x = OfRegistered().to(device), torch.randn(5, 6, device=device)
    expected = model(x)
    assert "__init_subclass__" in next(iter(fusions(model))).reason
    torch.testing.assert_close(fuse(model)(x), expected)
    assert type(model) is OfRegistered


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(device: str, protocol: int) -> None:
    model, x = fuse(OfSuper().to(device)), torch.randn(5, 6, device=device)
    again = pickle.loads(pickle.dumps(model, protocol))  # noqa: S301
    torch.testing.assert_close(again(x), model(x))
    assert again.fc1.applies_relu
