"""Reads one way through a forward, from its syntax tree."""

import ast
import builtins
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activations import WITHOUT_OPTIONS
from .facts import GONE
from .nodes import CONSTANTS, FUNCTIONS, LOOKS, METHODS, Method, Node, Place, Size, Undecided, Unread, nodes_of
from .sources import Source, line_of, source


class Frame(NamedTuple):
    """A function that is being read, the class it stands in, its module, and its names so far."""

    function: FunctionType
    source: Source
    owner: type
    module: nn.Module
    names: dict[str, Any]


class Reader:
    """Reads one way through a forward."""

    inline = False
    """Whether the forwards of the modules that it calls are read too, and what is not understood is an error."""

    def __init__(self, decide: Callable[[Undecided], bool]) -> None:
        self.decide = decide
        self.nodes: list[Node] = []
        self.escaped: dict[nn.Module, str] = {}
        """Modules that something may call that is not known, and what."""
        self.depth = 0
        self.changes = 0
        """How often an attribute was set, after which a test may go another way."""
        self.within: tuple[Any, ...] = ()
        """The with statements, and the switches of the grad mode, that hold here."""

    # functions

    def call_function(
        self, function: Any, owner: type, module: nn.Module, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """What a plain function, a method of `module` that stands in the class `owner`, makes of the arguments."""
        source = self.source_of(function)
        names = self.bind(function, source, [module, *args], kwargs)
        frame, self.depth = Frame(function, source, owner, module, names), self.depth + 1
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

    def block(self, frame: Frame, statements: list[ast.stmt]) -> tuple[bool, Any]:
        """Whether a return was reached, and what it returns."""
        for statement in statements:
            done, value = self.statement(frame, statement)
            if done:
                return True, value
        return False, None

    def statement(self, frame: Frame, statement: ast.stmt) -> tuple[bool, Any]:
        """Whether it is a return, and what it returns."""
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
                before = self.within
                for item in statement.items:
                    self.other(frame, item, "with", [self.value(frame, item.context_expr)])
                    if item.optional_vars is not None:
                        self.assign(frame, item.optional_vars, self.other(frame, item, "with", []))
                self.within = (*before, statement)
                done, value = self.block(frame, statement.body)
                self.within = before
                return done, value
            case ast.Assert() if not self.inline:
                self.other(frame, statement, "assert", [self.value(frame, statement.test)])
            case ast.AugAssign():
                self.changes += 1
                self.other(frame, statement, "setattr", [self.value(frame, statement.value)])
            case ast.Raise() if not self.inline:
                raise Dead
            case _:
                self.refuse(frame, statement)
        return False, None

    def assign(self, frame: Frame, target: ast.expr, value: Any) -> None:
        """Give a value its name, or its names."""
        match target:
            case ast.Name():
                frame.names[target.id] = value
            case ast.Tuple() | ast.List():
                values = [*value] if type(value) is tuple and len(value) == len(target.elts) else None
                for place, part in enumerate(target.elts):
                    one = values[place] if values else self.other(frame, target, "getitem", [value])
                    self.assign(frame, part, one)
            case _:
                self.changes += 1
                self.other(frame, target, "setattr", [value])

    # expressions

    def value(self, frame: Frame, expression: ast.expr) -> Any:
        """What an expression is: a node, a module, a constant, or something of what is in nodes.py."""
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

    def load(self, frame: Frame, name: ast.Name) -> Any:
        """What a name stands for, where the function would find it."""
        if name.id in frame.names:
            return frame.names[name.id]
        code = frame.function.__code__
        if name.id in code.co_freevars:
            if name.id == "__class__":
                return frame.owner
            cell = (frame.function.__closure__ or ())[code.co_freevars.index(name.id)]
            value = self.in_cell(cell)
            return self.refuse(frame, name) if value is GONE else value
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

    def attribute_of_class(self, kind: type, name: str) -> Any:
        """The attribute of a class, or GONE."""
        return getattr(kind, name, GONE)

    def in_cell(self, cell: CellType) -> Any:
        """What lies in a cell, or GONE."""
        try:
            return cell.cell_contents
        except ValueError:  # it is empty
            return GONE

    def note_length(self, module: nn.Module) -> None:
        """All that `module` has was looked at."""

    def attribute(self, frame: Frame, expression: ast.Attribute, owner: Any) -> Any:
        """An attribute of a module of Python's, of a tensor, of an nn.Module or of super()."""
        name = expression.attr
        if name.startswith("__") and not name.endswith("__"):  # a class's own
            return self.other(frame, expression, name, [owner])
        if isinstance(owner, ModuleType):
            value = self.item(owner, "__dict__", name)
            return self.other(frame, expression, name, []) if value is GONE else value
        if isinstance(owner, Node):
            return Size(owner) if name == "shape" else Method(owner, name)
        if isinstance(owner, nn.Module):
            return self.attribute_of_module(frame, expression, owner)
        if type(owner) is _Super:
            for kind in type(owner.module).__mro__[type(owner.module).__mro__.index(owner.kind) + 1 :]:
                if isinstance(function := self.item(kind, "__dict__", name), FunctionType):
                    return Method(owner.module, (function, kind))
        return self.other(frame, expression, name, [owner])

    def attribute_of_module(self, frame: Frame, expression: ast.Attribute, module: nn.Module) -> Any:
        """A module in it, a method of its class, or a constant."""
        name, kind = expression.attr, plain_class(type(module))
        own, of_class = self.item(module, "__dict__", name), self.attribute_of_class(kind, name)
        for group in ("_modules", "_parameters", "_buffers"):
            if name in getattr(module, group) and own is GONE and of_class is GONE:
                value = self.item(module, group, name)
                known = value is None or isinstance(value, nn.Module)
                return value if known else self.other(frame, expression, f"{name} by itself", [])
        if own is not GONE and not hasattr(type(of_class), "__set__"):
            if type(own) in CONSTANTS or _is_known(own):
                return self.constant(own, f"{frame.source.tree.args.args[0].arg}.{name}")
            return self.other(frame, expression, name, [module])
        for place in kind.__mro__:
            if name in vars(place):
                value = vars(place)[name]
                if isinstance(value, FunctionType) and not place.__module__.startswith("torch."):
                    return Method(module, (value, place))
                if type(value) in CONSTANTS:
                    return self.constant(value, name)
                break
        return self.other(frame, expression, name, [module])

    def constant(self, value: Any, name: str) -> Any:
        """A value that somebody may change between calls."""
        return Undecided(f"{name}, {self.changes}" if self.changes else name)

    def subscript(self, frame: Frame, expression: ast.Subscript) -> Any:
        """A size, a module of a list, or a slice of one."""
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
        if type(owner) is nn.ModuleList or plain_class(type(owner)) is nn.Sequential:
            self.note_length(owner)
            return tuple(self.item(owner, "_modules", name) for name in owner._modules)
        return None

    def sequence(self, frame: Frame, expression: ast.expr) -> Iterator[Any]:
        """What a for goes over: modules, one after the other."""
        owner = self.value(frame, expression)
        found = self.children(owner)
        return iter(self.refuse(frame, expression) if found is None else found)

    def arithmetic(self, frame: Frame, expression: ast.AST, operator: ast.operator, operands: list[Any]) -> Any:
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

    def condition(self, frame: Frame, expression: ast.expr) -> Any:
        """The value of a test, Undecided if it may change."""
        match expression:
            case ast.UnaryOp(ast.Not()):
                value = self.truth(frame, expression, self.value(frame, expression.operand))
                return value if isinstance(value, Undecided) else not value
            case ast.BoolOp():
                stop = isinstance(expression.op, ast.Or)
                for part in expression.values[:-1]:  # the first that decides it, as it is, or the last
                    value = self.value(frame, part)
                    truth = self.truth(frame, part, value)
                    if (self.decide(truth) if isinstance(truth, Undecided) else truth) is stop:
                        return value
                return self.value(frame, expression.values[-1])
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

    def compare(self, frame: Frame, expression: ast.expr, values: list[Any], negated: bool) -> Any:
        """`is` or `is not`: of None, True and False, to which a tensor or a module is not equal."""
        if any(isinstance(value, (Undecided, Size)) or not self.is_a_tensor(value) for value in values):
            return self.unknown(frame, expression, values)
        if not any(value is None or type(value) is bool for value in values):
            return self.unknown(frame, expression, values)
        return (values[0] is values[1]) is not negated

    def is_a_tensor(self, value: Any) -> bool:
        """Whether a node, if it is one, surely is a tensor: of a function or a method of tensors, or the input."""
        if not isinstance(value, Node):
            return True
        return value.kind in ("function", "method") or (value.kind == "input" and self.inline)

    def truth(self, frame: Frame, expression: ast.expr, value: Any) -> Any:
        """True, False, or Undecided."""
        return bool(value) if type(value) in CONSTANTS else self.unknown(frame, expression, [value])

    def test(self, frame: Frame, expression: ast.expr) -> bool:
        """Which way a branch goes."""
        value = self.truth(frame, expression, self.value(frame, expression))
        return self.decide(value) if isinstance(value, Undecided) else value

    def unknown(self, frame: Frame, expression: ast.expr, values: list[Any]) -> Any:
        """A test that may go either way; Unread if what the forward made of the data says which."""
        if self.inline or any(isinstance(value, Node) and value.kind != "input" for value in values):
            self.refuse(frame, expression)
        names = {name.id for name in ast.walk(expression) if isinstance(name, ast.Name)} & frame.names.keys()
        known = [self.words_of(frame.names[name]) for name in sorted(names)]
        return Undecided(f"{ast.unparse(expression)}, {', '.join(known)}, {self.changes}")

    def words_of(self, value: Any) -> str:
        """What tells a value from others, for a test that is to be decided once."""
        return repr(value) if isinstance(value, Undecided) or type(value) in CONSTANTS else str(id(value))

    # calls

    def call(self, frame: Frame, call: ast.Call) -> Any:
        """What a call makes: of a module, of a method that is read too, of a function that is known."""
        callee = self.value(frame, call.func)
        plain = not any(isinstance(a, ast.Starred) for a in call.args) and all(k.arg for k in call.keywords)
        args = [self.value(frame, a.value if isinstance(a, ast.Starred) else a) for a in call.args]
        kwargs = {keyword.arg or "**": self.value(frame, keyword.value) for keyword in call.keywords}
        given = [*args, *kwargs.values()]
        if callee is torch.set_grad_enabled:
            self.within = (*self.within, call)
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
        if callee in WITHOUT_OPTIONS and len(given) > 1:  # an error, or out=
            return self.other(frame, call, _name(call.func), [callee, *given])
        if _is_known(callee) and args and isinstance(args[0], Node) and not nodes_of(given[1:]):
            return self.known(frame, call, "function", FUNCTIONS[callee], args, kwargs)
        return self.other(frame, call, _name(call.func), [callee, *given])

    def is_tensor(self, frame: Frame, call: ast.Call, kinds: Any) -> Any:
        """isinstance(x, kinds) of a tensor."""
        if Tensor in (kinds if type(kinds) is tuple else (kinds,)):
            return self.constant(True, ast.unparse(call))
        return self.unknown(frame, call, [kinds])

    def call_method(self, frame: Frame, call: ast.Call, method: Method, args: list[Any], kwargs: dict[str, Any]) -> Any:
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
        self, frame: Frame, call: ast.Call, kind: str, name: str, args: list[Any], kwargs: dict[str, Any]
    ) -> Node:
        """The node of a function or a method that is known."""
        ends = call.end_lineno or call.lineno, call.end_col_offset or call.col_offset
        place = Place(frame.function, frame.owner, call.lineno, call.col_offset, *ends)
        return self.add(Node(kind, name, (args[0],), (tuple(args[1:]), kwargs), place, self.text(frame, call)))

    def call_module(
        self, frame: Frame, call: ast.Call, module: nn.Module, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """The node of a module that is called."""
        nodes = nodes_of(args, [*kwargs.values()])
        self.escape(frame, call, [*args, *kwargs.values()])
        rest = (tuple(args[1:]), kwargs)
        return self.add(Node("module", module, tuple(nodes), rest, None, self.text(frame, call)))

    # what is not understood

    def other(self, frame: Frame, at: Any, words: str, values: list[Any]) -> Any:
        """A node for anything else that gets these values; an error where all has to be understood."""
        if self.inline:
            self.refuse(frame, at)
        self.escape(frame, at, values)
        return self.add(Node("other", words, tuple(nodes_of(values)), text=self.text(frame, at)))

    def escape(self, frame: Frame, at: Any, values: list[Any]) -> None:
        """Modules among the values may be called by whoever gets them."""
        for value in values:
            if isinstance(value, tuple):
                self.escape(frame, at, [*value])
            elif isinstance(value, nn.Module):
                self.escaped |= {inner: self.text(frame, at) for inner in value.modules()}

    def refuse(self, frame: Frame, at: ast.AST) -> Any:
        """Raise Unread, with the line."""
        name = f"{type(frame.module).__name__}.{frame.source.tree.name}"
        raise Unread(f"line {getattr(at, 'lineno', '?')} of {name}: {self.text(frame, at)}")

    def text(self, frame: Frame, at: Any) -> str:
        """The line on which something begins."""
        line: int = getattr(at, "lineno", 0) or getattr(getattr(at, "context_expr", None), "lineno", 0)
        lines = frame.source.lines
        return line_of(lines[line - 1]) if 0 < line <= len(lines) else ""

    def add(self, node: Node) -> Node:
        """Note what the forward does."""
        node = replace(node, within=self.within)
        self.nodes.append(node)
        return node


class _Super(NamedTuple):
    """super() in a method of `module` that stands in the class `kind`."""

    module: nn.Module
    kind: type


class Dead(Exception):  # noqa: N818
    """This way through a forward ends in an error of the user's."""


def _is_known(callee: Any) -> bool:
    return isinstance(callee, (FunctionType, BuiltinFunctionType, MethodType)) and callee in FUNCTIONS


def _name(expression: ast.expr) -> str:
    """How a function is called: the last of its names."""
    return expression.attr if isinstance(expression, ast.Attribute) else ast.unparse(expression)


def plain_class(kind: type) -> type:
    """The class of a module before fuse."""
    found: type = vars(kind).get("_plain_class", kind)
    return found
