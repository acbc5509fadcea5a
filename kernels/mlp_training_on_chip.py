"""Training steps of one tile of the batch, and of one tile of units in each hidden layer, that stay on chip.

    forward     z = W a + b,  a = activation(z)        each [units, batch]: what a layer is in registers
    backward    dz = da · slope;  dW = dz aᵀ,  db = Σ dz,  da = Wᵀ dz;  then the optimizer's step (updates.py) on each

Parameters and their state are held in registers from the first step to the last where they fit, so that a step reads
its rows and leaves its loss, and no more; otherwise they go through memory. The rows of x are loaded a step ahead, and
their places in x two steps. The tiles are transposed, with the batch along the columns: so all outputs of a row are in
one warp, whose loss needs no barrier, and so are all rows of a hidden unit, for db.

Where parameters go through memory two barriers are written down: one when all warps have read them, before the first is
stored, and one at the end of a step, before the next one reads them. A third is behind the fence of a gradient that has
weights. All others are Triton's, for tiles that warps exchange through shared memory: the operands of products, the
sums over the batch, and each gradient on its way to the layout of memory. docs/performance.md tells them one by one.
"""

import triton
import triton.language as tl

from .activations import BEFORE, reads_before, slope, times_slope, value
from .losses import finish_loss, load_targets, loss_of, weighs
from .mlp_training_products import multiply, operand, product, turned
from .mlp_training_tiles import block, fitted, load_x, ptrs_of, quotient, step_as_given, step_on_all, step_transposed
from .updates import ROW, load_state, numbers_of, stepped, store_state


@triton.constexpr_function
def sums_of(weighted, accuracy):
    """How many sums over the batch are made beside those of dz: of the losses, the rows that count, ..."""
    return 2 + weighted + accuracy


@triton.constexpr_function
def units(layer, sizes, outputs, least):
    """The tile of the units of a layer: `outputs` of the last, of another at least `least`."""
    return outputs if layer == len(sizes) - 2 else max(least, block(sizes[layer + 1]))


@triton.constexpr_function
def inputs_of(layer, sizes, inputs, least):
    """The tile of the inputs of a layer: of the first at most `inputs`."""
    return fitted(inputs, sizes[0]) if layer == 0 else max(least, block(sizes[layer]))


@triton.jit
def weights_at(offs_n, offs_k, LAYER: tl.constexpr, STEP: tl.constexpr):
    """Offsets and mask of a tile of a W [N, K]."""
    K: tl.constexpr = STEP.sizes[LAYER]
    return offs_n[:, None] * K + offs_k[None, :], (offs_n < STEP.sizes[LAYER + 1])[:, None] & (offs_k < K)[None, :]


@triton.jit
def place_of(PARAMETER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr):
    """Offsets and mask of a whole parameter; their order is W1, b1, W2, b2, ..."""
    LAYER: tl.constexpr = PARAMETER // 2
    offs_n = tl.arange(0, units(LAYER, STEP.sizes, TILES.outputs, TILES.least))
    if PARAMETER % 2 == 0:
        offs, mask = weights_at(
            offs_n, tl.arange(0, inputs_of(LAYER, STEP.sizes, TILES.inputs, TILES.least)), LAYER, STEP
        )
    else:
        offs, mask = offs_n, offs_n < STEP.sizes[LAYER + 1]
    return offs, mask


