"""What train_steps and make_train_step are asked for."""

import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import dispatch, internals, reference
from ..modules import CrossEntropyLoss
from ..reference import PerStep


class Job(NamedTuple):
    """The arguments, checked: steps up to number `steps`, from `start_step` on, over epochs of `epoch_rows` rows."""

    model: Callable[[Tensor], Tensor]
    optimizer: Optimizer
    criterion: Any
    lr_schedule: Any
    return_accuracy: bool
    inputs: Tensor
    targets: Tensor
    batch_size: int
    steps: int
    epoch_rows: int
    start_step: int = 0
    shuffle: bool = False
    generator: torch.Generator | None = None
    order: str = "torch"
    seed: int | None = None
    on_chunk: Callable[[int, Tensor], object] | None = None
    chunk_steps: int | None = None
    sample_weight: Tensor | None = None
    loss_scale: PerStep = 1.0
    decay_scale: PerStep = 1.0
    max_grad_norm: float | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether the loss or the weight decay of a step is."""
        return (self.loss_scale, self.decay_scale) != (1.0, 1.0)

    @property
    def is_plain(self) -> bool:
        """Whether a step has no weights of rows, scales or largest norm."""
        return self.sample_weight is None and self.max_grad_norm is None and not self.is_scaled


class Options(TypedDict, total=False):
    """The keywords of train_steps that do not change the type of what it returns; beside each its default."""

    batch_size: Annotated[int, 32]
    epochs: Annotated[int | None, None]
    steps: Annotated[int | None, None]
    shuffle: Annotated[bool, True]
    drop_last: Annotated[bool, False]
    generator: Annotated[torch.Generator | None, None]
    order: Annotated[str, "torch"]
    seed: Annotated[int | None, None]
    criterion: Annotated[Callable[[Tensor, Tensor], Tensor] | None, None]
    lr_schedule: Annotated[Any, None]
    start_step: Annotated[int, 0]
    on_chunk: Annotated[Callable[[int, Tensor], object] | None, None]
    chunk_steps: Annotated[int | None, None]
    sample_weight: Annotated[Tensor | None, None]
    loss_scale: Annotated[PerStep, 1.0]
    decay_scale: Annotated[PerStep, 1.0]
    max_grad_norm: Annotated[float | None, None]


HINTS = get_type_hints(Options, include_extras=True)
DEFAULTS: Any = {name: hint.__metadata__[0] for name, hint in HINTS.items()}


def check(
    model: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    return_accuracy: bool,
    options: Options,
) -> Job:
    """The job, or the error for arguments that make no sense."""
    given: Options = DEFAULTS | options
    epochs, steps, generator = given["epochs"], given["steps"], given["generator"]
    order, seed, on_chunk = given["order"], given["seed"], given["on_chunk"]
    criterion = _CROSS_ENTROPY if given["criterion"] is None else given["criterion"]
    max_grad_norm = norm_of(given["max_grad_norm"])
    check_training(model, optimizer, criterion, given["lr_schedule"], return_accuracy)
    check_data(inputs, targets, criterion, given["sample_weight"])
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator needs a torch.Generator, not {type(generator).__name__}")
    if (epochs is None) == (steps is None):
        raise ValueError(f"exactly one of epochs and steps is needed, not epochs={epochs} and steps={steps}")
    batch_size, n = whole("batch_size", given["batch_size"], 1), inputs.shape[0]
    rows = n // batch_size * batch_size if given["drop_last"] else n
    batches = reference.batches_of(rows, batch_size) if rows or not given["drop_last"] else 0
    total = whole("epochs", epochs, 0) * batches if steps is None else whole("steps", steps, 0)
    if total and not batches:
        raise ValueError(f"{n} rows make no batch of {batch_size}, and drop_last leaves out the ragged one")
    if (start_step := whole("start_step", given["start_step"], 0)) > total:
        raise ValueError(f"start_step={start_step} is past the end of {total} steps")
    if order not in ("torch", "philox"):
        raise ValueError(f"order needs to be 'torch' or 'philox', not {order!r}")
    if order == "philox" and given["shuffle"] and (seed is None or not (seed := whole("seed", seed, 0)) < 2**64):
        raise ValueError(f"order='philox' needs a seed from 0 to 2^64 - 1, not {seed}")
    if order == "torch" and seed is not None:
        raise ValueError("a seed is for order='philox'; for order='torch' give a generator")
    decay_scale = per_step("decay_scale", given["decay_scale"], total)
    check_decays(optimizer, decay_scale)
    chunk_steps = None if given["chunk_steps"] is None else whole("chunk_steps", given["chunk_steps"], 1)
    if on_chunk is not None and not callable(on_chunk):
        raise TypeError(f"on_chunk needs a function, not {type(on_chunk).__name__}")
    return Job(
        model=model, optimizer=optimizer, criterion=criterion, lr_schedule=given["lr_schedule"],
        return_accuracy=return_accuracy, inputs=inputs, targets=targets, batch_size=batch_size, steps=total,
        epoch_rows=rows, start_step=start_step, shuffle=given["shuffle"], generator=generator, order=order, seed=seed,
        on_chunk=on_chunk, chunk_steps=chunk_steps, sample_weight=given["sample_weight"],
        loss_scale=per_step("loss_scale", given["loss_scale"], total),
        decay_scale=decay_scale, max_grad_norm=max_grad_norm,
    )  # fmt: skip


_CROSS_ENTROPY = CrossEntropyLoss()


def check_training(
    model: Callable[[Tensor], Tensor], optimizer: Optimizer, criterion: Any, lr_schedule: Any, return_accuracy: bool
) -> None:
    """Raise the error for arguments that make no sense, of those that are the same for all batches."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer needs a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if not callable(model) or not callable(criterion):
        raise TypeError("model and criterion need to be modules or functions")
    if isinstance(lr_schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("lr_schedule cannot be a ReduceLROnPlateau, whose step needs a metric; step it yourself")
    if lr_schedule is not None and not callable(getattr(lr_schedule, "step", None)):
        raise TypeError(f"lr_schedule needs a scheduler of torch.optim, not {type(lr_schedule).__name__}")
    if getattr(lr_schedule, "optimizer", optimizer) is not optimizer:
        raise ValueError("lr_schedule is the schedule of another optimizer")
    if return_accuracy:
        reference.check_accuracy(criterion)


def check_data(inputs: Tensor, targets: Tensor, criterion: Any, weights: Tensor | None) -> None:
    """Raise the error for inputs and targets that are no rows of examples, or have no memory; or weights of rows."""
    transformed = internals.transforming()  # whose tensors have none of their own
    given = {"inputs": inputs, "targets": targets}
    if weights is not None:
        given["sample_weight"] = weights
        reference.check_weighted(criterion)
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} need a torch.Tensor, not {type(tensor).__name__}")
        if not tensor.dim():
            raise ValueError(f"{name} need a row for each example, not a 0-d tensor")
        dense = type(tensor) is Tensor and tensor.layout is torch.strided
        if dense and not transformed and (refusal := dispatch.without_memory(tensor)) is not None:
            raise RuntimeError(f"{name}: {refusal}")
    if inputs.shape[0] != targets.shape[0]:
        raise ValueError(f"inputs have {len(inputs)} rows and targets {len(targets)}")
    if weights is not None and (weights.shape != inputs.shape[:1] or not weights.is_floating_point()):
        found = f"{list(weights.shape)}, {weights.dtype}"
        raise ValueError(f"sample_weight needs a floating-point number for each of {len(inputs)} rows, not {found}")


