"""y = act(x Wᵀ + b) and its gradients, as Triton kernels: act is the ReLU or nothing.

Forward takes one launch: bias and ReLU are applied to the accumulator before its only store. Backward takes
one for dx and one for dW with db (two where the rows are split). Both read the ReLU's mask off the saved
output, `not (y <= 0)`, as they load dy, so the masked gradient never exists in memory, nor does the
pre-activation. As torch.relu has it, the gradient is zero at zero and passes where y is NaN.

Shapes: x [M, K], W [N, K], b [N], y and dy [M, N]. Accumulators are float32, float64 for float64. Offsets are
64-bit: a tensor may have more than 2^31 elements. The batch, M, is not specialised: a last, ragged batch must not
compile anew.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import DTYPE_NAMES, Launch, LaunchConfig, cdiv, launch, plan
from .numerics import load, store, sum_dtype


@triton.jit(do_not_specialize=["M"])
def linear_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, stride_b,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = act(Σ_k x[m, k] w[n, k] + b[n]); a program has one [BLOCK_M, BLOCK_N] tile of y."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn

    acc_dtype: tl.constexpr = sum_dtype(x_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=acc_dtype)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = load(x_ptrs, mask_m[:, None] & mask_k[None, :])
        w = load(w_ptrs, mask_k[:, None] & mask_n[None, :])
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=acc_dtype)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)

    if HAS_BIAS:
        acc += load(b_ptr + offs_n * stride_b, mask_n).to(acc_dtype)[None, :]
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # not tl.maximum(acc, 0), which would turn NaN into 0
    store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc, mask_m[:, None] & mask_n[None, :])


@triton.jit
def load_masked_gradient(dy_ptrs, y_ptrs, mask, RELU: tl.constexpr):
    """The gradient before the ReLU: dy where not (y <= 0), else 0."""
    dy = load(dy_ptrs, mask)
    if RELU:
        dy = tl.where(load(y_ptrs, mask) <= 0, 0.0, dy)
    return dy


@triton.jit(do_not_specialize=["M"])
def linear_input_grad_kernel(
    dy_ptr, y_ptr, w_ptr, dx_ptr, M, N, K, stride_dym, stride_dyn, stride_wn, stride_wk,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[m, k] = Σ_n g[m, n] w[n, k], g the masked dy; a program has one [BLOCK_M, BLOCK_K] tile of dx."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_m = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_k = offs_m < M, offs_k < K
    dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    w_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk

    acc_dtype: tl.constexpr = sum_dtype(dy_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=acc_dtype)
    for n in range(0, N, BLOCK_N):
        mask_n = offs_n < N - n
        g = load_masked_gradient(dy_ptrs, y_ptrs, mask_m[:, None] & mask_n[None, :], RELU)
        w = load(w_ptrs, mask_n[:, None] & mask_k[None, :])
        acc = tl.dot(g, w, acc, input_precision=PRECISION, out_dtype=acc_dtype)
        dy_ptrs += BLOCK_N * tl.cast(stride_dyn, tl.int64)
        y_ptrs += BLOCK_N
        w_ptrs += BLOCK_N * tl.cast(stride_wn, tl.int64)

    store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], acc, mask_m[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=["M", "split_rows"])
def linear_weight_grad_kernel(
    dy_ptr, y_ptr, x_ptr, dw_ptr, db_ptr, M, N, K, stride_dym, stride_dyn, stride_xm, stride_xk,
    split_rows, stride_split,
    RELU: tl.constexpr, NEEDS_DW: tl.constexpr, NEEDS_DB: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[n, k] = Σ_m g[m, n] x[m, k] and db[n] = Σ_m g[m, n], g the masked dy.

    A program has one [BLOCK_N, BLOCK_K] tile of dw over `split_rows` rows of the batch, a multiple of BLOCK_M; split s
    writes `stride_split` elements after split s - 1. The programs of the first tile column write db.
    """
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tile_k = tl.program_id(0) % tiles_k
    tile_n = (tl.program_id(0) // tiles_k) % tiles_n
    split = (tl.program_id(0) // (tiles_k * tiles_n)).to(tl.int64)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = split * split_rows + tl.arange(0, BLOCK_M)
    mask_n, mask_k = offs_n < N, offs_k < K
    dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk

    acc_dtype: tl.constexpr = sum_dtype(dy_ptr.dtype.element_ty)
    dw = tl.zeros((BLOCK_N, BLOCK_K), dtype=acc_dtype)
    db = tl.zeros((BLOCK_N,), dtype=acc_dtype)
    for m in range(0, split_rows, BLOCK_M):
        mask_m = offs_m < M - m
        g = load_masked_gradient(dy_ptrs, y_ptrs, mask_m[:, None] & mask_n[None, :], RELU)
        if NEEDS_DW:
            x = load(x_ptrs, mask_m[:, None] & mask_k[None, :])
            dw = tl.dot(tl.trans(g), x, dw, input_precision=PRECISION, out_dtype=acc_dtype)
        if NEEDS_DB:
            db += tl.sum(g.to(acc_dtype), axis=0)
        dy_ptrs += BLOCK_M * tl.cast(stride_dym, tl.int64)
        y_ptrs += BLOCK_M * tl.cast(N, tl.int64)
        x_ptrs += BLOCK_M * tl.cast(stride_xm, tl.int64)

    if NEEDS_DW:
        dw_ptrs = dw_ptr + split * stride_split + offs_n[:, None] * K + offs_k[None, :]
        store(dw_ptrs, dw, mask_n[:, None] & mask_k[None, :])
    if NEEDS_DB:
        # a tile, and not tile_k alone, of which Triton 3.9's interpreter would make numbers in the mask
        first = tl.zeros((BLOCK_N,), tl.int32) + tile_k == 0
        store(db_ptr + split * stride_split + offs_n, db, mask_n & first)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(partial_ptr, dw_ptr, db_ptr, size_dw, size, splits, BLOCK_N: tl.constexpr):
    """dw and db, laid one after the other, = Σ_s partial[s], added in the order of s."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < size
    total = load(partial_ptr + offs, mask)
    for _ in range(1, splits):
        partial_ptr += size
        total += load(partial_ptr + offs, mask)
    store(dw_ptr + offs, total, offs < size_dw)
    store(db_ptr + (offs - size_dw), total, mask & (offs >= size_dw))


ROW_LIMITS = ((None, 16), (16, None), (64, None), (None, 64), (512, None), (None, None))
"""The size classes of an output [rows, columns]: the largest rows and columns of each; the first that holds."""

CONFIGS = {
    # (block_m, block_n, block_k, num_warps, num_stages) for each size class above, for every architecture.
    # All unmeasured: chosen so that no target spills or runs out of shared memory and every dtype with tensor cores
    # uses them (`make resources`); timings on a card decide the rows later.
    "fp16": (
        (64, 16, 64, 4, 3), (16, 32, 64, 4, 3), (32, 32, 32, 4, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2),
        (128, 128, 32, 8, 3),
    ),
    "tf32": (
        (64, 16, 32, 4, 3), (16, 64, 32, 4, 3), (32, 32, 32, 4, 2), (64, 64, 32, 4, 3), (64, 64, 32, 4, 3),
        (128, 64, 32, 8, 2),
    ),
    "ieee": (
        (64, 16, 16, 4, 2), (16, 64, 16, 4, 2), (32, 32, 32, 4, 2), (64, 64, 16, 4, 2), (64, 64, 16, 4, 2),
        (128, 64, 16, 8, 2),
    ),
    "fp64": (
        (16, 16, 16, 4, 2), (16, 32, 16, 4, 3), (32, 32, 16, 4, 2), (32, 32, 16, 4, 2), (32, 32, 16, 4, 2),
        (64, 64, 16, 8, 2),
    ),
}  # fmt: skip
# Three rows of bf16 differ. Of its weight gradients 64 x 64 tiles, split, spill with two stages on sm_80, and 16 x 32
# tiles with three on sm_90 under Triton 3.6. fp16's 64 x 64 tiles, not split, spill with three.
CONFIGS["bf16"] = (
    CONFIGS["fp16"][0], (16, 32, 64, 4, 2), CONFIGS["fp16"][2], (64, 64, 32, 4, 3), (64, 64, 32, 4, 3),
    CONFIGS["fp16"][-1],
)  # fmt: skip

LIBRARY_SIZE = 512
"""A product with more than this in each of its three sizes goes to PyTorch's, cuBLAS on NVIDIA: plain products are not
our contest, and what fusing saves is small beside them.

On an H100 ours take, of eager's time in a CUDA graph, bfloat16 and TF32: at 256 cubed 0.72 and 0.65 forward, 0.89 and
1.00 with backward; at 512 cubed 0.84 and 0.90, 1.01 and 1.16; at 1024 cubed 1.19 and 1.15, 2.3 and 2.7."""

SPLIT_PROGRAMS = 128
"""Rows of the batch are split until the weight gradient has about this many programs. Unmeasured."""

SPLIT_TRIPS = 4
"""... but a split runs at least this many trips through its loop. Unmeasured."""

SUM_CONFIG = LaunchConfig(1, 1024, num_warps=4)


def choose(rows: int, columns: int, dtype: torch.dtype, precision: str) -> LaunchConfig:
    """The configuration of a product whose output is [rows, columns]."""
    key = precision if dtype == torch.float32 else DTYPE_NAMES[dtype]
    for (most_rows, most_columns), config in zip(ROW_LIMITS, CONFIGS[key], strict=True):
        if (most_rows is None or rows <= most_rows) and (most_columns is None or columns <= most_columns):
            return LaunchConfig(*config)
    raise AssertionError("the last size class holds every output")


def is_library(m: int, n: int, k: int) -> bool:
    """Whether PyTorch multiplies for a layer of these sizes, and the mask and bias are passes of their own."""
    return n > LIBRARY_SIZE and k > LIBRARY_SIZE and m > LIBRARY_SIZE


def masked(dy: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    """The gradient before the ReLU, written out: dy where not (y <= 0), else 0."""
    return dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a b, or a b + bias, by PyTorch, in their dtype also where a backward runs under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def precision_of(x: torch.Tensor) -> str:
    """ "tf32" where x is float32 on a CUDA device and PyTorch's matmul setting allows TF32, else "ieee"."""
    if x.dtype != torch.float32 or not x.is_cuda or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@lru_cache(maxsize=4096)
def plan_forward(m: int, n: int, dtype: torch.dtype, precision: str, has_bias: bool, relu: bool) -> Launch:
    """The launch of linear_forward_kernel for an output [m, n]."""
    config = choose(m, n, dtype, precision)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    programs = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    return plan(programs, config, HAS_BIAS=has_bias, RELU=relu, PRECISION=precision, **blocks)


def linear_forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """act(x Wᵀ + b): x [M, K], w [N, K], b [N] or None, any strides, one dtype -> [M, N], contiguous."""
    m, k = x.shape
    n = w.shape[0]
    if is_library(m, n, k):
        y = product(x, w.t(), b)
        return y.relu_() if relu else y
    y = x.new_empty(m, n)
    if m and n:
        planned = plan_forward(m, n, x.dtype, precision_of(x), b is not None, relu)
        bias, (stride_b,) = (x, (0,)) if b is None else (b, b.stride())
        launch(linear_forward_kernel, planned, x, w, bias, y, m, n, k, *x.stride(), *w.stride(), stride_b)
    return y


@lru_cache(maxsize=4096)
def plan_input_grad(m: int, k: int, dtype: torch.dtype, precision: str, relu: bool) -> Launch:
    """The launch of linear_input_grad_kernel for an output [m, k]."""
    config = choose(m, k, dtype, precision)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_n, "BLOCK_N": config.block_k}
    programs = cdiv(m, config.block_m) * cdiv(k, config.block_n)
    return plan(programs, config, RELU=relu, PRECISION=precision, **blocks)


def linear_input_grad(dy: torch.Tensor, y: torch.Tensor | None, w: torch.Tensor) -> torch.Tensor:
    """dx [M, K] of dy [M, N], any strides, w [N, K], and y [M, N], the output behind a ReLU, None without one."""
    m, n = dy.shape
    k = w.shape[1]
    if is_library(m, n, k):
        return product(masked(dy, y), w)
    dx = dy.new_empty(m, k)
    if m and k:
        planned = plan_input_grad(m, k, dy.dtype, precision_of(dy), y is not None)
        y = dy if y is None else y.contiguous()
        launch(linear_input_grad_kernel, planned, dy, y, w, dx, m, n, k, *dy.stride(), *w.stride())
    return dx


@lru_cache(maxsize=4096)
def plan_weight_grad(
    m: int, n: int, k: int, dtype: torch.dtype, precision: str, relu: bool, needs_db: bool
) -> tuple[Launch, Launch, int, int]:
    """The launches of linear_weight_grad_kernel and of the sum of its splits, their number and their rows.

    By shape alone, so that results repeat. Without dw, k is 0.
    """
    config = choose(n, max(k, 1), dtype, precision)
    blocks = {"BLOCK_N": config.block_m, "BLOCK_K": config.block_n, "BLOCK_M": config.block_k}
    tiles = cdiv(n, config.block_m) * cdiv(max(k, 1), config.block_n)
    splits = max(1, min(SPLIT_PROGRAMS // tiles, m // (SPLIT_TRIPS * config.block_k)))
    rows = cdiv(cdiv(m, splits), config.block_k) * config.block_k
    splits = max(1, cdiv(m, max(rows, 1)))
    flags = {"RELU": relu, "NEEDS_DW": k > 0, "NEEDS_DB": needs_db, "PRECISION": precision}
    summed = plan(cdiv(n * k + n * needs_db, SUM_CONFIG.block_n), SUM_CONFIG, BLOCK_N=SUM_CONFIG.block_n)
    return plan(tiles * splits, config, **flags, **blocks), summed, splits, rows


def linear_weight_grad(
    dy: torch.Tensor, y: torch.Tensor | None, x: torch.Tensor, needs_dw: bool, needs_db: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dW [N, K] and db [N] of dy [M, N] and x [M, K], any strides, and y as in :func:`linear_input_grad`.

    What is not needed comes back with no elements.
    """
    m, n = dy.shape
    k = x.shape[1] if needs_dw else 0
    if is_library(m, n, k):
        g = masked(dy, y)
        return product(g.t(), x), g.sum(0) if needs_db else g.new_empty(0)
    dw = dy.new_empty(n, k) if needs_dw else dy.new_empty(0)
    db = dy.new_empty(n if needs_db else 0)
    size_dw, size = n * k, n * k + n * needs_db
    if size == 0:
        return dw, db
    first, summed, splits, rows = plan_weight_grad(m, n, k, dy.dtype, precision_of(dy), y is not None, needs_db)
    y = dy if y is None else y.contiguous()
    arguments = (m, n, max(k, 1), *dy.stride(), *x.stride(), rows, size)
    if splits == 1:
        launch(linear_weight_grad_kernel, first, dy, y, x, dw, db, *arguments)
    else:
        partial = dy.new_empty(splits, size, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32)
        launch(linear_weight_grad_kernel, first, dy, y, x, partial, partial[:, size_dw:], *arguments)
        launch(sum_splits_kernel, summed, partial, dw, db, size_dw, size, splits)
    return dw, db
