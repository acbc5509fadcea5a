"""Reads a model: the chain of Linears and activations that the kernels train, or why it is none."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import reading
from ..fuse import FusedLinear, FusedReLU
from ..kernels.step import MOST_LAYERS, Activation
from ..modules import Linear, LinearReLU
from ..reading import Facts, Node, Reading, Size

Features = tuple[int, ...]


class Net(NamedTuple):
    """A net whose layer l has sizes[l] inputs, sizes[l + 1] outputs and activations[l] behind it.

    `places` has the weight [outputs, inputs] and the bias [outputs], or None, of each layer, one after the other.
    """

    places: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    activations: tuple[Activation, ...]

    @property
    def parameters(self) -> list[Tensor]:
        """Those that are there."""
        return [parameter for parameter in self.places if parameter is not None]

    @property
    def first(self) -> Tensor:
        """The first weight."""
        weight = self.places[0]
        assert weight is not None
        return weight

    @property
    def weights(self) -> int:
        """How many numbers the weights have."""
        return sum(a * b for a, b in pairwise(self.sizes))

    def __str__(self) -> str:
        return "-".join(map(str, self.sizes))


def read(model: Any, features: Features | None) -> tuple[Net | str, Facts]:
    """The net that `model` computes, if nobody watches it do so, or why it is none; and the facts that it rests on.

    It is read in the mode that it is in: neither names nor classes of modules matter, nor where its parameters lie.
    `features` is the shape of a row of the inputs, which nn.Flatten or a view in front of the net may make a vector of.
    """
    found, facts = _kept(_NETS, model, features, _net_of)
    if isinstance(found, str):
        return found, facts
    places, (sizes, activations) = found
    return Net(tuple(places), sizes, activations), facts


def read_pure(model: Any) -> list[Tensor] | str:
    """The parameters of `model` if it is made of pure modules alone and nobody watches it; else why not.

    Pure ones do the same to any tensors of one shape: nothing random, no state, no look at values from Python.
    """
    found, _ = _kept(_PURE, model, None, _pure_of)
    if isinstance(found, str):
        return found
    used: list[Tensor] = found[0]
    if {*map(id, used)} != {*map(id, model.parameters())} or any(True for _ in model.buffers()):
        return "the model has parameters that it does not use, or buffers"
    return memory_refusal(used) or used


_NETS: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()
_PURE: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()


def _kept(kept: Any, model: Any, features: Features | None, find: Callable[..., Any]) -> tuple[Any, Facts]:
    """The tensors that `find` found in `model`, and what else: before, if nothing has changed since, or else now.

    Or words for why there are none; and the facts.
    """
    if not isinstance(model, nn.Module):
        facts = Facts()
        facts.never()
        return "the model is not a module", facts
    before = kept.get(model)
    if before is not None:
        kind, shape, facts, found, more, kinds = before
        if kind() is type(model) and shape == features and facts.hold():
            if isinstance(found, str):
                return found, facts
            tensors = [None if tensor is None else tensor() for tensor in found]
            if kinds == kinds_of(tensors):
                return (tensors, more), facts
    facts = Facts()
    found = reading.read(model, facts)
    if isinstance(found, Reading):
        found = find(model, found, features, facts)
    weak, more, kinds = found, None, ()
    if not isinstance(found, str):
        tensors, more = found
        weak, kinds = [None if tensor is None else ref(tensor) for tensor in tensors], kinds_of(tensors)
    kept[model] = ref(type(model)), features, facts, weak, more, kinds
    return found, facts


def kinds_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What may change of tensors that stay the same objects, other than their numbers."""
    return tuple([tensor if tensor is None else _kind_of(tensor) for tensor in tensors])


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.layout is torch.strided and tensor.is_contiguous()


