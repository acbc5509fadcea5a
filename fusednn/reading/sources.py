"""The source of a function, if it is that of the code that runs."""

import ast
import linecache
from functools import lru_cache
from types import CodeType
from typing import NamedTuple, TypeGuard


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
        return f"there is no source of its forward: {_NEEDED}"
    tree, codes = file
    function = next((node for node in ast.walk(tree) if _begins(node, code)), None)
    if function is None or not any(_alike(found, code) for found in codes):
        return f"the source of its forward is not that of the code that runs: {_NEEDED}"
    if function.decorator_list:
        return f"its {code.co_name} has a decorator: {line_of(lines[code.co_firstlineno - 1])}"
    return Source(function, lines)


_NEEDED = "it needs a class in a file or in a cell of a notebook"


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


def line_of(text: str) -> str:
    """A line as it is quoted."""
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
