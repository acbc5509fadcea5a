"""The losses of step.py on a tile of outputs: the loss of each row, and the gradient of the sum of them."""

import triton
import triton.language as tl

from .cross_entropy_kernels import (
    finish_gradient,
    finish_losses,
    load_labels,
    load_masses,
    softmax_losses,
    split_smoothing,
)


@triton.jit
def load_targets(
    data, rows, mask_b, ignore_index, OUTPUTS: tl.constexpr, LOSS: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """What a loss needs of the targets of rows, which a step may load long before: labels, weights, which rows count
    and which labels are classes. `data` has targets, class_weight and stride_t."""
    tl.static_assert(LOSS.name == "cross_entropy", "this loss has no device function")
    return load_labels(
        data.targets, data.class_weight, rows, mask_b, OUTPUTS, 1, (data.stride_t, 0, 0), ignore_index, False,
        LOSS.weighted, dtype,
    )  # fmt: skip


@triton.jit
def loss_of(y, data, targets, mask_b, offs_o, smoothing, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """Of outputs y [BLOCK_B, BLOCK_O], all of the rows: losses, weights, dy, which rows count, and which are right.

    `targets` are those of :func:`load_targets`. What is behind the last row or output is 0 in the losses and weights,
    False in the rest, and anything in dy. dy is of the sum of the losses, without the mean's division.
    """
    return cross_entropy(y, data, targets, mask_b, offs_o, smoothing, OUTPUTS, LOSS)


@triton.jit
def cross_entropy(y, data, targets, mask_b, offs_o, smoothing, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """-log softmax(y) at the label; with class weights and smoothing as cross_entropy_kernels.py says."""
    MASSES: tl.constexpr = LOSS.weighted and LOSS.smoothed
    mask_o = offs_o < OUTPUTS
    mask = mask_b[:, None] & mask_o[None, :]
    label, weight, valid, in_range = targets
    kept, share = split_smoothing(weight, smoothing, OUTPUTS, LOSS.smoothed)
    a, mass = y, weight
    if MASSES:
        a = load_masses(
            data.targets, data.class_weight, label, kept, share, smoothing, offs_o, mask, OUTPUTS, False,
            LOSS.weighted, LOSS.smoothed,
        )  # fmt: skip
        mass = tl.sum(a, axis=1)

    y = tl.where(mask_o[None, :], y, float("-inf"))
    _, exps, total_exp, loss = softmax_losses(y, a, mass, label, kept, share, offs_o, mask, MASSES, LOSS.smoothed)
    p = exps / total_exp[:, None]
    dy = finish_gradient(p, a, mass, label, kept, share, offs_o, 1.0, valid, in_range, MASSES)
    is_nan = (y != y).to(tl.int32)
    largest = tl.where(tl.max(is_nan, axis=1) > 0, tl.argmax(is_nan, axis=1), tl.argmax(y, axis=1))  # NaN, or the first
    return finish_losses(loss, valid, in_range), weight, dy, valid, valid & (largest == label)
