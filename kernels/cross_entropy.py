"""Cross entropy of logits and class indices, with its gradient from the same read of the logits.

For row x with label t, maximum m, and q the label's distribution, 1 - s at t plus s / C everywhere (s is the
label smoothing):

    loss = log Σ_c exp(x_c - m)  -  Σ_c q_c (x_c - m)          gradient = softmax(x) - q

The maximum is subtracted before the label's logit is: the form logsumexp(x) - x_t cancels at large logits. Rows
that fit on chip are read once and their gradient is written once; longer rows are read twice. A label out of
range makes the loss and the gradient of its row NaN and is never used as an offset.

Shapes: logits [M, C], labels [M]. Sums run in float32, in float64 for float64, in a fixed order.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch, LaunchConfig, cdiv, launch, plan
from .numerics import load, store, sum_dtype


@triton.jit(do_not_specialize=["M", "ignore_index", "program_rows"])
def count_labels_kernel(target_ptr, count_ptr, M, stride_t, ignore_index, program_rows, BLOCK_M: tl.constexpr):
    """count[program] = how many of the program's `program_rows` labels are not `ignore_index`."""
    first = tl.program_id(0).to(tl.int64) * program_rows
    offs = first + tl.arange(0, BLOCK_M)
    last = tl.minimum(M, first + program_rows)
    count = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for row in range(0, program_rows, BLOCK_M):
        mask = offs + row < last
        target = tl.load(target_ptr + (offs + row) * stride_t, mask=mask, other=0)
        count += (mask & (target != ignore_index)).to(tl.int32)
    tl.store(count_ptr + tl.program_id(0), tl.sum(count))


@triton.jit
def count_valid(count_ptr, counts, MOST_COUNTS: tl.constexpr):
    """The number of labels that are not ignored: the sum of what count_labels_kernel left."""
    offs = tl.arange(0, MOST_COUNTS)
    return tl.sum(tl.load(count_ptr + offs, mask=offs < counts, other=0))


@triton.jit
def finish_losses(loss, valid, in_range):
    """Ignored rows lose 0, rows with a label out of range NaN."""
    return tl.where(valid, tl.where(in_range, loss, float("nan")), 0.0)


@triton.jit
def finish_gradient(p, is_target, scale, valid, in_range, C, SMOOTHING: tl.constexpr):
    """(softmax - q) scaled; 0 in ignored rows, NaN in rows with a label out of range. Rows are axis 0."""
    gradient = tl.where(is_target, p - (1.0 - SMOOTHING), p)
    if SMOOTHING > 0:
        gradient -= SMOOTHING / tl.cast(C, p.dtype)
    gradient = tl.where(in_range, gradient * scale, float("nan"))
    return tl.where(valid, gradient, 0.0)


@triton.jit(do_not_specialize=["M", "ignore_index", "counts"])
def cross_entropy_kernel(
    x_ptr, target_ptr, loss_ptr, grad_ptr, count_ptr, M, C, stride_xm, stride_xc, stride_t, ignore_index, counts,
    REDUCTION: tl.constexpr, ONE_PROGRAM: tl.constexpr, NEEDS_GRAD: tl.constexpr, SMOOTHING: tl.constexpr,
    MOST_COUNTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Losses and gradient of BLOCK_M rows, each whole on chip: BLOCK_C >= C.

    With a reduction loss_ptr takes one sum a program, or the result itself where one program has the batch.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_c < C)[None, :]

    target = tl.load(target_ptr + offs_m * stride_t, mask=mask_m, other=0).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_c.to(tl.int64)[None, :] * stride_xc
    x = load(x_ptrs, mask, other=float("-inf")).to(sum_dtype(x_ptr.dtype.element_ty))
    valid = mask_m & (target != ignore_index)
    in_range = (target >= 0) & (target < C)
    is_target = offs_c[None, :] == target[:, None]

    shifted = x - tl.max(x, axis=1)[:, None]
    exps = tl.exp(shifted)
    total = tl.sum(exps, axis=1)
    loss = tl.log(total) - (1.0 - SMOOTHING) * tl.sum(tl.where(is_target, shifted, 0.0), axis=1)
    if SMOOTHING > 0:
        loss -= SMOOTHING / tl.cast(C, x.dtype) * tl.sum(tl.where(mask, shifted, 0.0), axis=1)
    loss = finish_losses(loss, valid, in_range)

    scale = tl.full((), 1.0, x.dtype)
    if REDUCTION == "mean":
        count = tl.sum(valid.to(tl.int32)) if ONE_PROGRAM else count_valid(count_ptr, counts, MOST_COUNTS)
        scale /= count.to(x.dtype)
    if REDUCTION == "none":
        store(loss_ptr + offs_m, loss, mask_m)
    elif ONE_PROGRAM:
        store(loss_ptr, tl.sum(loss) * scale, True)
    else:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss))
    if NEEDS_GRAD:
        p = exps / total[:, None]
        grad = finish_gradient(p, is_target, scale, valid[:, None], in_range[:, None], C, SMOOTHING)
        store(grad_ptr + offs_m[:, None] * C + offs_c[None, :], grad, mask)


