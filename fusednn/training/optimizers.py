"""Reads an optimizer: whether the kernels make its steps, or why not."""

from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim import optimizer as torch_optimizer

from ..kernels.step import RULES
from ..reading import GONE, Facts
from .formulas import rule_name

NUMBERS: dict[type[Optimizer], tuple[str, ...]] = {
    Adam: ("weight_decay", "eps"), AdamW: ("weight_decay", "eps"), RAdam: ("weight_decay", "eps"),
    NAdam: ("weight_decay", "eps", "momentum_decay"), Adagrad: ("weight_decay", "eps", "lr_decay"),
    RMSprop: ("weight_decay", "eps", "alpha", "momentum"), SGD: ("weight_decay", "momentum", "dampening"),
}  # fmt: skip
"""The optimizers whose steps kernels make, and their options that are numbers, beside lr and betas."""

LEAST_EPS = 2.0**-126
"""The smallest normal number of float32: of a smaller one a GPU makes 0, of 0 NaN where there is no gradient, also
behind the edges of a parameter, and of the root of a negative one NaN."""


def refusal(optimizer: Optimizer, parameters: list[Tensor], schedule: Any, facts: Facts) -> str | None:
    """Why no kernel makes the steps of `optimizer` for exactly these `parameters`, or None if one does.

    `facts` gets what that rests on, but for :func:`refusal_now`.
    """
    kind = type(optimizer)
    if kind not in NUMBERS:
        return f"no kernel for the optimizer {kind.__module__}.{kind.__qualname__}"
    if schedule is not None and not _only_sets_options(schedule):
        return f"no kernel for the schedule {type(schedule).__qualname__}, which may look at the parameters"
    if schedule is not None and kind in (SGD, RMSprop) and _may_cycle_momentum(schedule):
        return "the schedule may change the momentum"
    if sorted(_held(optimizer)) != sorted(map(id, parameters)):
        return "the optimizer's parameters are not exactly the model's"
    hooks = (
        (optimizer, "_optimizer_step_pre_hooks"), (optimizer, "_optimizer_step_post_hooks"),
        (torch_optimizer, "_global_optimizer_pre_hooks"), (torch_optimizer, "_global_optimizer_post_hooks"),
    )  # fmt: skip
    pointers = [tensor.data_ptr() for tensor in states_of(optimizer, parameters)]
    if len({*pointers}) < len(pointers):
        return "two parts of the optimizer's state are one"
    if any(facts.length(owner, name) for owner, name in hooks):
        return "the optimizer has hooks"
    replaced = facts.item(optimizer, "__dict__", "zero_grad") is not GONE
    if replaced or facts.attribute(kind, "zero_grad") is not _ZERO_GRAD:
        return "the optimizer's zero_grad was replaced"
    scales = [facts.item(optimizer, "__dict__", name) for name in ("grad_scale", "found_inf")]
    if any(scale is not GONE and scale is not None for scale in scales):
        return "gradients are scaled"
    groups, on_cpu = optimizer.param_groups, parameters[0].is_cpu
    facts.attribute(optimizer, "param_groups", held=True)
    facts.length(optimizer, "param_groups")
    for group in groups:
        options = {name: facts.item(group, None, name) for name in group if name not in _LR}
        if (refusal := _options_refusal(options, kind, on_cpu, facts)) is not None:
            return refusal
    rules = {rule_name(kind, group) for group in groups}
    if len(rules) > 1:
        return f"groups with different rules: {', '.join(sorted(rules))}"
    if len({group.get("decoupled_weight_decay") for group in groups}) > 1:
        return "groups with and without decoupled weight decay"
    names = RULES[rules.pop()].states
    facts.attribute(optimizer, "state", held=True)
    for parameter in parameters:
        state = facts.item(optimizer, "state", parameter, held=True)
        if state is not GONE and (refusal := _state_refusal(state, parameter, kind, names, facts)) is not None:
            return refusal
    return None


