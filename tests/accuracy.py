"""The accuracy rules of the kernels: bounds that any right summation order meets and a wrong one does not."""

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff of each dtype."""

DTYPES = list(UNIT)


def sum_unit(dtype: torch.dtype) -> float:
    """The unit roundoff of the sums over elements of `dtype`."""
    return UNIT[torch.float64 if dtype == torch.float64 else torch.float32]


def assert_product(result: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """|result - exact| <= 16 u · magnitude + u_o |exact|, componentwise.

    `exact` is the float64 result and `magnitude` the same product of absolute values. Right code was measured at 5.3 at
    most and TF32 at 333 at least, so 16 separates them at every size.
    """
    dtype = result.dtype
    smallest = 2.0**-25 if dtype == torch.float16 else 2.0**-126
    bound = 16 * sum_unit(dtype) * magnitude + UNIT[dtype] * exact.abs() + smallest
    if dtype == torch.float64:  # the reference itself is as inexact as the result
        bound = bound * 2
    error = (result.double() - exact).abs()
    assert (error <= bound).all(), f"{dtype}: error {(error / bound).max().item():.2f} times the bound"


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of `tensor`, which compare equal only if every bit is, NaN included."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)
