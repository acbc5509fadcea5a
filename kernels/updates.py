"""One step of an optimizer on a tile of a parameter: torch.optim's Adam, RMSprop, Adagrad and SGD, and their kin.

As torch.optim has them, with g the gradient (its sign turned where the optimizer maximizes), λ the weight decay and t
the number of the step:

    Adam      g += λ w;  m += (1 - β1)(g - m);  v = β2 v + (1 - β2) g²
              w -= lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + ε)
    amsgrad   the same with the largest v so far, top = max(top, v), in the place of v
    NAdam     the same, of m and of g: w -= (lr μ' / (1 - Πμ') m + lr (1 - μ) / (1 - Πμ) g) / (√v / √(1 - β2ᵗ) + ε)
              where μ = β1 (1 - ½ 0.96^(tψ)), μ' the next step's, and Πμ and Πμ' the products of all until then
    RAdam     the same as Adam, with ε / √(1 - β2ᵗ), times a factor of t; or without the quotient, while t is small
    Adagrad   g += λ w;  v += g²;  w -= lr / (1 + (t - 1) decay) · g / (√v + ε)
    RMSprop   g += λ w;  v = α v + (1 - α) g²;  w -= lr g / (√v + ε)
              centered: a += (1 - α)(g - a), and √(v - a²); with momentum: m = μ m + g / (√v + ε);  w -= lr m
    SGD       g += λ w;  w -= lr g
    momentum  g += λ w;  m = μ m + (1 - damping) g;  w -= lr m, or with Nesterov lr (g + μ m)

AdamW is Adam without λ w in g; first w *= 1 - lr λ. So are the others where the weight decay is decoupled.

What does not depend on gradients comes as a row of numbers for each step and parameter, worked out in float64 on the
host: step.py names their places. Kingma and Ba, 2015; Reddi et al., 2018; Dozat, 2016; Liu et al., 2020; Duchi et al.,
2011; Hinton, 2012; Loshchilov and Hutter, 2019.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import step as places
from .launch import Launch, LaunchConfig, cdiv, launch, plan
from .step import Rule

STEP_SIZE: tl.constexpr = tl.constexpr(places.STEP_SIZE)
DECAY: tl.constexpr = tl.constexpr(places.DECAY)
SHRINK: tl.constexpr = tl.constexpr(places.SHRINK)
SIGN: tl.constexpr = tl.constexpr(places.SIGN)
MAX_NORM: tl.constexpr = tl.constexpr(places.MAX_NORM)
MOMENTUM: tl.constexpr = tl.constexpr(places.MOMENTUM)
UNDAMPED: tl.constexpr = tl.constexpr(places.UNDAMPED)
ROOT: tl.constexpr = tl.constexpr(places.ROOT)
EPS: tl.constexpr = tl.constexpr(places.EPS)
GRAD_PART: tl.constexpr = tl.constexpr(places.GRAD_PART)
SQUARE_KEPT: tl.constexpr = tl.constexpr(places.SQUARE_KEPT)
SQUARE_PART: tl.constexpr = tl.constexpr(places.SQUARE_PART)
GRAD_STEP: tl.constexpr = tl.constexpr(places.GRAD_STEP)
ROW: tl.constexpr = tl.constexpr(places.ROW)
READ: tl.constexpr = tl.constexpr(tuple((name, place) for name, kind in places.RULES.items() for place in kind.numbers))
"""Which rule reads which number of a row."""


@triton.constexpr_function
def is_read(place, name, coupled, decoupled, maximize, read):
    """Whether a rule reads that number. `read` is READ: so Triton's key of a kernel contains it."""
    options = {DECAY.value: coupled, SHRINK.value: decoupled, SIGN.value: maximize}
    return options.get(place, place == STEP_SIZE.value or (name, place) in read)


@triton.jit
def numbers_of(row_ptr, RULE: tl.constexpr):
    """A row of the table, with the numbers that the rule reads at their places, and anything at the others."""
    step_size = tl.load(row_ptr + STEP_SIZE)
    numbers = ()
    for place in tl.static_range(ROW):
        number = step_size
        if is_read(place, RULE.name, RULE.coupled, RULE.decoupled, RULE.maximize, READ):
            number = tl.load(row_ptr + place)
        numbers = numbers + (number,)  # type: ignore[assignment]  # it grows
    return numbers


@triton.constexpr_function
def has(name, part):
    """Whether `part` is in a name."""
    return part in name


@triton.jit
def over_root(g, v, numbers, RULE: tl.constexpr):
    """g / (√v · root + ε); only the Adams have the root, and RAdam while it is not 0."""
    root = tl.sqrt(v)
    if RULE.name == "radam":
        root = tl.where(numbers[ROOT] > 0, root * numbers[ROOT], 0.0)  # v may be infinite
    elif has(RULE.name, "adam") or RULE.name == "amsgrad":
        root *= numbers[ROOT]
    r = tl.rsqrt(root + numbers[EPS])
    return g * r * r  # a quotient takes 519 of 1,840 instructions of a step of 64-128-10 on sm_90, this 212


