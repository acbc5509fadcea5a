"""The engine for small nets: one program on the device makes all steps of a chunk in one launch."""

import torch
from torch import Tensor

from ..kernels import mlp_training
from ..ops.cross_entropy import check_range
from .interrupts import Interrupts
from .job import Job
from .nets import Net
from .optimizers import KernelOptimizer
from .orders import Rows
from .pacing import Pace

FIRST_CHUNK = 2**30
"""Products in the first chunk, which nobody has timed yet: 10 ms at 0.1 TFLOP/s, in which Python readies the next one.
Unmeasured."""

MOST_STEPS = 10_000
"""The most steps of a chunk: its order and table take 144 bytes of memory a step and 8 a row."""


class Resident:
    """Runs a job in chunks of steps; `losses` and `accuracies` have those of its `done` steps."""

    def __init__(self, job: Job, net: Net) -> None:
        check_range(job.targets, net.sizes[2], job.criterion.ignore_index)
        self.job, self.net, self.rows, self.done = job, net, Rows(job), 0
        self.optimizer = KernelOptimizer(job.optimizer, net, job.lr_schedule)
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []
        products = 3 * min(job.batch_size, max(1, job.epoch_rows)) * (net.w1.numel() + net.w2.numel())
        self.pace = Pace(job.inputs, FIRST_CHUNK // products, MOST_STEPS)

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Launch at least one and at most `most` steps."""
        self.pace.send(min(most, self.pace.chunk), self._launch)
        self.optimizer.finish()

    def _launch(self, steps: int) -> None:
        job, criterion = self.job, self.job.criterion
        taken = self.optimizer.take(steps)
        steps = len(taken.table)
        position, order = self.rows.position, self.rows.take(steps)
        options = mlp_training.Options(
            mean=criterion.reduction == "mean",
            weighted=criterion.weight is not None,
            smoothed=criterion.label_smoothing > 0,
            accuracy=job.return_accuracy,
            **taken.rule._asdict(),
        )
        losses, accuracies = mlp_training.train_mlp(
            job.inputs,
            job.targets,
            order,
            criterion.weight,
            self.net,
            taken.firsts,
            taken.seconds,
            taken.table,
            options,
            batch_size=job.batch_size,
            position=position,
            epoch_rows=job.epoch_rows,
            ignore_index=criterion.ignore_index,
            label_smoothing=criterion.label_smoothing,
        )
        torch.autograd.graph.increment_version(self.net.parameters)
        self.losses.append(losses)
        self.accuracies.append(accuracies)
        self.optimizer.count(steps)
        self.done += steps
