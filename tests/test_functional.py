"""fusednn.functional against torch.nn.functional: gradients, arguments, refusals."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fusednn import functional
from tests.accuracy import DTYPES

SMALL = [(1, 1, 1), (3, 1, 17), (17, 3, 1), (1, 17, 3), (2, 17, 3)]
LARGE = [(33, 65, 130), (65, 130, 33), (130, 33, 65), (1, 130, 33), (65, 3, 130)]
NEEDS = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]
REDUCTIONS = ["none", "mean", "sum"]


def leaves(m: int, n: int, k: int, device: str, needs: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    """x, W and b in float64, away from the ReLU's kink as far as chance allows."""
    shapes = ((m, k), (n, k), (n,))
    pairs = zip(shapes, needs, strict=True)
    return [torch.randn(s, dtype=torch.float64, device=device).requires_grad_(need) for s, need in pairs]


class TestLinear:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("operation", [functional.linear_relu, functional.linear])
    @pytest.mark.parametrize("shape", SMALL, ids=str)
    def test_gradcheck(
        self, shape: tuple[int, int, int], operation: Callable[..., Tensor], bias: bool, device: str
    ) -> None:
        x, w, b = leaves(*shape, device)
        assert gradcheck(operation, (x, w, b if bias else None))

    @pytest.mark.slow
    def test_gradcheck_in_full_at_17(self, device: str) -> None:
        assert gradcheck(functional.linear_relu, leaves(17, 17, 17, device))

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("shape", LARGE, ids=str)
    def test_gradcheck_fast(self, shape: tuple[int, int, int], bias: bool, device: str) -> None:
        x, w, b = leaves(*shape, device)
        assert gradcheck(functional.linear_relu, (x, w, b if bias else None), fast_mode=True)

    @pytest.mark.usefixtures("small_tiles")
    @pytest.mark.parametrize("shape", [(33, 17, 65), pytest.param((65, 130, 33), marks=pytest.mark.slow)], ids=str)
    def test_gradcheck_fast_over_many_programs(self, shape: tuple[int, int, int], device: str) -> None:
        assert gradcheck(functional.linear_relu, leaves(*shape, device), fast_mode=True)

    @pytest.mark.parametrize("needs", NEEDS, ids=str)
    def test_gradcheck_of_each_subset(self, needs: tuple[bool, ...], device: str) -> None:
        assert gradcheck(functional.linear_relu, leaves(3, 3, 2, device, needs))
        assert gradgradcheck(functional.linear_relu, leaves(3, 5, 4, device, needs), fast_mode=True)

    @pytest.mark.parametrize("operation", [functional.linear_relu, functional.linear])
    def test_gradgradcheck(self, operation: Callable[..., Tensor], device: str) -> None:
        x, w, b = leaves(2, 3, 2, device)
        assert gradgradcheck(operation, (x, w, b))
        x, w, b = leaves(17, 5, 3, device)
        assert gradgradcheck(operation, (x, w, b), fast_mode=True)
        assert gradgradcheck(operation, (x, w, None), fast_mode=True)

    def test_third_derivative(self, device: str) -> None:
        def third(operation: Callable[..., Tensor]) -> Tensor:
            torch.manual_seed(1)
            x, w, b = leaves(4, 3, 5, device)
            value = operation(x, w, b).pow(4).sum()
            for _ in range(3):
                (value,) = torch.autograd.grad(value.sum(), w, create_graph=True)
            return value

        torch.testing.assert_close(third(functional.linear_relu), third(lambda *a: torch.relu(F.linear(*a))))

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 3), (65, 130, 33)], ids=str)
    def test_against_nn_linear(self, shape: tuple[int, int, int], bias: bool, device: str) -> None:
        """Values and every gradient as nn.Linear and nn.ReLU have them."""
        m, n, k = shape
        module = nn.Linear(k, n, bias, device, torch.float64)
        x = torch.randn(m, k, dtype=torch.float64, device=device, requires_grad=True)
        inputs = (x, *module.parameters())
        dy = torch.randn(m, n, dtype=torch.float64, device=device)
        y, right = functional.linear_relu(x, module.weight, module.bias), nn.ReLU()(module(x))
        torch.testing.assert_close(y, right)
        torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(right, inputs, dy))

    @pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
    @pytest.mark.parametrize("operand", ["input", "gradient"])
    def test_views(self, operand: str, view: str, device: str) -> None:
        """Transposed, sliced and expanded inputs and incoming gradients against the reference."""

        def viewed(rows: int, columns: int) -> Tensor:
            if view == "transposed":
                return torch.randn(columns, rows, dtype=torch.float64, device=device).T
            if view == "sliced":
                return torch.randn(2 * rows, 3 * columns, dtype=torch.float64, device=device)[::2, 1::3]
            return torch.randn(rows, 1, dtype=torch.float64, device=device).expand(rows, columns)

        x, w, b = leaves(33, 17, 65, device)
        dy = torch.randn(33, 17, dtype=torch.float64, device=device)
        if operand == "input":
            x = viewed(33, 65).requires_grad_()
            w = viewed(17, 65).requires_grad_()
        else:
            dy = viewed(33, 17)
        y, right = functional.linear_relu(x, w, b), torch.relu(F.linear(x, w, b))
        torch.testing.assert_close(y, right)
        torch.testing.assert_close(torch.autograd.grad(y, (x, w, b), dy), torch.autograd.grad(right, (x, w, b), dy))

    def test_incoming_gradients_of_real_programs(self, device: str) -> None:
        """`.sum()` sends strides (0, 0), `torch.cat` a view, `.t()` a transposed one."""
        for use in (torch.sum, lambda y: torch.cat([y, y], 1).pow(2).sum(), lambda y: y.t().contiguous().pow(3).sum()):
            x, w, b = leaves(17, 5, 3, device)
            results = []
            for operation in (functional.linear_relu, lambda *a: torch.relu(F.linear(*a))):
                results.append(torch.autograd.grad(use(operation(x, w, b)), (x, w, b)))
            torch.testing.assert_close(*results)

    @pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 1, 3, 4), (0, 4), (3, 0, 4)], ids=str)
    def test_leading_dimensions(self, shape: tuple[int, ...], device: str) -> None:
        x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        _, w, b = leaves(1, 5, 4, device)
        y, right = functional.linear_relu(x, w, b), torch.relu(F.linear(x, w, b))
        torch.testing.assert_close(y, right)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, w, b)), torch.autograd.grad(right.sum(), (x, w, b)))

    def test_backward_twice(self, device: str) -> None:
        x, w, b = leaves(17, 5, 3, device)
        y = functional.linear_relu(x, w, b).sum()
        first = torch.autograd.grad(y, (x, w, b), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(y, (x, w, b)), first, rtol=0, atol=0)

    def test_what_pytorch_takes_and_no_kernel_does(self, device: str) -> None:
        """A bias of one element, a weight without rows of its own: PyTorch serves, with the same values."""
        x, w, b = (tensor.detach() for tensor in leaves(4, 5, 3, device))
        for arguments in ((x, w, b[:1]), (x, w, b[0]), (x, w[0]), (x.to(torch.complex128), w.to(torch.complex128))):
            torch.testing.assert_close(functional.linear(*arguments), F.linear(*arguments))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, dtype: torch.dtype, device: str) -> None:
        x, w, b = (tensor.detach().float().requires_grad_() for tensor in leaves(5, 4, 3, device))
        with torch.autocast(device, dtype=dtype):
            y, right = functional.linear_relu(x, w, b), torch.relu(F.linear(x, w, b))
            assert functional.linear(x.double(), w.double(), b.double()).dtype == torch.float64
            with torch.autocast(device, enabled=False):
                assert functional.linear(x, w, b).dtype == torch.float32
        torch.testing.assert_close(y, right)
        (dw,) = torch.autograd.grad(y.sum(), w)
        assert dw.dtype == torch.float32
        torch.testing.assert_close(dw, torch.autograd.grad(right.sum(), w)[0], rtol=2e-2, atol=2e-2)


