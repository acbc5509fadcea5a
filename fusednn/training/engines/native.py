"""The engine for small nets on a CPU: one call of kernels/native/mlp_training.cpp makes all steps of a chunk.

The C++ code gets addresses and sizes as whole numbers. It checks names, how many there are of everything, and the
labels. Shapes, dtypes and memory are checked here and in Chunks, for each chunk, since on_chunk may have put other
tensors in place. It runs in this thread, without the GIL.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...dispatch import native, without_memory
from ...kernels.step import LOSSES, Step
from ..criteria import takes_labels, weights_of
from ..job import Job
from ..net import Net
from ..tables import Taken
from .chunks import Chunks, places_of, products_of

MACHINES: dict[str, int] = {} if native is None else native.machines()
"""The kinds of machine that this one is, of those that there is code for; the last is the best."""

MOST_PRODUCTS = {"AVX-512": 2**30}
"""Products in a step, counted as in `products_of`, above which PyTorch's loop on one thread is quicker; of others 2^27.

Measured by bench/bench_native.py on an AMD EPYC, torch 2.13, float32. Of native's time the loop with fused Adam on one
thread takes, with AVX-512, 1.5 at 784-512-512-10 with batch 64 (1.3e8 products), 1.2 at 4.0e8 and 5.1e8, 1.1 at 6.2e8
and 8.1e8, 0.96 to 1.01 at 1.2e9, 0.88 at 2.5e9; with AVX2, by an earlier version, 1.1 to 1.2 at 1.6e8 and 0.9 at 6.2e8.
"""

MOST_ON_TWO = 2**27
"""The same where the loop has two threads. With fused Adam it is half of that, and with more threads as much less.

With AVX-512 the loop on two threads takes, with Adam, SGD and fused Adam, 1.1 to 1.6, 1.2 and 0.93 of native's time at
784-512-512-10 with batch 64, and 1.3 to 1.6, 1.0 and 0.95 at 784-1024-10 with batch 64 (1.6e8); with fused Adam 1.3 at
5.1e7 and 1.8 at 3.9e7. Unmeasured on more than two threads, and on Arm."""

MOST_UNITS = {True: 2**15, False: 2**17}
"""Outputs of a layer, of one row and of more, above which the loop is quicker, however few products there are.

