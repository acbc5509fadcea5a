"""What a module computes, read off its classes and the source of its forward: nothing of it is run to find that out.

A run, were it with stand-ins, shows one run: not whether a gradient is switched off in it, a random number drawn, or a
list appended to; and what it writes stays. So a forward is read as what it is, a text. It is understood where it is
straight lines: names that are assigned calls of modules, of functions of torch that are known, and of methods of a
tensor; constants and sizes; a loop over modules; a return. Each such call is a :class:`Node`. Which way a branch goes
is decided by its value if that does not depend on the data: `training`, an attribute that is a number or a bool, an
argument that was left out, `isinstance` of a tensor, the grad mode. Anything else is a node too, an "other", that uses
what it is given.

Sources are kept by code object, and one that is not that of the code that runs is not believed.
"""

import ast
import builtins
import linecache
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeGuard
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer

from .dispatch import native

FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu", torch.relu_: "relu_", F.relu: "relu", F.relu_: "relu_",
    torch.flatten: "flatten", torch.reshape: "reshape", F.dropout: "dropout",
}  # fmt: skip
"""The functions of a tensor that are known, and their names."""

METHODS = ("relu", "relu_", "flatten", "reshape", "view")
"""The methods of a tensor that are known."""

LOOKS = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "size", "dim", "numel", "is_floating_point")
"""Attributes and methods that tell something of a tensor other than its numbers."""

CONSTANTS = (bool, int, float, str, type(None))

MOST_PATHS = 64
"""So many ways through a forward are read, by the branches that go either way."""


class Unread(Exception):  # noqa: N818
    """A forward cannot be read; says why."""


class Place(NamedTuple):
    """Where a call stands in the source of a function of a class."""

    function: Any
    owner: type
    line: int
    column: int

    def __str__(self) -> str:
        return f"the ReLU in line {self.line} of {self.owner.__name__}.{self.function.__name__}"


@dataclass(frozen=True, eq=False)
class Node:
    """Something that a forward does with tensors.

    `kind` is "input", "module", "function", "method", or "other"; `what` is the module, or the name of the function,
    or words for anything else. `operands` are the nodes whose tensors it gets, in order, and `arguments` what else.
    `place` is where it stands in the source, and `text` its line.
    """

    kind: str
    what: Any
    operands: tuple["Node", ...] = ()
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    place: Place | None = None
    text: str = ""

    def __str__(self) -> str:
        return type(self.what).__name__ if self.kind == "module" else str(self.what)


class Reading(NamedTuple):
    """One way through a forward: what it does, in order, and what it returns."""

    nodes: list[Node]
    output: Any

    def users(self) -> dict[Node, list[Node]]:
        """For each node those that get its tensor, once for each time."""
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for operand in node.operands:
                users[operand].append(node)
        return users


class Undecided(NamedTuple):
    """A value that may change between calls, such as `self.training`; `name` says which."""

    name: str


class Size(NamedTuple):
    """How large a tensor is in one direction, or, without one, in all."""

    node: Node
    dim: int | None = None


class Method(NamedTuple):
    """A method of a module, or of a tensor."""

    owner: Any
    what: Any


class Source(NamedTuple):
    """The syntax tree of a function, and its lines."""

    tree: ast.FunctionDef
    lines: list[str]


@lru_cache(maxsize=4096)
def source(code: CodeType) -> Source | str:
    """The source of a function, or why it is not known."""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)
    file = _file(code.co_filename, "".join(lines)) if lines else None
    if file is None:
        return "there is no source of its forward: it needs a class in a file or in a cell of a notebook"
    tree, codes = file
    function = next((node for node in ast.walk(tree) if _begins(node, code)), None)
    if function is None or not any(_alike(found, code) for found in codes):
        return "the source of its forward is not that of the code that runs"
    if function.decorator_list:
        return f"its {code.co_name} has a decorator: {_line(lines[code.co_firstlineno - 1])}"
    return Source(function, lines)


@lru_cache(maxsize=256)
def _file(name: str, text: str) -> tuple[ast.Module, tuple[CodeType, ...]] | None:
    """The syntax tree of a file, and the code of its functions; None if it cannot be read."""
    try:
        tree = ast.parse(text)
        codes = [compile(tree, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)]
    except (SyntaxError, ValueError, RecursionError):
        return None
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return tree, tuple(codes)


