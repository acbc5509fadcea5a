"""What a kernel needs of an optimizer for so many steps, and where it leaves them.

`torch.optim` keeps its options in `param_groups` and its state in `state`; both are written here and nowhere else, so
that training goes on in plain PyTorch at any point.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..kernels.step import ROW, Rule
from ..reading import Facts


class Taken(NamedTuple):
    """What a kernel needs of an optimizer for some steps.

    `table` [steps, parameters, ROW], in the parameters' dtype and on their device, has the numbers that do not depend
    on gradients, at the places that kernels/step.py names; `firsts` and `seconds` are the state of each parameter, and
    `counts` that of its steps, [], None where there is none. With `gives_arrays` the table of one step may be
    an array.array. `one_row` says that the numbers are the same for all parameters.
    """

    rule: Rule
    steps: int
    table: Any
    firsts: tuple[Tensor | None, ...]
    seconds: tuple[Tensor | None, ...]
    counts: tuple[Tensor | None, ...]
    one_row: bool


class KernelOptimizer:
    """`optimizer`, which optimizers.py does not refuse, and the LR scheduler that is stepped after each step."""

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor | None], schedule: Any, max_norm: Any = None
    ) -> None:
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
        self._kept: tuple[Facts, dict[str, Any], Taken] | None = None
        self._one = torch.ones((), dtype=torch.float32, device="cpu")

    def has_kept(self) -> bool:
        """Whether one more step needs nothing but its row of the table: no state is made, no schedule stepped."""
        return self._kept is not None and self._kept[0] is self.facts

    def take(self, steps: int, scales: Any = None, decays: Any = None) -> Taken:
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
                    return Taken(before.rule, 1, self._packed(row * len(self.parameters)), *before[3:-1], True)
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
        taken = Taken(
            self._rule(history),
            steps,
            self._table(columns, steps),
            tuple([state.get(first) for state in states]),
            tuple([state.get(second) for state in states]),
            tuple([state.get("step") for state in states]),
            len(made) == 1,
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
        more = self._one if steps == 1 else steps  # of a number PyTorch makes a tensor first, which takes longer
        for parameter in self.parameters:
            state = {} if parameter is None else self.optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] += more

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
            return [lr, decay, 1 - lr * decay, sign, 1.0, 0.0, values("momentum"), undamped, 0.0, 0.0, 0.0]
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
        return [lr / unbiased, decay, 1 - lr * decay, sign, 1.0, 0.0, root, eps, 1 - beta1, beta2, 1 - beta2]

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
