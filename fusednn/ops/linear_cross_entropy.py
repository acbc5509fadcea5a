"""cross_entropy(x Wᵀ + b) of x [N, K], W [V, K] and labels [N], without the logits [N, V] ever being whole in memory.

Rows go through in chunks. A chunk's logits are computed by PyTorch into one buffer, our kernel turns them into their
gradient in place, and PyTorch multiplies that into dx, dW and db, dW and db in float32 (float64 for float64). So the
mean and the sum have their gradients, for an incoming gradient of 1 and not yet divided by the weight of the rows,
when forward ends; backward multiplies. For the reduction "none" backward computes the logits again, since only it
knows what each row's gradient is multiplied with. Derivatives of gradients go through the whole logits.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_entropy import check_range, cross_entropy, nobody_looks, scale
from .registry import define, kernels, needs_graph, recorded, saved_tensors

CHUNK_BYTES = 2**28
"""The chunk buffer takes at most this much by default, and a tenth of what the logits would take. In half precision it
may take twice this and as much as the weight: so does its gradient, cast from float32 when the chunks are done.

For each chunk all of dW is read and written in float32. On an H100, 8192 rows, 4096 wide, 128,256 classes, bfloat16,
forward and backward: 51.2 ms in 11 chunks, 45.3 in 6, 40.6 in 4, 42.3 in 2, with the same peak; eager takes 40.0."""


def chunk_size(rows: int, classes: int, itemsize: int, width: int = 0) -> int:
    """How many rows, so wide, go through at once: as many as the limits allow, in chunks as equal as can be."""
    most = CHUNK_BYTES // (classes * itemsize)
    most = max(1, min(most, rows // 10), min(2 * most, width))
    return -(-rows // -(-rows // most)) if rows else 1


def _chunks(x: Tensor, w: Tensor, b: Tensor | None, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and their logits in the one buffer."""
    buffer = x.new_empty(min(chunk_rows, x.shape[0]), w.shape[0])
    for first in range(0, x.shape[0], chunk_rows):
        rows = slice(first, first + chunk_rows)
        logits = buffer[: x[rows].shape[0]]
        if b is None:
            torch.mm(x[rows], w.t(), out=logits)
        else:
            torch.addmm(b, x[rows], w.t(), out=logits)
        yield rows, logits


def _accumulate(dw: Tensor, grad: Tensor, x: Tensor) -> None:
    """dw += gradᵀ x, where dw may be of a wider dtype, in which the sums then run."""
    if dw.dtype == grad.dtype:
        dw.addmm_(grad.t(), x)
    elif grad.is_cuda:
        torch.addmm(dw, grad.t(), x, out_dtype=dw.dtype, out=dw)
    else:
        dw.addmm_(grad.t().to(dw.dtype), x.to(dw.dtype))


