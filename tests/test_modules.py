"""The modules against torch.nn's: parameters, state dicts, training, and what a user hooks or replaces."""

import copy
import importlib
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusednn import (
    CrossEntropyLoss,
    Linear,
    LinearCrossEntropyLoss,
    LinearReLU,
    SimpleNN,
    explain,
    functional,
    reference,
)


def pair(device: str, *sizes: int) -> tuple[SimpleNN, reference.SimpleNN]:
    """Ours and PyTorch's, made from the same seed."""
    torch.manual_seed(3)
    ours = SimpleNN(*sizes).to(device)
    torch.manual_seed(3)
    return ours, reference.SimpleNN(*sizes).to(device)


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


def test_weight_norm_stays_fused(device: str) -> None:
    ours, plain = pair(device, 6, 8, 4)
    for model in (ours, plain):
        nn.utils.parametrizations.weight_norm(model.fc1)
    x = torch.randn(5, 6, device=device)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_relu_module(bias: bool, device: str) -> None:
    module = LinearReLU(6, 4, bias).to(device)
    plain = nn.Linear(6, 4, bias).to(device)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 6, device=device)
    torch.testing.assert_close(module(x), torch.relu(plain(x)))
    assert isinstance(module, nn.Linear)


def test_copies(device: str) -> None:
    model, x = SimpleNN(6, 8, 4, bias=False, device=device), torch.randn(5, 6, device=device)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):  # noqa: S301
        torch.testing.assert_close(other(x), model(x))
    assert model.half()(x.half()).dtype == torch.float16
    assert SimpleNN(6, 8, 4, device="meta", dtype=torch.bfloat16)(torch.empty(5, 6, device="meta").bfloat16()).is_meta


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
