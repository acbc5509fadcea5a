"""fusednn.functional.linear and linear_relu against torch.nn.functional: gradients, strides, autocast."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fusednn import explain, functional, strict
from fusednn.kernels import linear as kernels

SMALL = [(1, 1, 1), (3, 1, 17), (17, 3, 1), (1, 17, 3), (2, 17, 3)]
LARGE = [(33, 65, 130), (65, 130, 33), (130, 33, 65), (1, 130, 33), (65, 3, 130)]
NEEDS = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]


def leaves(m: int, n: int, k: int, device: str, needs: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    """x, W and b in float64, away from the ReLU's kink as far as chance allows."""
    shapes = ((m, k), (n, k), (n,))
    pairs = zip(shapes, needs, strict=True)
    return [torch.randn(s, dtype=torch.float64, device=device).requires_grad_(need) for s, need in pairs]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("operation", [functional.linear_relu, functional.linear])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_gradcheck(shape: tuple[int, int, int], operation: Callable[..., Tensor], bias: bool, device: str) -> None:
    x, w, b = leaves(*shape, device)
    assert gradcheck(operation, (x, w, b if bias else None))


@pytest.mark.slow
def test_gradcheck_in_full_at_17(device: str) -> None:
    assert gradcheck(functional.linear_relu, leaves(17, 17, 17, device))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_gradcheck_fast(shape: tuple[int, int, int], bias: bool, device: str) -> None:
    x, w, b = leaves(*shape, device)
    assert gradcheck(functional.linear_relu, (x, w, b if bias else None), fast_mode=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", [(33, 17, 65), pytest.param((65, 130, 33), marks=pytest.mark.slow)], ids=str)
def test_gradcheck_fast_over_many_programs(shape: tuple[int, int, int], device: str) -> None:
    assert gradcheck(functional.linear_relu, leaves(*shape, device), fast_mode=True)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_gradcheck_of_each_subset(needs: tuple[bool, ...], device: str) -> None:
    assert gradcheck(functional.linear_relu, leaves(3, 3, 2, device, needs))
    assert gradgradcheck(functional.linear_relu, leaves(3, 5, 4, device, needs), fast_mode=True)


@pytest.mark.parametrize("operation", [functional.linear_relu, functional.linear])
def test_gradgradcheck(operation: Callable[..., Tensor], device: str) -> None:
    x, w, b = leaves(2, 3, 2, device)
    assert gradgradcheck(operation, (x, w, b))
    x, w, b = leaves(17, 5, 3, device)
    assert gradgradcheck(operation, (x, w, b), fast_mode=True)
    assert gradgradcheck(operation, (x, w, None), fast_mode=True)


def test_third_derivative(device: str) -> None:
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
def test_against_nn_linear(shape: tuple[int, int, int], bias: bool, device: str) -> None:
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
def test_views(operand: str, view: str, device: str) -> None:
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


def test_incoming_gradients_of_real_programs(device: str) -> None:
    """`.sum()` sends strides (0, 0), `torch.cat` a view, `.t()` a transposed one."""
    for use in (torch.sum, lambda y: torch.cat([y, y], 1).pow(2).sum(), lambda y: y.t().contiguous().pow(3).sum()):
        x, w, b = leaves(17, 5, 3, device)
        results = []
        for operation in (functional.linear_relu, lambda *a: torch.relu(F.linear(*a))):
            results.append(torch.autograd.grad(use(operation(x, w, b)), (x, w, b)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 1, 3, 4), (0, 4), (3, 0, 4)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    _, w, b = leaves(1, 5, 4, device)
    y, right = functional.linear_relu(x, w, b), torch.relu(F.linear(x, w, b))
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, w, b)), torch.autograd.grad(right.sum(), (x, w, b)))


def test_an_infinity_that_no_gradient_asked_for_meets(device: str) -> None:
    """The derivative of db alone by dy: dW's part is absent, not zeros times the infinity in x."""
    x, w, b = leaves(4, 3, 5, device)
    with torch.no_grad():
        x[0, 0] = float("inf")
    results = []
    for operation in (functional.linear_relu, lambda *a: torch.relu(F.linear(*a))):
        y = operation(x, w, b)
        sent = torch.ones_like(y, requires_grad=True)
        _, db = torch.autograd.grad(y, (w, b), sent, create_graph=True)
        results.append(torch.autograd.grad(db.pow(2).sum(), sent)[0])
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results)


