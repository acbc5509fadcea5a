"""The operations with the signatures of torch.nn.functional.

Tensor-likes that override PyTorch's functions (`__torch_function__`: torch.fx, subclasses) override these as well.
What Triton serves (see :mod:`fusednn.dispatch`) is flattened to matrices and handed to :mod:`fusednn.ops`. Everything
else goes to PyTorch's own function as it came: a plain CPU tensor, which so costs what PyTorch costs, and arguments
that no kernel takes, which PyTorch then serves (and `explain` says so) or refuses with its own exception.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import arguments, dispatch, internals, ops, reference


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: input [*, K], weight [N, K], bias [N] or None, of one dtype and device -> [*, N].

    float64, float32, float16 or bfloat16; sums run in float32 (float64 for float64). float32 products are exact unless
    `torch.backends.cuda.matmul.fp32_precision` allows TF32. Under autocast the operands are cast as PyTorch casts them.
    Saves input and weight for backward. Wrong shapes, dtypes and devices raise what torch.nn.functional.linear raises.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias)
    if type(input) is Tensor and input.is_cpu and _are_plain(weight, bias):
        return F.linear(input, weight, bias)
    if not (isinstance(input, Tensor) and dispatch.serves("linear", input)):
        return _pytorch(reference.linear, input, weight, bias)
    return _linear(input, weight, bias, False)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x Wᵀ + b), as :func:`linear` in all else. The kernel of the product applies the ReLU.

    Saves input, weight and output for backward, and no pre-activation. The gradient passes where not (output <= 0): it
    is zero at zero and passes where the output is NaN, as in torch.relu.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
    if type(input) is Tensor and input.is_cpu and _are_plain(weight, bias):
        return torch.relu(F.linear(input, weight, bias))
    if not (isinstance(input, Tensor) and dispatch.serves("linear_relu", input)):
        return _pytorch(reference.linear_relu, input, weight, bias)
    return _linear(input, weight, bias, True)


def _are_plain(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether such operands of a CPU tensor are PyTorch's, and nobody asked to be told: what is quick to see."""
    if dispatch.INTERPRETED or dispatch.watched() or not isinstance(weight, Tensor) or not weight.is_cpu:
        return False
    return bias is None or (isinstance(bias, Tensor) and bias.is_cpu)


def _pytorch(operation: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`operation` of PyTorch, which refuses what is wrong with the arguments, but reads past a meta tensor's end."""
    _refuse_meta(x, weight=w, bias=b)
    return operation(x, w, b)


def _refuse_meta(x: Tensor, **operands: Tensor | None) -> None:
    """Raise RuntimeError where one of `operands` is a meta tensor and one not on the device of `x`."""
    if any(getattr(tensor, "is_meta", False) for tensor in operands.values()):
        for name, tensor in operands.items():
            if isinstance(tensor, Tensor) and tensor.device != x.device:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, "
                    f"but input is on {x.device} and {name} is on {tensor.device}"
                )


def _linear(x: Tensor, w: Tensor, b: Tensor | None, relu: bool) -> Tensor:
    kind = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, w, b = _autocast(x, dtype), _autocast(w, dtype), None if b is None else _autocast(b, dtype)
    if not arguments.takes_linear(x, w, b):
        y = _pytorch(reference.linear_relu if relu else reference.linear, x, w, b)
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (w, b)]
        dispatch.overrule("linear_relu" if relu else "linear", f"no kernel for weight {shapes[0]}, bias {shapes[1]}")
        return y
    if dispatch.watched() and not torch.compiler.is_compiling():
        _tell(x, w, "linear_relu" if relu else "linear")
    if x.dim() == 2:
        return ops.linear(x, w, b, relu)
    if x.dim() == 1:
        return ops.linear(x.unsqueeze(0), w, b, relu).squeeze(0)
    return ops.linear(x.flatten(0, -2), w, b, relu).view(*x.shape[:-1], w.shape[0])


def _tell(x: Tensor, w: Tensor, operation: str) -> None:
    """What `explain` says beyond who serves: a product for the library, and a copy."""
    if ops.is_library(x.numel() // max(1, w.shape[1]), *w.shape):
        words = f"{x.dtype}, a product for PyTorch's library by the configuration table; the ReLU's mask apart"
        dispatch.overrule(operation, words, "cuBLAS" if x.is_cuda and not torch.version.hip else "PyTorch's library")
    leading = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in pairwise(leading)):
        copied = "a copy makes the leading dimensions one, which their strides do not allow"
        dispatch.note(dispatch.Decision("input", "copied", copied))


