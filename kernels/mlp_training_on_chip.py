"""A training step of one tile of the batch, and of one tile of units in each hidden layer, that stays on chip.

    forward     z = W a + b,  a = activation(z)        each [units, batch]: what a layer is in registers
    backward    dz = da · slope;  dW = dz aᵀ,  db = Σ dz,  da = Wᵀ dz;  then the optimizer's step (updates.py) on each

Only parameters and their state go through memory. The tiles are transposed, with the batch along the columns: so all
outputs of a row are in one warp, whose loss needs no barrier, and so are all rows of a hidden unit, for db.

Two barriers are written down: one when all warps have read the parameters, before the first is stored, and the kernel's
own at the end of a step, before the next one reads them. All others are Triton's, for tiles that warps exchange through
shared memory: the operands of products, the sums over the batch, and each gradient on its way to the layout of memory.
docs/performance.md tells them one by one.
"""

import triton
import triton.language as tl

from .activations import BEFORE, reads_before, slope, times_slope, value
from .losses import loss_of
from .mlp_training_tiles import block, fitted, load_x, step_as_given, step_on


@triton.constexpr_function
def sums_of(weighted, accuracy):
    """How many sums over the batch are made beside those of dz: of the losses, the rows that count, ..."""
    return 2 + weighted + accuracy


@triton.jit
def weights_at(offs_n, offs_k, LAYER: tl.constexpr, STEP: tl.constexpr):
    """Offsets and mask of a tile of a W [N, K]."""
    K: tl.constexpr = STEP.sizes[LAYER]
    return offs_n[:, None] * K + offs_k[None, :], (offs_n < STEP.sizes[LAYER + 1])[:, None] & (offs_k < K)[None, :]


@triton.jit
def load_weights(weights, offs_n, offs_k, LAYER: tl.constexpr, STEP: tl.constexpr):
    """A tile of a W."""
    offs, mask = weights_at(offs_n, offs_k, LAYER, STEP)
    return tl.load(weights[2 * LAYER] + offs, mask=mask, other=0.0)


@triton.jit
def product(w, a, z, AS_ROWS: tl.constexpr, TILES: tl.constexpr):
    """z + w a, or as rows of the batch: the same tile, in another layout (see TILES.as_rows)."""
    dtype: tl.constexpr = z.dtype
    if AS_ROWS:
        z = tl.dot(tl.trans(a), tl.trans(w), tl.trans(z), input_precision=TILES.precision, out_dtype=dtype)
        z = tl.trans(z)
    else:
        z = tl.dot(w, a, z, input_precision=TILES.precision, out_dtype=dtype)
    return z


@triton.jit
def add_two(a, b, c, d):
    """The sums of two pairs."""
    return a + c, b + d


