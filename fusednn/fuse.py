"""fuse(model): each nn.Linear that an nn.ReLU follows runs as one kernel, in the model as it is.

Nothing is copied and no module is replaced: parameters, state dict keys, hooks and the optimizer's references stay.
What changes is the class of the modules concerned, and :func:`unfuse` changes it back.

* In an nn.Sequential the pairs are found when it is called, so whatever else calls its modules gets what it always got.
* In other modules torch.fx finds them: `forward` is traced in training and in evaluation mode, and a pair is one only
  if nothing but the ReLU ever sees the Linear's output. Then the Linear applies the ReLU and marks its output, and the
  ReLU hands on what is so marked. What cannot be traced is left alone.

As for SimpleNN, where a hook could tell the difference the two run one by one, and `explain` says so.
"""

import copy
import inspect
import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from . import dispatch
from .modules import Linear, unobserved

_log = logging.getLogger("fusednn")


class Fusion(NamedTuple):
    """What :func:`fuse` makes of an nn.Linear: `relu` names the ReLU that its kernel applies, or is None."""

    linear: str
    relu: str | None
    reason: str

    def __str__(self) -> str:
        name = self.linear or "the model itself"
        return f"{name} + {self.relu}: fused ({self.reason})" if self.relu else f"{name}: left alone ({self.reason})"


class FusedLinear(Linear):
    """An nn.Linear that applies the ReLU behind it: that of its nn.Sequential when asked to, or `fused_relus`."""

    fused_relus: tuple[nn.Module, ...] = ()

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """x Wᵀ + b [*, out_features] of input [*, in_features], or the ReLU of it."""
        if relu or not self.fused_relus:
            return super().forward(input, relu)
        if not all(unobserved(self, behind) for behind in self.fused_relus):
            _note_hooks()
            return super().forward(input)
        y = super().forward(input, relu=True)
        y._relu_applied = True  # type: ignore[attr-defined]
        return y


class FusedReLU(nn.ReLU):
    """An nn.ReLU that the Linear before it has applied, or does not have."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` if a FusedLinear marked it, else the ReLU of it."""
        if getattr(input, "_relu_applied", False) is not True:  # of a torch.fx Proxy any attribute is there
            return super().forward(input)
        input._relu_applied = False  # type: ignore[attr-defined]  # `x += shortcut` may follow, and this ReLU again
        return input


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs a FusedLinear and the nn.ReLU after it as one."""

    def forward(self, input: Any) -> Any:
        """What the modules, one after the other, make of `input`."""
        modules, i = list(self), 0
        while i < len(modules):
            pair = modules[i : i + 2]
            if [type(module) for module in pair] == [FusedLinear, nn.ReLU]:
                if unobserved(*pair):
                    input = pair[0](input, relu=True)
                    i += 2
                    continue
                _note_hooks()
            input = pair[0](input)
            i += 1
        return input


def _note_hooks() -> None:
    dispatch.note(dispatch.Decision("relu", "PyTorch", "it or the Linear before it has hooks"))


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    FusedLinear: nn.Linear,
    FusedReLU: nn.ReLU,
    FusedSequential: nn.Sequential,
}


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, or what it was before fuse."""
    return _PLAIN.get(type(module), type(module))


def fuse(model: nn.Module) -> nn.Module:
    """Fuse every nn.Linear of `model` with the nn.ReLU that follows it, in place, and return `model`.

    Parameters and state dict keys stay as they are; :func:`fusions` lists what was fused and what was left alone and
    why (the logger "fusednn" has it too). Call it before DistributedDataParallel, fully_shard or torch.compile wrap the
    model, and :func:`unfuse` before its modules are exchanged.

    What the model computes stays too, but for what a trace by torch.fx cannot show, outside of an nn.Sequential: a
    fused Linear that other code than a traced forward calls, by itself, applies the ReLU; and a forward that does
    something else with its output depending on the type of its input, the grad mode, a random number or an attribute
    other than `training` is seen as it goes now. Such a model had better be left as it is.
    """
    unfuse(model)
    analysis = _Analysis(model)
    for fusion in analysis.fusions():
        _log.info("fuse: %s", fusion)
    for sequential, linear, _ in analysis.in_sequentials():
        sequential.__class__, linear.__class__ = FusedSequential, FusedLinear
    for linear, relus in analysis.traced_pairs().items():
        linear.__class__, vars(linear)["fused_relus"] = FusedLinear, tuple(relus)
        for relu in relus:
            relu.__class__ = FusedReLU
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, in place, and return `model`."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
        vars(module).pop("fused_relus", None)  # from a subclass of a FusedLinear too, which parametrize makes
    return model


def fusions(model: nn.Module) -> tuple[Fusion, ...]:
    """What :func:`fuse` does, or has done, to each nn.Linear of `model`: a line each when printed."""
    return tuple(_Analysis(model).fusions())


