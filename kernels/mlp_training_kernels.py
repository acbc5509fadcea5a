"""The kernel of mlp_training.py: whole training steps of a net of Linear layers, by one program.

    a = x;  for each layer: z = a Wᵀ + b,  a = activation(z)       loss of the last a
    dz = da · slope;  dW = dzᵀ a,  db = Σ dz,  da = dz W           then the optimizer's step (updates.py) on each

What a step is, is one value, a `Step` (step.py), and how it is cut another, `Tiles`: both are compile-time arguments.

A step gathers its rows of x through the order of the epoch. Where the batch and each hidden layer are one tile, steps
stay on chip (mlp_training_on_chip.py), and so do the parameters and the state of the optimizer if they fit. Otherwise
these lie in global memory, from where a small net never leaves the L1 cache of the one SM and a larger one streams from
L2; tiles of the batch, of the hidden units and of the inputs of a layer are what is held in registers, and all outputs
are one tile, or several where they are many: the step is streamed. What it hands from one part to the next then lies
beside the parameters:

    hidden      the values of each hidden layer; in place of the last one's comes its dz, tile by tile
    slopes      of the activations whose slope is read off the number before. Computing them again in backward costs
                more than keeping them: several warps hold the operands of a product, and each would compute all of it
    gradients   dz of the outputs; and two buffers that dz of all layers but the last two takes in turns

Of outputs in several tiles z comes before dz to its place, next to which is what the loss has to know of whole rows;
and backward takes the last layer for one more hidden layer, so that all dz but that of the outputs takes turns.

Where a step is clipped, the last of `gradients` has those of all parameters, also of steps that stay on chip: the norm
is known only when all are there, and then each parameter's step is made, tile by tile.

Nothing is added up in an order that could change, so the bits repeat.

One program has several threads, and each barrier below stands between a store and a load of the same memory by others.
"""

import triton
import triton.language as tl

from .activations import BEFORE, reads_before, slope, times_slope, value
from .losses import finish_loss, load_targets, loss_of
from .losses_in_tiles import add_tile, dy_of_tile, finish_rows, no_tile
from .mlp_training_on_chip import on_chip_steps
from .mlp_training_products import fence
from .mlp_training_tiles import fitted, in_tiles, load_x, quotient, step_on, step_on_all
from .updates import ROW


@triton.jit
def load_inputs(data, hidden, rows, offs_b, mask_b, offs_k, LAYER: tl.constexpr, STEP: tl.constexpr):
    """Inputs `offs_k` of a layer: of the rows of x, or the values of the layer before."""
    K: tl.constexpr = STEP.sizes[LAYER]
    if LAYER == 0:
        a = load_x(data, rows, mask_b, offs_k, K)
    else:
        mask = mask_b[:, None] & (offs_k < K)[None, :]
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
        fence(TILES)
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
    if reads_before(ACTIVATION.name, BEFORE):
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
        fence(TILES)
        z = tl.dot(h, w, z, input_precision=TILES.precision, out_dtype=dtype)
    if STEP.biases[LAYER]:
        z += tl.load(weights[2 * LAYER + 1] + offs_o, mask=mask_o, other=0.0)[None, :]
    return z


@triton.jit
def hidden_layers(
    data, weights, hidden, slopes, rows, offs_b, mask_b, COUNT: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr
):
    """The values of the first COUNT hidden layers."""
    for layer in tl.static_range(COUNT):
        for n in range(0, STEP.sizes[layer + 1], fitted(TILES.hidden, STEP.sizes[layer + 1])):
            hidden_tile(data, weights, hidden, slopes, rows, offs_b, mask_b, n, layer, STEP, TILES)
        tl.debug_barrier()  # the layer is there