@triton.jit
def finish_forward(
    z, data, rows, mask_b, offs_o, trace, ignore_index, smoothing, STEP: tl.constexpr
):  # fmt: skip
    """From z [O, B] of the last layer to its dz, the sum of that over the batch, and what is yet to be multiplied.

    The losses and what else is summed up are packed into rows of the tile that are no outputs, for one sum of all.
    """
    LAYERS: tl.constexpr = len(STEP.biases)
    O: tl.constexpr = STEP.sizes[LAYERS]
    ACTIVATION: tl.constexpr = STEP.activations[LAYERS - 1]
    LOSS: tl.constexpr = STEP.loss
    dtype: tl.constexpr = z.dtype
    z = tl.trans(z)
    y = value(z, ACTIVATION)
    loss, weight, dy, valid, right = loss_of(y, data, rows, mask_b, offs_o, ignore_index, smoothing, O, LOSS)
    a = z if reads_before(ACTIVATION.name, BEFORE) else y
    dz = times_slope(dy, slope(a, ACTIVATION), ACTIVATION)
    dz = tl.where(mask_b[:, None] & (offs_o < O)[None, :], dz, 0.0)

    packed = tl.where((offs_o == O)[None, :], loss[:, None], dz)
    packed = tl.where((offs_o == O + 1)[None, :], valid.to(dtype)[:, None], packed)
    if LOSS.weighted:
        packed = tl.where((offs_o == O + 2)[None, :], weight[:, None], packed)
    if STEP.accuracy:
        packed = tl.where((offs_o == O + 2 + LOSS.weighted)[None, :], right.to(dtype)[:, None], packed)
    sums = tl.sum(packed, axis=0)
    two = tl.where(offs_o == O, sums, 0.0), tl.where(offs_o == O + 1, sums, 0.0)
    total, counted = tl.reduce(two, 0, add_two)
    weights = counted
    if LOSS.weighted:
        weights = tl.sum(tl.where(offs_o == O + 2, sums, 0.0))
    losses_ptr, accuracies_ptr = trace
    tl.store(losses_ptr, total / weights if LOSS.mean else total)
    if STEP.accuracy:
        right = tl.sum(tl.where(offs_o == O + 2 + LOSS.weighted, sums, 0.0))
        tl.store(accuracies_ptr, right / counted)

    scale = tl.full((), 1.0, dtype)
    if LOSS.mean:
        scale = tl.where(counted > 0, 1.0 / weights, 1.0)  # no rows: no gradient
    if LOSS.weighted:  # 1 / 0 times what ReLU takes to 0 would be NaN
        dz, sums, scale = dz * scale, sums * scale, tl.full((), 1.0, dtype)
    return tl.trans(dz), sums, scale


@triton.constexpr_function
def units(layer, sizes, outputs):
    """The tile of the units of a layer: `outputs` of the last."""
    return outputs if layer == len(sizes) - 2 else block(sizes[layer + 1])


@triton.constexpr_function
def inputs_of(layer, sizes, inputs):
    """The tile of the inputs of a layer: of the first at most `inputs`."""
    return fitted(inputs, sizes[0]) if layer == 0 else block(sizes[layer])


@triton.jit
def linear(data, weights, a, rows, mask_b, LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr):
    """z = W a + b [N, B] of a layer, and W where it is one tile; of x in several tiles no `a` is given."""
    K: tl.constexpr = STEP.sizes[LAYER]
    N: tl.constexpr = STEP.sizes[LAYER + 1]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_N: tl.constexpr = units(LAYER, STEP.sizes, TILES.outputs)
    BLOCK_K: tl.constexpr = inputs_of(LAYER, STEP.sizes, TILES.inputs)
    LAST: tl.constexpr = len(STEP.biases) - 1
    AS_ROWS: tl.constexpr = TILES.as_rows and LAYER == LAST
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    z = tl.zeros((BLOCK_N, BLOCK_B), weights[0].dtype.element_ty)
    w = z
    if K <= BLOCK_K:
        w = load_weights(weights, offs_n, offs_k, LAYER, STEP)
        z = product(w, a, z, AS_ROWS, TILES)
    else:
        for k in tl.range(0, K, BLOCK_K, num_stages=1):
            x = load_x(data, rows, mask_b, k + offs_k, K)
            z = product(load_weights(weights, offs_n, k + offs_k, LAYER, STEP), tl.trans(x), z, AS_ROWS, TILES)
    if STEP.biases[LAYER]:
        z += tl.load(weights[2 * LAYER + 1] + offs_n, mask=offs_n < N, other=0.0)[:, None]
    return z, w


