"""What the two ways to make a training step share (see mlp_training_kernels.py): tiles, loads, the optimizer's step."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .updates import MAX_NORM, ROW, numbers_of, update

MOST_FLAT = tl.constexpr(2048)
"""Elements of all parameters that a clipped step updates at once. Unmeasured."""


class Tiles(NamedTuple):
    """The most rows of the batch, hidden units and inputs of a layer in a tile, and all outputs, or the most in a tile
    of them; whether a batch is one tile; the precision of products; whether the step stays on chip. And if so, whether
    it multiplies the last layer as rows, whether parameters and their state stay there from step to step, and whether
    all parameters have one row of the optimizer's table; whether products need fences (mlp_training_products.py); on
    chip the least tile of units."""

    batch: int
    hidden: int
    inputs: int
    outputs: int
    one_batch: bool
    precision: str
    on_chip: bool
    as_rows: bool = False
    held: bool = False
    one_row: bool = False
    fenced: bool = False
    least: int = 16


class Data(NamedTuple):
    """x [N, I], targets [N] or [N, O], the rows of the steps one by one, weights of classes or outputs [O], of positive
    targets [O], and of rows [N]; or any tensor for none of these."""

    x: Any
    targets: Any
    order: Any
    class_weight: Any
    pos_weight: Any
    row_weight: Any
    stride_xm: int
    stride_xi: int
    stride_tm: int
    stride_to: int
    stride_r: int


@triton.constexpr_function
def block(size):
    """The tile that holds `size` rows or columns: tl.dot takes none with fewer than 16."""
    return max(16, triton.next_power_of_2(size))


@triton.constexpr_function
def fitted(most, size):
    """The tile of a layer with `size` units: no larger than `most`, or than there are."""
    return min(most, block(size))


@triton.constexpr_function
def in_tiles(sizes, outputs):
    """Whether the outputs of a net are more than a tile of `outputs`."""
    return sizes[-1] > outputs


@triton.constexpr_function
def elements(parameter, sizes, biases):
    """Of a parameter, whose order is W1, b1, W2, b2, ...; 0 of a bias that is not there."""
    layer = parameter // 2
    return sizes[layer + 1] * (biases[layer] if parameter % 2 else sizes[layer])


@triton.constexpr_function
def gradient_at(parameter, sizes, biases):
    """Where the gradient of a parameter begins in the buffer that has one behind the other."""
    return sum([elements(before, sizes, biases) for before in range(parameter)])


@triton.jit
def load_x(data, rows, mask_b, offs_i, I: tl.constexpr):
    """Inputs `offs_i` of rows of x: [BLOCK_B, BLOCK_I]."""
    ptrs = data.x + (rows * data.stride_xm)[:, None] + (offs_i.to(tl.int64) * data.stride_xi)[None, :]
    return tl.load(ptrs, mask=mask_b[:, None] & (offs_i < I)[None, :], other=0.0)


@triton.jit
def quotient(a, b):
    """a / b, rounded as IEEE 754 has it: by itself Triton's may be off by 2 units in the last place in float32."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def ptrs_of(parameters, PARAMETER: tl.constexpr):
    """Where a parameter lies, and its states: of each state there are as many as of parameters, or none at all."""
    weights, states, _ = parameters
    ptrs = (weights[PARAMETER],)
    for group in tl.static_range(len(states) // len(weights)):
        ptrs = ptrs + (states[group * len(weights) + PARAMETER],)  # type: ignore[assignment]  # it grows
    return ptrs


@triton.jit
def step_on(parameters, PARAMETER: tl.constexpr, offs, mask, g, row_ptr, STEP: tl.constexpr):
    """The optimizer's step on some elements of a parameter, whose gradient g is a product, or the sum of one.

    The order of parameters is W1, b1, W2, b2, ..., and that of the rows from `row_ptr` on.
    """
    RULE: tl.constexpr = STEP.rule
    step_transposed(parameters, PARAMETER, offs, mask, g, numbers_of(row_ptr + PARAMETER * ROW, RULE), STEP)


@triton.jit
def step_transposed(parameters, PARAMETER: tl.constexpr, offs, mask, g, numbers, STEP: tl.constexpr):
    """The same with the optimizer's numbers given.

    Of the layouts of a product and of memory Triton takes the product's, and would bring w and its state to that and
    back. Transposed g is no product any more: it alone is brought over.
    """
    if len(g.shape) == 1:
        offs, mask, g = offs[:, None], mask[:, None], g[:, None]
    step_as_given(parameters, PARAMETER, tl.trans(offs), tl.trans(mask), tl.trans(g), numbers, STEP)


@triton.jit
def step_as_given(parameters, PARAMETER: tl.constexpr, offs, mask, g, numbers, STEP: tl.constexpr):
    """`step_transposed` of a gradient that is transposed already. Of a clipped step it is only kept."""
    if STEP.clipped:
        tl.store(parameters[2] + gradient_at(PARAMETER, STEP.sizes, STEP.biases) + offs, g, mask=mask)
    else:
        update(ptrs_of(parameters, PARAMETER), offs, mask, g, numbers, STEP.rule)


@triton.jit
def clip(kept_ptr, row_ptr, SIZE: tl.constexpr):
    """What SIZE gradients are multiplied by, so that their norm is MAX_NORM at most; NaN if one is NaN."""
    BLOCK: tl.constexpr = fitted(MOST_FLAT, SIZE)
    squares = tl.zeros((BLOCK,), kept_ptr.dtype.element_ty)
    for first in range(0, SIZE, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        g = tl.load(kept_ptr + offs, mask=offs < SIZE, other=0.0)
        squares += g * g
    factor = quotient(tl.load(row_ptr + MAX_NORM), tl.sqrt(tl.sum(squares)) + 1e-6)
    return tl.where(factor > 1.0, 1.0, factor)


@triton.jit
def step_on_flat(parameters, PARAMETER: tl.constexpr, factor, row_ptr, STEP: tl.constexpr):
    """The optimizer's step on all elements of a parameter, whose kept gradients are multiplied by `factor`."""
    RULE: tl.constexpr = STEP.rule
    SIZE: tl.constexpr = elements(PARAMETER, STEP.sizes, STEP.biases)
    BLOCK: tl.constexpr = fitted(MOST_FLAT, SIZE)
    numbers = numbers_of(row_ptr + PARAMETER * ROW, RULE)
    g_ptr = parameters[2] + gradient_at(PARAMETER, STEP.sizes, STEP.biases)
    for first in tl.range(0, SIZE, BLOCK, num_stages=1):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < SIZE
        g = tl.load(g_ptr + offs, mask=mask, other=0.0) * factor
        update(ptrs_of(parameters, PARAMETER), offs, mask, g, numbers, RULE)


@triton.jit
def step_on_all(parameters, row_ptr, STEP: tl.constexpr):
    """The optimizer's step on all parameters, whose kept gradients it clips as torch.nn.utils.clip_grad_norm_ does."""
    PARAMETERS: tl.constexpr = 2 * len(STEP.biases)
    tl.debug_barrier()  # all gradients are there, and the parameters were read
    factor = clip(parameters[2], row_ptr, gradient_at(PARAMETERS, STEP.sizes, STEP.biases))
    for parameter in tl.static_range(PARAMETERS):
        step_on_flat(parameters, parameter, factor, row_ptr, STEP)
