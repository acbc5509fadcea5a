"""Products of float32 by three products in TF32: their error, and the numbers that have no second part."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusednn.kernels.mlp_training import SPLIT
from fusednn.kernels.mlp_training_products import multiply, operand, product, split, turned
from fusednn.kernels.mlp_training_tiles import Tiles
from tests.accuracy import assert_product


@triton.jit
def product_kernel(
    a_ptr, b_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, AS_ROWS: tl.constexpr, TILES: tl.constexpr
):
    """y [M, N] = 1 + a [M, K] b, whose transpose [N, K] is given."""
    offs_m, offs_k, offs_n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = operand(tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :]), TILES)
    b = turned(operand(tl.load(b_ptr + offs_n[:, None] * K + offs_k[None, :]), TILES))
    z = tl.full((M, N), 1.0, tl.float32)
    z = product(a, b, z, True, TILES) if AS_ROWS else multiply(a, b, z, TILES)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], z)


@triton.jit
def split_kernel(x_ptr, first_ptr, second_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    first, second = split(tl.load(x_ptr + offs))
    tl.store(first_ptr + offs, first)
    tl.store(second_ptr + offs, second)


def multiplied(a: Tensor, b: Tensor, as_rows: bool = False) -> Tensor:
    """1 + a b."""
    y = a.new_empty(len(a), b.shape[1])
    tiles = Tiles(16, 16, 16, 16, True, SPLIT, True, fenced=a.is_cuda)
    product_kernel[(1,)](a, b.t().contiguous(), y, *a.shape, b.shape[1], as_rows, tiles)
    return y


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.empty_like(x), torch.empty_like(x)
    split_kernel[(1,)](x, first, second, len(x))
    return first, second


def test_the_parts_are_numbers_of_tf32(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1024, generator=generator) * 10.0 ** torch.linspace(-30, 30, 1024)).to(device)
    first, second = halves(x)
    assert torch.equal(first.view(torch.int32) & 0x1FFF, torch.zeros_like(first, dtype=torch.int32))
    assert torch.equal(first.double() + second.double(), x.double())
    assert (second.abs() <= 2.0**-11 * x.abs()).all()


def test_what_has_no_second_part(device: str) -> None:
    """Infinity, NaN of every kind, and what would round to infinity."""
    bits = [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F7FFFFF, -0x800001, 0x7F7FF000, 0, -(2**31)]
    x = torch.tensor([*bits, *[0] * 6], dtype=torch.int32).view(torch.float32).to(device)
    first, second = halves(x)
    torch.testing.assert_close(first, x, rtol=0, atol=0, equal_nan=True)
    assert (second == 0).all()


@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("kind", ["normal", "positive", "wide", "integers"])
def test_the_error_is_that_of_float32(device: str, kind: str, as_rows: bool) -> None:
    """Also on a GPU, where tensor cores see 11 bits of each part."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(64, 64, generator=generator), torch.randn(64, 32, generator=generator)
    if kind == "positive":
        a, b = a.abs(), b.abs()
    elif kind == "wide":
        a, b = a * torch.exp(4 * torch.randn(a.shape, generator=generator)), b.exp()
    elif kind == "integers":
        a, b = (8 * a).round().clamp(-8, 8), (8 * b).round().clamp(-8, 8)
    exact = a.double() @ b.double() + 1
    y = multiplied(a.to(device), b.to(device), as_rows).cpu()
    if kind == "integers":
        assert torch.equal(y, exact.float())
    assert_product(y, exact, a.double().abs() @ b.double().abs() + 1)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
def test_no_number_is_as_in_pytorch(device: str, value: float) -> None:
    """An infinite number times the second part of another, which may be 0 or of another sign, is not added."""
    a, b = torch.ones(64, 64), torch.ones(64, 32)
    a[3, 5], b[5, 7], b[9, :] = value, 1.5, 0.1
    b[5, :16] = torch.tensor([0, -1, 0.1, -0.1, 0.3, -0.3, 0.7, -0.7, 1.1, -1.1, 1 / 3, -1 / 3, 0.9, -0.9, 1e-3, -1e-3])
    y = multiplied(a.to(device), b.to(device)).cpu()
    expected = a @ b + 1
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=0)
