"""Optimizers whose steps a training kernel makes: what it needs of them for so many steps, and where it leaves them.

`torch.optim` keeps its options in `param_groups` and its state in `state`; both are read and written here and nowhere
else, so that training goes on in plain PyTorch at any point.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from ..reading import GONE, Facts

STEP_SIZE, DECAY, SHRINK, SIGN = range(4)
MOMENTUM, UNDAMPED = 4, 5  # of SGD
ROOT, EPS, GRAD_PART, SQUARE_KEPT, SQUARE_PART = range(4, 9)  # of Adam
ROW = 9
"""The places in a row of the table of a step: what kernels/adam.py reads, and says the formulas of."""


class Rule(NamedTuple):
    """Which code a kernel runs: "adam", "sgd", "momentum" or "nesterov", and what of a row it uses."""

    rule: str
    coupled: bool
    decoupled: bool
    maximize: bool


class Steps(NamedTuple):
    """What a kernel needs of an optimizer for some steps.

    `table` [steps, parameters, ROW], in the parameters' dtype and on their device, has the numbers that do not depend
    on gradients; `firsts` and `seconds` are the state of each parameter, and `counts` that of its steps, [], None where
    there is none. Of one step the table may be an array.array, to who asks for it.
    """

    rule: Rule
    steps: int
    table: Any
    firsts: tuple[Tensor | None, ...]
    seconds: tuple[Tensor | None, ...]
    counts: tuple[Tensor | None, ...]


def refusal(optimizer: Optimizer, parameters: list[Tensor], schedule: Any, facts: Facts) -> str | None:
    """Why no kernel makes the steps of `optimizer` for exactly these `parameters`, or None if one does.

    `facts` gets what that rests on, but for :func:`refusal_now`.
    """
    kind = type(optimizer)
    if kind not in (Adam, AdamW, SGD):
        return f"no kernel for the optimizer {kind.__module__}.{kind.__qualname__}"
    if schedule is not None and not _only_sets_options(schedule):
        return f"no kernel for the schedule {type(schedule).__qualname__}, which may look at the parameters"
    if schedule is not None and kind is SGD and _may_cycle_momentum(schedule):
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
    groups, is_sgd, on_cpu = optimizer.param_groups, kind is SGD, parameters[0].is_cpu
    facts.attribute(optimizer, "param_groups", held=True)
    facts.length(optimizer, "param_groups")
    for group in groups:
        options = {name: facts.item(group, None, name) for name in group if name not in _LR}
        if (reason := _against_options(options, is_sgd, on_cpu, facts)) is not None:
            return reason
    if is_sgd and len({(group["momentum"] != 0, group["nesterov"]) for group in groups}) > 1:
        return "groups with and without momentum, or Nesterov's"
    if not is_sgd and len({group["decoupled_weight_decay"] for group in groups}) > 1:
        return "groups with and without decoupled weight decay"
    facts.attribute(optimizer, "state", held=True)
    for parameter in parameters:
        state = facts.item(optimizer, "state", parameter, held=True)
        if state is not GONE and (reason := _against_state(state, parameter, is_sgd, facts)) is not None:
            return reason
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
    """The same of what no fact says: a schedule sets the learning rate at each step, and lists change unseen."""
    if not _is_torchs(optimizer.step, type(optimizer)):
        return "the optimizer's step was replaced"
    held = _held(optimizer)
    if held != (own := [*map(id, parameters)]) and sorted(held) != sorted(own):
        return "the optimizer's parameters are not exactly the model's"
    for group in optimizer.param_groups:
        if type(lr := group["lr"]) is not float and (reason := _against_lr(lr)) is not None:
            return reason
    return None


def _against_lr(lr: Any) -> str | None:
    if isinstance(lr, Tensor):
        return "the option lr is a tensor of several numbers" if lr.numel() != 1 or lr.is_complex() else None
    return _against_number(lr)


def _against_number(number: Any) -> str | None:
    """torch.optim works with others in its own way, or raises an error."""
    if isinstance(number, float) or (type(number) is int and abs(number) < 2**53):
        return None
    if isinstance(number, Tensor):
        return "an option other than lr is a tensor"
    return f"an option is {number!r}, a {type(number).__name__}, and no plain number"


def _against_options(group: dict[str, Any], is_sgd: bool, on_cpu: bool, facts: Facts) -> str | None:
    """Why the options of a group are the loop's, which works with them as torch.optim does, or raises its error."""
    for option in ("amsgrad", "differentiable"):
        if group.get(option):
            return f"no kernel for the option {option}"
    if on_cpu and group.get("capturable"):
        return "capturable on a CPU, which torch.optim does not do"
    numbers = [
        group[name] for name in (("weight_decay", "momentum", "dampening") if is_sgd else ("weight_decay", "eps"))
    ]
    if not is_sgd:
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
        if (reason := _against_number(number)) is not None:
            return reason
    return None if is_sgd or all(0 <= beta < 1 for beta in betas) else f"the option betas is {betas!r}"


