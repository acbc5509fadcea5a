"""train_steps: the textbook training loop as one call; make_train_step: a step of it a call."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

from torch import Tensor
from torch.optim import Optimizer

from ..modules import CrossEntropyLoss
from .driver import TrainStep, run
from .job import DEFAULTS, HINTS, Options, check

__all__ = ["TrainStep", "make_train_step", "train_steps"]


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
    model: Model, optimizer: Optimizer, inputs: Tensor, targets: Tensor, *, return_accuracy: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Train `model` on `inputs` [N, ...] and `targets` [N, ...] as this loop does, in as few launches as possible:

        for epoch in range(epochs):
            order = torch.randperm(N, generator=generator) if shuffle else torch.arange(N)
            for rows in order.split(batch_size):      # the last one is ragged, or dropped with drop_last
                loss = criterion(model(inputs[rows]), targets[rows])
                optimizer.zero_grad(); loss.backward(); optimizer.step(); lr_schedule.step()

    Give one of `epochs` and `steps`. With `steps` the loop may end within an epoch. Parameters, `optimizer.state`,
    `param_groups`, the schedule and the generator end where that loop leaves them, so plain PyTorch can go on, and come
    back. The parameters' gradients are None.

    Returns the loss of every step that it makes, [steps - start_step], on the device of the model, and does not wait
    for it. With `return_accuracy` it also returns each batch's accuracy: the share of the rows that are not ignored
    whose largest logit is the target's, NaN where there is none. For binary cross entropy, and for an output of one
    column, it is the share on the right side of 0 (of 1/2 for nn.BCELoss).

    * `criterion`: nn.CrossEntropyLoss() if it is None.
    * `sample_weight` [N], floating-point: the loss of each row counts so many times; a mean divides by their sum (of
      labels whose classes have weights, by the sum of the products). Then the criterion needs to be a module with a
      `reduction` of mean or sum.
    * `loss_scale` and `decay_scale`: what the loss, and each group's `weight_decay`, is multiplied with. A number, a
      sequence with one for each step, or a function of the number of the step, counted from the beginning of the call,
      which may be called ahead of the training. The losses that are returned are scaled.
    * `max_grad_norm`: between backward and step, as torch.nn.utils.clip_grad_norm_ does, all gradients of the
      optimizer's parameters are multiplied with one number, so that their norm is at most so much.
    * `start_step=k`: as if this call had made k of its steps before. It draws their rows and passes over them, so give
      it the generator as it was at the beginning. `done` and `chunk_steps` count on. If the model, the optimizer and
      the schedule are as they were after k steps, the run goes on to the bits of one that was not stopped.
    * `lr_schedule`: a scheduler of torch.optim.lr_scheduler, but ReduceLROnPlateau. It steps after every step. It may
      be stepped ahead of the training, so the function of a LambdaLR should look at its argument alone.
    * `order`: "torch", or "philox", which draws the order of epoch e (counted from the beginning of the call) from
      `seed` and e alone, the same on every device. It does not use `generator`.
    * `on_chunk(done, losses)`: called every `chunk_steps` steps, or without a number some 10 to 25 times a second, and
      after the last step. `done` is the number of steps so far, `losses` are those since it was last called. It may
      raise StopIteration to end the training there: the steps done count, and their losses are returned. It may look at
      anything, load states and set learning rates. It may not change what a step computes (freeze a layer, add a hook,
      exchange a parameter or a layer, resize the data): that raises RuntimeError. Make such a change between two calls.

    Ctrl-C, another signal whose handler raises, and any other exception leave whole steps: those that on_chunk was told
    of. If a class of yours defines the model, the source of its forward is read, and nothing of it runs to find out
    what it computes. Where a line is not understood, "looped" serves, and `explain` quotes the line. Only "looped"
    calls hooks on autograd's own nodes, of which a parameter does not tell.

    `explain` names the engine that makes the steps, or with ``steps=0`` the one that would:

    * "resident" is one program on a GPU that makes all steps, in launches of some 40 ms. It takes one to eight Linears
      of a moderate size in float32 or float64, each with or without a bias, with a ReLU, LeakyReLU, ELU, GELU, SiLU,
      Tanh, Sigmoid or Softplus behind it, or nothing. The loss is nn.CrossEntropyLoss, of labels or of class
      probabilities, MSELoss, L1Loss, SmoothL1Loss, HuberLoss, BCEWithLogitsLoss or PoissonNLLLoss, with targets of
      exactly the shape and dtype of the outputs where it takes no labels. The optimizer is torch.optim's Adam, AdamW,
      NAdam, RAdam, Adagrad, RMSprop or SGD.
    * "captured" makes each step a CUDA graph of many programs, where that is quicker.
    * "native" is the same on a CPU: a loop in C++, in this thread alone, in calls of some 40 ms.
    * "looped" is the loop above, for everything else; `explain` says why.

    Raises TypeError and ValueError for arguments that make no sense; ValueError for inputs and targets of different
    lengths, and for `return_accuracy` of a loss that has no classes; RuntimeError for tensors on another device than
    the model and for tensors without memory. A label out of range raises IndexError on a CPU and within
    :func:`fusednn.check_labels`, before the first step. On a GPU its row makes loss and parameters NaN. What the loop
    raises in a step this raises too, and the steps before it are done.
    """
    if unknown := options.keys() - DEFAULTS.keys():
        raise TypeError(f"train_steps() got an unexpected keyword argument {min(unknown)!r}")
    losses, accuracies = run(check(model, optimizer, inputs, targets, return_accuracy, options))
    return (losses, accuracies) if return_accuracy else losses


def _with_options(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of `function`, with its options by name: what help() and an editor show."""
    known, kind = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, kind, default=DEFAULTS[name], annotation=hint.__origin__)
        for name, hint in HINTS.items()
    ]
    return known.replace(parameters=[*list(known.parameters.values())[:-1], *options])


train_steps.__signature__ = _with_options(train_steps)  # type: ignore[attr-defined]


def make_train_step(
    model: Model,
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    lr_schedule: Any = None,
    return_accuracy: bool = False,
    max_grad_norm: float | None = None,
) -> TrainStep:
    """Make a function that makes one step of the loop of :func:`train_steps`, on a batch that the caller brings:

        step = make_train_step(model, optimizer)
        for x, y in loader:
            loss = step(x, y)

    is, to rounding,

        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); lr_schedule.step()

    `step(x, y)` takes inputs [N, ...] and targets [N, ...] of any N. It returns the loss, [], and does not wait for it;
    with `return_accuracy` it returns the loss and the accuracy, []. Its keywords `sample_weight` [N], `loss_scale` and
    `decay_scale`, each a number, are those of `train_steps` for this step; `max_grad_norm` is for all steps. The
    engines are those of `train_steps` without "captured", which needs many steps at once. `step.engine` names the
    engine of the last call.

    Each call looks at the model, the optimizer, the criterion and the modes of PyTorch as they are then. So you may
    freeze layers, load states, add hooks and set learning rates in between. Where the loop serves, which is always
    right, a call looks for a kernel again only after up to 31 steps. A step leaves the parameters' gradients None.
    Where a kernel makes the steps, Ctrl-C or another signal leaves whole steps.

    Raises TypeError and ValueError for arguments that make no sense, here or in the call, and IndexError for labels out
    of range as `train_steps` does. The call raises what the loop raises in a step.
    """
    criterion = CrossEntropyLoss() if criterion is None else criterion
    return TrainStep(model, optimizer, criterion, lr_schedule, return_accuracy, max_grad_norm)
