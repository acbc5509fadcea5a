"""Runs the engine that was chosen: in chunks of steps, or a step a call."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import dispatch
from .engines.looped import step_of
from .engines.native import Native
from .interrupts import Interrupts
from .job import Job, check_data, check_decays, check_training, norm_of, number_of
from .optimizers import zero_grad
from .orders import All
from .plan import Choice, choose, refusal_to_go_on


def run(job: Job) -> tuple[Tensor, Tensor]:
    """The losses and accuracies of the steps of `job`, which are made; its on_chunk is told of them."""
    choice = choose(job)
    if dispatch.watched():
        dispatch.note(dispatch.Decision("train_steps", choice.engine.name, choice.reason))
    engine = start(choice)
    try:
        _advance(engine, job, choice)
    finally:
        if engine.done > job.start_step:
            zero_grad(job.optimizer)
    losses, accuracies = (
        _joined(trace) if trace else job.inputs.new_empty(0) for trace in (engine.losses, engine.accuracies)
    )
    return losses, accuracies


def start(choice: Choice) -> Any:
    """The engine, with what it is given."""
    engine: Any = choice.engine(choice.job, choice.net)
    if choice.net is not None:
        engine.optimizer.facts = choice.facts[1]
    return engine


def _joined(pieces: list[Tensor]) -> Tensor:
    """Losses of one step each, [], or of several, as one tensor."""
    if len(pieces) == 1:
        return pieces[0].reshape(-1)
    return torch.cat(pieces) if pieces[0].dim() else torch.stack(pieces)


def _advance(engine: Any, job: Job, choice: Choice) -> None:
    """Let `engine` make the steps of `job`, and tell its on_chunk of them, also of those before an error."""
    steps, on_chunk, chunk_steps = job.steps, job.on_chunk, job.chunk_steps
    told = 0  # how many of the engine's pieces of losses on_chunk has seen

    def tell() -> bool:
        """Tell on_chunk of the steps since it was last told; whether the training goes on."""
        nonlocal told
        fresh = engine.losses[told:]
        if on_chunk is not None and fresh:
            losses = _joined(fresh)
            told = len(engine.losses)
            try:
                on_chunk(engine.done, losses)
            except StopIteration:
                return False
        return True

    try:
        while engine.done < steps:
            most = steps - engine.done
            if chunk_steps is not None:
                most = min(most, chunk_steps - engine.done % chunk_steps)
            with Interrupts() as interrupts:
                engine.advance(most, interrupts)
            due = chunk_steps is None or engine.done % chunk_steps == 0 or engine.done == steps
            if due and not tell():
                return
            if due and on_chunk is not None and choice.parameters is not None and engine.done < steps:
                choice = _still(job, choice, engine)
    except BaseException:
        tell()
        raise


def _still(job: Job, choice: Choice, engine: Any) -> Choice:
    """The choice for `job` now. Raises RuntimeError where `engine` does not do that any more."""
    if choice.net is not None and engine.lie_where_they_lay() and choice.is_for(job):
        engine.trusts = True
        return choice
    now = choose(job)
    if (refusal := refusal_to_go_on(now, choice)) is not None:
        raise RuntimeError(f"on_chunk changed what is trained, {refusal}: call train_steps for the steps left")
    if now.net is not None:
        engine.optimizer.facts = now.facts[1]
    return now


MOST_UNREAD = 31
"""So many steps the loop makes at most before it is looked again whether a kernel could make them."""


class TrainStep:
    """`step(x, y)`: what :func:`fusednn.make_train_step` returns."""

    def __init__(
        self, model: Callable[[Tensor], Tensor], optimizer: Optimizer, criterion: Any, lr_schedule: Any,
        return_accuracy: bool, max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        check_training(model, optimizer, criterion, lr_schedule, return_accuracy)
        self._training = model, optimizer, criterion, lr_schedule, return_accuracy
        self._max_norm = norm_of(max_grad_norm)
        self._choice: Choice | None = None
        self._kernels: Any = None
        self._kind: Any = None
        self._rows = All()
        self._unread = self._wait = 0
        self.engine: str | None = None
        """Who made the last step; None before the first."""

    def __call__(
        self, inputs: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None,
        loss_scale: float = 1.0, decay_scale: float = 1.0,
    ) -> Any:  # fmt: skip
        """Make a step on inputs and targets [N, ...]; returns its loss, [], or its loss and accuracy.

        Rows may have weights, [N], and this step a factor of the loss and of each group's weight_decay.
        """
        check_data(inputs, targets, self._training[2], sample_weight)
        rows = inputs.shape[0]
        job = Job(*self._training, inputs, targets, max(1, rows), 1, rows, max_grad_norm=self._max_norm)
        is_float = type(loss_scale) is type(decay_scale) is float
        if sample_weight is not None or not (is_float and loss_scale == decay_scale == 1.0):
            scales = number_of("loss_scale", loss_scale), number_of("decay_scale", decay_scale)
            check_decays(job.optimizer, scales[1])
            job = job._replace(sample_weight=sample_weight, loss_scale=scales[0], decay_scale=scales[1])
        if self._wait and not dispatch.watched():
            self._wait -= 1
            loss, right = self._loop(job)
        else:
            choice = self._choice
            holds = choice is not None and self._kernels.lie_where_they_lay() and choice.is_for(job)
            if self._kernels is not None:
                self._kernels.trusts = holds
            if choice is None or not holds:
                self._choice, choice = None, choose(job)
            if dispatch.watched():
                dispatch.note(dispatch.Decision("train_step", choice.engine.name, choice.reason))
            self.engine = choice.engine.name
            if choice.net is None:
                self._kernels = self._kind = None
                self._unread = self._wait = min(2 * self._unread + 1, MOST_UNREAD)
                loss, right = self._loop(job)
            else:
                self._unread = 0
                loss, right = self._launch(choice, job)
                choice = choice.without_data()
                self._choice, self._kernels.job = choice, choice.job
        return (loss, right) if job.return_accuracy else loss

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are new steps of copies of what it trains."""
        return TrainStep, (*self._training, self._max_norm)

    def _loop(self, job: Job) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled():
            loss, right = step_of(job, job.inputs, job.targets, job.sample_weight, 0)
        else:
            with torch.enable_grad():
                loss, right = step_of(job, job.inputs, job.targets, job.sample_weight, 0)
        zero_grad(job.optimizer)
        if job.lr_schedule is not None:
            job.lr_schedule.step()
        return loss, right

    def _launch(self, choice: Choice, job: Job) -> tuple[Tensor, Tensor | None]:
        assert choice.net is not None
        engine, net = self._kernels, choice.net
        kind = choice.engine, net.first.dtype, net.first.device, net.sizes, net.activations
        if kind != self._kind or not all(map(operator.is_, engine.net.places, net.places)):
            self._kind, self._kernels = kind, (engine := start(choice))  # which looks at the labels
        else:
            engine.optimizer.facts = choice.facts[1]
            if choice.engine is not Native or not engine.optimizer.has_kept():  # else the C++ code looks at them
                engine.check_labels(job)
        engine.begin(job, self._rows.of(job.inputs))
        try:
            if choice.engine is Native and engine.optimizer.has_kept():
                engine.advance(1, None)  # the C++ code makes a step and counts it: nothing can come between
            else:
                with Interrupts() as interrupts:
                    engine.advance(1, interrupts)
        finally:
            if engine.done:
                zero_grad(job.optimizer)
        return engine.losses[0].view(()), engine.accuracies[0].view(()) if job.return_accuracy else None
