"""The device side of cross entropy: losses of rows of logits, and their gradient from the same read.

A target gives class c of a row a mass a_c = w_c q_c, where w are the class weights and q is the smoothed target: with
smoothing s, q = (1 - s) t + s / C of the given probabilities t, or of 1 at the label and 0 elsewhere. With m the
maximum of a row x, p its softmax and A = Σ a_c:

    loss = A log Σ_c exp(x_c - m)  -  Σ_c a_c (x_c - m)          gradient = A p - a

The maximum is subtracted before anything else is: the form logsumexp(x) - x_t cancels at large logits. A label out of
range makes the loss and the gradient of its row NaN and is never used as an offset.

Logits are [B, C, D], classes in the middle, and row m is (b, d) = divmod(m, D); labels are [B, D], probabilities
[B, C, D]. A matrix [M, C] is the case D = 1. Strides come as tuples (of b, of the class, of d). Sums run in float32, in
float64 for float64, in a fixed order.
"""

import triton
import triton.language as tl

from .numerics import from_bits, load, store, sum_dtype


@triton.jit
def row_offsets(offs_m, D, strides):
    """Where the rows `offs_m` begin in a tensor with these strides."""
    return (offs_m // D) * strides[0] + (offs_m % D) * strides[2]


@triton.jit
def aligned(C, strides, ALIGN: tl.constexpr):
    """C and strides, of which the caller knows that C and the first are multiples of ALIGN: told so, loads are wide."""
    return C // ALIGN * ALIGN, (strides[0] // ALIGN * ALIGN, strides[1], strides[2])


@triton.jit
def load_labels(
    target_ptr, weight_ptr, offs_m, mask_m, C, D, strides, ignore_index,
    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Labels, their weights, which rows count and which labels are classes; rows that do not count weigh 0.

    With probabilities every row counts, and weighs 1.
    """
    if PROBABILITIES:
        return offs_m, mask_m.to(dtype), mask_m, mask_m
    label = tl.load(target_ptr + row_offsets(offs_m, D, strides), mask=mask_m, other=0).to(tl.int64)
    valid = mask_m & (label != ignore_index)
    in_range = (label >= 0) & (label < C)
    if WEIGHTED:
        return label, load(weight_ptr + label, valid & in_range).to(dtype), valid, in_range
    return label, valid.to(dtype), valid, in_range


@triton.jit
def split_smoothing(weight, smoothing, C, SMOOTHED: tl.constexpr):
    """How much of a row's weight its label keeps, and how much of 1 each class gets: w (1 - s) and s / C."""
    if SMOOTHED:
        s = from_bits(smoothing)
        return weight * (1.0 - s).to(weight.dtype), (s / C).to(weight.dtype)
    return weight, tl.full((), 0.0, weight.dtype)


@triton.jit
def load_masses(
    target_ptrs, weight_ptr, label, kept, share, smoothing, offs_c, mask, C,
    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """The masses a of the classes `offs_c` in each row: of probabilities, or of labels both weighted and smoothed."""
    t = load(target_ptrs, mask).to(kept.dtype) if PROBABILITIES else kept
    return masses_of(t, weight_ptr, label, kept, share, smoothing, offs_c, mask, C, PROBABILITIES, WEIGHTED, SMOOTHED)


@triton.jit
def masses_of(
    t, weight_ptr, label, kept, share, smoothing, offs_c, mask, C,
    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """The same of probabilities t; of labels t is not read."""
    if PROBABILITIES:
        a = t
        if SMOOTHED:
            a = a * (1.0 - from_bits(smoothing)).to(a.dtype) + share
    else:
        a = tl.where(offs_c[None, :] == label[:, None], kept[:, None], 0.0)
    if WEIGHTED:
        weights = load(weight_ptr + offs_c, offs_c < C).to(a.dtype)[None, :]
        a = a * weights if PROBABILITIES else a + share * weights
    return tl.where(mask, a, 0.0)


@triton.jit
def reduce_losses(
    loss, weight, offs_m, M, loss_ptr, total_ptr, counts,
    REDUCTION: tl.constexpr, ONE_PROGRAM: tl.constexpr, COUNTED: tl.constexpr, MOST_COUNTS: tl.constexpr,
):  # fmt: skip
    """Store the losses, their sum or mean, or this program's part of it. Returns what the mean divides by.

    That is the weight of all rows: counted before by count_labels_kernel, or that of this program where it has the
    batch, or M, the number of rows, for probabilities. For the mean it is stored, or this program's part of it is.
    """
    total = tl.full((), 1.0, loss.dtype)
    if REDUCTION == "mean":
        if COUNTED:
            offs = tl.arange(0, MOST_COUNTS)
            total = tl.sum(tl.load(total_ptr + offs, mask=offs < counts, other=0.0))
        else:
            part = tl.sum(weight)
            tl.store(total_ptr + tl.program_id(0), part)
            total = part if ONE_PROGRAM else tl.cast(M, loss.dtype)
    if REDUCTION == "none":
        store(loss_ptr + offs_m, loss, offs_m < M)
    elif ONE_PROGRAM:
        store(loss_ptr, tl.sum(loss) / total, True)
    else:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss))
    return total


@triton.jit
def softmax_losses(x, a, mass, label, kept, share, offs_c, mask, MASSES: tl.constexpr, SMOOTHED: tl.constexpr):
    """Of whole rows: the logits below their maximum, their exponentials and the sum of those, and the losses."""
    shifted = x - tl.max(x, axis=1)[:, None]
    exps = tl.exp(shifted)
    total_exp = tl.sum(exps, axis=1)
    loss = mass * tl.log(total_exp)
    if MASSES:
        loss -= tl.sum(tl.where(mask, a * shifted, 0.0), axis=1)
    else:
        loss -= kept * tl.sum(tl.where(offs_c[None, :] == label[:, None], shifted, 0.0), axis=1)
    if SMOOTHED and not MASSES:
        loss -= share * tl.sum(tl.where(mask, shifted, 0.0), axis=1)
    return shifted, exps, total_exp, loss


@triton.jit
def finish_losses(loss, valid, in_range):
    """Ignored rows lose 0, rows with a label out of range NaN."""
    return tl.where(valid, tl.where(in_range, loss, float("nan")), 0.0)


@triton.jit
def finish_gradient(p, a, mass, label, kept, share, offs_c, scale, valid, in_range, MASSES: tl.constexpr):
    """(A p - a) scaled; 0 in ignored rows, NaN in rows with a label out of range. Without MASSES `a` is not read."""
    gradient = p * mass[:, None]
    if MASSES:
        gradient -= a
    else:
        gradient = tl.where(offs_c[None, :] == label[:, None], gradient - kept[:, None], gradient) - share
    return tl.where(valid[:, None], tl.where(in_range[:, None], gradient * scale, float("nan")), 0.0)


@triton.jit(do_not_specialize=["M", "program_rows", "ignore_index"])
def count_labels_kernel(
    target_ptr, weight_ptr, total_ptr, M, C, D, t_strides, program_rows, ignore_index,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """total[program] = the weight of the program's `program_rows` rows that are not ignored."""
    first = tl.program_id(0).to(tl.int64) * program_rows
    last = tl.minimum(M, first + program_rows)
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_M,), dtype)
    for row in range(0, program_rows, BLOCK_M):
        offs_m = first + row + tl.arange(0, BLOCK_M)
        _, weight, _, _ = load_labels(
            target_ptr, weight_ptr, offs_m, offs_m < last, C, D, t_strides, ignore_index, False, WEIGHTED, dtype
        )
        total += weight
    tl.store(total_ptr + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["M", "ignore_index", "smoothing", "counts"])
def cross_entropy_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, grad_ptr, log_p_ptr, total_ptr, M, C, D, x_strides, t_strides, g_strides,
    ignore_index, smoothing, counts,
    REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
    MASSES: tl.constexpr, NEEDS_GRAD: tl.constexpr, NEEDS_LOG_P: tl.constexpr, SCALED: tl.constexpr,
    COUNTED: tl.constexpr, ONE_PROGRAM: tl.constexpr, MOST_COUNTS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Losses, gradient and log softmax of BLOCK_M rows, each whole on chip: BLOCK_C >= C."""
    C, x_strides = aligned(C, x_strides, ALIGN)
    C, g_strides = aligned(C, g_strides, ALIGN)
    dtype: tl.constexpr = sum_dtype(x_ptr.dtype.element_ty)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_c < C)[None, :]

    steps = offs_c.to(tl.int64)[None, :]
    x_ptrs = x_ptr + row_offsets(offs_m, D, x_strides)[:, None] + steps * x_strides[1]
    x = load(x_ptrs, mask, other=float("-inf")).to(dtype)
    t_ptrs = target_ptr + row_offsets(offs_m, D, t_strides)[:, None] + steps * t_strides[1]
    label, weight, valid, in_range = load_labels(
        target_ptr, weight_ptr, offs_m, mask_m, C, D, t_strides, ignore_index, PROBABILITIES, WEIGHTED, dtype
    )
    kept, share = split_smoothing(weight, smoothing, C, SMOOTHED)
    a, mass = x, weight
    if MASSES:
        a = load_masses(
            t_ptrs, weight_ptr, label, kept, share, smoothing, offs_c, mask, C, PROBABILITIES, WEIGHTED, SMOOTHED
        )
        mass = tl.sum(a, axis=1)

    shifted, exps, total_exp, loss = softmax_losses(x, a, mass, label, kept, share, offs_c, mask, MASSES, SMOOTHED)
    loss = finish_losses(loss, valid, in_range)
    total = reduce_losses(
        loss, weight, offs_m, M, loss_ptr, total_ptr, counts, REDUCTION, ONE_PROGRAM, COUNTED, MOST_COUNTS
    )

    scale = 1.0 / total if SCALED else 1.0
    g_offs = row_offsets(offs_m, D, g_strides)[:, None] + steps * g_strides[1]
    if NEEDS_LOG_P:
        store(log_p_ptr + g_offs, shifted - tl.log(total_exp)[:, None], mask)
    if NEEDS_GRAD:
        p = exps / total_exp[:, None]
        grad = finish_gradient(p, a, mass, label, kept, share, offs_c, scale, valid, in_range, MASSES)
        store(grad_ptr + g_offs, grad, mask)


@triton.jit
def no_block(BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr):
    """What :func:`add_block` has of rows before their first block."""
    zero = tl.zeros((BLOCK_M,), dtype)
    return tl.full((BLOCK_M,), float("-inf"), dtype), zero, tl.zeros((BLOCK_M, BLOCK_C), dtype), zero, zero


@triton.jit
def add_block(sums, x, a, share, c, mask, MASSES: tl.constexpr, SMOOTHED: tl.constexpr):
    """The maximum m of rows and their other sums with a block more, from column c on; what is no logit is -inf.

    They are what is subtracted, m, or 0 while that is -inf; exponentials under it, each lane of a block for itself; the
    masses, where there are MASSES; and Σ a (x - base), without MASSES only of what smoothing gives to all classes.
    """
    m, base, totals, mass, spread = sums
    new_m = tl.maximum(m, tl.max(x, axis=1))
    new_base = tl.where(new_m == float("-inf"), 0.0, new_m)
    totals = totals * tl.exp(m - new_base)[:, None] + tl.exp(x - new_base[:, None])
    if MASSES:
        spread += mass * (base - new_base) + tl.sum(tl.where(mask, a * (x - new_base[:, None]), 0.0), axis=1)
        mass += tl.sum(a, axis=1)
    elif SMOOTHED:
        in_block = tl.sum(tl.where(mask, x - new_base[:, None], 0.0), axis=1)
        spread += c * share * (base - new_base) + share * in_block
    return new_m, new_base, totals, mass, spread


@triton.jit(do_not_specialize=["M", "ignore_index", "smoothing", "counts"])
def long_cross_entropy_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, statistics_ptr, total_ptr, M, C, D, x_strides, t_strides,
    ignore_index, smoothing,
    REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
    MASSES: tl.constexpr, NEEDS_GRAD: tl.constexpr, ONE_PROGRAM: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_M rows that are longer than BLOCK_C, and what long_cross_entropy_gradient_kernel needs of them.

    That is the maximum m, the sum of exp(x - m) and the mass A of each row: statistics [3, M]. Sums are taken online:
    each lane of a block keeps a sum of its own under one running maximum a row; the lanes are added last, pairwise.
    """
    C, x_strides = aligned(C, x_strides, ALIGN)
    dtype: tl.constexpr = sum_dtype(x_ptr.dtype.element_ty)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = x_ptr + row_offsets(offs_m, D, x_strides)[:, None]
    t_rows = target_ptr + row_offsets(offs_m, D, t_strides)[:, None]
    label, weight, valid, in_range = load_labels(
        target_ptr, weight_ptr, offs_m, mask_m, C, D, t_strides, ignore_index, PROBABILITIES, WEIGHTED, dtype
    )
    kept, share = split_smoothing(weight, smoothing, C, SMOOTHED)

    sums = no_block(BLOCK_M, BLOCK_C, dtype)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        steps = offs_c.to(tl.int64)[None, :]
        x = load(x_rows + steps * x_strides[1], mask, other=float("-inf")).to(dtype)
        a = x
        if MASSES:
            a = load_masses(
                t_rows + steps * t_strides[1], weight_ptr, label, kept, share, smoothing, offs_c, mask, C,
                PROBABILITIES, WEIGHTED, SMOOTHED,
            )  # fmt: skip
        sums = add_block(sums, x, a, share, c, mask, MASSES, SMOOTHED)
    m, _, totals, mass, spread = sums
    total_exp = tl.sum(totals, axis=1)

    if not MASSES:
        mass = weight
        x_label = load(x_rows + (label * x_strides[1])[:, None], (valid & in_range)[:, None]).to(dtype)
        spread += kept * (tl.sum(x_label, axis=1) - m)
    loss = finish_losses(mass * tl.log(total_exp) - spread, valid, in_range)
    reduce_losses(loss, weight, offs_m, M, loss_ptr, total_ptr, 0, REDUCTION, ONE_PROGRAM, False, 1)
    if NEEDS_GRAD:
        tl.store(statistics_ptr + offs_m, m, mask=mask_m)
        tl.store(statistics_ptr + offs_m + M, total_exp, mask=mask_m)
        tl.store(statistics_ptr + offs_m + 2 * M, mass, mask=mask_m)


@triton.jit(do_not_specialize=["M", "ignore_index", "smoothing"])
def long_cross_entropy_gradient_kernel(
    x_ptr, target_ptr, weight_ptr, statistics_ptr, dloss_ptr, total_ptr, grad_ptrs, M, C, D,
    x_strides, t_strides, dloss_strides, g_strides, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, MASSES: tl.constexpr,
    DIVIDED: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DQ: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = f (A p - a) and, for probabilities q, dq = -f w (1 - s) log p of a tile, with f = dloss, or dloss / total.

    `grad_ptrs` are dx and dq. Reads the statistics of long_cross_entropy_kernel; dx may be x.
    """
    C, x_strides = aligned(C, x_strides, ALIGN)
    C, g_strides = aligned(C, g_strides, ALIGN)
    dtype: tl.constexpr = sum_dtype(x_ptr.dtype.element_ty)
    tiles_c = tl.cdiv(C, BLOCK_C)
    offs_m = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    steps = offs_c.to(tl.int64)[None, :]
    g_offs = row_offsets(offs_m, D, g_strides)[:, None] + steps * g_strides[1]

    x = load(x_ptr + row_offsets(offs_m, D, x_strides)[:, None] + steps * x_strides[1], mask, other=float("-inf"))
    label, weight, valid, in_range = load_labels(
        target_ptr, weight_ptr, offs_m, mask_m, C, D, t_strides, ignore_index, PROBABILITIES, WEIGHTED, dtype
    )
    kept, share = split_smoothing(weight, smoothing, C, SMOOTHED)
    m = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)
    total_exp = tl.load(statistics_ptr + offs_m + M, mask=mask_m, other=1.0)
    factor = load(dloss_ptr + row_offsets(offs_m, D, dloss_strides), mask_m).to(dtype)
    if DIVIDED:
        factor /= tl.load(total_ptr)

    shifted = x.to(dtype) - m[:, None]
    if NEEDS_DX:
        a = shifted
        if MASSES:
            t_ptrs = target_ptr + row_offsets(offs_m, D, t_strides)[:, None] + steps * t_strides[1]
            a = load_masses(
                t_ptrs, weight_ptr, label, kept, share, smoothing, offs_c, mask, C, PROBABILITIES, WEIGHTED, SMOOTHED
            )
        mass = tl.load(statistics_ptr + offs_m + 2 * M, mask=mask_m, other=0.0)
        p = tl.exp(shifted) / total_exp[:, None]
        dx = finish_gradient(p, a, mass, label, kept, share, offs_c, factor[:, None], valid, in_range, MASSES)
        store(grad_ptrs[0] + g_offs, dx, mask)
    if NEEDS_DQ:
        log_p = shifted - tl.log(total_exp)[:, None]
        dq = -(factor * kept)[:, None] * log_p
        if WEIGHTED:
            dq *= load(weight_ptr + offs_c, offs_c < C).to(dtype)[None, :]
        store(grad_ptrs[1] + g_offs, dq, mask)


@triton.jit
def sum_partials(partial_ptr, partials, BLOCK: tl.constexpr):
    """The sum of `partials` numbers, in a fixed order."""
    offs = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for first in range(0, partials, BLOCK):
        sums += tl.load(partial_ptr + first + offs, mask=offs < partials - first, other=0.0)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["partials", "counts"])
def sum_losses_kernel(
    partial_ptr, counts_ptr, loss_ptr, total_ptr, partials, counts, REDUCTION: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The sum of the partial losses, for the mean divided by the sum of the partial weights; one program."""
    loss = sum_partials(partial_ptr, partials, BLOCK_M)
    if REDUCTION == "mean":
        total = sum_partials(counts_ptr, counts, BLOCK_M)
        tl.store(total_ptr, total)
        loss /= total
    store(loss_ptr, loss, True)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def scale_gradient_kernel(
    grad_ptr, dloss_ptr, total_ptr, target_ptr, out_ptr, M, C, D, dloss_strides, t_strides, g_strides, ignore_index,
    SCALAR: tl.constexpr, DIVIDED: tl.constexpr, LABELS: tl.constexpr, IN_PLACE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = grad · dloss, or grad · dloss / total, row by row; ignored rows stay 0 whatever dloss is.

    In place, what has the factor 1 has nothing to do, and its gradient is not touched. A program has a tile, or, in
    place with one factor for all, several: of so many programs as there are tiles most would be launched for nothing.
    """
    C, g_strides = aligned(C, g_strides, ALIGN)
    dtype: tl.constexpr = sum_dtype(grad_ptr.dtype.element_ty)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_c
    if SCALAR:
        one = load(dloss_ptr, True).to(dtype)
        if DIVIDED:
            one /= tl.load(total_ptr)
        if IN_PLACE:
            tiles = tl.where(one == 1.0, 0, tiles)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offs_m = (tile // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_c = (tile % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_m = offs_m < M
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        if SCALAR:
            factor = tl.zeros((BLOCK_M,), dtype) + one
        else:
            factor = load(dloss_ptr + row_offsets(offs_m, D, dloss_strides), mask_m, other=1.0).to(dtype)
            if DIVIDED:
                factor /= tl.load(total_ptr)
            if IN_PLACE:
                rows = tl.where(tl.sum((factor != 1.0).to(tl.int32)) > 0, M, 0)
                mask = mask & (offs_m < rows)[:, None]  # no number here: see linear_weight_grad_kernel
        offs = row_offsets(offs_m, D, g_strides)[:, None] + offs_c[None, :] * g_strides[1]
        grad = load(grad_ptr + offs, mask).to(dtype) * factor[:, None]
        if LABELS:
            unsafe = mask_m & ~(tl.abs(factor) < float("inf"))  # only then is 0 · factor not 0
            label = tl.load(target_ptr + row_offsets(offs_m, D, t_strides), mask=unsafe, other=0).to(tl.int64)
            grad = tl.where((unsafe & (label == ignore_index))[:, None], 0.0, grad)
        store(out_ptr + offs, grad, mask)
