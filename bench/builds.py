"""Every compilation that the launchers can ask Triton's JIT for, recorded from the launchers themselves.

The launchers run on meta tensors, of a shape for each size class of their tables, with `launch` replaced by a recorder:
so kernel, arguments and options are the launchers' own, and only the JIT's specialisation is written down again here
(an integer of 1 becomes a constant, pointers and integers that 16 divides are marked).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from fusednn.kernels import cross_entropy, linear, mlp_training
from fusednn.kernels.launch import DTYPE_NAMES, Launch
from fusednn.kernels.step import ACTIVATIONS, LOSSES, ROW, RULES, Activation, Loss, Rule, Step

TYPE_NAMES = DTYPE_NAMES | {torch.int64: "i64", torch.int32: "i32"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"ieee": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Build:
    """One compilation of a kernel.

    `signature` gives the Triton type of each runtime argument, `constexprs` the value of each compile-time one (integer
    arguments of 1 among them), `divisible` the arguments that the JIT would mark as multiples of 16. A tuple of
    arguments has a tuple of types, and its element j is called (name, j). `stack` is how many bytes of local memory a
    thread may take.
    """

    label: str
    kernel: Any
    dtype: str
    signature: dict[str, Any]
    constexprs: dict[Any, object]
    divisible: tuple[Any, ...]
    options: dict[str, Any]
    stack: int = 0


def specialise(label: str, kernel: Any, plan: Launch, arguments: tuple[Any, ...]) -> Build:
    """The build that the JIT would make for a launch of `kernel` with `arguments`."""
    names = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    options = {name: plan.options[name] for name in names if name in plan.options}
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
            signature[name] = same_tuple(value, [type_of((name, j), element) for j, element in enumerate(value)])
        elif parameter.do_not_specialize:
            signature[name] = integer(value)
        else:
            signature[name] = type_of(name, value)
    tiles = plan.options.get("TILES")
    sizes = [value for name, value in plan.options.items() if name.startswith("BLOCK_")] if tiles is None else tiles[:4]
    blocks = "x".join(map(str, sizes))
    name = f"{kernel.fn.__name__.removesuffix('_kernel')} {label} {blocks}"
    name = f"{name} w{options['num_warps']} s{options['num_stages']}"
    dtype = DTYPE_NAMES.get(arguments[0].dtype, "i64")
    if tiles is not None and tiles.precision in ("tf32", mlp_training.SPLIT):
        dtype = "tf32"
    return Build(name, kernel, dtype, signature, constexprs, tuple(divisible), options)


def same_tuple(value: tuple[Any, ...], elements: list[Any]) -> tuple[Any, ...]:
    """A tuple of the type of `value`: of a NamedTuple a kernel uses the names."""
    return type(value)(*elements) if hasattr(value, "_fields") else tuple(elements)


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
        rows = torch.empty(labels.shape, dtype=dtype, device="meta")
        for reduction, probabilities, weighted, smoothing, needs_grad in VARIANTS:
            arguments = (weight if weighted else None, -100, reduction, smoothing, needs_grad)
            target = x if probabilities else labels
            label = f"{name} {'probabilities' if probabilities else 'labels'}{' weighted' if weighted else ''}"
            if not (needs_grad and cross_entropy.is_long(x, target, arguments[0], smoothing)):
                both = probabilities and weighted
                yield label, partial(cross_entropy.cross_entropy_forward, x, target, *arguments, both)
                continue
            yield label, partial(cross_entropy.long_cross_entropy_forward, x, target, *arguments[:-1])
            statistics = torch.empty(3, labels.numel(), dtype=cross_entropy.sum_dtype(dtype), device="meta")
            of_rows = (arguments[0], statistics, statistics[0, 0], -100, smoothing)
            for incoming, dq in ((dloss, None), (rows, x if probabilities else None)):
                yield label, partial(cross_entropy.long_cross_entropy_gradient, incoming, x, target, *of_rows, x, dq)
        one = (x[: max(1, block_m // max(1, math.prod(shape[1:])))], labels[:1], None, -100, "mean", 0.0)
        if cross_entropy.is_long(x, labels, None, 0.0):
            yield name, partial(cross_entropy.long_cross_entropy_forward, *one)
            continue
        yield name, partial(cross_entropy.cross_entropy_forward, *one, True)
        yield name, partial(cross_entropy.scale_gradient, dloss, x, labels, None, -100, x)
        yield name, partial(cross_entropy.scale_gradient, rows, x, labels, None, -100, torch.empty_like(x))


NETS = [(64, 128, 10), (64, 64, 10), (32, 64, 10), (128, 128, 10), (64, 256, 10), (256, 64, 10), (784, 128, 10)]
"""Sizes of the nets with a hidden layer that one program must train within the budgets."""

OTHER_DEPTHS = [
    (64, 10), (64, 128, 64, 10), (4, 64, 64, 2), (784, 512, 512, 10), (64, 128, 64, 32, 10), (*[32] * 8, 10),
]  # fmt: skip
"""And of those without, or with more."""

MANY_OUTPUTS = [((384, 1000), 128, "default"), ((64, 128, 1000), 32, "all options")]
"""Outputs in several tiles."""

NUMBERS = {"leaky_relu": (0.01,), "elu": (1.0,), "softplus": (1.0, 20.0)}
"""PyTorch's own of the activations that have any."""


