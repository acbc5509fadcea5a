"""Reads a whole model, all of which has to be understood."""

import ast
from types import CellType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import modules
from .activations import MODULES
from .facts import GONE, Facts
from .nodes import CONSTANTS, NAMES, Node, Reading, Unread
from .reader import Frame, Reader, plain_class
from .sources import Source


class _Whole(Reader):
    """Reads a whole model as it is now: attributes have their values, and the forwards of its modules are read too."""

    inline = True

    def __init__(self, facts: Facts) -> None:
        super().__init__(bool)
        self.facts = facts

    def item(self, owner: Any, name: str, key: Any) -> Any:
        return self.facts.item(owner, name, key)

    def attribute_of_class(self, kind: type, name: str) -> Any:
        return self.facts.attribute(kind, name)

    def in_cell(self, cell: CellType) -> Any:
        self.facts.never()  # what holds a cell may hold the model
        return super().in_cell(cell)

    def note_length(self, module: nn.Module) -> None:
        self.facts.keys(module, "_modules")

    def constant(self, value: Any, name: str) -> Any:
        return value

    def source_of(self, function: Any) -> Source:
        self.facts.attribute(function, "__code__")
        defaults = function.__defaults__ or ()
        if function.__kwdefaults__ or any(type(default) not in CONSTANTS for default in defaults):
            self.facts.never()  # they may lead back to the model, and a dict changes unseen
        else:
            self.facts.attribute(function, "__defaults__", held=True)
        return super().source_of(function)

    def call_module(
        self, frame: Frame, call: ast.Call, module: nn.Module, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], Node):
            return self.refuse(frame, call)
        self.facts.attribute(module, "__class__")
        return self.run(module, args[0], self.text(frame, call))

    def run(self, module: nn.Module, x: Node, text: str = "") -> Any:
        """What `module` makes of x."""
        kind = plain_class(type(module))
        if (refusal := self.refusal(module)) is not None:
            raise Unread(refusal)
        if kind in _DROPOUTS:
            for name in ("training", "p"):
                self.item(module, "__dict__", name)
        if is_transparent(module):
            return x
        inner: list[str] | None = None
        if kind is nn.Sequential:
            inner = list(module._modules)
            self.note_length(module)
        elif kind.__qualname__ == "SimpleNN" and kind.__module__ == "fusednn.modules":
            inner = ["fc1", "relu", "fc2"]
        elif not kind.__module__.startswith(_KNOWN):
            return self.run_own(module, kind, x, text)
        if inner is None:
            return self.add(Node("module", module, (x,), text=text))
        for name in inner:
            child = self.item(module, "_modules", name)
            if not isinstance(child, nn.Module) or not isinstance(x, Node):
                raise Unread(f"{kind.__name__} has no {name}, or it gets no tensor")
            self.facts.attribute(child, "__class__")
            x = self.run(child, x, text)
        return x

    def run_own(self, module: nn.Module, kind: type, x: Node, text: str) -> Any:
        """What a module of a user's class makes of x."""
        place = next(place for place in kind.__mro__ if "forward" in vars(place))
        function = self.facts.attribute(kind, "forward")
        if not isinstance(function, FunctionType):
            raise Unread(f"the forward of {kind.__name__} is not a plain function")
        if place.__module__.startswith(_KNOWN):
            return self.add(Node("module", module, (x,), text=text))
        return self.call_function(function, place, module, [x], {})

    def refusal(self, module: nn.Module) -> str | None:
        """Why nobody can tell what a call of `module` does, or who watches it do so."""
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            self.facts.never()
            return "the model is scripted or traced: pass the one that it was made of"
        if kind.__module__.startswith("torch._dynamo.") or getattr(module, "_compiled_call_impl", None) is not None:
            self.facts.never()
            return "the model is compiled: pass the one that torch.compile was given"
        if kind.__module__.startswith(_PARALLEL):
            return "the model is spread over devices"
        if any(self.facts.attribute(kind, name) is not value for name, value in CALLS):
            return "the model has a __call__ of its own, or other attributes than it seems to have"
        for name in ("forward", "_compiled_call_impl", "_call_impl"):
            found = self.item(module, "__dict__", name)
            if found is not GONE and found is not None:
                return "a forward was replaced"
        return "the model has hooks" if any(self.facts.length(module, hooks) for hooks in HOOKS) else None


_KNOWN = ("torch.", "fusednn.modules", "fusednn.fuse")
_PARALLEL = ("torch.nn.parallel.", "torch.distributed.")
CALLS = [(name, getattr(nn.Module, name)) for name in ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")]
CALLS.append(("__getattribute__", object.__getattribute__))


_LOSSES = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "poisson_nll_loss",
)  # fmt: skip

UNTOUCHED: list[tuple[Any, str, Any]] = [
    (owner, name, getattr(owner, name))
    for owner, names in (
        *((kind, ["forward"]) for kind in (
            nn.Linear, *MODULES, nn.Sequential, nn.Flatten, nn.Identity, nn.Dropout, nn.CrossEntropyLoss,
            nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss,
            modules.Linear, modules.LinearReLU, modules.SimpleNN, modules.CrossEntropyLoss,
        )),
        *NAMES.items(), (F, ["linear", "cross_entropy", *_LOSSES]), (torch.autograd, ["backward", "grad"]),
        (Tensor, ["backward", "__getitem__", "detach"]),
    )
    for name in names
]  # fmt: skip
"""What the engines take for granted, as it was when it was imported; fuse adds its own."""


def refusal_of_all(facts: Facts) -> str | None:
    """Why no model is read, whatever it is: all modules have hooks, or PyTorch itself was changed."""
    if any(facts.length(torch_module, name) for name in vars(torch_module) if _is_of_all(name)):
        return "all modules have hooks"
    for owner, name, value in UNTOUCHED:
        if facts.attribute(owner, name) is not value:
            return f"{owner.__name__}.{name} was changed"
    return None


def _is_of_all(name: str) -> bool:
    return name.startswith("_global_") and name.endswith("_hooks")


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module has those who watch its calls."""


def is_transparent(module: nn.Module) -> bool:
    """Whether `module` hands on what it gets, as it is."""
    kind = type(module)
    return kind is nn.Identity or (kind in _DROPOUTS and (not module.training or bool(module.p == 0)))


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def read(model: nn.Module, facts: Facts) -> Reading | str:
    """What `model`, called with one tensor and nothing else, does, or why that is not known.

    It is read in the mode that it is in, with the grad mode on. The first node is its input.
    """
    if (refusal := refusal_of_all(facts)) is not None:
        return refusal
    reader, x = _Whole(facts), Node("input", "the input")
    reader.nodes.append(x)
    try:
        return Reading(reader.nodes, reader.run(model, x))
    except Unread as unread:
        return str(unread)
