"""Finds the net that the training kernels run, Linear, ReLU, Linear, in a user's model."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import reading
from ..fuse import FusedLinear, FusedReLU
from ..modules import Linear, LinearReLU
from ..reading import Facts, Node, Reading, Size

Features = tuple[int, ...]


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


def find_net(model: Any, features: Features | None = None) -> Net | str:
    """The parameters of `model` if it computes Linear, ReLU, Linear and nobody watches it do so; else why not.

    It is read in the mode that it is in: neither names nor classes of modules matter. `features` is the shape of a row
    of the inputs, which nn.Flatten or a view in front of the net may make a vector of.
    """
    net = read_net(model, features)[0]
    return net if isinstance(net, str) else against_memory(net.parameters) or net


def read_net(model: Any, features: Features | None) -> tuple[Net | str, Facts]:
    """The same, wherever the parameters lie, and the facts that it rests on."""
    found, facts = _kept(_NETS, model, features, _net_of)
    return (found if isinstance(found, str) else Net(*found)), facts


PURE: tuple[type[nn.Module], ...] = (
    nn.Linear, Linear, LinearReLU, FusedLinear, nn.ReLU, FusedReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid,
    nn.LeakyReLU, nn.ELU, nn.Softplus, nn.LayerNorm, nn.Flatten,
)  # fmt: skip
"""Modules that do the same to any tensors of one shape: nothing random, no state, no look at values from Python."""


def find_pure(model: Any) -> list[Tensor] | str:
    """The parameters of `model` if it is made of such modules alone and nobody watches it; else why not."""
    used, _ = _kept(_PURE, model, None, _pure_of)
    if isinstance(used, str):
        return used
    if {*map(id, used)} != {*map(id, model.parameters())} or any(True for _ in model.buffers()):
        return "the model has parameters that it does not use, or buffers"
    return against_memory(used) or used


_NETS: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()
_PURE: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()


def _kept(kept: Any, model: Any, features: Features | None, find: Callable[..., Any]) -> tuple[Any, Facts]:
    """The tensors that `find` found in `model` before, if nothing has changed since; else those that it finds now.

    Or words for why there are none; and the facts.
    """
    if not isinstance(model, nn.Module):
        facts = Facts()
        facts.never()
        return "the model is not a module", facts
    before = kept.get(model)
    if before is not None:
        kind, shape, facts, found, kinds = before
        if kind() is type(model) and shape == features and facts.hold():
            if isinstance(found, str):
                return found, facts
            tensors = [None if tensor is None else tensor() for tensor in found]
            if kinds == kinds_of(tensors):
                return tensors, facts
    facts = Facts()
    found = reading.read(model, facts)
    if isinstance(found, Reading):
        found = find(model, found, features, facts)
    weak, kinds = found, ()
    if not isinstance(found, str):
        weak, kinds = [None if tensor is None else ref(tensor) for tensor in found], kinds_of(found)
    kept[model] = ref(type(model)), features, facts, weak, kinds
    return found, facts


def kinds_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What may change of tensors that stay the same objects, other than their numbers."""
    return tuple([tensor if tensor is None else _kind_of(tensor) for tensor in tensors])


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.layout is torch.strided and tensor.is_contiguous()


def _net_of(model: nn.Module, found: Reading, features: Features | None, facts: Facts) -> Net | str:
    """The net of a chain of an input, perhaps a view of it, a Linear, a ReLU or several, and a Linear."""
    chain = found.nodes
    other = f"the model is {', '.join(map(str, chain[1:8])) or 'its input'}{', ...' * (len(chain) > 8)}"
    other += " and not Linear, ReLU, Linear, one after the other"
    if found.output is not chain[-1] or any(node.operands != (before,) for before, node in pairwise(chain)):
        return other
    kinds: list[str] = []
    parameters: list[Tensor | None] = []
    for node in chain[1:]:
        kind = _kind(node, facts)
        if kind.startswith("linear"):
            weight, bias = (facts.item(node.what, "_parameters", name) for name in ("weight", "bias"))
            facts.attribute(node.what, "__class__")
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                facts.never()  # its shape may change
                return other
            if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
                facts.never()
                return "a bias has another shape than [out_features]"
            if features not in (None, weight.shape[1:]):
                facts.never()
                return f"a row of the inputs is {list(features or ())}, and the first Linear takes {weight.shape[1]}"
            features = (weight.shape[0],)
            parameters += [weight, bias]
            kinds += kind.split()
        elif kind == "relu":
            kinds += ["relu"] * (kinds[-1:] != ["relu"])
        elif kind != "flatten" or (features := _flattened(node, features, facts)) == ():
            return other
    if kinds != ["linear", "relu", "linear"]:
        return other
    w1, b1, w2, b2 = parameters
    assert w1 is not None
    assert w2 is not None
    net = Net(w1, b1, w2, b2)
    return against_parameters(net.parameters, facts) or net


