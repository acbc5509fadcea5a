"""What a reading rests on, to be asked later whether anything of it has changed."""

from types import (
    BuiltinFunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
    WrapperDescriptorType,
)
from typing import Any
from weakref import ref

import torch

from ..dispatch import native

GONE = object()
"""Stands for what is not there."""


class Facts:
    """What somebody looked at, so that it can be asked later whether anything of it has changed.

    What can be held weakly is, so that what is kept of a model keeps nobody alive: modules, tensors, functions,
    classes. What cannot, and is no constant, is not held at all, unless it is asked for: then the facts never hold.
    """

    def __init__(self) -> None:
        self.items: list[tuple[Any, str | None, Any, Any]] = []
        self.attributes: list[tuple[Any, str, Any]] = []
        self.lengths: list[tuple[Any, str, int]] = []
        self.names: list[tuple[Any, str, list[Any]]] = []
        self._noted: set[tuple[int, str]] = set()
        self._packed: Any = None

    def item(self, owner: Any, name: str | None, key: Any, held: bool = False) -> Any:
        """What the mapping `owner`, or that which is its attribute `name`, has at `key`, or GONE; noted.

        A mapping that is an owner is held, and what it has, and with `held` what any has: it must not lead back to what
        the facts are kept for.
        """
        mapping, held = (owner, True) if name is None else (getattr(owner, name), held)
        value = mapping.get(key, GONE)
        holder = owner if name is None else self._weak(owner)
        self.items.append((holder, name, self._weak(key), value if held else self._weak(value)))
        return value

    def attribute(self, owner: Any, name: str, held: bool = False) -> Any:
        """The attribute of anything, or GONE; noted."""
        value = getattr(owner, name, GONE)
        if (id(owner), name) not in self._noted:
            self._noted.add((id(owner), name))
            self.attributes.append((self._weak(owner), name, value if held else self._weak(value)))
        return value

    def length(self, owner: Any, name: str) -> int:
        """How much is in the collection that is an attribute of `owner`; noted."""
        length = len(getattr(owner, name))
        self.lengths.append((self._weak(owner), name, length))
        return length

    def keys(self, owner: Any, name: str) -> list[Any]:
        """The keys of the mapping that is an attribute of `owner`, in order; noted."""
        keys = list(getattr(owner, name))
        self.names.append((self._weak(owner), name, keys))
        return keys

    def never(self) -> None:
        """What was looked at may change unseen: it never holds."""
        self.items.append(({}, None, 0, None))

    def hold(self) -> bool:
        """Whether all is as it was."""
        if native is not None:
            if self._packed is None:
                self._packed = native.facts(self.items, self.attributes, self.lengths, self.names, GONE)
            held: bool = native.hold(self._packed)
            return held
        # what is behind a weak reference is asked for in place: a function for it would take half of the time
        for holder, name, key, value in self.items:
            owner: Any = holder() if isinstance(holder, ref) else holder
            mapping = owner if name is None else getattr(owner, name, {})
            found = mapping.get(key() if isinstance(key, ref) else key, GONE)
            if found is not (value() if isinstance(value, ref) else value):
                return False
        for holder, name, value in self.attributes:
            found = getattr(holder() if isinstance(holder, ref) else holder, name, GONE)
            if found is not (value() if isinstance(value, ref) else value):
                return False
        for holder, name, length in self.lengths:
            if len(getattr(holder() if isinstance(holder, ref) else holder, name, ())) != length:
                return False
        return all(list(getattr(_there(owner), name, ())) == keys for owner, name, keys in self.names)

    def _weak(self, value: Any) -> Any:
        """`value` if it is a constant, or a weak reference to it."""
        if value is GONE or isinstance(value, _HELD):
            return value
        try:
            if isinstance(value, MethodType):  # made anew for who asks: a weak reference would be to nobody
                raise TypeError
            return ref(value)
        except TypeError:
            self.never()
            return GONE


_HELD = (
    bool, int, float, complex, str, bytes, NoneType, ModuleType, torch.dtype, torch.layout,
    BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, GetSetDescriptorType,
)  # fmt: skip


def _there(value: Any) -> Any:
    return value() if isinstance(value, ref) else value
