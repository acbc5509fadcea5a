"""What the engines that make many steps in one call share: a job in chunks of steps, each handed over whole."""

import math
import operator
from abc import ABC, abstractmethod
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.step import Step
from ...ops.cross_entropy import check_range
from .. import criteria
from ..interrupts import Interrupts
from ..job import Job, series
from ..net import Net
from ..orders import Rows
from ..pacing import Pace
from ..tables import KernelOptimizer, Taken

MOST_STEPS = 10_000
"""The most steps of a chunk: order and table take 8 bytes a row, and 96 bytes a step for each layer in float32."""


class Chunks(ABC):
    """Runs a job in chunks of steps; `losses` and `accuracies` have those of its `done` steps."""

    name: ClassVar[str]
    first_chunk: int
    """How many products the first chunk may have, which nobody has timed yet."""
    row_products = 0
    """What a row takes beside its products, as so many more."""

    def __init__(self, job: Job, net: Net | None) -> None:
        assert net is not None
        self.net, self.trained = net, net.parameters
        self.biases = tuple(bias is not None for bias in net.places[1::2])
        self.states: list[Tensor] = []
        self.found: tuple[list[Any], ...] = ()
        self.optimizer = KernelOptimizer(job.optimizer, net.places, job.lr_schedule, job.max_grad_norm)
        self.check_labels(job)
        self.begin(job)
        rows = min(job.batch_size, max(1, job.epoch_rows))
        self.pace = Pace(job.inputs, self.first_chunk // (products_of(job, net) + self.row_products * rows), MOST_STEPS)

    @staticmethod
    def parameters(job: Job, net: Net | str) -> list[Tensor] | None:
        """Those of the net."""
        assert not isinstance(net, str)
        return net.parameters

    trusts = False
    """Whether somebody has just seen that parameters and state lie where they lay."""

    def lie_where_they_lay(self) -> bool:
        """Whether parameters and state lie where the last steps found them, in the same shape."""
        return bool(self.found) and self.found == self._places()

    def note_memory(self, taken: Taken) -> None:
        """Note where parameters and state lie."""
        states, trusts = [state for state in chain.from_iterable(taken.states) if state is not None], self.trusts
        self.trusts = False
        if not trusts or len(states) != len(self.states) or not all(map(operator.is_, states, self.states)):
            self.states = states
            self.found = self._places()

    def _places(self) -> tuple[list[Any], ...]:
        return places_of(self.trained, self.states)

    def begin(self, job: Job, rows: Rows | None = None) -> None:
        """Run `job` from now on, which may have other data, and nothing else that is new."""
        self.job, self.rows, self.done, self.shape = job, rows or Rows(job), job.start_step, job.inputs.shape
        self.has_checked = True  # the memory of the data, until somebody else has a turn
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def check_labels(self, job: Job) -> None:
        """Raise IndexError for a label out of range, where labels are looked at."""
        if criteria.takes_labels(job.criterion, job.targets):
            check_range(job.targets, self.net.sizes[-1], job.criterion.ignore_index)

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Launch at least one and at most `most` steps."""
        if self.job.steps == 1:
            self._launch(1)
        else:
            self.pace.send(min(most, self.pace.chunk), self._launch)
        self.optimizer.finish()

    def _launch(self, steps: int) -> None:
        job, criterion, weights = self.job, self.job.criterion, self.job.sample_weight
        x = flat(job.inputs)
        shape, rows = job.inputs.shape, job.inputs.shape[:1]
        if x is None or shape != self.shape or job.targets.shape[:1] != rows:  # the order would lead past their end
            raise RuntimeError(f"the inputs became {list(shape)}, for {len(job.targets)} targets")
        if weights is not None and weights.shape != rows:
            raise RuntimeError(f"the sample_weight became {list(weights.shape)}, for inputs of {list(shape)}")
        taken, scaled = take(self.optimizer, job, self.done, steps)
        steps = taken.steps
        position, order = self.rows.position, self.rows.take(steps)
        loss = criteria.loss_of(criterion, job.targets)
        if weights is not None or scaled:
            loss = loss._replace(rows_weighted=weights is not None, scaled=scaled)
        accuracy, clipped = job.return_accuracy, job.max_grad_norm is not None
        step = Step(self.net.sizes, self.biases, self.net.activations, loss, taken.rule, accuracy, clipped)
        numbers = {"position": position, "epoch_rows": job.epoch_rows, **criteria.numbers_of(criterion)}
        losses, accuracies = self.train(step, x, order, taken, numbers)
        self.note_memory(taken)
        torch.autograd.graph.increment_version(self.trained)
        self.losses.append(losses)
        self.accuracies.append(accuracies)
        self.done += steps

    @abstractmethod
    def train(
        self, step: Step, x: Tensor, order: Tensor, taken: Taken, numbers: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Make the steps of the table in `taken` on the rows of x [N, I] in `order`; count them in the optimizer.

        Returns their losses and accuracies, [steps] each.
        """


def take(optimizer: KernelOptimizer, job: Job, done: int, steps: int) -> tuple[Taken, bool]:
    """What the steps of a job behind `done` ones need of its optimizer, and whether their losses are scaled.

    They are fewer than `steps` where a function of the caller's raises an error, which `optimizer.finish` raises again.
    """
    if not job.is_scaled:
        return optimizer.take(steps), False
    (scales, error), (decays, other) = series(job.loss_scale, done, steps), series(job.decay_scale, done, steps)
    if decays is not None and len(decays) < (steps if scales is None else len(scales)):
        error = other
    steps = min(len(numbers) for numbers in (scales, decays, range(steps)) if numbers is not None)
    if not steps and error is not None:
        raise error
    taken = optimizer.take(steps, scales and scales[:steps], decays and decays[:steps])
    if optimizer.error is None:
        optimizer.error = error
    return taken, scales is not None


def flat(inputs: Tensor) -> Tensor | None:
    """Inputs as a matrix, which is a view of them; None where it cannot be one."""
    if inputs.dim() == 2:
        return inputs
    try:
        return inputs.view(len(inputs), math.prod(inputs.shape[1:]))
    except RuntimeError:
        return None


def places_of(parameters: list[Tensor], states: list[Tensor]) -> tuple[list[Any], ...]:
    """Where parameters and state lie: what `.data =` and `t_()` change of a tensor that stays the same."""
    tensors = parameters + states
    return (
        [tensor.data_ptr() for tensor in tensors],
        [tensor.is_contiguous() for tensor in tensors],
        [parameter.numel() for parameter in parameters],
        [parameter.shape for parameter in parameters if parameter.dim() == 2],
    )


def products_of(job: Job, net: Net) -> int:
    """How many products of two numbers a step makes: as many in the backward of each weight, and of its input."""
    return 3 * min(job.batch_size, max(1, job.epoch_rows)) * net.weights
