"""The rows of each step, epoch after epoch, as the reference loop draws them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .job import Job


class Rows:
    """Hands out the rows of a job's steps, in order, on the device of its data.

    An epoch's order is drawn when its first step comes, so that the generator is left where the loop leaves it; those
    of the steps before `job.start_step` are drawn at once. `position` says how many rows of its epoch lie before the
    next step.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.epoch = self.position = 0
        self.drawn = torch.empty(0, dtype=torch.int64)
        if job.start_step:
            epochs, batches = divmod(job.start_step, reference.batches_of(job.epoch_rows, job.batch_size))
            if job.order == "philox" or not job.shuffle:
                self.epoch = epochs
            else:
                for _ in range(epochs):
                    self._draw()
            if batches:
                self._draw()
                self.position = batches * job.batch_size

    def take(self, steps: int) -> Tensor:
        """The rows of the next `steps` steps, one after the other, [rows] int64; of one step a view."""
        job, parts = self.job, []
        if steps == 1 and 0 < self.position < job.epoch_rows - job.batch_size:
            begin = self.position
            self.position += job.batch_size
            return self.drawn[begin : self.position]
        while steps:
            if self.position == 0:
                self._draw()
            left = reference.batches_of(job.epoch_rows - self.position, job.batch_size)
            end = min(job.epoch_rows, self.position + min(steps, left) * job.batch_size)
            parts.append(self.drawn[self.position : end])
            self.position = end % job.epoch_rows if end else 0
            steps -= min(steps, left)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batches(self) -> Iterator[Tensor]:
        """The rows of each step; nothing else may be taken then."""
        while True:
            if self.position == 0:
                self._draw()
            begin, self.position = self.position, 0
            rows = self.drawn[begin:] if begin else self.drawn
            yield from rows.split(self.job.batch_size) if rows.shape[0] > self.job.batch_size else (rows,)

    def _draw(self) -> None:
        job = self.job
        order = reference.draw_order(job.inputs.shape[0], self.epoch, job.shuffle, job.generator, job.order, job.seed)
        if job.epoch_rows < order.shape[0]:
            order = order[: job.epoch_rows]
        if job.inputs.is_cuda and not order.is_cuda:
            order = order.pin_memory()
        self.drawn = order if order.is_cpu and job.inputs.is_cpu else order.to(job.inputs.device, non_blocking=True)
        self.epoch += 1


class All:
    """In the place of Rows for one step on all rows, as they come."""

    position = 0

    def __init__(self) -> None:
        self.order = torch.empty(0, dtype=torch.int64)

    def take(self, steps: int) -> Tensor:
        """Their numbers, [N] int64."""
        return self.order

    def of(self, inputs: Tensor) -> "All":
        """Those of such inputs."""
        if self.order.shape[0] != inputs.shape[0] or self.order.device != inputs.device:
            self.order = torch.arange(inputs.shape[0], device=inputs.device)
        return self
