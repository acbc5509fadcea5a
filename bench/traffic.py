"""Memory traffic of Triton kernels, counted in the interpreter: bytes, 32-byte sectors, launches, programs.

    with count() as traffic:
        fusednn.functional.linear_relu(x, w, b)
    traffic.loaded, traffic.stored, traffic.kernels["linear_forward_kernel"].programs

Every load, store and atomic of every interpreted kernel, ours or a peer's, goes through four functions of Triton's
C++ module, the same in Triton 3.6 to 3.9; `count` wraps them. What is counted is what the programs ask for, lane by
lane: masked-off lanes cost nothing, and what a GPU's caches would serve counts like the rest.

`python -m bench.traffic` prints our operations beside eager PyTorch and Liger. First it calibrates itself on a copy
(2.00 passes over the tensor) and on Liger's cross entropy (3.00); it exits non-zero when either is off, or when an
operation of ours moves more than it may.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from fusednn import functional, reference

SECTOR = 32
"""Bytes of a sector, the least that an NVIDIA GPU moves between its L2 cache and memory."""

ACCESSES: dict[str, tuple[tuple[str, ...], Callable[..., tuple[np.ndarray, Any, np.dtype]]]] = {
    "load": (("loaded",), lambda ptr, mask, other, dtype: (ptr, mask, dtype)),
    "store": (("stored",), lambda ptr, value, mask: (ptr, mask, value.dtype)),
    "atomic_rmw": (("loaded", "stored"), lambda op, ptr, value, mask, sem: (ptr, mask, value.dtype)),
    "atomic_cas": (("loaded", "stored"), lambda ptr, cmp, value, sem: (ptr, True, value.dtype)),
}
"""The C++ functions that touch memory: which way each moves bytes; the pointers, mask and dtype of its arguments."""


@dataclass
class Counts:
    """What was counted. An atomic is a load and a store; sectors are the distinct ones of each operation."""

    loaded: int = 0
    stored: int = 0
    sectors_loaded: int = 0
    sectors_stored: int = 0
    launches: int = 0
    programs: int = 0


@dataclass
class Traffic(Counts):
    """The counts of all kernels, and of each by its name."""

    kernels: dict[str, Counts] = field(default_factory=dict)

    def add(self, kernel: str, **amounts: int) -> None:
        """Add `amounts`, named as the fields are, to the totals and to `kernel`."""
        for counts in (self, self.kernels.setdefault(kernel, Counts())):
            for name, amount in amounts.items():
                setattr(counts, name, getattr(counts, name) + amount)


@contextmanager
def count() -> Iterator[Traffic]:
    """Count the traffic of the kernels launched inside. Contexts nest, and the outer one counts everything.

    Raises RuntimeError where Triton does not interpret: TRITON_INTERPRET=1 must be set before it is imported.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in the interpreter only: set TRITON_INTERPRET=1")
    traffic, kernel = Traffic(), ""
    memory = interpreter._interpreter
    launch, set_grid = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.set_grid_dim

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal kernel
        kernel = self.fn.__name__
        with _disable_current_modes():  # so that `Operators` does not count what the interpreter itself does
            launch(self, *args, **kwargs)

    def counted_grid(self: Any, *grid: int) -> None:
        traffic.add(kernel, launches=int(prod(grid) > 0), programs=prod(grid))
        set_grid(self, *grid)

    def counted_access(access: Callable[..., Any], directions: tuple[str, ...], describe: Any, *args: Any) -> Any:
        pointers, mask, dtype = describe(*args)
        live = pointers[np.asarray(mask, dtype=bool)]
        size, sectors = live.size * dtype.itemsize, np.unique(live // SECTOR).size
        for direction in directions:
            traffic.add(kernel, **{direction: size, f"sectors_{direction}": sectors})
        return access(*args)

    with ExitStack() as patches:
        patches.enter_context(patch.object(interpreter.GridExecutor, "__call__", counted_launch))
        patches.enter_context(patch.object(interpreter.InterpreterBuilder, "set_grid_dim", counted_grid))
        for name, how in ACCESSES.items():
            access = partial(counted_access, getattr(memory, name), *how)
            patches.enter_context(patch.object(memory, name, access))
        yield traffic


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators that would launch a kernel on a GPU: all but views and allocations.

    Another library's operator counts as none and is not looked into: `count` sees its kernels, and the rest of
    what ours do on the CPU, such as reading the labels for their range, is not done on a GPU.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count `func`, and call it."""
        allocates = func.__name__.startswith(("empty", "new_empty"))
        self.total += func.namespace == "aten" and not func.is_view and not allocates
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Row:
    """One line of the report: a function, and its gradients where one comes in; `reference` bytes make one pass.

    `fixed` bytes are taken off before passes are counted; a calibration has a number of passes `expected` of it, and
    an operation may have the `most` that it is allowed.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    gradient: Tensor | None
    reference: int
    fixed: int = 0
    expected: float | None = None
    most: float | None = None
    retain_graph: bool = False
    compiled: bool = False

    def __call__(self) -> None:
        """Run it once."""
        with torch.set_grad_enabled(self.gradient is not None):
            result = self.function(*self.inputs)
            if self.gradient is not None:
                leaves = [x for x in self.inputs if x.requires_grad]
                torch.autograd.grad(result, leaves, self.gradient, retain_graph=self.retain_graph)


def measure(row: Row) -> dict[str, Any]:
    """Call it and count, twice: under a dispatch mode our operations do not run as they do in eager mode."""
    row()  # what compiles, compiles now
    with count() as traffic:
        row()
    operators = Operators()
    if not row.compiled:  # which a dispatch mode rules out
        with count(), operators:
            row()
    passes = (traffic.loaded + traffic.stored - row.fixed) / row.reference if traffic.launches else None
    shape = " ".join("x".join(map(str, x.shape)) for x in row.inputs)
    return {"implementation": row.name, "shape": shape, "operators": operators.total, "passes": passes} | asdict(
        traffic
    )


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = x."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < size), mask=offs < size)


def copy(x: Tensor) -> Tensor:
    """A copy of `x`, contiguous: one pass to read and one to write."""
    y = torch.empty_like(x)
    copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


def liger_cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    """Liger's mean loss, whose gradient overwrites `x` in the forward: two reads and one write of the logits."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    plain = (None, -100, 0.0, 0.0, "mean", None, False)  # no class weights, smoothing, soft cap or z-loss
    return LigerCrossEntropyFunction.apply(x, target, *plain)[0]


SENT = {
    # what comes in from behind the loss, and the passes over the logits that ours may then make in all
    "no gradient": 1.05,
    "one": 2.05,
    "a scalar": 4.1,
    "a vector": 4.1,
    "retained graph": 4.1,
    "compiled": 4.1,
}


def cross_entropy_row(name: str, function: Callable[..., Tensor], n: int, v: int, sent: str, **limits: float) -> Row:
    """The loss of float32 logits [n, v], and their gradient if one is `sent`; a pass is the logits.

    Off go 16 bytes a row: its label, and its loss or its label once more.
    """
    x, target = torch.randn(n, v, requires_grad=True), torch.randint(v, (n,))
    gradient = None if sent == "no gradient" else torch.full((n,) if sent == "a vector" else (), 1.0)
    if sent in ("a scalar", "a vector", "compiled"):
        gradient *= 0.5
    if sent == "a vector":
        function = partial(function, reduction="none")
    if sent == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    kept = {"retain_graph": sent == "retained graph", "compiled": sent == "compiled"}
    return Row(f"{name}, {sent}", function, (x, target), gradient, x.nbytes, 16 * n, **limits, **kept)


def calibrations() -> Iterator[Row]:
    """What the counter must get right before it is believed. The copy's size is no multiple of the block."""
    x = torch.zeros(100_000)
    yield Row("copy", copy, (x,), None, x.nbytes, expected=2.0)
    if find_spec("liger_kernel"):
        yield cross_entropy_row("Liger cross_entropy", liger_cross_entropy, 64, 4096, "one", expected=3.0)
    else:
        print("Liger cross_entropy: skipped, liger-kernel is not installed; the copy alone calibrates")


def operations() -> Iterator[Row]:
    """Ours beside PyTorch's. A pass of a product is each operand read once and each result written once."""
    for m, k, n in ((32, 64, 128), (512, 256, 512)):
        x, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((m, k), (n, k), (n,)))
        dy = torch.randn(m, n)
        operands = x.nbytes + w.nbytes + b.nbytes
        forward = operands + dy.nbytes
        backward = 2 * dy.nbytes + x.nbytes + w.nbytes + operands  # dy, y, x, W in; dx, dW, db out
        for name, function in (("PyTorch", reference.linear_relu), ("fusednn", functional.linear_relu)):
            yield Row(f"{name} linear_relu, forward", function, (x, w, b), None, forward)
            yield Row(f"{name} linear_relu, gradients", function, (x, w, b), dy, forward + backward)
    yield from cross_entropy_operations()


