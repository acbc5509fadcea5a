"""The loop as a CUDA graph of one step, for nets of many sizes whose optimizer's step is a kernel of ours.

    rows = order[count]
    loss = criterion(model(inputs[rows]), targets[rows]);  its gradients;  the optimizer's step
    count += 1

Whatever differs between steps lies on the device: the order of the rows and the optimizer's numbers have a place for
each step of a chunk, and the count says which. So the graph is replayed as it is. The first steps, and those of ragged
batches, run the same operations one by one, and come to the same bits.
"""

import operator
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import dispatch, reference
from ...kernels.step import LOSS_SCALE, ROW
from ...kernels.updates import optimizer_step
from ...reading import Facts
from .. import criteria, optimizers
from ..interrupts import Interrupts
from ..job import Job
from ..net import Net, read_pure
from ..orders import Rows
from ..pacing import Pace
from ..tables import KernelOptimizer, Taken
from .chunks import take

LEAST_STEPS = 50
"""Fewer steps are not worth the capture of a CUDA graph. Unmeasured."""

UNCAPTURED = 3
"""Steps before the capture, in which kernels are compiled and libraries make their workspaces."""

MOST_STEPS = 1000
"""The most steps of a chunk."""


class Captured:
    """Runs a job in chunks of replays; `losses` and `accuracies` have those of its `done` steps."""

    name: ClassVar[str] = "captured"

    @staticmethod
    def refusal(job: Job, net: Net | str) -> str | None:
        """Why a step of `job` is no CUDA graph, or None; the net does not matter."""
        x = job.inputs
        if not x.is_cuda or torch.version.hip:
            return "CUDA graphs are NVIDIA's"
        if dispatch.checks_labels():
            return "labels are looked at"
        if 0 < job.steps < LEAST_STEPS:  # also those before start_step: a run that goes on has the same engine
            return f"fewer than {LEAST_STEPS} steps"
        if not job.epoch_rows:
            return "there are no rows"
        parameters = read_pure(job.model)
        if isinstance(parameters, str):
            return parameters
        if not parameters or parameters[0].dtype != x.dtype or parameters[0].device != x.device:
            return "the parameters have another dtype or device than the inputs"
        return (
            criteria.refusal(job.criterion, None, x, Facts())
            or criteria.refusal_now(job.criterion, None, x, job.targets)
            or optimizers.refusal(job.optimizer, parameters, job.lr_schedule, Facts())
            or optimizers.refusal_now(job.optimizer, parameters)
        )

    @staticmethod
    def parameters(job: Job, net: Net | str) -> list[Tensor] | None:
        """All of the model's."""
        found = read_pure(job.model)
        assert not isinstance(found, str)
        return found

    def __init__(self, job: Job, net: Net | None) -> None:
        inputs, self.batch = job.inputs, min(job.batch_size, job.epoch_rows)
        parameters = read_pure(job.model)
        assert not isinstance(parameters, str)
        self.job, self.trained, self.rows, self.done = job, parameters, Rows(job), job.start_step
        self.optimizer = KernelOptimizer(job.optimizer, parameters, job.lr_schedule, job.max_grad_norm)
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []
        self.pace = Pace(inputs, UNCAPTURED, MOST_STEPS)
        assert isinstance(job.model, nn.Module)
        self.model = job.model
        names = {id(parameter): name for name, parameter in job.model.named_parameters()}
        self.named = {names[id(parameter)]: parameter for parameter in parameters}
        self.count = torch.zeros(1, dtype=torch.int64, device=inputs.device)
        self.order = torch.zeros(MOST_STEPS, self.batch, dtype=torch.int64, device=inputs.device)
        self.table = inputs.new_zeros(MOST_STEPS, len(parameters), ROW)
        self.traces = inputs.new_zeros(2, MOST_STEPS)
        self.stream = torch.cuda.Stream(inputs.device) if inputs.is_cuda else None
        self.taken: Taken | None = None
        self.scaled = False
        self.replay: Callable[[], None] | None = None
        self.captured: Taken | None = None  # what the optimizer was when the step was captured

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Make at least one and at most `most` steps: full batches, or a ragged one."""
        whole = self.job.epoch_rows % self.batch == 0  # no batch is ragged, so a chunk may have several epochs
        left = most if whole else (self.job.epoch_rows - self.rows.position) // self.batch
        steps = max(1, min(most, self.pace.chunk, left))
        with torch.enable_grad():
            if (
                left
                and self.done - self.job.start_step >= UNCAPTURED
                and self.replay is None
                and self.taken is not None
            ):
                self.replay, self.captured = capture(self._step_of_order, self.stream), self.taken
                self.constants = self._constants()
            self.pace.send(steps, self._run_on_stream)
        self.optimizer.finish()

    def _run_on_stream(self, steps: int) -> None:
        if self.stream is None:
            self._run(steps)
            return
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                self._run(steps)
        finally:  # what was launched before an error too must be behind what the caller launches next
            current.wait_stream(self.stream)
        for trace in (*self.losses[-1:], *self.accuracies[-1:]):
            trace.record_stream(current)

    def _run(self, steps: int) -> None:
        self.taken, self.scaled = take(self.optimizer, self.job, self.done, steps)
        steps = self.taken.steps
        rows = self.rows.take(steps)
        self.table[:steps].copy_(self.taken.table)
        self.count.zero_()
        if len(rows) == steps * self.batch:
            self.order[:steps].copy_(rows.view(steps, -1))
            step = self.replay if self.replay is not None and self._is_captured() else self._step_of_order
            for _ in range(steps):
                step()
        else:
            self._step(rows)
        losses, accuracies = self.traces[:, :steps].clone()
        self.losses.append(losses)
        if self.job.return_accuracy:
            self.accuracies.append(accuracies)
        torch.autograd.graph.increment_version(self.trained)
        self.optimizer.count(steps)
        self.done += steps

    def _is_captured(self) -> bool:
        """Whether the optimizer has the rule and the tensors that the graph has: on_chunk may load others."""
        now, then = self.taken, self.captured
        assert now is not None
        assert then is not None
        if now.rule != then.rule or self._constants() != self.constants:
            return False
        return all(map(operator.is_, chain.from_iterable(now.states), chain.from_iterable(then.states)))

    def _constants(self) -> tuple[Any, ...]:
        """What else the graph has: the loss and its numbers, and where parameters and weights lie."""
        job, criterion = self.job, self.job.criterion
        weights = *criteria.weights_of(criterion), job.sample_weight
        tensors = (*self.trained, *(weight for weight in weights if weight is not None))
        loss, numbers = criteria.loss_of(criterion, job.targets), criteria.numbers_of(criterion)
        return loss, self.scaled, *numbers.values(), *(tensor.data_ptr() for tensor in tensors)

    def _step_of_order(self) -> None:
        self._step(self.order.index_select(0, self.count).view(-1))

    def _step(self, rows: Tensor) -> None:
        job, taken = self.job, self.taken
        assert taken is not None
        targets = job.targets[rows]
        # Fresh leaves on the parameters' memory: where an older graph lives (a loss that the user kept), the gradient
        # nodes of the parameters would bring its stream, often the default one, into the capture, which CUDA forbids.
        leaves = {name: w.detach().requires_grad_() for name, w in self.named.items()}
        outputs = torch.func.functional_call(self.model, leaves, (job.inputs[rows],))
        weights = None if job.sample_weight is None else job.sample_weight[rows]
        loss = reference.loss_of(job.criterion, outputs, reference.as_long(targets), weights)
        if self.scaled:
            loss = self.table[:, 0, LOSS_SCALE].index_select(0, self.count)[0] * loss
        gradients = [g.contiguous() for g in torch.autograd.grad(loss, list(leaves.values()))]
        if job.max_grad_norm is not None:
            for leaf, g in zip(leaves.values(), gradients, strict=True):
                leaf.grad = g
            nn.utils.clip_grad_norm_(leaves.values(), job.max_grad_norm)
        for index, (w, g) in enumerate(zip(self.trained, gradients, strict=True)):
            states = [state for group in taken.states if (state := group[index]) is not None]
            optimizer_step(w, states, g, self.table, self.count, index, taken.rule)
        self.traces[0].index_copy_(0, self.count, loss.detach().view(1))
        if job.return_accuracy:
            right = reference.accuracy(outputs.detach(), targets, job.criterion)
            self.traces[1].index_copy_(0, self.count, right.view(1))
        self.count += 1


def capture(step: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], None]:
    """A function that replays what `step` launches on `stream`."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local": another thread, such as that of a DataLoader that pins memory, may go on calling CUDA
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay
