"""Whole training steps of a net of Linear layers, as many as asked, in one launch of one program.

mlp_training_kernels.py has the kernel. Here is how it is cut into tiles, by a table, and how it is launched.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

from .cross_entropy import float_bits
from .launch import Launch, LaunchConfig, launch, plan
from .linear import precision_of
from .losses import weighs
from .mlp_training_kernels import mlp_training_kernel
from .mlp_training_on_chip import sums_of
from .mlp_training_tiles import Data, Tiles, block, fitted, gradient_at, in_tiles
from .step import ACTIVATIONS, LOSSES, RULES, Step

CONFIGS = {
    # Of each architecture and precision, rows (most layers, most rows of a batch, most inputs, configuration), the
    # first that holds. A configuration is (way, block_b, block_h, block_i, num_warps, num_stages): the way that a step
    # is made, and the largest tiles of the batch, hidden units and inputs of a layer. Where it is not "streamed", the
    # batch and each hidden layer are one tile on chip, or the row does not hold, and the way is made of these words:
    #   held     parameters and their state stay on chip from step to step; of the inputs there is one tile
    #   rows     the last layer is multiplied as rows of the batch, and else as columns, which the word "columns" says
    #   whole    the tile of hidden units is not smaller where they are fewer: ptxas 12.8 makes wrong code of tiles of
    #            64 units for 8 warps where parameters go through memory (docs/performance.md)
    #   split    exact products are three in TF32
    # On an H100 (bench/results), us a step, TF32 and exact: held, 64-128-10 at batch 32 4.6 and 10.2, at 64 6.5; not
    # held 8.5 and, in float32's multiplications, 20.5; at 64 15.0 (whole, split); at 128 TF32 16.1; 784-64-10 at 32 45
    # and 68, 784-128-10 61 and 84. Streamed, of before: 784-128-10 at 128 253 and 891. Other rows are unmeasured:
    # chosen by `python -m bench.cycles`, of those whose estimate is least.
    ("sm_90", "tf32"): (
        (2, 64, None, ("held", 64, 128, 64, 8, 1)), (2, None, None, ("columns whole", 128, 128, 64, 8, 1)),
        (3, None, None, ("held", 32, 64, 64, 8, 1)),
        (2, 32, None, ("streamed", 32, 128, 64, 8, 2)), (2, None, 64, ("streamed", 64, 32, 64, 8, 1)),
        (3, None, None, ("streamed", 64, 64, 64, 8, 1)), (None, None, None, ("streamed", 32, 64, 64, 8, 1)),
    ),
    ("sm_100", "tf32"): (
        (2, None, None, ("columns", 64, 128, 64, 8, 1)), (3, None, None, ("columns", 64, 64, 64, 8, 1)),
        (2, 32, None, ("streamed", 32, 128, 64, 8, 1)), (4, None, None, ("streamed", 64, 64, 64, 8, 1)),
        (None, None, None, ("streamed", 32, 16, 64, 8, 1)),
    ),
    ("sm_80", "tf32"): (
        (2, 32, None, ("held rows", 32, 128, 64, 8, 1)),
        (2, None, None, ("rows", 32, 128, 64, 8, 1)), (2, None, None, ("rows", 64, 64, 64, 8, 1)),
        (3, None, None, ("rows", 32, 64, 64, 8, 1)),
        (2, 32, None, ("streamed", 32, 64, 64, 8, 1)), (3, None, None, ("streamed", 64, 64, 64, 8, 1)),
        (None, None, None, ("streamed", 32, 32, 64, 8, 1)),
    ),
    ("sm_90", "ieee"): (
        (2, 32, None, ("held split", 32, 128, 64, 8, 1)), (2, None, None, ("columns whole split", 64, 128, 64, 8, 1)),
        (3, None, None, ("held split", 32, 64, 64, 8, 1)),
        (None, None, None, ("columns", 32, 32, 64, 8, 1)),
        (2, None, None, ("streamed", 32, 64, 64, 8, 1)), (None, None, None, ("streamed", 32, 32, 64, 8, 1)),
    ),
    ("sm_100", "ieee"): (
        (2, 32, None, ("held split", 32, 128, 64, 8, 1)),
        (2, None, None, ("columns", 32, 128, 32, 8, 1)),
        (2, None, None, ("streamed", 32, 64, 64, 8, 1)), (4, None, None, ("streamed", 32, 32, 64, 8, 1)),
        (None, None, None, ("streamed", 32, 16, 64, 8, 1)),
    ),
    ("sm_80", "ieee"): (
        (2, 32, None, ("held rows split", 32, 128, 64, 8, 1)),
        (2, None, None, ("columns", 32, 128, 64, 8, 1)), (3, None, None, ("columns", 32, 64, 64, 8, 1)),
        (None, None, None, ("columns", 32, 32, 64, 8, 1)),
        (2, None, None, ("streamed", 32, 64, 64, 8, 1)), (None, None, None, ("streamed", 32, 32, 64, 8, 1)),
    ),
    ("other", "ieee"): (
        (3, None, None, ("columns", 32, 128, 64, 4, 1)), (None, None, None, ("streamed", 32, 64, 64, 4, 1)),
    ),
    ("sm_90", "fp64"): ((None, None, None, ("streamed", 16, 32, 32, 8, 1)),),
    ("sm_100", "fp64"): ((None, None, None, ("streamed", 16, 32, 32, 8, 1)),),
    ("sm_80", "fp64"): ((None, None, None, ("streamed", 16, 32, 32, 8, 1)),),
    ("other", "fp64"): (
        (3, None, None, ("columns", 16, 32, 32, 4, 1)), (None, None, None, ("streamed", 16, 32, 32, 4, 1)),
    ),
}  # fmt: skip

SPLIT = "tf32x3"
"""The precision of exact products by tensor cores: see mlp_training_products.py."""

MOST_WEIGHTS = 2048
"""Elements of a tile of the last W."""

MOST_HELD = 2
"""States of a rule whose parameters may be held in registers."""

MOST_IN_TILE = 128
"""Outputs that a streamed step has in one tile. More are in tiles like those of hidden units."""

MOST_REGISTERS = 255
"""ptxas may give each thread of an NVIDIA GPU so many. Left alone it keeps to half of them, for a second program that
there is not, and spills; or falls off its cliff (see `bench/resources.py`)."""

REGISTERS = 65536
"""What a multiprocessor of an NVIDIA GPU has for all threads of a program."""


Config = tuple[str, int, int, int, int, int]
"""Of a row of the table."""


def choose(step: Step, batch: int, architecture: str, precision: str) -> Config:
    """The configuration for a net and the rows of its batch."""
    given = (step.layers, batch, step.sizes[0])
    for *most, config in CONFIGS[architecture, precision]:
        holds = all(limit is None or size <= limit for limit, size in zip(most, given, strict=True))
        if holds and (config[0] == "streamed" or fits_on_chip(config, step, batch)):
            return config
    raise AssertionError("the last row holds every size")


def fits_on_chip(config: Config, step: Step, batch: int) -> bool:
    """Whether the batch, each hidden layer and the last W are one tile each. No clipped step is held."""
    hidden = max(step.sizes[1:-1], default=1)
    tile = config[2] if "whole" in config[0] else block(hidden)
    fits = batch <= config[1] and hidden <= config[2] and tile * outputs_on_chip(step) <= MOST_WEIGHTS
    can_hold = step.sizes[0] <= config[3] and len(RULES[step.rule.name].states) <= MOST_HELD and not step.clipped
    return fits and ("held" not in config[0] or can_hold)


def outputs_on_chip(step: Step) -> int:
    """The tile of the outputs, with the sums over the batch that are packed into it."""
    loss = step.loss
    sums = sums_of(weighs(loss.name, loss.weighted, loss.rows_weighted), step.accuracy)
    return int(block(step.sizes[-1] + sums))


def tiles(config: Config, step: Step, batch: int, precision: str, one_row: bool = False, fenced: bool = False) -> Tiles:
    """The tiles of a configuration, no larger than the net and the batch."""
    way, *most = config
    many = way == "streamed" and step.sizes[-1] > MOST_IN_TILE
    hidden = max(step.sizes[1:] if many else step.sizes[1:-1], default=1)
    last = step.layers if many else max(1, step.layers - 1)  # from that on no inputs are loaded in tiles
    inputs = step.sizes[0] if way != "streamed" else max(step.sizes[:last])
    block_b, block_h, block_i = (fitted(*pair) for pair in zip(most, (batch, hidden, inputs), strict=False))
    if way != "streamed":
        least = most[1] if "whole" in way else 16
        precision = SPLIT if "split" in way else precision
        ways = "rows" in way, "held" in way, one_row, fenced, least
        return Tiles(block_b, max(block_h, least), block_i, outputs_on_chip(step), True, precision, True, *ways)
    block_o = block_h if many else block(step.sizes[-1])
    block_h = block_h if many else min(block_h, max(16, MOST_WEIGHTS // block_o))
    return Tiles(block_b, block_h, block_i, block_o, batch <= block_b, precision, False, fenced=fenced)


def architecture_of(x: torch.Tensor) -> str:
    """The architecture of the device of `x` as the table has them; "other" is AMD, Intel and the interpreter."""
    if not x.is_cuda or torch.version.hip:
        return "other"
    return {9: "sm_90", 10: "sm_100"}.get(capability_of(x.get_device()), "sm_80")  # 12 too has the tensor cores of 8


@lru_cache
def capability_of(device: int) -> int:
    """The first number of a device's capability, which PyTorch looks up at each call."""
    return torch.cuda.get_device_capability(device)[0]