def test_explain_tells_of_a_copy(device: str) -> None:
    """Leading dimensions that are no one dimension in memory; others become rows as they are."""
    w = torch.randn(5, 4, device=device)
    for x, copied in (
        (torch.randn(2, 3, 4, device=device), False),
        (torch.randn(4, 2, 3, device=device).movedim(0, -1), False),
        (torch.randn(2, 1, 3, 4, device=device)[:, :, ::2], True),
        (torch.randn(3, 2, 4, device=device).transpose(0, 1), True),
        (torch.randn(3, 1, 4, device=device).transpose(0, 1), False),
    ):
        assert ("copied" in str(explain(functional.linear, x, w))) == copied
        assert (x.flatten(0, -2).data_ptr() != x.data_ptr()) == copied


def test_backward_twice(device: str) -> None:
    x, w, b = leaves(17, 5, 3, device)
    y = functional.linear_relu(x, w, b).sum()
    first = torch.autograd.grad(y, (x, w, b), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, (x, w, b)), first, rtol=0, atol=0)


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of three sizes above 8 are PyTorch's."""
    monkeypatch.setattr(kernels, "LIBRARY_SIZE", 8)


@pytest.mark.usefixtures("small_library")
@pytest.mark.parametrize("operation", [functional.linear_relu, functional.linear])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_large_products_are_the_librarys(
    operation: Callable[..., Tensor], bias: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same derivatives of every order, no kernel of ours but for a bias alone, and explain says so."""
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", None)  # nothing may call it
    x, w, b = leaves(11, 10, 9, device)
    arguments = (x, w, b if bias else None)
    assert gradcheck(operation, arguments, fast_mode=True)
    assert gradgradcheck(operation, arguments, fast_mode=True)
    for needs in NEEDS:
        x, w, b = leaves(11, 10, 9, device, needs)
        monkeypatch.setattr(kernels, "launch", launch if needs[1:] == (False, True) else None)
        operands = [tensor for tensor in (x, w, b) if tensor.requires_grad]
        y, right = operation(x, w, b), F.linear(x, w, b)
        right = torch.relu(right) if operation is functional.linear_relu else right
        torch.testing.assert_close(y, right)
        sent = torch.ones_like(y[:, :1]).expand_as(y)
        torch.testing.assert_close(torch.autograd.grad(y, operands, sent), torch.autograd.grad(right, operands, sent))
    with strict():
        (decision,) = explain(operation, x[None], w, b)
    assert decision.implementation == ("cuBLAS" if device == "cuda" else "PyTorch's library")
    assert decision.operation == operation.__name__


@pytest.mark.usefixtures("small_library")
def test_the_library_keeps_nan_and_the_dtype(device: str) -> None:
    """The gradient passes where the output is NaN, and a backward under autocast does not change dtypes."""
    x, w, b = (tensor.detach().float().requires_grad_() for tensor in leaves(11, 10, 9, device))
    with torch.no_grad():
        x[3, 2] = float("nan")
    y, right = functional.linear_relu(x, w, b), torch.relu(F.linear(x, w, b))
    torch.testing.assert_close(y, right, equal_nan=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        grads = torch.autograd.grad(y.nan_to_num(0).sum(), (x, w, b))
    wanted = torch.autograd.grad(right.nan_to_num(0).sum(), (x, w, b))
    torch.testing.assert_close(grads, wanted, equal_nan=True)


def test_which_products_are_the_librarys() -> None:
    """Only those that are large in every size."""
    large = kernels.LIBRARY_SIZE + 1
    assert kernels.is_library(large, large, large)
    assert not any(kernels.is_library(*sizes) for sizes in itertools.permutations((large - 1, large, large)))


def test_what_pytorch_takes_and_no_kernel_does(device: str) -> None:
    """A bias of one element, a weight without rows of its own: PyTorch serves, with the same values."""
    x, w, b = (tensor.detach() for tensor in leaves(4, 5, 3, device))
    for arguments in ((x, w, b[:1]), (x, w, b[0]), (x, w[0]), (x.to(torch.complex128), w.to(torch.complex128))):
        torch.testing.assert_close(functional.linear(*arguments), F.linear(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
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
