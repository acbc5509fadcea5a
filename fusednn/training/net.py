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
from ..reading import FORMS, MODULES, Facts, Node, Reading, Size

Features = tuple[int, ...]


class Net(NamedTuple):
    """A net whose layer l has sizes[l] inputs, sizes[l + 1] outputs and activations[l] behind it.

    `places` has the weight [outputs, inputs] and the bias [outputs], or None, of each layer, one after the other.
    """

    places: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    activations: tuple[Activation, ...]
    needs_rows: bool = False
    """Whether a view stands in front, of which PyTorch makes no matrix where there are no rows."""

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
    places, more = found
    return Net(tuple(places), *more), facts


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
    """What `find` finds in `model`, tensors and something else, or why there is nothing; and the facts.

    If nothing has changed since it was last asked, it is what was found then.
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
        found = find(found, features, facts)
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


def _net_of(found: Reading, features: Features | None, facts: Facts) -> Any:
    """The net of a chain of nodes: its tensors, and what else it is. Or why there is none."""
    chain = found.nodes
    for before, node in pairwise(chain):
        if node.operands != (before,):
            return f"the model is no chain: {node} gets another tensor than that of {before}, which is before it"
    if found.output is not chain[-1]:
        return f"the model returns something else than what the last of it, {chain[-1]}, computes"
    layers = _Layers(features, facts)
    for node in chain[1:]:
        if (refusal := layers.add(node)) is not None:
            return refusal
    if not layers.places:
        return "the model has no Linear"
    if len(layers.activations) > MOST_LAYERS:
        return f"the model has {len(layers.activations)} Linears, and a training kernel takes {MOST_LAYERS}"
    if 0 in layers.sizes:
        return f"a Linear of {'-'.join(map(str, layers.sizes))} is empty"
    refusal = parameters_refusal([place for place in layers.places if place is not None], facts)
    return refusal or (layers.places, (layers.sizes, tuple(layers.activations), layers.needs_rows))


class _Layers:
    """Collects the layers of a net, node by node. `features` is the shape of what a node gets, without the rows."""

    def __init__(self, features: Features | None, facts: Facts) -> None:
        self.features, self.facts = features, facts
        self.places: list[Tensor | None] = []
        self.sizes: Features = ()
        self.activations: list[Activation] = []
        self.needs_rows = False

    def add(self, node: Node) -> str | None:
        """Add what a node computes; or why no kernel computes it."""
        kind = type(node.what) if node.kind == "module" else None
        if kind in _LINEARS:
            applies_relu = kind is LinearReLU or (
                kind is FusedLinear and self.facts.item(node.what, "__dict__", "applies_relu") is True
            )
            return self._linear(node) or (self._activation(node, Activation("relu"), False) if applies_relu else None)
        if kind is nn.Flatten or (kind is None and node.what in _VIEWS):
            if (made := _flattened(node, self.features, self.facts)) == ():
                return f"{node} does not make a row of each example"
            self.features, self.needs_rows = made, self.needs_rows or node.what in ("view", "reshape")
            return None
        if (kind or node.what.removesuffix("_")) not in (*_MODULES, *FORMS):
            return f"no training kernel computes {node}"
        activation = activation_of(node, self.facts)
        if activation is None:
            return f"no training kernel computes {node} with such options"
        return self._activation(node, *activation)

    def _linear(self, node: Node) -> str | None:
        facts, features = self.facts, self.features
        weight, bias = (facts.item(node.what, "_parameters", name) for name in ("weight", "bias"))
        facts.attribute(node.what, "__class__")
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            facts.never()  # its shape may change
            return f"the weight of {node} is no matrix"
        if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
            facts.never()
            return "a bias has another shape than [out_features]"
        outputs, inputs = weight.shape
        if features not in (None, (inputs,)):
            facts.never()
            return f"a row that has {list(features or ())} numbers meets a Linear that takes {inputs}"
        self.features = (outputs,)
        self.sizes = (*(self.sizes or (inputs,)), outputs)
        self.places += [weight, bias]
        self.activations.append(Activation())
        return None

    def _activation(self, node: Node, activation: Activation, in_place: bool) -> str | None:
        if not self.activations:
            return f"{node} stands in front of the first Linear"
        before = self.activations[-1]
        if before == Activation():
            self.activations[-1] = activation
        elif not before == activation == Activation("relu"):  # of which two are one
            return f"{node} stands behind another activation"
        elif in_place:
            return f"{node} works in place on another's result, of which PyTorch then has no gradient"
        return None


_LINEARS = (nn.Linear, Linear, LinearReLU, FusedLinear)
_VIEWS = ("flatten", "view", "reshape")
_MODULES: dict[type, str] = MODULES | {FusedReLU: "relu"}

LARGEST = torch.finfo(torch.float32).max
"""A larger number of an activation PyTorch refuses in float32."""


def activation_of(node: Node, facts: Facts) -> tuple[Activation, bool] | None:
    """The activation that a node is, and whether it works in place; None for options that no kernel takes."""
    positional: tuple[Any, ...] = ()
    if node.kind == "module":
        name = _MODULES[type(node.what)]
        form = FORMS[name]
        options = {option: facts.item(node.what, "__dict__", option) for option in form.options}
    else:
        name, (positional, named) = node.what.removesuffix("_"), node.arguments
        form = FORMS[name]
        options = dict(form.options)
        if in_place := name != node.what:
            options.pop("inplace", None)  # F.elu_ has others behind alpha
        if len(positional) > (0 if form.by_name or node.kind == "method" else len(options)):
            return None
        if not named.keys() <= options.keys() or (named and node.kind == "method"):
            return None
        options |= dict(zip(options, positional, strict=False)) | dict(named)
        options.setdefault("inplace", in_place)
    if name == "gelu":
        names = {"none": "gelu", "tanh": "gelu_tanh"}
        return (Activation(names[options["approximate"]]), False) if options["approximate"] in names else None
    in_place, numbers = options.pop("inplace", False) is not False, tuple(options.values())
    if any(type(number) not in (int, float) or not abs(number) <= LARGEST for number in numbers):
        return None
    if in_place and (name == "elu" or any(number < 0 for number in numbers)):
        return None  # PyTorch reads the slope off the result then, or has none
    return Activation(name, tuple(map(float, numbers))), in_place


def _flattened(node: Node, features: Features | None, facts: Facts) -> Features | None:
    """The features behind a view, of those before it, which are None where they are not known.

    () where it does not make of each row a vector of all its numbers.
    """
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
        if columns == -1:
            return None if whole is None else (whole,)
        return (columns,) if columns > 0 and whole in (None, columns) else ()
    if node.kind == "module":
        ends = {name: facts.item(node.what, "__dict__", name) for name in ("start_dim", "end_dim")}
    else:
        ends = dict(zip(("start_dim", "end_dim"), node.arguments[0], strict=False)) | dict(node.arguments[1])
    last = (-1,) if features is None else (-1, len(features))
    if ends.get("start_dim", 0) != 1 or ends.get("end_dim", -1) not in last:
        return ()
    return None if whole is None else (whole,)


PURE: tuple[type[nn.Module], ...] = (*_LINEARS, *_MODULES, nn.Flatten, nn.LayerNorm)
"""Modules that do the same to any tensors of one shape."""

_PURE_NAMES = (*FORMS, *_VIEWS)


def _pure_of(found: Reading, features: None, facts: Facts) -> Any:
    """All parameters of a model whose modules are pure and used, and nothing else."""
    used: dict[Tensor, None] = {}
    users = found.users()
    for node in found.nodes[1:]:
        if not (type(node.what) in PURE if node.kind == "module" else node.what.removesuffix("_") in _PURE_NAMES):
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
