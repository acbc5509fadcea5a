"""Reads a forward by itself, each way through it; what its modules do is not looked into."""

from types import FunctionType
from typing import Any

from torch import nn

from .nodes import Node, Reading, Undecided, Unread
from .reader import Dead, Reader, plain_class

MOST_PATHS = 64
"""So many ways through a forward are read, by the branches that go either way."""


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

        reader = Reader(decide)
        try:
            output = reader.call_function(function, place, module, *_arguments(reader, function))
            readings.append(Reading(reader.nodes, output))
        except Dead:
            readings.append(Reading(reader.nodes, None))
        escaped |= reader.escaped
        while taken and taken[-1]:
            taken.pop()
        if not taken:
            return readings, escaped
        path = [*taken[:-1], True]
    raise Unread(f"there are more than {MOST_PATHS} ways through it")


def _arguments(reader: Reader, function: FunctionType) -> tuple[list[Any], dict[str, Any]]:
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