@triton.jit
def step_on_weights(
    data, parameters, a, dz, rows, mask_b, row_ptr, scale,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The optimizer's step on the W of a layer; of x in several tiles no `a` is given."""
    LAST: tl.constexpr = len(STEP.biases) - 1
    K: tl.constexpr = STEP.sizes[LAYER]
    BLOCK_K: tl.constexpr = inputs_of(LAYER, STEP.sizes, TILES.inputs)
    dtype: tl.constexpr = dz.dtype
    offs_n, offs_k = tl.arange(0, units(LAYER, STEP.sizes, TILES.outputs)), tl.arange(0, BLOCK_K)
    if K > BLOCK_K:
        for k in tl.range(0, K, BLOCK_K, num_stages=1):
            x = load_x(data, rows, mask_b, k + offs_k, K)
            dw = tl.dot(dz, x, input_precision=TILES.precision, out_dtype=dtype)
            offs, mask = weights_at(offs_n, k + offs_k, LAYER, STEP)
            step_on(parameters, 2 * LAYER, offs, mask, dw * scale, row_ptr, STEP)
    else:
        offs, mask = weights_at(offs_n, offs_k, LAYER, STEP)
        if TILES.as_rows and LAYER == LAST:
            dw = tl.trans(tl.dot(a, tl.trans(dz), input_precision=TILES.precision, out_dtype=dtype))
            step_as_given(parameters, 2 * LAYER, offs, mask, dw * scale, row_ptr, STEP)
        else:
            dw = tl.dot(dz, tl.trans(a), input_precision=TILES.precision, out_dtype=dtype)
            step_on(parameters, 2 * LAYER, offs, mask, dw * scale, row_ptr, STEP)


@triton.jit
def train_layers(
    data, parameters, a, rows, mask_b, row_ptr, trace, ignore_index, smoothing,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The step on a layer, whose inputs are a [K, B], and on all layers behind it. Returns da, and its factor.

    Forward of the layer, then the layers behind it, then backward: a layer's tiles wait in registers meanwhile. dz and
    da are of the sum of the losses, and for a mean the gradients of parameters get their factor at the end: so products
    need not wait for the sum over the batch.
    """
    LAST: tl.constexpr = len(STEP.biases) - 1
    N: tl.constexpr = STEP.sizes[LAYER + 1]
    ACTIVATION: tl.constexpr = STEP.activations[LAYER]
    # b before W takes fewer instructions, but of the last layer and of W in several tiles exact float32 then spills
    BIAS_FIRST: tl.constexpr = LAYER < LAST and STEP.sizes[LAYER] <= inputs_of(LAYER, STEP.sizes, TILES.inputs)
    offs_n = tl.arange(0, units(LAYER, STEP.sizes, TILES.outputs))
    mask_n = offs_n < N
    mask = mask_n[:, None] & mask_b[None, :]
    z, w = linear(data, parameters[0], a, rows, mask_b, LAYER, STEP, TILES)
    if LAYER == LAST:
        dz, db, scale = finish_forward(z, data, rows, mask_b, offs_n, trace, ignore_index, smoothing, STEP)
        tl.debug_barrier()  # the parameters were read
    else:
        h = tl.where(mask, value(z, ACTIVATION), 0.0)
        dh, scale = train_layers(
            data, parameters, h, rows, mask_b, row_ptr, trace, ignore_index, smoothing, LAYER + 1, STEP, TILES
        )
        dz = times_slope(dh, slope(z if reads_before(ACTIVATION.name, BEFORE) else h, ACTIVATION), ACTIVATION)
        if ACTIVATION.name != "relu":  # relu's is 0 there already; an infinite weight times what is not there is NaN
            dz = tl.where(mask, dz, 0.0)
        db = tl.sum(dz, axis=1)
        if STEP.biases[LAYER] and BIAS_FIRST:
            step_on(parameters, 2 * LAYER + 1, offs_n, mask_n, db * scale, row_ptr, STEP)
    da = dz
    if LAYER > 0:
        da = tl.dot(tl.trans(w), dz, input_precision=TILES.precision, out_dtype=dz.dtype)
    step_on_weights(data, parameters, a, dz, rows, mask_b, row_ptr, scale, LAYER, STEP, TILES)
    if STEP.biases[LAYER] and not BIAS_FIRST:
        step_on(parameters, 2 * LAYER + 1, offs_n, mask_n, db * scale, row_ptr, STEP)
    return da, scale
