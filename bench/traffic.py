"""Memory traffic of Triton kernels, counted in the interpreter: bytes, 32-byte sectors, launches, programs.

    with count() as traffic:
        fusednn.functional.linear_relu(x, w, b)
    traffic.loaded, traffic.stored, traffic.kernels["linear_forward_kernel"].programs

Every load, store and atomic of every interpreted kernel, ours or a peer's, goes through four functions of Triton's
C++ module, the same in Triton 3.6 to 3.9; `count` wraps them. What is counted is what the programs ask for, lane by
lane: masked-off lanes cost nothing, and what a GPU's caches would serve counts like the rest.

`python -m bench.traffic` prints our operations beside eager PyTorch and Liger, forward and backward of a linear layer
apart, and ten training steps. First it calibrates itself on a copy (2.00 passes over the tensor) and on Liger's cross
entropy (3.00); it exits non-zero when either is off, or when an operation of ours moves more or launches more kernels
than it may.
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
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from fusednn import CrossEntropyLoss, functional, internals, modules, reference, train_steps
from fusednn.kernels.step import ROW
from fusednn.training.engines import resident

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
        self.total += func.namespace == "aten" and not func.is_view and not allocates(func.__name__)
        return func(*args, **(kwargs or {}))


def allocates(name: str) -> bool:
    """Whether the aten operator of this name, which nothing precedes, gives memory and writes nothing there."""
    return name.startswith(("empty", "new_empty"))


def profiled(run: Callable[[], object]) -> list[str]:
    """The same operators by name, in the order of their start, as PyTorch's profiler saw them while `run` ran.

    The profiler also sees what an operator calls: `linear` is looked into, since it has no kernel of its own on any
    device, and `addmm` is not, since the copy that it makes on a CPU is not made on a GPU. It sees what Triton's
    interpreter does with tensors as well, so it is for functions of PyTorch alone.
    """
    overloads = _ExperimentalConfig(capture_overload_names=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=overloads) as profiler:
        run()
    found, waiting = [], [event for event in profiler.events() if event.cpu_parent is None]
    while waiting:
        event = waiting.pop()
        namespace, _, name = event.name.partition("::")
        packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
        operator = getattr(packet, event.overload_name or "default", None)
        if operator is None or operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            waiting += event.cpu_children
        elif not (operator.is_view or allocates(name)):
            found.append(event)
    return [event.name for event in sorted(found, key=lambda event: event.time_range.start)]


@dataclass(frozen=True)
class Row:
    """One line of the report: a function, and its gradients where one comes in; `reference` bytes make one pass.

    Of a `backward_alone` the forward is not counted. `fixed` bytes are taken off before passes are counted; a
    calibration has a number of passes `expected` of it, and an operation may have the `most` passes and the
    `most_launches` that it is allowed. Where most operators are the `host`'s, also on a GPU, none are counted.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    gradient: Tensor | None
    reference: int
    fixed: int = 0
    expected: float | None = None
    most: float | None = None
    most_launches: int | None = None
    retain_graph: bool = False
    compiled: bool = False
    backward_alone: bool = False
    host: bool = False

    def ready(self) -> Callable[[], object]:
        """What is counted, to be called once: where it is the backward alone, the forward runs now."""
        return partial(self.differentiate, self.forward()) if self.backward_alone else self.run

    def run(self) -> None:
        """All of it."""
        result = self.forward()
        if self.gradient is not None:
            self.differentiate(result)

    def forward(self) -> Tensor:
        """The function of its inputs; no graph is made where no gradient comes in."""
        with torch.set_grad_enabled(self.gradient is not None):
            return self.function(*self.inputs)

    def differentiate(self, result: Tensor) -> None:
        """The gradients of the inputs that want one."""
        leaves = [x for x in self.inputs if x.requires_grad]
        torch.autograd.grad(result, leaves, self.gradient, retain_graph=self.retain_graph)

    def broken(self, result: dict[str, Any]) -> list[str]:
        """What of its `result`, from `measure`, is over a limit, in words."""
        limits = {"passes": self.most, "launches": self.most_launches}
        return [
            f"{self.name}, {result['shape']}: {result[what]:.4g} {what}, at most {most}"
            for what, most in limits.items()
            if most is not None and result[what] > most
        ]


