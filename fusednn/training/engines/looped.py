"""The engine for everything: the reference loop, of whatever the model and the criterion are made."""

import time
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from ... import reference
from ..interrupts import Interrupts
from ..job import Job
from ..net import Net
from ..orders import Rows

CHUNK_SECONDS = 0.05
"""After so long the loop comes up for air: to report, where no number of steps was asked for."""


class Looped:
    """Runs a job step by step; `losses` and `accuracies` have those of its `done` steps."""

    name: ClassVar[str] = "looped"

    @staticmethod
    def refusal(job: Job, net: Net | str) -> str | None:
        """It makes the steps of any job."""
        return None

    @staticmethod
    def parameters(job: Job, net: Net | str) -> list[Tensor] | None:
        """There are no kernels."""
        return None

    def __init__(self, job: Job, net: Net | None = None) -> None:
        self.job, self.done, self.batches = job, job.start_step, Rows(job).batches()
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Make at least one and at most `most` steps; Ctrl-C ends it after the step that it comes in."""
        end, job, losses = time.monotonic() + CHUNK_SECONDS, self.job, self.losses
        model, criterion, optimizer, schedule = job.model, job.criterion, job.optimizer, job.lr_schedule
        plain, right = job.is_plain, None
        with torch.enable_grad():
            # the lines of step_of, without a call: what a step costs beside them is counted
            for rows in islice(self.batches, most):
                if plain:
                    outputs = model(job.inputs[rows])
                    loss = criterion(outputs, reference.as_long(job.targets[rows]))
                    optimizer.zero_grad()
                    loss.backward()
                    if job.return_accuracy:
                        right = reference.accuracy(outputs, job.targets[rows], criterion)
                    optimizer.step()
                    losses.append(loss.detach())
                else:
                    weights = None if job.sample_weight is None else job.sample_weight[rows]
                    loss, right = step_of(job, job.inputs[rows], job.targets[rows], weights, self.done)
                    losses.append(loss)
                if right is not None:
                    self.accuracies.append(right)
                self.done += 1
                if schedule is not None:  # last: what it may raise comes after a whole step
                    schedule.step()
                if interrupts.pending or time.monotonic() > end:
                    return


def step_of(
    job: Job, inputs: Tensor, targets: Tensor, weights: Tensor | None, number: int
) -> tuple[Tensor, Tensor | None]:
    """Make step `number` on a batch; its loss, and its accuracy if that is asked for."""
    scale, decay = (reference.number_at(scale, number) for scale in (job.loss_scale, job.decay_scale))
    outputs = job.model(inputs)
    loss = reference.loss_of(job.criterion, outputs, reference.as_long(targets), weights)
    if scale != 1.0:
        loss = scale * loss
    job.optimizer.zero_grad()
    loss.backward()
    right = reference.accuracy(outputs, targets, job.criterion) if job.return_accuracy else None
    if job.max_grad_norm is not None:
        reference.clip(job.optimizer, job.max_grad_norm)
    with reference.scaled_decay(job.optimizer, decay):
        job.optimizer.step()
    return loss.detach(), right