class _LeafTracer(fx.Tracer):
    """Traces the forward of one module and looks into none of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def twin_of(module: nn.Module, training: bool) -> nn.Module:
    """`module` with the same children and parameters, and attributes and buffers that its forward may change."""
    twin = copy.copy(module)
    vars(twin).update(
        {name: dict(value) for name, value in vars(module).items() if type(value) is dict},
        _buffers={name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()},
        training=training,
    )
    return twin


class _Analysis:
    """Who calls the Linears and ReLUs of a model, as far as torch.fx can tell."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.sequentials = [module for module in model.modules() if _kind(module) is nn.Sequential]
        # what becomes of a Linear's output: the ReLU that alone gets it, or words for something else
        self.uses: dict[nn.Module, list[nn.Module | str]] = {linear: [] for linear in self.linears}
        self.opaque: dict[nn.Module, str] = {}  # what a module that cannot be traced may call
        for module in model.modules():
            if _kind(module) is nn.Sequential or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            if any(isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module):
                self._trace(module)

    def _trace(self, module: nn.Module) -> None:
        try:
            if "forward" in vars(module):
                raise TypeError("it was replaced")
            parameters = inspect.signature(module.forward).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            # torch.fx does not see a test for None: trace with and without what may be left out
            for given in ({}, defaults) if defaults else ({},):
                for mode in (True, False):
                    twin = twin_of(module, mode)
                    with torch.random.fork_rng(devices=()):
                        graph = _LeafTracer().trace(twin, given)
                    kept = {value.node for value in tree_leaves(vars(twin)) if isinstance(value, fx.Proxy)}
                    for node in graph.nodes:
                        self._read(twin, node, node in kept)
        except Exception as error:  # whatever the forward of a user raises when it gets no tensors
            words = str(error).strip().splitlines() or [type(error).__name__]
            name = f"{self.names[module]}, a {type(module).__name__}," if self.names[module] else type(module).__name__
            for inner in module.modules():
                self.opaque[inner] = f"torch.fx cannot trace the forward of {name} that may call it: {words[0]}"

    def _read(self, module: nn.Module, node: fx.Node, kept: bool) -> None:
        callee = _called(module, node)
        if node.op == "get_attr":  # a parameter, used by something else than the call of its module: forward(), say
            owner = module.get_submodule(str(node.target).rpartition(".")[0])
            if owner in self.uses:
                self.uses[owner].append(f"{node.target} is used by itself")
        if callee in self.uses:
            users = list(node.users)
            if kept:
                self.uses[callee].append("its output is kept as an attribute")
                return
            behind = _called(module, users[0]) if len(users) == 1 else None
            if behind is not None and _kind(behind) is nn.ReLU:
                self.uses[callee].append(behind)
            else:
                words = ", ".join(user.name for user in users) or "nothing"
                self.uses[callee].append(f"no nn.ReLU alone gets its output, but {words}")

    def in_sequentials(self) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
        """The nn.Sequentials, and the Linear and the ReLU of each pair in them."""
        for sequential in self.sequentials:
            for linear, relu in pairwise(_children(sequential)):
                paired = linear in self.uses and _kind(relu) is nn.ReLU
                if paired and _refusal(linear) is None and not self.uses[linear]:
                    yield sequential, linear, relu

    def traced_pairs(self) -> dict[nn.Module, list[nn.Module]]:
        """The Linears whose every use a ReLU follows, and those."""
        inside = self._inside()
        pairs: dict[nn.Module, list[nn.Module]] = {}
        for linear, uses in self.uses.items():
            relus = [use for use in dict.fromkeys(uses) if isinstance(use, nn.Module)]
            unsure = {linear, *relus} & inside or linear in self.opaque or _refusal(linear)
            if relus and len(relus) == len(set(uses)) and not unsure:
                pairs[linear] = relus
        return pairs

    def fusions(self) -> Iterator[Fusion]:
        """What becomes of each Linear, in the order of the model."""
        paired = {linear: relu for _, linear, relu in self.in_sequentials()}
        traced, inside = self.traced_pairs(), self._inside()
        for linear in self.linears:
            name = self.names[linear]
            if linear in traced:
                relus = " and ".join(self.names[relu] for relu in traced[linear])
                yield Fusion(name, relus, "found by torch.fx")
            elif linear in paired:
                yield Fusion(name, self.names[paired[linear]], "in an nn.Sequential")
            else:
                yield Fusion(name, None, self._reason(linear, linear in inside))

    def _inside(self) -> set[nn.Module]:
        return {module for sequential in self.sequentials for module in _children(sequential)}

    def _reason(self, linear: nn.Module, inside: bool) -> str:
        if (refusal := _refusal(linear)) is not None:
            return refusal
        if inside:
            return "called outside of its nn.Sequential" if self.uses[linear] else "no nn.ReLU follows it"
        if linear in self.opaque:
            return self.opaque[linear]
        for use in self.uses[linear]:
            if isinstance(use, str):
                return use
        return "its ReLU is in an nn.Sequential" if self.uses[linear] else "no forward calls it"


def _children(sequential: nn.Module) -> list[nn.Module]:
    """The modules that an nn.Sequential calls; children() has each of them only once."""
    return [module for module in sequential._modules.values() if module is not None]


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` of the trace of `root` calls."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _refusal(linear: nn.Module) -> str | None:
    """Why a Linear cannot be fused whatever follows it."""
    if _kind(linear) is not nn.Linear:
        return f"a {type(linear).__module__}.{type(linear).__qualname__}, not nn.Linear itself"
    if type(linear.weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(linear.weight).__qualname__}"
    return "its forward was replaced" if "forward" in vars(linear) else None