class Kind(NamedTuple):
    """What else a step computes; the activation behind the hidden layers, and behind the last."""

    name: str
    loss: Loss = Loss()
    rule: Rule = Rule()
    accuracy: bool = False
    hidden: str = "relu"
    last: str = "identity"
    clipped: bool = False

    def step(self, sizes: tuple[int, ...]) -> Step:
        """The step of a net of these sizes."""
        layers = len(sizes) - 1
        names = [self.hidden] * (layers - 1) + [self.last]
        activations = tuple(Activation(name, NUMBERS.get(name, ())) for name in names)
        return Step(sizes, (True,) * layers, activations, self.loss, self.rule, self.accuracy, self.clipped)


DEFAULT = Kind("default")
EVERYTHING = Kind("all options", Loss("cross_entropy", True, True, True), Rule("adam", True, False, True), True)
NESTEROV = Kind("nesterov", Loss("cross_entropy", False, False, True), Rule("nesterov", True))
ADAMW = Kind("adamw", Loss("cross_entropy", True, True), Rule("adam", False, True), True)
OTHER_RULES = [
    Kind(name, rule=Rule(name)) for name in ("amsgrad", "nadam", "radam", "adagrad", "rmsprop_centered_momentum")
]
CENTERED = Kind("rmsprop_centered coupled", rule=Rule("rmsprop_centered", True, False, True))
CLIPPED = Kind("clipped", clipped=True)
ACTIVATED = [Kind(name, hidden=name) for name in ACTIVATIONS if name != "relu"] + [Kind("tanh behind", last="tanh")]
LOSS_NUMBERS = {"smooth_l1": (1.0,), "huber": (1.0,)}
LOST = [Kind(name, Loss(name, numbers=LOSS_NUMBERS.get(name, ()))) for name in LOSSES if name != DEFAULT.loss.name]
ALL_OF_BCE = Loss("bce_with_logits", True, True, False, (), True, True, True)
ALL_OF_PROBABILITIES = ALL_OF_BCE._replace(name="cross_entropy_probabilities", smoothed=True, positive_weighted=False)
WEIGHTED = [
    Kind("weighted rows", Loss(rows_weighted=True, scaled=True)),
    Kind("all of probabilities", ALL_OF_PROBABILITIES, accuracy=True),
    Kind("all of bce", ALL_OF_BCE, accuracy=True),
]
"""Each other loss by default, and some with all that is weighed."""

NAMED = (DEFAULT, EVERYTHING, NESTEROV, ADAMW, CLIPPED, *OTHER_RULES, CENTERED, *ACTIVATED, *LOST, *WEIGHTED)
KINDS = {kind.name: kind for kind in NAMED}


MOST_STACK = {torch.float32: 1300, torch.float64: 192}
"""Bytes of local memory that a thread of the training kernel may take.

Steps whose parameters are held take all 255 registers, and spill some of what no product waits for. 64-128-10 took on
an H100 5.1 us in TF32 without a spill, and 4.5 with what is loaded ahead and 32 bytes; exact it took 18.7 us with 288
bytes, and takes 10.2 in split products with 544 (bench/results). That no build spills more than before is seen by its
figures (figures.py), and one that falls off the register cliff by its registers.
"""


