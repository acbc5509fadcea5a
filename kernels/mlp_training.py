"""Whole training steps of a net of Linear layers, as many as asked, in one launch of one program.

mlp_training_kernels.py has the kernel. Here is how it is cut into tiles, by a table, and how it is launched.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from .cross_entropy import float_bits
from .launch import Launch, LaunchConfig, launch, plan
from .linear import precision_of
from .mlp_training_kernels import Data, Tiles, block, fitted, mlp_training_kernel
from .step import ACTIVATIONS, Step

CONFIGS = {
    # Of each architecture and precision, rows (most layers, most rows of a batch, most inputs, configuration), the
    # first that holds: (block_b, block_h, block_i, num_warps, num_stages) with the largest tiles of the batch, hidden
    # units and inputs of a layer. Unmeasured but for the rows of sm_90 that serve two layers in float32: chosen for the
    # fewest instructions a step that spill at most 32 bytes.
    # On an H100 (bench/results), us a step of the row and of the best of the sweep: 64-128-10 at batch 32, TF32 12.3
    # and 12.2, exact 24.9; at 256, TF32 90 and 79, in tiles that spill where the hidden units are 64; 784-128-10 at
    # 128, TF32 253 and exact 891, both the best.
    ("sm_90", "tf32"): (
        (2, 32, None, (32, 128, 64, 8, 2)), (2, None, 64, (64, 32, 64, 8, 1)), (3, None, None, (64, 64, 64, 8, 1)),
        (None, None, None, (32, 64, 64, 8, 1)),
    ),
    ("sm_100", "tf32"): (
        (2, 32, None, (32, 128, 64, 8, 1)), (4, None, None, (64, 64, 64, 8, 1)), (None, None, None, (32, 16, 64, 8, 1)),
    ),
    ("sm_80", "tf32"): (
        (2, 32, None, (32, 64, 64, 8, 1)), (3, None, None, (64, 64, 64, 8, 1)), (None, None, None, (32, 32, 64, 8, 1)),
    ),
    ("sm_90", "ieee"): ((2, None, None, (32, 64, 64, 8, 1)), (None, None, None, (32, 32, 64, 8, 1))),
    ("sm_100", "ieee"): (
        (2, None, None, (32, 64, 64, 8, 1)), (4, None, None, (32, 32, 64, 8, 1)),
        (None, None, None, (32, 16, 64, 8, 1)),
    ),
    ("sm_80", "ieee"): ((2, None, None, (32, 64, 64, 8, 1)), (None, None, None, (32, 32, 64, 8, 1))),
    ("other", "ieee"): ((None, None, None, (32, 64, 64, 4, 1)),),
    ("sm_90", "fp64"): ((None, None, None, (16, 32, 32, 8, 1)),),
    ("sm_100", "fp64"): ((None, None, None, (16, 32, 32, 8, 1)),),
    ("sm_80", "fp64"): ((None, None, None, (16, 32, 32, 8, 1)),),
    ("other", "fp64"): ((None, None, None, (16, 32, 32, 4, 1)),),
}  # fmt: skip

MOST_WEIGHTS = 2048
"""Elements of a tile of the last W, where there are hidden units."""

MOST_REGISTERS = 255
"""ptxas may give each thread of an NVIDIA GPU so many. Left alone it keeps to half of them, for a second program that
there is not, and spills; or falls off its cliff (see `bench/resources.py`)."""

REGISTERS = 65536
"""What a multiprocessor of an NVIDIA GPU has for all threads of a program."""


def choose(step: Step, batch: int, architecture: str, precision: str) -> tuple[int, ...]:
    """The row of the table for a net and the rows of its batch."""
    given = (step.layers, batch, step.sizes[0])
    for *most, config in CONFIGS[architecture, precision]:
        if all(limit is None or size <= limit for limit, size in zip(most, given, strict=True)):
            return config
    raise AssertionError("the last row holds every size")


def tiles(config: tuple[int, ...], step: Step, batch: int, precision: str) -> Tiles:
    """The tiles of a configuration, no larger than the net and the batch."""
    block_o = block(step.sizes[-1])
    hidden, inputs = max(step.sizes[1:-1], default=1), max(step.sizes[: max(1, step.layers - 1)])
    block_b, block_h, block_i = (
        fitted(most, size) for most, size in zip(config, (batch, hidden, inputs), strict=False)
    )
    block_h = min(block_h, max(16, MOST_WEIGHTS // block_o))
    return Tiles(block_b, block_h, block_i, block_o, batch <= block_b, precision)


def architecture_of(x: torch.Tensor) -> str:
    """The architecture of the device of `x` as the table has them; "other" is AMD, Intel and the interpreter."""
    if not x.is_cuda or torch.version.hip:
        return "other"
    major, _ = torch.cuda.get_device_capability(x.device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # 12 too has the tensor cores of 8


@lru_cache(maxsize=4096)
def plan_training(step: Step, batch: int, architecture: str, dtype: torch.dtype, precision: str) -> Launch:
    """The launch of mlp_training_kernel."""
    config = choose(step, batch, architecture, "fp64" if dtype == torch.float64 else precision)
    cut, (warps, stages) = tiles(config, step, batch, precision), config[3:]
    most_registers = None if architecture == "other" else min(MOST_REGISTERS, REGISTERS // (32 * warps))
    launched = LaunchConfig(cut.batch, cut.hidden, cut.inputs, warps, stages, most_registers)
    return plan(1, launched, STEP=step, TILES=cut)


def train_mlp(
    step: Step,
    x: torch.Tensor,
    targets: torch.Tensor,
    order: torch.Tensor,
    class_weight: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    firsts: Sequence[torch.Tensor | None],
    seconds: Sequence[torch.Tensor | None],
    table: torch.Tensor,
    *,
    batch_size: int,
    position: int,
    epoch_rows: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a step for each row of `table` [steps, 2 * layers, ROW]; returns losses and accuracies, [steps] each.

    x [N, I] and targets [N], any strides; `order` has the rows of the steps one after the other, int64, and the first
    step lies `position` rows into its epoch of `epoch_rows`. `weights` are W [sizes[l + 1], sizes[l]] and b
    [sizes[l + 1]] or None of each layer l, `firsts` and `seconds` the state of each: contiguous, of x's dtype, float32
    or float64, and written to. Accuracies are empty if the step does not ask for them.
    """
    steps, batch = table.shape[0], min(batch_size, max(1, epoch_rows))
    planned = plan_training(step, batch, architecture_of(x), x.dtype, precision_of(x))
    losses, accuracies = x.new_empty(steps), x.new_empty(steps if step.accuracy else 0)
    hidden = tuple(x.new_empty(batch, size) for size in step.sizes[1:-1])
    before = (ACTIVATIONS[activation.name].before for activation in step.activations)
    slopes = tuple(torch.empty_like(h) if kept else h for h, kept in zip(hidden, before, strict=False))
    widest = max(step.sizes[1:-2], default=0)  # of the layers whose dz comes in no place of values
    turns = tuple(x.new_empty(batch, widest) for _ in range(min(2, step.layers - 2)))
    gradients = (x.new_empty(batch, planned.options["TILES"].outputs), *turns)
    nothing = weights[0]  # in the place of what is not there
    groups = [tuple(nothing if tensor is None else tensor for tensor in group) for group in (weights, firsts, seconds)]
    data = Data(x, targets, order, nothing if class_weight is None else class_weight, *x.stride(), *targets.stride())
    launch(
        mlp_training_kernel, planned, table, data, *groups, hidden or (nothing,), slopes or (nothing,), gradients,
        (losses, accuracies), epoch_rows, batch, position, steps, ignore_index, float_bits(label_smoothing),
    )  # fmt: skip
    return losses, accuracies
