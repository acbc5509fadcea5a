"""Cross entropy of logits [M, C] or [B, C, D]: the launchers.

A program reads rows that it can hold once, and writes their gradient from that read. Of longer rows the forward writes
three numbers a row, and backward reads the logits again. A forward without a gradient reads once in any case.
:mod:`fusednn.kernels.cross_entropy_kernels` has the math and the kernels.
"""

import math
import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from .cross_entropy_kernels import (
    count_labels_kernel,
    cross_entropy_kernel,
    long_cross_entropy_gradient_kernel,
    long_cross_entropy_kernel,
    scale_gradient_kernel,
    sum_losses_kernel,
)
from .launch import Launch, LaunchConfig, cdiv, launch, plan

MOST_COUNTS = 64
"""The labels are counted by at most this many programs, whose counts every program then reads. On an H100 the labels of
2^20 rows take 6.6 us so, and 4.1 us with 256, of a forward's 170."""

CONFIGS = {
    # num_warps for each (block_m, block_c): the rows of a program and the classes, a power of two, that it holds.
    # For every architecture. Measured on an H100, bfloat16 logits of 512 MiB, forward and forward with gradient, us: 16
    # classes (2^20 rows of 10) 37 and 63; 128 (2^20 of 100) 202 and 288; 256 251 and 447, or 265 and 499 in 16 rows;
    # 1024 187 and 378; 4096 195 and 401; 16384 226 and 615; 32768 272 and 527; a copy 359. What lies between has as
    # many elements a thread as its neighbours. The other kinds are unmeasured: the largest tiles that do not spill
    # (`make resources`). "masses" are what probabilities, and labels both weighted and smoothed, have for every logit,
    # and hold beside it.
    "float": {
        (1024, 1): 4, (1024, 2): 8, (512, 4): 8, (512, 8): 16, (256, 16): 16, (128, 32): 16, (64, 64): 16,
        (32, 128): 16, (4, 256): 1, (16, 256): 8, (2, 512): 1, (1, 1024): 1, (1, 2048): 2, (1, 4096): 4, (1, 8192): 8,
        (1, 16384): 16, (1, 32768): 16,
    },
    "float, masses": {
        (1024, 1): 4, (256, 2): 4, (512, 4): 4, (256, 8): 8, (128, 16): 8, (64, 32): 4, (32, 64): 4,
        (16, 128): 4, (8, 256): 4, (4, 512): 4, (2, 1024): 4, (1, 2048): 4, (1, 4096): 4, (1, 8192): 8,
    },
    "double": {
        (256, 1): 4, (512, 2): 4, (512, 4): 8, (256, 8): 8, (64, 16): 4, (64, 32): 4, (32, 64): 4,
        (16, 128): 8, (8, 256): 4, (4, 512): 4, (2, 1024): 4, (1, 2048): 4, (1, 4096): 8, (1, 8192): 16,
    },
    "double, masses": {
        (256, 1): 4, (256, 2): 8, (256, 4): 4, (128, 8): 4, (64, 16): 4, (32, 32): 4, (16, 64): 4,
        (8, 128): 4, (4, 256): 4, (2, 512): 4, (1, 1024): 4, (1, 2048): 4, (1, 4096): 8,
    },
}  # fmt: skip

ON_CHIP = 16384 if torch.version.hip else 32768
"""The most classes of a row that a program holds: on gfx942 32,768 spill (`make resources`)."""

LONG_CONFIGS = {"float": LaunchConfig(1, 4096, num_warps=8), "double": LaunchConfig(1, 1024, num_warps=4)}
"""For rows with more classes than `CONFIGS` holds: of a trip in the forward, of a program in the gradient.

On an H100, bfloat16 logits of 512 MiB, us forward: 65,536 classes 187, in trips of 2,048 194; 262,144 classes 203, in
trips of 2,048 199. The gradient, and float64, are unmeasured."""

APART_CONFIGS = {"float": LaunchConfig(16, 32, num_warps=4), "double": LaunchConfig(16, 16, num_warps=4)}
"""The same where the classes of a row lie apart and its neighbours side by side, as in [B, C, D]. Unmeasured."""

