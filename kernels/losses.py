"""The losses of step.py on a tile of outputs: the loss of each row, and the gradient of the sum of them.

With d = y - t, and the weight p of positive targets, which is 1 if there is none:

                      e(y, t)                                            slope
    mse               d²                                                 2 d
    l1                |d|                                                sign d, and 0 of NaN
    smooth_l1         d² / (2 β),  |d| - β / 2 where |d| >= β            d / β,  sign d
    huber             d² / 2,  δ (|d| - δ / 2) where |d| >= δ            d,  δ sign d
    bce_with_logits   (1 - t) y - (1 + (p - 1) t) log sigmoid(y)         (p t + 1 - t) sigmoid(y) - p t
    poisson_nll       exp y - t y                                        exp y - t

They are PyTorch's, also where numbers are NaN or infinite. A row's loss is the sum over the outputs, each times its
weight. Cross entropy is that of cross_entropy_kernels.py. And each row may have a weight, whatever the loss is.
"""

import triton
import triton.language as tl

from . import step as places
from .activations import exp, log1p
from .cross_entropy_kernels import (
    finish_gradient,
    finish_losses,
    load_labels,
    masses_of,
    softmax_losses,
    split_smoothing,
)

LOSS_SCALE: tl.constexpr = tl.constexpr(places.LOSS_SCALE)


@triton.constexpr_function
def weighs(name, weighted, rows_weighted):
    """Whether a mean divides by weights, and not by how many numbers count: of labels and their weights, or of rows.

    Called with the fields of a `Loss`: of a NamedTuple Triton 3.6 makes a tuple without names.
    """
    return rows_weighted or (weighted and name == "cross_entropy")


@triton.constexpr_function
def is_softmax(name):
    """Whether a loss is cross entropy."""
    return name in ("cross_entropy", "cross_entropy_probabilities")


@triton.constexpr_function
def has_masses(name, weighted, smoothed):
    """Whether each class of a row has a mass of its own, of cross entropy."""
    return name == "cross_entropy_probabilities" or (weighted and smoothed)


