"""kernels/numerics.py: what is read and written in every dtype, bfloat16 in the interpreter included."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusednn.kernels.numerics import load, store, sum_dtype
from tests.accuracy import DTYPES


@triton.jit
def convert_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = x, through the dtype that sums run in."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = load(x_ptr + offs, offs < size).to(sum_dtype(x_ptr.dtype.element_ty))
    store(y_ptr + offs, x, offs < size)


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    convert_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), BLOCK=4096)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_has_the_same_bits(dtype: torch.dtype, device: str) -> None:
    every = torch.arange(2**16, device=device, dtype=torch.int32).to(torch.int16)
    x = every.view(dtype) if dtype.itemsize == 2 else torch.randn(2**16, device=device).to(dtype)
    numbers = ~x.isnan()
    y = convert(x, dtype)
    assert torch.equal(y[numbers], x[numbers])
    assert torch.equal(y.isnan(), x.isnan())


def test_rounding_to_bfloat16(device: str) -> None:
    """To nearest, ties to even; every NaN stays one, whatever its payload: a carry would make it zero."""
    upper = torch.arange(2**16, device=device, dtype=torch.int32)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = ((upper << 16) | lower).view(torch.float32)
        right, y = x.to(torch.bfloat16), convert(x, torch.bfloat16)
        numbers = ~x.isnan()
        assert torch.equal(y[numbers], right[numbers])
        assert y[~numbers].isnan().all()
