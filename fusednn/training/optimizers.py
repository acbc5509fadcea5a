"""Optimizers whose steps a training kernel makes: what it needs of them for so many steps, and where it leaves them.

`torch.optim` keeps its options in `param_groups` and its state in `state`; both are read and written here and nowhere
else, so that training goes on in plain PyTorch at any point.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

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
    on gradients; `firsts` and `seconds` are the state of each parameter, None where there is none.
    """

    rule: Rule
    table: Tensor
    firsts: tuple[Tensor | None, ...]
    seconds: tuple[Tensor | None, ...]


def refusal(optimizer: Optimizer, parameters: list[Tensor], schedule: Any) -> str | None:
    """Why no kernel makes the steps of `optimizer` for exactly these `parameters`, or None if one does."""
    kind = type(optimizer)
    if kind not in (Adam, AdamW, SGD):
        return f"no kernel for the optimizer {kind.__module__}.{kind.__qualname__}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or _global_hooks():
        return "the optimizer has hooks"
    if not _is_torchs(optimizer.step, {base.__module__ for base in kind.__mro__}):
        return "the optimizer's step was replaced"
    if "zero_grad" in vars(optimizer) or kind.zero_grad is not _ZERO_GRAD:
        return "the optimizer's zero_grad was replaced"
    if schedule is not None and not _only_sets_options(schedule):
        return f"no kernel for the schedule {type(schedule).__qualname__}, which may look at the parameters"
    groups = optimizer.param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    if sorted(held) != sorted(map(id, parameters)):
        return "the optimizer's parameters are not exactly the model's"
    for option in ("amsgrad", "differentiable"):
        if any(group.get(option) for group in groups):
            return f"no kernel for the option {option}"
    if parameters[0].is_cpu and any(group.get("capturable") for group in groups):
        return "capturable on a CPU, which torch.optim does not do"
    if any(
        isinstance(value, Tensor) for group in groups for key, value in group.items() if key not in ("lr", "initial_lr")
    ):
        return "an option other than lr is a tensor"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "gradients are scaled"
    if kind is SGD:
        if len({(group["momentum"] != 0, group["nesterov"]) for group in groups}) > 1:
            return "groups with and without momentum, or Nesterov's"
        if schedule is not None and _may_cycle_momentum(schedule):
            return "the schedule may change the momentum"
    elif len({group["decoupled_weight_decay"] for group in groups}) > 1:
        return "groups with and without decoupled weight decay"
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if state.get(name) is not None and not _alike(state[name], parameter):
                return f"the optimizer's {name} has another dtype, device or layout than its parameter"
        complete = isinstance(state.get("step"), Tensor) and state.keys() >= {"exp_avg", "exp_avg_sq"}
        if state and kind is not SGD and not complete:
            return "the optimizer's state is not Adam's"
    return None


_ZERO_GRAD = Optimizer.zero_grad


def _is_torchs(step: Any, modules: set[str]) -> bool:
    """Whether a step is that of torch.optim, in which it lies wrapped, by torch.optim itself and by its schedulers.

    The names and attributes of a function say nothing of that: functools.wraps copies them.
    """
    while step is not None:
        function = getattr(step, "__func__", step)
        where = getattr(function, "__globals__", {}).get("__name__")
        if where not in modules | {"torch.optim.optimizer", "torch.optim.lr_scheduler"}:
            return False
        step = vars(function).get("__wrapped__")
    return where in modules


def _only_sets_options(schedule: Any) -> bool:
    """Whether `schedule` may be stepped ahead of the training: it looks at options and its own count alone."""
    if type(schedule).__module__ not in ("torch.optim.lr_scheduler", "torch.optim.swa_utils"):
        return False
    return all(map(_only_sets_options, getattr(schedule, "_schedulers", ())))


def _global_hooks() -> bool:
    return bool(torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks)