@triton.jit
def load_targets(
    data, rows, mask_b, offs_o, ignore_index, OUTPUTS: tl.constexpr, LOSS: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """What a loss needs of the targets of rows, which a step may load long before.

    Those that are numbers [BLOCK_B, BLOCK_O]; labels, weights of those, which rows count and which labels are classes,
    as load_labels has them; and the weights of the rows, if they have any.
    """
    LABELS: tl.constexpr = LOSS.name == "cross_entropy"
    labels = load_labels(
        data.targets, data.class_weight, rows, mask_b, OUTPUTS, 1, (data.stride_tm, 0, 0), ignore_index, not LABELS,
        LOSS.weighted, dtype,
    )  # fmt: skip
    numbers, row_weight = labels[0], labels[1]
    if not LABELS:
        offs_t = (rows * data.stride_tm)[:, None] + (offs_o.to(tl.int64) * data.stride_to)[None, :]
        numbers = tl.load(data.targets + offs_t, mask=mask_b[:, None] & (offs_o < OUTPUTS)[None, :], other=0.0)
    if LOSS.rows_weighted:
        row_weight = tl.load(data.row_weight + rows * data.stride_r, mask=mask_b, other=0.0)
    return numbers, labels, row_weight


@triton.jit
def loss_of(y, data, targets, mask_b, offs_o, smoothing, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """Of outputs y [BLOCK_B, BLOCK_O], all of the rows: losses, weights, dy, how many numbers count, and are right.

    `targets` are those of :func:`load_targets`. What is behind the last row or output is 0 in the losses and weights,
    and in the counts of a row, which of cross entropy are whether it counts; and anything in dy. dy is of the sum of
    the losses, without the mean's division.
    """
    numbers, labels, row_weight = targets
    if is_softmax(LOSS.name):
        found = cross_entropy(y, numbers, data, labels, mask_b, offs_o, smoothing, OUTPUTS, LOSS)
    else:
        found = sum_outputs(y, numbers, data, mask_b, offs_o, OUTPUTS, LOSS)
    loss, weight, dy, counted, right = found
    if LOSS.rows_weighted:
        kept = tl.where(counted != 0, row_weight, 0.0)  # of a row that does not count it may be NaN
        loss, weight, dy = loss * row_weight, weight * kept, dy * kept[:, None]
    return loss, weight, dy, counted, right


@triton.jit
def finish_loss(total, weights, counted, row_ptr, LOSS: tl.constexpr):
    """The loss of a step, and the factor that its gradients are without. `row_ptr` is the first row of its table."""
    loss, scale = total, tl.full((), 1.0, total.dtype)
    if LOSS.mean:
        loss, scale = total / weights, tl.where(counted > 0, 1.0 / weights, 1.0)  # no rows: no gradient
    if LOSS.scaled:
        factor = tl.load(row_ptr + LOSS_SCALE)
        loss, scale = loss * factor, scale * factor
    return loss, scale


@triton.jit
def cross_entropy(y, t, data, labels, mask_b, offs_o, smoothing, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """-log softmax(y) at the label, or times the masses of probabilities t, as cross_entropy_kernels.py says."""
    PROBABILITIES: tl.constexpr = LOSS.name == "cross_entropy_probabilities"
    MASSES: tl.constexpr = has_masses(LOSS.name, LOSS.weighted, LOSS.smoothed)
    mask_o = offs_o < OUTPUTS
    mask = mask_b[:, None] & mask_o[None, :]
    label, weight, valid, in_range = labels
    kept, share, a = masses_of_labels(y, t, data, labels, mask, offs_o, smoothing, OUTPUTS, LOSS)
    mass = weight
    if MASSES:
        mass = tl.sum(a, axis=1)

    y = tl.where(mask_o[None, :], y, float("-inf"))
    _, exps, total_exp, loss = softmax_losses(y, a, mass, label, kept, share, offs_o, mask, MASSES, LOSS.smoothed)
    p = exps / total_exp[:, None]
    dy = finish_gradient(p, a, mass, label, kept, share, offs_o, 1.0, valid, in_range, MASSES)
    if PROBABILITIES:
        label = first_largest(tl.where(mask_o[None, :], t, float("-inf")))
    return finish_losses(loss, valid, in_range), weight, dy, valid, valid & (first_largest(y) == label)


@triton.jit
def masses_of_labels(y, t, data, labels, mask, offs_o, smoothing, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """What the label of each row keeps, what each class gets, and the masses of the classes `offs_o`, or y for none."""
    kept, share = split_smoothing(labels[1], smoothing, OUTPUTS, LOSS.smoothed)
    a = y
    if has_masses(LOSS.name, LOSS.weighted, LOSS.smoothed):
        a = masses_of(
            t, data.class_weight, labels[0], kept, share, smoothing, offs_o, mask, OUTPUTS,
            LOSS.name != "cross_entropy", LOSS.weighted, LOSS.smoothed,
        )  # fmt: skip
    return kept, share, a


@triton.jit
def first_largest(y):
    """The column of the largest number of each row, the first of equal ones; of NaN, if there is one."""
    is_nan = (y != y).to(tl.int32)
    return tl.where(tl.max(is_nan, axis=1) > 0, tl.argmax(is_nan, axis=1), tl.argmax(y, axis=1))


@triton.jit
def sum_outputs(y, t, data, mask_b, offs_o, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """A loss that is the sum of one for each output; right are the outputs on the target's side, as binary ones are."""
    mask_o = offs_o < OUTPUTS
    mask = mask_b[:, None] & mask_o[None, :]
    e, dy = loss_of_output(y, t, data, offs_o, mask_o, LOSS)
    if LOSS.weighted:
        weight = tl.load(data.class_weight + offs_o, mask=mask_o, other=0.0)[None, :]
        e, dy = e * weight, dy * weight
    counted = tl.where(mask_b, OUTPUTS, 0)
    right = tl.sum((mask & ((y > 0) == (t > 0.5))).to(tl.int32), axis=1)
    return tl.sum(tl.where(mask, e, 0.0), axis=1), counted.to(y.dtype), dy, counted, right


@triton.jit
def loss_of_output(y, t, data, offs_o, mask_o, LOSS: tl.constexpr):
    """e and its slope, of outputs y and targets t of any shape whose columns are `offs_o`."""
    if LOSS.name == "mse":
        e, slope = mse(y, t)
    elif LOSS.name == "l1":
        e, slope = l1(y, t)
    elif LOSS.name == "smooth_l1":
        e, slope = smooth_l1(y, t, LOSS.numbers[0])
    elif LOSS.name == "huber":
        e, slope = huber(y, t, LOSS.numbers[0])
    elif LOSS.name == "bce_with_logits":
        p = y
        if LOSS.positive_weighted:
            p = tl.load(data.pos_weight + offs_o, mask=mask_o, other=0.0)[None, :]
        e, slope = bce_with_logits(y, t, p, LOSS.positive_weighted)
    else:
        tl.static_assert(LOSS.name == "poisson_nll", "this loss has no device function")
        e, slope = poisson_nll(y, t)
    return e, slope


@triton.jit
def mse(y, t):
    """d² and 2 d."""
    d = y - t
    return d * d, 2.0 * d


@triton.jit
def l1(y, t):
    """|d| and the sign of d."""
    d = y - t
    return tl.abs(d), (d > 0).to(d.dtype) - (d < 0).to(d.dtype)


@triton.jit
def smooth_l1(y, t, BETA: tl.constexpr):
    """d² / (2 BETA) and d / BETA; from BETA on |d| - BETA / 2 and the sign of d."""
    d = y - t
    size, part = tl.abs(d), d / BETA
    sign = tl.where(d < 0, tl.full(d.shape, -1.0, d.dtype), tl.full(d.shape, 1.0, d.dtype))
    return tl.where(size < BETA, 0.5 * d * part, size - 0.5 * BETA), tl.where(size >= BETA, sign, part)


@triton.jit
def huber(y, t, DELTA: tl.constexpr):
    """d² / 2 and d; from DELTA on DELTA (|d| - DELTA / 2) and DELTA times the sign of d."""
    d = y - t
    size = tl.abs(d)
    steep = tl.where(d < 0, tl.full(d.shape, -DELTA, d.dtype), tl.full(d.shape, DELTA, d.dtype))
    return tl.where(size < DELTA, 0.5 * d * d, (size - 0.5 * DELTA) * DELTA), tl.where(size >= DELTA, steep, d)


@triton.jit
def bce_with_logits(y, t, p, POSITIVE: tl.constexpr):
    """(1 - t) y - log sigmoid(y) and sigmoid(y) - t. POSITIVE targets weigh p, which else is not read."""
    e = exp(-tl.abs(y))
    log_sigmoid = tl.where(y < 0, y, 0.0) - log1p(e)
    slope = tl.where(y < 0, e, 1.0) / (1.0 + e)
    if POSITIVE:
        log_sigmoid *= (p - 1.0) * t + 1.0
        slope = slope * (p * t + 1.0 - t) - p * t
    else:
        slope -= t
    return (1.0 - t) * y - log_sigmoid, slope


@triton.jit
def poisson_nll(y, t):
    """exp y - t y and exp y - t."""
    most: tl.constexpr = 710.0 if y.dtype == tl.float64 else 89.0  # from where on it is infinite
    power = exp(tl.where(y > most, most, y))
    return power - t * y, power - t
