"""What the engines that make many steps in one call share: a job in chunks of steps, each handed over whole."""

from typing import Any

import torch
from torch import Tensor

from ..ops.cross_entropy import check_range
from .interrupts import Interrupts
from .job import Job
from .nets import Net
from .optimizers import KernelOptimizer, Steps
from .orders import Rows
from .pacing import Pace

MOST_STEPS = 10_000
"""The most steps of a chunk: its order and table take 144 bytes of memory a step and 8 a row."""


class Chunks:
    """Runs a job in chunks of steps; `losses` and `accuracies` have those of its `done` steps."""

    def __init__(self, job: Job, net: Net, first: int) -> None:
        """`first` is how many products the first chunk may have, which nobody has timed yet."""
        self.net, self.parameters = net, net.parameters
        self.states: list[Tensor] = []
        self.found: tuple[list[Any], ...] = ()
        self.optimizer = KernelOptimizer(job.optimizer, net, job.lr_schedule)
        self.check_labels(job)
        self.begin(job)
        self.pace = Pace(job.inputs, first // products_of(job, net), MOST_STEPS)

    trusts = False
    """Whether somebody has just seen that parameters and state lie where they lay."""

    def lie_where_they_lay(self) -> bool:
        """Whether parameters and state lie where the last steps found them, in the same shape."""
        return bool(self.found) and self.found == self._places()

    def note_memory(self, taken: Steps) -> None:
        """Note where parameters and state lie."""
        self.states = [state for state in (*taken.firsts, *taken.seconds) if state is not None]
        self.found = self._places()

    def _places(self) -> tuple[list[Any], ...]:
        return places_of(self.parameters, self.states)

    def begin(self, job: Job, rows: Rows | None = None) -> None:
        """Run `job` from now on, which may have other data, and nothing else that is new."""
        self.job, self.rows, self.done, self.shape = job, rows or Rows(job), job.start_step, job.inputs.shape
        self.has_checked = True  # the memory of the data, until somebody else has a turn
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def check_labels(self, job: Job) -> None:
        """Raise IndexError for a label out of range, where labels are looked at."""
        check_range(job.targets, self.net.sizes[2], job.criterion.ignore_index)

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Launch at least one and at most `most` steps."""
        if self.job.steps == 1:
            self._launch(1)
        else:
            self.pace.send(min(most, self.pace.chunk), self._launch)
        self.optimizer.finish()

    def _launch(self, steps: int) -> None:
        job, criterion = self.job, self.job.criterion
        if job.inputs.shape != self.shape or len(job.targets) != self.shape[0]:  # the order would lead past their end
            raise RuntimeError(f"the inputs became {list(job.inputs.shape)}, for {len(job.targets)} targets")
        taken = self.optimizer.take(steps)
        steps = taken.steps
        position, order = self.rows.position, self.rows.take(steps)
        numbers = {
            "batch_size": job.batch_size,
            "position": position,
            "epoch_rows": job.epoch_rows,
            "ignore_index": criterion.ignore_index,
            "label_smoothing": criterion.label_smoothing,
        }
        losses, accuracies = self.train(order, taken, numbers)
        self.note_memory(taken)
        torch.autograd.graph.increment_version(self.parameters)
        self.losses.append(losses)
        self.accuracies.append(accuracies)
        self.done += steps

    def train(self, order: Tensor, taken: Steps, numbers: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Make the steps of the table in `taken` on the rows of `order`, and count them in the optimizer.

        Returns their losses and accuracies, [steps] each.
        """
        raise NotImplementedError


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
    return 3 * min(job.batch_size, max(1, job.epoch_rows)) * (net.w1.numel() + net.w2.numel())
