"""No kernel reads or writes anything but elements of its arguments: triton-viz traces every launch, in its own process.

Its own process, since triton-viz changes Triton's interpreter. And a sanitizer of our own on top of its tracing, since
the one that triton-viz 3.0 brings, an SMT solver over symbolic addresses, cannot judge these kernels. It gives equal
ranges one variable, so that of a square tile it sees the diagonal; it pairs each trip's pointers with every trip's mask
and so reports loops that are right; where one lane of a load by label is masked off it reports nothing; and it stops at
tl.trans, weights by label and masks made of loaded values. The addresses that the interpreter computes show all that a
call does.
"""

import inspect
import itertools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusednn.kernels import (
    activations,
    cross_entropy,
    cross_entropy_kernels,
    linear,
    mlp_training,
    mlp_training_backward,
    mlp_training_forward,
    mlp_training_tiles,
    updates,
)
from fusednn.kernels.launch import Launch
from fusednn.kernels.step import ROW, RULES, Activation, Loss, Rule, Step
from tests.conftest import small_tiles

MODULES = (linear, cross_entropy_kernels, mlp_training, updates)
KERNELS = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}

ALONE = {"sum_losses_kernel", "mlp_training_kernel"}
"""The kernels of one program."""

HARMLESS = {"split_rows", "program_rows", "position", "ignore_index", "smoothing"}
"""The integers that may be one too large: masks hold against the first two, one only makes the first batch smaller, the
others are no part of an address."""


def test_no_access_outside_the_arguments() -> None:
    """What this file, run as a script, sees: in every kernel nothing amiss, and every fault that it plants."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_sanitizer"],
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "ENABLE_SANITIZER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["outside"] == []

    programs, trips = report["programs"], report["trips"]
    assert set(programs) == KERNELS
    assert {kernel for kernel in programs if programs[kernel] < 2} == ALONE
    assert {loop.split(":")[0] for loop in trips} == {
        "linear_forward_kernel", "linear_input_grad_kernel", "linear_weight_grad_kernel", "sum_splits_kernel",
        "count_labels_kernel", "long_cross_entropy_kernel", "scale_gradient_kernel", "sum_losses_kernel",
        "mlp_training_kernel", "optimizer_step_kernel",
    }  # fmt: skip
    assert {loop for loop in trips if trips[loop] < 2} == set()

    assert {kernel for kernel, _ in report["planted"]} == KERNELS
    assert [fault for fault in report["planted"] if fault not in report["noticed"]] == []
    assert report["operations"] == ["load", "store"]


def sanitizer(kernel: str, outside: list[tuple[str, str]], trips: dict[str, int]) -> Any:
    """A client for triton_viz.trace that notes an access outside the arguments of `kernel` and raises before it.

    The lanes of an access that are not masked off must all be elements of one argument; what lies between the elements
    of a view is outside. It also notes the most trips of each loop.
    """
    from triton_viz.clients import Sanitizer
    from triton_viz.core.callbacks import ForLoopCallbacks, OpCallbacks
    from triton_viz.core.data import Load, Op, Store

    class AddressSanitizer(Sanitizer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.elements: list[Any] = []
            self.trip = 0

        def arg_callback(self, name: str, argument: Any, converted: Any) -> None:
            tensors = argument if isinstance(argument, tuple) else (argument,)
            self.elements += [addresses(tensor) for tensor in tensors if isinstance(tensor, Tensor)]

        def register_op_callback(self, op_type: type[Op]) -> Any:
            def check(pointers: Any, mask: Any, keys: Any) -> None:
                lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
                if not any(np.isin(lanes, elements).all() for elements in self.elements):
                    line = next(frame.lineno for frame in traceback.extract_stack() if frame.name == kernel)
                    outside.append((op_type.name, f"{kernel}, line {line}"))
                    raise IndexError(outside[-1])

            return OpCallbacks(before_callback=check if op_type in (Load, Store) else None)

        def register_for_loop_callback(self) -> Any:
            def begin(line: int, values: Any) -> None:
                self.trip = 0

            def step(line: int, value: Any) -> None:
                self.trip += 1
                loop = f"{kernel}:{line}"
                trips[loop] = max(trips.get(loop, 0), self.trip)

            return ForLoopCallbacks(before_loop_callback=begin, loop_iter_listener=step)

        def grid_callback(self, grid: tuple[int, ...]) -> None:
            """Nothing depends on it."""

        def grid_idx_callback(self, index: tuple[int, ...]) -> None:
            """Nothing depends on it."""

        def finalize(self) -> list[Any]:
            return []

    return AddressSanitizer()


def addresses(tensor: Tensor) -> Any:
    """Where the elements are in memory."""
    offsets: Any = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.add.outer(offsets, stride * np.arange(size))
    return (tensor.data_ptr() + tensor.element_size() * offsets).astype(np.uint64).ravel()


def faults(names: list[str], arguments: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The arguments with one integer one too large, and its name."""
    for i, (name, value) in enumerate(zip(names, arguments, strict=False)):
        before, after = arguments[:i], arguments[i + 1 :]
        if isinstance(value, int) and value and name not in HARMLESS:
            yield name, (*before, value + 1, *after)
        if isinstance(value, tuple):
            for j, stride in enumerate(value):
                if isinstance(stride, int) and stride:
                    faulty = (*value[:j], stride + 1, *value[j + 1 :])
                    faulty = type(value)(*faulty) if hasattr(value, "_fields") else faulty
                    yield f"{name}[{j}]", (*before, faulty, *after)