@triton.jit
def adam(state, g, numbers, RULE: tl.constexpr):
    """What the Adams take from w, and their states."""
    m = state[1] + numbers[GRAD_PART] * (g - state[1])
    v = numbers[SQUARE_KEPT] * state[2] + numbers[SQUARE_PART] * g * g
    states = (m, v)
    if RULE.name == "amsgrad":
        v = tl.maximum(state[3], v, propagate_nan=tl.PropagateNan.ALL)
        states = states + (v,)  # type: ignore[assignment]
    if RULE.name == "nadam":
        change = over_root(numbers[STEP_SIZE] * m + numbers[GRAD_STEP] * g, v, numbers, RULE)
    else:
        change = numbers[STEP_SIZE] * over_root(m, v, numbers, RULE)
    return change, states


@triton.jit
def adagrad(state, g, numbers, RULE: tl.constexpr):
    """The same of Adagrad."""
    v = state[1] + g * g
    return numbers[STEP_SIZE] * over_root(g, v, numbers, RULE), (v,)


@triton.jit
def rmsprop(state, g, numbers, RULE: tl.constexpr):
    """The same of RMSprop; the mean of the gradients is the last of its states."""
    v = numbers[SQUARE_KEPT] * state[1] + numbers[SQUARE_PART] * g * g
    states, means, variance = (v,), (), v
    if has(RULE.name, "centered"):
        a = state[len(state) - 1] + numbers[GRAD_PART] * (g - state[len(state) - 1])
        means, variance = (a,), tl.fma(-a, a, v)  # type: ignore[assignment]
    g = over_root(g, variance, numbers, RULE)
    if has(RULE.name, "momentum"):
        g += numbers[MOMENTUM] * state[2]
        states = (v, g)  # type: ignore[assignment]
    return numbers[STEP_SIZE] * g, states + means


@triton.jit
def sgd(state, g, numbers, RULE: tl.constexpr):
    """The same of SGD."""
    states = ()
    if RULE.name != "sgd":
        tl.static_assert(RULE.name == "momentum" or RULE.name == "nesterov", "this rule has no device function")
        m = numbers[MOMENTUM] * state[1] + numbers[UNDAMPED] * g
        states = (m,)  # type: ignore[assignment]
        g = g + numbers[MOMENTUM] * m if RULE.name == "nesterov" else m
    return numbers[STEP_SIZE] * g, states


@triton.jit
def stepped(state, g, numbers, RULE: tl.constexpr):
    """A parameter and its states after the step of a `Rule`, where its gradient is g."""
    w = state[0]
    if RULE.maximize:
        g *= numbers[SIGN]
    if RULE.coupled:
        g = tl.fma(w, numbers[DECAY], g)  # as a sum it would become where the product begins, and spill
    if RULE.decoupled:
        w *= numbers[SHRINK]
    if has(RULE.name, "adam") or RULE.name == "amsgrad":
        change, states = adam(state, g, numbers, RULE)
    elif RULE.name == "adagrad":
        change, states = adagrad(state, g, numbers, RULE)
    elif has(RULE.name, "rmsprop"):
        change, states = rmsprop(state, g, numbers, RULE)
    else:
        change, states = sgd(state, g, numbers, RULE)
    return (w - change,) + states


@triton.jit
def load_state(ptrs, offs, mask):
    """Elements `offs` of a parameter and of its states."""
    state = ()
    for i in tl.static_range(len(ptrs)):
        state = state + (tl.load(ptrs[i] + offs, mask=mask, other=0.0),)  # type: ignore[assignment]
    return state


@triton.jit
def store_state(ptrs, offs, mask, state):
    """And back."""
    for i in tl.static_range(len(ptrs) - 1, -1, -1):
        tl.store(ptrs[i] + offs, state[i], mask=mask)


@triton.jit
def update(ptrs, offs, mask, g, numbers, RULE: tl.constexpr):
    """Make the step of a `Rule` on the elements `offs` of a parameter, whose gradient is g, and of its states."""
    state = load_state(ptrs, offs, mask)
    store_state(ptrs, offs, mask, stepped(state, g, numbers, RULE))


@triton.jit(do_not_specialize=["index"])
def optimizer_step_kernel(
    g_ptr, ptrs, table_ptr, step_ptr, size, parameters, index, RULE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Make the step that `step_ptr` counts on BLOCK_N elements of the parameter number `index` of so many."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < size
    row_ptr = table_ptr + (tl.load(step_ptr) * parameters + index) * ROW
    g = tl.load(g_ptr + offs, mask=mask, other=0.0)
    update(ptrs, offs, mask, g, numbers_of(row_ptr, RULE), RULE)


STEP_CONFIG = LaunchConfig(1, 1024, num_warps=4)
"""Unmeasured."""


@lru_cache(maxsize=4096)
def plan_step(size: int, rule: Rule) -> Launch:
    """The launch of optimizer_step_kernel on a parameter of so many elements."""
    return plan(cdiv(size, STEP_CONFIG.block_n), STEP_CONFIG, RULE=rule, BLOCK_N=STEP_CONFIG.block_n)


def optimizer_step(
    w: torch.Tensor,
    states: Sequence[torch.Tensor],
    g: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    index: int,
    rule: Rule,
) -> None:
    """Make a step on w, whose gradient is g, and on its states: all contiguous, of one shape, float32 or float64.

    `table` [steps, parameters, ROW] has its row at the number in `step`, [1] int64, and at `index`.
    """
    if w.numel():
        arguments = (g, (w, *states), table, step, w.numel(), table.shape[1], index)
        launch(optimizer_step_kernel, plan_step(w.numel(), rule), *arguments)