def _begins(node: ast.AST, code: CodeType) -> TypeGuard[ast.FunctionDef]:
    """Whether `node` is the function of that name that begins where `code` does."""
    if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
        return False
    return min(node.lineno, *(decorator.lineno for decorator in node.decorator_list), 10**9) == code.co_firstlineno


def _line(text: str) -> str:
    return text.strip()[:100]


def _alike(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects do the same."""
    names = (
        "co_name", "co_firstlineno", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount",
        "co_kwonlyargcount",
    )  # fmt: skip
    if any(getattr(one, name) != getattr(other, name) for name in names):
        return False
    if len(one.co_consts) != len(other.co_consts):
        return False
    for a, b in zip(one.co_consts, other.co_consts, strict=True):
        same = _alike(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else repr(a) == repr(b)
        if not same:
            return False
    return True


class Facts:
    """What somebody looked at, so that it can be asked later whether anything of it has changed.

    Modules and tensors are held weakly: a reading that is kept keeps nobody's model alive.
    """

    def __init__(self) -> None:
        self.items: list[tuple[Any, str | None, Any, Any]] = []
        self.attributes: list[tuple[Any, str, Any]] = []
        self.lengths: list[tuple[Any, str, int]] = []
        self._noted: set[tuple[int, str]] = set()
        self._packed: Any = None

    def item(self, owner: Any, name: str | None, key: Any) -> Any:
        """What the mapping `owner`, or that which is its attribute `name`, has at `key`, or GONE; noted."""
        mapping = owner if name is None else getattr(owner, name)
        value = mapping.get(key, GONE)
        self.items.append((_weak(owner), name, _weak(key), _weak(value)))
        return value

    def attribute(self, owner: Any, name: str) -> Any:
        """The attribute of anything, or GONE; noted."""
        value = getattr(owner, name, GONE)
        if (id(owner), name) not in self._noted:
            self._noted.add((id(owner), name))
            self.attributes.append((_weak(owner), name, _weak(value)))
        return value

    def length(self, owner: Any, name: str) -> int:
        """How much is in the collection that is an attribute of `owner`; noted."""
        length = len(getattr(owner, name))
        self.lengths.append((_weak(owner), name, length))
        return length

    def never(self) -> None:
        """What was looked at may change unseen: it never holds."""
        self.items.append(({}, None, 0, None))

    def hold(self) -> bool:
        """Whether all is as it was."""
        if native is not None:
            if self._packed is None:
                self._packed = native.facts(self.items, self.attributes, self.lengths, GONE)
            held: bool = native.hold(self._packed)
            return held
        for holder, name, key, value in self.items:
            owner = _there(holder)
            mapping = owner if name is None else getattr(owner, name, {})
            if mapping.get(_there(key), GONE) is not _there(value):
                return False
        return all(
            getattr(_there(owner), name, GONE) is _there(value) for owner, name, value in self.attributes
        ) and all(len(getattr(_there(owner), name, ())) == length for owner, name, length in self.lengths)


def _weak(value: Any) -> Any:
    return ref(value) if isinstance(value, nn.Module | Tensor | Optimizer) else value


def _there(value: Any) -> Any:
    return value() if isinstance(value, ref) else value


GONE = object()
"""Stands for what is not there."""


class _Frame(NamedTuple):
    """A function that is being read, the class it stands in, its module, and its names so far."""

    function: FunctionType
    source: Source
    owner: type
    module: nn.Module
    names: dict[str, Any]


class _Reader:
    """Reads one way through a forward."""

    inline = False
    """Whether the forwards of the modules that it calls are read too, and what is not understood is an error."""

    def __init__(self, decide: Callable[[Undecided], bool]) -> None:
        self.decide = decide
        self.nodes: list[Node] = []
        self.escaped: dict[nn.Module, str] = {}
        """Modules that something may call that is not known, and what."""
        self.depth = 0

    # functions

    def call_function(
        self, function: Any, owner: type, module: nn.Module, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """What a plain function, a method of `module` that stands in the class `owner`, makes of the arguments."""
        source = self.source_of(function)
        names = self.bind(function, source, [module, *args], kwargs)
        frame, self.depth = _Frame(function, source, owner, module, names), self.depth + 1
        if self.depth > 50:
            raise Unread(f"{function.__qualname__} calls itself")
        try:
            _, value = self.block(frame, source.tree.body)
        finally:
            self.depth -= 1
        return value

    def source_of(self, function: Any) -> Source:
        """The source of `function`; Unread if there is none to be believed."""
        found = source(function.__code__)
        if isinstance(found, str):
            raise Unread(found)
        return found

    def bind(self, function: FunctionType, source: Source, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; Unread where they do not fit, or where the function takes any."""
        arguments = source.tree.args
        if arguments.vararg or arguments.kwarg:
            raise Unread(f"{source.tree.name} takes any arguments")
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        defaults = function.__defaults__ or ()
        names = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True)) if defaults else {}
        names |= function.__kwdefaults__ or {}
        given = dict(zip(positional, args, strict=False)) | kwargs
        known = {*positional, *(a.arg for a in arguments.kwonlyargs)}
        if len(args) > len(positional) or not given.keys() <= known or (names | given).keys() != known:
            raise Unread(f"{source.tree.name} takes other arguments")
        return names | given

    # statements

    def block(self, frame: _Frame, statements: list[ast.stmt]) -> tuple[bool, Any]:
        """Whether a return was reached, and what it returns."""
        for statement in statements:
            done, value = self.statement(frame, statement)
            if done:
                return True, value
        return False, None

    def statement(self, frame: _Frame, statement: ast.stmt) -> tuple[bool, Any]:
        match statement:
            case ast.Return():
                return True, None if statement.value is None else self.value(frame, statement.value)
            case ast.Expr(ast.Constant()) | ast.Pass():
                pass
            case ast.Expr():
                self.value(frame, statement.value)
            case ast.Assign():
                value = self.value(frame, statement.value)
                for target in statement.targets:
                    self.assign(frame, target, value)
            case ast.AnnAssign():
                if statement.value is not None:
                    self.assign(frame, statement.target, self.value(frame, statement.value))
            case ast.AugAssign(ast.Name() as target):
                operands = [self.load(frame, target), self.value(frame, statement.value)]
                frame.names[target.id] = self.arithmetic(frame, statement, statement.op, operands)
            case ast.If():
                return self.block(frame, statement.body if self.test(frame, statement.test) else statement.orelse)
            case ast.For(orelse=[]):
                for value in self.sequence(frame, statement.iter):
                    self.assign(frame, statement.target, value)
                    done, value = self.block(frame, statement.body)
                    if done:
                        return True, value
            case ast.With() if not self.inline:
                for item in statement.items:
                    self.other(frame, item, "with", [self.value(frame, item.context_expr)])
                    if item.optional_vars is not None:
                        self.assign(frame, item.optional_vars, self.other(frame, item, "with", []))
                return self.block(frame, statement.body)
            case ast.Assert() if not self.inline:
                self.other(frame, statement, "assert", [self.value(frame, statement.test)])
            case ast.AugAssign():
                self.other(frame, statement, "setattr", [self.value(frame, statement.value)])
            case ast.Raise() if not self.inline:
                raise _Dead
            case _:
                self.refuse(frame, statement)
        return False, None

    def assign(self, frame: _Frame, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name():
                frame.names[target.id] = value
            case ast.Tuple() | ast.List():
                values = [*value] if type(value) is tuple and len(value) == len(target.elts) else None
                for place, part in enumerate(target.elts):
                    one = values[place] if values else self.other(frame, target, "getitem", [value])
                    self.assign(frame, part, one)
            case _:
                self.other(frame, target, "setattr", [value])

    # expressions

    def value(self, frame: _Frame, expression: ast.expr) -> Any:
        match expression:
            case ast.Constant():
                return expression.value
            case ast.Name():
                return self.load(frame, expression)
            case ast.Attribute():
                return self.attribute(frame, expression, self.value(frame, expression.value))
            case ast.Call():
                return self.call(frame, expression)
            case ast.Tuple() | ast.List() if not any(isinstance(part, ast.Starred) for part in expression.elts):
                return tuple(self.value(frame, part) for part in expression.elts)
            case ast.BinOp():
                operands = [self.value(frame, expression.left), self.value(frame, expression.right)]
                return self.arithmetic(frame, expression, expression.op, operands)
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
                return -number
            case ast.UnaryOp(ast.Not()) | ast.BoolOp() | ast.Compare():
                return self.condition(frame, expression)
            case ast.UnaryOp():
                return self.other(frame, expression, "neg", [self.value(frame, expression.operand)])
            case ast.IfExp():
                return self.value(frame, expression.body if self.test(frame, expression.test) else expression.orelse)
            case ast.Subscript():
                return self.subscript(frame, expression)
            case ast.JoinedStr() | ast.Dict() | ast.Set() | ast.FormattedValue() | ast.Slice():
                parts = [part for part in ast.iter_child_nodes(expression) if isinstance(part, ast.expr)]
                return self.other(frame, expression, "a value", [self.value(frame, part) for part in parts])
            case _:
                return self.refuse(frame, expression)

    def load(self, frame: _Frame, name: ast.Name) -> Any:
        if name.id in frame.names:
            return frame.names[name.id]
        code = frame.function.__code__
        if name.id in code.co_freevars:
            if name.id == "__class__":
                return frame.owner
            cell = (frame.function.__closure__ or ())[code.co_freevars.index(name.id)]
            return self.note_cell(cell)
        if name.id in code.co_varnames or name.id in code.co_cellvars:
            return self.refuse(frame, name)  # not assigned on this way
        function: Any = frame.function
        value = self.item(function, "__globals__", name.id)
        if value is GONE:
            value = self.item(builtins, "__dict__", name.id)
        return self.refuse(frame, name) if value is GONE else value

    def item(self, owner: Any, name: str, key: Any) -> Any:
        """What the mapping that is the attribute `name` of `owner` has at `key`, or GONE."""
        return getattr(owner, name).get(key, GONE)

    def note_cell(self, cell: CellType) -> Any:
        """What lies in a cell."""
        return cell.cell_contents

    def note_length(self, module: nn.Module) -> None:
        """All that `module` has was looked at."""

    def attribute(self, frame: _Frame, expression: ast.Attribute, owner: Any) -> Any:
        name = expression.attr
        if isinstance(owner, ModuleType):
            value = self.item(owner, "__dict__", name)
            return self.other(frame, expression, name, []) if value is GONE else value
        if isinstance(owner, Node):
            return Size(owner) if name == "shape" else Method(owner, name)
        if isinstance(owner, nn.Module):
            return self.attribute_of_module(frame, expression, owner)
        if type(owner) is _Super:
            for kind in type(owner.module).__mro__[type(owner.module).__mro__.index(owner.kind) + 1 :]:
                if isinstance(function := vars(kind).get(name), FunctionType):
                    return Method(owner.module, (function, kind))
        return self.other(frame, expression, name, [owner])

    def attribute_of_module(self, frame: _Frame, expression: ast.Attribute, module: nn.Module) -> Any:
        name, kind = expression.attr, plain_class(type(module))
        for group in ("_modules", "_parameters", "_buffers"):
            if name in getattr(module, group) and name not in vars(module) and not hasattr(kind, name):
                value = self.item(module, group, name)
                known = value is None or isinstance(value, nn.Module)
                return value if known else self.other(frame, expression, f"{name} by itself", [])
        if name in vars(module) and not isinstance(getattr(kind, name, None), property):
            value = self.item(module, "__dict__", name)
            if type(value) in CONSTANTS or _is_known(value):
                return self.constant(value, f"{frame.source.tree.args.args[0].arg}.{name}")
            return self.other(frame, expression, name, [module])
        for place in kind.__mro__:
            if name in vars(place):
                value = vars(place)[name]
                if isinstance(value, FunctionType) and not place.__module__.startswith("torch."):
                    self.item(place, "__dict__", name)
                    return Method(module, (value, place))
                if type(value) in CONSTANTS:
                    self.item(place, "__dict__", name)
                    return self.constant(value, name)
                break
        return self.other(frame, expression, name, [module])

    def constant(self, value: Any, name: str) -> Any:
        """A value that somebody may change between calls."""
        return Undecided(name)

    def subscript(self, frame: _Frame, expression: ast.Subscript) -> Any:
        owner = self.value(frame, expression.value)
        key: Any = None
        if isinstance(expression.slice, ast.Slice):
            parts = [expression.slice.lower, expression.slice.upper, expression.slice.step]
            ends = [None if part is None else self.value(frame, part) for part in parts]
            if all(end is None or type(end) is int for end in ends):
                key = slice(*ends)
        else:
            key = self.value(frame, expression.slice)
        if isinstance(owner, Size) and owner.dim is None and type(key) is int:
            return Size(owner.node, key)
        sequence = self.children(owner)
        if sequence is not None and type(key) in (int, slice):
            try:
                return sequence[key]
            except IndexError:
                return self.refuse(frame, expression)
        if type(owner) is nn.ModuleDict and type(key) is str:
            value = self.item(owner, "_modules", key)
            return self.refuse(frame, expression) if value is GONE else value
        return self.other(frame, expression, "getitem", [owner, key])

    def children(self, owner: Any) -> tuple[Any, ...] | None:
        """What a list of modules, or a tuple, has in it; None for anything else."""
        if type(owner) is tuple:
            return owner
        if type(owner) is nn.ModuleList or is_sequential(owner):
            self.note_length(owner)
            return tuple(self.item(owner, "_modules", name) for name in owner._modules)
        return None

    def sequence(self, frame: _Frame, expression: ast.expr) -> Iterator[Any]:
        """What a for goes over: modules, one after the other."""
        owner = self.value(frame, expression)
        found = self.children(owner)
        return iter(self.refuse(frame, expression) if found is None else found)

    def arithmetic(self, frame: _Frame, expression: ast.AST, operator: ast.operator, operands: list[Any]) -> Any:
        """Of whole numbers the result; of anything else a node."""
        one, other = operands
        if type(one) is type(other) is int:
            match operator:
                case ast.Add():
                    return one + other
                case ast.Sub():
                    return one - other
                case ast.Mult():
                    return one * other
                case ast.FloorDiv() if other:
                    return one // other
        return self.other(frame, expression, type(operator).__name__.lower(), operands)

    def condition(self, frame: _Frame, expression: ast.expr) -> Any:
        """The value of a test, Undecided if it may change."""
        match expression:
            case ast.UnaryOp(ast.Not()):
                value = self.truth(frame, expression, self.value(frame, expression.operand))
                return value if isinstance(value, Undecided) else not value
            case ast.BoolOp():
                stop = isinstance(expression.op, ast.Or)
                for part in expression.values:
                    value = self.truth(frame, part, self.value(frame, part))
                    value = self.decide(value) if isinstance(value, Undecided) else value
                    if value is stop:
                        return stop
                return not stop
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as operator]):
                values = [self.value(frame, expression.left), self.value(frame, expression.comparators[0])]
                return self.compare(frame, expression, values, isinstance(operator, ast.IsNot))
            case ast.Compare(ops=[ast.Eq() | ast.NotEq() as operator]):
                values = [self.value(frame, expression.left), self.value(frame, expression.comparators[0])]
                if all(type(value) in CONSTANTS for value in values):
                    return (values[0] == values[1]) is isinstance(operator, ast.Eq)
            case ast.Compare():
                values = [self.value(frame, part) for part in (expression.left, *expression.comparators)]
        return self.unknown(frame, expression, values)

    def compare(self, frame: _Frame, expression: ast.expr, values: list[Any], negated: bool) -> Any:
        """`is` or `is not`: of None, True and False, to which a tensor or a module is not equal."""
        if any(isinstance(value, (Undecided, Size)) for value in values):
            return self.unknown(frame, expression, values)
        if not any(value is None or type(value) is bool for value in values):
            return self.unknown(frame, expression, values)
        return (values[0] is values[1]) is not negated

    def truth(self, frame: _Frame, expression: ast.expr, value: Any) -> Any:
        """True, False, or Undecided."""
        return bool(value) if type(value) in CONSTANTS else self.unknown(frame, expression, [value])

    def test(self, frame: _Frame, expression: ast.expr) -> bool:
        """Which way a branch goes."""
        value = self.truth(frame, expression, self.value(frame, expression))
        return self.decide(value) if isinstance(value, Undecided) else value

    def unknown(self, frame: _Frame, expression: ast.expr, values: list[Any]) -> Any:
        """A test that may go either way; Unread if what the forward made of the data says which."""
        if self.inline or any(isinstance(value, Node) and value.kind != "input" for value in values):
            self.refuse(frame, expression)
        return Undecided(ast.unparse(expression))

    # calls

    def call(self, frame: _Frame, call: ast.Call) -> Any:
        callee = self.value(frame, call.func)
        plain = not any(isinstance(a, ast.Starred) for a in call.args) and all(k.arg for k in call.keywords)
        args = [self.value(frame, a.value if isinstance(a, ast.Starred) else a) for a in call.args]
        kwargs = {keyword.arg or "**": self.value(frame, keyword.value) for keyword in call.keywords}
        given = [*args, *kwargs.values()]
        if not plain:
            return self.other(frame, call, _name(call.func), [callee, *given])
        if isinstance(callee, nn.Module):
            return self.call_module(frame, call, callee, args, kwargs)
        if isinstance(callee, Method) and isinstance(callee.owner, nn.Module):
            function, owner = callee.what
            return self.call_function(function, owner, callee.owner, args, kwargs)
        if isinstance(callee, Method):
            return self.call_method(frame, call, callee, args, kwargs)
        if callee is isinstance and len(args) == 2 and not kwargs and isinstance(args[0], Node):
            return self.is_tensor(frame, call, args[1])
        if callee is torch.is_grad_enabled:
            return self.constant(True, "the grad mode")
        if callee is super and not given and "__class__" in frame.function.__code__.co_freevars:
            return _Super(frame.module, frame.owner)
        if callee is len and len(args) == 1 and (found := self.children(args[0])) is not None:
            return len(found)
        if _is_known(callee) and not args and "input" in kwargs:
            args = [kwargs.pop("input")]
            given = [*args, *kwargs.values()]
        if _is_known(callee) and args and isinstance(args[0], Node) and not nodes_of(given[1:]):
            return self.known(frame, call, "function", FUNCTIONS[callee], args, kwargs)
        return self.other(frame, call, _name(call.func), [callee, *given])

    def is_tensor(self, frame: _Frame, call: ast.Call, kinds: Any) -> Any:
        """isinstance(x, kinds) of a tensor."""
        if Tensor in (kinds if type(kinds) is tuple else (kinds,)):
            return self.constant(True, ast.unparse(call))
        return self.unknown(frame, call, [kinds])

    def call_method(
        self, frame: _Frame, call: ast.Call, method: Method, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """A method of a tensor."""
        node, name = method
        if name == "size" and not kwargs and len(args) <= 1 and all(type(a) is int for a in args):
            return Size(node, *args)
        if name in LOOKS:
            return self.other(frame, call, name, [*args, *kwargs.values()]) if self.inline else Undecided(name)
        if name in METHODS and not nodes_of(args, [*kwargs.values()]):
            return self.known(frame, call, "method", name, [node, *args], kwargs)
        return self.other(frame, call, name, [node, *args, *kwargs.values()])

    def known(
        self, frame: _Frame, call: ast.Call, kind: str, name: str, args: list[Any], kwargs: dict[str, Any]
    ) -> Node:
        """The node of a function or a method that is known."""
        place = Place(frame.function, frame.owner, call.lineno, call.col_offset)
        return self.add(Node(kind, name, (args[0],), (tuple(args[1:]), kwargs), place, self.text(frame, call)))

    def call_module(
        self, frame: _Frame, call: ast.Call, module: nn.Module, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """The node of a module that is called."""
        nodes = nodes_of(args, [*kwargs.values()])
        self.escape(frame, call, [*args, *kwargs.values()])
        rest = (tuple(args[1:]), kwargs)
        return self.add(Node("module", module, tuple(nodes), rest, None, self.text(frame, call)))

    # what is not understood

    def other(self, frame: _Frame, at: Any, words: str, values: list[Any]) -> Any:
        """A node for anything else that gets these values; an error where all has to be understood."""
        if self.inline:
            self.refuse(frame, at)
        self.escape(frame, at, values)
        return self.add(Node("other", words, tuple(nodes_of(values)), text=self.text(frame, at)))

    def escape(self, frame: _Frame, at: Any, values: list[Any]) -> None:
        """Modules among the values may be called by whoever gets them."""
        for value in values:
            if isinstance(value, tuple):
                self.escape(frame, at, [*value])
            elif isinstance(value, nn.Module):
                self.escaped |= {inner: self.text(frame, at) for inner in value.modules()}

    def refuse(self, frame: _Frame, at: ast.AST) -> Any:
        """Raise Unread, with the line."""
        name = f"{type(frame.module).__name__}.{frame.source.tree.name}"
        raise Unread(f"line {getattr(at, 'lineno', '?')} of {name}: {self.text(frame, at)}")

    def text(self, frame: _Frame, at: Any) -> str:
        """The line on which something begins."""
        line: int = getattr(at, "lineno", 0) or getattr(getattr(at, "context_expr", None), "lineno", 0)
        lines = frame.source.lines
        return _line(lines[line - 1]) if 0 < line <= len(lines) else ""

    def add(self, node: Node) -> Node:
        self.nodes.append(node)
        return node


class _Super(NamedTuple):
    """super() in a method of `module` that stands in the class `kind`."""

    module: nn.Module
    kind: type


class _Dead(Exception):  # noqa: N818
    """This way through a forward ends in an error of the user's."""


def is_sequential(module: Any) -> bool:
    """Whether `module` is an nn.Sequential that calls its modules one after the other."""
    kind: Any = plain_class(type(module))
    return isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward


def _is_known(callee: Any) -> bool:
    return isinstance(callee, (FunctionType, BuiltinFunctionType, MethodType)) and callee in FUNCTIONS


def _name(expression: ast.expr) -> str:
    """How a function is called: the last of its names."""
    return expression.attr if isinstance(expression, ast.Attribute) else ast.unparse(expression)


def nodes_of(*values: Any) -> list[Node]:
    """The nodes in values, in order."""
    found: list[Node] = []
    for value in values:
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, Method):
            found += nodes_of(value.owner)
        elif type(value) in (tuple, list):
            found += nodes_of(*value)
    return found


# Whole models, all of which has to be understood


class _Whole(_Reader):
    """Reads a whole model as it is now: attributes have their values, and the forwards of its modules are read too."""

    inline = True

    def __init__(self, facts: Facts) -> None:
        super().__init__(bool)
        self.facts = facts

    def item(self, owner: Any, name: str, key: Any) -> Any:
        return self.facts.item(owner, name, key)

    def note_cell(self, cell: CellType) -> Any:
        return self.facts.attribute(cell, "cell_contents")

    def note_length(self, module: nn.Module) -> None:
        self.facts.length(module, "_modules")

    def constant(self, value: Any, name: str) -> Any:
        return value

    def source_of(self, function: Any) -> Source:
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self.facts.attribute(function, name)
        return super().source_of(function)

    def call_module(
        self, frame: _Frame, call: ast.Call, module: nn.Module, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], Node):
            return self.refuse(frame, call)
        self.facts.attribute(module, "__class__")
        return self.run(module, args[0], self.text(frame, call))

    def run(self, module: nn.Module, x: Node, text: str = "") -> Any:
        """What `module` makes of x."""
        kind = plain_class(type(module))
        if (reason := self.against(module)) is not None:
            raise Unread(reason)
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

    def against(self, module: nn.Module) -> str | None:
        """Why nobody can tell what a call of `module` does, or who watches it do so."""
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            return "the model is scripted or traced: pass the one that it was made of"
        if kind.__module__.startswith("torch._dynamo.") or getattr(module, "_compiled_call_impl", None) is not None:
            return "the model is compiled: pass the one that torch.compile was given"
        if kind.__module__.startswith(_PARALLEL):
            return "the model is spread over devices"
        if any(self.facts.attribute(kind, name) is not value for name, value in _CALLS):
            return "the model has a __call__ of its own, or other attributes than it seems to have"
        for name in ("forward", "_compiled_call_impl", "_call_impl"):
            if self.item(module, "__dict__", name) not in (GONE, None):
                return "a forward was replaced"
        return "the model has hooks" if any(self.facts.length(module, hooks) for hooks in HOOKS) else None


