"""The kernel of mlp_training.py: whole training steps of a net of Linear layers, by one program.

    a = x;  for each layer: z = a Wᵀ + b,  a = activation(z)       loss of the last a
    dz = da · slope;  dW = dzᵀ a,  db = Σ dz,  da = dz W           then the optimizer's step (updates.py) on each

What a step is, is one value, a `Step` (step.py), and how it is cut another, `Tiles`: both are compile-time arguments.

A step gathers its rows of x through the order of the epoch. Where the batch and each hidden layer are one tile, steps
stay on chip (mlp_training_on_chip.py), and so do the parameters and the state of the optimizer if they fit. Otherwise
these lie in global memory, from where a small net never leaves the L1 cache of the one SM and a larger one streams from
L2; tiles of the batch, of the hidden units and of the inputs of a layer are what is held in registers, and all outputs
are one tile, or several where they are many: the step is streamed (mlp_training_forward.py, mlp_training_backward.py).
What it hands from one part to the next then lies beside the parameters:

    hidden      the values of each hidden layer; in place of the last one's comes its dz, tile by tile
    slopes      of the activations whose slope is read off the number before. Computing them again in backward costs
                more than keeping them: several warps hold the operands of a product, and each would compute all of it
    gradients   dz of the outputs; and two buffers that dz of all layers but the last two takes in turns

Of outputs in several tiles z comes before dz to its place, next to which is what the loss has to know of whole rows;
and backward takes the last layer for one more hidden layer, so that all dz but that of the outputs takes turns.

Where a step is clipped, the last of `gradients` has those of all parameters, also of steps that stay on chip: the norm
is known only when all are there, and then each parameter's step is made, tile by tile.

Nothing is added up in an order that could change, so the bits repeat.

One program has several threads, and each barrier stands between a store and a load of the same memory by others.
"""

import triton
import triton.language as tl

from .losses import finish_loss
from .mlp_training_backward import backward, finish_outputs
from .mlp_training_forward import forward_in_tiles, forward_tile
from .mlp_training_on_chip import on_chip_steps
from .mlp_training_tiles import in_tiles, quotient, step_on, step_on_all
from .updates import ROW


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
