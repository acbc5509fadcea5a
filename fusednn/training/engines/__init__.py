"""What makes the steps of a job. Each engine has its limits in its own file."""

from typing import ClassVar, Protocol

from torch import Tensor

from ..interrupts import Interrupts
from ..job import Job
from ..net import Net


class Engine(Protocol):
    """Makes the steps of a job: `losses` and `accuracies` have those of its `done` steps."""

    name: ClassVar[str]
    """What `explain` calls it."""
    done: int
    losses: list[Tensor]
    accuracies: list[Tensor]

    def __init__(self, job: Job, net: Net | None) -> None: ...

    @staticmethod
    def refusal(job: Job, net: Net | str) -> str | None:
        """Why it does not make the steps of `job`, or None; `net` is what was read, or why there is none."""

    @staticmethod
    def parameters(job: Job, net: Net | str) -> list[Tensor] | None:
        """Those that its kernels write, of a job that it does not refuse; None where it has none."""

    def advance(self, most: int, interrupts: Interrupts) -> None:
        """Make at least one and at most `most` steps. An error leaves the steps that `done` counts."""
