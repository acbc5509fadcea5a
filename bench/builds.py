"""Every compilation that the launchers can ask Triton's JIT for, recorded from the launchers themselves.

The launchers run on meta tensors, of a shape for each size class of their tables, with `launch` replaced by a recorder:
so kernel, arguments and options are the launchers' own, and only the JIT's specialisation is written down again here
(an integer of 1 becomes a constant, pointers and integers that 16 divides are marked).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fusednn.kernels import cross_entropy, linear
from fusednn.kernels.launch import DTYPE_NAMES, Launch

TYPE_NAMES = DTYPE_NAMES | {torch.int64: "i64", torch.int32: "i32"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"ieee": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Build:
    """One compilation of a kernel.

    `signature` gives the Triton type of each runtime argument, `constexprs` the value of each compile-time one (integer
    arguments of 1 among them), `divisible` the arguments that the JIT would mark as multiples of 16. A tuple of
    arguments has a tuple of types, and its element j is called (name, j).
    """

    label: str
    kernel: Any
    dtype: str
    signature: dict[str, Any]
    constexprs: dict[Any, object]
    divisible: tuple[Any, ...]
    options: dict[str, Any]


def specialise(label: str, kernel: Any, plan: Launch, arguments: tuple[Any, ...]) -> Build:
    """The build that the JIT would make for a launch of `kernel` with `arguments`."""
    options = {name: plan.options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    constexprs = {name: value for name, value in plan.options.items() if name not in options}
    signature: dict[str, Any] = {}
    divisible: list[Any] = []

    def type_of(name: Any, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
            return f"*{TYPE_NAMES[value.dtype]}"
        if value == 1:
            constexprs[name] = 1
            return "constexpr"
        if value % 16 == 0:
            divisible.append(name)
        return integer(value)

    for parameter, value in zip(kernel.params, arguments, strict=False):
        name = parameter.name
        if isinstance(value, tuple):
            signature[name] = tuple(type_of((name, j), element) for j, element in enumerate(value))
        elif parameter.do_not_specialize:
            signature[name] = integer(value)
        else:
            signature[name] = type_of(name, value)
    blocks = "x".join(str(value) for name, value in plan.options.items() if name.startswith("BLOCK_"))
    name = f"{kernel.fn.__name__.removesuffix('_kernel')} {label} {blocks}"
    name = f"{name} w{options['num_warps']} s{options['num_stages']}"
    dtype = DTYPE_NAMES.get(arguments[0].dtype, "i64")
    return Build(name, kernel, dtype, signature, constexprs, tuple(divisible), options)


def integer(value: int) -> str:
    """The type of an integer argument."""
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def record(module: Any, label: str, call: Any) -> Iterator[Build]:
    """The builds behind the launches that `call` makes through `module`."""
    launches: list[Build] = []
    with patch.object(module, "launch", lambda kernel, plan, *a: launches.append(specialise(label, kernel, plan, a))):
        call()
    yield from launches


def linear_calls(key: str) -> Iterator[tuple[str, Any]]:
    """A call of each launcher for each size class of the table of `key`, and for the last layer of 64-128-10."""
    dtype = DTYPES[key]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    for most_rows, most_columns in linear.ROW_LIMITS:
        rows, columns, inner = most_rows or 1024, most_columns or 512, 256
        x, w = matrix(rows, inner), matrix(columns, inner)
        yield f"{key} {rows}x{columns}", lambda x=x, w=w: linear.linear_forward(x, w, w[:, 0].contiguous(), True)
        dy, w = matrix(rows, inner), matrix(inner, columns)
        yield f"{key} {rows}x{columns}", lambda dy=dy, w=w: linear.linear_input_grad(dy, dy, w)
        for batch in (32, 2**17):  # without and with splits
            dy, x = matrix(batch, rows), matrix(batch, columns)
            yield f"{key} {rows}x{columns}", lambda dy=dy, x=x: linear.linear_weight_grad(dy, dy, x, True, True)
    x, w, dy = matrix(32, 128), matrix(10, 128), matrix(32, 10)
    yield f"{key} 64-128-10", lambda: linear.linear_forward(x, w, w[:, 0].contiguous(), False)
    yield f"{key} 64-128-10", lambda: linear.linear_input_grad(dy, None, w)
    yield f"{key} 64-128-10", lambda: linear.linear_weight_grad(dy, None, x, True, True)


VARIANTS = [
    # reduction, probabilities, class weights, smoothing, gradient: what changes the code between the loads and stores
    ("mean", False, False, 0.0, True),
    ("mean", False, True, 0.1, True),
    ("mean", True, False, 0.0, True),
    ("mean", True, True, 0.1, True),
    ("none", False, False, 0.0, False),
]


def cross_entropy_calls(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Forward, in one program and in many, and backward for each row of the tables of `dtype`, and for long rows."""
    kind = "double" if dtype == torch.float64 else "float"
    sizes = [(block_m, (classes,)) for block_m, classes in cross_entropy.CONFIGS[kind]]
    sizes += [(1, (2 * sizes[-1][1][0],)), (256, (10,)), (64, (16, 64)), (64, (1024, 64))]  # long; 64-128-10; apart
    for block_m, shape in sizes:
        name = f"{DTYPE_NAMES[dtype]} {'64-128-10' if shape == (10,) else 'x'.join(map(str, shape))}"
        x = torch.empty(64 * block_m, *shape, dtype=dtype, device="meta")
        labels = torch.empty(64 * block_m, *shape[1:], dtype=torch.int64, device="meta")
        weight = torch.empty(shape[0], dtype=dtype, device="meta")
        dloss = torch.empty((), dtype=dtype, device="meta")
        for reduction, probabilities, weighted, smoothing, needs_grad in VARIANTS:
            arguments = (weight if weighted else None, -100, reduction, smoothing, needs_grad)
            target = x if probabilities else labels
            label = f"{name} {'probabilities' if probabilities else 'labels'}{' weighted' if weighted else ''}"
            call = partial(cross_entropy.cross_entropy_forward, x, target, *arguments, probabilities and weighted)
            yield label, call
        one = (x[: max(1, block_m // max(1, math.prod(shape[1:])))], labels[:1], None, -100, "mean", 0.0, True)
        yield name, partial(cross_entropy.cross_entropy_forward, *one)
        yield name, partial(cross_entropy.scale_gradient, dloss, x, labels, None, -100, x)
        rows = torch.empty(labels.shape, dtype=dtype, device="meta")
        yield name, partial(cross_entropy.scale_gradient, rows, x, labels, None, -100, torch.empty_like(x))


def all_builds() -> Iterator[Build]:
    """The builds behind every call above; several calls ask for the same one."""
    for key in linear.CONFIGS:
        precision = key if DTYPES[key] == torch.float32 else "ieee"
        with patch.object(linear, "precision_of", lambda x, precision=precision: precision):
            for label, call in linear_calls(key):
                yield from record(linear, label, call)
    for dtype in DTYPE_NAMES:
        for label, call in cross_entropy_calls(dtype):
            yield from record(cross_entropy, label, call)


def builds(arch: str) -> list[Build]:
    """Every build for `arch`, each once. One table serves every architecture, but for the longest rows on chip."""
    cross_entropy.plan_forward.cache_clear()
    with patch.object(cross_entropy, "ON_CHIP", 16384 if arch.startswith("gfx") else 32768):
        return unique(all_builds())


def unique(builds: Iterator[Build]) -> list[Build]:
    """Those that differ in more than the label."""
    return list({repr(replace(build, label="")): build for build in builds}.values())
