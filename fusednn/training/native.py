"""The engine for small nets on a CPU: one call of kernels/native/mlp_training.cpp makes all steps of a chunk.

The C++ code gets addresses and sizes as whole numbers and checks nothing: everything is checked here and in Chunks, for
each chunk anew, since on_chunk may have put other tensors in place. It runs in this thread, without the GIL.
"""

from typing import Any

import torch
from torch import Tensor

from .chunks import Chunks
from .job import Job
from .nets import Net
from .optimizers import ROW, Steps

_native: Any
try:
    from .. import _native  # type: ignore[attr-defined,no-redef]
except ImportError:  # there was no compiler when fusednn was installed
    _native = None

MACHINES: dict[str, int] = {} if _native is None else _native.machines()
"""The kinds of machine that this one is, of those that there is code for; the last is the best."""

RULES = ("adam", "sgd", "momentum", "nesterov")
"""The rules of the optimizers, as the C++ code counts them."""

FIRST_CHUNK = 2**25
"""Products in the first chunk: 5 ms at 7 billion a second, which a machine without vectors does."""


class Native(Chunks):
    """Runs a job in calls of the C++ code for `machine`, one of MACHINES."""

    machine = next(reversed(MACHINES), "none")

    def __init__(self, job: Job, net: Net) -> None:
        super().__init__(job, net, FIRST_CHUNK)

    def train(self, order: Tensor, taken: Steps, numbers: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """One call."""
        job, criterion, dtype = self.job, self.job.criterion, self.job.inputs.dtype
        x, targets, (inputs, hidden, outputs) = job.inputs, job.targets.long(), self.net.sizes
        steps, rows = len(taken.table), len(order)
        losses, accuracies = x.new_empty(steps), x.new_empty(steps if job.return_accuracy else 0)
        shapes = ((hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
        rule, groups = taken.rule, []
        for name, group, needed in (
            ("parameter", self.net, True),
            ("state", taken.firsts, rule.rule != "sgd"),
            ("state", taken.seconds, rule.rule == "adam"),
        ):
            if needed and any(a is None and b is not None for a, b in zip(group, self.net, strict=True)):
                raise RuntimeError(f"a {name} is gone")
            groups.append([_address(name, tensor, dtype, shape) for tensor, shape in zip(group, shapes, strict=True)])
        if not x.is_cpu or not targets.is_cpu:
            raise RuntimeError(f"the inputs came to {x.device}, and the targets to {targets.device}")
        addresses = (
            _begin("inputs", x),
            _begin("targets", targets),
            _address("order", order, torch.int64, (rows,)),
            _address("class weight", criterion.weight, dtype, (outputs,)),
            *(address for group in groups for address in group),
            _address("table", taken.table, dtype, (steps, 4, ROW)),
            losses.data_ptr(),
            accuracies.data_ptr() if job.return_accuracy else 0,
        )
        sizes = (
            *x.stride(),
            *targets.stride(),
            inputs,
            hidden,
            outputs,
            min(numbers["batch_size"], numbers["epoch_rows"]),
            numbers["epoch_rows"],
            numbers["position"],
            steps,
            numbers["ignore_index"],
            RULES.index(rule.rule),
            rule.coupled,
            rule.decoupled,
            rule.maximize,
            criterion.reduction == "mean",
        )
        _native.train_mlp(
            MACHINES[self.machine], dtype == torch.float64, addresses, sizes, float(numbers["label_smoothing"])
        )
        return losses, accuracies


def _address(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where the numbers of `tensor` lie, 0 for none. Raises RuntimeError unless it is as it must be."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        found = f"{tensor.dtype}, {list(tensor.shape)}, {tensor.device}"
        raise RuntimeError(f"a {name} is no longer {dtype}, {list(shape)} and contiguous on the CPU, but {found}")
    return _begin(name, tensor)


def _begin(name: str, tensor: Tensor) -> int:
    """Where the numbers of `tensor` lie. Raises RuntimeError where it has no memory, or less than it needs."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if tensor.numel() and (not tensor.data_ptr() or tensor.untyped_storage().nbytes() < needed):
        raise RuntimeError(f"{name}: a tensor of {list(tensor.shape)} has no memory, or less than that")
    return tensor.data_ptr()