@triton.jit
def forward_tile(
    data, weights, hidden, slopes, gradients, rows, offs_b, mask_b, ignore_index, smoothing,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Forward of a tile of the batch. Leaves dz of the outputs, not yet divided for the mean; returns sums.

    They are of the losses, of the rows' weights, of dz, of what counts and of what is right.
    """
    LAYERS: tl.constexpr = len(STEP.biases)
    O: tl.constexpr = STEP.sizes[LAYERS]
    ACTIVATION: tl.constexpr = STEP.activations[LAYERS - 1]
    LOSS: tl.constexpr = STEP.loss
    BLOCK_O: tl.constexpr = TILES.outputs
    dtype: tl.constexpr = weights[0].dtype.element_ty
    hidden_layers(data, weights, hidden, slopes, rows, offs_b, mask_b, LAYERS - 2, STEP, TILES)
    offs_o = tl.arange(0, BLOCK_O)
    if LAYERS == 1:
        z = linear_tile(data, weights, hidden, rows, offs_b, mask_b, offs_o, BLOCK_O, 0, STEP, TILES)
    else:
        z = output_tile(data, weights, hidden, slopes, rows, offs_b, mask_b, offs_o, LAYERS - 1, STEP, TILES)

    y = value(z, ACTIVATION)
    targets = load_targets(data, rows, mask_b, offs_o, ignore_index, O, LOSS, dtype)
    loss, weight, dy, counted, right = loss_of(y, data, targets, mask_b, offs_o, smoothing, O, LOSS)
    a = z if reads_before(ACTIVATION.name, BEFORE) else y
    dz = times_slope(dy, slope(a, ACTIVATION), ACTIVATION)
    dz = tl.where(mask_b[:, None] & (offs_o < O)[None, :], dz, 0.0)
    tl.store(gradients[0] + offs_b[:, None] * BLOCK_O + offs_o[None, :], dz, mask=mask_b[:, None])
    counts = tl.sum(counted.to(dtype)), tl.sum(right.to(dtype))
    return tl.sum(loss), tl.sum(weight), tl.sum(dz, axis=0), counts[0], counts[1]


@triton.jit
def forward_in_tiles(
    data, weights, hidden, slopes, gradients, rows, offs_b, mask_b, ignore_index, smoothing,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`forward_tile` of outputs in several tiles. Leaves their z and what dy_of_tile reads; has no sum of dz."""
    LAYERS: tl.constexpr = len(STEP.biases)
    O: tl.constexpr = STEP.sizes[LAYERS]
    ACTIVATION: tl.constexpr = STEP.activations[LAYERS - 1]
    LOSS: tl.constexpr = STEP.loss
    BLOCK_O: tl.constexpr = TILES.outputs
    dtype: tl.constexpr = weights[0].dtype.element_ty
    hidden_layers(data, weights, hidden, slopes, rows, offs_b, mask_b, LAYERS - 1, STEP, TILES)
    sums, first_o = no_tile(TILES.batch, BLOCK_O, dtype), tl.arange(0, BLOCK_O)
    targets = load_targets(data, rows, mask_b, first_o, ignore_index, O, LOSS, dtype)
    for n in tl.range(0, O, BLOCK_O, num_stages=1):
        offs_o = n + first_o
        z = linear_tile(data, weights, hidden, rows, offs_b, mask_b, offs_o, BLOCK_O, LAYERS - 1, STEP, TILES)
        mask = mask_b[:, None] & (offs_o < O)[None, :]
        tl.store(gradients[0] + offs_b[:, None] * O + offs_o[None, :], z, mask=mask)
        of_tile = targets
        if LOSS.name != "cross_entropy":  # labels are of all outputs
            of_tile = load_targets(data, rows, mask_b, offs_o, ignore_index, O, LOSS, dtype)
        sums = add_tile(sums, value(z, ACTIVATION), data, of_tile, mask_b, n, smoothing, O, LOSS, STEP.accuracy)
    loss, weight, counted, right, statistics = finish_rows(sums, targets, mask_b, smoothing, O, LOSS)
    for i in tl.static_range(3):
        tl.store(gradients[1] + 3 * offs_b + i, statistics[i], mask=mask_b)
    counts = tl.sum(counted.to(dtype)), tl.sum(right.to(dtype))
    return tl.sum(loss), tl.sum(weight), tl.zeros((BLOCK_O,), dtype), counts[0], counts[1]


@triton.jit
def finish_outputs(
    data, parameters, gradients, order_ptr, row_ptr, n, size, scale, ignore_index, smoothing,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dz of the outputs from `n` on, scaled, in the place of their z; and the step on their b."""
    LAYERS: tl.constexpr = len(STEP.biases)
    O: tl.constexpr = STEP.sizes[LAYERS]
    ACTIVATION: tl.constexpr = STEP.activations[LAYERS - 1]
    LOSS: tl.constexpr = STEP.loss
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_O: tl.constexpr = TILES.outputs
    dtype: tl.constexpr = gradients[0].dtype.element_ty
    offs_o = n + tl.arange(0, BLOCK_O)
    mask_o = offs_o < O
    db = tl.zeros((BLOCK_O,), dtype)
    for b in range(0, BLOCK_B if TILES.one_batch else size, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < size
        mask = mask_b[:, None] & mask_o[None, :]
        targets = load_targets(
            data, tl.load(order_ptr + offs_b, mask=mask_b, other=0), mask_b, offs_o, ignore_index, O, LOSS, dtype
        )
        z_ptrs = gradients[0] + offs_b[:, None] * O + offs_o[None, :]
        z = tl.load(z_ptrs, mask=mask, other=0.0)
        y = value(z, ACTIVATION)
        rows_ptr = gradients[1] + 3 * offs_b
        m, total = tl.load(rows_ptr, mask=mask_b, other=0.0), tl.load(rows_ptr + 1, mask=mask_b, other=1.0)
        statistics = m, total, tl.load(rows_ptr + 2, mask=mask_b, other=0.0)
        dy = dy_of_tile(y, statistics, data, targets, mask_b, offs_o, smoothing, O, LOSS)
        dz = times_slope(dy, slope(z if reads_before(ACTIVATION.name, BEFORE) else y, ACTIVATION), ACTIVATION)
        dz = tl.where(mask, dz * scale, 0.0)
        tl.store(z_ptrs, dz, mask=mask)
        db += tl.sum(dz, axis=0)
    if STEP.biases[LAYERS - 1]:
        step_on(parameters, 2 * LAYERS - 1, offs_o, mask_o, db, row_ptr, STEP)


@triton.jit
def dz_place(hidden, gradients, LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr):
    """Where dz of a layer is in backward."""
    LAYERS: tl.constexpr = len(STEP.biases)
    if LAYER == LAYERS - 1:
        dz_ptr = gradients[0]
    elif in_tiles(STEP.sizes, TILES.outputs):
        dz_ptr = gradients[2 + LAYER % 2]
    elif LAYER == LAYERS - 2:
        dz_ptr = hidden[LAYER]
    else:
        dz_ptr = gradients[1 + LAYER % 2]
    return dz_ptr


@triton.jit
def slope_at_values(h, LAYER: tl.constexpr, STEP: tl.constexpr):
    """The slope where it is read off the values h. Asked for before a product, or Triton moves it there, and not h."""
    ACTIVATION: tl.constexpr = STEP.activations[LAYER]
    return h if reads_before(ACTIVATION.name, BEFORE) else slope(h, ACTIVATION)  # h: of no use, the slope is kept


@triton.jit
def hidden_gradient(dh, s, slopes, offs, mask, LAYER: tl.constexpr, STEP: tl.constexpr):
    """dz of a hidden layer from the gradient of its values, and their slope_at_values."""
    ACTIVATION: tl.constexpr = STEP.activations[LAYER]
    if reads_before(ACTIVATION.name, BEFORE):
        dz = dh * tl.load(slopes[LAYER] + offs, mask=mask, other=0.0)
    else:
        dz = times_slope(dh, s, ACTIVATION)
    if ACTIVATION.name != "relu":  # relu's is 0 there already; an infinite weight times a row that is not there is NaN
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
        fence(TILES)
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
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_K: tl.constexpr = fitted(TILES.hidden, K)
    BLOCK_N: tl.constexpr = fitted(TILES.hidden, N)
    weights = parameters[0]
    dtype: tl.constexpr = weights[0].dtype.element_ty
    dz_ptr = dz_place(hidden, gradients, LAYER, STEP, TILES)
    to_ptr = dz_place(hidden, gradients, LAYER - 1, STEP, TILES)
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
            fence(TILES)
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
    IN_TILES: tl.constexpr = in_tiles(STEP.sizes, TILES.outputs)
    COLUMNS: tl.constexpr = TILES.outputs if LAYERS == 1 and not IN_TILES else N
    dtype: tl.constexpr = gradients[0].dtype.element_ty
    offs_n, offs_k = n + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K
    dz_ptr = dz_place(hidden, gradients, LAYER, STEP, TILES)
    dw = tl.zeros((BLOCK_N, BLOCK_K), dtype)
    for b in range(0, BLOCK_B if TILES.one_batch else size, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < size
        rows = tl.load(order_ptr + offs_b, mask=mask_b, other=0) if LAYER == 0 else offs_b
        a = load_inputs(data, hidden, rows, offs_b, mask_b, offs_k, LAYER, STEP)
        dz_ptrs = dz_ptr + offs_b[None, :] * COLUMNS + offs_n[:, None]
        dz = tl.load(dz_ptrs, mask=mask_n[:, None] & mask_b[None, :], other=0.0)
        if LAYERS == 1 and not IN_TILES:
            dz *= scale
        fence(TILES)
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
    IN_TILES: tl.constexpr = in_tiles(STEP.sizes, TILES.outputs)
    if LAYERS > 1 and not IN_TILES:
        for k in tl.range(0, STEP.sizes[LAYERS - 1], fitted(TILES.hidden, STEP.sizes[LAYERS - 1]), num_stages=1):
            backward_output(parameters, hidden, slopes, gradients, row_ptr, k, size, scale, LAYERS - 1, STEP, TILES)
            if LAYERS == 2:
                backward_input(data, parameters, hidden, gradients, order_ptr, row_ptr, k, size, scale, STEP, TILES)
    for layer in tl.static_range(LAYERS - 2 + IN_TILES, 0, -1):
        if layer < LAYERS - 3 + IN_TILES:
            tl.debug_barrier()  # dz of the layer behind was read, in whose place comes that of the layer before
        for k in tl.range(0, STEP.sizes[layer], fitted(TILES.hidden, STEP.sizes[layer]), num_stages=1):
            backward_hidden(parameters, hidden, slopes, gradients, row_ptr, k, size, layer, STEP, TILES)
            for n in range(0, STEP.sizes[layer + 1], fitted(TILES.hidden, STEP.sizes[layer + 1])):
                backward_weights(
                    data, parameters, hidden, gradients, order_ptr, row_ptr, n, k, size, scale, layer, STEP, TILES
                )
    if LAYERS == 1:
        for n in tl.range(0, STEP.sizes[1], TILES.outputs, num_stages=1):
            backward_input(data, parameters, hidden, gradients, order_ptr, row_ptr, n, size, scale, STEP, TILES)
    elif LAYERS > 2 or IN_TILES:
        for n in tl.range(0, STEP.sizes[1], fitted(TILES.hidden, STEP.sizes[1]), num_stages=1):
            backward_input(data, parameters, hidden, gradients, order_ptr, row_ptr, n, size, scale, STEP, TILES)


@triton.jit
def streamed_step(
    data, parameters, hidden, slopes, gradients, order_ptr, row_ptr, trace, size, ignore_index, smoothing,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A step on the `size` rows from `order_ptr` on, tile by tile."""
    LAYERS: tl.constexpr = len(STEP.biases)
    IN_TILES: tl.constexpr = in_tiles(STEP.sizes, TILES.outputs)
    O: tl.constexpr = STEP.sizes[LAYERS]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_O: tl.constexpr = TILES.outputs
    dtype: tl.constexpr = gradients[0].dtype.element_ty
    zero = tl.full((), 0, dtype)
    loss, weight, counted, right = zero, zero, zero, zero
    db = tl.zeros((BLOCK_O,), dtype)
    for b in range(0, BLOCK_B if TILES.one_batch else size, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < size
        rows = tl.load(order_ptr + offs_b, mask=mask_b, other=0)
        forward: tl.constexpr = forward_in_tiles if IN_TILES else forward_tile
        loss_b, weight_b, db_b, counted_b, right_b = forward(
            data, parameters[0], hidden, slopes, gradients, rows, offs_b, mask_b, ignore_index, smoothing, STEP, TILES
        )
        loss, weight, db, counted, right = (
            loss + loss_b, weight + weight_b, db + db_b, counted + counted_b, right + right_b
        )  # fmt: skip
    losses_ptr, accuracies_ptr = trace
    loss, scale = finish_loss(loss, weight, counted, row_ptr, STEP.loss)
    tl.store(losses_ptr, loss)
    if STEP.accuracy:
        tl.store(accuracies_ptr, quotient(right, counted))
    tl.debug_barrier()  # hidden and dz are there, and the parameters were read

    if IN_TILES:
        for n in tl.range(0, O, BLOCK_O, num_stages=1):
            finish_outputs(
                data, parameters, gradients, order_ptr, row_ptr, n, size, scale, ignore_index, smoothing, STEP, TILES
            )
        tl.debug_barrier()  # dz is there, and what is known of rows was read
    backward(data, parameters, hidden, slopes, gradients, order_ptr, row_ptr, size, scale, STEP, TILES)
    if STEP.biases[LAYERS - 1] and not IN_TILES:
        offs_o = tl.arange(0, BLOCK_O)
        step_on(parameters, 2 * LAYERS - 1, offs_o, offs_o < O, db * scale, row_ptr, STEP)
    if STEP.clipped:
        step_on_all(parameters, row_ptr, STEP)


@triton.jit
def streamed_steps(
    table_ptr, data, parameters, hidden, slopes, gradients, traces, epoch_rows, batch_size, position, steps,
    ignore_index, smoothing, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`steps` steps, tile by tile."""
    LAYERS: tl.constexpr = len(STEP.biases)
    order_ptr = data.order
    for step in tl.range(steps, num_stages=1):  # no load may come before a store of the step before
        size = tl.minimum(batch_size, epoch_rows - position)
        row_ptr, trace = table_ptr + step * (2 * LAYERS * ROW), (traces[0] + step, traces[1] + step)
        streamed_step(
            data, parameters, hidden, slopes, gradients, order_ptr, row_ptr, trace, size, ignore_index, smoothing,
            STEP, TILES,
        )  # fmt: skip
        order_ptr += size
        position = tl.where(position + size >= epoch_rows, 0, position + size)
        tl.debug_barrier()  # the parameters are there, and hidden and dz were read


@triton.jit(do_not_specialize=["epoch_rows", "batch_size", "position", "steps", "ignore_index", "smoothing"])
def mlp_training_kernel(
    table_ptr, data, weights, states, hidden, slopes, gradients, traces,
    epoch_rows, batch_size, position, steps, ignore_index, smoothing, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`steps` steps, the first one `position` rows into an epoch of `epoch_rows`. One program.

    weights are W1, b1, W2, ..., and states the first state of each, then the second of each, as many as the rule keeps;
    traces the losses and the accuracies. The table has a row for each step and parameter.
    """
    parameters = (weights, states, gradients[-1])
    if TILES.on_chip:
        on_chip_steps(
            table_ptr, data, parameters, traces, epoch_rows, batch_size, position, steps, ignore_index, smoothing,
            STEP, TILES,
        )  # fmt: skip
    else:
        streamed_steps(
            table_ptr, data, parameters, hidden, slopes, gradients, traces, epoch_rows, batch_size, position, steps,
            ignore_index, smoothing, STEP, TILES,
        )  # fmt: skip