@lru_cache(maxsize=4096)
def plan_training(
    step: Step, batch: int, architecture: str, dtype: torch.dtype, precision: str, one_row: bool = False
) -> Launch:
    """The launch of mlp_training_kernel."""
    config = choose(step, batch, architecture, "fp64" if dtype == torch.float64 else precision)
    fenced = architecture in ("sm_90", "sm_100")
    cut, (warps, stages) = tiles(config, step, batch, precision, one_row, fenced), config[4:]
    if in_tiles(step.sizes, cut.outputs):
        stages = 1  # the place of what Triton loads ahead is written to, and then read with no barrier behind the fence
    most_registers = None if architecture == "other" else min(MOST_REGISTERS, REGISTERS // (32 * warps))
    launched = LaunchConfig(cut.batch, cut.hidden, cut.inputs, warps, stages, most_registers)
    return plan(1, launched, STEP=step, TILES=cut)


def buffers(x: torch.Tensor, step: Step, batch: int, cut: Tiles) -> tuple[tuple[torch.Tensor, ...], ...]:
    """What a step hands from one part to the next: hidden, slopes and gradients.

    On chip nothing, but the gradients of all parameters where it is clipped; these are last in gradients.
    """
    all_gradients = gradient_at(2 * step.layers, step.sizes, step.biases)
    stored = (x.new_empty(all_gradients),) if step.clipped else ()
    if cut.on_chip:
        return (), (), stored
    hidden = tuple(x.new_empty(batch, size) for size in step.sizes[1:-1])
    before = (ACTIVATIONS[activation.name].before for activation in step.activations)
    slopes = tuple(torch.empty_like(h) if kept else h for h, kept in zip(hidden, before, strict=False))
    many = in_tiles(step.sizes, cut.outputs)
    layers = step.layers - 2 + many  # those whose dz comes in no place of values
    turns = tuple(x.new_empty(batch, max(step.sizes[1 : 1 + layers])) for _ in range(min(2, layers)))
    of_rows = (x.new_empty(batch, 3),) if many else ()
    return hidden, slopes, (x.new_empty(batch, step.sizes[-1] if many else cut.outputs), *of_rows, *turns, *stored)


def train_mlp(
    step: Step,
    x: torch.Tensor,
    targets: torch.Tensor,
    order: torch.Tensor,
    class_weight: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    states: Sequence[Sequence[torch.Tensor | None]],
    table: torch.Tensor,
    *,
    batch_size: int,
    position: int,
    epoch_rows: int,
    ignore_index: int,
    label_smoothing: float,
    one_row: bool,
    pos_weight: torch.Tensor | None = None,
    sample_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a step for each row of `table` [steps, 2 * layers, ROW]; returns losses and accuracies, [steps] each.

    x [N, I] and targets, labels [N] or numbers [N, O] of x's dtype, any strides; `order` has the rows of the steps one
    after the other, int64, and the first step lies `position` rows into its epoch of `epoch_rows`. `class_weight` and
    `pos_weight` [O], contiguous, and `sample_weight` [N] are of x's dtype, and read if the loss says so. `weights` are
    W [sizes[l + 1], sizes[l]] and b [sizes[l + 1]] or None of each layer l, `states` a group of as many for each state
    that the rule keeps: contiguous, of x's dtype, float32 or float64, and written to. `one_row` says that all
    parameters have the same row of the table at each step. Accuracies are empty if the step does not ask for them.
    """
    steps, batch = table.shape[0], min(batch_size, max(1, epoch_rows))
    planned = plan_training(step, batch, architecture_of(x), x.dtype, precision_of(x), one_row)
    losses, accuracies = x.new_empty(steps), x.new_empty(steps if step.accuracy else 0)
    hidden, slopes, gradients = buffers(x, step, batch, planned.options["TILES"])
    nothing = weights[0]  # in the place of what is not there
    groups = [
        tuple(nothing if tensor is None else tensor for tensor in group) or (nothing,)
        for group in (weights, [*chain.from_iterable(states)])
    ]
    of_loss: list[Any] = [nothing if tensor is None else tensor for tensor in (class_weight, pos_weight, sample_weight)]
    stride_to = 0 if LOSSES[step.loss.name].labels else targets.stride(1)
    stride_r = 0 if sample_weight is None else sample_weight.stride(0)
    strides = (*x.stride(), targets.stride(0), stride_to, stride_r)
    data = Data(x, targets, order, *of_loss, *strides)
    launch(
        mlp_training_kernel, planned, table, data, *groups, hidden or (nothing,), slopes or (nothing,),
        gradients or (nothing,), (losses, accuracies), epoch_rows, batch, position, steps, ignore_index,
        float_bits(label_smoothing),
    )  # fmt: skip
    return losses, accuracies
