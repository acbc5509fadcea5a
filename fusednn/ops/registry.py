"""How an operator is registered, called and differentiated: the part that every operation shares.

An operator is defined with `torch.library`, so that torch.compile, export, fake tensors and vmap see one opaque call,
and differentiated by a `torch.autograd.Function` outside it: `register_autograd` would break torch.func.grad.
"""

import importlib
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .. import internals

_library = torch.library.Library("fusednn", "DEF")
_flops: dict[Any, Callable[..., int]] = {}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@cache
def kernels(name: str) -> ModuleType:
    """The module `fusednn.kernels.<name>`, imported at its first use: importing Triton takes a while."""
    return importlib.import_module(f"fusednn.kernels.{name}")


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Callable[..., Any]:
    """Register the operator ``fusednn::schema`` and return what calls it.

    `implementation` runs on real tensors of any device, `fake` gives the shapes, strides and dtypes of its results and
    `flops` what `torch.utils.flop_counter` is told of a call. In eager mode the implementation is called directly:
    PyTorch's dispatcher costs 3 us a call there and adds nothing.
    """
    name = _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusednn::{name}", fake, lib=_library)
    packet = getattr(torch.ops.fusednn, name)
    operator = packet.default
    if flops is not None:
        _flops[packet] = flops

    def call(*arguments: Any) -> Any:
        if eager(*arguments):
            return implementation(*arguments)
        _count_flops()
        return operator(*arguments)

    return call


@internals.constant_under_compile
def _count_flops() -> None:
    """Tell PyTorch's counter of our operators. Whoever counts imports it: it imports Triton, which we put off."""
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    flop_counter.flop_registry.update(_flops)
    for mode in internals.dispatch_mode_stack():
        if hasattr(mode, "counter") and isinstance(mode.counter, flop_counter.FlopCounterMode):
            mode.counter.flop_registry = _flops | mode.counter.flop_registry  # its copy, made before


def eager(*arguments: Any) -> bool:
    """Whether a call on `arguments` is plain eager PyTorch: nothing traces, transforms or overrides it.

    Nor is a tensor batched, by `torch.autograd.grad(..., is_grads_batched=True)`, or lazily negated (`z.conj().imag`).
    """
    if torch.compiler.is_compiling() or internals.dispatch_modes() or internals.transforming():
        return False
    for argument in arguments:
        if type(argument) in _PLAIN:
            if argument.is_neg() or internals.is_batched(argument):
                return False
        elif isinstance(argument, torch.Tensor):
            return False  # a subclass of Tensor may have ideas of its own
    return True


def saved_tensors(ctx: Any) -> list[Any]:
    """What a Function has saved. Of an input it may be a wrapper of torch.func.vjp's, which has ended by now."""
    return [tensor if tensor is None else internals.unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on `tensors` must be recorded: for autograd, a torch.func transform or forward-mode AD."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return internals.transforming() or internals.in_forward_mode()


def recorded(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What applies `function`, written in the setup_context style that torch.func needs, to positional arguments.

    In eager mode the Python half of `Function.apply` is skipped: it binds the signature of forward, 13 us a call.
    """
    # the C++ half
    eager_apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    @internals.constant_under_compile
    def mark() -> None:
        torch.compiler.allow_in_graph(function)

    # torch.compile runs a function so marked when it meets it, and does not trace it. It must take `function` as one
    # call: traced into, it loses its gradient under torch.func.grad (all zero, with a warning). To say so beforehand
    # would import the compiler, which takes a second.

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            mark()
            return function.apply(*arguments)
        return function.apply(*arguments) if internals.transforming() else eager_apply(*arguments)

    return apply
