"""The engine for small nets: one program on the device makes all steps of a chunk in one launch."""

from typing import Any

from torch import Tensor

from .. import dispatch
from ..kernels import mlp_training
from ..ops.cross_entropy import check_range
from .chunks import Chunks
from .job import Job
from .nets import Net
from .optimizers import Steps

FIRST_CHUNK = 2**30
"""Products in the first chunk: 10 ms at 0.1 TFLOP/s, in which Python readies the next one. Unmeasured."""


class Resident(Chunks):
    """Runs a job in launches of kernels/mlp_training.py."""

    def __init__(self, job: Job, net: Net) -> None:
        super().__init__(job, net, 0 if job.inputs.is_cpu else FIRST_CHUNK)

    def train(self, order: Tensor, taken: Steps, numbers: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """One launch. Raises IndexError before it where labels are looked at, and one of its rows is out of range."""
        job, criterion = self.job, self.job.criterion
        if self.losses and (job.targets.is_cpu or dispatch.checks_labels()):  # on_chunk may have changed them
            check_range(job.targets[order], self.net.sizes[2], criterion.ignore_index)
        options = mlp_training.Options(
            mean=criterion.reduction == "mean",
            weighted=criterion.weight is not None,
            smoothed=criterion.label_smoothing > 0,
            accuracy=job.return_accuracy,
            **taken.rule._asdict(),
        )
        traces = mlp_training.train_mlp(
            job.inputs,
            job.targets,
            order,
            criterion.weight,
            self.net,
            taken.firsts,
            taken.seconds,
            taken.table,
            options,
            **numbers,
        )
        self.optimizer.count(taken.steps)
        return traces
