"""The engine for everything: the reference loop, of whatever the model and the criterion are made."""

import time

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

    def __init__(self, job: Job) -> None:
        self.job, self.rows, self.done = job, Rows(job), 0
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Make at least one and at most `most` steps; Ctrl-C ends it after the step that it comes in."""
        begin, last = time.monotonic(), self.done + most
        with torch.enable_grad():
            while self.done < last:
                self._step(self.rows.take(1))
                if interrupts.pending or time.monotonic() - begin > CHUNK_SECONDS:
                    return

    def _step(self, rows: Tensor) -> None:
        job = self.job
        targets = job.targets[rows]
        outputs = job.model(job.inputs[rows])
        loss = job.criterion(outputs, reference.as_long(targets))
        job.optimizer.zero_grad()
        loss.backward()
        if job.return_accuracy:
            ignored = getattr(job.criterion, "ignore_index", -100)
            right = reference.accuracy(outputs.detach(), targets, ignored).reshape(1)
        job.optimizer.step()
        self.losses.append(loss.detach().reshape(1))
        if job.return_accuracy:
            self.accuracies.append(right)
        self.done += 1
        if job.lr_schedule is not None:  # last: what it may raise comes after a whole step
            job.lr_schedule.step()