def gapped(tensor: Tensor) -> Tensor:
    """The same values in every second place of a larger tensor, in each dimension."""
    wide = tensor.new_empty([2 * size + 1 for size in tensor.shape])
    return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


def turned(tensor: Tensor) -> Tensor:
    """The same values with the strides in the opposite order."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [Tensor.contiguous, gapped, turned]


def call_linear() -> None:
    """The launchers of kernels/linear.py on ragged sizes: three splits of the rows and one, each layout."""
    kinds = itertools.cycle(itertools.product((True, False), (torch.float32, torch.bfloat16)))
    for rows, layout in itertools.product((65, 5), LAYOUTS):
        relu, dtype = next(kinds)
        x, w, b, dy = (layout(torch.randn(shape).to(dtype)) for shape in ((rows, 18), (20, 18), (20,), (rows, 20)))
        y = linear.linear_forward(x, w, b if relu else None, relu)
        saved = y if relu else None
        linear.linear_input_grad(dy, saved, w)
        for needs_dw, needs_db in ((True, True), (True, False), (False, True)):
            linear.linear_weight_grad(dy, saved, x, needs_dw, needs_db)


def call_cross_entropy() -> None:
    """The launchers of kernels/cross_entropy.py: rows whole and in blocks, classes together and apart, all targets.

    Some labels are ignored and some are no class: a load by one of those must be masked off.
    """
    shapes = ((5, 3, 3), (3, 7, 3), (9, 3), (9, 7), (4, 20), (3, 3))
    cases = ((False, False, 0.0), (False, True, 0.1), (False, True, 0.0), (True, False, 0.0), (True, True, 0.1))
    layouts = itertools.cycle(LAYOUTS)
    for shape, (probabilities, weighted, smoothing) in itertools.product(shapes, cases):
        layout = next(layouts)
        x, weight = layout(torch.randn(shape)), torch.rand(shape[1]) if weighted else None
        labels = torch.randint(0, shape[1], shape[:1] + shape[2:])
        labels[0], labels[1], labels[2] = -100, shape[1], -(2**40)
        labels = layout(labels)
        target = layout(torch.randn(shape).softmax(1)) if probabilities else labels

        given = (x, target, weight, -100)
        if layout is gapped:
            cross_entropy.cross_entropy_forward(*given, "sum", smoothing, False)
        cross_entropy.weigh_labels(labels.flatten(), weight, shape[1], -100, torch.float32)
        known = None if probabilities else labels
        infinite, rows = torch.tensor(float("inf")), layout(torch.rand(labels.shape))
        if not cross_entropy.is_long(x, target, weight, smoothing):
            _, grad, _, total = cross_entropy.cross_entropy_forward(*given, "mean", smoothing, True, probabilities)
            cross_entropy.scale_gradient(infinite, grad, known, total, -100, torch.empty_like(grad))
            cross_entropy.scale_gradient(rows, grad, known, None, -100, grad)
            cross_entropy.scale_gradient(infinite, grad, known, None, -100, grad)  # a program has several tiles
            out = torch.empty(labels.shape), x
            cross_entropy.cross_entropy_forward(*given, "none", smoothing, True, out=out)
            continue
        _, statistics, total = cross_entropy.long_cross_entropy_forward(*given, "mean", smoothing)
        outputs = torch.empty(shape), torch.empty(shape) if probabilities else None
        for dloss, divisor in ((infinite, total), (rows, None)):
            of_rows = (weight, statistics, divisor, -100, smoothing)
            cross_entropy.long_cross_entropy_gradient(dloss, x, target, *of_rows, *outputs)


def call_training() -> None:
    """The launchers of kernels/mlp_training.py and updates.py: two ragged epochs, each layout, some labels none.

    Nets of one to five layers, and two of outputs in several tiles. Without biases W1 stands in for them, and for class
    weights. With all options steps are clipped.
    """
    kinds = itertools.cycle([
        (True, "adam", True, 17), (False, "sgd", False, 20), (True, "rmsprop_centered_momentum", False, 17),
        (True, "nesterov", False, 17),
    ])  # fmt: skip
    for sizes in ((18, 19, 5), (18, 5), (18, 19, 17, 20, 17, 5)):
        for layout in LAYOUTS if len(sizes) != 2 else LAYOUTS[:1]:
            call_step(sizes, layout, *next(kinds))
    call_step((18, 19, 130), LAYOUTS[0], True, "adam", True, 17)
    call_step((18, 130), LAYOUTS[0], False, "sgd", False, 20)
    for loss in ("bce_with_logits", "cross_entropy_probabilities"):
        for outputs in (5, 130):
            call_step((18, 19, outputs), LAYOUTS[-1], True, "sgd", True, 17, loss)


def call_step(
    sizes: tuple[int, ...], layout: Any, bias: bool, name: str, everything: bool, batch_size: int,
    loss_name: str = "cross_entropy",
) -> None:  # fmt: skip
    """Two steps of a net, and one of an optimizer. A loss on numbers has all weights."""
    layers = len(sizes) - 1
    x, labels = layout(torch.randn(20, 18)), torch.randint(0, sizes[-1], (20,))
    labels[3], labels[4], labels[5] = -100, sizes[-1], -(2**40)
    shapes = [shape for k, n in itertools.pairwise(sizes) for shape in ((n, k), (n,))]
    w = [torch.randn(shape) if bias or len(shape) == 2 else None for shape in shapes]
    states = [[None if p is None else torch.rand_like(p) for p in w] for _ in RULES[name].states]
    activations = tuple(Activation(("gelu", "relu")[layer % 2]) for layer in range(layers))
    loss, rule = Loss("cross_entropy", everything, everything, everything), Rule(name, everything, False, everything)
    weights: dict[str, Tensor] = {}
    if loss_name != "cross_entropy":
        loss = Loss(loss_name, True, True, False, (), True, True, True)
        labels = torch.rand(20, sizes[-1])
        weights = {"pos_weight": torch.rand(sizes[-1]), "sample_weight": layout(torch.rand(20))}
    step = Step(sizes, (bias,) * layers, activations, loss, rule, everything, everything)
    order, table = torch.cat([torch.randperm(20)[3:], torch.randperm(20)[:batch_size]]), torch.rand(2, 2 * layers, ROW)
    mlp_training.train_mlp(
        step, x, layout(labels), order, torch.rand(sizes[-1]), w, states, table,
        batch_size=batch_size, position=3, epoch_rows=20, ignore_index=-100, label_smoothing=0.1, one_row=False,
        **weights,
    )  # fmt: skip
    at, g = torch.ones(1, dtype=torch.int64), torch.randn(shapes[0])
    updates.optimizer_step(w[0], [group[0] for group in states], g, torch.rand(2, 2, ROW), at, 1, rule)


def main() -> None:
    """Make the calls, with every launch traced, and print what was seen."""
    import triton.language as tl
    import triton_viz
    from triton_viz.core.patch import _loop_patcher
    from triton_viz.frontends.base import OPERATION_REGISTRY

    for module in (activations, mlp_training_backward, mlp_training_forward, mlp_training_tiles, updates):
        # it would be in kernels' files alone
        vars(module)["_triton_viz_loop_patcher"] = _loop_patcher
    del OPERATION_REGISTRY["triton"].namespaces[tl]["trans"]  # it would be called without the interpreter's _semantic

    outside: list[tuple[str, str]] = []
    programs: dict[str, int] = {}
    trips: dict[str, int] = {}
    planted: set[tuple[str, str]] = set()
    noticed: set[tuple[str, str]] = set()
    operations: set[str] = set()

    def run(kernel: Any, plan: Launch, arguments: tuple[Any, ...], trips: dict[str, int]) -> list[tuple[str, str]]:
        seen: list[tuple[str, str]] = []
        client = sanitizer(kernel.fn.__name__, seen, trips)
        try:
            triton_viz.trace(client=client)(kernel)[plan.grid](*arguments, **plan.options)
        except Exception:
            if not seen:
                raise
        return seen

    def launch(kernel: Any, plan: Launch, *arguments: Any) -> None:
        name = kernel.fn.__name__
        for argument, faulty in faults(kernel.arg_names, arguments):
            fault = name, argument
            planted.add(fault)
            if fault not in noticed and (seen := run(kernel, plan, faulty, {})):
                noticed.add(fault)
                operations.update(operation for operation, _ in seen)
        outside.extend(run(kernel, plan, arguments, trips))
        programs[name] = max(programs.get(name, 0), plan.grid[0])

    with pytest.MonkeyPatch.context() as patch, contextmanager(inspect.unwrap(small_tiles))(patch):
        patch.setattr(linear, "launch", launch)
        patch.setattr(cross_entropy, "launch", launch)
        patch.setattr(mlp_training, "launch", launch)
        patch.setattr(updates, "launch", launch)
        torch.manual_seed(0)
        call_linear()
        call_cross_entropy()
        call_training()
    report = {"outside": outside, "programs": programs, "trips": trips, "operations": sorted(operations)}
    json.dump(report | {"planted": sorted(planted), "noticed": sorted(noticed)}, sys.stdout)


if __name__ == "__main__":
    main()