def _kind(node: Node, facts: Facts) -> str:
    """What a node computes: "linear", "relu", "linear relu", "flatten", or "other"."""
    if node.kind != "module":
        kind = node.what.removesuffix("_")
        return {"relu": "relu", "flatten": "flatten", "view": "flatten", "reshape": "flatten"}.get(kind, "other")
    module, kind = node.what, type(node.what)
    if kind is FusedLinear:
        return "linear relu" if facts.item(module, "__dict__", "applies_relu") is True else "linear"
    names: dict[type, str] = {
        nn.ReLU: "relu", FusedReLU: "relu", nn.Linear: "linear", Linear: "linear", LinearReLU: "linear relu",
        nn.Flatten: "flatten",
    }  # fmt: skip
    return names.get(kind, "other")


def _flattened(node: Node, features: Features | None, facts: Facts) -> Features | None:
    """The shape of a row behind a view: what it was as a vector, or () where that is not what the view makes of it."""
    if features == ():
        return ()
    whole = None if features is None else math.prod(features)
    if node.what in ("view", "reshape"):
        sizes = node.arguments[0]
        if len(sizes) == 1 and isinstance(sizes[0], tuple) and not isinstance(sizes[0], Size):
            sizes = sizes[0]
        if node.arguments[1] or len(sizes) != 2:
            return ()
        rows, columns = sizes
        of_rows = isinstance(rows, Size) and rows.dim == 0
        if type(columns) is not int or not (of_rows or (rows == -1 and columns > 0)):
            return ()
        return (whole or columns,) if columns == whole or (whole is None and columns > 0) else _rest(columns, whole)
    if node.kind == "module":
        ends = {name: facts.item(node.what, "__dict__", name) for name in ("start_dim", "end_dim")}
    else:
        ends = dict(zip(("start_dim", "end_dim"), node.arguments[0], strict=False)) | dict(node.arguments[1])
    last = (-1,) if features is None else (-1, len(features))
    if ends.get("start_dim", 0) != 1 or ends.get("end_dim", -1) not in last:
        return ()
    return None if whole is None else (whole,)


def _rest(columns: int, whole: int | None) -> Features | None:
    """Of view(rows, -1)."""
    return () if columns != -1 else None if whole is None else (whole,)


def _pure_of(model: nn.Module, found: Reading, features: None, facts: Facts) -> list[Tensor] | str:
    """All parameters of a model each of whose modules is pure and used."""
    used: dict[Tensor, None] = {}
    users = found.users()
    for node in found.nodes[1:]:
        if not (type(node.what) in PURE if node.kind == "module" else node.what in ("relu", "relu_")):
            return f"the model calls {node}"
        if node.kind == "module":
            used |= dict.fromkeys(node.what.parameters())
            if not users[node] and node is not found.output:  # autograd.grad would find no gradient of its parameters
                return f"the model does not use what {node} computes"
    if not isinstance(found.output, Node):
        return "the model returns no tensor"
    return against_parameters(list(used), facts) or list(used)


def against_parameters(parameters: list[Tensor], facts: Facts) -> str | None:
    """Why no kernel can write these, whatever memory they have."""
    for parameter in parameters:
        if (
            type(parameter) is not nn.Parameter
            or not facts.attribute(parameter, "requires_grad")
            or parameter.is_inference()
        ):
            return "a parameter is frozen or no plain nn.Parameter"
        names = [
            n for n in ("_backward_hooks", "_post_accumulate_grad_hooks") if facts.attribute(parameter, n) is not None
        ]
        if any(facts.length(parameter, name) for name in names):
            return "a parameter has hooks"
    return None


def against_memory(parameters: list[Tensor]) -> str | None:
    """Why no kernel can write these where they lie now."""
    if not all(parameter.layout == torch.strided and parameter.is_contiguous() for parameter in parameters):
        return "a parameter is not contiguous"
    if any(parameter.is_neg() or parameter._is_zerotensor() for parameter in parameters):
        return "a parameter has no memory, or is a view that negates"
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
        return "the parameters have several dtypes or devices"
    if len({parameter.data_ptr() for parameter in parameters}) < len(parameters):
        return "parameters share memory, or have none"
    return None
