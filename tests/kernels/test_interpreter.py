"""What the interpreter is given, and what it says, beside the numbers."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusednn import functional


def zeros_of_no_memory(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that only says that it is zero."""
    found: torch.Tensor = torch._efficientzerotensor(shape, dtype=dtype)
    return found


def freed(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One whose memory was given back, as FSDP does."""
    x = torch.zeros(shape, dtype=dtype)
    x.untyped_storage().resize_(0)
    return x


CALLS: dict[str, Callable[[Any], torch.Tensor]] = {
    "linear input": lambda make: functional.linear(make((4, 5)), torch.ones(3, 5)),
    "linear weight": lambda make: functional.linear(torch.ones(4, 5), make((3, 5))),
    "linear_relu bias": lambda make: functional.linear_relu(torch.ones(4, 5), torch.ones(3, 5), make((3,))),
    "cross_entropy input": lambda make: functional.cross_entropy(make((4, 3)), torch.tensor([0, 1, 2, 0])),
    "cross_entropy labels": lambda make: functional.cross_entropy(torch.ones(4, 3), make((4,), torch.int64)),
    "cross_entropy probabilities": lambda make: functional.cross_entropy(torch.ones(4, 3), make((4, 3))),
    "linear_cross_entropy labels": lambda make: functional.linear_cross_entropy(
        torch.ones(4, 5), torch.ones(3, 5), make((4,), torch.int64)
    ),
    "linear gradient": lambda make: torch.autograd.grad(
        functional.linear(torch.ones(4, 5).requires_grad_(), w := torch.ones(3, 5).requires_grad_()), w, make((4, 3))
    )[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_zeros_without_memory_are_zeros_in_the_interpreter(name: str) -> None:
    expected = CALLS[name](lambda shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype))
    torch.testing.assert_close(CALLS[name](zeros_of_no_memory), expected)


@pytest.mark.parametrize("name", CALLS)
def test_what_has_no_memory_is_not_read_in_the_interpreter(name: str) -> None:
    with pytest.raises(RuntimeError, match="has no memory, or less than that"):
        CALLS[name](freed)


def test_numpys_warnings_are_no_errors() -> None:
    """Of NaN and inf in rows past the end, where a program asks for warnings to be errors."""
    x = torch.tensor([[1.0, float("inf"), float("-inf")], [float("nan")] * 3, [1.0, 2.0, 3.0]])
    target = torch.tensor([0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        loss = functional.cross_entropy(x, target, reduction="none")
        assert warnings.filters == before
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="none"), equal_nan=True
    )