def cross_entropy_operations() -> Iterator[Row]:
    """Ours, held to its limits, beside PyTorch's and Liger's: few classes, rows on chip, and rows too long for it."""
    for n, v in ((512, 10), (64, 256), (16, 4096), (4, 32768), (2, 131072)):
        for sent, most in SENT.items():
            long = 1.0 if v > 32768 and sent != "no gradient" else 0.0  # read once more
            yield cross_entropy_row("fusednn cross_entropy", functional.cross_entropy, n, v, sent, most=most + long)
        # a program of Liger's has one row, and the interpreter takes its time for each
        for sent in ("no gradient", "one", "a scalar")[: 3 if n < 50 else 1] if find_spec("liger_kernel") else ():
            yield cross_entropy_row("Liger cross_entropy", liger_cross_entropy, n, v, sent)
        yield cross_entropy_row("PyTorch cross_entropy", F.cross_entropy, n, v, "one")


COLUMNS = "{:<40} {:>20} {:>9} {:>8} {:>8} {:>9} {:>9} {:>6}"


def show(result: dict[str, Any]) -> str:
    """One line of the table."""
    triton_counts = ["-"] * 5
    if result["launches"]:
        loaded, stored = result["loaded"] / 1e6, result["stored"] / 1e6
        triton_counts = [result["launches"], result["programs"], f"{loaded:.3f}", f"{stored:.3f}"]
        triton_counts.append(f"{result['passes']:.2f}")
    return COLUMNS.format(result["implementation"], result["shape"], result["operators"], *triton_counts)


def main(arguments: list[str] | None = None) -> int:
    """Calibrate, then print the table; 1 when the calibration is off or an operation goes over its limit."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    results, broken = [], []
    titles = ("implementation", "shape", "operators", "launches", "programs", "MB loaded", "MB stored", "passes")
    print(COLUMNS.format(*titles))
    for row in chain(calibrations(), operations()):
        result = measure(row)
        results.append(result)
        print(show(result))
        if row.expected is not None and f"{result['passes']:.2f}" != f"{row.expected:.2f}":
            print(f"calibration failed: {row.name} makes {row.expected:.2f} passes, not {result['passes']:.2f}")
            return 1
        if row.most is not None and result["passes"] > row.most:
            broken.append(f"{row.name}, {result['shape']}: {result['passes']:.3f} passes, at most {row.most}")
    for line in broken:
        print(f"over its limit: {line}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    if not triton.knobs.runtime.interpret:  # Triton reads it when it is imported
        again = [sys.executable, "-m", "bench.traffic", *sys.argv[1:]]
        sys.exit(subprocess.run(again, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode)
    sys.exit(main())
