"""Cross entropy of logits [M, C] or [B, C, D], classes in dimension 1: the operators and the autograd.Functions.

A target gives class c of a row a mass a_c = w_c q_c (class weight times smoothed target). With A = Σ a_c, p the softmax
and s the scale of a row (1, 1 / its weights' sum for the mean, 0 where ignored) the gradient is grad = s (A p - a).

Where a program holds a row, the forward computes grad in the same pass, and the Function returns it as a second,
differentiable output that it saves, in the place of the logits. Backward is dloss · grad, and what flows into grad
itself, v, adds s A p ∘ (v - <p, v>). A p is recovered from grad. In float16 the mean leaves its 1 / Σ w out of grad,
which would lose the entries that it makes too small, and backward puts it in: s is 1 then, and r, by which dloss is
multiplied, the 1 / Σ w.

Of longer rows the Function saves the logits and three numbers a row, and backward is a Function of its own: it reads
the logits once and writes dloss · grad. Its derivatives are PyTorch's operators on the logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, internals
from . import derivatives
from .registry import define, eager, kernels, needs_graph, recorded, saved_tensors


def check_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise PyTorch's IndexError for a label out of range: always on a CPU, else inside `check_labels()` (a sync)."""
    if labels.is_cpu or dispatch.checks_labels():
        if (refusal := dispatch.without_memory(labels)) is not None:
            raise RuntimeError(f"target: {refusal}")
        labels = labels.long()  # or -100 would be compared as the 156 that it is in uint8
        if not labels.numel():
            return
        least, most = labels.aminmax()
        if int(least) >= 0 and int(most) < classes:
            return
        bad = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
        if bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds.")


