"""Backward of a streamed step, tile by tile, and the optimizer's step on each: see mlp_training_kernels.py."""

import triton
import triton.language as tl

from .activations import BEFORE, reads_before, slope, times_slope, value
from .losses import load_targets
from .losses_in_tiles import dy_of_tile
from .mlp_training_forward import load_inputs
from .mlp_training_products import fence
from .mlp_training_tiles import fitted, in_tiles, step_on


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
