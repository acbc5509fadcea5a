"""The modules against torch.nn's: parameters, state dicts, training, and what a user hooks or replaces."""

import copy
import importlib
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fusednn import (
    CrossEntropyLoss,
    Linear,
    LinearCrossEntropyLoss,
    LinearReLU,
    SimpleNN,
    explain,
    functional,
    fuse,
    reference,
    strict,
)


def pair(device: str, *sizes: int) -> tuple[SimpleNN, reference.SimpleNN]:
    """Ours and PyTorch's, made from the same seed."""
    torch.manual_seed(3)
    ours = SimpleNN(*sizes).to(device)
    torch.manual_seed(3)
    return ours, reference.SimpleNN(*sizes).to(device)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of x and gradients of the parameters, all of it by the kernels if `model` is ours, and fused."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    with strict():
        y = model(x)
    y.pow(2).sum().backward()
    return y, x.grad, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_same_weights_from_the_same_seed(device: str) -> None:
    ours, plain = pair(device, 64, 128, 10)
    assert list(ours.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_state_dicts_move_both_ways(device: str) -> None:
    ours, _ = pair(device, 6, 8, 4)
    x = torch.randn(5, 6, device=device)
    other = reference.SimpleNN(6, 8, 4).to(device)
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(other(x), ours(x))
    sequential = nn.Sequential()
    for name, layer in (("fc1", nn.Linear(6, 8)), ("relu", nn.ReLU()), ("fc2", nn.Linear(8, 4))):
        sequential.add_module(name, layer)
    sequential.to(device)
    sequential.load_state_dict(ours.state_dict())
    torch.testing.assert_close(sequential(x), ours(x))
    ours.load_state_dict(sequential.state_dict())


def test_ten_full_batch_steps(device: str) -> None:
    """The textbook loop: losses within 1e-5 of plain PyTorch's, float32, same seed."""

    def train(model: nn.Module, criterion: nn.Module) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(200, 64, generator=generator).to(device)
        targets = torch.randint(0, 10, (200,), generator=generator).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for _ in range(10):
            loss = criterion(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, plain = pair(device, 64, 128, 10)
    difference = torch.tensor(train(ours, CrossEntropyLoss())) - torch.tensor(train(plain, nn.CrossEntropyLoss()))
    assert difference.abs().max() <= 1e-5


def test_the_kernels_serve(device: str) -> None:
    model, x = SimpleNN(6, 8, 4).to(device), torch.randn(5, 6, device=device)
    decisions = explain(model, x)
    assert [decision.operation for decision in decisions] == ["linear_relu", "linear"]
    assert all("Triton" in decision.implementation for decision in decisions)


@pytest.mark.parametrize(
    ("where", "register"),
    [
        ("fc1", "register_forward_hook"),
        ("fc1", "register_full_backward_hook"),
        ("fc1", "register_full_backward_pre_hook"),
        ("relu", "register_forward_pre_hook"),
        ("relu", "register_forward_hook"),
        ("relu", "register_full_backward_hook"),
        ("relu", "register_full_backward_pre_hook"),
    ],
)
def test_hooks_see_what_they_see_in_pytorch(where: str, register: str, device: str) -> None:
    seen: list[list[Tensor]] = []
    for model in pair(device, 6, 8, 4):
        caught: list[Tensor] = []

        def hook(module: nn.Module, *values: object, caught: list[Tensor] = caught) -> None:
            caught.extend(t for value in values for t in (value if isinstance(value, tuple) else (value,)))

        getattr(getattr(model, where), register)(hook)
        torch.manual_seed(0)
        x = torch.randn(5, 6, device=device, requires_grad=True)
        model(x).pow(2).sum().backward()
        seen.append(list(caught))
        if isinstance(model, SimpleNN):
            assert "relu: PyTorch (fc1 or relu has hooks or was replaced)" in map(str, explain(model, x))
    assert seen[0]
    torch.testing.assert_close(seen[0], seen[1])


def test_a_pre_hook_of_fc1_fires_and_the_layer_stays_fused(device: str) -> None:
    model, x = SimpleNN(6, 8, 4).to(device), torch.randn(5, 6, device=device)
    model.fc1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    assert [decision.operation for decision in explain(model, x)] == ["linear_relu", "linear"]
    torch.testing.assert_close(model(x), model.fc2(torch.relu(model.fc1.bias.expand(5, 8))))


def test_a_pre_hook_of_fc1_with_kwargs_sees_none(device: str) -> None:
    """It returns the arguments it wants, and would drop one that fuses."""
    ours, plain = pair(device, 6, 8, 4)
    for model in (ours, plain):
        model.fc1.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), {}), with_kwargs=True)
    x = torch.randn(5, 6, device=device)
    torch.testing.assert_close(ours(x), plain(x))


