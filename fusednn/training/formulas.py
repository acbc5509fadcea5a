"""The rule of an optimizer of torch.optim, and the numbers of its steps that do not depend on gradients, in float64.

The formulas are those of torch.optim's functions for one tensor. A number is a float, or a tensor [steps]. A power is
C's, as in torch.optim, and all else is rounded as IEEE 754 has it: no bit depends on how many steps there are.
PyTorch's vectors have powers of their own.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from ..kernels.step import (
    DECAY,
    EPS,
    GRAD_PART,
    GRAD_STEP,
    LOSS_SCALE,
    MAX_NORM,
    MOMENTUM,
    ROOT,
    ROW,
    SHRINK,
    SIGN,
    SQUARE_KEPT,
    SQUARE_PART,
    STEP_SIZE,
    UNDAMPED,
)  # fmt: skip


def rule_name(kind: type[Optimizer], group: dict[str, Any]) -> str:
    """The name in RULES for the options of a group."""
    if kind is SGD:
        return "sgd" if group["momentum"] == 0 else "nesterov" if group["nesterov"] else "momentum"
    if kind is RMSprop:
        parts = {"rmsprop": True, "centered": group["centered"], "momentum": group["momentum"] > 0}
        return "_".join(part for part, is_there in parts.items() if is_there)
    if kind in (Adam, AdamW):
        return "amsgrad" if group["amsgrad"] else "adam"
    return kind.__name__.lower()


class Steps:
    """The options of a group at each of some steps, of a parameter that made `count` steps before."""

    def __init__(
        self, options: list[dict[str, Any]], steps: int, count: float | Tensor, fresh: bool, product: Any = None
    ) -> None:
        """`options` are those of each step, or one of all. A `fresh` state is just made.

        `product` is NAdam's tensor with that of the momenta before. What lies on a device is worked with there.
        """
        self.options, self.steps, self.fresh, self.product = options, steps, fresh, product
        self.count = float(count) if not isinstance(count, Tensor) or count.is_cpu else count
        lr = options[0]["lr"]
        self.is_plain = len(options) == 1 and type(lr) is float
        self.place = None
        for value in (count, lr, product):
            if isinstance(value, Tensor) and not value.is_cpu:
                self.place = value.device

    def __getitem__(self, name: str) -> Any:
        """An option."""
        return self.options[0][name] if self.is_plain else self.series([group[name] for group in self.options])

    def series(self, values: Sequence[Any]) -> Any:
        """Numbers, one of all steps or one of each."""
        if len(values) == 1 and type(values[0]) is float:  # mostly: a step a call has no time
            return values[0]
        return at(_series(values), self.place)

    def beta(self, which: int) -> list[float]:
        """The beta of that number."""
        return [float(group["betas"][which]) for group in self.options]

    def numbers(self, ahead: int = 0) -> Any:
        """Which step it is, from 1 on, or so many further on."""
        if self.steps == 1 and isinstance(self.count, float):
            return self.count + 1 + ahead
        if isinstance(self.count, Tensor):
            return self.count.double() + torch.arange(1 + ahead, self.steps + 1 + ahead, device=self.place)
        return self.series([self.count + step for step in range(1 + ahead, self.steps + 1 + ahead)])

    def power(self, bases: list[float], each: float = 1.0, ahead: int = 0) -> Any:
        """`bases`, one of all steps or one of each, to the power of `numbers` times `each`."""
        if self.steps == 1 and isinstance(self.count, float):
            return bases[0] ** ((self.count + 1 + ahead) * each)
        if isinstance(self.count, Tensor):
            return self.series(bases) ** (self.numbers(ahead) * each)
        exponents = [(self.count + step) * each for step in range(1 + ahead, self.steps + 1 + ahead)]
        return self.series(_powers(bases, exponents))


def row_of(
    kind: type[Optimizer], given: Steps, scales: Sequence[float] | None, decays: Sequence[float] | None, max_norm: float
) -> list[Any]:
    """A row of the table, of one step or of all: ROW numbers. `decays` are factors of the weight decay."""
    lr, decay, maximize = given["lr"], given["weight_decay"], given.options[0]["maximize"]
    if decays is not None:
        decay = decay * given.series(decays)
    row: list[Any] = [0.0] * ROW
    row[DECAY], row[SHRINK], row[SIGN] = decay, 1 - lr * decay, -1.0 if maximize else 1.0
    row[LOSS_SCALE], row[MAX_NORM] = 1.0 if scales is None else given.series(scales), max_norm
    for place, number in FORMULAS[kind](given).items():
        row[place] = number
    return row


def _sgd(given: Steps) -> dict[int, Any]:
    undamped = 1 - given["dampening"]
    if given.fresh:  # the buffer begins as the first gradient, whatever the dampening
        later = (given.options * given.steps)[1 : given.steps]
        undamped = given.series([1.0, *[1 - group["dampening"] for group in later]])
    return {STEP_SIZE: given["lr"], MOMENTUM: given["momentum"], UNDAMPED: undamped}


def _moments(given: Steps) -> dict[int, Any]:
    """Of NAdam, and of what has the corrections of Adam, its step size."""
    betas = given.beta(0), given.beta(1)
    beta1, beta2 = map(given.series, betas)
    root = _one_over_root(1 - given.power(betas[1]))
    return {ROOT: root, EPS: given["eps"], GRAD_PART: 1 - beta1, SQUARE_KEPT: beta2, SQUARE_PART: 1 - beta2}


def _adam(given: Steps) -> dict[int, Any]:
    return {STEP_SIZE: _quotient(given["lr"], 1 - given.power(given.beta(0))), **_moments(given)}


def _radam(given: Steps) -> dict[int, Any]:
    """With the factor that corrects the variance; ROOT is 0 and EPS is 1 where there is no quotient yet."""
    adam, kept = _adam(given), given.power(given.beta(1))
    longest = _quotient(2.0, adam[SQUARE_PART]) - 1
    length = longest - 2 * given.numbers() * kept / (1 - kept)
    most, now = _at_least(longest, 5.0), _at_least(length, 5.0)
    factor = _one_over_root((most - 4) * (most - 2) * now / ((now - 4) * (now - 2) * most))
    is_long, root = length > 5, adam[ROOT]
    return adam | {
        STEP_SIZE: adam[STEP_SIZE] * _chosen(is_long, factor, 1.0),
        ROOT: _chosen(is_long, root, 0.0),
        EPS: _chosen(is_long, adam[EPS] * root, 1.0),
    }


def _nadam(given: Steps) -> dict[int, Any]:
    """`given.product` is behind the steps then."""
    decay = given.options[0]["momentum_decay"]
    beta1 = given.series(given.beta(0))
    now, after = (beta1 * (1.0 - 0.5 * given.power([0.96], decay, ahead)) for ahead in (0, 1))
    products = _products(given, now)
    return _moments(given) | {
        STEP_SIZE: given["lr"] * after / (1 - products * after),
        GRAD_STEP: given["lr"] * (1 - now) / (1 - products),
    }


def _products(given: Steps, factors: Any) -> Any:
    """That of the factors until each step, rounded as the tensor that torch.optim keeps it in."""
    before = given.product
    if given.place is not None:
        found = before.double() * (factors.cumprod(0) if isinstance(factors, Tensor) else factors)
        given.product = found.reshape(-1)[-1]
        return found
    products = array("f" if before.dtype == torch.float32 else "d", [float(before)])
    for factor in array(products.typecode, factors.tolist() if isinstance(factors, Tensor) else [factors]):
        products.append(products[-1] * factor)
    given.product = products[-1]
    return given.series(products[1:].tolist())


def _rmsprop(given: Steps) -> dict[int, Any]:
    alpha = given["alpha"]
    return {
        STEP_SIZE: given["lr"], MOMENTUM: given["momentum"], EPS: given["eps"],
        GRAD_PART: 1 - alpha, SQUARE_KEPT: alpha, SQUARE_PART: 1 - alpha,
    }  # fmt: skip


def _adagrad(given: Steps) -> dict[int, Any]:
    slowed = 1 + (given.numbers() - 1) * given["lr_decay"]
    return {STEP_SIZE: _quotient(given["lr"], slowed), EPS: given["eps"]}


FORMULAS: dict[type[Optimizer], Callable[[Steps], dict[int, Any]]] = {
    Adam: _adam, AdamW: _adam, NAdam: _nadam, RAdam: _radam, Adagrad: _adagrad, RMSprop: _rmsprop, SGD: _sgd,
}  # fmt: skip


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


def at(value: Any, device: torch.device | None) -> Any:
    """A number as it is, a tensor on `device`, if one is given."""
    return sent(value, device) if device is not None and isinstance(value, Tensor) else value


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for it, as a copy from memory that is not pinned would."""
    if values.is_cpu and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _quotient(a: Any, b: Any) -> Any:
    """a / b: of a float and a tensor by itself PyTorch makes a product with the reciprocal."""
    if isinstance(b, Tensor) and isinstance(a, float):
        a = torch.tensor(a, dtype=torch.float64, device="cpu")
    return a / b


def _one_over_root(value: Any) -> Any:
    """1 / sqrt(value), of one number and of many with the same bits: Tensor.sqrt is MKL's, which errs in the last."""
    return value.rsqrt() if isinstance(value, Tensor) else 1 / math.sqrt(value)


def _at_least(value: Any, least: float) -> Any:
    return value.clamp(min=least) if isinstance(value, Tensor) else max(value, least)


def _chosen(condition: Any, a: Any, b: float) -> Any:
    """`a` where the condition holds, and else `b`."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    return torch.where(condition, a, b)
