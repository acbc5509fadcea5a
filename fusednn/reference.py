"""Every operation in plain PyTorch: what the tests hold the kernels to, what serves a plain CPU tensor, and what
the benchmarks compare with. Imports nothing but torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from itertools import count, islice
from numbers import Real
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
        as_long(target),
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
            as_long(target),
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            options=options,
            **arguments,
        )
        return loss
    ignored = -100 if ignore_index is None else ignore_index
    return cross_entropy(F.linear(input, linear_weight, linear_bias), target, ignore_index=ignored, **arguments)


def as_long(target: Tensor) -> Tensor:
    """Labels of int8, int16, int32 and uint8 as the int64 that PyTorch takes everywhere; anything else as it is."""
    return target.long() if isinstance(target, Tensor) and target.dtype in _SMALL else target


_SMALL = (torch.int8, torch.int16, torch.int32, torch.uint8)


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


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    batch_size: int = 32,
    epochs: int | None = None,
    steps: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
    order: str = "torch",
    seed: int | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    lr_schedule: Any = None,
    start_step: int = 0,
    return_accuracy: bool = False,
    sample_weight: Tensor | None = None,
    loss_scale: "PerStep" = 1.0,
    decay_scale: "PerStep" = 1.0,
    max_grad_norm: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loop that :func:`fusednn.train_steps` stands for: what it computes is what this computes.

    Returns the loss of every step, and on request its :func:`accuracy`.
    """
    criterion = criterion or nn.CrossEntropyLoss()
    if return_accuracy:
        check_accuracy(criterion)
    losses, accuracies = [], []
    batches = _batches(len(inputs), batch_size, epochs, steps, shuffle, drop_last, generator, order, seed)
    for step, rows in enumerate(islice(batches, start_step, None), start_step):
        rows = rows.to(inputs.device)
        scale, decay = number_at(loss_scale, step), number_at(decay_scale, step)
        outputs = model(inputs[rows])
        weights = None if sample_weight is None else sample_weight[rows]
        loss = loss_of(criterion, outputs, as_long(targets[rows]), weights)
        if scale != 1.0:
            loss = scale * loss
        optimizer.zero_grad()
        loss.backward()
        if return_accuracy:
            accuracies.append(accuracy(outputs, targets[rows], criterion))
        if max_grad_norm is not None:
            clip(optimizer, max_grad_norm)
        with scaled_decay(optimizer, decay):
            optimizer.step()
        if lr_schedule is not None:
            lr_schedule.step()
        losses.append(loss.detach())
    trace = torch.stack(losses) if losses else inputs.new_empty(0)
    if not return_accuracy:
        return trace
    return trace, torch.stack(accuracies) if accuracies else inputs.new_empty(0)


def make_train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    lr_schedule: Any = None,
    max_grad_norm: float | None = None,
    return_accuracy: bool = False,
) -> Callable[..., Any]:
    """What :func:`fusednn.make_train_step` stands for: a function that makes a step of the same loop on a batch."""

    def step(inputs: Tensor, targets: Tensor, **options: Any) -> Any:
        traces = train_steps(
            model, optimizer, inputs, targets, batch_size=max(1, len(inputs)), steps=1, shuffle=False,
            criterion=criterion, lr_schedule=lr_schedule, max_grad_norm=max_grad_norm,
            return_accuracy=return_accuracy, **options,
        )  # fmt: skip
        return tuple(trace[0] for trace in traces) if return_accuracy else traces[0]

    return step


PerStep = float | Sequence[float] | Callable[[int], float]
"""A number for all steps, one for each, or a function of the number of the step."""


def number_at(numbers: PerStep, step: int) -> float:
    """That of a step."""
    found: Any = numbers
    if callable(found):
        return float(found(step))
    is_one = isinstance(found, Real) or getattr(found, "ndim", 1) == 0
    return float(found if is_one else found[step])


def loss_of(criterion: Any, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """criterion(outputs, targets), in which the losses of row r count weights[r] times, of weights [N].

    A mean divides by the sum of the weights, in place of the number of the losses. Where the criterion has class
    weights and labels, or labels are ignored, PyTorch's mean divides by the weights of the labels, ignored ones having
    none: these are multiplied.
    """
    if weights is None:
        return criterion(outputs, targets)  # type: ignore[no-any-return]
    each = copy(criterion)
    each.reduction = "none"
    losses: Tensor = each(outputs, targets)
    weights = weights.detach().reshape(-1, *[1] * (losses.dim() - 1)).expand_as(losses)
    total = (weights * losses).sum()
    if criterion.reduction == "sum":
        return total
    if isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and not targets.is_floating_point():
        counted = targets != criterion.ignore_index
        weights = torch.where(counted, weights, 0.0)
        if criterion.weight is not None:
            classes = torch.where(counted, targets, 0).clamp(0, len(criterion.weight) - 1)  # a wrong one made a NaN
            weights = weights * criterion.weight[classes]
    return total / weights.sum()


def check_weighted(criterion: Any) -> None:
    """Raise TypeError or ValueError for a criterion that :func:`loss_of` cannot weight."""
    if not isinstance(criterion, nn.Module) or not hasattr(criterion, "reduction"):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise TypeError(f"sample_weight needs a criterion that is a module with a reduction, not {name}")
    if criterion.reduction not in ("mean", "sum"):
        raise ValueError(f"sample_weight needs a criterion of the reduction mean or sum, not {criterion.reduction!r}")


def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """torch.nn.utils.clip_grad_norm_ of all parameters of an optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, max_norm)


@contextmanager
def scaled_decay(optimizer: torch.optim.Optimizer, scale: float) -> Iterator[None]:
    """A context in which each group's weight_decay is so many times what it is."""
    decays = [group["weight_decay"] for group in optimizer.param_groups if scale != 1.0]
    for group, decay in zip(optimizer.param_groups, decays, strict=False):
        group["weight_decay"] = scale * decay
    try:
        yield
    finally:
        for group, decay in zip(optimizer.param_groups, decays, strict=False):
            group["weight_decay"] = decay


_LOGITS = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, F.binary_cross_entropy_with_logits)
_PROBABILITIES = (nn.BCELoss, F.binary_cross_entropy)
_CLASSLESS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss,
    nn.MultiLabelMarginLoss,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss, F.gaussian_nll_loss,
)  # fmt: skip