class TestCrossEntropy:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 17), (17, 3)], ids=str)
    def test_gradcheck(self, shape: tuple[int, int], smoothing: float, reduction: str, device: str) -> None:
        x, target = self.batch(*shape, device)

        def loss(x: Tensor) -> Tensor:
            return functional.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing)

        assert gradcheck(loss, x)

    @pytest.mark.usefixtures("small_tiles")
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("shape", [(33, 3), (17, 33), (3, 65)], ids=str)
    def test_gradcheck_fast_over_many_programs(self, shape: tuple[int, int], reduction: str, device: str) -> None:
        x, target = self.batch(*shape, device)

        def loss(x: Tensor) -> Tensor:
            return functional.cross_entropy(x, target, reduction=reduction, label_smoothing=0.2)

        assert gradcheck(loss, x, fast_mode=True)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_gradgradcheck(self, smoothing: float, reduction: str, device: str) -> None:
        x, target = self.batch(4, 3, device)

        def loss(x: Tensor) -> Tensor:
            return functional.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing)

        assert gradgradcheck(loss, x)

    @staticmethod
    def batch(m: int, c: int, device: str) -> tuple[Tensor, Tensor]:
        """Logits in float64 that require grad, and labels of which all but the first may be ignored."""
        target = torch.randint(0, c, (m,), device=device)
        target[1::3] = -100
        return torch.randn(m, c, dtype=torch.float64, device=device, requires_grad=True), target

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    @pytest.mark.parametrize("ignored", [-100, 2])
    def test_against_nn_cross_entropy_loss(self, reduction: str, smoothing: float, ignored: int, device: str) -> None:
        x, target = self.batch(33, 5, device)
        ours = functional.cross_entropy(
            x, target.where(target >= 0, ignored), None, None, ignored, None, reduction, smoothing
        )
        theirs = nn.CrossEntropyLoss(ignore_index=ignored, reduction=reduction, label_smoothing=smoothing)(
            x, target.where(target >= 0, ignored)
        )
        dloss = torch.randn_like(theirs)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x, dloss), torch.autograd.grad(theirs, x, dloss))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_incoming_gradients(self, reduction: str, device: str) -> None:
        """One, another scalar, a vector, an expanded one; and the same again through a retained graph."""
        x, target = self.batch(9, 5, device)
        ours = functional.cross_entropy(x, target, reduction=reduction)
        theirs = F.cross_entropy(x, target, reduction=reduction)
        one = torch.ones((), dtype=x.dtype, device=device)
        sent = [one.expand_as(theirs), (one * 3).expand_as(theirs), torch.randn_like(theirs)]
        for dloss in (*sent, *sent):
            right = torch.autograd.grad(theirs, x, dloss, retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(ours, x, dloss, retain_graph=True), right)
        right = torch.autograd.grad(theirs, x, sent[1])
        torch.testing.assert_close(torch.autograd.grad(ours, x, sent[1]), right)

    def test_batched_gradients(self, device: str) -> None:
        x, target = self.batch(4, 5, device)
        eye = torch.eye(4, dtype=x.dtype, device=device)
        both = [
            torch.autograd.grad(operation(x, target, reduction="none"), x, eye, is_grads_batched=True)
            for operation in (functional.cross_entropy, F.cross_entropy)
        ]
        torch.testing.assert_close(*both)

    def test_the_logits_can_be_used_again(self, device: str) -> None:
        """Nothing is written to the caller's tensors, nor does the gradient buffer show up anywhere."""
        x, target = self.batch(9, 5, device)
        h = torch.tanh(x)
        total = functional.cross_entropy(h, target) * 2 + h.pow(2).sum() + functional.cross_entropy(h, target) * 3
        right = F.cross_entropy(h, target) * 5 + h.pow(2).sum()
        (grad,) = torch.autograd.grad(total, x, retain_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(right, x)[0])

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_first_and_second_derivative_in_one_backward(self, reduction: str, device: str) -> None:
        """The last backward, which may scale the saved gradient in place, also reads it for the second derivative."""
        x, target = self.batch(4, 3, device)
        results = []
        for operation in (functional.cross_entropy, F.cross_entropy):
            loss = operation(x, target, reduction=reduction)
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            results.append(torch.autograd.grad(3 * loss + g.pow(2).sum(), x)[0])
        torch.testing.assert_close(*results)

    def test_a_graph_of_the_gradient_keeps_it(self, device: str) -> None:
        x, target = self.batch(4, 3, device)
        c, results = torch.randn_like(x), []
        for operation in (functional.cross_entropy, F.cross_entropy):
            a = torch.ones((), dtype=x.dtype, device=device, requires_grad=True)
            loss = operation(x, target)
            (g,) = torch.autograd.grad(a * loss, x, create_graph=True)
            torch.autograd.grad(loss, x, torch.full_like(loss, 3.0))
            results.append(torch.autograd.grad((g.detach() * 0 + g * c).sum(), a)[0])
        torch.testing.assert_close(*results)

    def test_the_gradient_has_no_graph(self, device: str) -> None:
        x, target = self.batch(4, 3, device)
        (grad,) = torch.autograd.grad(2 * functional.cross_entropy(x, target), x)
        assert not grad.requires_grad
        assert grad.is_leaf

    def test_uint8_labels_and_a_graph(self, device: str) -> None:
        x = torch.randn(3, 200, dtype=torch.float64, device=device, requires_grad=True)
        target = torch.tensor([156, 3, 199], dtype=torch.uint8, device=device)
        both = [
            torch.autograd.grad(operation(x, target), x, create_graph=True)[0]
            for operation in (functional.cross_entropy, F.cross_entropy)
        ]
        torch.testing.assert_close(*both)

    def test_a_lazily_negated_input(self, device: str) -> None:
        x = torch.randn(4, 3, dtype=torch.complex128, device=device).conj().imag
        assert x.is_neg()
        w, target = torch.randn(5, 3, dtype=torch.float64, device=device), torch.tensor([0, 1, 2, 0], device=device)
        torch.testing.assert_close(functional.linear_relu(x, w), torch.relu(F.linear(x, w)))
        torch.testing.assert_close(functional.cross_entropy(x, target), F.cross_entropy(x, target))

    def test_a_hook_on_saved_tensors_sees_no_change(self, device: str) -> None:
        x, target = self.batch(9, 5, device)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = functional.cross_entropy(x, target) * 3
        before = [tensor.clone() for tensor in kept]
        loss.backward()
        assert all(torch.equal(tensor, old) for tensor, old in zip(kept, before, strict=True))
        assert kept

    def test_no_gradient_is_computed_without_need(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from fusednn.kernels import cross_entropy as kernels

        seen: list[bool] = []
        plan = kernels.plan_forward
        monkeypatch.setattr(kernels, "plan_forward", lambda *a: seen.append(a[-1]) or plan(*a))
        x, target = self.batch(4, 3, device)
        functional.cross_entropy(x, target)
        functional.cross_entropy(x.detach(), target)
        with torch.no_grad():
            functional.cross_entropy(x, target)
        assert seen == [True, False, False]

    def test_unbatched(self, device: str) -> None:
        x, target = torch.randn(5, device=device, requires_grad=True), torch.tensor(3, device=device)
        for reduction in REDUCTIONS:
            ours, theirs = (f(x, target, reduction=reduction) for f in (functional.cross_entropy, F.cross_entropy))
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))

    @pytest.mark.filterwarnings("ignore:size_average and reduce args")
    def test_legacy_arguments(self, device: str) -> None:
        x, target = self.batch(4, 3, device)
        for average, reduce in ((True, None), (False, None), (None, False), (True, True)):
            ours, theirs = (
                f(x, target, size_average=average, reduce=reduce) for f in (functional.cross_entropy, F.cross_entropy)
            )
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_gives_float32(self, dtype: torch.dtype, device: str) -> None:
        x, target = (
            torch.randn(4, 3, device=device).to(dtype).requires_grad_(),
            torch.tensor([0, 1, 2, 0], device=device),
        )
        with torch.autocast(device, dtype=dtype):
            loss, right = functional.cross_entropy(x, target), F.cross_entropy(x, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(right, x))

    def test_unfinished_arguments_are_named(self, device: str) -> None:
        x, target = self.batch(4, 3, device)
        with pytest.raises(NotImplementedError, match="weight"):
            functional.cross_entropy(x, target, weight=torch.ones(3))
        with pytest.raises(NotImplementedError, match="class probabilities"):
            functional.cross_entropy(x, x.detach().softmax(1))
        with pytest.raises(NotImplementedError, match=r"K-dimensional.*\[4, 3, 2\]"):
            functional.cross_entropy(torch.randn(4, 3, 2, device=device), torch.zeros(4, 2, dtype=torch.int64))

    def test_label_out_of_range(self, device: str) -> None:
        x, target = self.batch(4, 3, device)
        target[2] = 3
        if device == "cpu":
            with pytest.raises(IndexError, match="Target 3 is out of bounds"):
                functional.cross_entropy(x, target)
        else:
            loss = functional.cross_entropy(x, target)
            assert loss.isnan()
            assert torch.autograd.grad(loss, x)[0].isnan().all(1).tolist() == [False, False, True, False]


