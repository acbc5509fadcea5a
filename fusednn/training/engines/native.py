"""The engine for small nets on a CPU: one call of kernels/native/mlp_training.cpp makes all steps of a chunk.

The C++ code gets addresses and sizes as whole numbers and checks nothing but the labels: all else is checked here and
in Chunks, for each chunk, since on_chunk may have put other tensors in place. It runs in this thread, without the GIL.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...dispatch import native, without_memory
from ...kernels.step import Step
from ..job import Job
from ..net import Net
from ..tables import Taken
from .chunks import Chunks, places_of, products_of

MACHINES: dict[str, int] = {} if native is None else native.machines()
"""The kinds of machine that this one is, of those that there is code for; the last is the best."""

MOST_PRODUCTS = (2**27, 2**26)
"""Products in a step, counted as in `products_of`, above which PyTorch's loop, on one thread and on several, is quicker
than the native one, which has one.

Measured by bench/bench_native.py on an AMD EPYC with AVX2, torch 2.13, float32. Of native's time the loop with fused
Adam, on one thread and on two, takes 3.1 and 3.0 at 9.8e6 products, 1.8 and 1.4 at 784-512-10 with batch 32 (3.9e7),
1.5 and 1.1 at 7.8e7, 1.1 to 1.2 and 0.8 to 1.1 at 1.6e8, and 0.9 and 0.8 at 6.2e8. Unmeasured on more threads, with
AVX-512 and on Arm."""


class Native(Chunks):
    """Runs a job in calls of the C++ code for `machine`, one of MACHINES."""

    name: ClassVar[str] = "native"
    machine = next(reversed(MACHINES), "none")
    first_chunk = 2**25
    """5 ms at 7 billion a second, which a machine without vectors does."""

    def __init__(self, job: Job, net: Net | None) -> None:
        self.held: _Held | None = None
        super().__init__(job, net)
        self.optimizer.gives_arrays = True

    @staticmethod
    def refusal(job: Job, net: Net | str) -> str | None:
        """Why PyTorch's own products are quicker for such a net, or None."""
        if isinstance(net, str):
            return net
        if products_of(job, net) > MOST_PRODUCTS[torch.get_num_threads() > 1]:
            rows = min(job.batch_size, job.epoch_rows)
            return f"{net} with batches of {rows} is so large that PyTorch's own products are quicker"
        return None

    def check_labels(self, job: Job) -> None:
        """Raise IndexError for a label out of range."""
        labels = job.targets.long()
        if (refusal := without_memory(labels)) is not None:
            raise RuntimeError(f"targets: {refusal}")
        bad = native.bad_label(
            targets=labels.data_ptr(), stride=labels.stride(0), size=labels.numel(), classes=self.net.sizes[-1],
            ignore_index=job.criterion.ignore_index,
        )  # fmt: skip
        if bad is not None:
            raise IndexError(f"Target {bad} is out of bounds.")

    def train(
        self, step: Step, x: Tensor, order: Tensor, taken: Taken, numbers: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """One call. Raises IndexError for a label out of range before the first of the steps."""
        job = self.job
        # whatever another thread makes of the tensors meanwhile: these keep what they are now, and its memory
        x, targets = x.detach(), job.targets.long().detach()
        if not x.is_cpu or not targets.is_cpu:
            raise RuntimeError(f"the inputs came to {x.device}, and the targets to {targets.device}")
        if x.shape[1] != step.sizes[0]:
            raise RuntimeError(f"the inputs are {list(x.shape)}, and the net is {self.net}")
        losses = x.new_empty(taken.steps)
        accuracies = x.new_empty(taken.steps) if step.accuracy else None
        held = self._held_of(step, taken)
        table = taken.table
        native.train(
            held.prepared,
            x=x.data_ptr() if self.has_checked else _begin("inputs", x),
            stride_xm=x.stride(0),
            stride_xi=x.stride(1),
            targets=targets.data_ptr() if self.has_checked else _begin("targets", targets),
            stride_t=targets.stride(0),
            order=order.data_ptr(),
            table=table.data_ptr() if isinstance(table, Tensor) else table.buffer_info()[0],
            losses=losses.data_ptr(),
            accuracies=0 if accuracies is None else accuracies.data_ptr(),
            batch=min(job.batch_size, job.epoch_rows),
            steps=taken.steps,
            **numbers,
        )
        self.has_checked = False
        return losses, losses if accuracies is None else accuracies

    def note_memory(self, taken: Taken) -> None:
        """`held` has it."""

    def lie_where_they_lay(self) -> bool:
        """Whether parameters and state have their memory where the last steps found it, in the same shape."""
        return self.held is not None and self.held.memory == self.held.memory_now()

    def _held_of(self, step: Step, taken: Taken) -> "_Held":
        """Parameters, state and class weights, where they lie now."""
        job = self.job
        tensors = (job.criterion.weight, *self.net.places, *taken.firsts, *taken.seconds, *taken.counts)
        held, trusts, self.trusts = self.held, self.trusts, False
        same = held is not None and all(map(operator.is_, tensors, held.tensors))  # a state may have been made anew
        if (
            held is None
            or not same
            or held.key != (step, self.machine, job.inputs.dtype)
            or not (trusts or self.lie_where_they_lay())
        ):
            self.held = held = _Held(tensors, step, self.machine, job.inputs.dtype)
        return held


@dataclass
class _Parameter:
    """Where a parameter, its state and the count of its steps lie, which may be a float64; 0 for what is not there."""

    weight: int
    first: int
    second: int
    count: int
    double_count: bool


class _Held:
    """Where the numbers of an engine's tensors lie; and they lie there while this is, whatever becomes of those.

    `prepared` is what the C++ code has made of that.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], step: Step, machine: str, dtype: torch.dtype) -> None:
        """`tensors` are the class weights, parameters, their first and second state, and their counts of steps.

        Raises RuntimeError unless all that the rule needs are there, of the right shape, dtype and memory.
        """
        self.tensors, self.key = tensors, (step, machine, dtype)
        class_weight, *kept = [None if tensor is None else tensor.detach() for tensor in tensors]  # as they are now
        parameters: list[_Parameter | None] = []
        for i, (w, m, v, count) in enumerate(zip(*_quarters(kept), strict=True)):
            shape = (step.sizes[i // 2 + 1], step.sizes[i // 2])[: 2 - i % 2]
            found = None if w is None else _Parameter(
                _address("parameter", w, dtype, shape),
                _address("state", m, dtype, shape, step.rule.name != "sgd"),
                _address("state", v, dtype, shape, step.rule.name == "adam"),
                0 if count is None else _address("count of steps", count, count.dtype, ()),
                count is not None and count.dtype == torch.float64,
            )  # fmt: skip
            parameters.append(found)
        self.prepared = native.prepare(
            machine=MACHINES[machine], is_double=dtype == torch.float64, step=step, parameters=parameters,
            class_weight=_address("class weight", class_weight, dtype, step.sizes[-1:]),
        )  # fmt: skip
        self.storages = [tensor.untyped_storage() for tensor in (class_weight, *kept) if tensor is not None]
        self.lists = _lists(*tensors)
        self.memory = self._memory(*_lists(class_weight, *kept))

    def memory_now(self) -> tuple[list[Any], ...]:
        """Where the tensors lie, and how many bytes their storages have."""
        return self._memory(*self.lists)

    def _memory(self, parameters: list[Tensor], states: list[Tensor], rest: list[Tensor]) -> tuple[list[Any], ...]:
        pointers, sizes = [tensor.data_ptr() for tensor in rest], [storage.nbytes() for storage in self.storages]
        return *places_of(parameters, states), pointers, sizes


def _quarters(tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], ...]:
    """Parameters, their first and second state, their counts."""
    size = len(tensors) // 4
    return tuple(tensors[i : i + size] for i in range(0, 4 * size, size))


def _lists(class_weight: Tensor | None, *tensors: Tensor | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, their state, and the rest of a _Held's tensors, as far as they are there."""
    parameters, firsts, seconds, counts = _quarters(tensors)
    parts = parameters, (*firsts, *seconds), (class_weight, *counts)
    found, states, rest = ([tensor for tensor in part if tensor is not None] for part in parts)
    return found, states, rest


def _address(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], needed: bool = False) -> int:
    """Where the numbers of `tensor` lie, 0 for none. Raises RuntimeError unless it is as it must be."""
    if tensor is None:
        if needed:
            raise RuntimeError(f"a {name} is gone")
        return 0
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        found = f"{tensor.dtype}, {list(tensor.shape)}, {tensor.device}"
        raise RuntimeError(f"a {name} is no longer {dtype}, {list(shape)} and contiguous on the CPU, but {found}")
    return _begin(name, tensor)


def _begin(name: str, tensor: Tensor) -> int:
    """Where the numbers of `tensor` lie. Raises RuntimeError where it has no memory, or less than it needs."""
    refusal = without_memory(tensor)
    if refusal is not None or tensor._is_zerotensor():
        raise RuntimeError(f"{name}: {refusal or 'it is zero without memory'}")
    return tensor.data_ptr()
