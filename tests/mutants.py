"""Kernels broken on purpose: `make mutants` breaks each one way at a time and fails if the tests let a breakage live.

    python -m tests.mutants [--only SUBSTRING] [--jobs 2]

A mutant is one replaced line in a copy of the repository; it is killed when the tests of its file fail there. A test
that a wrong kernel passes is a defect, so whoever writes a kernel adds its mutants here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands in `file` once behind `after`, becomes `new`."""

    name: str
    file: str
    after: str
    old: str
    new: str

    def source(self) -> str:
        """The broken file. Raises ValueError where the kernel has nothing to break: the list must keep up."""
        text = (ROOT / self.file).read_text()
        start = text.index(self.after)
        ends = text.find("\n\n\n", start)
        place = text.index(self.old, start, len(text) if ends < 0 else ends)
        return text[:place] + self.new + text[place + len(self.old) :]


def in_native(file: str, function: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """The mutants of a function of the native engine."""
    return [Mutant(f"native {function}: {name}", file, f" {function}(", old, new) for name, old, new in changes]


def of(file: str, kernel: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """The mutants (name, old, new) of one kernel or device function."""
    return [Mutant(f"{kernel}: {name}", file, f"def {kernel}(", old, new) for name, old, new in changes]


LINEAR, NUMERICS, LAUNCH = "kernels/linear.py", "kernels/numerics.py", "kernels/launch.py"
LAUNCHER, CROSS_ENTROPY = "kernels/cross_entropy.py", "kernels/cross_entropy_kernels.py"
NATIVE, PRODUCTS, UPDATE, FACTS = (
    f"kernels/native/{name}" for name in ("mlp_training.cpp", "products.h", "adam.h", "facts.h")
)
TRAINING, ADAM, OPTIMIZERS = "kernels/mlp_training.py", "kernels/adam.py", "fusednn/training/optimizers.py"

MUTANTS = [
    *of(
        LINEAR,
        "linear_forward_kernel",
        ("mask of K", "mask_k = offs_k < K - k", "mask_k = offs_k < K"),
        ("mask of M", "mask_m, mask_n = offs_m < M,", "mask_m, mask_n = offs_m <= M,"),
        ("stride of w", "offs_k[:, None] * stride_wk", "offs_k[:, None] * 1"),
        ("stride of b", "offs_n * stride_b", "offs_n"),
        ("step of x", "x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)", "x_ptrs += BLOCK_K"),
        ("32-bit step", "BLOCK_K * tl.cast(stride_xk, tl.int64)", "BLOCK_K * stride_xk"),
        ("sign of b", "acc += load(b_ptr", "acc -= load(b_ptr"),
        ("relu of NaN", "tl.where(acc <= 0, 0.0, acc)", "tl.where(acc > 0, acc, 0.0)"),
        ("order of programs", "tl.program_id(0) % tiles_n", "tl.program_id(0) // tiles_n"),
        ("32-bit offsets", "(tl.program_id(0) // tiles_n).to(tl.int64)", "(tl.program_id(0) // tiles_n)"),
    ),
    *of(
        LINEAR,
        "load_masked_gradient",
        ("zero at zero", "<= 0, 0.0, dy)", "< 0, 0.0, dy)"),
        ("passes at NaN", "tl.where(load(y_ptrs, mask) <= 0, 0.0, dy)", "tl.where(load(y_ptrs, mask) > 0, dy, 0.0)"),
        ("no mask", "if RELU:", "if False:"),
    ),
    *of(
        LINEAR,
        "linear_input_grad_kernel",
        ("mask of N", "mask_n = offs_n < N - n", "mask_n = offs_n < N"),
        ("stride of dy", "offs_n[None, :] * stride_dyn", "offs_n[None, :]"),
        ("row stride of dy", "offs_m[:, None] * stride_dym", "offs_m[:, None] * N"),
        ("step of y", "y_ptrs += BLOCK_N", "y_ptrs += 0"),
        ("step of w", "w_ptrs += BLOCK_N * tl.cast(stride_wn, tl.int64)", "w_ptrs += BLOCK_N"),
        ("rows of dx", "offs_m[:, None] * K", "offs_m[:, None] * N"),
    ),
    *of(
        LINEAR,
        "linear_weight_grad_kernel",
        ("mask of M", "mask_m = offs_m < M - m", "mask_m = offs_m < M"),
        ("rows of a split", "offs_m = split * split_rows +", "offs_m ="),
        ("stride of x", "offs_k[None, :] * stride_xk", "offs_k[None, :]"),
        ("step of y", "y_ptrs += BLOCK_M * tl.cast(N, tl.int64)", "y_ptrs += BLOCK_M"),
        ("sum of db", "db += tl.sum(g.to(acc_dtype), axis=0)", "db = tl.sum(g.to(acc_dtype), axis=0)"),
        ("place of a split of dw", "dw_ptr + split * stride_split", "dw_ptr"),
        ("place of a split of db", "db_ptr + split * stride_split", "db_ptr"),
        ("who writes db", "tile_k == 0", "tile_k == 1"),
    ),
    *of(
        LINEAR,
        "sum_splits_kernel",
        ("one too few", "range(1, splits)", "range(2, splits)"),
        ("same split again", "partial_ptr += size", "partial_ptr += 0"),
        ("place of db", "db_ptr + (offs - size_dw)", "db_ptr + offs"),
        ("end of dw", "total, offs < size_dw)", "total, offs < size_dw - 1)"),
    ),
    *of(
        CROSS_ENTROPY,
        "row_offsets",
        ("stride of d", "(offs_m % D) * strides[2]", "(offs_m % D) * strides[1]"),
        ("stride of b", "(offs_m // D) * strides[0]", "(offs_m // D) * strides[2]"),
    ),
    *of(
        CROSS_ENTROPY,
        "aligned",
        ("classes", "return C // ALIGN * ALIGN", "return C // (2 * ALIGN) * (2 * ALIGN)"),
        ("strides", "strides[0] // ALIGN * ALIGN", "strides[0] // (2 * ALIGN) * (2 * ALIGN)"),
    ),
    *of(
        LAUNCHER,
        "alignment",
        ("strides not looked at", "math.gcd(8, c, *(stride[0] for stride in strides))", "math.gcd(8, c)"),
    ),
    *of(
        CROSS_ENTROPY,
        "load_labels",
        ("negative labels", "(label >= 0) & (label < C)", "label < C"),
        ("large labels", "(label >= 0) & (label < C)", "label >= 0"),
        ("rows past the end", "valid = mask_m & (label", "valid = (label"),
        ("weights of ignored rows", "load(weight_ptr + label, valid & in_range)", "load(weight_ptr + label, in_range)"),
        ("weights out of range", "load(weight_ptr + label, valid & in_range)", "load(weight_ptr + label, valid)"),
        ("weight of every row", "return label, valid.to(dtype), valid", "return label, mask_m.to(dtype), valid"),
    ),
    *of(
        CROSS_ENTROPY,
        "split_smoothing",
        ("smoothing of the label", "weight * (1.0 - s).to(weight.dtype)", "weight"),
        ("smoothing in float32", "s = from_bits(smoothing)", "s = from_bits(smoothing).to(tl.float32)"),
    ),
    *of(
        CROSS_ENTROPY,
        "load_masses",
        ("smoothing of probabilities", "(1.0 - from_bits(smoothing)).to(a.dtype) + share", "1.0 + share"),
        ("weights of probabilities", "a * weights if PROBABILITIES", "a if PROBABILITIES"),
        ("weights of the smoothing", "a + share * weights", "a + share"),
        ("mask of C", "return tl.where(mask, a, 0.0)", "return a"),
    ),
    *of(
        CROSS_ENTROPY,
        "reduce_losses",
        ("one count too few", "offs < counts", "offs < counts - 1"),
        ("place of a weight", "tl.store(total_ptr + tl.program_id(0), part)", "tl.store(total_ptr, part)"),
        ("rows for weights", "total = part if ONE_PROGRAM", "total = tl.cast(M, loss.dtype) if ONE_PROGRAM"),
        ("mean of one program", "tl.sum(loss) / total, True", "tl.sum(loss), True"),
        ("place of a sum", "tl.store(loss_ptr + tl.program_id(0), tl.sum(loss))", "tl.store(loss_ptr, tl.sum(loss))"),
    ),
    *of(
        CROSS_ENTROPY,
        "finish_losses",
        ("ignored rows lose", "tl.where(valid, tl", "tl.where(True, tl"),
        ("bad labels pass", 'tl.where(in_range, loss, float("nan"))', "loss"),
    ),
    *of(
        CROSS_ENTROPY,
        "finish_gradient",
        ("label's 1", "gradient - kept[:, None], gradient)", "gradient, gradient)"),
        ("smoothing", "gradient) - share", "gradient)"),
        ("sign of the masses", "gradient -= a", "gradient += a"),
        ("mass", "p * mass[:, None]", "p"),
        ("scale", "gradient * scale", "gradient"),
        ("bad labels pass", 'tl.where(in_range[:, None], gradient * scale, float("nan"))', "gradient * scale"),
        ("ignored rows", "tl.where(valid[:, None], tl", "tl.where(True, tl"),
    ),
    *of(
        CROSS_ENTROPY,
        "count_labels_kernel",
        ("into the next program's", "last = tl.minimum(M, first + program_rows)", "last = M"),
        ("only the last trip", "total += weight", "total = weight"),
        ("rows of a trip", "offs_m = first + row +", "offs_m = first +"),
    ),
    *of(
        CROSS_ENTROPY,
        "softmax_losses",
        ("no maximum", "x - tl.max(x, axis=1)[:, None]", "x"),
        ("masses", "a * shifted", "a * x"),
        ("label", "loss -= kept * tl.sum", "loss -= mass * tl.sum"),
        ("smoothing", "loss -= share * tl.sum", "loss += share * tl.sum"),
    ),
    *of(
        CROSS_ENTROPY,
        "cross_entropy_kernel",
        ("mask of C", "mask_m[:, None] & (offs_c < C)[None, :]", "mask_m[:, None] & (offs_c <= C)[None, :]"),
        ("stride of x", "steps * x_strides[1]", "steps"),
        ("stride of probabilities", "steps * t_strides[1]", "steps * x_strides[1]"),
        ("stride of the gradient", "steps * g_strides[1]", "steps"),
        ("32-bit offsets", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("32-bit classes", "steps = offs_c.to(tl.int64)[None, :]", "steps = offs_c[None, :]"),
        ("log softmax", "shifted - tl.log(total_exp)[:, None]", "shifted"),
        ("divided too soon", "1.0 / total if SCALED else 1.0", "1.0 / total"),
    ),
    *of(
        CROSS_ENTROPY,
        "long_cross_entropy_kernel",
        ("no rescaling", "totals * tl.exp(m - new_base)[:, None]", "totals"),
        ("maximum of the last block", "new_m = tl.maximum(m, tl.max(x, axis=1))", "new_m = tl.max(x, axis=1)"),
        ("first block of -inf", 'tl.where(new_m == float("-inf"), 0.0, new_m)', "new_m"),
        ("mask of C", "mask = mask_m[:, None] & (offs_c < C)[None, :]", "mask = mask_m[:, None]"),
        ("masses not moved", "spread += mass * (base - new_base) + tl", "spread += tl"),
        ("smoothing not moved", "spread += c * share * (base - new_base)", "spread += 0 * share * (base - new_base)"),
        ("mass of the last block", "mass += tl.sum(a, axis=1)", "mass = tl.sum(a, axis=1)"),
        ("label's logit", "label * x_strides[1]", "label"),
        ("32-bit offsets", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("32-bit classes", "steps = offs_c.to(tl.int64)[None, :]", "steps = offs_c[None, :]"),
        ("place of the sums", "statistics_ptr + offs_m + M", "statistics_ptr + offs_m"),
        ("place of the masses", "statistics_ptr + offs_m + 2 * M", "statistics_ptr + offs_m + M"),
    ),
    *of(
        CROSS_ENTROPY,
        "long_cross_entropy_gradient_kernel",
        ("mask of C", "(offs_c < C)[None, :]", "(offs_c < C - 1)[None, :]"),
        ("mask of M", "mask_m = offs_m < M", "mask_m = offs_m < M - 1"),
        ("rows of a tile", "(tl.program_id(0) // tiles_c)", "(tl.program_id(0) % tiles_c)"),
        ("classes of a tile", "(tl.program_id(0) % tiles_c) * BLOCK_C", "0 * BLOCK_C"),
        ("32-bit offsets", "(tl.program_id(0) // tiles_c).to(tl.int64)", "(tl.program_id(0) // tiles_c)"),
        ("32-bit classes", "steps = offs_c.to(tl.int64)[None, :]", "steps = offs_c[None, :]"),
        ("stride of x", "[:, None] + steps * x_strides[1]", "[:, None] + steps"),
        ("stride of the gradient", "[:, None] + steps * g_strides[1]", "[:, None] + steps"),
        ("stride of probabilities", "[:, None] + steps * t_strides[1]", "[:, None] + steps"),
        ("stride of dloss", "row_offsets(offs_m, D, dloss_strides)", "row_offsets(offs_m, D, t_strides)"),
        ("not divided", "factor /= tl.load(total_ptr)", "factor *= 1.0"),
        ("no maximum", "x.to(dtype) - m[:, None]", "x.to(dtype)"),
        ("no sum", "tl.exp(shifted) / total_exp[:, None]", "tl.exp(shifted)"),
        ("no sum, probabilities", "shifted - tl.log(total_exp)[:, None]", "shifted"),
        ("mass of one", "statistics_ptr + offs_m + 2 * M, mask=mask_m, other=0.0)", "statistics_ptr + offs_m)"),
        ("smoothing of probabilities", "-(factor * kept)[:, None]", "-factor[:, None]"),
        ("sign of probabilities", "-(factor * kept)[:, None]", "(factor * kept)[:, None]"),
        (
            "weights of probabilities",
            "dq *= load(weight_ptr + offs_c, offs_c < C)",
            "dq *= load(weight_ptr, offs_c < C)",
        ),
    ),
    *of(
        CROSS_ENTROPY,
        "sum_partials",
        ("mask", "offs < partials - first", "offs < partials"),
        ("only the last trip", "sums += tl.load", "sums = tl.load"),
    ),
    *of(
        CROSS_ENTROPY,
        "sum_losses_kernel",
        ("sum for mean", "loss /= total", "loss *= 1.0"),
        ("mean for sum", 'REDUCTION == "mean"', "True"),
        ("weight not stored", "tl.store(total_ptr, total)", "tl.store(total_ptr, loss)"),
    ),
    *of(
        CROSS_ENTROPY,
        "scale_gradient_kernel",
        ("stride of dloss", "row_offsets(offs_m, D, dloss_strides)", "row_offsets(offs_m, D, t_strides)"),
        ("early exit at any 1", "tl.sum((factor != 1.0).to(tl.int32)) > 0", "tl.min((factor != 1.0).to(tl.int32)) > 0"),
        ("not divided", "factor /= tl.load(total_ptr)", "factor *= 1.0"),
        ("scalar, not divided", "one /= tl.load(total_ptr)", "one *= 1.0"),
        ("scalar, exit at another than 1", "tl.where(one == 1.0, 0, tiles)", "tl.where(one == 2.0, 0, tiles)"),
        ("a tile left out", "tiles, tl.num_programs(0)):", "tiles - 1, tl.num_programs(0)):"),
        ("tiles of the others", "tl.num_programs(0)):", "2 * tl.num_programs(0)):"),
        (
            "ignored rows",
            "(unsafe & (label == ignore_index))[:, None], 0.0, grad",
            "(unsafe & False)[:, None], 0.0, grad",
        ),
        ("rows that are not ignored", "unsafe & (label == ignore_index)", "unsafe"),
        ("mask of C", "(offs_c < C)[None, :]", "(offs_c < C - 1)[None, :]"),
        ("stride of the gradient", "offs_c[None, :] * g_strides[1]", "offs_c[None, :]"),
    ),
    *of(
        LAUNCHER,
        "plan_forward",
        ("float16 divided", "not (long or is_deferred(dtype, reduction))", "not long"),
        ("counted too late", "counted = scaled and not (probabilities or alone)", "counted = False"),
    ),
    *of(
        LAUNCHER,
        "strides_of",
        ("labels of blocks", "strides[1] if len(strides) == 2 else 0", "0"),
        ("blocks", "strides[2] if len(strides) == 3 else 0", "0"),
    ),
    *of(
        NUMERICS,
        "load",
        ("bfloat16 in the interpreter", "return bits.to(tl.float32, bitcast=True)", "return tile"),
    ),
    *of(
        NUMERICS,
        "store",
        ("truncation", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
        ("ties away from even", "((bits >> 16) & 1)", "1"),
        ("NaN", "tl.where(tile == tile, rounded, quiet_nan)", "rounded"),
    ),
    *of(
        LINEAR,
        "product",
        ("under autocast", "enabled=False", "enabled=True"),
        ("no bias", "torch.addmm(bias, a, b)", "torch.mm(a, b)"),
    ),
    *of(LINEAR, "masked", ("no mask", "torch.ops.aten.threshold_backward(dy, y, 0)", "dy")),
    *of(LINEAR, "linear_forward", ("the library without a ReLU", "y.relu_() if relu else y", "y")),
    *of(LINEAR, "linear_input_grad", ("the library without a mask", "product(masked(dy, y), w)", "product(dy, w)")),
    *of(
        LAUNCH,
        "launch",
        ("kept for any arguments", "(id(kernel), device, types)", "(id(kernel), device)"),
        ("kept for any device", "(id(kernel), device, types)", "(id(kernel), types)"),
        ("hooks passed by", "DIRECT and is_plain(kernel)", "DIRECT"),
        ("any stream", "get_current_stream(device)", "get_current_stream(0)"),
    ),
    *of(NUMERICS, "sum_dtype", ("float64 in float32", "tl.float64 if dtype == tl.float64 else", "")),
    *of(
        TRAINING,
        "hidden_tile",
        ("stride of x", "(offs_i.to(tl.int64) * strides[1])[None, :]", "offs_i[None, :]"),
        ("mask of I", "mask=mask_b[:, None] & (offs_i < I)[None, :]", "mask=mask_b[:, None]"),
        ("relu of NaN", "tl.where(z <= 0, 0.0, z)", "tl.where(z > 0, z, 0.0)"),
        ("no bias", "z += tl.load", "z += 0 * tl.load"),
    ),
    *of(
        TRAINING,
        "loss_tile",
        (
            "logits past the end",
            'y = tl.where(mask_o[None, :], y, float("-inf"))',
            "y = tl.where(mask_o[None, :], y, 0.0)",
        ),
        ("the last of equal logits", "tl.argmax(tl.where(y == y", "O - 1 - tl.argmax(tl.where(y == y"),
        ("right without counting", "valid & (largest == label)", "largest == label"),
        ("gradient past the end", "tl.where(mask, dy, 0.0)", "dy"),
    ),
    *of(
        TRAINING,
        "forward_tile",
        ("place of h", "offs_b[:, None] * H + offs_h[None, :], h", "offs_b[:, None] * BLOCK_H + offs_h[None, :], h"),
        ("no second bias", "y += tl.load", "y += 0 * tl.load"),
        ("stride of the targets", "offs_o, strides[2], ignore", "offs_o, 1, ignore"),
        ("db2 not summed", "tl.sum(dy, axis=0), counted", "tl.max(dy, axis=0), counted"),
    ),
    *of(
        TRAINING,
        "backward_output",
        ("dy not divided", "mask=mask_b[:, None], other=0.0) * scale", "mask=mask_b[:, None], other=0.0)"),
        ("gradient at zero", "tl.where(h <= 0, 0.0, tl.dot(dy", "tl.where(h < 0, 0.0, tl.dot(dy"),
        ("db1 of a tile", "db1 += tl.sum", "db1 = tl.sum"),
        ("state of W2", "firsts[2], seconds[2], offs_w", "firsts[2], firsts[2], offs_w"),
        ("row of b1", "row_ptr + ROW, RULE", "row_ptr, RULE"),
        ("row of W2", "row_ptr + 2 * ROW", "row_ptr + ROW"),
    ),
    *of(
        TRAINING,
        "backward_input",
        ("rows in order", "rows = tl.load(order_ptr + offs_b, mask=mask_b, other=0)", "rows = offs_b.to(tl.int64)"),
        ("mask of the batch", "mask=mask_b[None, :] & mask_h[:, None]", "mask=mask_h[:, None]"),
        ("columns of W1", "offs_h[:, None] * I + offs_i[None, :]", "offs_h[:, None] * BLOCK_I + offs_i[None, :]"),
    ),
    *of(
        TRAINING,
        "mlp_training_kernel",
        ("every batch full", "tl.minimum(batch_size, epoch_rows - position)", "batch_size"),
        ("the mean of a sum", "loss / weight if MEAN else loss", "loss / weight"),
        ("no rows, no gradient", "tl.where(counted > 0, 1.0 / weight, 1.0)", "1.0 / weight"),
        ("one row for all steps", "row_ptr = table_ptr + step * (4 * ROW)", "row_ptr = table_ptr"),
        ("db2 not divided", "db2 * scale", "db2"),
        ("same rows again", "order_ptr += size", "order_ptr += 0"),
        ("epochs without an end", "tl.where(position + size >= epoch_rows, 0, position + size)", "position + size"),
        ("one loss for all steps", "tl.store(buffers[2] + step", "tl.store(buffers[2]"),
        ("accuracy of the batch", "right / counted", "right / size"),
    ),
    *of(
        ADAM,
        "update",
        ("sign", "g *= tl.load(row_ptr + SIGN)", "g *= 1.0"),
        ("sign of the decay", "tl.fma(w, tl.load(row_ptr + DECAY), g)", "tl.fma(-w, tl.load(row_ptr + DECAY), g)"),
        ("no shrinking", "w *= tl.load(row_ptr + SHRINK)", "w *= 1.0"),
        ("first moment", "tl.load(row_ptr + GRAD_PART) * (g - m)", "tl.load(row_ptr + GRAD_PART) * g"),
        ("second moment", "tl.load(row_ptr + SQUARE_PART) * g * g", "tl.load(row_ptr + SQUARE_PART) * g"),
        ("root not corrected", "tl.sqrt(v) * tl.load(row_ptr + ROOT)", "tl.sqrt(v)"),
        ("first moment not kept", "tl.store(m_ptr + offs, m, mask=mask)\n        v", "v"),
        ("Nesterov", "g + momentum * m if RULE", "m if RULE"),
        ("damping", "tl.load(row_ptr + UNDAMPED) * g", "g"),
    ),
    *of(
        ADAM,
        "optimizer_step_kernel",
        ("row of the step", "(tl.load(step_ptr) * parameters + index)", "index"),
        ("row of the parameter", "parameters + index) * ROW", "parameters) * ROW"),
        ("last element", "mask = offs < size", "mask = offs < size - 1"),
    ),
    *of(
        OPTIMIZERS,
        "_columns",
        ("bias correction", "[lr / unbiased,", "[lr,"),
        ("root of the second", "_one_over_root(1 - power2)", "1.0"),
        ("step of the state", "[count + step for", "[step for"),
        ("step of the state, one step", "beta1 ** (count + 1)", "beta1 ** 1"),
        ("decoupled decay", "return [lr / unbiased, decay, 1 - lr * decay", "return [lr / unbiased, decay, 1 - decay"),
        ("dampened at first", "_series([1.0, *", "_series([0.5, *"),
    ),
    *in_native(
        PRODUCTS,
        "padded",
        ("no padding", "n = (n + lanes - 1) / lanes * lanes", "n = n / lanes * lanes"),
    ),
    *in_native(
        PRODUCTS,
        "product",
        ("the last rows", "tiles(std::integral_constant<int, 1>());", ""),
        ("depth of a tile", "std::min(TILE_K, K - k)", "TILE_K"),
        ("rows of a tile of b", "b + k * stride_b + n", "b + n"),
        ("columns of a tile of a", "a + k * stride_ak", "a"),
    ),
    *in_native(PRODUCTS, "transpose", ("beside the blocks", "m < whole_m ? whole_n : 0", "whole_n")),
    *in_native(
        UPDATE,
        "update",
        ("sign", "g[i] *= row[SIGN]", "g[i] *= 1"),
        ("coupled decay", "g[i] += row[DECAY] * w[i]", "g[i] += row[DECAY]"),
        ("root not corrected", "std::sqrt(v[i]) * root", "std::sqrt(v[i])"),
        ("Nesterov", "(g[i] + momentum * m[i])", "m[i]"),
    ),
    *in_native(NATIVE, "linear", ("no bias", "b ? b[m] : T(0)", "T(0)")),
    *in_native(NATIVE, "hidden_tile", ("relu of NaN", "to.h[i] <= 0 ? T(0) : to.h[i]", "to.h[i] > 0 ? to.h[i] : T(0)")),
    *in_native(
        NATIVE,
        "loss_row",
        ("NaN is the largest", "std::isnan(value) && !std::isnan(best)", "false"),
        ("rows that are ignored", "sums.counted += ignored ? 0 : 1", "sums.counted += 1"),
        ("weights of the smoothing", "kept + share * all_weights", "kept + share"),
        ("largest not taken off", "T shifted = y[o * stride_y] - largest", "T shifted = y[o * stride_y]"),
    ),
    *in_native(
        NATIVE,
        "forward_tile",
        ("stride of the targets", "job.targets[rows[b] * job.stride_t]", "job.targets[rows[b]]"),
        ("no rows, no gradient", "job.mean && sums.counted > 0", "job.mean"),
        ("zero by zero", "if (sums.weight == 0)", "if (false)"),
    ),
    *in_native(
        NATIVE,
        "is_bad",
        ("the first label past the end", "label >= classes", "label > classes"),
        ("labels that are ignored", " && label != ignore_index", ""),
    ),
    *in_native(
        NATIVE,
        "finds_bad_label",
        ("stride of the targets", "job.targets[rows[b] * job.stride_t]", "job.targets[rows[b]]"),
        ("the first step alone", "rows += size;", "break;"),
    ),
    *in_native(
        NATIVE,
        "count_steps",
        ("one for all", "float(job.steps)", "1"),
        ("a count in double", "job.double_counts >> p & 1", "false"),
    ),
    *in_native(
        FACTS,
        "is_same",
        ("lengths", "found && PyObject_Size(found) == fact.length", "found != nullptr"),
        ("what is gone", "(found ? found : gone) == before", "!found || found == before"),
        ("keys", "PyObject_RichCompareBool(found, fact.value, Py_EQ)", "1"),
    ),
    *in_native(FACTS, "*get", ("a defaultdict", "if (PyDict_Check(mapping))", "if (PyDict_CheckExact(mapping))")),
    *in_native(NATIVE, "step_on", ("row of the parameter", "row + p * ROW", "row")),
    *in_native(
        NATIVE,
        "step_on_weight",
        ("place of a part", "(m + r) * N + n", "(m + r) * N"),
        ("the part before", "std::fill_n(dw, rows * GRAD_N, T(0))", "(void)0"),
    ),
    *in_native(
        NATIVE, "step_on_bias", ("the last rows of a batch", "for (; b < size; ++b) sums", "for (; false; ++b) sums")
    ),
    *in_native(
        NATIVE,
        "backward_output",
        ("gradient at zero", "of.h[i] <= 0 ? T(0) : of.dh[i]", "of.h[i] < 0 ? T(0) : of.dh[i]"),
        ("the step before's dh", "std::fill_n(of.dh.p, H * stride_b, T(0))", "(void)0"),
    ),
    *in_native(
        NATIVE,
        "mlp_training",
        ("every batch full", "std::min(job.batch, job.epoch_rows - position)", "job.batch"),
        ("one row for all steps", "job.table + step * PARAMETERS * ROW", "job.table"),
        ("same rows again", "rows += size", "rows += 0"),
        ("accuracy of the batch", "sums.right / sums.counted", "sums.right / size"),
    ),
    *of(OPTIMIZERS, "take", ("steps not counted", 'state["step"] += steps', "pass")),
]
"""A mask, a stride, a sign, a scale, a dtype: what goes wrong in kernels."""

TESTS = {
    LINEAR: ["tests/kernels/test_linear.py", "tests/functional/test_linear.py"],
    LAUNCH: ["tests/kernels/test_launch.py"],
    CROSS_ENTROPY: ["tests/kernels/test_cross_entropy.py", "tests/functional/test_cross_entropy.py"],
    LAUNCHER: ["tests/kernels/test_cross_entropy.py"],
    NUMERICS: ["tests/kernels/test_numerics.py", "tests/kernels"],
    TRAINING: ["tests/kernels/test_mlp_training.py"],
    ADAM: ["tests/kernels/test_mlp_training.py", "tests/training"],
    OPTIMIZERS: ["tests/training"],
}
TESTS[NATIVE] = TESTS[PRODUCTS] = TESTS[UPDATE] = [
    "tests/training/test_native.py", "tests/training/test_train_step.py", "tests/training/test_train_steps.py",
    "-k", "native",
]  # fmt: skip
TESTS[FACTS] = ["tests/test_reading.py"]


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass on a copy of the repository with `mutant` in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        (copy / mutant.file).write_text(mutant.source())
        if mutant.file.startswith("kernels/native/"):
            for built in (copy / "fusednn").glob("_native*"):
                built.unlink()
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=copy, capture_output=True, check=True)
            if not list((copy / "fusednn").glob("_native*")):
                raise RuntimeError(f"{mutant.name}: does not compile")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[mutant.file]]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if result.returncode > 1:  # pytest could not run; a crash, of a read out of bounds, is negative and a kill
        raise RuntimeError(f"{mutant.name}: pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants; 1 if one lives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only mutants with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once; default: %(default)s")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    living = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, lives in zip(mutants, pool.map(survives, mutants), strict=True):
            print(f"{'LIVES ' if lives else 'killed'}  {mutant.file}  {mutant.name}", flush=True)
            living += [mutant.name] * lives
    print(f"{len(mutants)} mutants, {len(living)} alive")
    return int(bool(living) or not mutants)


if __name__ == "__main__":
    sys.exit(main())