@triton.jit(do_not_specialize=["M", "ignore_index", "counts"])
def cross_entropy_long_kernel(
    x_ptr, target_ptr, loss_ptr, grad_ptr, count_ptr, M, C, stride_xm, stride_xc, stride_t, ignore_index, counts,
    REDUCTION: tl.constexpr, NEEDS_GRAD: tl.constexpr, SMOOTHING: tl.constexpr,
    MOST_COUNTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one row longer than BLOCK_C, the sum taken online; the row is read twice for a gradient.

    Each lane of a block keeps a sum of its own under one running maximum and the lanes are added last, pairwise.
    """
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = sum_dtype(x_ptr.dtype.element_ty)
    target = tl.load(target_ptr + row * stride_t).to(tl.int64)
    valid = target != ignore_index
    in_range = (target >= 0) & (target < C)
    x_row = x_ptr + row * stride_xm
    offs_c = tl.arange(0, BLOCK_C)

    m = tl.full((), float("-inf"), dtype)
    base = tl.zeros((), dtype)  # what is subtracted: the maximum, or 0 while that is -inf
    totals = tl.zeros((BLOCK_C,), dtype)
    spreads = tl.zeros((BLOCK_C,), dtype)
    for c in range(0, C, BLOCK_C):
        mask = offs_c < C - c
        x = load(x_row + (offs_c + c).to(tl.int64) * stride_xc, mask, other=float("-inf")).to(dtype)
        new_m = tl.maximum(m, tl.max(x))
        new_base = tl.where(new_m == float("-inf"), 0.0, new_m)
        totals = totals * tl.exp(m - new_base) + tl.exp(x - new_base)
        if SMOOTHING > 0:
            spreads += (c // BLOCK_C) * (base - new_base) + tl.where(mask, x - new_base, 0.0)
        m, base = new_m, new_base
    total = tl.sum(totals)

    x_target = load(x_row + target * stride_xc, in_range).to(dtype)
    loss = tl.log(total) - (1.0 - SMOOTHING) * (x_target - m)
    if SMOOTHING > 0:
        loss -= SMOOTHING / tl.cast(C, dtype) * tl.sum(spreads)
    store(loss_ptr + row, finish_losses(loss, valid, in_range), True)

    if NEEDS_GRAD:
        scale = tl.full((), 1.0, dtype)
        if REDUCTION == "mean":
            scale /= count_valid(count_ptr, counts, MOST_COUNTS).to(dtype)
        for c in range(0, C, BLOCK_C):
            mask = offs_c < C - c
            x = load(x_row + (offs_c + c).to(tl.int64) * stride_xc, mask, other=float("-inf")).to(dtype)
            p = tl.exp(x - m) / total
            grad = finish_gradient(p, offs_c + c == target, scale, valid, in_range, C, SMOOTHING)
            store(grad_ptr + row * C + c + offs_c, grad, mask)


@triton.jit(do_not_specialize=["partials", "counts"])
def sum_losses_kernel(
    partial_ptr, count_ptr, loss_ptr, partials, counts,
    REDUCTION: tl.constexpr, MOST_COUNTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sum of `partials` partial losses, divided by the number of labels for the mean; one program."""
    offs = tl.arange(0, BLOCK_M)
    sums = tl.zeros((BLOCK_M,), partial_ptr.dtype.element_ty)
    for first in range(0, partials, BLOCK_M):
        sums += tl.load(partial_ptr + first + offs, mask=offs < partials - first, other=0.0)
    loss = tl.sum(sums)
    if REDUCTION == "mean":
        loss /= count_valid(count_ptr, counts, MOST_COUNTS).to(loss.dtype)
    store(loss_ptr, loss, True)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def scale_gradient_kernel(
    grad_ptr, dloss_ptr, target_ptr, out_ptr, M, C, stride_dloss, stride_t, ignore_index,
    IN_PLACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = grad · dloss, row by row; ignored rows stay 0 whatever dloss is.

    In place, a program whose dloss are all 1 has nothing to do and touches no gradient.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    offs_m = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = (tl.program_id(0) % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    dloss = load(dloss_ptr + offs_m * stride_dloss, mask_m, other=1.0)
    target = tl.load(target_ptr + offs_m * stride_t, mask=mask_m, other=0)

    mask = mask_m[:, None] & (offs_c < C)[None, :]
    if IN_PLACE:
        mask = mask & (tl.sum((dloss != 1.0).to(tl.int32)) > 0)
    offs = offs_m[:, None] * C + offs_c[None, :]
    dtype: tl.constexpr = sum_dtype(grad_ptr.dtype.element_ty)
    grad = load(grad_ptr + offs, mask).to(dtype) * dloss.to(dtype)[:, None]
    store(out_ptr + offs, tl.where((target != ignore_index)[:, None], grad, 0.0), mask)


MOST_COUNTS = 128
"""The labels are counted by at most this many programs. Unmeasured."""

CONFIGS = {
    # num_warps for each (block_m, block_n): the rows of a program and the classes, a power of two, that it holds.
    # For every architecture; all unmeasured: the largest tiles that do not spill (`make resources`).
    "float": {
        (1024, 1): 4, (1024, 2): 4, (1024, 4): 4, (512, 8): 4, (256, 16): 4, (128, 32): 4, (64, 64): 4,
        (32, 128): 4, (16, 256): 4, (8, 512): 4, (4, 1024): 4, (2, 2048): 4, (1, 4096): 4, (1, 8192): 8,
        (1, 16384): 8, (1, 32768): 16,
    },
    "double": {
        (512, 1): 4, (512, 2): 4, (512, 4): 4, (256, 8): 4, (128, 16): 4, (64, 32): 4, (32, 64): 4,
        (16, 128): 4, (8, 256): 4, (4, 512): 4, (2, 1024): 4, (1, 2048): 4, (1, 4096): 8, (1, 8192): 16,
    },
}  # fmt: skip

LONG_CONFIGS = {"float": LaunchConfig(1, 8192, num_warps=8), "double": LaunchConfig(1, 4096, num_warps=8)}
"""For rows with more classes than `CONFIGS` holds. Unmeasured."""

COUNT_CONFIG = SUM_CONFIG = LaunchConfig(1024, 1, num_warps=4)
"""Unmeasured, as all of them."""


def choose(classes: int, dtype: torch.dtype) -> tuple[LaunchConfig, bool]:
    """The configuration for rows of `classes` logits, and whether a program holds its rows whole on chip."""
    kind = "double" if dtype == torch.float64 else "float"
    for (block_m, block_n), num_warps in CONFIGS[kind].items():
        if classes <= block_n:
            return LaunchConfig(block_m, block_n, num_warps=num_warps), True
    return LONG_CONFIGS[kind], False


@lru_cache(maxsize=4096)
def plan_forward(
    m: int, c: int, dtype: torch.dtype, reduction: str, label_smoothing: float, needs_grad: bool
) -> tuple[Launch | None, Launch, Launch | None, bool]:
    """The launches of a forward: the count of the labels, the rows and the sum; and whether rows fit on chip.

    One program that has the whole batch counts and adds for itself, and without a reduction there is no need to.
    """
    config, on_chip = choose(c, dtype)
    programs = cdiv(m, config.block_m)
    alone = on_chip and programs == 1
    shared = {"REDUCTION": reduction, "MOST_COUNTS": MOST_COUNTS}
    flags = {"NEEDS_GRAD": needs_grad, "SMOOTHING": label_smoothing, "BLOCK_C": config.block_n}
    if on_chip:
        flags |= {"ONE_PROGRAM": alone, "BLOCK_M": config.block_m}
    rows = plan(programs, config, **shared, **flags)
    count = total = None
    if reduction == "mean" and not alone:
        count = plan(min(MOST_COUNTS, cdiv(m, COUNT_CONFIG.block_m)), COUNT_CONFIG, BLOCK_M=COUNT_CONFIG.block_m)
    if reduction != "none" and not alone:
        total = plan(1, SUM_CONFIG, **shared, BLOCK_M=SUM_CONFIG.block_m)
    return count, rows, total, on_chip


def cross_entropy_forward(
    x: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of logits x [M, C] and labels [M], any strides.

    The loss is [M] for the reduction "none", else 0-d, in x's dtype. The gradient, of the sum of the losses, is
    [M, C], contiguous; without `needs_grad` it has no elements and is not computed.
    """
    m, c = x.shape
    loss = x.new_empty((m,) if reduction == "none" else ())
    grad = x.new_empty((m, c) if needs_grad else (0,))
    if m == 0:
        return (loss if reduction == "none" else loss.fill_(float("nan") if reduction == "mean" else 0.0)), grad
    count_plan, rows_plan, sum_plan, on_chip = plan_forward(m, c, x.dtype, reduction, label_smoothing, needs_grad)
    (stride_t,) = target.stride()
    count, counts = target, 0
    if count_plan:
        counts = count_plan.grid[0]
        count = target.new_empty(counts, dtype=torch.int32)
        launch(count_labels_kernel, count_plan, target, count, m, stride_t, ignore_index, cdiv(m, counts))
    programs, sums = rows_plan.grid[0], torch.float64 if x.dtype == torch.float64 else torch.float32
    losses = x.new_empty(programs, dtype=sums) if sum_plan else loss
    kernel = cross_entropy_kernel if on_chip else cross_entropy_long_kernel
    arguments = (m, c, *x.stride(), stride_t, ignore_index, counts)
    launch(kernel, rows_plan, x, target, losses, grad, count, *arguments)
    if sum_plan:
        launch(sum_losses_kernel, sum_plan, losses, count, loss, programs, counts)
    return loss, grad


def scale_gradient(
    dloss: torch.Tensor, grad: torch.Tensor, target: torch.Tensor, ignore_index: int, in_place: bool
) -> torch.Tensor:
    """dloss · grad for dloss 0-d or [M], any stride, and grad [M, C], contiguous; in `grad` itself if `in_place`."""
    m, c = grad.shape
    out = grad if in_place else torch.empty_like(grad)
    if m and c:
        config, _ = choose(c, grad.dtype)
        block_m = max(1, config.block_m // 2)  # a full tile spills on sm_100
        programs = cdiv(m, block_m) * cdiv(c, config.block_n)
        blocks = {"BLOCK_M": block_m, "BLOCK_C": config.block_n}
        strides = (dloss.stride(0) if dloss.dim() else 0, target.stride(0))
        arguments = (grad, dloss, target, out, m, c, *strides, ignore_index)
        launch(scale_gradient_kernel, plan(programs, config, IN_PLACE=in_place, **blocks), *arguments)
    return out
