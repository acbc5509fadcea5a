"""The rows of each step, epoch after epoch, as the reference loop draws them."""

import torch
from torch import Tensor

from .. import reference
from .job import Job


class Rows:
    """Hands out the rows of a job's steps, in order, on the device of its data.

    An epoch's order is drawn when its first step comes, so that the generator is left where the loop leaves it.
    `position` says how many rows of its epoch lie before the next step.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.epoch = self.position = 0
        self.drawn = torch.empty(0, dtype=torch.int64)

    def take(self, steps: int) -> Tensor:
        """The rows of the next `steps` steps, one after the other, [rows] int64; of one step a view."""
        job, parts = self.job, []
        while steps:
            if self.position == 0:
                self._draw()
            left = max(1, -(-(job.epoch_rows - self.position) // job.batch_size))  # an empty epoch has an empty batch
            end = min(job.epoch_rows, self.position + min(steps, left) * job.batch_size)
            parts.append(self.drawn[self.position : end])
            self.position = end % job.epoch_rows if end else 0
            steps -= min(steps, left)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _draw(self) -> None:
        job = self.job
        order = reference.draw_order(len(job.inputs), self.epoch, job.shuffle, job.generator, job.order, job.seed)
        order = order[: job.epoch_rows]
        if job.inputs.is_cuda and not order.is_cuda:
            order = order.pin_memory()
        self.drawn = order.to(job.inputs.device, non_blocking=True)
        self.epoch += 1
