"""The activations of the Triton kernels: values and slopes against 40 digits, and NaN and inf against PyTorch."""

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusednn.kernels import activations
from fusednn.kernels.launch import LaunchConfig, launch, plan
from fusednn.kernels.step import ACTIVATIONS, Activation

NUMBERS: dict[str, tuple[float, ...]] = {"leaky_relu": (0.25,), "elu": (0.75,), "softplus": (1.5, 20.0)}

PYTORCH: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z * 1.0,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}

COLUMNS = 16


@triton.jit
def activation_kernel(
    z_ptr, dh_ptr, h_ptr, dz_ptr, size, ACTIVATION: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Values of z and the gradient dz of dh, by tiles [BLOCK_N / COLUMNS, COLUMNS], or turned."""
    rows, columns = tl.arange(0, BLOCK_N // COLUMNS), tl.arange(0, COLUMNS)
    if TURNED:
        offs = tl.program_id(0) * BLOCK_N + columns[:, None] + rows[None, :] * COLUMNS
    else:
        offs = tl.program_id(0) * BLOCK_N + rows[:, None] * COLUMNS + columns[None, :]
    mask = offs < size
    z = tl.load(z_ptr + offs, mask=mask, other=0.0)
    h = activations.value(z, ACTIVATION)
    a = z if activations.reads_before(ACTIVATION.name, activations.BEFORE) else h
    dh = tl.load(dh_ptr + offs, mask=mask, other=0.0)
    tl.store(h_ptr + offs, h, mask=mask)
    tl.store(dz_ptr + offs, activations.times_slope(dh, activations.slope(a, ACTIVATION), ACTIVATION), mask=mask)


def run(name: str, z: Tensor, dh: Tensor | None = None, numbers: Any = None, turned: bool = False) -> list[Tensor]:
    """Values, and the gradient of dh: the slopes where that is left out."""
    numbers = NUMBERS.get(name, ()) if numbers is None else numbers
    dh = torch.ones_like(z) if dh is None else dh
    block = 4096
    flags = {"ACTIVATION": Activation(name, numbers), "TURNED": turned, "BLOCK_N": block, "COLUMNS": COLUMNS}
    h, dz = torch.empty_like(z), torch.empty_like(z)
    launch(activation_kernel, plan(-(-len(z) // block), LaunchConfig(1, block), **flags), z, dh, h, dz, len(z))
    return [h, dz]


def by_pytorch(name: str, z: Tensor, dh: Tensor | None = None, numbers: Any = None) -> list[Tensor]:
    """The same by PyTorch, one number at a time for its scalar code: the vector code has NaN at gelu(inf)."""
    numbers = NUMBERS.get(name, ()) if numbers is None else numbers
    results = []
    for i in range(len(z)):
        leaf = z[i : i + 1].clone().requires_grad_()
        h = PYTORCH[name](leaf, *numbers)
        h.backward(torch.ones_like(h) if dh is None else dh[i : i + 1])
        results.append((h.detach(), leaf.grad))
    return [torch.cat(part) for part in zip(*results, strict=True)]  # type: ignore[arg-type]


def arguments(dtype: torch.dtype) -> Tensor:
    """Dense around 0, wide, and of every size down to the subnormal ones."""
    tiny, most = (-44, 110.0) if dtype == torch.float32 else (-322, 760.0)
    dense, wide = torch.linspace(-12, 12, 801).double(), torch.linspace(-most, most, 301).double()
    sizes = torch.logspace(tiny, 1, 120, dtype=torch.float64)
    return torch.cat([dense, wide, sizes, -sizes]).to(dtype)


def exact(name: str, z: Any) -> tuple[Any, Any]:
    """Value and slope with 40 digits."""
    one, numbers = mpmath.mpf(1), NUMBERS.get(name, ())
    sigmoid = 1 / (1 + mpmath.exp(-z))
    if name == "identity":
        return z, one
    if name in ("relu", "leaky_relu"):
        return (z, one) if z > 0 else (z * sum(numbers), one * sum(numbers))
    if name == "elu":
        return (z, one) if z > 0 else (mpmath.expm1(z) * numbers[0], mpmath.exp(z) * numbers[0])
    if name == "gelu":
        below = mpmath.erfc(-z / mpmath.sqrt(2)) / 2
        return z * below, below + z * mpmath.exp(-z * z / 2) / mpmath.sqrt(2 * mpmath.pi)
    if name == "gelu_tanh":
        root, cube = mpmath.sqrt(8 / mpmath.pi), mpmath.mpf("0.044715")
        s = 1 / (1 + mpmath.exp(-root * (z + cube * z**3)))
        return z * s, s + z * s * (1 - s) * root * (1 + 3 * cube * z * z)
    if name == "silu":
        return z * sigmoid, sigmoid + z * sigmoid * (1 - sigmoid)
    if name == "tanh":
        return mpmath.tanh(z), mpmath.sech(z) ** 2
    if name == "sigmoid":
        return sigmoid, sigmoid * (1 - sigmoid)
    beta, threshold = numbers
    if z * beta > threshold:
        return z, one
    return mpmath.log1p(mpmath.exp(z * beta)) / beta, 1 / (1 + mpmath.exp(-z * beta))


def errors(results: Tensor, expected: list[Any], least: list[float]) -> Tensor:
    """In units in the last place of what is expected, or of `least` where that is larger."""
    info, found = torch.finfo(results.dtype), []
    smallest = mpmath.mpf(info.smallest_normal)
    for result, number, floor in zip(results.double().tolist(), expected, least, strict=True):
        exponent = mpmath.frexp(max(abs(number), floor, smallest))[1]
        found.append(abs(mpmath.mpf(result) - number) / (mpmath.mpf(2) ** (exponent - 1) * info.eps))
    return torch.tensor([float(error) for error in found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_errors(device: str, name: str, dtype: torch.dtype) -> None:
    """At most twice PyTorch's own, or 2 units in the last place: of all arguments, of those above -4, and of tiny ones.

    Below -4 PyTorch's value of GELU cancels. Near the root of a slope the units are those of 1/16.
    """
    z = arguments(dtype)
    leaf = z.clone().requires_grad_()
    value = PYTORCH[name](leaf, *NUMBERS.get(name, ()))
    theirs = value.detach(), torch.autograd.grad(value.sum(), leaf)[0]
    with mpmath.workdps(40):
        expected = [exact(name, mpmath.mpf(number)) for number in z.double().tolist()]
        root = [0.0625 if name in ("gelu", "gelu_tanh", "silu") and -2 < number < 0 else 0.0 for number in z.tolist()]
        for i, result in enumerate(run(name, z.to(device))):
            exactly, least = [pair[i] for pair in expected], root if i else [0.0] * len(z)
            ours, own = errors(result.cpu(), exactly, least), errors(theirs[i], exactly, least)
            for some in (z == z, z > -4, z.abs() < 1e-3):
                spare = 0.0 if device == "cpu" else 2.0  # a GPU divides with an error of as much
                assert ours[some].max() <= max(2 * own[some].max(), 2.0) + spare


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_corners(device: str, name: str, dtype: torch.dtype) -> None:
    """NaN and inf, also where PyTorch's formula overflows, and the slope at 0: as PyTorch's."""
    huge = 1e20 if dtype == torch.float32 else 1e200
    numbers = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), huge, -huge, 100.0, -100.0, 800.0, -800.0, 1.0]
    z = torch.tensor(numbers, dtype=dtype)
    for result, expected in zip(run(name, z.to(device)), by_pytorch(name, z), strict=True):
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_overflows_above_its_threshold_as_in_pytorch(device: str, dtype: torch.dtype) -> None:
    z = torch.tensor([80.0, 100.0, 700.0, 800.0, 1e4, -800.0], dtype=dtype)
    ours, theirs = run("softplus", z.to(device), numbers=(1.0, 1e3)), by_pytorch("softplus", z, numbers=(1.0, 1e3))
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_that_are_nan_or_infinite(device: str, name: str) -> None:
    """What comes in goes through where the slope is not 0; behind relu's 0 it stays 0."""
    z = torch.tensor([-1.5, -1.5, -1.5, 1.5, 1.5, 1.5])
    dh = torch.tensor([2.0, float("nan"), float("inf")] * 2)
    _, dz = run(name, z.to(device), dh.to(device))
    torch.testing.assert_close(dz.cpu(), by_pytorch(name, z, dh)[1], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_tile_of_any_orientation(device: str, name: str) -> None:
    z = torch.linspace(-9, 9, 5000, device=device)
    for result, turned in zip(run(name, z), run(name, z, turned=True), strict=True):
        assert torch.equal(result, turned)