def _net_of(model: nn.Module, found: Reading, features: Features | None, facts: Facts) -> Any:
    """The net of a chain: its tensors, and its sizes and activations."""
    chain = found.nodes
    words = f"the model is {', '.join(map(str, chain[1:8])) or 'its input'}{', ...' * (len(chain) > 8)}"
    other = f"{words}, and not a chain of Linears with an activation behind each"
    if found.output is not chain[-1] or any(node.operands != (before,) for before, node in pairwise(chain)):
        return other
    places: list[Tensor | None] = []
    sizes: tuple[int, ...] = ()
    activations: list[Activation] = []
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
                return f"a row that has {list(features or ())} numbers meets a Linear that takes {weight.shape[1]}"
            features = (weight.shape[0],)
            sizes = (*(sizes or (weight.shape[1],)), weight.shape[0])
            places += [weight, bias]
            activations.append(Activation("relu") if kind == "linear relu" else Activation())
        elif kind == "flatten":
            if (features := _flattened(node, features, facts)) == ():
                return other
        else:
            activation = activation_of(node, facts)
            if activation is None or not activations:
                return other
            if activations[-1] == Activation():
                activations[-1] = activation
            elif not activation == activations[-1] == Activation("relu"):  # of which two are one
                return other
    if not places:
        return other
    if len(activations) > MOST_LAYERS:
        return f"the model has {len(activations)} Linears, and a training kernel takes {MOST_LAYERS}"
    if 0 in sizes:
        return f"a Linear of {'-'.join(map(str, sizes))} is empty"
    refusal = parameters_refusal([place for place in places if place is not None], facts)
    return refusal or (places, (sizes, tuple(activations)))


def _kind(node: Node, facts: Facts) -> str:
    """What a node computes: "linear", "linear relu", "flatten", or something else, perhaps an activation."""
    if node.kind != "module":
        return "flatten" if node.what in ("flatten", "view", "reshape") else "other"
    kind = type(node.what)
    if kind is FusedLinear:
        return "linear relu" if facts.item(node.what, "__dict__", "applies_relu") is True else "linear"
    return _LAYERS.get(kind, "other")


_LAYERS: dict[type, str] = {nn.Linear: "linear", Linear: "linear", LinearReLU: "linear relu", nn.Flatten: "flatten"}

_MODULES: dict[type, str] = {
    nn.ReLU: "relu", FusedReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.ELU: "elu", nn.GELU: "gelu", nn.SiLU: "silu",
    nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Softplus: "softplus",
}  # fmt: skip

_OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"inplace": False},
    "leaky_relu": {"negative_slope": 0.01, "inplace": False},
    "elu": {"alpha": 1.0, "inplace": False},
    "gelu": {"approximate": "none"},
    "silu": {"inplace": False},
    "tanh": {},
    "sigmoid": {},
    "softplus": {"beta": 1.0, "threshold": 20.0},
}
"""The activations as torch.nn.functional calls them, with their options in order, and the defaults of these."""


def activation_of(node: Node, facts: Facts) -> Activation | None:
    """The activation that a node is, with its numbers; None where it is none, or one that no kernel computes."""
    if node.kind == "module":
        name = _MODULES.get(type(node.what), "")
        options = {option: facts.item(node.what, "__dict__", option) for option in _OPTIONS.get(name, {})}
    else:
        name, (positional, named) = node.what.removesuffix("_"), node.arguments
        options = dict(_OPTIONS.get(name, {}))
        in_place = name != node.what
        if in_place:
            options.pop("inplace", None)  # F.elu_ has others behind alpha
        if name not in _OPTIONS or len(positional) > len(options) or not named.keys() <= options.keys():
            return None
        options |= dict(zip(options, positional, strict=False)) | dict(named)
        options.setdefault("inplace", in_place)
    if name not in _OPTIONS:
        return None
    if name == "gelu":
        return {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}.get(options["approximate"])
    in_place, numbers = options.pop("inplace", False), tuple(options.values())
    if any(type(number) not in (int, float) or not math.isfinite(number) for number in numbers):
        return None
    if in_place is not False and any(number < 0 for number in numbers):  # of which PyTorch has no gradient
        return None
    return Activation(name, tuple(map(float, numbers)))


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


PURE: tuple[type[nn.Module], ...] = (*_LAYERS, *_MODULES, FusedLinear, nn.LayerNorm)
"""Modules that do the same to any tensors of one shape."""


def _pure_of(model: nn.Module, found: Reading, features: None, facts: Facts) -> Any:
    """All parameters of a model each of whose modules is pure and used; there is nothing else to keep."""
    used: dict[Tensor, None] = {}
    users = found.users()
    for node in found.nodes[1:]:
        if not (type(node.what) in PURE if node.kind == "module" else node.what.removesuffix("_") in _OPTIONS):
            return f"the model calls {node}"
        if node.kind == "module":
            used |= dict.fromkeys(node.what.parameters())
            if not users[node] and node is not found.output:  # autograd.grad would find no gradient of its parameters
                return f"the model does not use what {node} computes"
    if not isinstance(found.output, Node):
        return "the model returns no tensor"
    return parameters_refusal(list(used), facts) or (list(used), None)


def parameters_refusal(parameters: list[Tensor], facts: Facts) -> str | None:
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


def memory_refusal(parameters: list[Tensor]) -> str | None:
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
