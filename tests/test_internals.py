"""The private names of torch and Triton in fusednn/internals.py: each is there, and no file uses another."""

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusednn import internals
from fusednn.kernels import launch, linear

ROOT = Path(__file__).parent.parent


def chain() -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return torch.optim.lr_scheduler.ChainedScheduler([schedule], optimizer)


def stepped_optimizer() -> Any:
    """After a scheduler has made it note its steps."""
    optimizer = chain().optimizer
    optimizer.step()
    return optimizer


THINGS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.zeros(1),
    "a module": lambda: nn.Linear(1, 1),
    "an optimizer": stepped_optimizer,
    "a chain of schedulers": chain,
    "a function that torch.compile meets": lambda: internals.constant_under_compile(lambda: 1),
}
PAIRS = [(owner, name) for owner, names in internals.NAMES.items() for name in names]


def find(owner: str) -> Any:
    if owner in THINGS:
        return THINGS[owner]()
    *within, last = owner.split(".")
    try:
        return importlib.import_module(owner)
    except ImportError:
        return getattr(importlib.import_module(".".join(within)), last)


@pytest.mark.parametrize(("owner", "name"), [pair for pair in PAIRS if not pair[0].endswith("kernel")])
def test_a_name_is_there(owner: str, name: str) -> None:
    assert hasattr(find(owner), name), f"{owner} has no {name}: {internals.NAMES[owner][name]}"


def test_the_names_of_a_kernel_are_there() -> None:
    """Kernels under the interpreter are of another class: what Triton's classes say is looked at."""
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    kernel = JITFunction(linear.linear_forward_kernel.fn)
    for name in internals.NAMES["a kernel"]:
        assert hasattr(kernel, name), name
    source = Path(sys.modules[CompiledKernel.__module__].__file__ or "").read_text()
    for name in internals.NAMES["a compiled kernel"]:
        assert hasattr(CompiledKernel, name) or f"self.{name} = " in source, name
    assert {*launch.RUN.__code__.co_names} - {*launch.SOME_NAMES.split()} == {*launch.NAMES.split()}


def test_torch_compile_runs_what_is_marked() -> None:
    """That this torch heeds the mark: a function that it cannot trace is run."""

    @internals.constant_under_compile
    def untraceable() -> int:
        return len(ast.dump(ast.parse("1 + 1")))

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + untraceable(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), float(untraceable())))


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.overrides, "_get_current_function_mode_stack")
    with pytest.raises(ImportError, match=r"no torch\.overrides\._get_current_function_mode_stack, which"):
        internals._find("torch.overrides", "_get_current_function_mode_stack")


OURS = {"_asdict", "_fields", "_replace"}  # of a NamedTuple
SAID = {"_native", "_global_", "_hooks", "_do_compile", "_pack_args", "_signal", "_"}
"""Our extension, beginnings and ends of names, what Triton's own code says (kernels/launch.py), words of sentences."""


def private_names(path: Path) -> Iterator[str]:
    """The names that begin with _ which a file takes from others: attributes, imports, and as strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (part for name in node.names for part in [*(node.module or "").split("."), name.name])
        elif isinstance(node, ast.Import):
            yield from (part for name in node.names for part in name.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (part for word in node.value.split() for part in word.split("."))


def defined(path: Path) -> Iterator[str]:
    """The names that a file defines: functions, classes, and what is assigned to a name or to an attribute of self."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_no_other_name_is_used() -> None:
    package = ROOT / "fusednn"
    files = [*(ROOT / "kernels").glob("*.py"), *package.glob("*.py"), *package.glob("[!k]*/**/*.py")]
    assert len(files) > 40
    own = {name for path in files for name in defined(path)} | OURS | SAID
    listed = {part for owner, name in PAIRS for part in [*owner.split("."), name]}
    used = {(path.name, name) for path in files for name in private_names(path)}
    private = {(path, name) for path, name in used if name.startswith("_") and not name.startswith("__")}
    assert len(private) > 100
    assert sorted((path, name) for path, name in private if name.isidentifier() and name not in own | listed) == []