COUNT_CONFIG, SUM_CONFIG = LaunchConfig(1024, 1, num_warps=8), LaunchConfig(8192, 1, num_warps=16)
"""Labels and partial losses of a trip. On an H100 65,536 losses take 7.7 us so, and 11.3 us in trips of 1,024."""

SCALE_CONFIG = LaunchConfig(2048, 1, num_warps=8)
"""Elements of a tile. Unmeasured; with 4 warps float64 spills, and so do rows whose classes lie apart."""

MOST_SCALERS = 1024
"""So many programs look whether a scalar is 1. On an H100 a program for each tile of 2^28 elements took 81 us."""


class Plans(NamedTuple):
    """The launches of a forward, of which the first and the last may not be needed, and what the middle one runs."""

    counting: Launch | None
    rows: Launch
    summing: Launch | None
    kernel: Any


def is_deferred(dtype: torch.dtype, reduction: str) -> bool:
    """Whether the gradient is left undivided for the mean: in float16, 1 / M would push small entries out of range."""
    return dtype == torch.float16 and reduction == "mean"


@lru_cache
def most_classes(dtype: torch.dtype, apart: bool, masses: bool) -> int:
    """The most classes of a row that a program holds, so that the forward computes the gradient.

    `apart` says that a row's classes lie apart, `masses` that each logit has one (see `CONFIGS`).
    """
    return max(block_c for (_, block_c), _ in _tiles(dtype, apart, masses))


def _tiles(dtype: torch.dtype, apart: bool, masses: bool) -> list[tuple[tuple[int, int], int]]:
    """The rows of the table, from the shortest rows to the longest."""
    kind = "double" if dtype == torch.float64 else "float"
    least = APART_CONFIGS[kind].block_m if apart else 1
    tiles = CONFIGS[f"{kind}, masses" if masses else kind].items()
    return [(tile, warps) for tile, warps in tiles if tile[0] >= least and tile[1] <= ON_CHIP]


def choose(classes: int, dtype: torch.dtype, apart: bool, masses: bool) -> LaunchConfig:
    """The configuration for rows of `classes` logits, at most :func:`most_classes`."""
    fitting = ((tile, warps) for tile, warps in _tiles(dtype, apart, masses) if classes <= tile[1])
    (block_m, block_c), num_warps = next(fitting)
    return LaunchConfig(block_m, block_c, num_warps=num_warps)


def long_config(dtype: torch.dtype, apart: bool) -> LaunchConfig:
    """The configuration for longer rows."""
    return (APART_CONFIGS if apart else LONG_CONFIGS)["double" if dtype == torch.float64 else "float"]


@lru_cache(maxsize=4096)
def plan_forward(
    m: int, c: int, apart: bool, dtype: torch.dtype, reduction: str, probabilities: bool, weighted: bool,
    smoothed: bool, needs_grad: bool, needs_log_p: bool, statistics: bool, align: int = 1,
) -> Plans:  # fmt: skip
    """How many programs, of which kernel; a program that has the whole batch counts and adds for itself.

    With `statistics` the kernel for long rows takes rows of any length, and writes those where a gradient is needed.
    """
    masses = probabilities or (weighted and smoothed)
    long = statistics or c > most_classes(dtype, apart, masses)
    if long and not statistics and (needs_grad or needs_log_p):
        raise ValueError(f"rows of {c} classes are longer than a program holds: their gradient is backward's")
    config = long_config(dtype, apart) if long else choose(c, dtype, apart, masses)
    programs = cdiv(m, config.block_m)
    alone = programs == 1
    scaled = needs_grad and reduction == "mean" and not (long or is_deferred(dtype, reduction))
    counted = scaled and not (probabilities or alone)
    flags = {
        "REDUCTION": reduction, "PROBABILITIES": probabilities, "WEIGHTED": weighted, "SMOOTHED": smoothed,
        "MASSES": masses, "NEEDS_GRAD": needs_grad, "ONE_PROGRAM": alone,
    }  # fmt: skip
    if not long:
        flags |= {"NEEDS_LOG_P": needs_log_p, "SCALED": scaled, "COUNTED": counted, "MOST_COUNTS": MOST_COUNTS}
    rows = plan(programs, config, **flags, ALIGN=align, BLOCK_M=config.block_m, BLOCK_C=config.block_n)
    count = total = None
    if counted:
        counters, block = min(MOST_COUNTS, cdiv(m, COUNT_CONFIG.block_m)), COUNT_CONFIG.block_m
        count = plan(counters, COUNT_CONFIG, WEIGHTED=weighted, BLOCK_M=block)
    if reduction != "none" and not alone:
        total = plan(1, SUM_CONFIG, REDUCTION=reduction, BLOCK_M=SUM_CONFIG.block_m)
    return Plans(count, rows, total, long_cross_entropy_kernel if long else cross_entropy_kernel)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def strides_of(tensor: torch.Tensor, classes: bool = True) -> tuple[int, int, int]:
    """The strides of b, of the class and of d, 0 where there is no such dimension; `classes` says if there are any."""
    strides = tensor.stride()
    if classes:
        return strides[0], strides[1], strides[2] if len(strides) == 3 else 0
    return strides[0] if strides else 0, 0, strides[1] if len(strides) == 2 else 0