def _calls() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Bad calls by name: the operation, its arguments, and its keyword arguments."""
    x, w, b = torch.randn(4, 9), torch.randn(5, 9), torch.randn(5)
    logits, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    return {
        "features": ("linear", (torch.randn(4, 8), w, b), {}),
        "features, unbatched": ("linear", (torch.randn(8), w, b), {}),
        "weight of another dtype": ("linear", (x, w.double(), b), {}),
        "bias of another dtype": ("linear", (x, w, b.double()), {}),
        "input of another dtype": ("linear", (x.bfloat16(), w, b), {}),
        "bias too short": ("linear", (x, w, b[:4]), {}),
        "0-d input": ("linear", (torch.tensor(1.0), w, b), {}),
        "3-d weight": ("linear", (x, w[None], b), {}),
        "list as weight": ("linear", (x, [1.0], b), {}),
        "list as input": ("linear", ([1.0], w, b), {}),
        "label too large": ("cross_entropy", (logits, torch.tensor([0, 10, 2, 3])), {}),
        "label negative": ("cross_entropy", (logits, torch.tensor([0, -1, 2, 3])), {}),
        "batch sizes": ("cross_entropy", (logits, target[:3]), {}),
        "target of one column": ("cross_entropy", (logits, target[:, None]), {}),
        "long target like the input": ("cross_entropy", (logits, torch.zeros(4, 10, dtype=torch.int64)), {}),
        "float labels": ("cross_entropy", (logits, target.float()), {}),
        "bool labels": ("cross_entropy", (logits, target.bool()), {}),
        "integer logits": ("cross_entropy", (logits.long(), target), {}),
        "reduction": ("cross_entropy", (logits, target), {"reduction": "avg"}),
        "no reduction": ("cross_entropy", (logits, target), {"reduction": None}),
        "smoothing": ("cross_entropy", (logits, target), {"label_smoothing": 1.1}),
        "target on another device": ("cross_entropy", (logits, target.to("meta")), {}),
        "list as target": ("cross_entropy", (logits, [0, 1, 2, 3]), {}),
        "bool ignore_index": ("cross_entropy", (logits, target), {"ignore_index": True}),
        "ignore_index past 64 bits": ("cross_entropy", (logits, target), {"ignore_index": 2**63}),
        "float ignore_index": ("cross_entropy", (logits, target), {"ignore_index": 1.5}),
        "0-d logits": ("cross_entropy", (torch.tensor(1.0), torch.tensor(0)), {}),
    }


def _outcome(call: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    with contextlib.suppress(AttributeError):
        try:
            return call(*arguments, **options)
        except Exception as error:
            return type(error), str(error)
    raise AssertionError("an AttributeError is nobody's answer to a bad argument")


@pytest.mark.parametrize("name", _calls())
def test_bad_calls_raise_what_pytorch_raises(name: str) -> None:
    operation, arguments, options = _calls()[name]
    right = _outcome(getattr(F, operation), arguments, options)
    assert isinstance(right, tuple), f"PyTorch accepts it: {right}"
    assert _outcome(getattr(functional, operation), arguments, options) == right
    if operation == "linear":
        assert _outcome(functional.linear_relu, arguments, options) == right


@pytest.mark.parametrize("operand", ["weight", "bias"])
def test_devices_differ(operand: str) -> None:
    """PyTorch itself reads whatever lies in memory where a CPU tensor meets a meta one."""
    arguments = {"input": torch.randn(4, 9), "weight": torch.randn(5, 9), "bias": torch.randn(5)}
    arguments[operand] = arguments[operand].to("meta")
    for operation in (functional.linear, functional.linear_relu):
        with pytest.raises(RuntimeError, match=f"same device.*input is on cpu.*{operand} is on meta"):
            operation(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_pytorchs_result_dtype(dtype: torch.dtype, device: str) -> None:
    x, w = torch.randn(4, 3, device=device).to(dtype), torch.randn(5, 3, device=device).to(dtype)
    y = functional.linear_relu(x, w)
    loss = functional.cross_entropy(y, torch.tensor([0, 1, 2, 3], device=device))
    assert y.dtype == loss.dtype == dtype
