"""Every operation in plain PyTorch: what the tests hold the kernels to, what serves a plain CPU tensor, and what
the benchmarks compare with. Imports nothing but torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, as :func:`torch.nn.functional.linear`."""
    return F.linear(input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x Wᵀ + b)."""
    return torch.relu(F.linear(input, weight, bias))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy`, also of labels of int8, int16 and int32."""
    return F.cross_entropy(
        input,
        _long(target),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy`, also of such labels; its parts where PyTorch is older than 2.13."""
    arguments: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    if hasattr(F, "linear_cross_entropy"):
        loss: Tensor = F.linear_cross_entropy(
            input,
            linear_weight,
            _long(target),
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            options=options,
            **arguments,
        )
        return loss
    ignored = -100 if ignore_index is None else ignore_index
    return cross_entropy(F.linear(input, linear_weight, linear_bias), target, ignore_index=ignored, **arguments)


def _long(target: Tensor) -> Tensor:
    small = isinstance(target, Tensor) and target.dtype in (torch.int8, torch.int16, torch.int32)
    return target.long() if small else target


class SimpleNN(nn.Module):
    """The textbook network: Linear, ReLU, Linear."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        """Layers of shapes [hidden_size, input_size] and [output_size, hidden_size], initialised as nn.Linear."""
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., output_size] of x [..., input_size]."""
        logits: Tensor = self.fc2(self.relu(self.fc1(x)))
        return logits
