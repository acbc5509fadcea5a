"""Who serves a call, decided in one place: the compiled Triton kernels, the same kernels in the Triton interpreter,
or PyTorch's own operators. :func:`explain` tells, :func:`strict` forbids the last. And what a thread may ask of a call
besides: :func:`check_labels`.
"""

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from . import internals
from .internals import tree_leaves

# Read once, as Triton reads it when a kernel is decorated: the two must not disagree later.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
try:
    HAS_TRITON = importlib.util.find_spec("triton") is not None
except (ImportError, ValueError):  # an import hook, or a stand-in without a spec, hides it
    HAS_TRITON = False

try:
    native: Any = importlib.import_module("fusednn._native")
except ImportError:  # there was no compiler when fusednn was installed
    native = None
"""The code in C++, of kernels/native."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What the kernels take."""


FALLBACKS = ("PyTorch", "looped")
"""The implementations that :func:`strict` forbids: PyTorch's operators, and a training loop that Python runs."""


class Decision(NamedTuple):
    """Which implementation served an operation, and why."""

    operation: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.implementation} ({self.reason})"


class Decisions(tuple[Decision, ...]):
    """The decisions of a call, in order; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no operation of fusednn"
        widths = [max(len(decision[column]) for decision in self) for column in (0, 1)]
        return "\n".join(
            f"{operation:{widths[0]}}  {implementation:{widths[1]}}  {reason}"
            for operation, implementation, reason in self
        )


class FallbackError(RuntimeError):
    """PyTorch would have served an operation inside :func:`strict`."""


class _Watch(threading.local):
    """What this thread asked for: the list that explain fills, the depth of strict and that of check_labels."""

    decisions: list[Decision] | None = None
    strict: int = 0
    active: bool = False
    labels: int = 0


_watch = _Watch()


def serves(operation: str, x: torch.Tensor) -> bool:
    """Whether the Triton kernels serve `operation` on `x`, its first argument; else PyTorch's operators do.

    Raises FallbackError inside :func:`strict` if they do not.
    """
    if _watch.active:
        _tell(operation, x)
    on_device = INTERPRETED if x.is_cpu else x.is_cuda or x.is_xpu
    if not (on_device and HAS_TRITON and x.dtype in DTYPES and x.layout is torch.strided):
        return False
    return not (x.is_nested or _is_distributed(x) or internals.is_traced())


def _is_distributed(x: torch.Tensor) -> bool:
    """Whether `x` is a DTensor, parts on several devices: PyTorch knows how to multiply such, our operators do not."""
    kind = type(x)
    return not (kind is torch.Tensor or kind is torch.nn.Parameter) and kind.__module__ == "torch.distributed.tensor"


def refusal(x: torch.Tensor) -> str | None:
    """Why PyTorch serves `x`, or None if Triton does."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if x.is_cpu and not INTERPRETED:
        return "a CPU tensor: the kernels are for GPUs"
    if not (x.is_cpu or x.is_cuda or x.is_xpu):  # ROCm's devices are called cuda
        return f"no Triton backend for device type {x.device.type}"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if x.layout != torch.strided:
        return f"no kernel for the layout {x.layout}"
    if x.is_nested:
        return "a nested tensor"
    if internals.is_traced():
        return "torch.jit.trace, which follows no kernel"
    if _is_distributed(x):
        return "a DTensor, whose parts lie on several devices"
    return None


def without_memory(x: torch.Tensor) -> str | None:
    """Words for a dense tensor that has no memory, or less than it needs, as after `x.untyped_storage().resize_(0)`.

    Whoever reads such a tensor reads what is not its own, PyTorch too.
    """
    if not (size := x.numel()) or x._is_zerotensor():
        return None
    if not x.is_contiguous():
        size = 1 + sum([(n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)])
    if x.data_ptr() and x.untyped_storage().nbytes() >= (x.storage_offset() + size) * x.itemsize:
        return None
    return f"a tensor of {list(x.shape)} has no memory, or less than that"


def _tell(operation: str, x: torch.Tensor) -> None:
    why_not = refusal(x)
    if why_not is None:
        note(Decision(operation, "Triton interpreter" if x.is_cpu else "Triton", f"{x.device}, {x.dtype}"))
    else:
        note(Decision(operation, "PyTorch", why_not))


