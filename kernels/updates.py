"""One step of an optimizer on a tile of a parameter: Adam and AdamW, and SGD with and without momentum.

As torch.optim has them, with g the gradient (its sign turned where the optimizer maximizes), λ the weight decay and t
the number of the step:

    Adam      g += λ w;  m += (1 - β1)(g - m);  v = β2 v + (1 - β2) g²
              w -= lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + ε)
    AdamW     the same without λ w in g; first w *= 1 - lr λ
    SGD       g += λ w;  w -= lr g
    momentum  g += λ w;  m = μ m + (1 - damping) g;  w -= lr m, or with Nesterov lr (g + μ m)

What does not depend on gradients comes as a row of numbers for each step and parameter, worked out in float64 on the
host: step.py names their places. Kingma and Ba, 2015; Loshchilov and Hutter, 2019.
"""

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
MOMENTUM: tl.constexpr = tl.constexpr(places.MOMENTUM)
UNDAMPED: tl.constexpr = tl.constexpr(places.UNDAMPED)
ROOT: tl.constexpr = tl.constexpr(places.ROOT)
EPS: tl.constexpr = tl.constexpr(places.EPS)
GRAD_PART: tl.constexpr = tl.constexpr(places.GRAD_PART)
SQUARE_KEPT: tl.constexpr = tl.constexpr(places.SQUARE_KEPT)
SQUARE_PART: tl.constexpr = tl.constexpr(places.SQUARE_PART)
ROW: tl.constexpr = tl.constexpr(places.ROW)


@triton.jit
def numbers_of(row_ptr, RULE: tl.constexpr):
    """A row of the table, with the numbers that the rule reads at their places, and anything at the others."""
    step_size = tl.load(row_ptr + STEP_SIZE)
    decay = tl.load(row_ptr + DECAY) if RULE.coupled else step_size
    shrink = tl.load(row_ptr + SHRINK) if RULE.decoupled else step_size
    sign = tl.load(row_ptr + SIGN) if RULE.maximize else step_size
    seventh, eighth, parts = step_size, step_size, (step_size, step_size, step_size)
    if RULE.name == "adam":
        seventh, eighth = tl.load(row_ptr + ROOT), tl.load(row_ptr + EPS)
        parts = tl.load(row_ptr + GRAD_PART), tl.load(row_ptr + SQUARE_KEPT), tl.load(row_ptr + SQUARE_PART)
    elif RULE.name != "sgd":
        seventh, eighth = tl.load(row_ptr + MOMENTUM), tl.load(row_ptr + UNDAMPED)
    return step_size, decay, shrink, sign, step_size, step_size, seventh, eighth, parts[0], parts[1], parts[2]


@triton.jit
def stepped(w, m, v, g, numbers, RULE: tl.constexpr):
    """w and its state m and v after the step of a `Rule`, where w's gradient is g."""
    if RULE.maximize:
        g *= numbers[SIGN]
    if RULE.coupled:
        g = tl.fma(w, numbers[DECAY], g)  # as a sum it would become where the product begins, and spill
    if RULE.decoupled:
        w *= numbers[SHRINK]
    if RULE.name == "adam":
        m += numbers[GRAD_PART] * (g - m)
        v = numbers[SQUARE_KEPT] * v + numbers[SQUARE_PART] * g * g
        r = tl.rsqrt(tl.sqrt(v) * numbers[ROOT] + numbers[EPS])
        g = m * r * r  # a quotient takes 519 of 1,840 instructions of a step of 64-128-10 on sm_90, this 212
    elif RULE.name != "sgd":
        tl.static_assert(RULE.name == "momentum" or RULE.name == "nesterov", "this rule has no device function")
        m = numbers[MOMENTUM] * m + numbers[UNDAMPED] * g
        g = g + numbers[MOMENTUM] * m if RULE.name == "nesterov" else m
    return w - numbers[STEP_SIZE] * g, m, v


@triton.jit
def load_state(w_ptr, m_ptr, v_ptr, offs, mask, RULE: tl.constexpr):
    """Elements `offs` of w and of its state: m and v as the rule has them, or w."""
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    m = w if RULE.name == "sgd" else tl.load(m_ptr + offs, mask=mask, other=0.0)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0) if RULE.name == "adam" else w
    return w, m, v


@triton.jit
def store_state(w_ptr, m_ptr, v_ptr, offs, mask, state, RULE: tl.constexpr):
    """And back."""
    w, m, v = state
    if RULE.name == "adam":
        tl.store(v_ptr + offs, v, mask=mask)
    if RULE.name != "sgd":
        tl.store(m_ptr + offs, m, mask=mask)
    tl.store(w_ptr + offs, w, mask=mask)


@triton.jit
def update(w_ptr, m_ptr, v_ptr, offs, mask, g, numbers, RULE: tl.constexpr):
    """Make the step of a `Rule` on the elements `offs` of w, whose gradient is g, and of its state m and v."""
    w, m, v = load_state(w_ptr, m_ptr, v_ptr, offs, mask, RULE)
    store_state(w_ptr, m_ptr, v_ptr, offs, mask, stepped(w, m, v, g, numbers, RULE), RULE)


@triton.jit(do_not_specialize=["index"])
def optimizer_step_kernel(
    w_ptr, m_ptr, v_ptr, g_ptr, table_ptr, step_ptr, size, parameters, index,
    RULE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Make the step that `step_ptr` counts on BLOCK_N elements of the parameter number `index` of so many."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < size
    row_ptr = table_ptr + (tl.load(step_ptr) * parameters + index) * ROW
    g = tl.load(g_ptr + offs, mask=mask, other=0.0)
    update(w_ptr, m_ptr, v_ptr, offs, mask, g, numbers_of(row_ptr, RULE), RULE)


STEP_CONFIG = LaunchConfig(1, 1024, num_warps=4)
"""Unmeasured."""


@lru_cache(maxsize=4096)
def plan_step(size: int, rule: Rule) -> Launch:
    """The launch of optimizer_step_kernel on a parameter of so many elements."""
    return plan(cdiv(size, STEP_CONFIG.block_n), STEP_CONFIG, RULE=rule, BLOCK_N=STEP_CONFIG.block_n)


def optimizer_step(
    w: torch.Tensor,
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    g: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    index: int,
    rule: Rule,
) -> None:
    """Make a step on w, whose gradient is g, and on its state: all contiguous, of one shape, float32 or float64.

    `table` [steps, parameters, ROW] has its row at the number in `step`, [1] int64, and at `index`.
    """
    if w.numel():
        arguments = (w, w if first is None else first, w if second is None else second, g, table, step)
        launch(optimizer_step_kernel, plan_step(w.numel(), rule), *arguments, w.numel(), table.shape[1], index)
