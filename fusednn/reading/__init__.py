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

from .activations import FORMS, MODULES
from .facts import GONE, Facts
from .nodes import Node, Place, Reading, Size, Unread, nodes_of
from .reader import plain_class
from .sources import source
from .ways import ways
from .whole import CALLS, HOOKS, UNTOUCHED, read

__all__ = [
    "CALLS", "FORMS", "GONE", "HOOKS", "MODULES", "UNTOUCHED", "Facts", "Node", "Place", "Reading", "Size",
    "Unread", "nodes_of", "plain_class", "read", "source", "ways",
]  # fmt: skip