On one thread with AVX-512 the loop with SGD takes 1.3 of native's time at 2-30000-2 with one row, 0.97 at 2-50000-2,
0.85 at 2-100000-2, and there 1.8 with two rows; 0.2 at 1-1000000-2 with one and with eight."""


def most_products(threads: int, fused: bool) -> int:
    """The most products of a step, beside a loop on so many threads, with a fused optimizer or another."""
    if threads == 1:
        return MOST_PRODUCTS.get(Native.machine, 2**27)
    return MOST_ON_TWO * 2 // threads // (2 if fused else 1)


class Native(Chunks):
    """Runs a job in calls of the C++ code for `machine`, one of MACHINES."""

    name: ClassVar[str] = "native"
    machine = next(reversed(MACHINES), "none")
    first_chunk = 2**25
    """5 ms at 7 billion a second, which a machine without vectors does."""
    row_products = 1000
    """A row of 1-1-1 takes 0.1 us."""

    def __init__(self, job: Job, net: Net | None) -> None:
        self.held: _Held | None = None
        super().__init__(job, net)
        self.optimizer.gives_arrays = True

    @staticmethod
    def refusal(job: Job, net: Net | str) -> str | None:
        """Why there is no net, or why PyTorch is quicker for it; or None."""
        if isinstance(net, str):
            return net
        rows, groups = min(job.batch_size, job.epoch_rows), job.optimizer.param_groups
        if max(net.sizes[1:]) > MOST_UNITS[rows == 1]:
            return f"{net} with batches of {rows} is so wide that PyTorch is quicker"
        if products_of(job, net) > most_products(torch.get_num_threads(), bool(groups[0].get("fused"))):
            return f"{net} with batches of {rows} is so large that PyTorch's own products are quicker"
        return None

    def check_labels(self, job: Job) -> None:
        """Raise IndexError for a label out of range, where the targets are labels."""
        if not takes_labels(job.criterion, job.targets):
            return
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
        x, targets = x.detach(), job.targets.detach()
        if not x.is_cpu or not targets.is_cpu:
            raise RuntimeError(f"the inputs came to {x.device}, and the targets to {targets.device}")
        if x.shape[1] != step.sizes[0]:
            raise RuntimeError(f"the inputs are {list(x.shape)}, and the net is {self.net}")
        if LOSSES[step.loss.name].labels:
            targets = targets.long()
        else:
            _check_rows("targets", targets, x, step.sizes[-1:])
        sample_weight = None if job.sample_weight is None else job.sample_weight.detach()
        if sample_weight is not None:
            _check_rows("sample_weight", sample_weight, x, ())
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
            stride_tm=targets.stride(0),
            stride_to=targets.stride(1) if targets.dim() > 1 else 0,
            sample_weight=0 if sample_weight is None else _begin("sample_weight", sample_weight),
            stride_w=0 if sample_weight is None else sample_weight.stride(0),
            order=order.data_ptr(),
            table=table.data_ptr() if isinstance(table, Tensor) else table.buffer_info()[0],
            losses=losses.data_ptr(),
            accuracies=0 if accuracies is None else accuracies.data_ptr(),
            batch=min(job.batch_size, job.epoch_rows),
            steps=taken.steps,
            **numbers,
        )
        self.optimizer.keep_products()
        self.has_checked = False
        return losses, losses if accuracies is None else accuracies

    def note_memory(self, taken: Taken) -> None:
        """`held` has it."""

    def lie_where_they_lay(self) -> bool:
        """Whether parameters and state have their memory where the last steps found it, in the same shape."""
        return self.held is not None and self.held.memory == self.held.memory_now()

    def _held_of(self, step: Step, taken: Taken) -> "_Held":
        """Parameters, state and the weights of the criterion, where they lie now."""
        job = self.job
        weights, states = weights_of(job.criterion), chain.from_iterable(taken.states)
        tensors = (*weights, *self.net.places, *states, *taken.counts)
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
    """Where a parameter, its states and the count of its steps lie, which may be a float64; 0 for what is not there."""

    weight: int
    first: int
    second: int
    third: int
    count: int
    double_count: bool


class _Held:
    """Where the numbers of an engine's tensors lie; and they lie there while this is, whatever becomes of those.

    `prepared` is what the C++ code has made of that.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], step: Step, machine: str, dtype: torch.dtype) -> None:
        """`tensors` are the weights of classes and of positive targets, parameters, their states, group by group, and
        their counts of steps.

        Raises RuntimeError unless all that the rule needs are there, of the right shape, dtype and memory.
        """
        self.tensors, self.key = tensors, (step, machine, dtype)
        now = [None if tensor is None else tensor.detach() for tensor in tensors]
        class_weight, pos_weight, *kept = now
        parameters: list[_Parameter | None] = []
        for i, (w, *states, count) in enumerate(zip(*_groups(kept, step), strict=True)):
            shape = (step.sizes[i // 2 + 1], step.sizes[i // 2])[: 2 - i % 2]
            if w is None:
                parameters.append(None)
                continue
            kept_states = [_address("state", state, dtype, shape, needed=True) for state in states]
            first, second, third = (*kept_states, 0, 0, 0)[:3]
            found = _Parameter(
                _address("parameter", w, dtype, shape), first, second, third,
                0 if count is None else _address("count of steps", count, count.dtype, ()),
                count is not None and count.dtype == torch.float64,
            )  # fmt: skip
            parameters.append(found)
        self.prepared = native.prepare(
            machine=MACHINES[machine], is_double=dtype == torch.float64, step=step, parameters=parameters,
            class_weight=_address("class weight", class_weight, dtype, step.sizes[-1:]),
            pos_weight=_address("weight of positive targets", pos_weight, dtype, step.sizes[-1:]),
        )  # fmt: skip
        self.storages = [tensor.untyped_storage() for tensor in now if tensor is not None]
        self.lists = _lists(step, *tensors)
        self.memory = self._memory(*_lists(step, *now))

    def memory_now(self) -> tuple[list[Any], ...]:
        """Where the tensors lie, and how many bytes their storages have."""
        return self._memory(*self.lists)

    def _memory(self, parameters: list[Tensor], states: list[Tensor], rest: list[Tensor]) -> tuple[list[Any], ...]:
        pointers, sizes = [tensor.data_ptr() for tensor in rest], [storage.nbytes() for storage in self.storages]
        return *places_of(parameters, states), pointers, sizes


def _groups(tensors: Sequence[Tensor | None], step: Step) -> list[Sequence[Tensor | None]]:
    """Parameters, a group for each state of theirs, their counts."""
    size = 2 * step.layers
    return [tensors[i : i + size] for i in range(0, len(tensors), size)]


def _lists(
    step: Step, class_weight: Tensor | None, pos_weight: Tensor | None, *tensors: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, their states, and the rest of a _Held's tensors, as far as they are there."""
    parameters, *states, counts = _groups(tensors, step)
    parts = parameters, chain.from_iterable(states), (class_weight, pos_weight, *counts)
    found, kept, rest = ([tensor for tensor in part if tensor is not None] for part in parts)
    return found, kept, rest


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


def _check_rows(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RuntimeError unless `tensor` has numbers of this shape for each row of `x`, as x has them."""
    if tensor.dtype != x.dtype or tensor.shape != (len(x), *shape) or not tensor.is_cpu:
        wanted, found = f"{x.dtype}, {[len(x), *shape]}", f"{tensor.dtype}, {list(tensor.shape)}, {tensor.device}"
        raise RuntimeError(f"{name} are no longer {wanted} on the CPU, but {found}")


def _begin(name: str, tensor: Tensor) -> int:
    """Where the numbers of `tensor` lie. Raises RuntimeError where it has no memory, or less than it needs."""
    refusal = without_memory(tensor)
    if refusal is not None or tensor._is_zerotensor():
        raise RuntimeError(f"{name}: {refusal or 'it is zero without memory'}")
    return tensor.data_ptr()