def alignment(c: int, *strides: tuple[int, int, int]) -> int:
    """The power of two, at most 8, of which the classes and the strides of the rows are multiples.

    Triton finds out by itself where that is 16: 8 elements of 2 bytes, or 4 of 4, are a load of 16 bytes.
    """
    shared = math.gcd(8, c, *(stride[0] for stride in strides))
    return 1 if c % 16 == 0 else shared


def rows_of(x: torch.Tensor) -> tuple[int, int, int, bool]:
    """The number of rows of x [M, C] or [B, C, D], C, D, and whether a row's classes lie apart."""
    b, c = x.shape[:2]
    d = x.shape[2] if x.dim() == 3 else 1
    return b * d, c, d, d > 1 and x.stride(1) != 1


def cross_entropy_forward(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    needs_grad: bool,
    needs_log_p: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, gradient, log softmax and weight of the rows, of logits x [M, C] or [B, C, D], any strides.

    `target` has the labels, [M] or [B, D], or probabilities of the shape and dtype of x; `weight` is [C] of x's dtype,
    contiguous. The loss has the labels' shape for the reduction "none" and else is 0-d, in x's dtype. The gradient of
    the sum of the losses has x's shape; it is not yet divided by the weight where :func:`is_deferred` says so. The
    weight of the rows is 0-d and computed for the mean. What is not needed has no elements. `out` may give the losses
    of the reduction "none" in any dtype and the gradient, also x itself, their place.

    Raises ValueError where a gradient or log p is needed of rows that no program holds: see :func:`is_long`.
    """
    loss, grad = out or (_new_losses(x, reduction), x.new_empty(x.shape if needs_grad else 0))
    log_p = x.new_empty(x.shape if needs_log_p else 0) if target.is_floating_point() else grad
    written = grad if needs_grad else log_p
    total = _launch_forward(
        x, target, weight, ignore_index, reduction, label_smoothing, loss, (grad, log_p),
        needs_grad, needs_log_p, strides_of(written) if written.dim() > 1 else (0, 0, 0),
    )  # fmt: skip
    return loss, grad, log_p, total


def long_cross_entropy_forward(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, losses: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss, statistics and weight of rows of any length, for :func:`long_cross_entropy_gradient`.

    Arguments and results as above; the statistics are [3, M] in the dtype of sums: maximum, sum of exponentials, mass.
    `losses` may give the losses of the reduction "none", in any dtype, their place.
    """
    loss = _new_losses(x, reduction) if losses is None else losses
    statistics = x.new_empty((3, rows_of(x)[0]), dtype=sum_dtype(x.dtype))
    total = _launch_forward(
        x, target, weight, ignore_index, reduction, label_smoothing, loss, (statistics,), True, False, (0, 0, 0)
    )
    return loss, statistics, total


def is_long(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, label_smoothing: float) -> bool:
    """Whether no program holds a row of x, so that backward reads the logits again."""
    masses = target.is_floating_point() or (weight is not None and label_smoothing > 0)
    return x.shape[1] > most_classes(x.dtype, rows_of(x)[3], masses)


def _new_losses(x: torch.Tensor, reduction: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:]) if reduction == "none" else ())