def _new_gradients(x: Tensor, w: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dw and db to accumulate in; what is not needed has no elements."""
    sums, (needs_dx, needs_dw, needs_db) = kernels("cross_entropy").sum_dtype(x.dtype), needs
    dx = x.new_empty(x.shape if needs_dx else (0,))
    dw = w.new_zeros(w.shape if needs_dw else (0,), dtype=sums)
    return dx, dw, w.new_zeros(w.shape[0] if needs_db else 0, dtype=sums)


def _add_gradients(
    grads: tuple[Tensor, Tensor, Tensor],
    rows: slice,
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    needs: tuple[bool, bool, bool],
) -> None:
    (dx, dw, db), (needs_dx, needs_dw, needs_db) = grads, needs
    if needs_dx:
        torch.mm(grad, w, out=dx[rows])
    if needs_dw:
        _accumulate(dw, grad, x[rows])
    if needs_db:
        db += grad.sum(0, dtype=db.dtype)


def _forward(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, chunk_rows: int, needs_dx: bool, needs_dw: bool, needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_range(labels, w.shape[0], ignore_index)
    needs, module = (needs_dx, needs_dw, needs_db), kernels("cross_entropy")
    grads, losses = _new_gradients(x, w, needs), x.new_empty(x.shape[0], dtype=module.sum_dtype(x.dtype))
    for rows, logits in _chunks(x, w, b, chunk_rows):
        if not any(needs):
            arguments = (logits, labels[rows], weight, ignore_index, "none", label_smoothing, False)
            module.cross_entropy_forward(*arguments, out=(losses[rows], logits))
            continue
        module.cross_entropy_in_place(logits, labels[rows], weight, ignore_index, label_smoothing, losses[rows])
        _add_gradients(grads, rows, logits, x, w, needs)
    if reduction == "none":
        return losses, *grads, losses.new_empty(0)
    if reduction == "sum":
        return losses.sum(), *grads, losses.new_ones(())
    total = module.weigh_labels(labels, weight, w.shape[0], ignore_index, losses.dtype)
    total = total.masked_fill(total == 0, float("nan"))  # 0 / 0 in PyTorch, whatever smoothing adds to it
    # the gradients of no rows are zero, not 0 / 0
    return losses.sum() / total, *grads, total.masked_fill((labels == ignore_index).all(), 1.0)


def _fake(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, chunk_rows: int, *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape, dtype = (
        (labels.shape, (0,)) if reduction == "none" else ((), ()),
        kernels("cross_entropy").sum_dtype(x.dtype),
    )
    grads = _new_gradients(x, w, (needs[0], needs[1], needs[2]))
    return x.new_empty(shape[0], dtype=dtype), *grads, x.new_empty(shape[1], dtype=dtype)


def _rows_backward(
    dloss: Tensor, x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, chunk_rows: int, needs_dx: bool, needs_dw: bool, needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    needs, module = (needs_dx, needs_dw, needs_db), kernels("cross_entropy")
    grads, losses = _new_gradients(x, w, needs), x.new_empty(x.shape[0], dtype=module.sum_dtype(x.dtype))
    for rows, logits in _chunks(x, w, b, chunk_rows):
        arguments = (logits, labels[rows], weight, ignore_index, label_smoothing, losses[rows])
        module.cross_entropy_in_place(*arguments, dloss[rows])
        _add_gradients(grads, rows, logits, x, w, needs)
    return grads[0], grads[1].to(w.dtype), grads[2].to(w.dtype)


def _rows_fake(dloss: Tensor, x: Tensor, w: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = _new_gradients(x, w, arguments[-3:])
    return dx, dw.to(w.dtype), db.to(w.dtype)


def _flops(x: Tensor, w: Tensor, *rest: Any, **_: Any) -> int:
    """The logits, and each gradient that is a product."""
    needs_dx, needs_dw = rest[-3:-1]
    products: int = 1 + needs_dx + needs_dw
    return products * 2 * x.shape[0] * w.numel()


ARGUMENTS = "Tensor x, Tensor w, Tensor? b, Tensor labels, Tensor? weight, int ignore_index"
NEEDS = "float label_smoothing, SymInt chunk_rows, bool needs_dx, bool needs_dw, bool needs_db"

_linear_cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = define(
    f"linear_cross_entropy({ARGUMENTS}, str reduction, {NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _flops,
)
_linear_cross_entropy_rows_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    f"linear_cross_entropy_rows_backward(Tensor dloss, {ARGUMENTS}, {NEEDS}) -> (Tensor, Tensor, Tensor)",
    _rows_backward,
    _rows_fake,
    lambda dloss, *arguments, **_: _flops(*arguments),
)


def linear_cross_entropy(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, chunk_rows: int,
) -> Tensor:  # fmt: skip
    """The loss, [N] for the reduction "none" and else 0-d, in float32 (float64 for float64)."""
    arguments = (x, w, b, labels, weight, ignore_index, reduction, label_smoothing, chunk_rows)
    if not needs_graph(x, w, b):
        return _linear_cross_entropy(*arguments, False, False, False)[0]
    return _record(*arguments, needs_graph(x), needs_graph(w), b is not None and needs_graph(b))[0]


class LinearCrossEntropy(torch.autograd.Function):
    """The loss, and unless it is a vector the gradients to be multiplied, which it saves with the inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *rest, needs_dx, needs_dw, needs_db = arguments
        now = rest[6] != "none"
        return _linear_cross_entropy(*rest, needs_dx and now, needs_dw and now, needs_db and now)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w, b, labels, weight, *ctx.arguments = inputs
        ctx.private = nobody_looks()
        ctx.set_materialize_grads(False)  # or zeros would be made for each output
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, w, b, labels, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 12
        x, w, b, labels, weight, dx, dw, db, total = saved_tensors(ctx)
        ignore_index, reduction, label_smoothing, chunk_rows, *_ = ctx.arguments
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], b is not None and ctx.needs_input_grad[2])
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            ctx.private = False
            grads = _differentiable(dloss, x, w, b, (labels, weight, ignore_index, reduction, label_smoothing))
        elif reduction == "none":
            arguments = (labels, weight, ignore_index, label_smoothing, chunk_rows, *needs)
            grads = _linear_cross_entropy_rows_backward(dloss, x, w, b, *arguments)
        else:
            divisor = total if reduction == "mean" else None
            dx = scale(dloss, dx, labels, divisor, ignore_index, ctx.private) if needs[0] else None
            dw = scale(dloss, dw, None, divisor, 0, ctx.private, w.dtype) if needs[1] else None
            db = scale(dloss, db.unsqueeze(0), None, divisor, 0, ctx.private, w.dtype)[0] if needs[2] else None
            grads = (dx, dw, db)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 9


def _differentiable(dloss: Tensor, x: Tensor, w: Tensor, b: Tensor | None, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """dx, dw and db through the whole logits."""

    def loss(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return cross_entropy(F.linear(x, w, b), *rest).to(dloss.dtype)

    if b is None:
        return *torch.func.vjp(lambda x, w: loss(x, w, None), x, w)[1](dloss), None
    return tuple(torch.func.vjp(loss, x, w, b)[1](dloss))


_record: Callable[..., tuple[Tensor, ...]] = recorded(LinearCrossEntropy)
