"""What train_steps is asked for."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Job:
    """The arguments of train_steps, checked: `steps` steps in all, over epochs of `epoch_rows` rows."""

    model: Callable[[Tensor], Tensor]
    optimizer: Optimizer
    criterion: Any
    inputs: Tensor
    targets: Tensor
    batch_size: int
    steps: int
    epoch_rows: int
    shuffle: bool
    generator: torch.Generator | None
    order: str
    seed: int | None
    lr_schedule: Any
    return_accuracy: bool


def check(
    model: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    batch_size: int,
    epochs: int | None,
    steps: int | None,
    drop_last: bool,
    shuffle: bool,
    generator: torch.Generator | None,
    order: str,
    seed: int | None,
    criterion: Any,
    lr_schedule: Any,
    return_accuracy: bool,
) -> Job:
    """The job, or the error for arguments that make no sense."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer needs a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if not callable(model) or not callable(criterion):
        raise TypeError("model and criterion need to be modules or functions")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator needs a torch.Generator, not {type(generator).__name__}")
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} need a torch.Tensor, not {type(tensor).__name__}")
        if tensor.dim() == 0:
            raise ValueError(f"{name} need a row for each example, not a 0-d tensor")
    if len(inputs) != len(targets):
        raise ValueError(f"inputs have {len(inputs)} rows and targets {len(targets)}")
    if (epochs is None) == (steps is None):
        raise ValueError(f"exactly one of epochs and steps is needed, not epochs={epochs} and steps={steps}")
    batch_size = whole("batch_size", batch_size, 1)
    rows = len(inputs) // batch_size * batch_size if drop_last else len(inputs)
    batches = rows // batch_size if drop_last else max(1, -(-rows // batch_size))  # an empty epoch has an empty batch
    total = whole("epochs", epochs, 0) * batches if steps is None else whole("steps", steps, 0)
    if total and not batches:
        raise ValueError(f"{len(inputs)} rows make no batch of {batch_size}, and drop_last leaves out the ragged one")
    if order not in ("torch", "philox"):
        raise ValueError(f"order needs to be 'torch' or 'philox', not {order!r}")
    if order == "philox" and shuffle and (seed is None or not (seed := whole("seed", seed, 0)) < 2**64):
        raise ValueError(f"order='philox' needs a seed from 0 to 2^64 - 1, not {seed}")
    if order == "torch" and seed is not None:
        raise ValueError("a seed is for order='philox'; for order='torch' give a generator")
    if isinstance(lr_schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("lr_schedule cannot be a ReduceLROnPlateau, whose step needs a metric; use on_chunk")
    if lr_schedule is not None and not callable(getattr(lr_schedule, "step", None)):
        raise TypeError(f"lr_schedule needs a scheduler of torch.optim, not {type(lr_schedule).__name__}")
    if getattr(lr_schedule, "optimizer", optimizer) is not optimizer:
        raise ValueError("lr_schedule is the schedule of another optimizer")
    return Job(
        model, optimizer, criterion, inputs, targets, batch_size, total, rows,
        shuffle, generator, order, seed, lr_schedule, return_accuracy,
    )  # fmt: skip


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int, or the error for one that is none or too small."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} needs a whole number, not {value!r}")
    number = operator.index(value)  # NumPy's too
    if number < least:
        raise ValueError(f"{name} needs to be at least {least}, not {number}")
    return number
