"""What a forward is read as: nodes, and what may stand for a value in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations

NAMES: dict[Any, list[str]] = {
    F: [*activations.spelled(F), "dropout"],
    torch: [*activations.spelled(torch), "flatten", "reshape"],
    Tensor: [*activations.spelled(Tensor), "flatten", "reshape", "view"],
}
"""The functions of a tensor, and its methods, that are known."""

FUNCTIONS: dict[Any, str] = {getattr(owner, name): name for owner in (F, torch) for name in NAMES[owner]}

METHODS = NAMES[Tensor]

LOOKS = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "size", "dim", "numel", "is_floating_point")
"""Attributes and methods that tell something of a tensor other than its numbers."""

CONSTANTS = (bool, int, float, str, type(None))


class Unread(Exception):  # noqa: N818
    """A forward cannot be read; says why."""


class Place(NamedTuple):
    """Where a call stands in the source of a function of a class."""

    function: Any
    owner: type
    line: int
    column: int
    end_line: int
    end_column: int

    def __str__(self) -> str:
        return f"the ReLU in line {self.line} of {self.owner.__name__}.{self.function.__name__}"


@dataclass(frozen=True, eq=False)
class Node:
    """Something that a forward does with tensors.

    `kind` is "input", "module", "function", "method", or "other"; `what` is the module, or the name of the function,
    or words for anything else. `operands` are the nodes whose tensors it gets, in order, and `arguments` what else.
    `place` is where it stands in the source, and `text` its line; `within` are the with statements around it.
    """

    kind: str
    what: Any
    operands: tuple["Node", ...] = ()
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    place: Place | None = None
    text: str = ""
    within: tuple[Any, ...] = ()

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
