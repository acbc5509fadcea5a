"""Whole training steps of a net of Linear layers, as many as asked, by one program in one launch.

    a = x;  for each layer: z = a Wᵀ + b,  a = activation(z)       loss of the last a
    dz = da · slope;  dW = dzᵀ a,  db = Σ dz,  da = dz W           then the optimizer's step (updates.py) on each

What a step is, is one value, a `Step` (step.py), and how it is cut another, `Tiles`: both are compile-time arguments.

A step gathers its rows of x through the order of the epoch. Tiles of the batch, of the hidden units and of the inputs
of a layer are what is held in registers; all outputs are one tile. Parameters and the state of the optimizer lie in
global memory, from where a small net never leaves the L1 cache of the one SM and a larger one streams from L2: held in
registers they spill, at 64-128-10 even where they fit. What a step hands from one part to the next lies beside them:

    hidden      the values of each hidden layer; in place of the last one's comes its dz, tile by tile
    slopes      those of an activation whose slope is read off the number before: made again where they are needed
                they would cost more than they do in memory, since a product's operands stand in several warps
    gradients   dz of the outputs, and two buffers that dz of the other layers takes in turns

Nothing is added up in an order that could change, so the bits repeat.

One program has several threads, and each barrier below stands between a store and a load of the same memory by others.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .activations import BEFORE, reads_before, slope, times_slope, value
from .cross_entropy import float_bits
from .launch import Launch, LaunchConfig, launch, plan
from .linear import precision_of
from .losses import loss_of
from .step import ACTIVATIONS, Step
from .updates import ROW, update


class Tiles(NamedTuple):
    """The most rows of the batch, hidden units and inputs of a layer in a tile, and all outputs; whether a batch is one
    tile; the precision of products."""

    batch: int
    hidden: int
    inputs: int
    outputs: int
    one_batch: bool
    precision: str


class Data(NamedTuple):
    """x [N, I], targets [N], the rows of the steps one after the other, and class weights [O], any tensor without."""

    x: Any
    targets: Any
    order: Any
    class_weight: Any
    stride_xm: int
    stride_xi: int
    stride_t: int


@triton.constexpr_function
def block(size):
    """The tile that holds `size` rows or columns: tl.dot takes none with fewer than 16."""
    return max(16, triton.next_power_of_2(size))


@triton.constexpr_function
def fitted(most, size):
    """The tile of a layer with `size` units: no larger than `most`, or than there are."""
    return min(most, block(size))


@triton.jit
def load_inputs(data, hidden, rows, offs_b, mask_b, offs_k, LAYER: tl.constexpr, STEP: tl.constexpr):
    """Inputs `offs_k` of a layer: of the rows of x, or the values of the layer before."""
    K: tl.constexpr = STEP.sizes[LAYER]
    mask = mask_b[:, None] & (offs_k < K)[None, :]
    if LAYER == 0:
        x_ptrs = data.x + (rows * data.stride_xm)[:, None] + (offs_k.to(tl.int64) * data.stride_xi)[None, :]
        a = tl.load(x_ptrs, mask=mask, other=0.0)
    else:
        a = tl.load(hidden[LAYER - 1] + offs_b[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
    return a


@triton.jit
def linear_tile(
    data, weights, hidden, rows, offs_b, mask_b, offs_n,
    BLOCK_N: tl.constexpr, LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """z = a Wᵀ + b of the units `offs_n` of a layer: [BLOCK_B, BLOCK_N]."""
    K: tl.constexpr = STEP.sizes[LAYER]
    N: tl.constexpr = STEP.sizes[LAYER + 1]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_K: tl.constexpr = fitted(TILES.inputs, K)
    dtype: tl.constexpr = weights[0].dtype.element_ty
    z = tl.zeros((BLOCK_B, BLOCK_N), dtype)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        a = load_inputs(data, hidden, rows, offs_b, mask_b, offs_k, LAYER, STEP)
        w_ptrs = weights[2 * LAYER] + offs_n[None, :] * K + offs_k[:, None]
        w = tl.load(w_ptrs, mask=(offs_n < N)[None, :] & (offs_k < K)[:, None], other=0.0)
        z = tl.dot(a, w, z, input_precision=TILES.precision, out_dtype=dtype)
    if STEP.biases[LAYER]:
        z += tl.load(weights[2 * LAYER + 1] + offs_n, mask=offs_n < N, other=0.0)[None, :]
    return z


@triton.jit
def hidden_tile(
    data, weights, hidden, slopes, rows, offs_b, mask_b, n,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The values of the units of a hidden layer from `n` on, which it leaves in `hidden`."""
    N: tl.constexpr = STEP.sizes[LAYER + 1]
    ACTIVATION: tl.constexpr = STEP.activations[LAYER]
    BLOCK_N: tl.constexpr = fitted(TILES.hidden, N)
    offs_n = n + tl.arange(0, BLOCK_N)
    z = linear_tile(data, weights, hidden, rows, offs_b, mask_b, offs_n, BLOCK_N, LAYER, STEP, TILES)
    h = value(z, ACTIVATION)
    if N % BLOCK_N != 0:  # an infinite input times a weight that is not there is NaN, and so would be all outputs
        h = tl.where((offs_n < N)[None, :], h, 0.0)
    offs, mask = offs_b[:, None] * N + offs_n[None, :], mask_b[:, None] & (offs_n < N)[None, :]
    tl.store(hidden[LAYER] + offs, h, mask=mask)
    if reads_before(ACTIVATION, BEFORE):
        tl.store(slopes[LAYER] + offs, slope(z, ACTIVATION), mask=mask)
    return h