def _launch_forward(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, loss: torch.Tensor, outputs: tuple[torch.Tensor, ...], needs_grad: bool, needs_log_p: bool,
    g_strides: tuple[int, int, int],
) -> torch.Tensor:  # fmt: skip
    """Compute the loss and the outputs, which are gradient and log p or the statistics; returns the rows' weight."""
    m, c, d, apart = rows_of(x)
    statistics, sums, mean = len(outputs) == 1, sum_dtype(x.dtype), reduction == "mean"
    probabilities = target.is_floating_point()
    total = x.new_empty(() if mean else 0, dtype=sums)
    if m == 0:
        loss.fill_(float("nan") if mean else 0.0)
        return total.fill_(0.0)
    x_strides, t_strides = strides_of(x), strides_of(target, probabilities)
    plans = plan_forward(
        m, c, apart, x.dtype, reduction, probabilities, weight is not None, label_smoothing > 0, needs_grad,
        needs_log_p, statistics, alignment(c, x_strides, g_strides),
    )  # fmt: skip
    losses, totals, counts, programs = loss, total, 0, plans.rows.grid[0]
    if plans.summing:
        losses, totals = x.new_empty(programs, dtype=sums), x.new_empty(programs, dtype=sums) if mean else total
        counts = programs
    weights = x if weight is None else weight
    if plans.counting:
        counts = plans.counting.grid[0]
        totals = x.new_empty(counts, dtype=sums)
        row_arguments = (m, c, d, t_strides, cdiv(m, counts), ignore_index)
        launch(count_labels_kernel, plans.counting, target, weights, totals, *row_arguments)
    tensors, sizes = (x, target, weights, losses), (m, c, d, x_strides, t_strides)
    numbers = ignore_index, float_bits(label_smoothing)
    if plans.kernel is long_cross_entropy_kernel:
        launch(plans.kernel, plans.rows, *tensors, outputs[0], totals, *sizes, *numbers)
    else:
        launch(plans.kernel, plans.rows, *tensors, *outputs, totals, *sizes, g_strides, *numbers, counts)
    if plans.summing:
        launch(sum_losses_kernel, plans.summing, losses, totals, loss, total, programs, counts)
    return total


@lru_cache(maxsize=4096)
def plan_gradient(
    m: int, c: int, apart: bool, dtype: torch.dtype, probabilities: bool, weighted: bool, smoothed: bool,
    divided: bool, needs_dx: bool, needs_dq: bool, align: int,
) -> Launch:  # fmt: skip
    """A program a tile."""
    config = long_config(dtype, apart)
    return plan(
        cdiv(m, config.block_m) * cdiv(c, config.block_n), config, PROBABILITIES=probabilities, WEIGHTED=weighted,
        SMOOTHED=smoothed, MASSES=probabilities or (weighted and smoothed), DIVIDED=divided, NEEDS_DX=needs_dx,
        NEEDS_DQ=needs_dq, ALIGN=align, BLOCK_M=config.block_m, BLOCK_C=config.block_n,
    )  # fmt: skip


def long_cross_entropy_gradient(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    total: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dx: torch.Tensor | None,
    dq: torch.Tensor | None,
) -> None:
    """Write dx and, for probabilities, dq, where they are given; both have the strides of one, dx may be x.

    :func:`long_cross_entropy_forward` gave the `statistics` and, for the mean, `total` []. dloss is 0-d or has a number
    for each row, at any stride.
    """
    m, c, d, apart = rows_of(x)
    outputs = [gradient for gradient in (dx, dq) if gradient is not None]
    if not (x.numel() and outputs):
        return
    probabilities, x_strides, g_strides = target.is_floating_point(), strides_of(x), strides_of(outputs[0])
    planned = plan_gradient(
        m, c, apart, x.dtype, probabilities, weight is not None, label_smoothing > 0, total is not None,
        dx is not None, dq is not None, alignment(c, x_strides, g_strides),
    )  # fmt: skip
    launch(
        long_cross_entropy_gradient_kernel, planned, x, target, x if weight is None else weight, statistics, dloss,
        statistics if total is None else total, (outputs[0], outputs[-1]), m, c, d, x_strides,
        strides_of(target, probabilities), strides_of(dloss, classes=False), g_strides, ignore_index,
        float_bits(label_smoothing),
    )  # fmt: skip


