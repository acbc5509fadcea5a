"""The engine for small nets: one program on the device makes all steps of a chunk in one launch."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import dispatch
from ...kernels import mlp_training
from ...kernels.step import LOSSES, Step
from ...ops.cross_entropy import check_range
from ..criteria import weights_of
from ..job import Job
from ..net import Net
from ..tables import Taken
from .captured import Captured
from .chunks import Chunks

MOST_OUTPUTS, MOST_ROWS, MOST_WORK = 1024, 512, 2**26
"""What one program serves: outputs, rows of a batch, and products in a forward (batch · weights). Unmeasured."""

MOST_BEFORE_GRAPH = 2**21
"""Products in a forward above which a CUDA graph of many programs is quicker than one program, where one can be made.

On an H100 (bench/results), us a step from Python of one program and of a graph, before parameters were held, TF32 and
exact: 64-128-10 at batch 64 13 and 68, 23 and 85; at 128 (1.2e6 products) 20 and 73, 32 and 142; at 256 (2.4e6,
streamed) 73 and 73 in TF32; 784-128-10 at 32 (3.3e6) 64 and 63, 86 and 80; at 128 (13e6) 106 and 73, 193 and 143."""


class Resident(Chunks):
    """Runs a job in launches of kernels/mlp_training.py."""

    name: ClassVar[str] = "resident"
    first_chunk = 2**30
    """10 ms at 0.1 TFLOP/s, in which Python readies the next one. Unmeasured."""

    def __init__(self, job: Job, net: Net | None) -> None:
        if job.inputs.is_cpu:
            self.first_chunk = 0  # the interpreter
        super().__init__(job, net)

    @staticmethod
    def refusal(job: Job, net: Net | str) -> str | None:
        """Why there is no net, or why one program is not for batches of it; or None."""
        if isinstance(net, str):
            return net
        rows, x = min(job.batch_size, job.epoch_rows), job.inputs
        if net.sizes[-1] > MOST_OUTPUTS or rows > MOST_ROWS or rows * net.weights > MOST_WORK:
            return f"{net} with batches of {rows} is too large for one program"
        if not x.is_cuda or x.dtype != torch.float32 or rows * net.weights <= MOST_BEFORE_GRAPH:
            return None
        if Captured.refusal(job, net) is not None:
            return None
        return f"{x.device}, {x.dtype}, {net}, batch {job.batch_size}: many programs are quicker"

    def train(
        self, step: Step, x: Tensor, order: Tensor, taken: Taken, numbers: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """One launch. Raises IndexError before it where labels are looked at, and one of its rows is out of range."""
        job, criterion = self.job, self.job.criterion
        checked = LOSSES[step.loss.name].labels and (job.targets.is_cpu or dispatch.checks_labels())
        if self.losses and checked:  # on_chunk may have changed them
            check_range(job.targets[order], self.net.sizes[-1], criterion.ignore_index)
        class_weight, pos_weight = weights_of(criterion)
        traces = mlp_training.train_mlp(
            step, x, job.targets, order, class_weight, self.net.places, taken.states, taken.table,
            batch_size=job.batch_size, one_row=taken.one_row, pos_weight=pos_weight, sample_weight=job.sample_weight,
            **numbers,
        )  # fmt: skip
        self.optimizer.count(taken.steps)
        return traces