def measure(row: Row) -> dict[str, Any]:
    """Call it and count; then count operators, in calls of their own, since a dispatch mode changes the way of ours.

    Where Triton launches nothing, PyTorch's profiler counts the operators.
    """
    if row.compiled:
        row.run()  # so that it compiles now
    run = row.ready()
    with count() as traffic:
        run()
    operators: int | None
    if row.host:
        operators = None
    elif traffic.launches == 0:
        operators = len(profiled(row.ready()))
    elif row.compiled:  # which a dispatch mode rules out
        operators = 0
    else:
        run, mode = row.ready(), Operators()
        with count(), mode:
            run()
        operators = mode.total
    passes = (traffic.loaded + traffic.stored - row.fixed) / row.reference if traffic.launches else None
    shape = " ".join("x".join(map(str, x.shape)) for x in row.inputs)
    return {"implementation": row.name, "shape": shape, "operators": operators, "passes": passes} | asdict(traffic)


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
    # what comes in from behind the loss, and the passes over the logits that ours may then make in all: where a program
    # holds a row, and of longer rows
    "no gradient": (1.05, 1.05),
    "one": (2.05, 3.05),
    "a scalar": (4.1, 3.05),
    "a vector": (4.1, 3.05),
    "retained graph": (4.1, 3.05),
    "compiled": (4.1, 3.05),
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


LINEARS = (
    # rows, input and output features, ReLU, and the launches that the forward and the backward may take at most
    (32, 64, 128, True, (1, 2)),
    (512, 256, 512, True, (1, 3)),  # rows so many that the weight gradient splits them, and sums the splits
    (32, 128, 10, False, (1, 2)),
)


def linear_rows(m: int, k: int, n: int, relu: bool, most: tuple[int, int]) -> Iterator[Row]:
    """A linear layer [m, k] -> [m, n], float32, forward and then backward alone, PyTorch's and ours, held to `most`.

    A pass is each operand read once and each result written once.
    """
    x, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((m, k), (n, k), (n,)))
    dy = torch.randn(m, n)
    operands = x.nbytes + w.nbytes + b.nbytes
    forward = operands + dy.nbytes
    backward = dy.nbytes * (1 + relu) + x.nbytes + w.nbytes + operands  # dy, y behind a ReLU, x, W in; dx, dW, db out
    name = "linear_relu" if relu else "linear"
    for who, module in (("PyTorch", reference), ("fusednn", functional)):
        function = getattr(module, name)
        first, second = most if who == "fusednn" else (None, None)
        yield Row(f"{who} {name}, forward", function, (x, w, b), None, forward, most_launches=first)
        yield Row(
            f"{who} {name}, backward", function, (x, w, b), dy, backward, most_launches=second, backward_alone=True
        )


Loop = Callable[[Tensor, Tensor], Tensor]
"""Trains on inputs and targets, and returns the last loss or all."""


class InOneLaunch(resident.Resident):
    """The engine as it is on a GPU, where a few steps are one launch; interpreted it makes a launch for each."""

    def __init__(self, job: Any, net: Any) -> None:
        super().__init__(job, net)
        self.pace.chunk = job.steps


