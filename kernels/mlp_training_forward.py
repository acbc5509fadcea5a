"""Forward of a streamed step, tile by tile: see mlp_training_kernels.py."""

import triton
import triton.language as tl

from .activations import BEFORE, reads_before, slope, times_slope, value
from .losses import load_targets, loss_of
from .losses_in_tiles import add_tile, finish_rows, no_tile
from .mlp_training_products import fence
from .mlp_training_tiles import fitted, load_x


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