def training_calls(dtype: torch.dtype) -> Iterator[tuple[str, int, Any]]:
    """Steps of each net with a batch that is one tile and one that is several, by default and with all options.

    At 64-128-10 more of the options and rules, each activation, each loss, fewer rows; with one output two losses; in
    float64 few. With the bytes of stack.
    """
    cases = [(sizes, batch, kind) for sizes in NETS for batch in (32, 256) for kind in (DEFAULT, EVERYTHING)]
    deep = [(sizes, batch, kind) for sizes in OTHER_DEPTHS for batch in (32, 256) for kind in (DEFAULT, EVERYTHING)]
    if dtype == torch.float64:
        cases = cases[:4] + deep[:6]
    else:
        cases += [(NETS[0], 32, NESTEROV), (NETS[0], 32, ADAMW), (NETS[0], 8, DEFAULT)]
        cases += [((100, 96, 100), 32, EVERYTHING)]
        cases += [(sizes, batch, CLIPPED) for sizes, batch in ((NETS[0], 32), (NETS[0], 256), (OTHER_DEPTHS[1], 32))]
        cases += [(sizes, batch, KINDS[name]) for sizes, batch, name in MANY_OUTPUTS]
        larger = [(NETS[0], 64), (NETS[0], 128), (NETS[2], 128), (NETS[-1], 128)]  # on chip on some
        cases += [(sizes, batch, kind) for sizes, batch in larger for kind in (DEFAULT, EVERYTHING)]
        cases += deep + [(NETS[0], 32, kind) for kind in (*OTHER_RULES, CENTERED, *ACTIVATED, *LOST, *WEIGHTED)]
        cases += [(NETS[0], 256, kind) for kind in OTHER_RULES]
        cases += [((64, 64, 1), batch, kind) for batch in (32, 256) for kind in (KINDS["mse"], WEIGHTED[-1])]
    for sizes, batch, kind in cases:
        label = training_label(dtype, sizes, batch, kind)
        yield label, MOST_STACK[dtype], partial(train, kind.step(sizes), batch, dtype)


def training_label(dtype: torch.dtype, sizes: tuple[int, ...], batch: int, kind: Kind) -> str:
    """What a training build is called, but for the precision."""
    return f"{DTYPE_NAMES[dtype]} {'-'.join(map(str, sizes))} batch {batch} {kind.name}"


def train(step: Step, batch: int, dtype: torch.dtype) -> None:
    """Train a net on meta tensors, so that its launch can be recorded."""
    x = torch.empty(60000, step.sizes[0], dtype=dtype, device="meta")
    order = torch.empty(60000, dtype=torch.int64, device="meta")
    targets = order if LOSSES[step.loss.name].labels else x.new_empty(60000, step.sizes[-1])
    shapes = [shape for k, n in pairwise(step.sizes) for shape in ((n, k), (n,))]
    weights = [x.new_empty(shape) for shape in shapes]
    mlp_training.train_mlp(
        step, x, targets, order, x.new_empty(step.sizes[-1]), weights, [weights] * len(RULES[step.rule.name].states),
        x.new_empty(1000, len(weights), ROW), batch_size=batch, position=0, epoch_rows=len(x), ignore_index=-100,
        label_smoothing=0.1 * step.loss.smoothed, one_row=True, pos_weight=x.new_empty(step.sizes[-1]),
        sample_weight=x.new_empty(60000) if step.loss.rows_weighted else None,
    )  # fmt: skip


@contextmanager
def training_on(architecture: str, precision: str) -> Iterator[None]:
    """The launcher of the training kernel takes tensors for those of that architecture, in that precision."""
    with (
        patch.object(mlp_training, "precision_of", lambda x: precision),
        patch.object(mlp_training, "architecture_of", lambda x: architecture),
    ):
        yield


def training_build(
    architecture: str, precision: str, sizes: tuple[int, ...], batch: int, kind: Kind = DEFAULT
) -> Build:
    """That of a float32 net of any sizes."""
    label = f"{training_label(torch.float32, sizes, batch, kind)} {precision}"
    with training_on(architecture, precision):
        (build,) = record(mlp_training, label, lambda: train(kind.step(sizes), batch, torch.float32))
    return build


def all_builds(architecture: str) -> Iterator[Build]:
    """The builds behind every call above; several calls ask for the same one."""
    for key in linear.CONFIGS:
        precision = key if DTYPES[key] == torch.float32 else "ieee"
        with patch.object(linear, "precision_of", lambda x, precision=precision: precision):
            for label, call in linear_calls(key):
                yield from record(linear, label, call)
    for precision in ("ieee",) if architecture == "other" else ("ieee", "tf32"):
        with training_on(architecture, precision):
            for dtype in (torch.float32, torch.float64) if precision == "ieee" else (torch.float32,):
                for label, stack, call in training_calls(dtype):
                    for build in record(mlp_training, f"{label} {precision}", call):
                        yield replace(build, stack=stack)
    for dtype in DTYPE_NAMES:
        for label, call in cross_entropy_calls(dtype):
            yield from record(cross_entropy, label, call)


def builds(arch: str) -> list[Build]:
    """Every build for `arch`, each once. What the tables tell apart are the longest rows on chip, and training."""
    cross_entropy.plan_forward.cache_clear()
    cross_entropy.most_classes.cache_clear()
    architecture = arch if arch.startswith("sm_") else "other"
    with patch.object(cross_entropy, "ON_CHIP", 16384 if arch.startswith("gfx") else 32768):
        return unique(all_builds(architecture))


def unique(builds: Iterator[Build]) -> list[Build]:
    """Those that differ in more than the label."""
    return list({repr(replace(build, label="")): build for build in builds}.values())