def test_a_global_hook_fires_for_every_module(device: str) -> None:
    model, fired = SimpleNN(6, 8, 4).to(device), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.append(type(module).__name__))
    try:
        model(torch.randn(5, 6, device=device))
    finally:
        handle.remove()
    assert fired == ["Linear", "ReLU", "Linear", "SimpleNN"]


def test_replacing_children_takes_effect(device: str) -> None:
    ours, plain = pair(device, 6, 8, 4)
    x = torch.randn(5, 6, device=device)
    for name, module in (("relu", nn.GELU()), ("relu", nn.Identity()), ("fc1", nn.Linear(6, 8).to(device))):
        setattr(ours, name, module)
        setattr(plain, name, module)
        torch.testing.assert_close(ours(x), plain(x))

    class Doubled(Linear):
        def forward(self, input: Tensor, relu: bool = False) -> Tensor:
            return super().forward(input) * 2

    ours, plain = pair(device, 6, 8, 4)
    ours.fc1 = Doubled(6, 8).to(device)
    ours.fc1.load_state_dict(plain.fc1.state_dict())
    torch.testing.assert_close(ours(x), plain.fc2(plain.relu(plain.fc1(x) * 2)))


def test_a_patched_forward_takes_effect(device: str) -> None:
    model, x = SimpleNN(6, 8, 4).to(device), torch.randn(5, 6, device=device)
    right = model.fc2(torch.sigmoid(model.fc1(x)))
    model.relu.forward = torch.sigmoid
    torch.testing.assert_close(model(x), right)


class Tripled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value * 3


REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by hooks": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm by hooks": nn.utils.spectral_norm,
    "a weight of one's own": lambda fc: parametrize.register_parametrization(fc, "weight", Tripled()),
    "a bias of one's own": lambda fc: parametrize.register_parametrization(fc, "bias", Tripled()),
    "pruned weights": lambda fc: prune.l1_unstructured(fc, "weight", 0.3),
    "pruned rows": lambda fc: prune.ln_structured(fc, "weight", 0.5, n=2, dim=0),
    "pruned biases": lambda fc: prune.l1_unstructured(fc, "bias", 0.5),
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRIZATIONS)
def test_reparametrized_layers_stay_fused(name: str, device: str) -> None:
    """A class made at run time, or a pre-hook that sets the weight: neither sees the ReLU."""
    x, results = torch.randn(5, 6, device=device), []
    for model, original in zip(pair(device, 6, 8, 4), pair(device, 6, 8, 4), strict=True):
        for layer in (model.fc1, model.fc2):
            torch.manual_seed(0)  # spectral_norm starts from a random vector
            REPARAMETRIZATIONS[name](layer)
        assert not torch.allclose(model(x), original(x)) or "weight_norm" in name
        results.append([step(model, x) for _ in range(2)])
    assert len(results[0][0][2]) >= 4
    torch.testing.assert_close(*results)


def test_parametrizations_and_pruning_end(device: str) -> None:
    """With the values they had, and the parameters' own names."""
    ours, plain = pair(device, 6, 8, 4)
    x = torch.randn(5, 6, device=device)
    for model in (ours, plain):
        parametrize.register_parametrization(model.fc1, "weight", Tripled())
        prune.l1_unstructured(model.fc2, "weight", 0.3)
        with parametrize.cached():
            cached = step(model, x)[0]
        parametrize.remove_parametrizations(model.fc1, "weight")
        prune.remove(model.fc2, "weight")
        torch.testing.assert_close(model(x), cached)
    assert type(ours.fc1) is Linear
    assert ours.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(step(ours, x), step(plain, x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_relu_module(bias: bool, device: str) -> None:
    module = LinearReLU(6, 4, bias).to(device)
    plain = nn.Linear(6, 4, bias).to(device)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 6, device=device)
    torch.testing.assert_close(module(x), torch.relu(plain(x)))
    assert isinstance(module, nn.Linear)


def saved(value: Any, weights_only: bool) -> Any:
    """What torch.load reads of what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "SimpleNN": (lambda: SimpleNN(6, 8, 4), ()),
    "SimpleNN, no bias": (lambda: SimpleNN(6, 8, 4, bias=False), ()),
    "LinearReLU": (lambda: LinearReLU(6, 4), ()),
    "CrossEntropyLoss": (lambda: CrossEntropyLoss(torch.rand(6), ignore_index=1), (torch.arange(5),)),
    "LinearCrossEntropyLoss": (
        lambda: LinearCrossEntropyLoss(6, 5, weight=torch.rand(5), chunk_rows=2),
        (torch.arange(5),),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_copies(name: str, device: str) -> None:
    """Each computes what the original does, and shares nothing with it."""
    make, targets = MODULES[name]
    model, x = make().to(device), torch.randn(5, 6, device=device)
    targets = tuple(target.to(device) for target in targets)

    def of(module: nn.Module) -> Any:
        wrapped = nn.Module()
        wrapped.module, wrapped.forward = module, lambda x: module(x, *targets)
        return step(wrapped, x)

    right = of(model)
    other = make().to(device)
    other.load_state_dict(saved(model.state_dict(), weights_only=True))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model, weights_only=False), other]  # noqa: S301
    for copied in copies:
        assert type(copied) is type(model)
        torch.testing.assert_close(of(copied), right, rtol=0, atol=0)
        with torch.no_grad():
            for value in copied.state_dict().values():
                value.zero_()
    torch.testing.assert_close(of(model), right, rtol=0, atol=0)


def test_a_module_moves_between_dtypes(device: str) -> None:
    """The same one, its launches of the last dtype remembered; PyTorch's moves along."""
    ours, plain = pair("cpu", 6, 8, 4)
    x = torch.randn(2, 5, 6, device=device)
    for convert, dtype, tolerance in (
        (lambda model: model.to(device), torch.float32, {}),
        (nn.Module.double, torch.float64, {}),
        (nn.Module.half, torch.float16, {"rtol": 2e-3, "atol": 2e-3}),
        (lambda model: model.to(device, torch.bfloat16), torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2}),
        (nn.Module.float, torch.float32, {}),
    ):
        results = [step(convert(model), x.to(dtype)) for model in (ours, plain)]
        assert {value.dtype for value in (*results[0][:2], *results[0][2].values())} == {dtype}
        torch.testing.assert_close(*results, **tolerance)


