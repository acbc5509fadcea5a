"""Derivatives of the gradient of cross entropy, of any order: PyTorch's operators. Names as in cross_entropy.py.

Half precision is widened to float32 inside.
"""

from typing import Any

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def multiply(grad: Tensor, dloss: Tensor) -> Tensor:
    """dloss · grad, rounded once."""
    return (_wide(grad) * _wide(dloss.unsqueeze(1) if dloss.dim() else dloss)).to(grad.dtype)


def _per_class(weight: Tensor, like: Tensor) -> Tensor:
    """[C] as [C, 1, ...], to multiply a tensor with the classes in dimension 1."""
    return _wide(weight).reshape(-1, *[1] * (like.dim() - 2))


def masses(q: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """a = w ∘ q of probabilities q."""
    q = _wide(q)
    if label_smoothing > 0:
        q = q * (1 - label_smoothing) + label_smoothing / q.shape[1]
    return q if weight is None else q * _per_class(weight, q)


def label_masses(grad: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """The same of labels, for a gradient of this shape and dtype."""
    classes = torch.arange(grad.shape[1], device=grad.device).reshape(-1, *[1] * (grad.dim() - 2))
    return masses((classes == labels.long().unsqueeze(1)).to(grad.dtype), weight, label_smoothing)


def curvature(grad: Tensor, masses: Tensor, scale: Tensor | float, v: Tensor, log_p: Tensor | None = None) -> Tensor:
    """s A p ∘ (v - <p, v>); without log p A p = grad / s + a, and 0 where A is 0 (as a constant)."""
    mass, v = masses.sum(1, keepdim=True), _wide(v)
    if log_p is not None:
        p = _wide(log_p).exp()
        return (scale * mass * p * (v - (p * v).sum(1, keepdim=True))).to(grad.dtype)
    ap = _wide(grad) / scale + masses
    mean = (ap * v).sum(1, keepdim=True) / mass.masked_fill(mass == 0, 1)
    return (scale * ap * (v - mean)).masked_fill(mass == 0, 0).to(grad.dtype)


def target_gradient(
    ctx: Any, dloss: Tensor | None, v: Tensor | None, log_p: Tensor, weight: Tensor | None, scale: float
) -> Tensor:
    """dq, from the loss and, of v, from the gradient: (1 - label smoothing) s w (<p, v> - v)."""
    dtype, log_p = log_p.dtype, _wide(log_p)
    dq = torch.zeros_like(log_p)
    if dloss is not None:
        dq = -ctx.row_scale * multiply(log_p, dloss)
    if v is not None:
        dq = dq + scale * ((log_p.exp() * v).sum(1, keepdim=True) - v)
    dq = dq * (1 - ctx.label_smoothing if ctx.label_smoothing > 0 else 1)
    return (dq if weight is None else dq * _per_class(weight, dq)).to(dtype)


def long_seconds(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, total: Tensor | None, ignore_index: int,
    label_smoothing: float, v: Tensor | None, u: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What flows on to dloss, x and probabilities q from v into dx = f (A p - a) and from u into dq = -f k w log p.

    f is dloss, or dloss / total, of each row and 0 where it is ignored, k is 1 - label smoothing.
    """
    log_p, factor = _wide(x).log_softmax(1), _wide(dloss).unsqueeze(1) if dloss.dim() else _wide(dloss)
    p, ignored = log_p.exp(), None
    if target.is_floating_point():
        mass = masses(target, weight, label_smoothing)
    else:
        labels = target.long().unsqueeze(1)
        mass, ignored = label_masses(x, target, weight, label_smoothing), labels == ignore_index
        factor = torch.where((labels < 0) | (labels >= x.shape[1]), float("nan"), factor).masked_fill(ignored, 0)
    if total is not None:
        factor = factor / total.masked_fill(total == 0, 1)  # 0 where no row counts
    of_dloss, dx, dq = torch.zeros_like(p), torch.zeros_like(p), None
    kw = torch.full((), 1 - label_smoothing if label_smoothing > 0 else 1.0, dtype=p.dtype, device=p.device)
    kw = kw if weight is None else kw * _per_class(weight, p)
    if v is not None:
        v = _wide(v)
        mean, whole = (p * v).sum(1, keepdim=True), mass.sum(1, keepdim=True)
        of_dloss, dx, dq = v * (whole * p - mass), factor * whole * p * (v - mean), factor * kw * (mean - v)
    if u is not None:
        wu = kw * _wide(u)
        of_dloss, dx = of_dloss - wu * log_p, dx - factor * (wu - p * wu.sum(1, keepdim=True))
    of_rows = of_dloss.sum(1, keepdim=True)
    of_dloss = of_rows if total is None else of_rows / total.masked_fill(total == 0, 1)
    if ignored is not None:
        of_dloss, dx = of_dloss.masked_fill(ignored, 0), dx.masked_fill(ignored, 0)
    of_dloss = of_dloss.squeeze(1) if dloss.dim() else of_dloss.sum()
    return of_dloss.to(dloss.dtype), dx.to(x.dtype), None if dq is None else dq.to(x.dtype)
