"""Reads a criterion: the loss that the kernels compute, or why they do not."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import arguments, modules
from ..kernels.step import LOSSES, Loss
from ..reading import CALLS, GONE, HOOKS, Facts


class _Kind(NamedTuple):
    """The loss of a criterion's class, the options that say which, and the buffers with weights of its outputs."""

    loss: str
    options: tuple[str, ...] = ("reduction",)
    buffers: tuple[str, ...] = ()


_CROSS_ENTROPY = _Kind("cross_entropy", ("reduction", "label_smoothing", "ignore_index"), ("weight",))
_KINDS: dict[type, _Kind] = {
    nn.CrossEntropyLoss: _CROSS_ENTROPY,
    modules.CrossEntropyLoss: _CROSS_ENTROPY,
    nn.MSELoss: _Kind("mse"),
    nn.L1Loss: _Kind("l1"),
    nn.SmoothL1Loss: _Kind("smooth_l1", ("reduction", "beta")),
    nn.HuberLoss: _Kind("huber", ("reduction", "delta")),
    nn.BCEWithLogitsLoss: _Kind("bce_with_logits", buffers=("weight", "pos_weight")),
    nn.PoissonNLLLoss: _Kind("poisson_nll", ("reduction", "log_input", "full")),
}
_OWN = ("forward", "_compiled_call_impl", "_call_impl")

LEAST, LARGEST = 2.0**-126, 2.0**127
"""Of beta and delta, so that float32 has them and their reciprocals."""


def refusal(criterion: Any, outputs: int | None, inputs: Tensor, facts: Facts) -> str | None:
    """Why no kernel computes the loss, or None. `outputs` is how many outputs the net has; None is any number.

    `inputs` say in which dtype and on which device. `facts` gets what that rests on, but for :func:`refusal_now`.
    """
    kind = _KINDS.get(type(criterion))
    if kind is None:
        return f"no training kernel for the criterion {getattr(criterion, '__name__', type(criterion).__name__)}"
    facts.attribute(criterion, "__class__")
    if any(facts.attribute(type(criterion), name) is not value for name, value in CALLS):
        return "the criterion has a __call__ of its own"
    own = {name: facts.item(criterion, "__dict__", name) for name in (*kind.options, *_OWN)}
    if not all(own[name] is GONE or own[name] is None for name in _OWN):
        return "the criterion's forward was replaced"
    if any(facts.length(criterion, hooks) for hooks in HOOKS):
        return "the criterion has hooks"
    if (wrong := _options_refusal({name: own[name] for name in kind.options})) is not None:
        return wrong
    for name in kind.buffers:
        weight = facts.item(criterion, "_buffers", name)
        if weight is not None and (weight is GONE or facts.attribute(weight, "requires_grad")):
            return f"the criterion's {name} is no buffer, or wants a gradient"
    return None


def _options_refusal(options: dict[str, Any]) -> str | None:
    """Why the loss is PyTorch's with these options, which works with them or raises its error."""
    ignored = options.get("ignore_index", 0)
    numbers = [options[name] for name in ("beta", "delta") if name in options]
    smoothing = options.get("label_smoothing", 0.0)
    right = (
        options["reduction"] in ("mean", "sum")
        and type(ignored) is int
        and -(2**63) <= ignored < 2**63
        and isinstance(smoothing, float | int)
        and 0.0 <= smoothing <= 1.0
        and all(type(number) in (float, int) and LEAST <= number <= LARGEST for number in numbers)
        and options.get("log_input", True) is True
        and options.get("full", False) is False
    )
    told = ", ".join(f"{name} {value!r}" for name, value in options.items())
    return None if right else f"no training kernel for a loss with {told}"


def refusal_now(criterion: Any, outputs: int | None, inputs: Tensor, targets: Tensor) -> str | None:
    """Why not, of what no fact tells: of the targets, a plain tensor, and of the weights, which may get other data.

    PyTorch computes the loss then, or raises its error or warning. The criterion is none that is refused.
    """
    name = _KINDS[type(criterion)].loss
    for weight in weights_of(criterion):
        if weight is None:
            continue
        if weight.dim() != 1 or outputs not in (None, len(weight)) or not weight.is_contiguous():
            return "the weights of the criterion have another length than the outputs, or gaps"
        if weight.dtype != inputs.dtype or weight.device != inputs.device or weight._is_zerotensor():
            return "the weights of the criterion have another dtype or device than the inputs, or no memory"
    if name == "cross_entropy" and targets.dim() == 1:
        return None if targets.dtype in arguments.LABELS else "the targets are not a vector of labels"
    if targets.dim() != 2 or targets.dtype is not inputs.dtype or outputs not in (None, targets.shape[1]):
        return f"the targets are not {inputs.dtype} of the shape of the outputs"
    if name == "cross_entropy" and criterion.ignore_index >= 0:
        return "PyTorch ignores no index of class probabilities"
    return None


def loss_of(criterion: Any, targets: Tensor) -> Loss:
    """The loss of a criterion that is not refused, as it is now."""
    kind, name = _KINDS[type(criterion)], _name_of(criterion, targets)
    weight, positive = weights_of(criterion)
    numbers: tuple[float, ...] = ()
    if LOSSES[name].numbers:
        numbers = (float(criterion.beta if name == "smooth_l1" else criterion.delta),)
    smoothed = kind is _CROSS_ENTROPY and criterion.label_smoothing > 0
    return Loss(name, criterion.reduction == "mean", weight is not None, smoothed, numbers, positive is not None)


def takes_labels(criterion: Any, targets: Tensor) -> bool:
    """Whether the targets are labels, which may be out of range."""
    return LOSSES[_name_of(criterion, targets)].labels


def _name_of(criterion: Any, targets: Tensor) -> str:
    """That of the loss in LOSSES."""
    kind = _KINDS[type(criterion)]
    return "cross_entropy_probabilities" if kind is _CROSS_ENTROPY and targets.is_floating_point() else kind.loss


def weights_of(criterion: Any) -> tuple[Tensor | None, Tensor | None]:
    """The weights of its classes or outputs, and those of positive targets."""
    kind = _KINDS.get(type(criterion))
    if kind is None or not kind.buffers:
        return None, None
    buffers = criterion._buffers  # a module looks for an attribute in vain for 4 us
    return buffers.get("weight"), buffers.get("pos_weight")


def numbers_of(criterion: Any) -> dict[str, Any]:
    """What a kernel is told that is no part of a Step."""
    if _KINDS[type(criterion)] is not _CROSS_ENTROPY:
        return {"ignore_index": -100, "label_smoothing": 0.0}
    return {"ignore_index": criterion.ignore_index, "label_smoothing": float(criterion.label_smoothing)}