def check_decays(optimizer: Optimizer, decay_scale: PerStep) -> None:
    """Raise ValueError where there is no weight decay that could be scaled."""
    if decay_scale != 1.0 and any("weight_decay" not in group for group in optimizer.param_groups):
        raise ValueError(f"decay_scale: {type(optimizer).__name__} has no weight_decay")


def norm_of(value: Any) -> float | None:
    """`max_grad_norm`, or the error for one that is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"max_grad_norm needs a number, not {value!r}")
    if not (norm := float(value)) >= 0:
        raise ValueError(f"max_grad_norm needs to be at least 0, not {norm}")
    return norm


def number_of(name: str, value: Any) -> float:
    """A scale of one step, or the error for what is none."""
    number = None if callable(value) else per_step(name, value, 1)
    if not isinstance(number, float):
        raise TypeError(f"{name} needs a number, not {type(value).__name__}")
    return number


def per_step(name: str, value: Any, steps: int) -> PerStep:
    """A number for all steps, one for each, or a function of the step; or the error for what is none of these."""
    if callable(value):
        function: Callable[[int], float] = value
        return function
    found = value.tolist() if isinstance(value, Tensor) or hasattr(value, "tolist") else value
    if isinstance(found, numbers.Real) and not isinstance(found, bool):
        return float(found)
    try:
        if not isinstance(found, Sequence) or isinstance(found, str | bytes):
            raise TypeError
        values = [float(number) for number in found]
    except (TypeError, ValueError) as error:
        kind = type(value).__name__
        raise TypeError(f"{name} needs a number, one for each step, or a function of the step, not {kind}") from error
    if len(values) < steps:
        raise ValueError(f"{name} has {len(values)} numbers for {steps} steps")
    return values


def series(value: PerStep, begin: int, steps: int) -> tuple[list[float] | None, Exception | None]:
    """The numbers of so many steps from number `begin` on; None if they are 1, all of them.

    Fewer, and an error, where a function raises it.
    """
    if isinstance(value, float):
        return None if value == 1.0 else [value] * steps, None
    if not callable(value):
        return [*value[begin : begin + steps]], None
    found: list[float] = []
    for step in range(begin, begin + steps):
        try:
            found.append(float(value(step)))
        except Exception as error:  # to be raised when the steps before are made
            return found, error
    return found, None


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int, or the error for one that is none or too small."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} needs a whole number, not {value!r}")
    number = operator.index(value)  # NumPy's too
    if number < least:
        raise ValueError(f"{name} needs to be at least {least}, not {number}")
    return number
