"""fuse(model): each nn.Linear that a ReLU follows runs as one kernel, in the model as it is.

Nothing is copied and no module is replaced: parameters, state dict keys, hooks and the optimizer's references stay.
What changes is the class of the modules concerned, and :func:`unfuse` changes it back.

* In an nn.Sequential the pairs are found when it is called, so whatever else calls its modules gets what it always got.
* In other modules each `forward` is read (:mod:`fusednn.reading`), every way through it, and a pair is one only if
  nothing but a ReLU ever sees the Linear's output. Then the Linear applies the ReLU and marks its output. An nn.ReLU
  hands on what is so marked, and so does a function or method: the class becomes one whose `forward` asks before it
  calls F.relu, say. What cannot be read is left alone.

As for SimpleNN, where a hook could tell the difference the two run one by one, and `explain` says so.
"""

import ast
import copy
import copyreg
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from types import CellType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import dispatch, functional, reading
from .modules import Linear, as_plain, unobserved
from .reading import Node, Place, Unread, plain_class

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
    """An nn.Linear that applies the ReLU behind it: that of its nn.Sequential when asked to, or always.

    `fused_relus` are the modules among the ReLUs that it applies always.
    """

    _plain_class = nn.Linear
    applies_relu = False
    fused_relus: tuple[nn.Module, ...] = ()

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """x Wᵀ + b [*, out_features] of input [*, in_features], or the ReLU of it."""
        if relu:
            return functional.linear_relu(input, self.weight, self.bias)
        if not self.applies_relu:
            return functional.linear(input, self.weight, self.bias)
        for behind in self.fused_relus or (_FUNCTION,):
            if not unobserved(self, behind):
                _note_hooks()
                return functional.linear(input, self.weight, self.bias)
        y = functional.linear_relu(input, self.weight, self.bias)
        y._relu_applied = True  # type: ignore[attr-defined]
        return y

    def __prepare_scriptable__(self) -> nn.Module:
        return _as_it_was(self)


_FUNCTION = nn.ReLU()
"""Stands for a ReLU that is no module, and has no hooks."""


def relu_unless_applied(relu: Callable[..., Tensor] | str, input: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """`input` if a FusedLinear marked it, else what the function `relu`, or the method of that name, makes of it."""
    if getattr(input, "_relu_applied", False) is not True:  # of a torch.fx Proxy any attribute is there
        method = getattr(input, relu) if isinstance(relu, str) else partial(relu, input)
        y: Tensor = method(*arguments, **options)
        return y
    input._relu_applied = False  # type: ignore[attr-defined]  # `x += shortcut` may follow, and this ReLU again
    return input


class FusedReLU(nn.ReLU):
    """An nn.ReLU that the Linear before it has applied, or does not have."""

    _plain_class = nn.ReLU

    def forward(self, input: Tensor) -> Tensor:
        """`input` if a FusedLinear marked it, else the ReLU of it."""
        if getattr(input, "_relu_applied", False) is not True:
            return super().forward(input)
        input._relu_applied = False  # type: ignore[attr-defined]
        return input

    def __prepare_scriptable__(self) -> nn.Module:
        return _as_it_was(self)


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs a FusedLinear and the nn.ReLU after it as one."""

    _plain_class = nn.Sequential

    def forward(self, input: Any) -> Any:
        """What the modules, one after the other, make of `input`."""
        modules = [*self]
        count, i = len(modules), 0
        while i < count:
            module = modules[i]
            i += 1
            if type(module) is FusedLinear and i < count and type(modules[i]) is nn.ReLU:
                if unobserved(module, modules[i]):
                    input = module(input, relu=True)
                    i += 1
                    continue
                _note_hooks()
            input = module(input)
        return input

    def __prepare_scriptable__(self) -> nn.Module:
        return _as_it_was(self)


reading.UNTOUCHED += [(kind, "forward", kind.forward) for kind in (FusedLinear, FusedReLU, FusedSequential)]


def _note_hooks() -> None:
    dispatch.note(dispatch.Decision("relu", "PyTorch", "it or the Linear before it has hooks"))


class _Asking(ast.NodeTransformer):
    """Puts `relu_unless_applied` in the place of the calls of a ReLU at some places of a function."""

    def __init__(self, places: frozenset[tuple[Any, ...]]) -> None:
        self.places = places

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The call, or that in its place; what is in it first."""
        self.generic_visit(node)
        if (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset) not in self.places:
            return node
        asked: list[ast.expr] = [node.func]
        if isinstance(node.func, ast.Attribute) and not _is_function(node):
            asked = [ast.Constant(node.func.attr), node.func.value]
        asking = ast.Call(ast.Name(_ASKED, ast.Load()), [*asked, *node.args], node.keywords)
        return ast.copy_location(asking, node)


_ASKED = "relu_unless_applied"


def _is_function(call: ast.Call) -> bool:
    """Whether a call of a ReLU gets its tensor as an argument, and not as what the method is of."""
    return bool(call.args) or any(keyword.arg == "input" for keyword in call.keywords)


@lru_cache(maxsize=1024)
def _asking_class(kind: Any, places: frozenset[Place]) -> type[nn.Module]:
    """A subclass of `kind` whose methods ask at these places whether the ReLU was applied. Raises where that fails."""
    methods: dict[str, Any] = {}
    for function, owner in {(place.function, place.owner) for place in places}:
        here = frozenset(tuple(p[2:]) for p in places if p.function is function)
        methods[function.__name__] = _asking_function(function, owner, here)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    more = {"_plain_class": kind, "_places": places, "__reduce_ex__": _reduce, "__prepare_scriptable__": _as_it_was}
    metaclass: Any = type(kind)
    made: type[nn.Module] = metaclass(kind.__name__, (kind,), names | methods | more)
    return made


def _asking_function(function: FunctionType, owner: type, places: frozenset[tuple[Any, ...]]) -> FunctionType:
    """`function` of the class `owner`, compiled anew; it has the names from outside that it had, and one more."""
    source = reading.source(function.__code__)
    assert not isinstance(source, str)
    tree = _Asking(places).visit(copy.deepcopy(source.tree))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_ASKED] = CellType(relu_unless_applied)
    outside = [name for name in cells if name != "__class__"]
    module = ast.parse(f"def outside({', '.join(outside)}):\n class {owner.__name__}:\n  pass")
    outer: Any = module.body[0]
    outer.body[0].body = [tree]
    ast.fix_missing_locations(module)
    code = compile(module, function.__code__.co_filename, "exec", dont_inherit=True)
    for name in ("outside", owner.__name__, function.__name__):
        code = next(part for part in code.co_consts if getattr(part, "co_name", None) == name)
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__doc__, made.__annotations__ = function.__doc__, function.__annotations__
    return made