@triton.jit
def hold(parameters, STEP: tl.constexpr, TILES: tl.constexpr):
    """Each parameter with its states, as :func:`load_state` has them; or nothing, where they are not held."""
    held = ()
    if TILES.held:
        for parameter in tl.static_range(2 * len(STEP.biases)):
            state = ()
            if parameter % 2 == 0 or STEP.biases[parameter // 2]:
                offs, mask = place_of(parameter, STEP, TILES)
                state = load_state(ptrs_of(parameters, parameter), offs, mask)
            held = held + (state,)  # type: ignore[assignment]  # it grows
    return held


@triton.jit
def release(parameters, held, STEP: tl.constexpr, TILES: tl.constexpr):
    """Store what was held."""
    if TILES.held:
        for parameter in tl.static_range(2 * len(STEP.biases)):
            if parameter % 2 == 0 or STEP.biases[parameter // 2]:
                offs, mask = place_of(parameter, STEP, TILES)
                store_state(ptrs_of(parameters, parameter), offs, mask, held[parameter])


@triton.jit
def linear(data, weights, held, a, rows, mask_b, LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr):
    """z = W a + b [N, B] of a layer, and W where it is one tile; of x in several tiles no `a` is given."""
    K: tl.constexpr = STEP.sizes[LAYER]
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_N: tl.constexpr = units(LAYER, STEP.sizes, TILES.outputs, TILES.least)
    BLOCK_K: tl.constexpr = inputs_of(LAYER, STEP.sizes, TILES.inputs, TILES.least)
    LAST: tl.constexpr = len(STEP.biases) - 1
    AS_ROWS: tl.constexpr = TILES.as_rows and LAYER == LAST
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    z = tl.zeros((BLOCK_N, BLOCK_B), weights[0].dtype.element_ty)
    w = ()
    if K <= BLOCK_K:
        if TILES.held:
            w = operand(held[2 * LAYER][0], TILES)
        else:
            offs, mask = weights_at(offs_n, offs_k, LAYER, STEP)
            w = operand(tl.load(weights[2 * LAYER] + offs, mask=mask, other=0.0), TILES)
        z = product(w, a, z, AS_ROWS, TILES)
    else:
        for k in tl.range(0, K, BLOCK_K, num_stages=1):
            x = operand(tl.trans(load_x(data, rows, mask_b, k + offs_k, K)), TILES)
            offs, mask = weights_at(offs_n, k + offs_k, LAYER, STEP)
            z = product(operand(tl.load(weights[0] + offs, mask=mask, other=0.0), TILES), x, z, AS_ROWS, TILES)
    if STEP.biases[LAYER]:
        if TILES.held:
            b = held[2 * LAYER + 1][0]
        else:
            b = tl.load(weights[2 * LAYER + 1] + offs_n, mask=offs_n < STEP.sizes[LAYER + 1], other=0.0)
        z += b[:, None]
    return z, w


@triton.jit
def add_two(a, b, c, d):
    """The sums of two pairs."""
    return a + c, b + d


@triton.jit
def finish_forward(
    z, data, targets, mask_b, offs_o, row_ptr, trace, smoothing, STEP: tl.constexpr, TILES: tl.constexpr
):
    """From z [O, B] of the last layer to its dz, the sum of that over the batch, and what is yet to be multiplied.

    dz is returned as an operand. The losses and what else is summed up are packed into rows of the tile that are no
    outputs, for one sum of all.
    """
    LAYERS: tl.constexpr = len(STEP.biases)
    O: tl.constexpr = STEP.sizes[LAYERS]
    ACTIVATION: tl.constexpr = STEP.activations[LAYERS - 1]
    LOSS: tl.constexpr = STEP.loss
    WEIGHS: tl.constexpr = weighs(LOSS.name, LOSS.weighted, LOSS.rows_weighted)
    dtype: tl.constexpr = z.dtype
    z = tl.trans(z)
    y = value(z, ACTIVATION)
    loss, weight, dy, counted, right = loss_of(y, data, targets, mask_b, offs_o, smoothing, O, LOSS)
    a = z if reads_before(ACTIVATION.name, BEFORE) else y
    dz = times_slope(dy, slope(a, ACTIVATION), ACTIVATION)
    dz = tl.where(mask_b[:, None] & (offs_o < O)[None, :], dz, 0.0)
    if not WEIGHS:
        operand_dz = operand(tl.trans(dz), TILES)

    packed = tl.where((offs_o == O)[None, :], loss[:, None], dz)
    packed = tl.where((offs_o == O + 1)[None, :], counted.to(dtype)[:, None], packed)
    if WEIGHS:
        packed = tl.where((offs_o == O + 2)[None, :], weight[:, None], packed)
    if STEP.accuracy:
        packed = tl.where((offs_o == O + 2 + WEIGHS)[None, :], right.to(dtype)[:, None], packed)
    sums = tl.sum(packed, axis=0)
    two = tl.where(offs_o == O, sums, 0.0), tl.where(offs_o == O + 1, sums, 0.0)
    total, counted = tl.reduce(two, 0, add_two)
    weights = counted
    if WEIGHS:
        weights = tl.sum(tl.where(offs_o == O + 2, sums, 0.0))
    losses_ptr, accuracies_ptr = trace
    loss, scale = finish_loss(total, weights, counted, row_ptr, LOSS)
    tl.store(losses_ptr, loss)
    if STEP.accuracy:
        right = tl.sum(tl.where(offs_o == O + 2 + WEIGHS, sums, 0.0))
        tl.store(accuracies_ptr, quotient(right, counted))
    if WEIGHS:  # 1 / 0 times what ReLU takes to 0 would be NaN
        operand_dz = operand(tl.trans(dz * scale), TILES)
        if TILES.fenced:
            tl.debug_barrier()  # the one that Triton makes for the other product's operand is before the fence
        sums, scale = sums * scale, tl.full((), 1.0, dtype)
    return operand_dz, sums, scale


@triton.jit
def numbers_for(PARAMETER: tl.constexpr, row_ptr, numbers, RULE: tl.constexpr, TILES: tl.constexpr):
    """The optimizer's numbers for a parameter: `numbers` if all have the same."""
    return numbers if TILES.one_row else numbers_of(row_ptr + PARAMETER * ROW, RULE)


@triton.jit
def step_on_bias(
    parameters, held, db, offs_n, mask_n, row_ptr, numbers,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The optimizer's step on the b of a layer; with its state, where that is held."""
    RULE: tl.constexpr = STEP.rule
    numbers = numbers_for(2 * LAYER + 1, row_ptr, numbers, RULE, TILES)
    state = ()
    if TILES.held:
        state = stepped(held[2 * LAYER + 1], db, numbers, RULE)
    else:
        step_transposed(parameters, 2 * LAYER + 1, offs_n, mask_n, db, numbers, STEP)
    return state


@triton.jit
def step_on_weights(
    data, parameters, held, a, dz, rows, mask_b, row_ptr, numbers, scale,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The optimizer's step on the W of a layer, with its state where that is held; of x in several tiles no `a`."""
    RULE: tl.constexpr = STEP.rule
    LAST: tl.constexpr = len(STEP.biases) - 1
    K: tl.constexpr = STEP.sizes[LAYER]
    BLOCK_N: tl.constexpr = units(LAYER, STEP.sizes, TILES.outputs, TILES.least)
    BLOCK_K: tl.constexpr = inputs_of(LAYER, STEP.sizes, TILES.inputs, TILES.least)
    dtype: tl.constexpr = parameters[0][0].dtype.element_ty
    numbers = numbers_for(2 * LAYER, row_ptr, numbers, RULE, TILES)
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    state = ()
    nothing = tl.zeros((BLOCK_N, BLOCK_K), dtype)
    if K > BLOCK_K:
        for k in tl.range(0, K, BLOCK_K, num_stages=1):
            x = operand(load_x(data, rows, mask_b, k + offs_k, K), TILES)
            offs, mask = weights_at(offs_n, k + offs_k, LAYER, STEP)
            dw = multiply(dz, x, nothing, TILES)
            step_transposed(parameters, 2 * LAYER, offs, mask, dw * scale, numbers, STEP)
    else:
        dw = product(dz, turned(a), nothing, TILES.as_rows and LAYER == LAST, TILES)
        offs, mask = weights_at(offs_n, offs_k, LAYER, STEP)
        if TILES.held:
            state = stepped(held[2 * LAYER], dw * scale, numbers, RULE)
        elif TILES.as_rows and LAYER == LAST:
            step_as_given(parameters, 2 * LAYER, offs, mask, dw * scale, numbers, STEP)
        else:
            step_transposed(parameters, 2 * LAYER, offs, mask, dw * scale, numbers, STEP)
    return state


@triton.jit
def train_layers(
    data, parameters, held, a, rows, targets, mask_b, row_ptr, trace, smoothing,
    LAYER: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The step on a layer, whose inputs are a [K, B], an operand, and on all layers behind it.

    Forward of the layer, then the layers behind it, then backward: a layer's tiles wait in registers meanwhile. Returns
    da, and its factor: dz and da are of the sum of the losses, and for a mean the gradients of parameters get it at the
    end, so that products need not wait for the sum over the batch. Then the optimizer's numbers, where all parameters
    have the same, and the parameters from this layer on with their state, where they are held.
    """
    RULE: tl.constexpr = STEP.rule
    LAST: tl.constexpr = len(STEP.biases) - 1
    N: tl.constexpr = STEP.sizes[LAYER + 1]
    ACTIVATION: tl.constexpr = STEP.activations[LAYER]
    # b before W takes fewer instructions, but of the last layer and of W in several tiles exact float32 then spills
    BIAS_FIRST: tl.constexpr = (
        LAYER == 0 and LAYER < LAST and STEP.sizes[LAYER] <= inputs_of(LAYER, STEP.sizes, TILES.inputs, TILES.least)
    )
    offs_n = tl.arange(0, units(LAYER, STEP.sizes, TILES.outputs, TILES.least))
    mask_n = offs_n < N
    mask = mask_n[:, None] & mask_b[None, :]
    bias, behind = (), ()
    z, w = linear(data, parameters[0], held, a, rows, mask_b, LAYER, STEP, TILES)
    if LAYER == LAST:
        if not TILES.held and not STEP.clipped:
            tl.debug_barrier()  # the parameters were read
        numbers = numbers_of(row_ptr, RULE) if TILES.one_row else ()
        dz, db, scale = finish_forward(z, data, targets, mask_b, offs_n, row_ptr, trace, smoothing, STEP, TILES)
    else:
        h = tl.where(mask, value(z, ACTIVATION), 0.0)
        next_a = operand(h, TILES)
        dh, scale, numbers, behind = train_layers(
            data, parameters, held, next_a, rows, targets, mask_b, row_ptr, trace, smoothing, LAYER + 1, STEP, TILES
        )
        dz = times_slope(dh, slope(z if reads_before(ACTIVATION.name, BEFORE) else h, ACTIVATION), ACTIVATION)
        if ACTIVATION.name != "relu":  # relu's is 0 there already; an infinite weight times what is not there is NaN
            dz = tl.where(mask, dz, 0.0)
        dz, db = operand(dz, TILES), tl.sum(dz, axis=1)
    if STEP.biases[LAYER] and BIAS_FIRST:
        bias = step_on_bias(parameters, held, db * scale, offs_n, mask_n, row_ptr, numbers, LAYER, STEP, TILES)
    da = db
    if LAYER > 0:
        BLOCK_K: tl.constexpr = inputs_of(LAYER, STEP.sizes, TILES.inputs, TILES.least)
        BLOCK_B: tl.constexpr = TILES.batch
        da = multiply(turned(w), dz, tl.zeros((BLOCK_K, BLOCK_B), db.dtype), TILES)
    weights = step_on_weights(data, parameters, held, a, dz, rows, mask_b, row_ptr, numbers, scale, LAYER, STEP, TILES)
    if STEP.biases[LAYER] and not BIAS_FIRST:
        bias = step_on_bias(parameters, held, db * scale, offs_n, mask_n, row_ptr, numbers, LAYER, STEP, TILES)
    if TILES.held:
        behind = (weights, bias) + behind  # type: ignore[assignment]
    return da, scale, numbers, behind


@triton.jit
def rows_of(order_ptr, offs_b, is_step, epoch_rows, batch_size, position):
    """The rows of a step, none if it is no step any more, and how many; then where the next step's begin."""
    size = tl.where(is_step, tl.minimum(batch_size, epoch_rows - position), 0)
    rows = tl.load(order_ptr + offs_b, mask=offs_b < size, other=0)
    behind = position + size
    return rows, size, order_ptr + size, tl.where(behind >= epoch_rows, 0, behind)


@triton.jit
def on_chip_steps(
    table_ptr, data, parameters, traces, epoch_rows, batch_size, position, steps, ignore_index, smoothing,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`steps` steps, whose rows are one tile."""
    LAYERS: tl.constexpr = len(STEP.biases)
    LOSS: tl.constexpr = STEP.loss
    I: tl.constexpr = STEP.sizes[0]
    dtype: tl.constexpr = parameters[0][0].dtype.element_ty
    offs_b, offs_i = tl.arange(0, TILES.batch), tl.arange(0, fitted(TILES.inputs, I))
    offs_o = tl.arange(0, TILES.outputs)
    held = hold(parameters, STEP, TILES)
    rows, size, order_ptr, position = rows_of(data.order, offs_b, steps > 0, epoch_rows, batch_size, position)
    next_rows, next_size, order_ptr, position = rows_of(order_ptr, offs_b, steps > 1, epoch_rows, batch_size, position)
    x = load_x(data, rows, offs_b < size, offs_i, I)  # if there are more inputs, each layer loads its own
    for step in tl.range(steps, num_stages=1):  # no load may come before a store of the step before
        next_x = load_x(data, next_rows, offs_b < next_size, offs_i, I)
        later_rows, later_size, order_ptr, position = rows_of(
            order_ptr, offs_b, step + 2 < steps, epoch_rows, batch_size, position
        )
        mask_b = offs_b < size
        targets = load_targets(data, rows, mask_b, offs_o, ignore_index, STEP.sizes[LAYERS], LOSS, dtype)
        row_ptr, trace = table_ptr + step * (2 * LAYERS * ROW), (traces[0] + step, traces[1] + step)
        a = operand(tl.trans(x), TILES)
        _, _, _, held = train_layers(
            data, parameters, held, a, rows, targets, mask_b, row_ptr, trace, smoothing, 0, STEP, TILES
        )
        if STEP.clipped:
            step_on_all(parameters, row_ptr, STEP)
        if not TILES.held:
            tl.debug_barrier()  # the parameters are there
        x, rows, size = next_x, next_rows, next_size
        next_rows, next_size = later_rows, later_size
    release(parameters, held, STEP, TILES)