@pytest.mark.gpu
def test_a_module_moves_to_the_gpu_and_back() -> None:
    model, x = SimpleNN(6, 8, 4), torch.randn(5, 6)
    right = model(x)
    with strict():
        torch.testing.assert_close(model.to("cuda")(x.cuda()).cpu(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.to("cpu")(x), right, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors_have_shapes_and_gradients(name: str) -> None:
    make, targets = MODULES[name]
    real, x = make(), torch.randn(5, 6, dtype=torch.bfloat16, requires_grad=True)
    real.bfloat16()
    meta, meta_x = copy.deepcopy(real).to("meta"), x.to("meta").detach().requires_grad_()
    results = [
        (module(x, *(target.to(x.device) for target in targets)), x, *module.parameters())
        for module, x in ((real, x), (meta, meta_x))
    ]
    for outputs in results:
        outputs[0].sum().backward()
    right, seen = (
        [(value.shape, value.dtype, value.stride()) for value in (outputs[0], *(leaf.grad for leaf in outputs[1:]))]
        for outputs in results
    )
    assert seen == right
    assert results[1][0].is_meta
    assert all(leaf.grad.is_meta for leaf in results[1][1:])


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_model_built_on_meta(how: str, device: str) -> None:
    """Large models start so: shapes first, the values from a checkpoint."""
    _, plain = pair(device, 6, 8, 4)
    with torch.device("meta"):
        model = SimpleNN(6, 8, 4)
        shape = model(torch.empty(2, 5, 6)).shape
    if how == "to_empty":
        model.to_empty(device=device)
    model.load_state_dict(plain.state_dict(), assign=how == "assign")
    x = torch.randn(2, 5, 6, device=device)
    torch.testing.assert_close(step(model, x), step(plain, x))
    assert model(x).shape == shape


class TestCrossEntropyLoss:
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_is_nn_cross_entropy_loss(self, reduction: str, device: str) -> None:
        ours = CrossEntropyLoss(ignore_index=1, reduction=reduction, label_smoothing=0.1)
        theirs = nn.CrossEntropyLoss(ignore_index=1, reduction=reduction, label_smoothing=0.1)
        assert isinstance(ours, nn.CrossEntropyLoss)
        assert repr(ours) == repr(theirs)
        x, target = torch.randn(5, 4, device=device), torch.tensor([0, 1, 2, 3, 1], device=device)
        torch.testing.assert_close(ours(x, target), theirs(x, target))
        assert "Triton" in explain(ours, x, target)[0].implementation

    def test_weight_is_a_buffer(self, device: str) -> None:
        """So it moves with the module and is in the state dict, as PyTorch's."""
        ours, theirs = CrossEntropyLoss(weight=torch.rand(4)), nn.CrossEntropyLoss(weight=torch.rand(4))
        theirs.load_state_dict(ours.state_dict())
        x, target = torch.randn(5, 4, 3, device=device).double(), torch.zeros(5, 3, dtype=torch.int64, device=device)
        ours, theirs = ours.to(device).double(), theirs.to(device).double()
        assert [name for name, _ in ours.named_buffers()] == ["weight"]
        torch.testing.assert_close(ours(x, target), theirs(x, target))
        torch.testing.assert_close(ours(x, x.softmax(1)), theirs(x, x.softmax(1)))


class TestLinearCrossEntropyLoss:
    @pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="new in torch 2.13")
    def test_is_nn_linear_cross_entropy_loss(self, device: str) -> None:
        arguments = {"bias": True, "reduction": "sum", "ignore_index": 1, "label_smoothing": 0.1, "device": device}
        ours, theirs = LinearCrossEntropyLoss(6, 4, **arguments), nn.LinearCrossEntropyLoss(6, 4, **arguments)
        assert isinstance(ours, nn.LinearCrossEntropyLoss)
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        x, target = torch.randn(25, 6, device=device), torch.arange(25, device=device) % 4
        assert "Triton" in explain(ours, x, target)[0].implementation
        losses = [module(x, target) for module in (ours, theirs)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)

    def test_without_the_base_of_torch_2_13(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As with an older PyTorch: the same module on the base of all weighted losses."""
        monkeypatch.delattr(nn, "LinearCrossEntropyLoss", raising=False)
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
        older = importlib.util.module_from_spec(importlib.util.find_spec("fusednn.modules"))
        older.__spec__.loader.exec_module(older)
        criterion = older.LinearCrossEntropyLoss(6, 4, out_features=(3,), weight=torch.rand(4))
        x, target = torch.randn(5, 6), torch.randint(0, 4, (5, 3))
        right = torch.nn.functional.cross_entropy(criterion.linear(x).reshape(5, 4, 3), target, criterion.weight)
        torch.testing.assert_close(criterion(x, target), right)
        assert list(criterion.state_dict()) == ["weight", "linear.weight"]

    def test_wrong_arguments(self) -> None:
        with pytest.raises(RuntimeError, match=r"expected weight shape to be \(4,\), got \(3,\)"):
            LinearCrossEntropyLoss(6, 4, weight=torch.ones(3))
        with pytest.raises(RuntimeError, match=r"label_smoothing to be in range \[0, 1\], got 1.5"):
            LinearCrossEntropyLoss(6, 4, label_smoothing=1.5)
        with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
            LinearCrossEntropyLoss(6, 4, chunk_rows=0)(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))


def test_signatures_follow_torch() -> None:
    """Also the order and the defaults; linear_cross_entropy and its module have chunk_rows besides."""

    def parameters(of: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.default, p.kind) for p in inspect.signature(of).parameters.values()]

    assert parameters(functional.cross_entropy) == parameters(torch.nn.functional.cross_entropy)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        extra = [("chunk_rows", None, inspect.Parameter.KEYWORD_ONLY)]
        theirs = parameters(torch.nn.functional.linear_cross_entropy)
        assert parameters(functional.linear_cross_entropy) == theirs + extra
        assert parameters(LinearCrossEntropyLoss) == parameters(nn.LinearCrossEntropyLoss) + extra


SCRIPTED: dict[str, Callable[[], nn.Module]] = {
    "SimpleNN": lambda: SimpleNN(8, 6, 3),
    "SimpleNN, GELU": lambda: with_relu(SimpleNN(8, 6, 3), nn.GELU()),
    "Linear": lambda: Linear(8, 3),
    "LinearReLU": lambda: LinearReLU(8, 3, bias=False),
    "within": lambda: nn.Sequential(LinearReLU(8, 6), Linear(6, 3)),
    "fused Sequential": lambda: fuse(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))),
    "fused functions": lambda: fuse(Functional()),
    "fused modules": lambda: fuse(reference.SimpleNN(8, 6, 3)),
}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return y


def with_relu(model: SimpleNN, activation: nn.Module) -> SimpleNN:
    model.relu = activation
    return model


@pytest.mark.parametrize("name", SCRIPTED)
def test_a_script_is_that_of_the_plain_modules(name: str) -> None:
    model, x = SCRIPTED[name](), torch.randn(5, 8)
    expected = model(x)
    script = torch.jit.script(model)
    torch.testing.assert_close(script(x), expected)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(script.state_dict(), model.state_dict())
    script(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # they are the same


def test_a_scripted_loss() -> None:
    criterion = CrossEntropyLoss(weight=torch.rand(3), label_smoothing=0.1, reduction="sum")
    x, target = torch.randn(5, 3), torch.randint(3, (5,))
    torch.testing.assert_close(torch.jit.script(criterion)(x, target), criterion(x, target))


class Tanh(SimpleNN):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return y


def test_a_script_of_a_subclass_is_that_of_its_own_forward() -> None:
    model, x = Tanh(6, 7, 5), torch.randn(3, 6)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