def _against_state(state: dict[str, Any], parameter: Tensor, is_sgd: bool, facts: Facts) -> str | None:
    """Why the state of a parameter is not as torch.optim leaves it, for a kernel to go on with."""
    if not state:
        facts.never()
        return None
    names = ("momentum_buffer",) if is_sgd else ("exp_avg", "exp_avg_sq", "step")
    found = {name: facts.item(state, None, name) for name in names}
    for name, tensor in found.items():
        if name != "step" and isinstance(tensor, Tensor) and not _alike(tensor, parameter):
            return f"the optimizer's {name} has another dtype, device or layout than its parameter"
    if is_sgd:
        return None
    count = found["step"]
    complete = all(isinstance(tensor, Tensor) for tensor in found.values()) and count.dim() == 0
    if not complete or count.dtype not in (torch.float32, torch.float64):
        return "the optimizer's state is not Adam's"
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


class KernelOptimizer:
    """`optimizer`, which :func:`refusal` does not refuse, and the LR scheduler that is stepped after each step."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor | None], schedule: Any) -> None:
        """`parameters` are the optimizer's in the order of the table, None where a place is empty."""
        self.optimizer, self.parameters, self.schedule = optimizer, parameters, schedule
        self.model = next(parameter for parameter in parameters if parameter is not None)
        self._dtype = self.model.dtype
        self._typecode = "f" if self._dtype == torch.float32 else "d"
        self.is_adam = not isinstance(optimizer, SGD)
        self.error: Exception | None = None
        """What the schedule raised behind the last step that was taken: to be raised again when that step is made."""
        self.facts: Facts | None = None
        """Those that hold now, if somebody knows: what was taken under them is looked up no more."""
        self.gives_arrays = False
        self._kept: tuple[Facts, dict[str, Any], Steps] | None = None

    def has_kept(self) -> bool:
        """Whether one more step needs nothing but its row of the table: no state is made, no schedule stepped."""
        return self._kept is not None and self._kept[0] is self.facts

    def take(self, steps: int) -> Steps:
        """What the next `steps` steps need. The schedule is behind them; when they are launched, `count` them.

        They are fewer where the schedule raises an error, which `error` keeps. Nothing waits for a device: a learning
        rate or a step count that lies there is worked with there.
        """
        if steps == 1 and self._kept is not None and self._kept[0] is self.facts:
            _, group, before = self._kept
            ages = [float(count) for count in before.counts if count is not None] or [0.0]
            if ages.count(ages[0]) == len(ages):
                row = self._columns(ages[0], [group], 1, False)
                if _PLAIN.issuperset(map(type, row)):
                    return Steps(before.rule, 1, self._packed(row * len(self.parameters)), *before[3:])
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        # in torch.optim's order, in which state_dict too lists the states
        found = {
            id(held): (g, self._make_state(held, group)) for g, group in enumerate(groups) for held in group["params"]
        }
        history = self._advance_schedule(groups, steps)
        steps = steps if self.schedule is None else len(history)
        states = [{} if parameter is None else self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        made: dict[Any, list[Any]] = {}
        columns = []
        for parameter, state in zip(self.parameters, states, strict=True):
            if parameter is None:
                columns.append([0.0] * ROW)
                continue
            g, fresh = found[id(parameter)]
            count = state.get("step", 0.0)
            count = float(count) if not isinstance(count, Tensor) or count.is_cpu else count
            key = g, fresh, count if isinstance(count, float) else id(count)
            if key not in made:  # the same for all parameters of a group that are as old
                made[key] = self._columns(count, [options[g] for options in history], steps, fresh)
            columns.append(made[key])
        first, second = ("exp_avg", "exp_avg_sq") if self.is_adam else ("momentum_buffer", "momentum_buffer")
        taken = Steps(
            self._rule(history),
            steps,
            self._table(columns, steps),
            tuple([state.get(first) for state in states]),
            tuple([state.get(second) for state in states]),
            tuple([state.get("step") for state in states]),
        )
        self._kept = None
        if self.facts is not None and self.schedule is None and len(groups) == 1:
            on_cpu = all(count is None or count.is_cpu for count in taken.counts)
            if on_cpu and not any(fresh for _, fresh in found.values()):
                self._kept = self.facts, groups[0], taken
        return taken

    def _make_state(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Make the state of `parameter` as torch.optim does, unless it is there; whether it was not."""
        if not self.is_adam and group["momentum"] == 0:
            return False
        state: dict[str, Any] = self.optimizer.state[parameter]
        fresh = not state if self.is_adam else state.get("momentum_buffer") is None
        if fresh and self.is_adam:
            on_device = group["capturable"] or group["fused"]
            double = torch.get_default_dtype() == torch.float64 and not group["fused"]
            dtype = torch.float64 if double else torch.float32
            count = torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
            moments = [torch.zeros_like(parameter) for _ in range(2)]
            state.update(step=count, exp_avg=moments[0], exp_avg_sq=moments[1])  # at once, whatever signal comes
        elif fresh:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return fresh

    def _advance_schedule(self, groups: list[dict[str, Any]], steps: int) -> list[list[dict[str, Any]]]:
        """The options of each group at each step, or once where no schedule changes them."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # else a scheduler warns that no step was made
        if self.schedule is None:
            return [groups]
        history = []
        for _ in range(steps):
            history.append([{**group, "lr": _copied(group["lr"])} for group in groups])
            try:
                self.schedule.step()
            except Exception as error:  # OneCycleLR's, say, when it is at its end
                self.error = error
                break
        return history

    def count(self, steps: int) -> None:
        """Count so many steps in the optimizer's state: they are launched."""
        for parameter in self.parameters:
            state = {} if parameter is None else self.optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] += steps

    def finish(self) -> None:
        """Raise what the schedule raised, now that the steps before it are made."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _columns(self, count: float | Tensor, options: list[dict[str, Any]], steps: int, fresh: bool) -> list[Any]:
        """The rows of the table of a parameter that made `count` steps before: ROW columns, numbers or [steps] each.

        A power is C's, as in torch.optim, and all else is rounded as IEEE 754 has it: no bit depends on how many steps
        there are. PyTorch's vectors have powers of their own.
        """
        group = options[0]
        if len(options) == 1 and type(group["lr"]) is float:
            values: Callable[[str], Any] = group.__getitem__
        else:
            values = lambda name: _series([group[name] for group in options])  # noqa: E731
        lr, decay = values("lr"), values("weight_decay")
        sign = -1.0 if group["maximize"] else 1.0
        if not self.is_adam:
            undamped = 1 - values("dampening")
            if fresh:  # the buffer begins as the first gradient, whatever the dampening
                undamped = _series([1.0, *[1 - group["dampening"] for group in (options * steps)[1:steps]]])
            return [lr, decay, 1 - lr * decay, sign, values("momentum"), undamped, 0.0, 0.0, 0.0]
        beta1, beta2 = group["betas"]
        if len(options) > 1 or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
            beta1, beta2 = (_series([group["betas"][i] for group in options]) for i in (0, 1))
        place = next((v.device for v in (count, lr) if isinstance(v, Tensor) and not v.is_cpu), None)
        if isinstance(count, Tensor):
            t = count.double() + torch.arange(1, steps + 1, device=place)
            power1, power2 = _at(beta1, place) ** t, _at(beta2, place) ** t
        elif steps == 1:
            power1, power2 = beta1 ** (count + 1), beta2 ** (count + 1)
        else:
            ages = [count + step for step in range(1, steps + 1)]
            bases = [[float(group["betas"][i]) for group in options] for i in (0, 1)]
            power1, power2 = (_at(_series(_powers(some, ages)), place) for some in bases)
        unbiased = 1 - power1
        if isinstance(unbiased, Tensor) and isinstance(lr, float):
            lr = torch.tensor(lr, dtype=torch.float64, device="cpu")  # or it becomes a product with the reciprocal
        root, eps = _one_over_root(1 - power2), values("eps")
        return [lr / unbiased, decay, 1 - lr * decay, sign, root, eps, 1 - beta1, beta2, 1 - beta2]

    def _table(self, columns: list[list[Any]], steps: int) -> Any:
        """The numbers of each parameter as a table, [steps, parameters, ROW], in its dtype and on its device."""
        if steps == 1 and all(_PLAIN.issuperset(map(type, row)) for row in columns):
            return self._packed(list(chain.from_iterable(columns)))
        values = (value for row in columns for value in row if isinstance(value, Tensor))
        found = next((value.device for value in values if not value.is_cpu), torch.device("cpu"))
        made: dict[int, Tensor] = {}
        for row in columns:
            if id(row) not in made:
                made[id(row)] = part = torch.zeros(steps, ROW, dtype=torch.float64, device=found)
                for place, value in enumerate(row):
                    part[:, place] = _at(value, found)
        model = self.model
        return _sent(torch.stack([made[id(row)] for row in columns], dim=1).to(model.dtype), model.device)

    def _packed(self, numbers: list[float]) -> Any:
        """The table of one step."""
        values = array(self._typecode, numbers)
        if self.gives_arrays:
            return values
        table = torch.frombuffer(values, dtype=self._dtype).view(1, -1, ROW)
        return table if self.model.is_cpu else _sent(table, self.model.device)

    def _rule(self, history: list[list[dict[str, Any]]]) -> Rule:
        groups = [group for options in history for group in options]
        decays = any(group["weight_decay"] != 0 for group in groups)
        decoupled = self.is_adam and groups[0]["decoupled_weight_decay"]
        name = "adam" if self.is_adam else "sgd" if groups[0]["momentum"] == 0 else "momentum"
        if name == "momentum" and groups[0]["nesterov"]:
            name = "nesterov"
        return Rule(name, decays and not decoupled, decays and decoupled, any(group["maximize"] for group in groups))


_PLAIN = {float, int, bool}


def _powers(bases: list[float], exponents: list[float]) -> list[float]:
    """Each of `bases`, or the one that there is, to the power of its exponent."""
    if len(bases) > 1:
        return [base**t for base, t in zip(bases, exponents, strict=True)]
    base = bases[0]
    return [base**t for t in exponents]


def _series(values: Sequence[Any]) -> Any:
    """Numbers, which may lie on a device, as a tensor, [n] float64; of one number a float, where it can be one."""
    if isinstance(values[0], Tensor):
        if all(value.is_cpu for value in values):
            return _series([float(value) for value in values])
        return torch.stack([value.double().reshape(()) for value in values])
    return float(values[0]) if len(values) == 1 else torch.frombuffer(array("d", values), dtype=torch.float64)


def _at(value: Any, device: torch.device | None) -> Any:
    """A number as it is, a tensor on `device`, if one is given."""
    return _sent(value, device) if device is not None and isinstance(value, Tensor) else value


def _one_over_root(value: Any) -> Any:
    """1 / sqrt(value), of one number and of many with the same bits: Tensor.sqrt is MKL's, which errs in the last."""
    return value.rsqrt() if isinstance(value, Tensor) else 1 / math.sqrt(value)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for it, as a copy from memory that is not pinned would."""
    if values.is_cpu and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _copied(value: Any) -> Any:
    """`value`, or a copy where it is a tensor, which a scheduler fills anew."""
    return value.detach().clone() if isinstance(value, Tensor) else value
