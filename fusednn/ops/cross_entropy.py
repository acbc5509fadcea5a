"""Cross entropy of logits [M, C] and class indices [M]: two operators and the autograd.Function around them.

The forward computes the gradient in the same pass, and the Function returns it as a second, differentiable output that
it saves. With s the scale of a row (1, 1 / count for the mean, 0 where ignored), p the softmax and q the label's
distribution, grad = s (p - q); backward is dloss · grad, and what flows into grad itself, v, adds s p ∘ (v - <p, v>).
p is recovered from grad, so the logits are not kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import define, eager, kernels, needs_graph, recorded


def _forward(
    x: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    if target.is_cpu:
        target = target.long()  # or -100 would be compared as the 156 that it is in uint8
        bad = target[((target < 0) | (target >= x.shape[1])) & (target != ignore_index)]
        if bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds.")
    results: tuple[Tensor, Tensor] = kernels("cross_entropy").cross_entropy_forward(
        x, target, ignore_index, reduction, label_smoothing, needs_grad
    )
    return results


def _forward_fake(
    x: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    m, c = x.shape
    return x.new_empty((m,) if reduction == "none" else ()), x.new_empty((m, c) if needs_grad else (0,))


_cross_entropy: Callable[..., tuple[Tensor, Tensor]] = define(
    "cross_entropy(Tensor x, Tensor target, int ignore_index, str reduction, float label_smoothing, bool needs_grad)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_scale_gradient: Callable[..., Tensor] = define(
    "scale_gradient(Tensor dloss, Tensor grad, Tensor target, int ignore_index) -> Tensor",
    lambda *arguments: kernels("cross_entropy").scale_gradient(*arguments, in_place=False),
    lambda dloss, grad, target, ignore_index: torch.empty_like(grad),
)


def cross_entropy(x: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float) -> Tensor:
    """The loss, [M] for the reduction "none" and else 0-d, of logits x [M, C] and labels [M]."""
    if needs_graph(x):
        loss, _ = _record(x, target, ignore_index, reduction, label_smoothing)
    else:
        loss, _ = _cross_entropy(x, target, ignore_index, reduction, label_smoothing, False)
    return loss


class CrossEntropy(torch.autograd.Function):
    """Loss and gradient. Saves the gradient, which no one else holds, and the labels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        return _cross_entropy(x, target, ignore_index, reduction, label_smoothing, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, target, ctx.ignore_index, ctx.reduction, ctx.label_smoothing = inputs
        ctx.set_materialize_grads(False)
        # A hook on saved tensors may keep what it was given.
        ctx.private = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        ctx.save_for_backward(output[1], target)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, target = ctx.saved_tensors
        second = None
        if v is not None:  # before `grad` may be scaled
            second = _second_derivative(grad, target, v, ctx.ignore_index, ctx.reduction, ctx.label_smoothing)
        if dloss is None:
            return second, None, None, None, None
        if torch.is_grad_enabled():
            ctx.private = False  # the graph that is being made keeps it
            dloss = dloss.unsqueeze(-1) if dloss.dim() else dloss
            dx = torch.where((target.long() == ctx.ignore_index).unsqueeze(-1), 0, grad * dloss)
        else:
            dx = _scale(dloss, grad, target, ctx.ignore_index, ctx.private)
        return dx if second is None else dx + second, None, None, None, None


_record: Callable[..., tuple[Tensor, Tensor]] = recorded(CrossEntropy)


def _scale(dloss: Tensor, grad: Tensor, target: Tensor, ignore_index: int, private: bool) -> Tensor:
    """dloss · grad, in the buffer of `grad` where this backward is the last to read it and nobody else can."""
    if not eager(dloss, grad):
        return _scale_gradient(dloss, grad, target, ignore_index)
    grad = grad.detach()  # a saved output comes with its graph, which the result must not have
    last = private and not torch._C._autograd._get_current_graph_task_keep_graph()
    scaled: Tensor = kernels("cross_entropy").scale_gradient(dloss, grad, target, ignore_index, in_place=last)
    return scaled


def _second_derivative(
    grad: Tensor, target: Tensor, v: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """s p ∘ (v - <p, v>), with p = grad / s + q; in PyTorch's operators, so of any order."""
    dtype, classes = grad.dtype, grad.shape[-1]
    if dtype in (torch.float16, torch.bfloat16):
        grad, v = grad.float(), v.float()
    target = target.long()
    valid = (target != ignore_index).unsqueeze(-1)
    count = valid.sum() if reduction == "mean" else 1
    is_target = torch.arange(classes, device=grad.device) == target.unsqueeze(-1)
    q = is_target.to(grad.dtype) * (1 - label_smoothing) + label_smoothing / classes
    p = grad * count + q
    return torch.where(valid, p * (v - (p * v).sum(-1, keepdim=True)) / count, 0).to(dtype)