_KNOWN = ("torch.", "fusednn.modules", "fusednn.fuse")
_PARALLEL = ("torch.nn.parallel.", "torch.distributed.")
_CALLS = [(name, getattr(nn.Module, name)) for name in ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")]
_CALLS.append(("__getattribute__", object.__getattribute__))


UNTOUCHED: list[tuple[Any, str, Any]] = [
    (owner, name, getattr(owner, name))
    for owner, names in (
        (nn.Linear, "forward"), (nn.ReLU, "forward"), (nn.Sequential, "forward"), (nn.Flatten, "forward"),
        (nn.Identity, "forward"), (nn.Dropout, "forward"), (nn.CrossEntropyLoss, "forward"),
        (F, "linear relu relu_ cross_entropy dropout"), (torch, "relu relu_ flatten"),
        (Tensor, "relu relu_ flatten view reshape backward __getitem__ detach"), (torch.autograd, "backward grad"),
    )
    for name in names.split()
]  # fmt: skip
"""What the engines take for granted, as it was when this module was imported."""


def against_all(facts: Facts) -> str | None:
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


def plain_class(kind: type) -> type:
    """The class of a module before fuse."""
    found: type = vars(kind).get("_plain_class", kind)
    return found


def read(model: nn.Module, facts: Facts) -> Reading | str:
    """What `model`, called with one tensor and nothing else, does, or why that is not known.

    It is read in the mode that it is in, with the grad mode on. The first node is its input.
    """
    if (reason := against_all(facts)) is not None:
        return reason
    reader, x = _Whole(facts), Node("input", "the input")
    reader.nodes.append(x)
    try:
        return Reading(reader.nodes, reader.run(model, x))
    except Unread as unread:
        return str(unread)


# Forwards by themselves, each way through them


def ways(module: nn.Module) -> tuple[list[Reading], dict[nn.Module, str]]:
    """Each way through the forward of `module`, and the modules that something unknown may call, and what.

    What its modules do is not looked into. Raises Unread where the forward cannot be read.
    """
    kind = plain_class(type(module))
    place = next(place for place in kind.__mro__ if "forward" in vars(place))
    function = vars(place)["forward"]
    if not isinstance(function, FunctionType) or "forward" in vars(module):
        raise Unread("it was replaced" if "forward" in vars(module) else "it is not a plain function")
    readings: list[Reading] = []
    escaped: dict[nn.Module, str] = {}
    path: list[bool] = []
    for _ in range(MOST_PATHS):
        taken: list[bool] = []
        known: dict[str, bool] = {}

        def decide(
            value: Undecided, path: list[bool] = path, taken: list[bool] = taken, known: dict[str, bool] = known
        ) -> bool:
            if value.name not in known:
                known[value.name] = path[len(taken)] if len(taken) < len(path) else False
                taken.append(known[value.name])
            return known[value.name]

        reader = _Reader(decide)
        try:
            output = reader.call_function(function, place, module, *_arguments(reader, function))
            readings.append(Reading(reader.nodes, output))
        except _Dead:
            readings.append(Reading(reader.nodes, None))
        escaped |= reader.escaped
        while taken and taken[-1]:
            taken.pop()
        if not taken:
            return readings, escaped
        path = [*taken[:-1], True]
    raise Unread(f"there are more than {MOST_PATHS} ways through it")


def _arguments(reader: _Reader, function: FunctionType) -> tuple[list[Any], dict[str, Any]]:
    """A tensor for each argument; what may be left out is, or is not."""
    code, defaults = function.__code__, len(function.__defaults__ or ())
    names, kwargs = code.co_varnames[1 : code.co_argcount], {}
    for name in names[: len(names) - defaults]:
        kwargs[name] = reader.add(Node("input", name))
    optional = [*names[len(names) - defaults :], *code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]]
    for name in optional:
        required = name in code.co_varnames[code.co_argcount :] and name not in (function.__kwdefaults__ or {})
        if required or reader.decide(Undecided(f"{name} is given")):
            kwargs[name] = reader.add(Node("input", name))
    return [], kwargs