def _forward(
    x: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_range(labels, x.shape[1], ignore_index)
    loss, grad, _, total = kernels("cross_entropy").cross_entropy_forward(
        x, labels, weight, ignore_index, reduction, label_smoothing, needs_grad
    )
    return loss, grad, total


def _fake(
    x: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss = x.new_empty(labels.shape if reduction == "none" else ())
    total = x.new_empty(() if reduction == "mean" else (0,), dtype=kernels("cross_entropy").sum_dtype(x.dtype))
    return loss, x.new_empty(x.shape if needs_grad else (0,)), total


def _soft_forward(
    x: Tensor, q: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float, needs_grad: bool,
    needs_log_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    results: tuple[Tensor, ...] = kernels("cross_entropy").cross_entropy_forward(
        x, q, weight, 0, reduction, label_smoothing, needs_grad, needs_log_p
    )
    return results[0], results[1], results[2]


def _soft_fake(
    x: Tensor, q: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float, needs_grad: bool,
    needs_log_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss = x.new_empty((x.shape[0], *x.shape[2:]) if reduction == "none" else ())
    return loss, x.new_empty(x.shape if needs_grad else (0,)), x.new_empty(x.shape if needs_log_p else (0,))


def _long_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not target.is_floating_point():
        check_range(target, x.shape[1], ignore_index)
    arguments = (x, target, weight, ignore_index, reduction, label_smoothing)
    results: tuple[Tensor, Tensor, Tensor] = kernels("cross_entropy").long_cross_entropy_forward(*arguments)
    return results


def _long_fake(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, sums = (x.shape[0], *x.shape[2:]), kernels("cross_entropy").sum_dtype(x.dtype)
    total = x.new_empty(() if reduction == "mean" else (0,), dtype=sums)
    statistics = x.new_empty((3, x.shape[0] * (x.shape[2] if x.dim() == 3 else 1)), dtype=sums)
    return x.new_empty(rows if reduction == "none" else ()), statistics, total


def _new_gradients(x: Tensor, needs_dx: bool, needs_dq: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_dx else (0,)), x.new_empty(x.shape if needs_dq else (0,))


def _long_backward(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, total: Tensor,
    ignore_index: int, reduction: str, label_smoothing: float, needs_dx: bool, needs_dq: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dq = _new_gradients(x, needs_dx, needs_dq)
    kernels("cross_entropy").long_cross_entropy_gradient(
        dloss, x, target, weight, statistics, total if reduction == "mean" else None, ignore_index, label_smoothing,
        dx if needs_dx else None, dq if needs_dq else None,
    )  # fmt: skip
    return dx, dq


def _scaled(
    dloss: Tensor, grad: Tensor, labels: Tensor | None, total: Tensor | None, ignore_index: int,
    dtype: torch.dtype | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    out = grad if in_place and dtype in (None, grad.dtype) else torch.empty_like(grad, dtype=dtype)
    scaled: Tensor = kernels("cross_entropy").scale_gradient(dloss, grad, labels, total, ignore_index, out)
    return scaled


_cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    "cross_entropy(Tensor x, Tensor labels, Tensor? weight, int ignore_index, str reduction, float label_smoothing,"
    " bool needs_grad) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
_soft_cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    "soft_cross_entropy(Tensor x, Tensor q, Tensor? weight, str reduction, float label_smoothing, bool needs_grad,"
    " bool needs_log_p) -> (Tensor, Tensor, Tensor)",
    _soft_forward,
    _soft_fake,
)
_scale_gradient: Callable[..., Tensor] = define(
    "scale_gradient(Tensor dloss, Tensor grad, Tensor? labels, Tensor? total, int ignore_index,"
    " ScalarType? dtype=None) -> Tensor",
    _scaled,
    lambda dloss, grad, labels, total, ignore_index, dtype=None: torch.empty_like(grad, dtype=dtype),
)


_long_cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    "long_cross_entropy(Tensor x, Tensor target, Tensor? weight, int ignore_index, str reduction,"
    " float label_smoothing) -> (Tensor, Tensor, Tensor)",
    _long_forward,
    _long_fake,
)
_long_gradient: Callable[..., tuple[Tensor, Tensor]] = define(
    "long_cross_entropy_gradient(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor statistics,"
    " Tensor total, int ignore_index, str reduction, float label_smoothing, bool needs_dx, bool needs_dq)"
    " -> (Tensor, Tensor)",
    _long_backward,
    lambda dloss, x, *arguments: _new_gradients(x, *arguments[-2:]),
)


def cross_entropy(
    x: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """The loss, of the labels' shape for the reduction "none" and else 0-d; weight is [C], contiguous, or None."""
    arguments = (x, labels, weight, ignore_index, reduction, label_smoothing)
    if not needs_graph(x) or _has_no_gradient(x):
        return _cross_entropy(*arguments, False)[0]
    record = _record_long if _is_long(x, weight is not None and label_smoothing > 0) else _record
    return record(*arguments)[0]


def soft_cross_entropy(x: Tensor, q: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float) -> Tensor:
    """The same with probabilities q, of x's shape and dtype, as the target."""
    arguments = (x, q, weight, reduction, label_smoothing)
    if not needs_graph(x, q) or _has_no_gradient(x):
        return _soft_cross_entropy(*arguments, False, False)[0]
    if _is_long(x, True):
        if not torch.compiler.is_compiling() and x.is_inference():
            x = x.clone()  # what cannot be saved
        return _record_long(x, q, weight, 0, reduction, label_smoothing)[0]
    return _record_soft(*arguments, needs_graph(q))[0]


def _is_long(x: Tensor, masses: bool) -> bool:
    """Whether no program holds a row of x, so that backward reads the logits again."""
    apart = False
    if x.dim() == 3 and x.shape[2] > 1 and x.stride(1) != 1:  # a guard of torch.compile, and not a SymBool
        apart = True
    return x.shape[1] > _most_classes(x.dtype, apart, masses)


def _has_no_gradient(x: Tensor) -> bool:
    """Whether torch.export traces a program for any number of classes: it has none, and must not guard on it."""
    return torch.compiler.is_exporting() and not isinstance(x.shape[1], int)


@internals.constant_under_compile
def _most_classes(dtype: torch.dtype, apart: bool, masses: bool) -> int:
    most: int = kernels("cross_entropy").most_classes(dtype, apart, masses)
    return most


class CrossEntropy(torch.autograd.Function):
    """Loss, gradient and the weight of all rows. Saves the gradient, which no one else holds, and the labels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _cross_entropy(x, labels, weight, ignore_index, reduction, label_smoothing, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, labels, weight, ctx.ignore_index, ctx.reduction, ctx.label_smoothing = inputs
        _, grad, total = output
        ctx.set_materialize_grads(False)
        ctx.private = nobody_looks()
        ctx.save_for_backward(grad, labels, weight, total)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, v: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, labels, weight, total = saved_tensors(ctx)
        total = total.detach()
        deferred, dx = kernels("cross_entropy").is_deferred(grad.dtype, ctx.reduction), None
        if v is not None:  # before `grad` may be scaled
            # no rows that count weigh 0, and are masked below
            s = 1 / total.masked_fill(total == 0, 1) if ctx.reduction == "mean" and not deferred else 1.0
            masses = derivatives.label_masses(grad, labels, weight, ctx.label_smoothing)
            dx = derivatives.curvature(grad, masses, s, v).masked_fill(
                (labels.long() == ctx.ignore_index).unsqueeze(1), 0
            )
        if dloss is not None and torch.is_grad_enabled():
            ctx.private = False  # the graph that is being made keeps it
            scaled = derivatives.multiply(grad, dloss / total if deferred else dloss)
            dx = _add(dx, scaled.masked_fill((labels.long() == ctx.ignore_index).unsqueeze(1), 0))
        elif dloss is not None:
            divisor = total if deferred else None
            dx = _add(dx, scale(dloss, grad, labels, divisor, ctx.ignore_index, ctx.private))
        return dx, None, None, None, None, None


class SoftCrossEntropy(torch.autograd.Function):
    """Loss, gradient and, if q has a gradient too, log p. Saves the two and q.

    dq = -(1 - label smoothing) s w log p; dx gets what flows into log p, u, as u - p Σ u.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, q: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float, needs_log_p: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _soft_cross_entropy(x, q, weight, reduction, label_smoothing, True, needs_log_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, q, weight, ctx.reduction, ctx.label_smoothing, ctx.has_log_p = inputs
        ctx.set_materialize_grads(False)
        ctx.private = nobody_looks()
        ctx.row_scale = 1 / max(1, x.numel() // x.shape[1]) if ctx.reduction == "mean" else 1.0
        ctx.save_for_backward(output[1], output[2], q, weight)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, v: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, log_p, q, weight = saved_tensors(ctx)
        deferred, dx, dq = kernels("cross_entropy").is_deferred(grad.dtype, ctx.reduction), None, None
        s = 1.0 if deferred else ctx.row_scale
        if ctx.has_log_p and ctx.needs_input_grad[1]:
            dq = derivatives.target_gradient(ctx, dloss, v, log_p, weight, s)
        if v is not None:
            masses = derivatives.masses(q, weight, ctx.label_smoothing)
            dx = derivatives.curvature(grad, masses, s, v, log_p if ctx.has_log_p else None)
        if u is not None:
            dx = _add(dx, u - log_p.exp() * u.sum(1, keepdim=True))
        if dloss is not None:
            dloss = dloss.float() * ctx.row_scale if deferred else dloss
            if torch.is_grad_enabled():
                ctx.private = False
                dx = _add(dx, derivatives.multiply(grad, dloss))
            else:
                dx = _add(dx, scale(dloss, grad, None, None, 0, ctx.private))
        return dx, dq, None, None, None, None


class LongCrossEntropy(torch.autograd.Function):
    """The loss of labels or probabilities. Saves the logits, the target and what the kernel summed of each row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _long_cross_entropy(x, target, weight, ignore_index, reduction, label_smoothing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, target, weight, *ctx.arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, target, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 6
        saved, needs = saved_tensors(ctx), ctx.needs_input_grad[:2]
        gradient = _record_long_gradient if needs_graph(dloss, *saved[:2]) else _long_gradient
        gradients = gradient(dloss, *saved, *ctx.arguments, *needs)
        dx, dq = (result if need else None for result, need in zip(gradients, needs, strict=True))
        return dx, dq, None, None, None, None


class LongCrossEntropyGradient(torch.autograd.Function):
    """dx and dq, each empty unless it is needed. Saves what it was given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _long_gradient(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        dloss, x, target, weight, _, total, *ctx.arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dloss, x, target, weight, total)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, ...]:
        ignore_index, reduction, label_smoothing, needs_dx, needs_dq = ctx.arguments
        v, u = v if needs_dx else None, u if needs_dq else None
        dloss, x, target, weight, total = saved_tensors(ctx)
        total = total if reduction == "mean" else None
        seconds = derivatives.long_seconds(dloss, x, target, weight, total, ignore_index, label_smoothing, v, u)
        needs = ctx.needs_input_grad[:3]
        return *(second if need else None for second, need in zip(seconds, needs, strict=True)), *[None] * 8


_record: Callable[..., tuple[Tensor, ...]] = recorded(CrossEntropy)
_record_soft: Callable[..., tuple[Tensor, ...]] = recorded(SoftCrossEntropy)
_record_long: Callable[..., tuple[Tensor, ...]] = recorded(LongCrossEntropy)
_record_long_gradient: Callable[..., tuple[Tensor, ...]] = recorded(LongCrossEntropyGradient)


def nobody_looks() -> bool:
    """Whether what a Function saves stays its own: a hook on saved tensors may keep what it is given."""
    return not internals.has_saved_tensor_hooks()


def scale(
    dloss: Tensor, grad: Tensor, labels: Tensor | None, total: Tensor | None, ignore_index: int, private: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """dloss · grad, in the buffer of `grad` where this backward is the last to read it and nobody else can."""
    if not eager(dloss, grad):
        return _scale_gradient(dloss, grad, labels, total, ignore_index, dtype)
    grad = grad.detach()  # a saved output comes with its graph, which the result must not have
    last = private and not internals.keeps_graph()
    return _scaled(dloss, grad, labels, total, ignore_index, dtype, in_place=last)


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
