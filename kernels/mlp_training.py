"""Whole training steps of Linear, ReLU, Linear with cross entropy, as many as asked, by one program in one launch.

    h = relu(x W1ᵀ + b1)        y = h W2ᵀ + b2           loss = cross entropy of y
    dW2 = dyᵀ h                 db2 = Σ dy               dh = dy W2 where not (h <= 0)
    dW1 = dhᵀ x                 db1 = Σ dh               then the optimizer's step (adam.py) on each

A step gathers its rows of x through the order of the epoch. Tiles of the batch (BLOCK_B), of the hidden units (BLOCK_H)
and of the inputs (BLOCK_I) are what is held in registers; all outputs are one tile (BLOCK_O). Parameters and the state
of the optimizer lie in global memory, from where a small net never leaves the L1 cache of the one SM and a larger one
streams from L2: held in registers they spill, at 64-128-10 even where they fit. What a step hands from one part to
the next (h, in whose place dh comes, and dy) lies beside them. Nothing is added up in an order that could change, so
the bits repeat.

One program has several threads, and each barrier below stands between a store and a load of the same memory by others.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .adam import ROW, update
from .cross_entropy import float_bits
from .cross_entropy_kernels import (
    finish_gradient,
    finish_losses,
    load_labels,
    load_masses,
    softmax_losses,
    split_smoothing,
)
from .launch import Launch, LaunchConfig, launch, plan
from .linear import precision_of


@triton.jit
def hidden_tile(
    x_ptr, w_ptr, b_ptr, rows, mask_b, offs_h, strides,
    I: tl.constexpr, H: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """relu(x W1ᵀ + b1) of some rows of x and the hidden units `offs_h`: [BLOCK_B, BLOCK_H]."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    z = tl.zeros((BLOCK_B, BLOCK_H), dtype)
    for i in range(0, I, BLOCK_I):
        offs_i = i + tl.arange(0, BLOCK_I)
        x_ptrs = x_ptr + (rows * strides[0])[:, None] + (offs_i.to(tl.int64) * strides[1])[None, :]
        x = tl.load(x_ptrs, mask=mask_b[:, None] & (offs_i < I)[None, :], other=0.0)
        w_ptrs = w_ptr + offs_h[None, :] * I + offs_i[:, None]
        w = tl.load(w_ptrs, mask=(offs_h < H)[None, :] & (offs_i < I)[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision=PRECISION, out_dtype=dtype)
    if HAS_BIAS:
        z += tl.load(b_ptr + offs_h, mask=offs_h < H, other=0.0)[None, :]
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def loss_tile(
    y, target_ptr, class_weight_ptr, rows, mask_b, offs_o, stride, ignore_index, smoothing,
    O: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Of logits y [BLOCK_B, BLOCK_O]: losses, weights of the rows, dy of their sum, rows that count, and are right."""
    dtype: tl.constexpr = y.dtype
    MASSES: tl.constexpr = WEIGHTED and SMOOTHED
    mask_o = offs_o < O
    mask = mask_b[:, None] & mask_o[None, :]
    label, weight, valid, in_range = load_labels(
        target_ptr, class_weight_ptr, rows, mask_b, O, 1, (stride, 0, 0), ignore_index, False, WEIGHTED, dtype
    )
    kept, share = split_smoothing(weight, smoothing, O, SMOOTHED)
    a, mass = y, weight
    if MASSES:
        a = load_masses(
            target_ptr, class_weight_ptr, label, kept, share, smoothing, offs_o, mask, O, False, WEIGHTED, SMOOTHED
        )
        mass = tl.sum(a, axis=1)

    y = tl.where(mask_o[None, :], y, float("-inf"))
    _, exps, total_exp, loss = softmax_losses(y, a, mass, label, kept, share, offs_o, mask, MASSES, SMOOTHED)
    p = exps / total_exp[:, None]
    dy = finish_gradient(p, a, mass, label, kept, share, offs_o, 1.0, valid, in_range, MASSES)
    largest = tl.argmax(tl.where(y == y, y, float("inf")), axis=1)  # the first of several; NaN is the largest
    return finish_losses(loss, valid, in_range), weight, tl.where(mask, dy, 0.0), valid, valid & (largest == label)


@triton.jit
def forward_tile(
    x_ptr, target_ptr, class_weight_ptr, weights, buffers, rows, offs_b, mask_b, strides, ignore_index, smoothing,
    I: tl.constexpr, H: tl.constexpr, O: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Forward of a tile of the batch. Leaves h and dy, which is not yet divided for the mean; returns the sums of it.

    They are of the losses, of the rows' weights, of dy, of the rows that count and of those that are right.
    """
    w1_ptr, b1_ptr, w2_ptr, b2_ptr = weights
    h_ptr, dy_ptr, _, _ = buffers
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    offs_o = tl.arange(0, BLOCK_O)
    mask_o = offs_o < O
    y = tl.zeros((BLOCK_B, BLOCK_O), dtype)
    for j in range(0, H, BLOCK_H):
        offs_h = j + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        h = hidden_tile(
            x_ptr, w1_ptr, b1_ptr, rows, mask_b, offs_h, strides, I, H, HAS_B1, PRECISION, BLOCK_B, BLOCK_H, BLOCK_I
        )
        tl.store(h_ptr + offs_b[:, None] * H + offs_h[None, :], h, mask=mask_b[:, None] & mask_h[None, :])
        w2 = tl.load(w2_ptr + offs_o[None, :] * H + offs_h[:, None], mask=mask_o[None, :] & mask_h[:, None], other=0.0)
        y = tl.dot(h, w2, y, input_precision=PRECISION, out_dtype=dtype)
    if HAS_B2:
        y += tl.load(b2_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    loss, weight, dy, valid, right = loss_tile(
        y, target_ptr, class_weight_ptr, rows, mask_b, offs_o, strides[2], ignore_index, smoothing,
        O, WEIGHTED, SMOOTHED,
    )  # fmt: skip
    tl.store(dy_ptr + offs_b[:, None] * BLOCK_O + offs_o[None, :], dy, mask=mask_b[:, None])
    counted, rights = tl.sum(valid.to(dtype)), tl.sum(right.to(dtype))
    return tl.sum(loss), tl.sum(weight), tl.sum(dy, axis=0), counted, rights


@triton.jit
def backward_output(
    weights, firsts, seconds, row_ptr, h_ptr, dy_ptr, offs_h, size, scale,
    H: tl.constexpr, O: tl.constexpr, HAS_B1: tl.constexpr,
    RULE: tl.constexpr, COUPLED: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Step on the columns `offs_h` of W2 and on b1; leaves dh in the place of h."""
    dtype: tl.constexpr = weights[2].dtype.element_ty
    offs_o = tl.arange(0, BLOCK_O)
    mask_o, mask_h = offs_o < O, offs_h < H
    offs_w, mask_w = offs_o[:, None] * H + offs_h[None, :], mask_o[:, None] & mask_h[None, :]
    w2 = tl.load(weights[2] + offs_w, mask=mask_w, other=0.0)
    dw2 = tl.zeros((BLOCK_O, BLOCK_H), dtype)
    db1 = tl.zeros((BLOCK_H,), dtype)
    for b in range(0, BLOCK_B if ONE_TILE else size, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < size
        dy = tl.load(dy_ptr + offs_b[:, None] * BLOCK_O + offs_o[None, :], mask=mask_b[:, None], other=0.0) * scale
        h_ptrs, mask = h_ptr + offs_b[:, None] * H + offs_h[None, :], mask_b[:, None] & mask_h[None, :]
        h = tl.load(h_ptrs, mask=mask, other=0.0)
        dw2 = tl.dot(tl.trans(dy), h, dw2, input_precision=PRECISION, out_dtype=dtype)
        dh = tl.where(h <= 0, 0.0, tl.dot(dy, w2, input_precision=PRECISION, out_dtype=dtype))
        db1 += tl.sum(dh, axis=0)
        tl.store(h_ptrs, dh, mask=mask)
    tl.debug_barrier()  # dh is there, and W2 was read
    update(
        weights[2], firsts[2], seconds[2], offs_w, mask_w, dw2, row_ptr + 2 * ROW, RULE, COUPLED, DECOUPLED, MAXIMIZE
    )
    if HAS_B1:
        update(
            weights[1], firsts[1], seconds[1], offs_h, mask_h, db1, row_ptr + ROW, RULE, COUPLED, DECOUPLED, MAXIMIZE
        )


@triton.jit
def backward_input(
    x_ptr, order_ptr, w_ptr, m_ptr, v_ptr, row_ptr, dh_ptr, offs_h, size, strides,
    I: tl.constexpr, H: tl.constexpr,
    RULE: tl.constexpr, COUPLED: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Step on the rows `offs_h` of W1."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    mask_h = offs_h < H
    for i in range(0, I, BLOCK_I):
        offs_i = i + tl.arange(0, BLOCK_I)
        mask_i = offs_i < I
        dw = tl.zeros((BLOCK_H, BLOCK_I), dtype)
        for b in range(0, BLOCK_B if ONE_TILE else size, BLOCK_B):
            offs_b = b + tl.arange(0, BLOCK_B)
            mask_b = offs_b < size
            rows = tl.load(order_ptr + offs_b, mask=mask_b, other=0)
            x_ptrs = x_ptr + (rows * strides[0])[:, None] + (offs_i.to(tl.int64) * strides[1])[None, :]
            x = tl.load(x_ptrs, mask=mask_b[:, None] & mask_i[None, :], other=0.0)
            dh_ptrs = dh_ptr + offs_b[None, :] * H + offs_h[:, None]
            dh = tl.load(dh_ptrs, mask=mask_b[None, :] & mask_h[:, None], other=0.0)
            dw = tl.dot(dh, x, dw, input_precision=PRECISION, out_dtype=dtype)
        offs_w, mask_w = offs_h[:, None] * I + offs_i[None, :], mask_h[:, None] & mask_i[None, :]
        update(w_ptr, m_ptr, v_ptr, offs_w, mask_w, dw, row_ptr, RULE, COUPLED, DECOUPLED, MAXIMIZE)


@triton.jit(do_not_specialize=["epoch_rows", "batch_size", "position", "steps", "ignore_index", "smoothing"])
def mlp_training_kernel(
    x_ptr, target_ptr, order_ptr, class_weight_ptr, weights, firsts, seconds, table_ptr, buffers, strides,
    epoch_rows, batch_size, position, steps, ignore_index, smoothing,
    I: tl.constexpr, H: tl.constexpr, O: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    MEAN: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, ACCURACY: tl.constexpr,
    RULE: tl.constexpr, COUPLED: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """`steps` steps, the first one `position` rows into an epoch of `epoch_rows`. One program.

    weights, firsts and seconds are W1, b1, W2, b2 and the state of each; buffers h, dy, the losses and the accuracies;
    strides those of x and of the target. The table has a row for each step and parameter.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_o = tl.arange(0, BLOCK_O)
    for step in tl.range(steps, num_stages=1):  # no load may come before a store of the step before
        size = tl.minimum(batch_size, epoch_rows - position)
        zero = tl.full((), 0, dtype)
        loss, weight, counted, right = zero, zero, zero, zero
        db2 = tl.zeros((BLOCK_O,), dtype)
        for b in range(0, BLOCK_B if ONE_TILE else size, BLOCK_B):
            offs_b = b + tl.arange(0, BLOCK_B)
            mask_b = offs_b < size
            rows = tl.load(order_ptr + offs_b, mask=mask_b, other=0)
            loss_b, weight_b, db2_b, counted_b, right_b = forward_tile(
                x_ptr, target_ptr, class_weight_ptr, weights, buffers, rows, offs_b, mask_b, strides,
                ignore_index, smoothing, I, H, O, HAS_B1, HAS_B2, WEIGHTED, SMOOTHED, PRECISION,
                BLOCK_B, BLOCK_H, BLOCK_I, BLOCK_O,
            )  # fmt: skip
            loss, weight, db2, counted, right = (
                loss + loss_b, weight + weight_b, db2 + db2_b, counted + counted_b, right + right_b
            )  # fmt: skip
        tl.store(buffers[2] + step, loss / weight if MEAN else loss)
        if ACCURACY:
            tl.store(buffers[3] + step, right / counted)
        scale = tl.where(counted > 0, 1.0 / weight, 1.0) if MEAN else tl.full((), 1.0, dtype)  # no rows: no gradient
        row_ptr = table_ptr + step * (4 * ROW)
        tl.debug_barrier()  # h and dy are there

        for j in tl.range(0, H, BLOCK_H, num_stages=1):
            offs_h = j + tl.arange(0, BLOCK_H)
            backward_output(
                weights, firsts, seconds, row_ptr, buffers[0], buffers[1], offs_h, size, scale, H, O, HAS_B1,
                RULE, COUPLED, DECOUPLED, MAXIMIZE, PRECISION, ONE_TILE, BLOCK_B, BLOCK_H, BLOCK_O,
            )  # fmt: skip
            backward_input(
                x_ptr, order_ptr, weights[0], firsts[0], seconds[0], row_ptr, buffers[0], offs_h, size, strides, I, H,
                RULE, COUPLED, DECOUPLED, MAXIMIZE, PRECISION, ONE_TILE, BLOCK_B, BLOCK_H, BLOCK_I,
            )  # fmt: skip
        if HAS_B2:
            update(
                weights[3], firsts[3], seconds[3], offs_o, offs_o < O, db2 * scale, row_ptr + 3 * ROW,
                RULE, COUPLED, DECOUPLED, MAXIMIZE,
            )  # fmt: skip
        order_ptr += size
        position = tl.where(position + size >= epoch_rows, 0, position + size)
        tl.debug_barrier()  # the parameters are there


CONFIGS = {
    # Of each architecture and precision, rows (most rows of a batch, most inputs, configuration), the first that holds:
    # (block_b, block_h, block_i, num_warps, num_stages) with the largest tiles of the batch, hidden units and inputs.
    # Unmeasured but for sm_90: chosen for the fewest instructions a step that spill at most 32 bytes.
    # On an H100 (bench/results), us a step of the row and of the best of the sweep: 64-128-10 at batch 32, TF32 12.3,
    # and 12.2, exact 24.9; at 256, TF32 90 and 79, in tiles that spill where the hidden units are 64; 784-128-10 at
    # 128, TF32 253 and exact 891, both the best.
    ("sm_90", "tf32"): (
        (32, None, (32, 128, 64, 8, 2)), (None, 64, (64, 32, 64, 8, 1)), (None, None, (64, 64, 64, 8, 1)),
    ),
    ("sm_100", "tf32"): ((32, None, (32, 128, 64, 8, 1)), (None, None, (64, 64, 64, 8, 1))),
    ("sm_80", "tf32"): ((32, None, (32, 64, 64, 8, 1)), (None, None, (64, 64, 64, 8, 1))),
    ("sm_90", "ieee"): ((None, None, (32, 64, 64, 8, 1)),),
    ("sm_100", "ieee"): ((None, None, (32, 64, 64, 8, 1)),),
    ("sm_80", "ieee"): ((None, None, (32, 64, 64, 8, 1)),),
    ("other", "ieee"): ((None, None, (32, 64, 64, 4, 1)),),
    ("sm_90", "fp64"): ((None, None, (16, 32, 32, 8, 1)),),
    ("sm_100", "fp64"): ((None, None, (16, 32, 32, 8, 1)),),
    ("sm_80", "fp64"): ((None, None, (16, 32, 32, 8, 1)),),
    ("other", "fp64"): ((None, None, (16, 32, 32, 4, 1)),),
}  # fmt: skip

MOST_WEIGHTS = 2048
"""Elements of a tile of W2."""

MOST_REGISTERS = 255
"""ptxas may give each thread of an NVIDIA GPU so many. Left alone it keeps to half of them, for a second program that
there is not, and spills; or falls off its cliff (see `bench/resources.py`)."""

REGISTERS = 65536
"""What a multiprocessor of an NVIDIA GPU has for all threads of a program."""

SMALLEST = 16
"""tl.dot takes no tile with fewer rows or columns."""


class Sizes(NamedTuple):
    """Rows of a batch, inputs, hidden units, outputs."""

    batch: int
    inputs: int
    hidden: int
    outputs: int


class Options(NamedTuple):
    """What else a step computes, as the kernel's compile-time flags are called."""

    mean: bool
    weighted: bool
    smoothed: bool
    accuracy: bool
    rule: str
    coupled: bool
    decoupled: bool
    maximize: bool


def choose(sizes: Sizes, architecture: str, precision: str) -> tuple[int, ...]:
    """The row of the table."""
    for most_batch, most_inputs, config in CONFIGS[architecture, precision]:
        if (most_batch is None or sizes.batch <= most_batch) and (most_inputs is None or sizes.inputs <= most_inputs):
            return config
    raise AssertionError("the last row holds every size")


def tiles(config: tuple[int, ...], sizes: Sizes) -> tuple[int, int, int, int]:
    """Rows of the batch, hidden units, inputs and outputs of a tile: no more than the configuration's, or there are."""
    pairs = zip(config[:3], (sizes.batch, sizes.hidden, sizes.inputs), strict=True)
    block_b, block_h, block_i = (min(most, block(size)) for most, size in pairs)
    block_o = block(sizes.outputs)
    return block_b, min(block_h, max(SMALLEST, MOST_WEIGHTS // block_o)), block_i, block_o


def architecture_of(x: torch.Tensor) -> str:
    """The architecture of the device of `x` as the table has them; "other" is AMD, Intel and the interpreter."""
    if not x.is_cuda or torch.version.hip:
        return "other"
    major, _ = torch.cuda.get_device_capability(x.device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # 12 too has the tensor cores of 8


@lru_cache(maxsize=4096)
def plan_training(
    sizes: Sizes, has_b1: bool, has_b2: bool, options: Options, architecture: str, dtype: torch.dtype, precision: str
) -> tuple[Launch, int]:
    """The launch of mlp_training_kernel, and how many columns its dy has."""
    config = choose(sizes, architecture, "fp64" if dtype == torch.float64 else precision)
    (block_b, block_h, block_i, block_o), (warps, stages) = tiles(config, sizes), config[3:]
    most_registers = None if architecture == "other" else min(MOST_REGISTERS, REGISTERS // (32 * warps))
    flags = {name.upper(): value for name, value in options._asdict().items()}
    launched = plan(
        1, LaunchConfig(block_b, block_h, block_i, warps, stages, most_registers),
        I=sizes.inputs, H=sizes.hidden, O=sizes.outputs, HAS_B1=has_b1, HAS_B2=has_b2, **flags, PRECISION=precision,
        ONE_TILE=sizes.batch <= block_b, BLOCK_B=block_b, BLOCK_H=block_h, BLOCK_I=block_i, BLOCK_O=block_o,
    )  # fmt: skip
    return launched, block_o


def block(size: int) -> int:
    """The tile that holds `size` rows or columns."""
    size = triton.next_power_of_2(size)
    return max(SMALLEST, size)


def train_mlp(
    x: torch.Tensor,
    targets: torch.Tensor,
    order: torch.Tensor,
    class_weight: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    firsts: Sequence[torch.Tensor | None],
    seconds: Sequence[torch.Tensor | None],
    table: torch.Tensor,
    options: Options,
    *,
    batch_size: int,
    position: int,
    epoch_rows: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a step for each row of `table` [steps, 4, ROW]; returns the losses and the accuracies, [steps] each.

    x [N, I] and targets [N], any strides; `order` has the rows of the steps one after the other, int64, and the first
    step lies `position` rows into its epoch of `epoch_rows`. W1 [H, I], b1 [H] or None, W2 [O, H], b2 [O] or None and
    the state of each are contiguous, of x's dtype, float32 or float64, and are written to. What the options do not ask
    for is not written.
    """
    w1, b1, w2, b2 = weights
    assert w1 is not None
    assert w2 is not None
    steps, (hidden, inputs), outputs = table.shape[0], w1.shape, w2.shape[0]
    batch = min(batch_size, max(1, epoch_rows))
    sizes = Sizes(batch, inputs, hidden, outputs)
    kind = (architecture_of(x), x.dtype, precision_of(x))
    planned, columns = plan_training(sizes, b1 is not None, b2 is not None, options, *kind)
    losses, accuracies = x.new_empty(steps), x.new_empty(steps if options.accuracy else 0)
    buffers = (x.new_empty(batch, hidden), x.new_empty(batch, columns), losses, accuracies)
    groups = [tuple(w1 if tensor is None else tensor for tensor in group) for group in (weights, firsts, seconds)]
    launch(
        mlp_training_kernel, planned, x, targets, order, x if class_weight is None else class_weight, *groups, table,
        buffers, (*x.stride(), *targets.stride()), epoch_rows, batch, position, steps, ignore_index,
        float_bits(label_smoothing),
    )  # fmt: skip
    return losses, accuracies
