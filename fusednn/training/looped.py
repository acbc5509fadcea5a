"""The engine for everything: the reference loop, of whatever the model and the criterion are made."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .interrupts import Interrupts
from .job import Job
from .orders import Rows

CHUNK_SECONDS = 0.05
"""After so long the loop comes up for air: to report, where no number of steps was asked for."""


class Looped:
    """Runs a job step by step; `losses` and `accuracies` have those of its `done` steps."""

    def __init__(self, job: Job, batches: Iterator[tuple[Tensor, Tensor]] | None = None) -> None:
        """`batches` are those of the steps, if they are not rows of the job's data."""
        self.job, self.done, self.batches = job, job.start_step, batches or _batches(job)
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Make at least one and at most `most` steps; Ctrl-C ends it after the step that it comes in."""
        begin, job = time.monotonic(), self.job
        model, criterion, optimizer, batches = job.model, job.criterion, job.optimizer, self.batches
        with torch.enable_grad():
            for _ in range(most):
                inputs, targets = next(batches)
                outputs = model(inputs)
                loss = criterion(outputs, reference.as_long(targets))
                optimizer.zero_grad()
                loss.backward()
                right = reference.accuracy(outputs, targets, criterion) if job.return_accuracy else None
                optimizer.step()
                self.losses.append(loss.detach())
                if right is not None:
                    self.accuracies.append(right)
                self.done += 1
                if job.lr_schedule is not None:  # last: what it may raise comes after a whole step
                    job.lr_schedule.step()
                if interrupts.pending or time.monotonic() - begin > CHUNK_SECONDS:
                    return


def _batches(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of each step."""
    for rows in Rows(job).batches():
        yield job.inputs[rows], job.targets[rows]
