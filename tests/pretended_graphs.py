"""CUDA graphs without CUDA: what is captured is written down and run again."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Writes down each operator and each launch, to be run again into the same results; undoes what they wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.inside = False

    def keep(self, tensors: Iterable[Any]) -> None:
        """What these have now is what they have after the capture, which on a card runs nothing."""
        self.before += [(tensor.detach(), tensor.detach().clone()) for tensor in tensors if isinstance(tensor, Tensor)]

    def undo(self) -> None:
        """The memory is as it was."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `function`, and note how to run it again."""
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        schema, options = function._schema, kwargs or {}
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.keep(tree_leaves(args[place] if place < len(args) else options.get(argument.name)))
        self.inside = True
        try:
            given = function(*args, **options)
        finally:
            self.inside = False
        written = all(value.alias_info is None for value in schema.returns) and "empty" not in function.name()

        def again() -> None:
            once_more = function(*args, **options)
            if written:  # and not a view, nor in place, nor left for others to write
                for old, new in zip(tree_leaves(given), tree_leaves(once_more), strict=True):
                    if isinstance(old, Tensor):
                        old.detach().copy_(new)

        self.calls.append(again)
        return given


class CUDAGraph:
    """What a capture has written down."""

    recording: Recorder | None = None

    def __init__(self, *arguments: Any) -> None:
        self.recorder = Recorder()

    def replay(self) -> None:
        """Run all of it again."""
        with torch.no_grad():
            for call in self.recorder.calls:
                call()


@contextlib.contextmanager
def graph(captured: CUDAGraph, *arguments: Any, **options: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    CUDAGraph.recording = captured.recorder
    try:
        with captured.recorder:
            yield
    finally:
        CUDAGraph.recording = None
        with torch.no_grad():
            captured.recorder.undo()
