"""The operations with the signatures of torch.nn.functional.

What Triton serves (see :mod:`fusednn.dispatch`) is flattened to matrices and handed to :mod:`fusednn.ops`. Everything
else goes to PyTorch's own function as it came: a plain CPU tensor, which so costs what PyTorch costs, and arguments
that no kernel takes, which PyTorch then serves (and `explain` says so) or refuses with its own exception.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import _reduction as legacy

from . import dispatch, ops, reference

_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: input [*, K], weight [N, K], bias [N] or None, of one dtype and device -> [*, N].

    float64, float32, float16 or bfloat16; sums run in float32 (float64 for float64). float32 products are exact unless
    `torch.backends.cuda.matmul.fp32_precision` allows TF32. Under autocast the operands are cast as PyTorch casts them.
    Saves input and weight for backward. Wrong shapes, dtypes and devices raise what torch.nn.functional.linear raises.
    """
    if not (isinstance(input, Tensor) and dispatch.serves("linear", input)):
        return _pytorch(reference.linear, input, weight, bias)
    return _linear(input, weight, bias, False)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x Wᵀ + b), as :func:`linear` in all else; the ReLU is part of the product's kernel.

    Saves input, weight and the output for backward, no pre-activation: the gradient passes where not (output <= 0), so
    it is zero at zero and passes a NaN, as in torch.relu.
    """
    if not (isinstance(input, Tensor) and dispatch.serves("linear_relu", input)):
        return _pytorch(reference.linear_relu, input, weight, bias)
    return _linear(input, weight, bias, True)


def _pytorch(operation: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`operation` of PyTorch, which refuses what is wrong with the arguments, but reads past a meta tensor's end."""
    if getattr(w, "is_meta", False) or getattr(b, "is_meta", False):
        for name, tensor in (("weight", w), ("bias", b)):
            if isinstance(tensor, Tensor) and tensor.device != x.device:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, "
                    f"but input is on {x.device} and {name} is on {tensor.device}"
                )
    return operation(x, w, b)


def _linear(x: Tensor, w: Tensor, b: Tensor | None, relu: bool) -> Tensor:
    kind = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, w, b = _autocast(x, dtype), _autocast(w, dtype), None if b is None else _autocast(b, dtype)
    if not _linear_takes(x, w, b):
        y = _pytorch(reference.linear_relu if relu else reference.linear, x, w, b)
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (w, b)]
        dispatch.overrule("linear_relu" if relu else "linear", f"no kernel for weight {shapes[0]}, bias {shapes[1]}")
        return y
    if x.dim() == 2:
        return ops.linear(x, w, b, relu)
    if x.dim() == 1:
        return ops.linear(x.unsqueeze(0), w, b, relu).squeeze(0)
    return ops.linear(x.flatten(0, -2), w, b, relu).view(*x.shape[:-1], w.shape[0])


def _linear_takes(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Whether the arguments are ones that the kernels take; what is not is left to PyTorch."""
    if not (isinstance(w, Tensor) and w.dim() == 2 and x.dim() and x.shape[-1] == w.shape[1]):
        return False
    if x.dtype is not w.dtype or x.device != w.device or w.layout is not torch.strided:
        return False
    if b is None:
        return True
    if not (isinstance(b, Tensor) and b.dim() == 1 and b.shape[0] == w.shape[0]):
        return False
    return b.dtype is x.dtype and b.device == x.device and b.layout is torch.strided


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as autocast hands it to an operator of `dtype`: cast if floating, but float64 stays."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy of logits and class indices, as :func:`torch.nn.functional.cross_entropy`.

    input [N, C] or [C], float64, float32, float16 or bfloat16; target [N] or [], int64, int32, int16, int8 or uint8 ->
    a 0-d loss, or one of the target's shape for the reduction "none", in the input's dtype (float32 under autocast).
    The mean over no rows is NaN, with zero gradients, as in PyTorch. The gradient is computed by the forward, if one is
    needed, and saved instead of the logits.

    Raises what PyTorch raises for wrong arguments; a label out of range raises IndexError on a CPU and makes its row's
    loss and gradient NaN on a GPU. Class weights, class probabilities and inputs [N, C, d1, ...] are not implemented
    yet and raise NotImplementedError.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    _refuse_unfinished(input, target, weight)
    serves = isinstance(input, Tensor) and dispatch.serves("cross_entropy", input)
    if not (serves and _cross_entropy_takes(input, target, ignore_index, reduction, label_smoothing)):
        loss = reference.cross_entropy(
            input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        if serves:
            dispatch.overrule(
                "cross_entropy", f"no kernel for ignore_index {ignore_index!r}, label_smoothing {label_smoothing!r}"
            )
        return loss
    if torch.is_autocast_enabled(input.device.type):
        input = _autocast(input, torch.float32)
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    if input.dim() == 2:
        return ops.cross_entropy(input, target, ignore_index, reduction, smoothing)
    loss = ops.cross_entropy(input.unsqueeze(0), target.unsqueeze(0), ignore_index, reduction, smoothing)
    return loss.squeeze(0) if reduction == "none" else loss


def _refuse_unfinished(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if weight is not None:
        raise NotImplementedError("cross_entropy: weight (class weights) is not implemented yet")
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        return
    if input.shape == target.shape and target.is_floating_point():
        raise NotImplementedError("cross_entropy: class probabilities as target are not implemented yet")
    if input.dim() > 2 and target.dim() == input.dim() - 1:
        raise NotImplementedError(
            f"cross_entropy: K-dimensional input is not implemented yet, got input of shape {list(input.shape)}"
        )


def _cross_entropy_takes(
    input: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> bool:
    """Whether the arguments are right; what is not is left to PyTorch to refuse."""
    return (
        isinstance(target, Tensor)
        and target.dtype in _LABELS
        and target.device == input.device
        and input.dim() in (1, 2)
        and target.shape == input.shape[:-1]
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and reduction in ("none", "mean", "sum")
        and type(label_smoothing) in (float, int)
        and not label_smoothing > 1.0
    )