def _is_one_of(criterion: Any, losses: tuple[Any, ...]) -> bool:
    criterion = criterion.func if isinstance(criterion, partial) else criterion
    return criterion in losses or isinstance(criterion, tuple(loss for loss in losses if isinstance(loss, type)))


def check_accuracy(criterion: Any) -> None:
    """Raise ValueError for a loss that has no classes: of a regression there is no accuracy."""
    if _is_one_of(criterion, _CLASSLESS):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise ValueError(f"return_accuracy: {name} has no classes that an output could be right about")


def accuracy(outputs: Tensor, targets: Tensor, criterion: Any) -> Tensor:
    """How much of a batch is right, 0-d in the dtype of `outputs`; NaN where nothing counts.

    With labels, or with as many probabilities as `outputs` [N, C, ...] has classes: the share, of those that are not
    ignored, whose largest output, the first of several, is the target's. Of a binary cross entropy, and of a loss of
    the user's on one column: the share on the right side of 0, or of 1/2 for BCELoss. Raises ValueError for others.
    """
    with torch.no_grad():
        has_classes = _is_one_of(criterion, (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss))
        binary = _is_one_of(criterion, _LOGITS + _PROBABILITIES)
        if binary or (not has_classes and targets.numel() == outputs.numel() and outputs.shape[1:].numel() == 1):
            middle = 0.5 if _is_one_of(criterion, _PROBABILITIES) else 0.0
            return _share((outputs > middle) == (targets.view_as(outputs) > 0.5), None, outputs.dtype)
        if outputs.dim() < 2 or (targets.is_floating_point() and targets.shape != outputs.shape):
            shapes = f"outputs {list(outputs.shape)} and targets {list(targets.shape)}, {targets.dtype}"
            raise ValueError(f"return_accuracy: {shapes} are neither classes and labels nor one column")
        if targets.is_floating_point():
            return _share(outputs.argmax(1) == targets.argmax(1), None, outputs.dtype)
        targets = targets.long()  # or -100 would be compared as the 156 that it is in uint8
        options: Any = criterion.keywords if isinstance(criterion, partial) else getattr(criterion, "__dict__", {})
        counted: Tensor = targets != options.get("ignore_index", -100)
        return _share((outputs.argmax(1) == targets) & counted, counted.sum(), outputs.dtype)


def _share(right: Tensor, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The number of those that are `right`, divided by `counted`, or by that of all, [] on their device.

    A quotient of two tensors, which is the nearest number: by a number, and in mean(), a GPU multiplies with the
    reciprocal. In float32 at least: a half has no room for the counts.
    """
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.full((), right.numel(), dtype=wide, device=right.device) if counted is None else counted
    return (right.sum().to(wide) / total).to(dtype)


def _batches(
    n: int,
    batch_size: int,
    epochs: int | None,
    steps: int | None,
    shuffle: bool,
    drop_last: bool,
    generator: torch.Generator | None,
    order: str,
    seed: int | None,
) -> Iterator[Tensor]:
    """The rows of each step. An order is drawn when its first step comes, so that a run of some steps draws no more."""
    done = 0
    for epoch in count():
        if epoch == epochs or done == steps:
            return
        for rows in draw_order(n, epoch, shuffle, generator, order, seed).split(batch_size):
            if (drop_last and len(rows) < batch_size) or done == steps:
                break
            yield rows
            done += 1


def batches_of(rows: int, batch_size: int) -> int:
    """How many batches an epoch of so many rows has: an empty one has one, an empty batch."""
    return max(1, -(-rows // batch_size))


def draw_order(
    n: int, epoch: int, shuffle: bool, generator: torch.Generator | None, order: str = "torch", seed: int | None = None
) -> Tensor:
    """The order of n rows in an epoch, [n] int64: torch.randperm's, or sorted by keys counted from seed and epoch."""
    if not shuffle:
        return torch.arange(n)
    if order == "philox":
        assert seed is not None
        return philox(seed, epoch, torch.arange(n)).argsort(stable=True)
    return torch.randperm(n, generator=generator, device=generator.device if generator is not None else None)


def philox(seed: int, epoch: int, index: Tensor) -> Tensor:
    """63 random bits for each `index`, int64 in 0 to 2^32 - 1, of an epoch: Philox4x32-10 (Salmon et al., 2011).

    The counter is (index, 0, epoch's low and high half), the key the halves of `seed`, 0 to 2^64 - 1.
    """
    low = 0xFFFFFFFF
    zero = torch.zeros_like(index)
    c = [index, zero, zero + (epoch & low), zero + (epoch >> 32)]
    keys = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        products = [multiplier * word for multiplier, word in zip((0xD2511F53, 0xCD9E8D57), (c[0], c[2]), strict=True)]
        high0, high1 = ((product >> 32) & low for product in products)  # int64 wraps; the 64 bits are right
        c = [high1 ^ c[1] ^ keys[0], products[1] & low, high0 ^ c[3] ^ keys[1], products[0] & low]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return ((c[0] << 32) | c[1]) & 0x7FFFFFFFFFFFFFFF