def states_of(optimizer: Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    """The tensors of the state of these parameters."""
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


_LR = ("lr", "initial_lr", "max_lr", "min_lr")


def _held(optimizer: Optimizer) -> list[int]:
    """Which parameters it has."""
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def refusal_now(optimizer: Optimizer, parameters: list[Tensor]) -> str | None:
    """Why not, of what no fact tells: a schedule sets the learning rate at each step, and lists change unseen."""
    if not _is_torchs(optimizer.step, type(optimizer)):
        return "the optimizer's step was replaced"
    held = _held(optimizer)
    if held != (own := [*map(id, parameters)]) and sorted(held) != sorted(own):
        return "the optimizer's parameters are not exactly the model's"
    for group in optimizer.param_groups:
        if type(lr := group["lr"]) is not float and (refusal := _lr_refusal(lr)) is not None:
            return refusal
    return None


def _lr_refusal(lr: Any) -> str | None:
    if isinstance(lr, Tensor):
        return "the option lr is a tensor of several numbers" if lr.numel() != 1 or lr.is_complex() else None
    return _number_refusal(lr)


def _number_refusal(number: Any) -> str | None:
    """Why no kernel takes this number as an option: torch.optim works with it in its own way, or raises an error."""
    if isinstance(number, float) or (type(number) is int and abs(number) < 2**53):
        return None
    if isinstance(number, Tensor):
        return "an option other than lr is a tensor"
    return f"an option is {number!r}, a {type(number).__name__}, and no plain number"


def _options_refusal(group: dict[str, Any], kind: type[Optimizer], on_cpu: bool, facts: Facts) -> str | None:
    """Why the options of a group are the loop's, which works with them as torch.optim does, or raises its error."""
    if group.get("differentiable"):
        return "no kernel for the option differentiable"
    if on_cpu and group.get("capturable"):
        return "capturable on a CPU, which torch.optim does not do"
    betas: Any = ()
    numbers = [group[name] for name in NUMBERS[kind]]
    if "betas" in group:
        betas = group["betas"]
        if type(betas) not in (tuple, list) or len(betas) != 2:
            return f"the option betas is {betas!r}"
        if type(betas) is list or any(isinstance(beta, Tensor) for beta in betas):
            facts.never()
        if any(isinstance(beta, Tensor) and (beta.numel() != 1 or not beta.is_cpu) for beta in betas):
            return "the option betas is a tensor on a device"
        betas = tuple([float(beta) if isinstance(beta, Tensor) else beta for beta in betas])
        numbers += betas
    for number in numbers:
        if (refusal := _number_refusal(number)) is not None:
            return refusal
    if "eps" in NUMBERS[kind] and not group["eps"] >= LEAST_EPS:
        return f"the option eps is {group['eps']!r}"
    return None if all(0 <= beta < 1 for beta in betas) else f"the option betas is {betas!r}"


def _state_refusal(
    state: dict[str, Any], parameter: Tensor, kind: type[Optimizer], names: tuple[str, ...], facts: Facts
) -> str | None:
    """Why the state of a parameter is not as torch.optim leaves it, for a kernel to go on with."""
    if not state:
        facts.never()
        return None
    states = {name: facts.item(state, None, name) for name in (("momentum_buffer",) if kind is SGD else names)}
    for name, tensor in states.items():
        if isinstance(tensor, Tensor) and not _alike(tensor, parameter):
            return f"the optimizer's {name} has another dtype, device or layout than its parameter"
    if kind is SGD:
        return None
    numbers = [facts.item(state, None, name) for name in ("step", "mu_product")[: 2 if kind is NAdam else 1]]
    complete = all(isinstance(tensor, Tensor) for tensor in (*states.values(), *numbers))
    if not complete or any(n.dim() or n.dtype not in (torch.float32, torch.float64) for n in numbers):
        return f"the optimizer's state is not {kind.__name__}'s"
    return None


_ZERO_GRAD = Optimizer.zero_grad


def zero_grad_was_replaced(optimizer: Optimizer) -> bool:
    """Whether `optimizer` has another zero_grad than torch.optim's."""
    return "zero_grad" in vars(optimizer) or type(optimizer).zero_grad is not _ZERO_GRAD


def zero_grad(optimizer: Optimizer) -> None:
    """optimizer.zero_grad(), without what torch.optim does around it for a profiler."""
    if zero_grad_was_replaced(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


_STEPS: "WeakKeyDictionary[Any, type]" = WeakKeyDictionary()
"""Functions that were found to be the step of an optimizer of torch.optim, and whose."""


def _is_torchs(step: Any, kind: type) -> bool:
    """Whether a step is that of torch.optim, in which it lies wrapped, by torch.optim itself and by its schedulers.

    The names and attributes of a function say nothing of that: functools.wraps copies them.
    """
    outermost = getattr(step, "__func__", step)
    if not isinstance(outermost, FunctionType):
        return False
    if _STEPS.get(outermost) is kind:
        return True
    modules, where = {base.__module__ for base in kind.__mro__}, None
    while step is not None:
        function = getattr(step, "__func__", step)
        where = getattr(function, "__globals__", {}).get("__name__")
        if where not in modules | {"torch.optim.optimizer", "torch.optim.lr_scheduler"}:
            return False
        step = vars(function).get("__wrapped__")
    if where in modules:
        _STEPS[outermost] = kind
    return where in modules


def _only_sets_options(schedule: Any) -> bool:
    """Whether `schedule` may be stepped ahead of the training: it looks at options and its own count alone."""
    if type(schedule).__module__ not in ("torch.optim.lr_scheduler", "torch.optim.swa_utils"):
        return False
    if "step" in vars(schedule):
        return False
    return all(map(_only_sets_options, getattr(schedule, "_schedulers", ())))


def _alike(state: Tensor, parameter: Tensor) -> bool:
    same = state.dtype == parameter.dtype and state.device == parameter.device and state.shape == parameter.shape
    return same and state.is_contiguous() and not state._is_zerotensor()


def _may_cycle_momentum(schedule: Any) -> bool:
    """Whether `schedule` may set a momentum, perhaps to 0, where torch.optim leaves the buffer as it is, or from 0."""
    if type(schedule).__module__ != "torch.optim.lr_scheduler":
        return True
    inner = getattr(schedule, "_schedulers", ())
    return bool(getattr(schedule, "cycle_momentum", False)) or any(map(_may_cycle_momentum, inner))
