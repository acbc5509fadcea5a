"""Finds the net that the training kernels run, Linear, ReLU, Linear, in a user's model."""

import copy
import random
import threading
from collections import deque
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..fuse import FusedLinear, FusedReLU, twin_of
from ..modules import Linear, LinearReLU, SimpleNN


class Net(NamedTuple):
    """The parameters of Linear, ReLU, Linear: weights [H, I] and [O, H], biases [H] and [O] or None."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        """Those that are there."""
        return [parameter for parameter in self if parameter is not None]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Inputs I, hidden units H, outputs O."""
        return self.w1.shape[1], self.w1.shape[0], self.w2.shape[0]

    def __str__(self) -> str:
        return "-".join(map(str, self.sizes))


def find_net(model: Any) -> Net | str:
    """The parameters of `model` if it computes Linear, ReLU, Linear and nobody watches it do so; else why not.

    torch.fx finds it, in the mode that the model is in: neither names nor classes of modules matter.
    """
    if (reason := _against_model(model)) is not None:
        return reason
    linears = _at_sight(model)
    if linears is None:
        traced = _trace(model)
        if isinstance(traced, str):
            return traced
        linears = _two_linears(*traced)
    if linears is None:
        return "the model is not Linear, ReLU, Linear"
    first, second = linears
    net = Net(first.weight, first.bias, second.weight, second.bias)
    return against_parameters(net.parameters) or net


PURE: tuple[type[nn.Module], ...] = (
    nn.Linear, Linear, LinearReLU, FusedLinear, nn.ReLU, FusedReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid,
    nn.LeakyReLU, nn.ELU, nn.Softplus, nn.LayerNorm, nn.Flatten, nn.Identity,
)  # fmt: skip
"""Modules that do the same to any tensors of one shape: nothing random, no state, no look at values from Python."""


def find_pure(model: Any) -> list[Tensor] | str:
    """The parameters of `model` if it is made of such modules alone and nobody watches it; else why not."""
    traced = _against_model(model) or _trace(model)
    if isinstance(traced, str):
        return traced
    call, graph = traced
    used: dict[Tensor, None] = {}
    for node in graph.nodes:
        module = call.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None:
            used |= dict.fromkeys(module.parameters())
        if not (type(module) in PURE or node.op in ("placeholder", "output") or node.target in _RELUS):
            return f"the model calls {str(node.target).removeprefix('model.')}"
        if module is not None and not node.users:  # autograd.grad would find no gradient of its parameters
            return f"the model does not use what {str(node.target).removeprefix('model.')} computes"
    if len(used) < len(list(model.parameters())) or any(True for _ in model.buffers()):
        return "the model has parameters that it does not use, or buffers"
    return against_parameters(list(used)) or list(used)


def _against_model(model: Any) -> str | None:
    """Why nobody can tell what `model` calls, or who watches it do so."""
    if not isinstance(model, nn.Module):
        return "the model is not a module"
    if _has_any_global_hook() or any(has_hooks(module) for module in model.modules()):
        return "the model has hooks"
    if any("forward" in vars(module) for module in model.modules()):
        return "a forward was replaced"
    if any(type(module).__module__.startswith(_PARALLEL) for module in model.modules()):
        return "the model is spread over devices"
    if type(model).__call__ is not nn.Module.__call__:  # torch.fx begins at its forward
        return "the model has a __call__ of its own"
    return None