def _alike(state: Tensor, parameter: Tensor) -> bool:
    return (
        state.dtype == parameter.dtype
        and state.device == parameter.device
        and state.shape == parameter.shape
        and state.is_contiguous()
    )


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
        self.is_adam = not isinstance(optimizer, SGD)
        self.error: Exception | None = None
        """What the schedule raised behind the last step that was taken: to be raised again when that step is made."""

    def take(self, steps: int) -> Steps:
        """What the next `steps` steps need. The schedule is behind them; when they are launched, `count` them.

        They are fewer where the schedule raises an error, which `error` keeps. Nothing waits for a device: a learning
        rate or a step count that lies there is worked with there.
        """
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        # in torch.optim's order, in which state_dict too lists the states
        found = {
            id(held): (g, self._make_state(held, group)) for g, group in enumerate(groups) for held in group["params"]
        }
        history = self._advance_schedule(groups, steps)
        steps = steps if self.schedule is None else len(history)
        made: dict[Any, Tensor] = {}

        def table_of(parameter: Tensor | None) -> Tensor:
            """The same for all parameters of a group that are as old."""
            if parameter is None:
                return torch.zeros(steps, ROW, dtype=torch.float64, device="cpu")
            (g, fresh), count = found[id(parameter)], self._steps_made(parameter)
            key = (g, fresh, float(count) if count.is_cpu else id(count))
            if key not in made:
                made[key] = self._table(count, [options[g] for options in history], steps, fresh)
            return made[key]

        tables = [table_of(parameter) for parameter in self.parameters]
        model = next(parameter for parameter in self.parameters if parameter is not None)
        device = next((table.device for table in tables if not table.is_cpu), tables[0].device)
        table = torch.stack([_sent(table, device) for table in tables], dim=1).to(model.dtype)
        if model.is_cuda and table.is_cpu:
            table = table.pin_memory()
        states = [{} if parameter is None else self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        names = ("exp_avg", "exp_avg_sq") if self.is_adam else ("momentum_buffer", "momentum_buffer")
        firsts, seconds = (tuple(state.get(name) for state in states) for name in names)
        return Steps(self._rule(history), table.to(model.device, non_blocking=True), firsts, seconds)

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
            state["step"] = torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
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

    def _steps_made(self, parameter: Tensor) -> Tensor:
        """How many steps `parameter` has made, where the optimizer counts them."""
        count: Tensor = self.optimizer.state[parameter]["step"] if self.is_adam else torch.zeros((), device="cpu")
        return count

    def count(self, steps: int) -> None:
        """Count so many steps in the optimizer's state: they are launched."""
        for parameter in self.parameters:
            state = {} if parameter is None else self.optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] += steps

    def finish(self) -> None:
        """Raise what the schedule raised, now that the steps before it are made."""
        if self.error is not None:
            raise self.error

    def _table(self, count: Tensor, options: list[dict[str, Any]], steps: int, fresh: bool) -> Tensor:
        """The rows of a parameter that made `count` steps, [steps, ROW], float64, where learning rate or count lies."""
        places = [count, *(group["lr"] for group in options if isinstance(group["lr"], Tensor))]
        device = next((place.device for place in places if not place.is_cpu), torch.device("cpu"))

        def series(values: list[Any]) -> Tensor:
            if isinstance(values[0], Tensor):
                return torch.stack([value.to(device, torch.float64).reshape(()) for value in values])
            return _sent(torch.tensor(values, dtype=torch.float64, device="cpu"), device)

        lr, decay = (series([group[name] for group in options]) for name in ("lr", "weight_decay"))
        table = torch.zeros(steps, ROW, dtype=torch.float64, device=device)
        table[:, STEP_SIZE], table[:, DECAY], table[:, SHRINK] = lr, decay, 1 - lr * decay
        table[:, SIGN] = -1.0 if options[0]["maximize"] else 1.0
        if self.is_adam:
            beta1, beta2 = (series([group["betas"][i] for group in options]) for i in (0, 1))
            t = count.to(device, torch.float64) + torch.arange(1, steps + 1, device=device)
            table[:, STEP_SIZE] = lr / (1 - _power(beta1, t))
            table[:, ROOT] = (1 - _power(beta2, t)).rsqrt()
            table[:, EPS] = series([group["eps"] for group in options])
            table[:, GRAD_PART], table[:, SQUARE_KEPT], table[:, SQUARE_PART] = 1 - beta1, beta2, 1 - beta2
        else:
            table[:, MOMENTUM] = series([group["momentum"] for group in options])
            table[:, UNDAMPED] = 1 - series([group["dampening"] for group in options])
            if fresh:  # the buffer begins as the first gradient, whatever the dampening
                table[0, UNDAMPED] = 1.0
        return table

    def _rule(self, history: list[list[dict[str, Any]]]) -> Rule:
        groups = [group for options in history for group in options]
        decays = any(group["weight_decay"] != 0 for group in groups)
        decoupled = self.is_adam and groups[0]["decoupled_weight_decay"]
        name = "adam" if self.is_adam else "sgd" if groups[0]["momentum"] == 0 else "momentum"
        if name == "momentum" and groups[0]["nesterov"]:
            name = "nesterov"
        return Rule(name, decays and not decoupled, decays and decoupled, any(group["maximize"] for group in groups))


def _power(base: Tensor, exponents: Tensor) -> Tensor:
    """base ** exponents [steps], of which no bit depends on how many they are.

    PyTorch's vectors and its code for the rest that fills none round differently: here all lie in vectors.
    """
    steps = len(exponents)
    filled = -steps % 64
    return (F.pad(base.expand(steps), (0, filled)) ** F.pad(exponents, (0, filled)))[:steps]


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for it, as a copy from memory that is not pinned would."""
    if values.is_cpu and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _copied(value: Any) -> Any:
    """`value`, or a copy where it is a tensor, which a scheduler fills anew."""
    return value.detach().clone() if isinstance(value, Tensor) else value
