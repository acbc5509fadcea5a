"""act(x Wᵀ + b) on matrices: three operators and the autograd.Functions that close them under differentiation.

With m the ReLU's mask, all ones without it, g = m ∘ dy:

    linear        y  = act(x Wᵀ + b)       d(x, W, b) = input_grad(dy, y, W), weight_grad(dy, y, x)
    input_grad    dx = g W                 d(dy, W)   = m ∘ (ddx Wᵀ),            weight_grad(dy, y, ddx)
    weight_grad   dW = gᵀ x, db = Σ g      d(dy, x)   = m ∘ (x ddWᵀ + ddb),      input_grad(dy, y, ddW)

so derivatives of every order run on the same three kernels. The mask is read off y and has no derivative.

Under vmap the batch is folded into the rows of one launch, as long as W and b are shared. Where each element of the
batch has a weight of its own, or wants the gradient of one, PyTorch's batched product serves, and `explain` says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import overrule
from ..internals import is_batched
from .registry import define, kernels, needs_graph, recorded, saved_tensors


def _weight_grad_fake(dy: Tensor, y: Tensor | None, x: Tensor, needs_dw: bool, needs_db: bool) -> tuple[Tensor, Tensor]:
    n, k = dy.shape[1], x.shape[1]
    return dy.new_empty((n, k) if needs_dw else (0,)), dy.new_empty((n if needs_db else 0,))


_linear: Callable[..., Tensor] = define(
    "linear(Tensor x, Tensor w, Tensor? b, bool relu) -> Tensor",
    lambda x, w, b, relu: kernels("linear").linear_forward(x, w, b, relu),
    lambda x, w, b, relu: x.new_empty((x.shape[0], w.shape[0])),
    lambda x, w, b, relu, **_: 2 * x.shape[0] * w.numel(),
)
_linear_input_grad: Callable[..., Tensor] = define(
    "linear_input_grad(Tensor dy, Tensor? y, Tensor w) -> Tensor",
    lambda dy, y, w: kernels("linear").linear_input_grad(dy, y, w),
    lambda dy, y, w: dy.new_empty((dy.shape[0], w.shape[1])),
    lambda dy, y, w, **_: 2 * dy.shape[0] * w.numel(),
)
_linear_weight_grad: Callable[..., tuple[Tensor, Tensor]] = define(
    "linear_weight_grad(Tensor dy, Tensor? y, Tensor x, bool needs_dw, bool needs_db) -> (Tensor, Tensor)",
    lambda dy, y, x, needs_dw, needs_db: kernels("linear").linear_weight_grad(dy, y, x, needs_dw, needs_db),
    _weight_grad_fake,
    lambda dy, y, x, needs_dw, needs_db, **_: 2 * dy.numel() * x.shape[1] * needs_dw,
)


def is_library(m: int, n: int, k: int) -> bool:
    """Whether a layer of these sizes leaves its products to PyTorch: a row of the configuration table says so."""
    library: bool = kernels("linear").is_library(m, n, k)
    return library


def linear(x: Tensor, w: Tensor, b: Tensor | None, relu: bool) -> Tensor:
    """act(x Wᵀ + b) [M, N] of x [M, K], w [N, K] and b [N] or None, of one dtype and device."""
    if not needs_graph(x, w, b):
        return _linear(x, w, b, relu)
    if _batched_grads(x, w, b):
        y = torch.nn.functional.linear(x, w, b)
        return torch.relu(y) if relu else y
    return _record_linear(x, w, b, relu)


def _batched_grads(*tensors: Tensor | None) -> bool:
    """Whether one is batched by `autograd.grad(..., is_grads_batched=True)`: the graph of a Function would be lost with
    the batch, so PyTorch's operators serve, which keep theirs.
    """
    if torch.compiler.is_compiling():
        return False
    return any(tensor is not None and is_batched(tensor) for tensor in tensors)


def input_grad(dy: Tensor, y: Tensor | None, w: Tensor) -> Tensor:
    """dx [M, K] of dy [M, N] and w [N, K]; y [M, N] is the output behind a ReLU, None without one."""
    if not needs_graph(dy, w):
        return _linear_input_grad(dy, y, w)
    return _mask(dy, y) @ w if _batched_grads(dy, y, w) else _record_input_grad(dy, y, w)


def weight_grad(
    dy: Tensor, y: Tensor | None, x: Tensor, needs_dw: bool = True, needs_db: bool = True
) -> tuple[Tensor, Tensor]:
    """dW [N, K] and db [N] of dy [M, N] and x [M, K]; what is not needed has no elements."""
    if not needs_graph(dy, x):
        return _linear_weight_grad(dy, y, x, needs_dw, needs_db)
    if _batched_grads(dy, y, x):
        g = _mask(dy, y)
        return g.mT @ x if needs_dw else g.new_empty(0), g.sum(0) if needs_db else g.new_empty(0)
    return _record_weight_grad(dy, y, x, needs_dw, needs_db)


def _mask(gradient: Tensor, y: Tensor | None) -> Tensor:
    """m ∘ gradient, by an operator of PyTorch, which it can differentiate."""
    product: Tensor = kernels("linear").masked(gradient, y)
    return product


def _front(tensor: Tensor, dim: int | None) -> Tensor:
    """`tensor` with vmap's dimension in front, of size 1 where it has none."""
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def _fold(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """The matrices [B, M, K] of vmap's batch as one [B · M, K]."""
    return _front(tensor, dim).expand(batch, -1, -1).flatten(0, 1)


def _unfold(rows: Tensor, batch: int, like: Tensor, dim: int | None) -> Tensor:
    """[B · M, N] as [B, M, N], M that of `like`; B may be 0."""
    return rows.view(batch, _front(like, dim).shape[1], rows.shape[1])


def _batched_product(operation: str, a: Tensor, b: Tensor) -> Tensor:
    """a b of [B, ...] matrices, by PyTorch."""
    overrule(operation, "vmap gives each product a matrix of its own: a batched one")
    product: Tensor = torch.matmul(a, b)
    return product


class Linear(torch.autograd.Function):
    """y = act(x Wᵀ + b). Saves x and W as the gradients asked for need them, and y behind a ReLU."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Tensor | None, relu: bool) -> tuple[Tensor, int]:
        x_dim, w_dim, b_dim, _ = in_dims
        if w_dim is None:
            rows, bias = _fold(x, x_dim, info.batch_size), b if b_dim is None else None
            y = _unfold(linear(rows, w, bias, relu and b_dim is None), info.batch_size, x, x_dim)
            if b_dim is None:
                return y, 0
        else:
            y = _batched_product("linear_relu" if relu else "linear", _front(x, x_dim), _front(w, w_dim).mT)
        if b is not None:
            y = y + (b if b_dim is None else b.movedim(b_dim, 0).unsqueeze(1))
        return torch.relu(y) if relu else y, 0

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, relu: bool) -> Tensor:
        return _linear(x, w, b, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, relu = inputs
        needs_dx, needs_dw, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_dw else None, w if needs_dx else None, output if relu else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, y = saved_tensors(ctx)
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        if needs_dx and needs_dw and y is not None and is_library(dy.shape[0], *w.shape):
            dy, y = _mask(dy, y), None  # once for both
        dx = input_grad(dy, y, w) if needs_dx else None
        dw = db = None
        if needs_dw or needs_db:
            dw, db = weight_grad(dy, y, dy if x is None else x, needs_dw, needs_db)
        return dx, dw if needs_dw else None, db if needs_db else None, None


class InputGrad(torch.autograd.Function):
    """dx = (m ∘ dy) W."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, y: Tensor | None, w: Tensor) -> tuple[Tensor, int]:
        dy_dim, y_dim, w_dim = in_dims
        if w_dim is None:
            rows = None if y is None else _fold(y, y_dim, info.batch_size)
            return _unfold(input_grad(_fold(dy, dy_dim, info.batch_size), rows, w), info.batch_size, dy, dy_dim), 0
        g = _mask(_front(dy, dy_dim), None if y is None else _front(y, y_dim))
        return _batched_product("linear_input_grad", g, _front(w, w_dim)), 0

    @staticmethod
    def forward(dy: Tensor, y: Tensor | None, w: Tensor) -> Tensor:
        return _linear_input_grad(dy, y, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        dy, y, w = saved_tensors(ctx)
        needs_dy, _, needs_w = ctx.needs_input_grad
        d_dy = _mask(linear(ddx, w, None, False), y) if needs_dy else None
        d_w = weight_grad(dy, y, ddx, True, False)[0] if needs_w else None
        return d_dy, None, d_w


class WeightGrad(torch.autograd.Function):
    """dW = (m ∘ dy)ᵀ x and db = Σ_m (m ∘ dy)."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, dy: Tensor, y: Tensor | None, x: Tensor, needs_dw: bool, needs_db: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        dy_dim, y_dim, x_dim, *_ = in_dims
        g = _mask(_front(dy, dy_dim), None if y is None else _front(y, y_dim)).expand(info.batch_size, -1, -1)
        nothing = g.new_empty(info.batch_size, 0)
        dw = _batched_product("linear_weight_grad", g.mT, _front(x, x_dim)) if needs_dw else nothing
        return (dw, g.sum(1) if needs_db else nothing), (0, 0)

    @staticmethod
    def forward(dy: Tensor, y: Tensor | None, x: Tensor, needs_dw: bool, needs_db: bool) -> tuple[Tensor, Tensor]:
        return _linear_weight_grad(dy, y, x, needs_dw, needs_db)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        dy, y, x, ctx.has_dw, ctx.has_db = inputs
        ctx.set_materialize_grads(False)  # zeros for dW would meet an inf in x
        ctx.save_for_backward(dy, y, x)

    @staticmethod
    def backward(ctx: Any, ddw: Tensor | None, ddb: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, y, x = saved_tensors(ctx)
        needs_dy, _, needs_x, *_ = ctx.needs_input_grad
        ddw, ddb = ddw if ctx.has_dw else None, ddb if ctx.has_db else None
        d_dy = d_x = None
        if needs_dy and ddw is not None:
            d_dy = _mask(linear(x, ddw, ddb, False), y)
        elif needs_dy and ddb is not None:
            d_dy = _mask(ddb.expand_as(dy), y)
        if needs_x and ddw is not None:
            d_x = input_grad(dy, y, ddw)
        return d_dy, None, d_x, None, None


_record_linear: Callable[..., Tensor] = recorded(Linear)
_record_input_grad: Callable[..., Tensor] = recorded(InputGrad)
_record_weight_grad: Callable[..., tuple[Tensor, Tensor]] = recorded(WeightGrad)