def cross_entropy_in_place(
    x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, label_smoothing: float,
    losses: torch.Tensor, dloss: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write the losses [M] of logits x [M, C], and over x their gradient, multiplied by dloss [M] if it is given."""
    arguments = (x, labels, weight, ignore_index, "none", label_smoothing)
    if is_long(x, labels, weight, label_smoothing):
        _, statistics, _ = long_cross_entropy_forward(*arguments, losses)
        dloss = losses.new_ones(()) if dloss is None else dloss
        of_rows = (weight, statistics, None, ignore_index, label_smoothing)
        long_cross_entropy_gradient(dloss, x, labels, *of_rows, x, None)
        return
    cross_entropy_forward(*arguments, True, out=(losses, x))
    if dloss is not None:
        scale_gradient(dloss, x, labels, None, ignore_index, x)


@lru_cache
def plan_count(weighted: bool) -> Launch:
    """The launch of count_labels_kernel as one program."""
    return plan(1, COUNT_CONFIG, WEIGHTED=weighted, BLOCK_M=COUNT_CONFIG.block_m)


def weigh_labels(
    labels: torch.Tensor, weight: torch.Tensor | None, classes: int, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight of the rows with these labels [M], 0-d; `weight` as above."""
    m, total = labels.shape[0], labels.new_zeros((), dtype=dtype)
    if m:
        arguments = (m, classes, 1, strides_of(labels, classes=False), m, ignore_index)
        weights = labels if weight is None else weight
        launch(count_labels_kernel, plan_count(weight is not None), labels, weights, total, *arguments)
    return total


@lru_cache(maxsize=4096)
def plan_scale(
    m: int, c: int, apart: bool, scalar: bool, divided: bool, labels: bool, in_place: bool, align: int
) -> Launch:
    """Tiles of the configuration's `block_m` elements, long in the direction in which elements lie side by side."""
    config, elements = SCALE_CONFIG, SCALE_CONFIG.block_m
    block_c = min(elements, 16 if apart else elements, triton.next_power_of_2(c))
    block_m = elements // block_c
    flags = {"SCALAR": scalar, "DIVIDED": divided, "LABELS": labels, "IN_PLACE": in_place, "ALIGN": align}
    programs = cdiv(m, block_m) * cdiv(c, block_c)
    programs = min(programs, MOST_SCALERS) if scalar and in_place else programs
    return plan(programs, config, **flags, BLOCK_M=block_m, BLOCK_C=block_c)


def scale_gradient(
    dloss: torch.Tensor,
    grad: torch.Tensor,
    labels: torch.Tensor | None,
    total: torch.Tensor | None,
    ignore_index: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """out = dloss · grad, divided by `total` [] if given; returns `out`, which may be `grad`.

    dloss is 0-d or has a number for each row of grad, [M, C] or [B, C, D], at any stride; `out` has grad's strides and
    any dtype. Rows whose label is `ignore_index` stay 0 even where dloss is not finite.
    """
    m, c, d, _ = rows_of(grad)
    if grad.numel():
        dloss_strides = strides_of(dloss, classes=False)
        flags = (dloss_strides == (0, 0, 0), total is not None, labels is not None, out is grad)
        t_strides = (0, 0, 0) if labels is None else strides_of(labels, classes=False)
        g_strides = strides_of(grad)
        planned = plan_scale(m, c, d > 1, *flags, alignment(c, g_strides))
        launch(
            scale_gradient_kernel, planned, grad, dloss, dloss if total is None else total,
            grad if labels is None else labels, out, m, c, d, dloss_strides, t_strides, g_strides, ignore_index,
        )  # fmt: skip
    return out


def float_bits(value: float) -> int:
    """The bits of a float64, for `numerics.from_bits`."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
