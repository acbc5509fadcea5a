"""Which arguments the kernels take. What they do not, PyTorch serves, or refuses in its own words."""

import torch
from torch import Tensor

from . import dispatch, internals

LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""The dtypes of labels."""


def takes_linear(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Whether the arguments are ones that the kernels take."""
    if not (isinstance(w, Tensor) and w.dim() == 2 and x.dim() and x.shape[-1] == w.shape[1]):
        return False
    if x.dtype is not w.dtype or x.device != w.device or w.layout is not torch.strided:
        return False
    if b is None:
        return True
    if not (isinstance(b, Tensor) and b.dim() == 1 and b.shape[0] == w.shape[0]):
        return False
    return b.dtype is x.dtype and b.device == x.device and b.layout is torch.strided


def cross_entropy_refusal(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> str | None:
    """What of the arguments no kernel takes, or None."""
    if not isinstance(target, Tensor) or target.device != input.device or target.layout is not torch.strided:
        return "this target"
    if input.dim() == 0 or input.shape[min(1, input.dim() - 1)] == 0:
        return f"an input of shape {list(input.shape)}"
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return f"ignore_index {ignore_index!r}"
    if target.is_floating_point():
        probabilities = target.shape == input.shape and target.dtype in dispatch.DTYPES and ignore_index < 0
        if not probabilities:
            return f"a target of shape {list(target.shape)} and {target.dtype}"
    elif not (target.dtype in LABELS and target.shape == without_classes(input.shape)):
        return f"a target of shape {list(target.shape)} and {target.dtype}"
    if weight is not None and not _takes_weight(weight, input, target):
        return "this weight"
    if type(label_smoothing) not in (float, int) or label_smoothing > 1.0:
        return f"label_smoothing {label_smoothing!r}"
    return None if reduction in ("none", "mean", "sum") else f"the reduction {reduction!r}"


def _takes_weight(weight: Tensor, input: Tensor, target: Tensor) -> bool:
    """Whether the class weights are ones that the kernels take: constants of the logits' dtype, one for each class."""
    if not isinstance(weight, Tensor) or weight.device != input.device or weight.layout is not torch.strided:
        return False
    # a torch.func transform may want a gradient of it that requires_grad does not tell of
    if (weight.requires_grad and torch.is_grad_enabled()) or internals.transforming():
        return False
    if weight.dim() != 1 or weight.shape[0] != input.shape[min(1, input.dim() - 1)]:
        return False
    return weight.dtype in dispatch.DTYPES if target.is_floating_point() else weight.dtype is input.dtype


def without_classes(shape: torch.Size) -> torch.Size:
    """[N, d1, ...] of [N, C, d1, ...], [] of [C]."""
    return shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]


def logits_are_whole(x: Tensor, w: Tensor, target: Tensor, b: Tensor | None, ignore_index: int | None) -> bool:
    """Whether the target is as large as the logits, or W has more dimensions than two, and all shapes are right."""
    if not (isinstance(x, Tensor) and isinstance(w, Tensor) and isinstance(target, Tensor)):
        return False
    if x.dim() not in (1, 2) or w.dim() < 2 or x.shape[-1] != w.shape[-1] or (w.dim() > 2 and x.dim() == 1):
        return False
    if b is not None and not (isinstance(b, Tensor) and b.shape == w.shape[:-1]):
        return False
    probabilities = target.shape == x.shape[:-1] + w.shape[:-1]
    return ignore_index is None if probabilities else w.dim() > 2


def linear_cross_entropy_refusal(
    x: Tensor, w: Tensor, target: Tensor, b: Tensor | None, loss_dtype: torch.dtype | None, weight: Tensor | None,
    ignore_index: int, reduction: str, label_smoothing: float,
) -> str | None:  # fmt: skip
    """What of the arguments no kernel takes, or None, where the logits are not whole; they have `loss_dtype`."""
    if x.dim() not in (1, 2) or not takes_linear(x, w, b):
        return "these shapes, dtypes and devices"
    if isinstance(target, Tensor) and target.is_floating_point():
        return "probabilities with an ignore_index"
    logits = x.new_empty((), dtype=loss_dtype).expand(*x.shape[:-1], w.shape[0])
    return cross_entropy_refusal(logits, target, weight, ignore_index, reduction, label_smoothing)