def _at_sight(model: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """The Linears of `model` where its class says all: torch.fx takes as long as 50 steps of the digits on a CPU."""
    if _FORWARDS.get(type(model)) is not type(model).forward:
        return None
    layers: list[Any] = list(model) if isinstance(model, nn.Sequential) else [model.fc1, model.relu, model.fc2]
    kinds = [type(layer) for layer in layers]
    found = len(kinds) == 3 and kinds[0] in _LINEARS and kinds[1] is nn.ReLU and kinds[2] in _LINEARS
    return (layers[0], layers[2]) if found else None


_FORWARDS = {SimpleNN: SimpleNN.forward, nn.Sequential: nn.Sequential.forward}
_LINEARS = (nn.Linear, Linear)


def _trace(model: nn.Module) -> tuple[nn.Module, fx.Graph] | str:
    """What `model` calls, in the mode that it is in, or why that cannot be told."""
    twins: dict[nn.Module, nn.Module] = {}
    try:
        call = _Call(_twin(model, twins))
        before = [_attributes(twin) for twin in twins.values()]
        with _TRACING, torch.random.fork_rng(devices=()), torch.enable_grad():  # as in the loop, also within explain
            drawn = random.getstate(), torch.get_rng_state()
            try:
                graph = _Tracer().trace(call)
                is_random = random.getstate() != drawn[0] or not torch.equal(torch.get_rng_state(), drawn[1])
            finally:
                random.setstate(drawn[0])
    except Exception as error:  # whatever the forward of a user raises when it gets no tensors
        words = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.fx cannot trace the model: {words[0]}"
    if is_random:
        return "the model's forward draws random numbers"
    for twin, attributes in zip(twins.values(), before, strict=True):
        now = _attributes(twin)
        if len(now) != len(attributes) or any(a is not b for a, b in zip(now, attributes, strict=True)):
            return "the model's forward sets attributes"
    return call, graph


_TRACING = threading.RLock()
"""torch.fx patches nn.Module for all threads, and two at once would leave it patched."""


class _Call(nn.Module):
    """Calls a model as the loop does: traced itself, it would be given whatever may be left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Input(fx.Proxy):
    """Passes for a Tensor where a forward asks `isinstance(x, Tensor)`."""

    __class__ = Tensor  # type: ignore[assignment]
    _is_param = _is_buffer = False


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module` and all in it anew, but for the layers: their forward may set what it likes. `twins` collects them."""
    if isinstance(module, (nn.Linear, nn.ReLU)):
        return module
    if module not in twins:
        twin = twins[module] = twin_of(module, module.training)
        vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if type(value) in _LISTS})
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, twins)
    return twins[module]


_LISTS = (list, set, deque)
_PARALLEL = ("torch.nn.parallel.", "torch.distributed.")


def _attributes(module: nn.Module) -> list[Any]:
    """The attributes of `module` and what lies in them: the same objects as before, unless one was set."""
    parts: list[Any] = [buffer._version for buffer in module._buffers.values() if buffer is not None]
    for name, value in vars(module).items():
        parts += [name, value]
        if type(value) is dict:
            parts += [*value, *value.values()]
        elif type(value) in _LISTS:
            parts += value
    return parts


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches calls of `module`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def against_parameters(parameters: list[Tensor]) -> str | None:
    """Why no kernel can write these."""
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or not parameter.requires_grad or parameter.is_inference():
            return "a parameter is frozen or no plain nn.Parameter"
        if parameter.layout != torch.strided or not parameter.is_contiguous():
            return "a parameter is not contiguous"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "a parameter has hooks"
        if parameter.dtype != parameters[0].dtype or parameter.device != parameters[0].device:
            return "the parameters have several dtypes or devices"
    if len({parameter.data_ptr() for parameter in parameters}) < len(parameters):
        return "parameters share memory, or have none"
    return None


class _Tracer(fx.Tracer):
    """Looks into every module but the layers themselves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, nn.ReLU)) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Input else super().create_arg(a)  # which would take it for a constant


_RELUS = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")


def _two_linears(model: nn.Module, graph: fx.Graph) -> tuple[nn.Linear, nn.Linear] | None:
    """The Linears of a graph that is one chain of an input, a Linear, a ReLU or several, a Linear, and the output."""
    chain = [node for node in graph.nodes if node.op != "placeholder" or node.users]
    if any(list(before.users) != [node] or node.all_input_nodes != [before] for before, node in pairwise(chain)):
        return None
    steps = [step for node in chain[1:-1] for step in _steps(model, node)]
    linears = [step for step in steps if isinstance(step, nn.Linear)]
    names = ["relu" if step == "relu" else "linear" if isinstance(step, nn.Linear) else "other" for step in steps]
    unrepeated = [name for i, name in enumerate(names) if names[i - 1 : i] != ["relu"] or name != "relu"]
    if unrepeated != ["linear", "relu", "linear"] or chain[-1].args != (chain[-2],):
        return None
    return linears[0], linears[1]


def _steps(model: nn.Module, node: fx.Node) -> list[Any]:
    """What `node` computes: a Linear, "relu", both, or None for anything else."""
    if node.op != "call_module":
        return ["relu" if node.target in _RELUS else None]
    module = model.get_submodule(str(node.target))
    if type(module) in (nn.ReLU, FusedReLU):
        return ["relu"]
    if type(module) not in (nn.Linear, Linear, LinearReLU, FusedLinear):
        return [None]
    rectified = type(module) is LinearReLU or node.kwargs.get("relu") or getattr(module, "fused_relus", ())
    return [module, "relu"] if rectified else [module]
