"""train_steps: the textbook training loop as one call; make_train_step: a step of it a call."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..modules import CrossEntropyLoss
from .driver import TrainStep, run
from .job import check, whole

__all__ = ["TrainStep", "make_train_step", "train_steps"]


class Options(TypedDict, total=False):
    """The keywords of :func:`train_steps` that do not change the type of what it returns."""

    batch_size: int
    epochs: int | None
    steps: int | None
    shuffle: bool
    drop_last: bool
    generator: torch.Generator | None
    order: str
    seed: int | None
    criterion: Callable[[Tensor, Tensor], Tensor] | None
    lr_schedule: Any
    start_step: int
    on_chunk: Callable[[int, Tensor], object] | None
    chunk_steps: int | None


Model = Callable[[Tensor], Tensor]


@overload
def train_steps(
    model: Model, optimizer: Optimizer, inputs: Tensor, targets: Tensor, *, return_accuracy: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def train_steps(
    model: Model, optimizer: Optimizer, inputs: Tensor, targets: Tensor, *, return_accuracy: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def train_steps(
    model: Model, optimizer: Optimizer, inputs: Tensor, targets: Tensor, *, return_accuracy: bool,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def train_steps(
    model: Model,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    batch_size: int = 32,
    epochs: int | None = None,
    steps: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
    order: str = "torch",
    seed: int | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    lr_schedule: Any = None,
    start_step: int = 0,
    return_accuracy: bool = False,
    on_chunk: Callable[[int, Tensor], object] | None = None,
    chunk_steps: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Train `model` on `inputs` [N, ...] and `targets` [N, ...], as this loop does, in as few launches as can be:

        for epoch in range(epochs):
            order = torch.randperm(N, generator=generator) if shuffle else torch.arange(N)
            for rows in order.split(batch_size):      # the last one ragged, or with drop_last dropped
                loss = criterion(model(inputs[rows]), targets[rows])
                optimizer.zero_grad(); loss.backward(); optimizer.step(); lr_schedule.step()

    Exactly one of `epochs` and `steps` is given; after a number of steps the loop ends within an epoch. Parameters,
    `optimizer.state` and `param_groups`, the schedule and the generator are left where that loop leaves them, so plain
    PyTorch may go on, and come back; the parameters' gradients are None.

    Returns the loss of every step that it makes, [steps - start_step], on the device of the model and without waiting
    for it; with `return_accuracy` also each batch's accuracy: of its rows that are not ignored the share whose largest
    logit is the target's, NaN where there is none. For binary cross entropy, and where the output is one column, it is
    the share on the right side of 0 (of 1/2 for nn.BCELoss).

    * `criterion`: nn.CrossEntropyLoss() if it is None.
    * `start_step=k`: as if this call had made k of its steps before. Their rows are drawn and passed over, from the
      generator as it was when they were, and `done` and `chunk_steps` count on. With the model, the optimizer and the
      schedule as they were after k steps a run goes on to the bits of one that was not stopped.
    * `lr_schedule`: a scheduler of torch.optim.lr_scheduler, stepped after every step. It may be stepped ahead of the
      training: what a LambdaLR calls should look at its argument alone.
    * `order`: "torch", or "philox", which draws the order of epoch e, counted from the begin of the call, from `seed`
      and e alone, the same on every device; `generator` is then not used.
    * `on_chunk(done, losses)` is called every `chunk_steps` steps, or, without a number, some ten times a second, and
      after the last step, with the steps done so far and the losses of those since it was last called. It may raise
      StopIteration to end the training there: what is done counts, and its losses are returned. It may look at
      anything, load states and change learning rates; that a step is computed otherwise than when the call began (a
      layer frozen, a hook, another parameter, layer or size of the data) takes a call of its own, and raises
      RuntimeError here.

    Ctrl-C, another signal whose handler raises, and whatever else is raised, leaves whole steps: those that on_chunk
    was told of. What a model of a class of its own computes is read in the source of its forward; nothing of it runs to
    find that out. Where a line is not understood, "looped" serves, and `explain` quotes it. Hooks on autograd's own
    nodes, of which a parameter does not tell, are not called by the other engines.

    `explain` tells who runs the steps, and with ``steps=0`` who would: "resident", where model is Linear, ReLU, Linear
    of a moderate size in float32 or float64 on a GPU, the criterion nn.CrossEntropyLoss and the optimizer torch.optim's
    Adam, AdamW or SGD without amsgrad: one program makes all steps, a launch for some 40 ms of them. "captured" is a
    step as a CUDA graph, where many programs make it sooner. "native" is the one program on a CPU: a loop in C++, in
    this thread alone. Or "looped", that loop itself, for all else, and why.

    Raises TypeError and ValueError for arguments that make no sense, ValueError for inputs and targets of different
    lengths, and for `return_accuracy` of a loss that has no classes, RuntimeError for tensors on another device than
    the model and for those without memory. A label out of range raises IndexError on the CPU and within
    :func:`fusednn.check_labels`, before the first step; on a GPU its row makes loss and parameters NaN. What the loop
    raises in a step it raises here, the steps before it done.
    """
    job = check(
        model, optimizer, inputs, targets, batch_size=batch_size, epochs=epochs, steps=steps, start_step=start_step,
        shuffle=shuffle, drop_last=drop_last, generator=generator, order=order, seed=seed,
        criterion=_CROSS_ENTROPY if criterion is None else criterion, lr_schedule=lr_schedule,
        return_accuracy=return_accuracy,
    )  # fmt: skip
    if chunk_steps is not None:
        chunk_steps = whole("chunk_steps", chunk_steps, 1)
    if on_chunk is not None and not callable(on_chunk):
        raise TypeError(f"on_chunk needs a function, not {type(on_chunk).__name__}")
    losses, accuracies = run(job, on_chunk, chunk_steps)
    return (losses, accuracies) if return_accuracy else losses


_CROSS_ENTROPY = CrossEntropyLoss()


def make_train_step(
    model: Model,
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    lr_schedule: Any = None,
    return_accuracy: bool = False,
) -> TrainStep:
    """A function that makes one step of the loop of :func:`train_steps` on a batch that the caller brings:

        step = make_train_step(model, optimizer)
        for x, y in loader:
            loss = step(x, y)

    is, to rounding,

        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); lr_schedule.step()

    `step(x, y)` takes inputs [N, ...] and targets [N, ...] of any N and returns the loss, [], for which nobody waits;
    with `return_accuracy` the loss and the accuracy, []. The engines are those of `train_steps`, but for "captured",
    which needs many steps at once; what no kernel takes "looped" makes. `step.engine` names the one of the last call.
    Each call looks at the model, the optimizer, the criterion and the modes of PyTorch as they are then: layers may be
    frozen, states loaded, hooks added and learning rates set in between. Only where the loop had to serve, which is
    always right, it is not looked again for up to 31 calls whether a kernel could. The parameters' gradients are None
    afterwards. Ctrl-C, or another signal, leaves whole steps where a kernel makes them.

    Raises TypeError and ValueError for arguments that make no sense, here or in the call, and IndexError for labels out
    of range as `train_steps` does; what the loop raises in a step the call raises.
    """
    criterion = CrossEntropyLoss() if criterion is None else criterion
    return TrainStep(model, optimizer, criterion, lr_schedule, return_accuracy)