def _as_it_was(self: nn.Module) -> nn.Module:
    """For torch.jit.script, which compiles no Triton kernel: the same of the class before fuse."""
    return as_plain(self, plain_class(type(self)))


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """For copies and pickles: the class by its plain one, which can be found by name."""
    kind: Any = plain_class(type(self))
    made = super(type(self), self).__reduce_ex__(max(2, protocol))  # what older ones have names a class
    if made[0] is not copyreg.__newobj__ or made[1][:1] != (type(self),):  # type: ignore[attr-defined]
        return made
    fused: Any = type(self)
    places = tuple((p.owner, p.function.__name__, *p[2:]) for p in fused._places)
    return _restored, (kind, places, *made[1][1:]), *made[2:]


def _restored(kind: Any, places: tuple[tuple[Any, ...], ...], *arguments: Any) -> nn.Module:
    """A new module of the fused class; if the source changed, of the plain one, whose ReLU does no harm."""
    found = frozenset(Place(vars(owner).get(name), owner, *at) for owner, name, *at in places)
    try:
        fused = _asking_class(kind, found)
    except Exception:
        fused = kind
    made: nn.Module = fused.__new__(fused, *arguments)
    return made


def fuse(model: nn.Module) -> nn.Module:
    """Fuse every nn.Linear of `model` with the ReLU that follows it, in place, and return `model`.

    The ReLU is an nn.ReLU, `F.relu`, `torch.relu`, or the tensor's method. Parameters and state dict keys stay as they
    are. :func:`fusions` lists what was fused, what was left alone and why; the logger "fusednn" has it too. Call `fuse`
    before DistributedDataParallel, fully_shard or torch.compile wrap the model. Call :func:`unfuse` before you exchange
    its modules.

    The model computes what it did, with one exception. Outside of an nn.Sequential, a fused Linear applies the ReLU
    also when other code than a forward calls it by itself. Do not fuse such a model.
    """
    unfuse(model)
    analysis = _Analysis(model)
    for fusion in analysis.fusions():
        _log.info("fuse: %s", fusion)
    for sequential, linear, _ in analysis.in_sequentials():
        sequential.__class__, linear.__class__ = FusedSequential, FusedLinear
    pairs = analysis.pairs()
    for linear, relus in pairs.items():
        modules = tuple(relu for relu in relus if isinstance(relu, nn.Module))
        linear.__class__ = FusedLinear
        vars(linear).update(applies_relu=True, fused_relus=modules)
        for relu in modules:
            relu.__class__ = FusedReLU
    for module, kind in analysis.asking(pairs).items():
        module.__class__ = kind
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, in place, and return `model`."""
    for module in model.modules():
        module.__class__ = plain_class(type(module))
        for name in ("applies_relu", "fused_relus"):  # from a subclass of a FusedLinear too, which parametrize makes
            vars(module).pop(name, None)
    return model


def fusions(model: nn.Module) -> tuple[Fusion, ...]:
    """What :func:`fuse` does, or has done, to each nn.Linear of `model`: a line each when printed."""
    return tuple(_Analysis(model).fusions())


class _Analysis:
    """Who calls the Linears and ReLUs of a model, as their forwards say."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.sequentials = [module for module in model.modules() if plain_class(type(module)) is nn.Sequential]
        # what becomes of a Linear's output: the ReLU that alone gets it, or words for something else
        self.uses: dict[nn.Module, list[nn.Module | Place | str]] = {linear: [] for linear in self.linears}
        self.opaque: dict[nn.Module, str] = {}  # what a module that cannot be read may call
        self.places: dict[Place, list[nn.Module]] = {}  # the modules in whose forward a ReLU stands
        for module in model.modules():
            if plain_class(type(module)) is nn.Sequential or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            if any(isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module):
                self._read(module)

    def _read(self, module: nn.Module) -> None:
        try:
            readings, escaped = reading.ways(module)
        except Unread as unread:
            name = f"{self.names[module]}, a {type(module).__name__}," if self.names[module] else type(module).__name__
            for inner in module.modules():
                self.opaque[inner] = f"the forward of {name} that may call it is not understood: {unread}"
            return
        for inner, text in escaped.items():
            self.opaque[inner] = f"something may call it: {text}"
        for way in readings:
            users, returned = way.users(), reading.nodes_of(way.output)
            for node in way.nodes:
                if node.kind == "module" and node.what in self.uses:
                    self.uses[node.what].append(self._use(module, node, users[node], node in returned))

    def _use(self, module: nn.Module, node: Node, users: list[Node], returned: bool) -> nn.Module | Place | str:
        """The ReLU that alone gets the output of a Linear, or words."""
        alone = users[0] if len(users) == 1 and not returned else None
        if alone is not None and alone.within != node.within:
            return f"its ReLU stands in another with statement, or grad mode: {alone.text}"
        if alone is not None and alone.kind == "module" and plain_class(type(alone.what)) is nn.ReLU:
            relu: nn.Module = alone.what
            return relu
        if alone is not None and alone.place is not None and alone.what in ("relu", "relu_"):
            function = alone.place.function
            if getattr(plain_class(type(module)), function.__name__, None) is not function:
                return f"its ReLU stands in a method that super() finds: {alone.text}"
            if any("__init_subclass__" in vars(kind) for kind in type(module).__mro__[:-1]):
                return f"its class has an __init_subclass__, which one with the fused call would run: {alone.text}"
            self.places.setdefault(alone.place, []).append(module)
            return alone.place
        words = [self.names.get(user.what, "?") if user.kind == "module" else str(user.what) for user in users]
        words += ["output"] * returned
        return f"no ReLU alone gets its output, but {', '.join(words) or 'nothing'}"

    def in_sequentials(self) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
        """The nn.Sequentials, and the Linear and the ReLU of each pair in them."""
        for sequential in self.sequentials:
            for linear, relu in pairwise(_children(sequential)):
                paired = linear in self.uses and plain_class(type(relu)) is nn.ReLU
                if paired and _refusal(linear) is None and not self.uses[linear]:
                    yield sequential, linear, relu

    def pairs(self) -> dict[nn.Module, list[nn.Module | Place]]:
        """The Linears whose every use a ReLU follows, and those."""
        inside = self._inside()
        pairs: dict[nn.Module, list[nn.Module | Place]] = {}
        for linear, uses in self.uses.items():
            relus = [use for use in dict.fromkeys(uses) if not isinstance(use, str)]
            modules = {relu for relu in relus if isinstance(relu, nn.Module)}
            unsure = {linear, *modules} & inside or linear in self.opaque or _refusal(linear)
            if relus and len(relus) == len(set(uses)) and not unsure:
                pairs[linear] = relus
        return pairs

    def asking(self, pairs: dict[nn.Module, list[nn.Module | Place]]) -> dict[nn.Module, type[nn.Module]]:
        """The modules in whose forward a ReLU of a pair stands, and their new classes."""
        places: dict[nn.Module, set[Place]] = {}
        for place in {relu for relus in pairs.values() for relu in relus if isinstance(relu, Place)}:
            for module in self.places[place]:
                places.setdefault(module, set()).add(place)
        return {module: _asking_class(plain_class(type(module)), frozenset(at)) for module, at in places.items()}

    def fusions(self) -> Iterator[Fusion]:
        """What becomes of each Linear, in the order of the model."""
        paired = {linear: relu for _, linear, relu in self.in_sequentials()}
        found, inside = self.pairs(), self._inside()
        for linear in self.linears:
            name = self.names[linear]
            if linear in found:
                relus = [str(r) if isinstance(r, Place) else self.names[r] for r in found[linear]]
                yield Fusion(name, " and ".join(relus), "as its forward says")
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


def _refusal(linear: nn.Module) -> str | None:
    """Why a Linear cannot be fused whatever follows it."""
    if plain_class(type(linear)) is not nn.Linear:
        return f"a {type(linear).__module__}.{type(linear).__qualname__}, not nn.Linear itself"
    if type(linear.weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(linear.weight).__qualname__}"
    return "its forward was replaced" if "forward" in vars(linear) else None
