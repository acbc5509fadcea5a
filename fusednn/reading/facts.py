"""What a reading rests on, to be asked later whether anything of it has changed."""

from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from ..dispatch import native

GONE = object()
"""Stands for what is not there."""


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
