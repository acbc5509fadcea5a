"""A kernel that a plan keeps is launched as Triton would launch it, by a driver that only writes down what it gets.

In a process of its own, since Triton reads TRITON_INTERPRET once and has one driver. Triton compiles for an H100; what
reaches the launcher by :func:`launch` is held against what reaches it by `kernel[grid](...)`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fusednn.kernels import cross_entropy, launch, linear

KERNELS = {name for module in (linear, cross_entropy) for name in vars(module) if name.endswith("_kernel")}


def test_a_kept_kernel_is_launched_as_triton_does() -> None:
    """What this file, run as a script, sees of each launch."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_launch"],
        cwd=Path(__file__).parent.parent.parent,
        env={name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["different"] == []
    assert report["kernels"] == sorted(KERNELS)
    assert report["not kept"] == ["debug", "enter hook", "exit hook", "hook that is a function", "pre-run hook", "run"]
    # in all other cases Triton chose another kernel than in the first
    assert report["as the first"] == [
        "linear M not by 16", "linear M 1", "linear stream", "cross entropy ignore_index"
    ]  # fmt: skip


class Comparison:
    """Launches both ways, and notes where they differ and what was not run directly."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.different: list[str] = []
        self.not_kept: list[str] = []
        self.functions: dict[str, int] = {}

    def launch(self, label: str, kernel: Any, plan: Any, *arguments: Any) -> None:
        """Ours, which may compile, ours again, and Triton's."""
        self.driver.launches.clear()
        launch.launch(kernel, plan, *arguments)
        launch.launch(kernel, plan, *arguments)
        with self.driver.switched_to(self.driver.home):
            compiled = kernel[plan.grid](*arguments, **plan.options)
        first, ours, theirs = self.driver.launches
        same = all(len(call) == len(theirs) for call in (first, ours)) and all(
            a is b or (not isinstance(a, Tensor) and a == b)
            for call in (first, ours)
            for a, b in zip(call[:6] + call[9:], theirs[:6] + theirs[9:], strict=True)
        )  # 6 to 8 are the hooks and their argument
        if not same or theirs[4] != compiled.function:
            self.different.append(label)
        if ours[6] is not None:  # which Triton has for hooks
            self.not_kept.append(label)
        self.functions[label] = theirs[4]


def recorded(module: Any, call: Any) -> tuple[Any, ...]:
    """The launch that `call` makes through `module`."""
    launches: list[tuple[Any, ...]] = []
    with patch.object(module, "launch", lambda *arguments: launches.append(arguments)):
        call()
    return launches[-1]


def every_kernel(compare: Comparison) -> set[str]:
    """Each launch of a training step, as the launchers make it; the kernels launched."""
    kernels = set()

    def both(kernel: Any, plan: Any, *arguments: Any) -> None:
        kernels.add(kernel.fn.__name__)
        compare.launch(f"step {kernel.fn.__name__}", kernel, plan, *arguments)

    with patch.object(linear, "launch", both), patch.object(cross_entropy, "launch", both):
        x, w, b = torch.randn(512, 20), torch.randn(24, 20), torch.randn(24)
        y = linear.linear_forward(x, w, b, True)
        linear.linear_input_grad(y, y, w)
        linear.linear_weight_grad(y, y, x, True, True)
        labels = torch.randint(0, 10, (2048,))
        for classes in (10, 40000):
            logits = torch.empty(1, classes).expand(2048, classes)
            cross_entropy.cross_entropy_forward(logits, labels, None, -100, "mean", 0.0, classes == 10)
        _, statistics, total = cross_entropy.long_cross_entropy_forward(logits, labels, None, -100, "mean", 0.0)
        of_rows = (None, statistics, total, -100, 0.0)
        cross_entropy.long_cross_entropy_gradient(torch.ones(()), logits, labels, *of_rows, logits, None)
        cross_entropy.scale_gradient(torch.ones(()), x, None, None, -100, x)
    return kernels


def changed(arguments: list[Any], changes: dict[int, Any]) -> list[Any]:
    """`arguments` with other ones at some places."""
    return [changes.get(place, argument) for place, argument in enumerate(arguments)]


def specialisations(compare: Comparison) -> None:
    """What Triton compiles another kernel for, or not, one change at a time, where the kernel without it is kept."""
    x, w, b = torch.randn(64, 64), torch.randn(32, 64), torch.randn(32)
    kernel, plan, *arguments = recorded(linear, lambda: linear.linear_forward(x, w, b, True))
    odd = torch.randn(64 * 64 + 1)[1:]
    linear_changes: dict[str, dict[int, Any]] = {
        "first": {},
        "x not aligned": {0: odd},
        "y not aligned": {3: odd},
        "all not aligned": dict.fromkeys(range(4), odd),
        "M not by 16": {4: 63},
        "M 1": {4: 1},
        "M past 32 bits": {4: 2**31},
        "N not by 16": {5: 31},
        "N 1": {5: 1},
        "N past 32 bits": {5: 2**31 + 16},
        "stride not by 16": {7: 65},
        "stride not 1": {8: 2},
        "float16": {place: tensor.half() for place, tensor in enumerate(arguments[:4])},
        "b alone float16": {2: b.half()},
    }
    for label, changes in linear_changes.items():
        compare.launch(f"linear {label}", kernel, plan, *changed(arguments, changes))

    compare.driver.stream = 8
    compare.launch("linear stream", kernel, plan, *arguments)
    compare.driver.home = 1  # and device 0 is current
    compare.launch("linear device", kernel, plan, *arguments)
    assert compare.driver.device == 0
    assert {call[3] for call in compare.driver.launches} == {1008}
    compare.driver.home = 0

    logits, labels = torch.randn(64, 10), torch.randint(0, 10, (64,))
    call = lambda: cross_entropy.cross_entropy_forward(logits, labels, None, -100, "mean", 0.0, True)  # noqa: E731
    kernel, plan, *arguments = recorded(cross_entropy, call)
    cross_entropy_changes: dict[str, dict[int, Any]] = {
        "first": {},
        "logits not aligned": {0: odd},
        "labels int32": {1: labels.int()},
        "stride in a tuple by 16": {10: (16, 1, 0)},
        "stride in a tuple not 1": {10: (10, 2, 0)},
        "stride in a tuple past 32 bits": {10: (2**31 + 1, 1, 0)},
        "ignore_index": {13: 1},
        "ignore_index past 32 bits": {13: -(2**31) - 1},
        "smoothing past 32 bits": {14: cross_entropy.float_bits(0.1)},
        "smoothing past 63 bits": {14: 2**63},
    }
    for label, changes in cross_entropy_changes.items():
        compare.launch(f"cross entropy {label}", kernel, plan, *changed(arguments, changes))


def observed(compare: Comparison) -> None:
    """Hooks and options that ask for more than to run a kernel that is kept: each gets that, at each launch."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    x = torch.randn(64, 64)
    arguments = recorded(linear, lambda: linear.linear_forward(x, x, None, False))
    compare.launch("plain", *arguments)
    seen: list[Any] = []

    @contextmanager
    def chained(hooks: Any) -> Iterator[None]:
        hooks.add(seen.append)
        yield
        hooks.remove(seen.append)

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(run)
        return original(self, *arguments, **options)

    original = JITFunction.run
    runtime = knobs.runtime
    observers: dict[str, Any] = {
        "enter hook": chained(runtime.launch_enter_hook),
        "exit hook": chained(runtime.launch_exit_hook),
        "hook that is a function": patch.object(runtime, "launch_enter_hook", lambda metadata: seen.append(metadata)),
        "pre-run hook": patch.object(arguments[0], "pre_run_hooks", [lambda *a, **o: seen.append(a)]),
        "run": patch.object(JITFunction, "run", run),
        "debug": patch.object(runtime, "debug", True),
    }
    for label, observer in observers.items():
        with observer:
            compare.launch(label, *arguments)
        assert len(seen) == (0 if label == "debug" else 3), (label, seen)
        seen.clear()
        compare.launch(f"plain after {label}", *arguments)


def main() -> None:
    """Print what :class:`Comparison` saw."""
    from bench.launches import Driver

    driver = Driver()
    driver.record()
    driver.install()
    compare = Comparison(driver)
    kernels = every_kernel(compare)
    specialisations(compare)
    observed(compare)
    functions = compare.functions
    as_first = [
        label
        for name in ("linear", "cross entropy")
        for label in functions
        if label.startswith(name) and label != f"{name} first" and functions[label] == functions[f"{name} first"]
    ]
    report = {"different": compare.different, "kernels": sorted(kernels), "not kept": sorted(compare.not_kept)}
    print(json.dumps(report | {"as the first": as_first}))


if __name__ == "__main__":
    main()
