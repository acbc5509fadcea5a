"""A pretended H100 on a CPU, to rehearse on what is to run on a GPU.

    python -m pytest -p tests.pretended_card -m gpu tests      # as a plugin of pytest
    python -m tests.pretended_card bench.sweep                 # a module under it

Tensors lie in the memory of the CPU and say that they are on cuda:0. `torch.cuda` answers. Triton compiles for sm_90,
down to machine code, and where it would launch that, its interpreter runs the source. What a CUDA graph captures is
written down and run again. torch.compile returns what it is given. No race and no time is seen here.

FUSEDNN_PRETEND=sample runs every fourth test. FUSEDNN_PRETEND=compile compiles the kernels and runs none, which fills
Triton's cache. Results are wrong then, so what tests assert is evaluated and passes: set PYTHONPYCACHEPREFIX, since
pytest keeps such tests compiled.
"""

import ast
import contextlib
import functools
import os
import re
import runpy
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.assertion import rewrite
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

from bench.launches import Driver

from .pretended_graphs import CUDAGraph, graph

COMPILE_ONLY, SAMPLE = (os.environ.get("FUSEDNN_PRETEND") == kind for kind in ("compile", "sample"))

EVERY = 4
"""In a sample one test in so many runs."""

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)

PROPERTIES = SimpleNamespace(
    name="NVIDIA pretended H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, warp_size=32, gcnArchName="",
)  # fmt: skip

NOT_HERE = {
    "test_(compile|opcheck|export)": "torch.compile and fake tensors ask for a driver",
    "autocast": "PyTorch's own autocast for CUDA",
    "tf32_where": "the interpreter multiplies exactly",
    "betas tensors": "tensors of the CPU say that they are on the GPU too",
}
"""Patterns of tests that cannot be rehearsed, and why."""


def moved(value: Any) -> Any:
    """A device of CUDA's as the CPU, anything else as it is."""
    name = value.type if isinstance(value, torch.device) else value
    return CPU if isinstance(name, str) and name.split(":")[0] == "cuda" else value


