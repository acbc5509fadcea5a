"""The modules: drop-in for nn.Linear, nn.Linear with a ReLU, nn.CrossEntropyLoss, and the textbook SimpleNN."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, functional, internals, reference


def as_plain(module: nn.Module, kind: Any, ours: Any = None) -> nn.Module:
    """A module of PyTorch's class `kind` that has the parameters, hooks and modules of `module`.

    Or `module` itself, if it is of a subclass of `ours` with another forward.
    """
    if ours is not None and type(module).forward is not ours.forward:
        return module
    plain: nn.Module = kind.__new__(kind)
    plain.__dict__.update(module.__dict__)
    plain.__dict__["_modules"] = dict(module._modules)  # torch.jit.script puts others into it
    return plain


class Linear(nn.Linear):
    """nn.Linear, same parameters and initial values, served by :func:`fusednn.functional.linear`."""

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """x Wᵀ + b [*, out_features] of input [*, in_features]; with `relu`, the ReLU of it in the same kernel."""
        operation = functional.linear_relu if relu else functional.linear
        return operation(input, self.weight, self.bias)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script, which compiles no Triton kernel, makes a script of."""
        return as_plain(self, nn.Linear, Linear)


class LinearReLU(nn.Linear):
    """relu(nn.Linear(x)), same parameters and initial values, served by :func:`fusednn.functional.linear_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """relu(x Wᵀ + b) [*, out_features] of input [*, in_features]."""
        return functional.linear_relu(input, self.weight, self.bias)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script, which compiles no Triton kernel, makes a script of."""
        return as_plain(self, _PlainLinearReLU, LinearReLU)


class _PlainLinearReLU(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(input, self.weight, self.bias))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss, same arguments, served by :func:`fusednn.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits `input` [N, C], [N, C, d1, ...] or [C] and labels or class probabilities `target`."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script, which compiles no Triton kernel, makes a script of."""
        return as_plain(self, nn.CrossEntropyLoss, CrossEntropyLoss)


_LinearCrossEntropyLoss: Any = getattr(nn, "LinearCrossEntropyLoss", nn.modules.loss._WeightedLoss)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):  # type: ignore[misc]
    """nn.Linear, by default without a bias, and the cross entropy of its output: as in torch 2.13, also for older.

    Same arguments, parameters (`linear.weight`, [C · prod(out_features), in_features]) and initial values, and
    `chunk_rows`; served by :func:`fusednn.functional.linear_cross_entropy`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        chunk_rows: int | None = None,
    ) -> None:
        """Raises RuntimeError for class weights of another shape than [C] and a smoothing outside [0, 1]."""
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        nn.modules.loss._WeightedLoss.__init__(self, weight=weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
        self.options, self.chunk_rows = options, chunk_rows

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` [N, in_features] or [in_features] and labels or class probabilities `target`."""
        shape = (self.num_classes, *self.out_features)
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, -1),
            target,
            linear_bias=None if self.linear.bias is None else self.linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            chunk_rows=self.chunk_rows,
        )


class SimpleNN(nn.Module):
    """The textbook network: Linear, ReLU, Linear, of which the first two run as one kernel.

    `fc1`, `relu` and `fc2` are real modules. The fused layer runs through the call of `fc1`, so its pre-hooks fire. The
    three run one by one if a user could see the difference: if `relu` has a hook, if a hook of `fc1` sees its output,
    or if another module stands in the place of either. `explain` says so.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Weights [hidden_size, input_size] and [output_size, hidden_size], initialised as nn.Linear does."""
        super().__init__()
        self.fc1: nn.Module = Linear(input_size, hidden_size, bias, device, dtype)
        self.relu: nn.Module = nn.ReLU()
        self.fc2: nn.Module = Linear(hidden_size, output_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [*, output_size] of x [*, input_size]."""
        children = self._modules  # nn.Module looks in three dicts for an attribute, and then here
        fc1, relu = children.get("fc1") or self.fc1, children.get("relu") or self.relu
        if _fusible(fc1, relu):
            hidden = fc1(x, relu=True)
        else:
            dispatch.note(dispatch.Decision("relu", "PyTorch", "fc1 or relu has hooks or was replaced"))
            hidden = relu(fc1(x))
        logits: Tensor = (children.get("fc2") or self.fc2)(hidden)
        return logits

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script, which compiles no Triton kernel, makes a script of."""
        return as_plain(self, reference.SimpleNN, SimpleNN)


def _fusible(fc: nn.Module, relu: nn.Module) -> bool:
    """Whether fc(x, relu=True) does all that relu(fc(x)) does."""
    return type(relu) is nn.ReLU and type(fc).forward is Linear.forward and unobserved(fc, relu)


def unobserved(fc: nn.Module, relu: nn.Module) -> bool:
    """Whether no hook, of either module or of all, and no replaced forward tells relu(fc(x)) from the two in one."""
    ours, theirs = fc.__dict__, relu.__dict__  # twice as quick as attributes
    with_kwargs = ours["_forward_pre_hooks_with_kwargs"]  # such a hook sees, and could drop, the argument that fuses
    if with_kwargs and _tell(ours["_forward_pre_hooks"][key] for key in with_kwargs):
        return False
    if ours["_forward_hooks"] and _tell(ours["_forward_hooks"].values()):
        return False
    if theirs["_forward_hooks"] or theirs["_forward_pre_hooks"] or internals.has_global_hook():
        return False
    if ours["_backward_hooks"] or theirs["_backward_hooks"]:
        return False
    if ours["_backward_pre_hooks"] or theirs["_backward_pre_hooks"]:
        return False
    return "forward" not in ours and "forward" not in theirs


def _tell(hooks: Iterable[Any]) -> bool:
    """Whether one of `hooks` could tell. FSDP2's cannot: they gather parameters, cast, and pass on the rest."""
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.") for hook in hooks)
