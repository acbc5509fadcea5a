"""Reads a criterion: the loss that the kernels compute, or why they do not."""

from typing import Any

from torch import Tensor, nn

from .. import modules
from ..kernels.step import Loss
from ..reading import CALLS, GONE, HOOKS, Facts


def refusal(criterion: Any, outputs: int | None, inputs: Tensor, facts: Facts) -> str | None:
    """Why no kernel computes the loss, or None. `outputs` is how many outputs the net has; None is any number.

    `inputs` say in which dtype and on which device. `facts` gets what that rests on.
    """
    if type(criterion) not in (nn.CrossEntropyLoss, modules.CrossEntropyLoss):
        return f"no training kernel for the criterion {getattr(criterion, '__name__', type(criterion).__name__)}"
    facts.attribute(criterion, "__class__")
    if any(facts.attribute(type(criterion), name) is not value for name, value in CALLS):
        return "the criterion has a __call__ of its own"
    own = {name: facts.item(criterion, "__dict__", name) for name in (*_OPTIONS, *_OWN)}
    if not all(own[name] is GONE or own[name] is None for name in _OWN):
        return "the criterion's forward was replaced"
    ignored, reduction, smoothing = (own[name] for name in _OPTIONS)
    if type(ignored) is not int or not -(2**63) <= ignored < 2**63:
        return f"no training kernel for ignore_index {ignored!r}"
    if any(facts.length(criterion, hooks) for hooks in HOOKS):
        return "the criterion has hooks"
    if reduction not in ("mean", "sum") or not isinstance(smoothing, float | int) or not 0.0 <= smoothing <= 1.0:
        return f"no training kernel for reduction {reduction!r}, label_smoothing {smoothing!r}"
    weight = facts.item(criterion, "_buffers", "weight")
    if weight is not None and weight is not GONE:
        plain = (
            weight.dim() == 1
            and weight.is_contiguous()
            and not weight._is_zerotensor()
            and not facts.attribute(weight, "requires_grad")
        )
        if not plain or outputs not in (None, len(weight)):
            return "the class weights have another length than the outputs, gaps or a gradient"
        if facts.attribute(weight, "dtype") != inputs.dtype or weight.device != inputs.device:
            return "the class weights have another dtype or device than the inputs"
    return None


_OWN = ("forward", "_compiled_call_impl", "_call_impl")
_OPTIONS = ("ignore_index", "reduction", "label_smoothing")


def loss_of(criterion: Any) -> Loss:
    """The loss of a criterion that is not refused, as it is now."""
    weighted, smoothed = criterion.weight is not None, criterion.label_smoothing > 0
    return Loss("cross_entropy", criterion.reduction == "mean", weighted, smoothed)
