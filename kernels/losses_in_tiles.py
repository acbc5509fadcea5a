"""The losses of losses.py of rows whose outputs are several tiles: from one pass over them, and a second one for dy.

A loss that is one for each output is the sum of those of the tiles. Of cross entropy the first pass leaves the maximum
of a row, the sum of exponentials under it and the mass, which the second one reads.
"""

import triton
import triton.language as tl

from .cross_entropy_kernels import add_block, finish_gradient, finish_losses, no_block, split_smoothing
from .losses import first_largest, has_masses, is_softmax, loss_of, masses_of_labels


@triton.jit
def no_tile(BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, dtype: tl.constexpr):
    """What :func:`add_tile` has of rows before their first tile.

    It is of the softmax; the losses, or of labels the outputs there; how many outputs are right; and the largest output
    and probability, each with its column.
    """
    zero, column = tl.zeros((BLOCK_B,), dtype), tl.zeros((BLOCK_B,), tl.int32)
    least = tl.full((BLOCK_B,), float("-inf"), dtype)
    return no_block(BLOCK_B, BLOCK_O, dtype), zero, column, (least, column), (least, column)


@triton.jit
def larger(largest, y, first):
    """The largest number of rows, which NaN is, and its column, with a tile more, from the column `first` on."""
    number, column = largest
    found = first_largest(y)
    new = tl.sum(tl.where(tl.arange(0, y.shape[1])[None, :] == found[:, None], y, 0.0), axis=1)
    is_larger = (new > number) | ((new != new) & (number == number))
    return tl.where(is_larger, new, number), tl.where(is_larger, first + found, column)


@triton.jit
def add_tile(
    sums, y, data, targets, mask_b, first, smoothing,
    OUTPUTS: tl.constexpr, LOSS: tl.constexpr, ACCURACY: tl.constexpr,
):  # fmt: skip
    """With the outputs y [BLOCK_B, BLOCK_O] from the column `first` on."""
    softmax, loss, right, largest, wanted = sums
    offs_o = first + tl.arange(0, y.shape[1])
    if is_softmax(LOSS.name):
        numbers, labels, _ = targets
        mask_o = (offs_o < OUTPUTS)[None, :]
        y = tl.where(mask_o, y, float("-inf"))
        mask = mask_b[:, None] & mask_o
        _, share, a = masses_of_labels(y, numbers, data, labels, mask, offs_o, smoothing, OUTPUTS, LOSS)
        MASSES: tl.constexpr = has_masses(LOSS.name, LOSS.weighted, LOSS.smoothed)
        softmax = add_block(softmax, y, a, share, first, mask, MASSES, LOSS.smoothed)
        if not MASSES:
            loss += tl.sum(tl.where(offs_o[None, :] == labels[0][:, None], y, 0.0), axis=1)
        if ACCURACY:
            largest = larger(largest, y, first)
            if LOSS.name != "cross_entropy":
                wanted = larger(wanted, tl.where(mask_o, numbers, float("-inf")), first)
    else:
        loss_o, _, _, _, right_o = loss_of(y, data, targets, mask_b, offs_o, smoothing, OUTPUTS, LOSS)
        loss, right = loss + loss_o, right + right_o
    return softmax, loss, right, largest, wanted


@triton.jit
def finish_rows(sums, targets, mask_b, smoothing, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """What loss_of says of whole rows, but for dy, when all tiles are added; and what :func:`dy_of_tile` reads of them.

    `targets` are of any tile.
    """
    softmax, loss, right, largest, wanted = sums
    m, _, totals, mass, spread = softmax
    _, labels, row_weight = targets
    total_exp = tl.sum(totals, axis=1)
    if is_softmax(LOSS.name):
        label, weight, counted, in_range = labels
        if not has_masses(LOSS.name, LOSS.weighted, LOSS.smoothed):
            kept, _ = split_smoothing(weight, smoothing, OUTPUTS, LOSS.smoothed)
            mass, spread = weight, spread + kept * (loss - m)
        loss = finish_losses(mass * tl.log(total_exp) - spread, counted, in_range)
        if LOSS.rows_weighted:
            loss *= row_weight
        right = counted & (largest[1] == (label if LOSS.name == "cross_entropy" else wanted[1]))
    else:
        counted = tl.where(mask_b, OUTPUTS, 0)
        weight = counted.to(loss.dtype)
    if LOSS.rows_weighted:
        weight *= tl.where(counted != 0, row_weight, 0.0)
    return loss, weight, counted, right, (m, total_exp, mass)


@triton.jit
def dy_of_tile(
    y, statistics, data, targets, mask_b, offs_o, smoothing, OUTPUTS: tl.constexpr, LOSS: tl.constexpr
):  # fmt: skip
    """dy of the outputs `offs_o`, as loss_of has it of all outputs."""
    if is_softmax(LOSS.name):
        m, total_exp, mass = statistics
        numbers, labels, row_weight = targets
        label, _, valid, in_range = labels
        mask = mask_b[:, None] & (offs_o < OUTPUTS)[None, :]
        kept, share, a = masses_of_labels(y, numbers, data, labels, mask, offs_o, smoothing, OUTPUTS, LOSS)
        p = tl.exp(y - m[:, None]) / total_exp[:, None]
        MASSES: tl.constexpr = has_masses(LOSS.name, LOSS.weighted, LOSS.smoothed)
        dy = finish_gradient(p, a, mass, label, kept, share, offs_o, 1.0, valid, in_range, MASSES)
        if LOSS.rows_weighted:
            dy *= tl.where(valid, row_weight, 0.0)[:, None]
    else:
        _, _, dy, _, _ = loss_of(y, data, targets, mask_b, offs_o, smoothing, OUTPUTS, LOSS)
    return dy
