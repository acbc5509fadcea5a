"""The engine for small nets: one program on the device makes all steps of a chunk in one launch."""

import time
from collections import deque

import torch
from torch import Tensor

from ..kernels import mlp_training
from ..ops.cross_entropy import check_range
from .interrupts import Interrupts
from .job import Job
from .nets import Net
from .optimizers import KernelOptimizer
from .orders import Rows

CHUNK_SECONDS = 0.04
"""How long a chunk of steps should take: Ctrl-C waits for two."""

FIRST_CHUNK = 2**32
"""Products in the first chunk, before any is timed: some 40 ms at 0.1 TFLOP/s, and never above MOST_STEPS steps.
Unmeasured."""

MOST_STEPS = 10_000
"""The most steps of a chunk: its order and table take some 400 bytes of memory a step and 8 a row."""


class Resident:
    """Runs a job in chunks of steps; `losses` and `accuracies` have those of its `done` steps, `launches` counts."""

    def __init__(self, job: Job, net: Net) -> None:
        check_range(job.targets, net.sizes[2], job.criterion.ignore_index)
        self.job, self.net, self.rows = job, net, Rows(job)
        self.optimizer = KernelOptimizer(job.optimizer, net, job.lr_schedule)
        self.losses: list[Tensor] = []
        self.accuracies: list[Tensor] = []
        self.done = 0
        products = 3 * min(job.batch_size, max(1, job.epoch_rows)) * (net.w1.numel() + net.w2.numel())
        self.chunk = max(1, min(MOST_STEPS, FIRST_CHUNK // products)) if job.inputs.is_cuda else 1
        self.marks: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Launch at least one and at most `most` steps; waits until no more than two chunks are on their way."""
        steps, begin = min(most, self.chunk), time.monotonic()
        started = _mark(self.job.inputs)
        self._launch(steps)
        ended = _mark(self.job.inputs)
        self.done += steps
        if started is None or ended is None:  # the interpreter: whatever is launched is done
            self._adapt(steps, time.monotonic() - begin)
            return
        self.marks.append((steps, started, ended))
        if len(self.marks) > 1:
            steps, started, ended = self.marks.popleft()
            ended.synchronize()
            self._adapt(steps, started.elapsed_time(ended) / 1000)

    def _adapt(self, steps: int, seconds: float) -> None:
        """Make the next chunk as long as it should be, if so many steps took so many seconds."""
        self.chunk = max(1, min(MOST_STEPS, 4 * self.chunk, int(steps * CHUNK_SECONDS / max(seconds, 1e-6))))

    def _launch(self, steps: int) -> None:
        job, criterion, net = self.job, self.job.criterion, self.net
        position, order = self.rows.position, self.rows.take(steps)
        taken = self.optimizer.take(steps)
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
            net,
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
        torch.autograd.graph.increment_version(net.parameters)
        self.losses.append(losses)
        self.accuracies.append(accuracies)


def _mark(tensor: Tensor) -> torch.cuda.Event | None:
    """A point of time on the device of `tensor`, None on the CPU."""
    if not tensor.is_cuda:
        return None
    with torch.cuda.device(tensor.device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event
