"""What a kernel needs of an optimizer for so many steps, and where it leaves them.

`torch.optim` keeps its options in `param_groups` and its state in `state`; both are written here and nowhere else, so
that training goes on in plain PyTorch at any point.
"""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, NAdam, Optimizer

from ..kernels.step import ROW, RULES, Rule
from ..reading import Facts
from .formulas import Steps, at, row_of, rule_name, sent


class Taken(NamedTuple):
    """What a kernel needs of an optimizer for some steps.

    `table` [steps, parameters, ROW], in the parameters' dtype and on their device, has the numbers that do not depend
    on gradients, at the places that kernels/step.py names; `states` has a group for each state that the rule keeps,
    with that of each parameter, and `counts` has that of its steps, [], None where there is none. With `gives_arrays`
    the table of one step may be an array.array. `one_row` says that the numbers are the same for all parameters.
    """

    rule: Rule
    steps: int
    table: Any
    states: tuple[tuple[Tensor | None, ...], ...]
    counts: tuple[Tensor | None, ...]
    one_row: bool


class KernelOptimizer:
    """`optimizer`, which optimizers.py does not refuse, and the LR scheduler that is stepped after each step."""

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor | None], schedule: Any, max_norm: float | None = None
    ) -> None:
        """`parameters` are the optimizer's in the order of the table, None where a place is empty.

        `max_norm` is the most that the norm of all gradients may be.
        """
        self.optimizer, self.parameters, self.schedule = optimizer, parameters, schedule
        self.kind, self.max_norm = type(optimizer), 0.0 if max_norm is None else float(max_norm)
        self.model = next(parameter for parameter in parameters if parameter is not None)
        self._dtype = self.model.dtype
        self._typecode = "f" if self._dtype == torch.float32 else "d"
        self.error: Exception | None = None
        """What the schedule or a scale raised behind the last step that was taken: to be raised when that is made."""
        self.facts: Facts | None = None
        """Those that hold now, if somebody knows: what was taken under them is looked up no more."""
        self.gives_arrays = False
        self._kept: tuple[Facts, dict[str, Any], Taken] | None = None
        self._products: list[tuple[Tensor, Any]] = []
        self._one = torch.ones((), dtype=torch.float32, device="cpu")

    def has_kept(self) -> bool:
        """Whether one more step needs nothing but its row of the table: no state is made, no schedule stepped."""
        return self._kept is not None and self._kept[0] is self.facts

    def take(self, steps: int, scales: Sequence[float] | None = None, decays: Sequence[float] | None = None) -> Taken:
        """What the next `steps` steps need. The schedule is behind them; when they are launched, `count` them.

        The loss of each is multiplied by its number in `scales`, and each group's weight decay by that in `decays`.
        They are fewer where the schedule raises an error, which `error` keeps. Nothing waits for a device: a learning
        rate or a step count that lies there is worked with there.
        """
        if steps == 1 and self._kept is not None and self._kept[0] is self.facts:
            _, group, before = self._kept
            ages = [float(count) for count in before.counts if count is not None] or [0.0]
            if ages.count(ages[0]) == len(ages):
                row = row_of(self.kind, Steps([group], 1, ages[0], False), scales, decays, self.max_norm)
                if _PLAIN.issuperset(map(type, row)):
                    return Taken(before.rule, 1, self._packed(row * len(self.parameters)), *before[3:-1], True)
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        # in torch.optim's order, in which state_dict too lists the states
        found = {
            id(held): (g, self._make_state(held, group)) for g, group in enumerate(groups) for held in group["params"]
        }
        history = self._advance_schedule(groups, steps)
        steps = steps if self.schedule is None else len(history)
        scales, decays = scales and scales[:steps], decays and decays[:steps]
        states = [{} if parameter is None else self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        made: dict[Any, tuple[list[Any], Any]] = {}
        columns = []
        self._products = []
        for parameter, state in zip(self.parameters, states, strict=True):
            if parameter is None:
                columns.append([0.0] * ROW)
                continue
            g, fresh = found[id(parameter)]
            count, product = state.get("step", 0.0), state.get("mu_product")
            key = g, fresh, _value(count), _value(product)
            if key not in made:  # the same for all parameters of a group that are as old
                given = Steps([options[g] for options in history], steps, count, fresh, product)
                made[key] = row_of(self.kind, given, scales, decays, self.max_norm), given.product
            columns.append(made[key][0])
            if product is not None:
                self._products.append((product, made[key][1]))
        rule = self._rule(history)
        taken = Taken(
            rule,
            steps,
            self._table(columns, steps),
            tuple([tuple([state.get(name) for state in states]) for name in RULES[rule.name].states]),
            tuple([state.get("step") for state in states]),
            len(made) == 1,
        )
        self._kept = None
        if self.facts is not None and self.schedule is None and len(groups) == 1 and not self._products:
            on_cpu = all(count is None or count.is_cpu for count in taken.counts)
            if on_cpu and not any(fresh for _, fresh in found.values()):
                self._kept = self.facts, groups[0], taken
        return taken

    def _make_state(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Make the state of `parameter` as torch.optim does, unless it is there; whether it was not."""
        names = RULES[rule_name(self.kind, group)].states
        if self.kind is SGD and not names:
            return False
        state: dict[str, Any] = self.optimizer.state[parameter]
        if self.kind is SGD:
            if state.get("momentum_buffer") is not None:
                return False
            state["momentum_buffer"] = torch.zeros_like(parameter)
            return True
        if state:
            return False
        fused = group.get("fused")
        double = torch.get_default_dtype() == torch.float64 and not fused
        place = parameter.device if fused or group.get("capturable") else "cpu"
        count = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=place)
        product = {"mu_product": torch.ones_like(count)} if self.kind is NAdam else {}
        begin = self.optimizer.defaults.get("initial_accumulator_value", 0.0)
        moments = {name: torch.full_like(parameter, begin) for name in names}
        state.update({"step": count} | product | moments)  # at once, whatever signal comes
        return True

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
        self.keep_products()

    def keep_products(self) -> None:
        """Leave NAdam's product of the momenta in its state, as `count` does: the steps taken are launched."""
        for product, value in self._products:
            product.fill_(value)

    def finish(self) -> None:
        """Raise what is an `error`, now that the steps before it are made."""
        error, self.error = self.error, None
        if error is not None:
            raise error

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
                    part[:, place] = at(value, found)
        model = self.model
        return sent(torch.stack([made[id(row)] for row in columns], dim=1).to(model.dtype), model.device)

    def _packed(self, numbers: list[float]) -> Any:
        """The table of one step."""
        values = array(self._typecode, numbers)
        if self.gives_arrays:
            return values
        table = torch.frombuffer(values, dtype=self._dtype).view(1, -1, ROW)
        return table if self.model.is_cpu else sent(table, self.model.device)

    def _rule(self, history: list[list[dict[str, Any]]]) -> Rule:
        groups = [group for options in history for group in options]
        decays = any(group["weight_decay"] != 0 for group in groups)
        decoupled = bool(groups[0].get("decoupled_weight_decay", False))
        maximize = any(group["maximize"] for group in groups)
        return Rule(rule_name(self.kind, groups[0]), decays and not decoupled, decays and decoupled, maximize)


_PLAIN = {float, int, bool}


def _value(number: Any) -> Any:
    """What says whether two numbers are the same, of those on a device that they are one."""
    if not isinstance(number, Tensor):
        return number
    return (float(number), number.dtype) if number.is_cpu else id(number)


def _copied(value: Any) -> Any:
    """`value`, or a copy where it is a tensor, which a scheduler fills anew."""
    return value.detach().clone() if isinstance(value, Tensor) else value