def on_card(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, told to work on the GPU, works on the CPU."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if "device" in options:
            options["device"] = moved(options["device"])
        return function(*map(moved, arguments), **options)

    return call


def addmm(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.addmm, also with sums in a wider dtype, which PyTorch has for CUDA alone."""

    def call(c: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any = None, **options: Any) -> Tensor:
        return function(c, a.to(out_dtype), b.to(out_dtype), **options) if out_dtype else function(c, a, b, **options)

    return call


class Event:
    """A point in time."""

    def __init__(self, enable_timing: bool = False, **options: Any) -> None:
        self.timing, self.seconds = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        """Now."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        """Milliseconds."""
        if not (self.timing and later.timing and self.seconds and later.seconds):
            raise RuntimeError("both events must be recorded, and with enable_timing")
        return (later.seconds - self.seconds) * 1000

    def synchronize(self) -> None:
        """Nothing: all is done at once."""

    wait = query = synchronize


class Stream:
    """A queue that is always empty."""

    device = CARD

    def __init__(self, device: Any = None, **options: Any) -> None:
        self.cuda_stream = id(self) & 0xFFFF

    def synchronize(self, other: Any = None) -> None:
        """Nothing: all is done at once."""

    wait_stream = wait_event = synchronize


def inline_asm(builder: Any, asm: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
    """What the assembly in mlp_training_products.py does, of which the interpreter knows nothing: TF32, or a fence."""
    from triton.runtime.interpreter import TensorHandle

    if asm.startswith("cvt.rna.tf32.f32"):
        (x,) = values
        rounded = ((x.data.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)
        result = TensorHandle(np.where(np.isnan(x.data), x.data, rounded), x.dtype)
    else:
        assert asm.startswith("fence."), asm
        result = TensorHandle(np.zeros(1, np.int32), types[0])
    return SimpleNamespace(get_result=lambda place: result)


class Card(Driver):
    """The driver: a launch runs the kernel's source in the interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.interpreted: dict[Any, Any] = {}
        self.launcher_cls = self.launcher

    def get_active_torch_device(self) -> torch.device:
        """Triton's benchmarking asks."""
        return CARD

    def interpretable(self, kernel: Any) -> Any:
        """`kernel` as a function of the interpreter."""
        from triton.runtime.interpreter import InterpretedFunction

        if kernel.fn not in self.interpreted:
            self.interpreted[kernel.fn] = InterpretedFunction(kernel.fn)
        return self.interpreted[kernel.fn]

    def call(self, kernel: Any, *arguments: Any, **options: Any) -> Any:
        """A device function, called in the interpreter."""
        from triton.runtime import interpreter

        function = self.interpretable(kernel)
        scope = interpreter._patch_lang(function.fn)
        try:
            return function.rewrite()(*arguments, **options)
        finally:
            scope.restore()  # the compiler needs the language as it is

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """What a launch does."""
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder

        from fusednn.kernels import numerics

        before, numerics.INTERPRETED = numerics.INTERPRETED, tl.constexpr(True)
        InterpreterBuilder.create_inline_asm = inline_asm
        try:
            self.interpretable(kernel).run(*arguments, grid=grid, warmup=False)
        finally:
            numerics.INTERPRETED = before

    def launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls with grid, stream, function, four more, and the arguments of the kernel."""

        def launch(*given: Any) -> None:
            grid, arguments = given[:3], given[9:]
            assert len(arguments) == len(source.fn.arg_names)
            if COMPILE_ONLY:
                return
            recorder = CUDAGraph.recording
            if recorder is not None and not recorder.inside:
                recorder.keep(tree_leaves(arguments))
                recorder.calls.append(lambda: self.run(source.fn, grid, arguments))
            self.run(source.fn, grid, arguments)

        return launch


class Unseen:
    """A profile of a card: nothing was seen."""

    def __enter__(self) -> "Unseen":
        return self

    def __exit__(self, *raised: Any) -> None:
        """Nothing."""

    def events(self) -> list[Any]:
        """None."""
        return []


def profile_of(profile: Callable[..., Any]) -> Callable[..., Any]:
    """torch.profiler.profile, which without a card refuses to look at one alone."""
    return lambda activities=None, **options: (
        Unseen() if activities == [ProfilerActivity.CUDA] else profile(activities=activities, **options)
    )


class _Generators(type):
    """torch.Generator, whose device is always the CPU."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, REAL_GENERATOR)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return REAL_GENERATOR(device="cpu")


REAL_GENERATOR = torch.Generator


class Generator(metaclass=_Generators):
    """What torch.Generator is replaced by."""


class Unchecked(ast.NodeTransformer):
    """Makes of each `assert x` a plain `x`."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """x, which may launch a kernel."""
        return ast.copy_location(ast.Expr(node.test), node)


def passing(check: Callable[..., bool]) -> Callable[..., bool]:
    """`check`, whose result is no error."""
    return lambda *arguments, **options: check(*arguments, **options, raise_exception=False) or True


def nothing() -> Callable[..., Any]:
    """A function that does nothing, also as a context: a new one each time, as torch._dynamo wants for each name."""
    return lambda *arguments, **options: contextlib.nullcontext()


def install() -> Card:
    """Pretend from now on, in this process, that it has an H100."""
    os.environ["TRITON_INTERPRET"] = "0"
    cuda = torch.cuda
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_capability": (9, 0), "get_device_name": PROPERTIES.name, "get_device_properties": PROPERTIES,
        "memory_allocated": 0, "max_memory_allocated": 0, "is_current_stream_capturing": False,
        "current_stream": Stream(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *arguments, answer=answer: answer)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "_sleep", "_lazy_init", "manual_seed_all"):
        setattr(cuda, name, nothing())
    cuda.Event, cuda.Stream, cuda.CUDAGraph, cuda.graph = Event, Stream, CUDAGraph, graph
    cuda.stream, cuda.device = nothing(), nothing()
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.accelerator.synchronize = nothing()
    torch.accelerator.is_available = lambda: True
    torch.accelerator.device_count = lambda: 1
    torch.Generator = Generator
    Tensor.record_stream = nothing()
    torch.compile = lambda function=None, **options: function or (lambda made: made)

    from triton.runtime.jit import JITFunction

    card = Card()
    card.install()  # tensors are on no CPU, and on device 0
    Tensor.is_cpu = property(lambda tensor: False)
    Tensor.is_cuda = property(lambda tensor: not tensor.is_meta)
    Tensor.device = property(lambda tensor: torch.device("meta") if tensor.is_meta else CARD)
    JITFunction.__call__ = lambda kernel, *arguments, **options: card.call(kernel, *arguments, **options)

    for function in _device_constructors():
        if hasattr(torch, function.__name__):
            setattr(torch, function.__name__, on_card(function))
    for name in ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided"):
        setattr(Tensor, name, on_card(getattr(Tensor, name)))
    Tensor.cuda = lambda tensor, *arguments, **options: tensor
    Tensor.cpu = Tensor.pin_memory = Tensor.clone
    torch.addmm = addmm(torch.addmm)
    torch.profiler.profile = profile_of(torch.profiler.profile)
    if COMPILE_ONLY:
        torch.testing.assert_close = nothing()
        sys.modules["torch.autograd.gradcheck"]._allclose_with_type_promotion = lambda *numbers: True
        for name in ("gradcheck", "gradgradcheck"):
            setattr(torch.autograd, name, passing(getattr(torch.autograd, name)))
        rewrite.rewrite_asserts = lambda tree, *more: Unchecked().visit(tree)
        pytest.register_assert_rewrite("tests.accuracy", "tests.training.runs")
    return card


def pytest_configure(config: pytest.Config) -> None:
    """Install it before a test file is imported."""
    install()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that cannot be rehearsed; of a sample keep one in `EVERY`. Benchmarks all run."""
    if not all(item.get_closest_marker("gpu") for item in items):
        return
    if SAMPLE:
        config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % EVERY])
        items[:] = items[::EVERY]
    for item in items:
        for pattern, reason in NOT_HERE.items():
            if re.search(pattern, item.name):
                item.add_marker(pytest.mark.skip(reason=f"not on a pretended card: {reason}"))


def main() -> None:
    """Run the module that is named, under the name __main__, with the arguments behind it."""
    install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