def textbook_loop(library: Any, criterion: nn.Module, net: tuple[int, int, int], batch: int, steps: int) -> Loop:
    """The loop in Python over `library.SimpleNN`, so many steps of an epoch.

    Adam is the fused one: that is the fewest operators, and the same on a CPU as on a GPU.
    """
    model = library.SimpleNN(*net)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def train(x: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            for rows in torch.randperm(len(x)).split(batch)[:steps]:
                loss = criterion(model(x[rows]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return loss.detach()

    return train


def one_call(net: tuple[int, int, int], batch: int, steps: int) -> Loop:
    """The same by train_steps."""
    model = reference.SimpleNN(*net)
    optimizer = torch.optim.Adam(model.parameters())

    def train(x: Tensor, target: Tensor) -> Tensor:
        counted = patch.object(internals, "dispatch_modes", lambda: 0)  # the mode that counts would get the plain loop
        with patch.object(resident, "Resident", InOneLaunch), counted:
            losses = train_steps(model, optimizer, x, target, batch_size=batch, steps=steps)
        assert isinstance(losses, Tensor)
        return losses

    return train


def training_rows(net: tuple[int, int, int] = (64, 128, 10), batch: int = 32, steps: int = 10) -> Iterator[Row]:
    """So many steps: PyTorch's loop, the same with our modules, and train_steps, ours held to limits.

    A pass is what has to move: in go a batch's rows, their labels and numbers, the parameters with Adam's two states of
    each, and the scalars of a step; out go parameters and states, and the loss. Of the modules' it is what their
    kernels have to move, rows, labels and parameters in and gradients out: gather and Adam are PyTorch's, uncounted.
    The limit of train_steps is what it takes with the interpreter's tiles, which keep all but the parameters on chip.
    """
    x, target = torch.randn(steps * batch, net[0]), torch.randint(net[2], (steps * batch,))
    size = sum(parameter.numel() for parameter in reference.SimpleNN(*net).parameters())
    kernels = x.nbytes + target.nbytes + 4 * steps * (2 * size + 1)
    whole = x.nbytes + 2 * target.nbytes + 4 * steps * (2 * 3 * size + 4 * ROW + 1)
    size_of_loop = (net, batch, steps)
    eager = textbook_loop(reference, nn.CrossEntropyLoss(), *size_of_loop)
    fused = textbook_loop(modules, CrossEntropyLoss(), *size_of_loop)
    whole_loop = one_call(*size_of_loop)
    for train in (eager, fused, whole_loop):
        train(x, target)  # so that Adam has its states
    what = f"{'-'.join(map(str, net))}, {steps} steps"
    yield Row(f"PyTorch, {what}", eager, (x, target), None, whole)
    yield Row(f"fusednn modules, {what}", fused, (x, target), None, kernels, most_launches=7 * steps)
    yield Row(
        f"fusednn train_steps, {what}", whole_loop, (x, target), None, whole, most=1.2, most_launches=1, host=True
    )


def operations() -> Iterator[Row]:
    """Ours beside PyTorch's."""
    for layer in LINEARS:
        yield from linear_rows(*layer)
    yield from cross_entropy_operations()
    yield from training_rows()


def cross_entropy_operations() -> Iterator[Row]:
    """Ours, held to its limits, beside PyTorch's and Liger's: few classes, rows on chip, and rows too long for it."""
    for n, v in ((512, 10), (64, 256), (16, 4096), (4, 32768), (2, 131072)):
        for sent, most in SENT.items():
            yield cross_entropy_row("fusednn cross_entropy", functional.cross_entropy, n, v, sent, most=most[v > 32768])
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
    operators = "-" if result["operators"] is None else result["operators"]
    return COLUMNS.format(result["implementation"], result["shape"], operators, *triton_counts)


def main(arguments: list[str] | None = None) -> int:
    """Calibrate, then print the table; 1 when the calibration is off or an operation goes over its limit."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    broken: list[str] = []
    titles = ("implementation", "shape", "operators", "launches", "programs", "MB loaded", "MB stored", "passes")
    print(COLUMNS.format(*titles))
    for row in chain(calibrations(), operations()):
        result = measure(row)
        results.append(result)
        print(show(result))
        if row.expected is not None and f"{result['passes']:.2f}" != f"{row.expected:.2f}":
            print(f"calibration failed: {row.name} makes {row.expected:.2f} passes, not {result['passes']:.2f}")
            return 1
        broken += row.broken(result)
    for line in broken:
        print(f"over its limit: {line}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    if not triton.knobs.runtime.interpret:  # Triton reads it when it is imported
        again = [sys.executable, "-m", "bench.traffic", *sys.argv[1:]]
        environment = os.environ | {"TRITON_INTERPRET": "1", "KINETO_LOG_LEVEL": "99"}  # a silent profiler
        sys.exit(subprocess.run(again, env=environment, check=False).returncode)
    sys.exit(main())
