"""The engine for small nets on a CPU: one call of kernels/native/mlp_training.cpp makes all steps of a chunk.

The C++ code gets addresses and sizes as whole numbers and checks nothing but the labels: all else is checked here and
in Chunks, for each chunk, since on_chunk may have put other tensors in place. It runs in this thread, without the GIL.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import native, without_memory
from .chunks import Chunks, places_of
from .job import Job
from .nets import Net
from .optimizers import Rule, Steps

MACHINES: dict[str, int] = {} if native is None else native.machines()
"""The kinds of machine that this one is, of those that there is code for; the last is the best."""

RULES = ("adam", "sgd", "momentum", "nesterov")
"""The rules of the optimizers, as the C++ code counts them."""

FIRST_CHUNK = 2**25
"""Products in the first chunk: 5 ms at 7 billion a second, which a machine without vectors does."""


class Native(Chunks):
    """Runs a job in calls of the C++ code for `machine`, one of MACHINES."""

    machine = next(reversed(MACHINES), "none")

    def __init__(self, job: Job, net: Net) -> None:
        self.held: _Held | None = None
        super().__init__(job, net, FIRST_CHUNK)
        self.optimizer.gives_arrays = True

    def check_labels(self, job: Job) -> None:
        """Raise IndexError for a label out of range."""
        labels = job.targets.long()
        if (reason := without_memory(labels)) is not None:
            raise RuntimeError(f"targets: {reason}")
        shape = self.net.sizes[2], job.criterion.ignore_index
        if (bad := native.bad_label(labels.data_ptr(), *labels.stride(), labels.numel(), *shape)) is not None:
            raise IndexError(f"Target {bad} is out of bounds.")

    def train(self, order: Tensor, taken: Steps, numbers: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """One call. Raises IndexError for a label out of range before the first of the steps."""
        job, steps = self.job, taken.steps
        # whatever another thread makes of the tensors meanwhile: these keep what they are now, and its memory
        x, targets, rule = job.inputs.detach(), job.targets.long().detach(), taken.rule
        if not x.is_cpu or not targets.is_cpu:
            raise RuntimeError(f"the inputs came to {x.device}, and the targets to {targets.device}")
        if x.shape[1] != self.net.w1.shape[1]:
            raise RuntimeError(f"the inputs are {list(x.shape)}, and the net is {self.net}")
        losses = x.new_empty(steps)
        accuracies = x.new_empty(steps) if job.return_accuracy else None
        sizes = self.net.sizes
        fixed = self._held_of(taken, sizes)
        addresses = (
            x.data_ptr() if self.has_checked else _begin("inputs", x),
            targets.data_ptr() if self.has_checked else _begin("targets", targets),
            order.data_ptr(),
            *fixed.addresses[:13],
            taken.table.data_ptr() if isinstance(taken.table, Tensor) else taken.table.buffer_info()[0],
            losses.data_ptr(),
            0 if accuracies is None else accuracies.data_ptr(),
            *fixed.addresses[13:],
        )
        numbers_of = (
            *x.stride(),
            *targets.stride(),
            *sizes,
            min(numbers["batch_size"], numbers["epoch_rows"]),
            numbers["epoch_rows"],
            numbers["position"],
            steps,
            numbers["ignore_index"],
            fixed.double_counts,
            RULES.index(rule.rule),
            rule.coupled,
            rule.decoupled,
            rule.maximize,
            job.criterion.reduction == "mean",
        )
        self.has_checked = False
        machine, smoothing = MACHINES[self.machine], float(numbers["label_smoothing"])
        native.train_mlp(machine, x.dtype == torch.float64, addresses, numbers_of, smoothing)
        return losses, losses if accuracies is None else accuracies

    def note_memory(self, taken: Steps) -> None:
        """`held` has it."""

    def lie_where_they_lay(self) -> bool:
        """Whether parameters and state have their memory where the last steps found it, in the same shape."""
        return self.held is not None and self.held.memory == self.held.memory_now()

    def _held_of(self, taken: Steps, sizes: tuple[int, int, int]) -> "_Held":
        """Parameters, state and class weights, where they lie now."""
        tensors = (self.job.criterion.weight, *self.net, *taken.firsts, *taken.seconds, *taken.counts)
        held, trusts, self.trusts = self.held, self.trusts, False
        same = held is not None and all(map(operator.is_, tensors, held.tensors))  # a state may have been made anew
        if held is None or not same or not (trusts or self._holds(held, taken.rule, sizes)):
            self.held = held = _Held(tensors, sizes, taken.rule, self.job.inputs.dtype)
        return held

    def _holds(self, held: "_Held", rule: Rule, sizes: tuple[int, int, int]) -> bool:
        """Whether what is held is for such steps, and where it was."""
        return held.key == (sizes, rule, self.job.inputs.dtype) and held.memory == held.memory_now()


class _Held:
    """Where the numbers of an engine's tensors lie; and they lie there while this is, whatever becomes of those."""

    def __init__(
        self, tensors: tuple[Tensor | None, ...], sizes: tuple[int, int, int], rule: Rule, dtype: torch.dtype
    ) -> None:
        """`tensors` are the class weights, parameters, their first and second state, and their counts of steps.

        Raises RuntimeError unless all that the rule needs are there, of the right shape, dtype and memory.
        """
        inputs, hidden, outputs = sizes
        shapes: list[tuple[int, ...]] = [(outputs,), *[(hidden, inputs), (hidden,), (outputs, hidden), (outputs,)] * 3]
        shapes += [()] * 4
        names = ["class weight", *["parameter"] * 4, *["state"] * 8, *["count of steps"] * 4]
        dtypes = [dtype] * 13 + [torch.float32 if count is None else count.dtype for count in tensors[13:]]
        needed = [False, *[True] * 4, *[rule.rule != "sgd"] * 4, *[rule.rule == "adam"] * 4, *[False] * 4]
        for place, tensor in enumerate(tensors):
            if tensor is None and needed[place] and tensors[1 + (place - 1) % 4] is not None:
                raise RuntimeError(f"a {names[place]} is gone")
        self.tensors, self.key = tensors, (sizes, rule, dtype)
        kept = [None if tensor is None else tensor.detach() for tensor in tensors]  # as they are now
        self.storages = [tensor.untyped_storage() for tensor in kept if tensor is not None]
        given = zip(names, kept, dtypes, shapes, strict=True)
        self.addresses = [_address(name, tensor, kind, shape) for name, tensor, kind, shape in given]
        self.double_counts = sum((kind == torch.float64) << place for place, kind in enumerate(dtypes[13:]))
        self.lists = _lists(tensors)
        self.memory = self._memory(*_lists(kept))

    def memory_now(self) -> tuple[list[Any], ...]:
        """Where the tensors lie, and how many bytes their storages have."""
        return self._memory(*self.lists)

    def _memory(self, parameters: list[Tensor], states: list[Tensor], rest: list[Tensor]) -> tuple[list[Any], ...]:
        pointers, sizes = [tensor.data_ptr() for tensor in rest], [storage.nbytes() for storage in self.storages]
        return *places_of(parameters, states), pointers, sizes


def _lists(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, their state, and the rest of a _Held's tensors, as far as they are there."""
    parts = tensors[1:5], tensors[5:13], (tensors[0], *tensors[13:])
    parameters, states, rest = ([tensor for tensor in part if tensor is not None] for part in parts)
    return parameters, states, rest


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
    reason = without_memory(tensor)
    if reason is not None or tensor._is_zerotensor():
        raise RuntimeError(f"{name}: {reason or 'it is zero without memory'}")
    return tensor.data_ptr()