@triton.jit
def output_tile(
    data, weights, hidden, slopes, rows, offs_b, mask_b, offs_o,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """z of the last of several layers, summed up while the tiles of the layer before are made."""
    K: tl.constexpr = STEP.sizes[LAYER]
    O: tl.constexpr = STEP.sizes[LAYER + 1]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_O: tl.constexpr = TILES.outputs
    BLOCK_K: tl.constexpr = fitted(TILES.hidden, K)
    dtype: tl.constexpr = weights[0].dtype.element_ty
    mask_o = offs_o < O
    z = tl.zeros((BLOCK_B, BLOCK_O), dtype)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        h = hidden_tile(data, weights, hidden, slopes, rows, offs_b, mask_b, k, LAYER - 1, STEP, TILES)
        w_ptrs = weights[2 * LAYER] + offs_o[None, :] * K + offs_k[:, None]
        w = tl.load(w_ptrs, mask=mask_o[None, :] & (offs_k < K)[:, None], other=0.0)
        z = tl.dot(h, w, z, input_precision=TILES.precision, out_dtype=dtype)
    if STEP.biases[LAYER]:
        z += tl.load(weights[2 * LAYER + 1] + offs_o, mask=mask_o, other=0.0)[None, :]
    return z


@triton.jit
def forward_tile(
    data, weights, hidden, slopes, gradients, rows, offs_b, mask_b, ignore_index, smoothing,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Forward of a tile of the batch. Leaves dz of the outputs, not yet divided for the mean; returns sums.

    They are of the losses, of the rows' weights, of dz, of the rows that count and of those that are right.
    """
    LAYERS: tl.constexpr = len(STEP.biases)
    O: tl.constexpr = STEP.sizes[LAYERS]
    ACTIVATION: tl.constexpr = STEP.activations[LAYERS - 1]
    LOSS: tl.constexpr = STEP.loss
    BLOCK_O: tl.constexpr = TILES.outputs
    dtype: tl.constexpr = weights[0].dtype.element_ty
    for layer in tl.static_range(LAYERS - 2):
        for n in range(0, STEP.sizes[layer + 1], fitted(TILES.hidden, STEP.sizes[layer + 1])):
            hidden_tile(data, weights, hidden, slopes, rows, offs_b, mask_b, n, layer, STEP, TILES)
        tl.debug_barrier()  # the layer is there
    offs_o = tl.arange(0, BLOCK_O)
    if LAYERS == 1:
        z = linear_tile(data, weights, hidden, rows, offs_b, mask_b, offs_o, BLOCK_O, 0, STEP, TILES)
    else:
        z = output_tile(data, weights, hidden, slopes, rows, offs_b, mask_b, offs_o, LAYERS - 1, STEP, TILES)

    y = value(z, ACTIVATION)
    loss, weight, dy, valid, right = loss_of(y, data, rows, mask_b, offs_o, ignore_index, smoothing, O, LOSS)
    a = z if reads_before(ACTIVATION, BEFORE) else y
    dz = times_slope(dy, slope(a, ACTIVATION), ACTIVATION)
    dz = tl.where(mask_b[:, None] & (offs_o < O)[None, :], dz, 0.0)
    tl.store(gradients[0] + offs_b[:, None] * BLOCK_O + offs_o[None, :], dz, mask=mask_b[:, None])
    counted, rights = tl.sum(valid.to(dtype)), tl.sum(right.to(dtype))
    return tl.sum(loss), tl.sum(weight), tl.sum(dz, axis=0), counted, rights


@triton.jit
def step_on(parameters, PARAMETER: tl.constexpr, offs, mask, g, row_ptr, STEP: tl.constexpr):
    """The optimizer's step on some elements of a parameter; their order is W1, b1, W2, b2, ..."""
    RULE: tl.constexpr = STEP.rule
    weights, firsts, seconds = parameters
    row_ptr += PARAMETER * ROW
    update(weights[PARAMETER], firsts[PARAMETER], seconds[PARAMETER], offs, mask, g, row_ptr, RULE)


@triton.jit
def dz_place(hidden, gradients, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    """Where dz of a layer is in backward."""
    if LAYER == LAYERS - 1:
        dz_ptr = gradients[0]
    elif LAYER == LAYERS - 2:
        dz_ptr = hidden[LAYER]
    else:
        dz_ptr = gradients[1 + LAYER % 2]
    return dz_ptr


@triton.jit
def slope_at_values(h, LAYER: tl.constexpr, STEP: tl.constexpr):
    """The slope where it is read off the values h. Asked for before a product, or Triton moves it there, and not h."""
    ACTIVATION: tl.constexpr = STEP.activations[LAYER]
    return h if reads_before(ACTIVATION, BEFORE) else slope(h, ACTIVATION)  # h: of no use, the slope is kept


@triton.jit
def hidden_gradient(dh, s, slopes, offs, mask, LAYER: tl.constexpr, STEP: tl.constexpr):
    """dz of a hidden layer from the gradient of its values, and their slope_at_values."""
    ACTIVATION: tl.constexpr = STEP.activations[LAYER]
    if reads_before(ACTIVATION, BEFORE):
        dz = dh * tl.load(slopes[LAYER] + offs, mask=mask, other=0.0)
    else:
        dz = times_slope(dh, s, ACTIVATION)
    if ACTIVATION.name != "relu":  # of which it is 0 there; an infinite weight times a row that is not there is NaN
        dz = tl.where(mask, dz, 0.0)
    return dz


@triton.jit
def backward_output(
    parameters, hidden, slopes, gradients, row_ptr, k, size, scale,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Step on the columns of the last W from `k` on and on b of the layer before, whose dz comes in place of h."""
    K: tl.constexpr = STEP.sizes[LAYER]
    O: tl.constexpr = STEP.sizes[LAYER + 1]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_O: tl.constexpr = TILES.outputs
    BLOCK_K: tl.constexpr = fitted(TILES.hidden, K)
    weights = parameters[0]
    dtype: tl.constexpr = weights[0].dtype.element_ty
    offs_o, offs_k = tl.arange(0, BLOCK_O), k + tl.arange(0, BLOCK_K)
    mask_o, mask_k = offs_o < O, offs_k < K
    offs_w, mask_w = offs_o[:, None] * K + offs_k[None, :], mask_o[:, None] & mask_k[None, :]
    w = tl.load(weights[2 * LAYER] + offs_w, mask=mask_w, other=0.0)
    dw = tl.zeros((BLOCK_O, BLOCK_K), dtype)
    db = tl.zeros((BLOCK_K,), dtype)
    for b in range(0, BLOCK_B if TILES.one_batch else size, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < size
        dy_ptrs = gradients[0] + offs_b[:, None] * BLOCK_O + offs_o[None, :]
        dy = tl.load(dy_ptrs, mask=mask_b[:, None], other=0.0) * scale
        offs_h, mask = offs_b[:, None] * K + offs_k[None, :], mask_b[:, None] & mask_k[None, :]
        h_ptrs = hidden[LAYER - 1] + offs_h
        h = tl.load(h_ptrs, mask=mask, other=0.0)
        dw = tl.dot(tl.trans(dy), h, dw, input_precision=TILES.precision, out_dtype=dtype)
        s = slope_at_values(h, LAYER - 1, STEP)
        da = tl.dot(dy, w, input_precision=TILES.precision, out_dtype=dtype)
        dz = hidden_gradient(da, s, slopes, offs_h, mask, LAYER - 1, STEP)
        db += tl.sum(dz, axis=0)
        tl.store(h_ptrs, dz, mask=mask)
    tl.debug_barrier()  # dz is there, and W was read
    step_on(parameters, 2 * LAYER, offs_w, mask_w, dw, row_ptr, STEP)
    if STEP.biases[LAYER - 1]:
        step_on(parameters, 2 * LAYER - 1, offs_k, mask_k, db, row_ptr, STEP)


@triton.jit
def backward_hidden(
    parameters, hidden, slopes, gradients, row_ptr, k, size,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dz of the units from `k` on of the layer before a hidden layer, which it leaves in its place; step on their b."""
    K: tl.constexpr = STEP.sizes[LAYER]
    N: tl.constexpr = STEP.sizes[LAYER + 1]
    LAYERS: tl.constexpr = len(STEP.biases)
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_K: tl.constexpr = fitted(TILES.hidden, K)
    BLOCK_N: tl.constexpr = fitted(TILES.hidden, N)
    weights = parameters[0]
    dtype: tl.constexpr = weights[0].dtype.element_ty
    dz_ptr, to_ptr = dz_place(hidden, gradients, LAYER, LAYERS), dz_place(hidden, gradients, LAYER - 1, LAYERS)
    offs_k = k + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    db = tl.zeros((BLOCK_K,), dtype)
    for b in range(0, BLOCK_B if TILES.one_batch else size, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < size
        da = tl.zeros((BLOCK_B, BLOCK_K), dtype)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            dz_ptrs = dz_ptr + offs_b[:, None] * N + offs_n[None, :]
            dz = tl.load(dz_ptrs, mask=mask_b[:, None] & mask_n[None, :], other=0.0)
            w_ptrs = weights[2 * LAYER] + offs_n[:, None] * K + offs_k[None, :]
            w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            da = tl.dot(dz, w, da, input_precision=TILES.precision, out_dtype=dtype)
        offs_h, mask = offs_b[:, None] * K + offs_k[None, :], mask_b[:, None] & mask_k[None, :]
        h = tl.load(hidden[LAYER - 1] + offs_h, mask=mask, other=0.0)
        s = slope_at_values(h, LAYER - 1, STEP)
        dz = hidden_gradient(da, s, slopes, offs_h, mask, LAYER - 1, STEP)
        db += tl.sum(dz, axis=0)
        tl.store(to_ptr + offs_h, dz, mask=mask)
    tl.debug_barrier()  # dz is there, and these columns of W were read
    if STEP.biases[LAYER - 1]:
        step_on(parameters, 2 * LAYER - 1, offs_k, mask_k, db, row_ptr, STEP)


@triton.jit
def backward_weights(
    data, parameters, hidden, gradients, order_ptr, row_ptr, n, k, size, scale,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Step on a tile of W: the rows from `n` on, the columns from `k` on."""
    LAYERS: tl.constexpr = len(STEP.biases)
    K: tl.constexpr = STEP.sizes[LAYER]
    N: tl.constexpr = STEP.sizes[LAYER + 1]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_N: tl.constexpr = TILES.outputs if LAYERS == 1 else fitted(TILES.hidden, N)
    BLOCK_K: tl.constexpr = fitted(TILES.inputs if LAYER == 0 else TILES.hidden, K)
    COLUMNS: tl.constexpr = TILES.outputs if LAYERS == 1 else N
    dtype: tl.constexpr = gradients[0].dtype.element_ty
    offs_n, offs_k = n + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K
    dz_ptr = dz_place(hidden, gradients, LAYER, LAYERS)
    dw = tl.zeros((BLOCK_N, BLOCK_K), dtype)
    for b in range(0, BLOCK_B if TILES.one_batch else size, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < size
        rows = tl.load(order_ptr + offs_b, mask=mask_b, other=0) if LAYER == 0 else offs_b
        a = load_inputs(data, hidden, rows, offs_b, mask_b, offs_k, LAYER, STEP)
        dz_ptrs = dz_ptr + offs_b[None, :] * COLUMNS + offs_n[:, None]
        dz = tl.load(dz_ptrs, mask=mask_n[:, None] & mask_b[None, :], other=0.0)
        if LAYERS == 1:
            dz *= scale
        dw = tl.dot(dz, a, dw, input_precision=TILES.precision, out_dtype=dtype)
    offs_w, mask_w = offs_n[:, None] * K + offs_k[None, :], mask_n[:, None] & mask_k[None, :]
    step_on(parameters, 2 * LAYER, offs_w, mask_w, dw, row_ptr, STEP)


@triton.jit
def backward_input(
    data, parameters, hidden, gradients, order_ptr, row_ptr, n, size, scale, STEP: tl.constexpr, TILES: tl.constexpr
):
    """Step on the rows of W1 from `n` on."""
    for k in range(0, STEP.sizes[0], fitted(TILES.inputs, STEP.sizes[0])):
        backward_weights(data, parameters, hidden, gradients, order_ptr, row_ptr, n, k, size, scale, 0, STEP, TILES)


@triton.jit
def backward(
    data, parameters, hidden, slopes, gradients, order_ptr, row_ptr, size, scale,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Backward and the optimizer's step on all parameters but the last bias."""
    LAYERS: tl.constexpr = len(STEP.biases)
    if LAYERS > 1:
        for k in tl.range(0, STEP.sizes[LAYERS - 1], fitted(TILES.hidden, STEP.sizes[LAYERS - 1]), num_stages=1):
            backward_output(parameters, hidden, slopes, gradients, row_ptr, k, size, scale, LAYERS - 1, STEP, TILES)
            if LAYERS == 2:
                backward_input(data, parameters, hidden, gradients, order_ptr, row_ptr, k, size, scale, STEP, TILES)
    for layer in tl.static_range(LAYERS - 2, 0, -1):
        if layer < LAYERS - 3:
            tl.debug_barrier()  # dz of the layer behind was read, in whose place comes that of the layer before
        for k in tl.range(0, STEP.sizes[layer], fitted(TILES.hidden, STEP.sizes[layer]), num_stages=1):
            backward_hidden(parameters, hidden, slopes, gradients, row_ptr, k, size, layer, STEP, TILES)
            for n in range(0, STEP.sizes[layer + 1], fitted(TILES.hidden, STEP.sizes[layer + 1])):
                backward_weights(
                    data, parameters, hidden, gradients, order_ptr, row_ptr, n, k, size, scale, layer, STEP, TILES
                )
    if LAYERS == 1:
        backward_input(data, parameters, hidden, gradients, order_ptr, row_ptr, 0, size, scale, STEP, TILES)
    elif LAYERS > 2:
        for n in tl.range(0, STEP.sizes[1], fitted(TILES.hidden, STEP.sizes[1]), num_stages=1):
            backward_input(data, parameters, hidden, gradients, order_ptr, row_ptr, n, size, scale, STEP, TILES)


@triton.jit(do_not_specialize=["epoch_rows", "batch_size", "position", "steps", "ignore_index", "smoothing"])
def mlp_training_kernel(
    table_ptr, data, weights, firsts, seconds, hidden, slopes, gradients, traces,
    epoch_rows, batch_size, position, steps, ignore_index, smoothing, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`steps` steps, the first one `position` rows into an epoch of `epoch_rows`. One program.

    weights, firsts and seconds are W1, b1, W2, ... and the state of each; traces the losses and the accuracies. The
    table has a row for each step and parameter.
    """
    LAYERS: tl.constexpr = len(STEP.biases)
    O: tl.constexpr = STEP.sizes[LAYERS]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_O: tl.constexpr = TILES.outputs
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    parameters = (weights, firsts, seconds)
    order_ptr = data.order
    for step in tl.range(steps, num_stages=1):  # no load may come before a store of the step before
        size = tl.minimum(batch_size, epoch_rows - position)
        zero = tl.full((), 0, dtype)
        loss, weight, counted, right = zero, zero, zero, zero
        db = tl.zeros((BLOCK_O,), dtype)
        for b in range(0, BLOCK_B if TILES.one_batch else size, BLOCK_B):
            offs_b = b + tl.arange(0, BLOCK_B)
            mask_b = offs_b < size
            rows = tl.load(order_ptr + offs_b, mask=mask_b, other=0)
            loss_b, weight_b, db_b, counted_b, right_b = forward_tile(
                data, weights, hidden, slopes, gradients, rows, offs_b, mask_b, ignore_index, smoothing, STEP, TILES
            )
            loss, weight, db, counted, right = (
                loss + loss_b, weight + weight_b, db + db_b, counted + counted_b, right + right_b
            )  # fmt: skip
        tl.store(traces[0] + step, loss / weight if STEP.loss.mean else loss)
        if STEP.accuracy:
            tl.store(traces[1] + step, right / counted)
        one = tl.full((), 1.0, dtype)
        scale = tl.where(counted > 0, 1.0 / weight, 1.0) if STEP.loss.mean else one  # no rows: no gradient
        row_ptr = table_ptr + step * (2 * LAYERS * ROW)
        tl.debug_barrier()  # hidden and dz are there, and the parameters were read

        backward(data, parameters, hidden, slopes, gradients, order_ptr, row_ptr, size, scale, STEP, TILES)
        if STEP.biases[LAYERS - 1]:
            offs_o = tl.arange(0, BLOCK_O)
            step_on(parameters, 2 * LAYERS - 1, offs_o, offs_o < O, db * scale, row_ptr, STEP)
        order_ptr += size
        position = tl.where(position + size >= epoch_rows, 0, position + size)
        tl.debug_barrier()  # the parameters are there, and hidden and dz were read


CONFIGS = {
    # Of each architecture and precision, rows (most layers, most rows of a batch, most inputs, configuration), the
    # first that holds: (block_b, block_h, block_i, num_warps, num_stages) with the largest tiles of the batch, hidden
    # units and inputs of a layer.
    # Unmeasured but for sm_90: chosen for the fewest instructions a step that spill at most 32 bytes.
    # On an H100 (bench/results), us a step of the row and of the best of the sweep: 64-128-10 at batch 32, TF32 12.3,
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