def _autocast(tensor: Any, dtype: torch.dtype) -> Any:
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
    """The cross entropy of logits and class indices or class probabilities: :func:`torch.nn.functional.cross_entropy`.

    input [N, C], [N, C, d1, ...] or [C]: float64, float32, float16 or bfloat16. target: labels of input's shape without
    C, int64, int32, int16, int8 or uint8, or probabilities of input's shape and a floating dtype. weight: [C]. The loss
    is 0-d, or has the labels' shape for the reduction "none"; it has the input's dtype, float32 under autocast.

    The mean over no rows is NaN, with zero gradients, as in PyTorch. With the kernels an ignored row has a zero
    gradient even where its logits are NaN. Inputs [N, C, d1, ...] are not transposed. They are copied only where d1,
    ... do not form one dimension.

    Where a program holds a row (32,768 classes of float32; docs/limits.md has the others), the forward computes the
    gradient and saves it in the place of the logits. Of longer rows it saves the logits and three numbers a row, and
    backward reads the logits again.

    Raises what PyTorch raises for wrong arguments. A label out of range raises IndexError on a CPU. On a GPU it makes
    its row's loss and gradient NaN (see :func:`fusednn.check_labels`).
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight=weight, size_average=size_average,
            ignore_index=ignore_index, reduce=reduce, reduction=reduction, label_smoothing=label_smoothing,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = internals.legacy_reduction(size_average, reduce)
    if type(input) is Tensor and input.is_cpu and _are_plain(target, weight):
        is_small = target.dtype is not torch.int64 and target.dtype in arguments.LABELS
        if is_small and (refusal := dispatch.without_memory(target)):
            raise RuntimeError(f"target: {refusal}")  # it is cast before PyTorch sees it
        return F.cross_entropy(
            input, reference.as_long(target), weight, None, ignore_index, None, reduction, label_smoothing
        )
    serves = isinstance(input, Tensor) and dispatch.serves("cross_entropy", input)
    if serves and torch.is_autocast_enabled(input.device.type):
        input, target, weight = (_autocast(tensor, torch.float32) for tensor in (input, target, weight))
    if not serves or (
        refusal := arguments.cross_entropy_refusal(input, target, weight, ignore_index, reduction, label_smoothing)
    ):
        loss = reference.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        if serves:
            dispatch.overrule("cross_entropy", f"no kernel for {refusal}")
        return loss
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    shape, x = target.shape, _matrix(input, input)
    if not target.is_floating_point():
        labels = target if input.dim() == 2 else target.reshape(-1) if x.dim() == 2 else target.flatten(1)
        loss = ops.cross_entropy(x, labels, _contiguous(weight), ignore_index, reduction, smoothing)
        return loss.reshape(shape) if reduction == "none" else loss
    dtype = torch.promote_types(input.dtype, target.dtype)
    dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    x, q, weight = x.to(dtype), _matrix(target, input).to(dtype), None if weight is None else weight.to(dtype)
    loss = ops.soft_cross_entropy(x, q, _contiguous(weight), reduction, smoothing)
    return loss.reshape(arguments.without_classes(shape)) if reduction == "none" else loss


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return weight if weight is None else weight.contiguous()


def _matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """[N, C, d1, ...] as [M, C] where the classes of `like`, of this shape, lie side by side, else as [N, C, D]."""
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    if like.stride(1) == 1:
        return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])
    return tensor.flatten(2)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` without the logits whole in memory.

    The arguments are those of `torch.nn.functional.linear_cross_entropy` (torch 2.13), and `chunk_rows`, the number of
    rows whose logits exist at once. By default it is a tenth of the rows, and at most 256 MiB of logits. In half
    precision it may be as many rows as K, and 512 MiB, if that is more. `options.batch_chunk_size` sets it too; other
    `options` are ignored.

    input [N, K] or [K], linear_weight [V, K] and linear_bias [V] or None have one dtype; target has labels [N] or [];
    weight is [V]. The loss is as :func:`cross_entropy` gives it. PyTorch multiplies the matrices, and our kernel makes
    a chunk's logits their gradient in place. The gradients of weight and bias are summed in float32. The forward saves
    the inputs and, for the mean and the sum, the gradients. For "none" backward computes the logits again. Derivatives
    of gradients, class probabilities and a linear_weight of more dimensions take the logits whole.

    Raises what PyTorch raises for wrong arguments, TypeError for a chunk_rows that is no int, ValueError for one below
    1.
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
            chunk_rows=chunk_rows,
        )  # fmt: skip
    if isinstance(input, Tensor):
        _refuse_meta(input, linear_weight=linear_weight, linear_bias=linear_bias)
    if chunk_rows is None:
        chunk_rows = getattr(options, "batch_chunk_size", None)
    if not (chunk_rows is None or type(chunk_rows) is int):
        raise TypeError(f"chunk_rows must be an int, got {chunk_rows!r}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if arguments.logits_are_whole(input, linear_weight, target, linear_bias, ignore_index):
        logits = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
        logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
        ignored = -100 if ignore_index is None else ignore_index
        return cross_entropy(
            logits, target, weight, ignore_index=ignored, reduction=reduction, label_smoothing=label_smoothing
        )
    serves = isinstance(input, Tensor) and dispatch.serves("linear_cross_entropy", input)
    x, w, b, ignored, loss_dtype = (
        input,
        linear_weight,
        linear_bias,
        -100 if ignore_index is None else ignore_index,
        None,
    )
    if serves and torch.is_autocast_enabled(input.device.type):
        x, w, b = (_autocast(tensor, torch.get_autocast_dtype(input.device.type)) for tensor in (x, w, b))
        loss_dtype, weight = torch.promote_types(x.dtype, torch.float32), _autocast(weight, torch.float32)
    rest = (loss_dtype, weight, ignored, reduction, label_smoothing)
    if not serves or (refusal := arguments.linear_cross_entropy_refusal(x, w, target, b, *rest)):
        loss = reference.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
        if serves:
            dispatch.overrule("linear_cross_entropy", f"no kernel for {refusal}")
        return loss
    rows, labels = (x, target) if x.dim() == 2 else (x.unsqueeze(0), target.unsqueeze(0))
    if chunk_rows is None:
        width = w.shape[1] if w.itemsize < 4 else 0  # dW is summed in more bytes than it has in the end
        chunk_rows = ops.chunk_size(rows.shape[0], w.shape[0], w.itemsize, width)
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    loss = ops.linear_cross_entropy(
        rows, w, b, labels, _contiguous(weight), ignored, reduction, smoothing, chunk_rows
    ).to(loss_dtype or x.dtype)
    return loss.reshape(target.shape) if reduction == "none" else loss