def note(decision: Decision) -> None:
    """Report `decision` to :func:`explain` and :func:`strict`, where either is active.

    Raises FallbackError inside :func:`strict` if it is one of FALLBACKS.
    """
    if _watch.decisions is not None:
        _watch.decisions.append(decision)
    if _watch.strict and decision.implementation in FALLBACKS:
        raise FallbackError(str(decision))


def watched() -> bool:
    """Whether this thread is inside :func:`explain` or :func:`strict`."""
    return _watch.active


def overrule(operation: str, reason: str, implementation: str = "PyTorch") -> None:
    """Report that not Triton serves `operation` after all: :func:`serves` saw the tensor alone, not every argument."""
    if _watch.decisions and _watch.decisions[-1].operation == operation:
        _watch.decisions.pop()
    note(Decision(operation, implementation, reason))


def explain(fn: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Decisions:
    """Run ``fn(*inputs, **kwargs)`` without gradients and tell which implementation served each operation, and why.

    `fn` is a function or a module. The decisions come in the order of the calls, and print as a table. `fn` really
    runs, so `train_steps` and a step of `make_train_step` train. Give `train_steps` no steps to hear its engine without
    training: ``explain(train_steps, model, optimizer, inputs, targets, steps=0)``. Before torch 2.13 what torch.compile
    made runs, in all threads, as the function that it was made of, which asks for the same kernels.
    """
    outer, _watch.decisions = _watch.decisions, []
    _watch.active = True
    try:
        with torch.no_grad(), _uncompiled() if _COMPILED_IS_SILENT else nullcontext():
            fn(*inputs, **kwargs)
        return Decisions(_watch.decisions)
    finally:
        _watch.decisions = outer
        _watch.active = outer is not None or _watch.strict > 0


_COMPILED_IS_SILENT = torch.__version__ < "2.13"
"""Whether a compiled function tells :func:`explain` nothing."""

_stance: Any = None
_explaining, _changing = 0, threading.Lock()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run without torch.compile, from the first thread that enters to the last that leaves."""
    global _stance, _explaining
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():  # to import it takes a second
        yield
        return
    with _changing:
        _explaining += 1
        if _explaining == 1:
            _stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _changing:
            _explaining -= 1
            if not _explaining:
                _stance.__exit__(None, None, None)


def warmup(model: Callable[..., Any], *batch: Any) -> None:
    """Compile ahead what training and inference of `model` on `batch` launch, by running both once.

    `model` is a module, or a function such as ``lambda x, t: criterion(model(x), t)``. The kernels of `train_steps` are
    not among them. A batch of another size compiles anew only if it belongs to another row of the configuration tables.
    Gradients, the buffers of a module and the states of the random number generators stay as they were. Hooks run, and
    within a function BatchNorm counts the batch.
    """
    module = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    tensors = [x for x in (*tree_leaves(batch), *module.parameters(), *module.buffers()) if isinstance(x, torch.Tensor)]
    with torch.random.fork_rng(devices={x.get_device() for x in tensors if x.is_cuda}), torch.enable_grad():
        try:
            outputs = [y for y in tree_leaves(model(*batch)) if isinstance(y, torch.Tensor) and y.requires_grad]
            leaves = _leaves(outputs)
            if leaves:
                torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)
            with torch.no_grad():
                model(*batch)
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)


def _leaves(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose .grad a backward of `outputs` would add to."""
    nodes = {node for y in outputs if (node := y.grad_fn)}
    waiting, leaves = list(nodes), [y for y in outputs if y.is_leaf]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):  # an AccumulateGrad
            leaves.append(node.variable)
        fresh = {inner for inner, _ in node.next_functions if inner} - nodes
        nodes |= fresh
        waiting += fresh
    return leaves


@contextmanager
def strict() -> Iterator[None]:
    """Within it, an operation that PyTorch would serve raises FallbackError, in the forward.

    A product that the configuration tables give to cuBLAS is no fallback.
    """
    _watch.strict += 1
    _watch.active = True
    try:
        yield
    finally:
        _watch.strict -= 1
        _watch.active = _watch.decisions is not None or _watch.strict > 0


@contextmanager
def check_labels() -> Iterator[None]:
    """A mode for debugging: within it a label out of range raises PyTorch's IndexError on a GPU too.

    Each call then waits for the GPU. Without the mode such a label makes its row's loss and gradient NaN on a GPU.
    Labels on a CPU are always checked.
    """
    _watch.labels += 1
    try:
        yield
    finally:
        _watch.labels -= 1


def checks_labels() -> bool:
    """Whether this thread is inside :func:`check_labels`."""
    return _watch.labels > 0
