"""The training steps in C++, called directly, against autograd in float64: each activation, rule and machine."""

import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.dispatch import native
from fusednn.kernels import step as names
from fusednn.kernels.step import Activation, Loss, Rule, Step
from tests.kernels.rules import expected, random_states

pytestmark = pytest.mark.skipif(native is None, reason="the native engine was not built")
MACHINES: dict[str, int] = {} if native is None else native.machines()
each_machine = pytest.mark.parametrize("machine", MACHINES)

ACTIVATIONS: dict[str, tuple[tuple[float, ...], Callable[[Tensor], Tensor]]] = {
    "identity": ((), lambda z: z),
    "relu": ((), torch.relu),
    "leaky_relu": ((0.1,), lambda z: F.leaky_relu(z, 0.1)),
    "elu": ((1.5,), lambda z: F.elu(z, 1.5)),
    "gelu": ((), F.gelu),
    "gelu_tanh": ((), lambda z: F.gelu(z, approximate="tanh")),
    "silu": ((), F.silu),
    "tanh": ((), torch.tanh),
    "sigmoid": ((), torch.sigmoid),
    "softplus": ((2.0, 3.0), lambda z: F.softplus(z, 2.0, 3.0)),
}
"""The numbers that each is tried with, and PyTorch's own."""


def bce(y: Tensor, t: Tensor, **options: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(y, t, **options)


LOSSES: dict[str, tuple[tuple[float, ...], Callable[..., Tensor]]] = {
    "cross_entropy": ((), F.cross_entropy),
    "cross_entropy_probabilities": ((), F.cross_entropy),
    "mse": ((), F.mse_loss),
    "l1": ((), F.l1_loss),
    "smooth_l1": ((0.7,), functools.partial(F.smooth_l1_loss, beta=0.7)),
    "huber": ((0.7,), functools.partial(F.huber_loss, delta=0.7)),
    "bce_with_logits": ((), bce),
    "poisson_nll": ((), F.poisson_nll_loss),
}
PER_OUTPUT = [name for name, kind in names.LOSSES.items() if kind.per_output]
ON_NUMBERS = [name for name, kind in names.LOSSES.items() if not kind.labels]

SGD = Rule("sgd")
SCALE = 0.375
"""Of a loss that is scaled."""


@dataclass
class Parameter:
    """The addresses of a parameter, its states and its count of steps."""

    weight: int
    first: int = 0
    second: int = 0
    third: int = 0
    count: int = 0
    double_count: bool = False


def address(tensor: Tensor | None) -> int:
    """Where its numbers lie, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


class Net:
    """A net of random numbers and random data, x and targets with gaps, those of x full of NaN."""

    def __init__(
        self,
        sizes: Sequence[int],
        activations: Sequence[str],
        biases: Sequence[bool] | bool = True,
        rows: int = 50,
        dtype: torch.dtype = torch.float64,
        **more: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        layers = len(sizes) - 1
        biases = (biases,) * layers if isinstance(biases, bool) else tuple(biases)
        kinds = tuple(Activation(name, ACTIVATIONS[name][0]) for name in activations)
        self.step = Step(tuple(sizes), biases, kinds, **{"rule": SGD, "accuracy": True} | more)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x = torch.full((2 * rows, 2 * sizes[0]), math.nan, dtype=dtype)[::2, 1::2]
        self.x.copy_(random(rows, sizes[0]))
        self.targets = torch.randint(0, sizes[-1], (rows, 3), generator=generator)[:, 1]
        if not names.LOSSES[self.step.loss.name].labels:
            self.targets = torch.full((sizes[-1], 2 * rows), math.nan, dtype=dtype).T[1::2]
            self.targets.copy_(random(rows, sizes[-1]))
        self.order = torch.randperm(rows, generator=generator)
        self.w: list[Tensor | None] = []
        for inputs, outputs, bias in zip(sizes, sizes[1:], biases, strict=False):
            self.w += [random(outputs, inputs) / inputs**0.5, random(outputs) if bias else None]
        self.states = [[None if p is None else random(*p.shape).abs() for p in self.w] for _ in range(3)]
        self.counts = [torch.zeros((), dtype=[torch.float32, torch.float64][i % 2]) for i in range(len(self.w))]
        self.class_weight: Tensor | None = None
        self.pos_weight: Tensor | None = None
        self.sample_weight: Tensor | None = None

    def there(self, of: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """The parameters, or others of each, that there are."""
        return [p for p in (self.w if of is None else of) if p is not None]

    def forward(self, rows: Tensor, w: Sequence[Tensor | None]) -> Tensor:
        y = self.x[rows].to(next(p.dtype for p in w if p is not None))
        for layer, activation in enumerate(self.step.activations):
            y = ACTIVATIONS[activation.name][1](F.linear(y, w[2 * layer], w[2 * layer + 1]))
        return y

    def loss(self, y: Tensor, rows: Tensor, **options: Any) -> Tensor:
        """PyTorch's loss of the outputs of `rows`."""
        targets = self.targets[rows]
        targets = targets.to(y.dtype) if targets.is_floating_point() else targets
        return LOSSES[self.step.loss.name][1](y, targets, **options)

    def gradients(
        self, rows: Tensor, dtype: torch.dtype = torch.float64, **options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of `rows` and its gradients at the parameters as they are now, of those that there are."""
        w = [None if p is None else p.detach().to(dtype, copy=True).requires_grad_() for p in self.w]
        loss = options.pop("loss", self.loss)(self.forward(rows, w), rows, **options)
        return loss.detach(), list(torch.autograd.grad(loss, self.there(w)))

    def parameters(self) -> list[Parameter | None]:
        return [
            None if p is None else Parameter(*map(address, (p, *states, count)), count.dtype == torch.float64)
            for p, *states, count in zip(self.w, *self.states, self.counts, strict=True)
        ]

    def prepare(self, machine: str) -> Any:
        return native.prepare(
            machine=MACHINES[machine], is_double=self.x.dtype == torch.float64, step=self.step,
            parameters=self.parameters(), class_weight=address(self.class_weight), pos_weight=address(self.pos_weight),
        )  # fmt: skip

    def train(self, machine: str, table: Tensor, batch: int = 33, **more: Any) -> tuple[Tensor, Tensor]:
        """Losses and accuracies of the steps that the table has rows for."""
        losses, accuracies = (torch.full((len(table),), 7.0, dtype=self.x.dtype) for _ in range(2))
        prepared = more.pop("prepared", None) or self.prepare(machine)
        given = {
            "x": address(self.x), "stride_xm": self.x.stride(0), "stride_xi": self.x.stride(1),
            "targets": address(self.targets), "stride_tm": self.targets.stride(0), "stride_to": self.targets.stride(-1),
            "sample_weight": address(self.sample_weight), "order": address(self.order),
            "stride_w": 0 if self.sample_weight is None else self.sample_weight.stride(0),
            "table": address(table), "losses": address(losses), "accuracies": address(accuracies), "batch": batch,
            "epoch_rows": len(self.x), "position": 0, "steps": len(table), "ignore_index": -100, "label_smoothing": 0.0,
        }  # fmt: skip
        assert native.train(prepared, **given | more) is None
        return losses, accuracies

    def table(self, *steps: dict[int, float]) -> Tensor:
        """A row of each step, the same for all parameters, of numbers at their places."""
        table = torch.full((len(steps), len(self.w), names.ROW), math.nan, dtype=self.x.dtype)
        table[:, :, names.DECAY] = 0
        for step, row in enumerate(steps):
            for place, value in row.items():
                table[step, :, place] = value
        return table

    def slope(self, machine: str, rows: int, **more: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss of the first rows, and its gradients: what a step of SGD takes off with a learning rate of 1."""
        before = [p.clone() for p in self.there()]
        row = {names.STEP_SIZE: 1.0, names.LOSS_SCALE: SCALE}
        losses, _ = self.train(machine, self.table(row), batch=rows, **more)
        return losses[0], [old - new for old, new in zip(before, self.there(), strict=True)]


def assert_near(result: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(result, expected, check_dtype=False, **tolerance)


def assert_gradients(net: Net, machine: str, rows: int) -> None:
    loss, grads = net.gradients(net.order[:rows])
    found, found_grads = net.slope(machine, rows)
    assert_near(found, loss, net.x.dtype)
    for ours, theirs in zip(found_grads, grads, strict=True):
        assert_near(ours, theirs, net.x.dtype)


DEPTHS = {1: (37, 10), 2: (37, 40, 10), 3: (37, 19, 40, 10), 8: (7, 9, 33, 5, 18, 7, 6, 8, 3)}


@each_machine
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_gradients(machine: str, depth: int, name: str, rows: int, bias: bool) -> None:
    """The same activation behind every layer, the last too."""
    assert_gradients(Net(DEPTHS[depth], [name] * depth, bias), machine, rows)


@each_machine
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 3, 17, 33])
def test_gradients_in_float32(machine: str, name: str, rows: int) -> None:
    assert_gradients(Net((37, 40, 20, 10), [name] * 3, dtype=torch.float32), machine, rows)


@each_machine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_layer_has_its_own(machine: str, dtype: torch.dtype) -> None:
    """Activations, biases and widths, on both sides of those of vectors and tiles."""
    kinds = [*ACTIVATIONS][1:8], [*[*ACTIVATIONS][7:], "identity", "gelu", "relu"]
    biases = [True, False, True, True, False, False, True]
    for activations in kinds:
        sizes = (5, 300, 1, 16, 33, 257, 64, 4)[: len(activations) + 1]
        assert_gradients(Net(sizes, activations, biases[: len(activations)], dtype=dtype), machine, 33)


@each_machine
@pytest.mark.parametrize("sizes", [(784, 3, 2), (1, 700, 1, 2), (2, 1100, 2), (256, 256, 256), (64, 128, 10)])
@pytest.mark.parametrize("rows", [1, 2, 4, 6, 16, 40])
def test_sizes(machine: str, sizes: tuple[int, ...], rows: int) -> None:
    """Wide and narrow layers, batches of a part of a vector, of one, and of two and a half."""
    for dtype in (torch.float64, torch.float32):
        activations = ["relu"] * (len(sizes) - 2) + ["identity"]
        assert_gradients(Net(sizes, activations, rows=rows, dtype=dtype), machine, rows)


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"weight": torch.rand(10, generator=torch.Generator().manual_seed(2)).double() + 0.1},
    "ignored": {"ignore_index": 3},
}
OPTIONS["all"] = OPTIONS["smoothing"] | OPTIONS["weights"] | OPTIONS["ignored"]


def with_options(net: Net, options: dict[str, Any]) -> dict[str, Any]:
    """Let the net have the loss of these options of F.cross_entropy; the keywords of train."""
    net.class_weight = None if "weight" not in options else options["weight"].to(net.x.dtype)
    loss = Loss("cross_entropy", "reduction" not in options, "weight" in options, "label_smoothing" in options)
    net.step = net.step._replace(loss=loss)
    return {key: value for key, value in options.items() if key in ("label_smoothing", "ignore_index")}


@each_machine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_with(machine: str, name: str, rows: int, dtype: torch.dtype) -> None:
    net = Net((37, 40, 10), ["relu", "identity"], dtype=dtype)
    net.targets[net.order[1]] = 3
    loss, grads = net.gradients(net.order[:rows], **OPTIONS[name])
    found, found_grads = net.slope(machine, rows, **with_options(net, OPTIONS[name]))
    assert_near(found, loss, dtype)
    for ours, theirs in zip(found_grads, grads, strict=True):
        assert_near(ours, theirs, dtype)


def with_loss(name: str, sizes: Sequence[int] = (37, 40, 10), **more: Any) -> Net:
    """A net with that loss, and a part of the fields of `Loss` in `more`."""
    fields = {key: more.pop(key) for key in Loss._fields if key in more}
    loss = Loss(name, numbers=LOSSES[name][0], **fields)
    more.setdefault("accuracy", name not in PER_OUTPUT or name == "bce_with_logits")
    activations = more.pop("activations", ["relu"] * (len(sizes) - 2) + ["identity"])
    net = Net(sizes, activations, loss=loss, **more)
    if name == "cross_entropy_probabilities":
        net.targets.copy_(net.targets.double().softmax(1))
    if name in ("bce_with_logits", "poisson_nll"):
        net.targets.abs_()
    generator = torch.Generator().manual_seed(5)
    rows, outputs = len(net.x), sizes[-1]
    weights = [torch.rand(n, generator=generator).to(net.x.dtype) + 0.1 for n in (outputs, outputs, 3 * rows)]
    net.class_weight = weights[0] if loss.weighted else None
    net.pos_weight = weights[1] if loss.positive_weighted else None
    net.sample_weight = weights[2][1::3] if loss.rows_weighted else None
    return net


def assert_slope(net: Net, machine: str, rows: int, loss: Callable[..., Tensor], **more: Any) -> None:
    """Loss and gradients of the first rows are those of `loss`, where a gradient is as large as its largest number."""
    expected, grads = net.gradients(net.order[:rows], loss=loss)
    found, found_grads = net.slope(machine, rows, **more)
    assert_near(found, expected, net.x.dtype)
    for ours, theirs in zip(found_grads, grads, strict=True):
        size = theirs.abs().max().clamp(min=1)
        assert_near(ours / size, theirs / size, net.x.dtype)


@each_machine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(machine: str, name: str, reduction: str, rows: int, dtype: torch.dtype) -> None:
    """Each is PyTorch's, whatever the strides of its targets."""
    for contiguous in (False, True):
        net = with_loss(name, mean=reduction == "mean", dtype=dtype)
        net.targets = net.targets.contiguous() if contiguous else net.targets
        assert_slope(net, machine, rows, functools.partial(net.loss, reduction=reduction))


@each_machine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_rows_and_outputs(machine: str, name: str, mean: bool, rows: int, dtype: torch.dtype) -> None:
    """All weights that a loss may have, its smoothing and a scale, over what a mean divides by."""
    kind = names.LOSSES[name]
    weighted = not kind.per_output or name == "bce_with_logits"
    net = with_loss(
        name, mean=mean, weighted=weighted, smoothed=not kind.per_output, positive_weighted=name == "bce_with_logits",
        rows_weighted=True, scaled=True, dtype=dtype,
    )  # fmt: skip
    if kind.labels:
        net.targets[net.order[1]] = 3

    def loss(y: Tensor, rows: Tensor) -> Tensor:
        s, w, p = (
            None if of is None else of.to(y.dtype) for of in (net.sample_weight, net.class_weight, net.pos_weight)
        )
        assert s is not None
        options: dict[str, Any] = {"weight": w} if weighted else {}
        options |= {} if kind.per_output else {"label_smoothing": 0.2}
        options |= {"pos_weight": p} if name == "bce_with_logits" else {}
        options |= {"ignore_index": 3} if kind.labels else {}
        each = net.loss(y, rows, reduction="none", **options)
        each = each.sum(1) if kind.per_output else each
        divisor = s[rows].sum() * (y.shape[1] if kind.per_output else 1)
        if kind.labels and w is not None:
            labels = net.targets[rows]
            divisor = (s[rows] * w[labels] * (labels != 3)).sum()
        return SCALE * (s[rows] * each).sum() / (divisor if mean else 1)

    assert_slope(net, machine, rows, loss, label_smoothing=0.2, ignore_index=3)


@each_machine
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [3, 17])
def test_rows_without_weight(machine: str, rows: int, name: str) -> None:
    """A mean over weights of 0 is NaN, as that of PyTorch; a sum moves nothing."""
    for mean in (True, False):
        net = with_loss(name, mean=mean, rows_weighted=True)
        net.sample_weight = torch.zeros(50, dtype=torch.float64)
        loss, grads = net.slope(machine, rows)
        assert loss.isnan() if mean else loss == 0
        assert all(grad.isnan().any() if mean else not grad.any() for grad in grads)


@each_machine
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_no_rows(machine: str, name: str, clipped: bool) -> None:
    """The mean over none is NaN, and moves nothing; nor does the sum."""
    for mean in (True, False):
        net = with_loss(name, mean=mean, rows_weighted=True, clipped=clipped)
        before = [p.clone() for p in net.there()]
        table = net.table({names.STEP_SIZE: 1.0, names.MAX_NORM: 1.0})
        losses, accuracies = net.train(machine, table, epoch_rows=0)
        assert losses.isnan().all() if mean else losses.tolist() == [0]
        assert accuracies.isnan().all() == net.step.accuracy
        assert all(torch.equal(old, new) for old, new in zip(before, net.there(), strict=True))


SPECIAL = [
    0.0,
    0.5,
    -0.5,
    0.7,
    -0.7,
    1.0,
    -3.0,
    40.0,
    -200.0,
    800.0,
    1e-30,
    -1e-42,
    1e30,
    math.inf,
    -math.inf,
    math.nan,
]


def of_each(net: Net, machine: str, rows: int) -> tuple[Tensor, Tensor]:
    """The loss of each output of a net of rows that are all alike, and its slope, with nothing rounded.

    The net has a bias alone. It has one output for the losses, and all for the slopes.
    """
    (w, b), m = net.there(), net.there(net.states[0])
    y, targets, step = b.clone(), net.targets[:1].clone(), net.step
    weights = net.class_weight, net.pos_weight
    table = net.table({names.STEP_SIZE: 0.0, names.LOSS_SCALE: 1 / rows, names.MOMENTUM: 0.0, names.UNDAMPED: 1.0})
    losses, slopes = [], torch.empty_like(y)
    for i in range(-1, len(y)):
        for p in (w, *m):  # which 0 times infinity may have made NaN
            p.zero_()
        if i >= 0:
            net.step, net.targets = step._replace(sizes=(1, 1)), targets[:, i:].expand(len(net.x), -1)
            net.class_weight, net.pos_weight = (None if of is None else of[i:] for of in weights)
            b[0] = y[i]
        else:
            net.targets = targets.expand(len(net.x), -1)
        losses.append(net.train(machine, table, batch=rows)[0])
        slopes = m[1].clone() if i < 0 else slopes
    return torch.cat(losses[1:]), slopes


@each_machine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "weighted"), [("bce_with_logits", True), *((name, False) for name in PER_OUTPUT)])
def test_special_outputs_and_targets(machine: str, name: str, weighted: bool, dtype: torch.dtype) -> None:
    """Each is within 4 units of PyTorch's float64, and NaN and infinity stand where PyTorch has them in this dtype."""
    y, t = (grid.flatten() for grid in torch.meshgrid(*[torch.tensor(SPECIAL, dtype=dtype)] * 2, indexing="ij"))
    if name == "poisson_nll":  # whose product overflows
        y, t = y[t != 1e30], t[t != 1e30]
    for rows in (1, 8):
        net = with_loss(
            name, (1, len(y)), mean=False, scaled=True, weighted=weighted, positive_weighted=weighted, rows=8,
            dtype=dtype, rule=Rule("momentum"),
        )  # fmt: skip
        net.there()[1].copy_(y)
        net.targets = t[None]
        weights = {"weight": net.class_weight, "pos_weight": net.pos_weight} if weighted else {}
        found = of_each(net, machine, rows)
        for of in (dtype, torch.float64):
            given = y.to(of, copy=True).requires_grad_()
            options = {key: None if value is None else value.to(of) for key, value in weights.items()}
            each = LOSSES[name][1](given, t.to(of), reduction="none", **options)
            slopes = torch.autograd.grad(each.sum(), given)[0]
            sizes = (1 + y.abs()) * (1 + t.abs()), 1 + t.abs()
            for ours, theirs, size in zip(found, (each.detach(), slopes), sizes, strict=True):
                if of == dtype:
                    assert torch.equal(ours.isnan(), theirs.isnan())
                    assert torch.equal(ours.isinf(), theirs.isinf())
                    assert torch.equal(ours[ours.isinf()], theirs[theirs.isinf()])
                finite = ours.isfinite() & theirs.isfinite()
                error = (ours.double() - theirs.double()).abs()[finite]
                most = 4 * torch.finfo(dtype).eps * (theirs.abs() + torch.nan_to_num(size.double(), 1, 1))[finite]
                assert (error <= most).all()


@each_machine
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("place", ["output", "target"])
def test_special_probabilities(machine: str, place: str, value: float) -> None:
    """NaN and infinity stand where PyTorch puts them."""
    for rows in (1, 6):
        net = with_loss("cross_entropy_probabilities", (3, 6), dtype=torch.float32)
        if place == "output":
            net.there()[-1][2] = value
        else:
            net.targets[net.order[0], 2] = value
        before = [p.clone() for p in net.there()]
        loss, grads = net.gradients(net.order[:rows], torch.float32)
        losses, _ = net.train(machine, net.table({names.STEP_SIZE: 1.0}), batch=rows)
        torch.testing.assert_close(losses[0], loss, equal_nan=True)
        for old, new, grad in zip(before, net.there(), grads, strict=True):
            torch.testing.assert_close(new, old - grad, equal_nan=True, rtol=1e-4, atol=1e-5)


@each_machine
@pytest.mark.parametrize("batch", [3, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accuracy_of_losses_on_numbers(machine: str, dtype: torch.dtype, batch: int) -> None:
    """The first of equal numbers, and NaN, are the largest; an output of 0 and a target of 1/2 are not positive."""
    for name in ("cross_entropy_probabilities", "bce_with_logits"):
        net = with_loss(name, (37, 10), rows_weighted=True, dtype=dtype)
        net.targets.copy_(torch.randint(0, 3, (50, 10), generator=torch.Generator().manual_seed(6)) / 2)
        net.targets[net.order[0], 7] = math.nan
        net.there()[0][:2], net.there()[1][:2] = 0, 0
        y, targets = net.forward(net.order[:batch], net.w), net.targets[net.order[:batch]]
        right = (y > 0) == (targets > 0.5) if name == "bce_with_logits" else y.argmax(1) == targets.argmax(1)
        _, accuracies = net.train(machine, net.table({names.STEP_SIZE: 0.0}), batch=batch)
        assert_near(accuracies[0], right.double().mean(), dtype)
        assert batch == 3 or 0 < accuracies[0] < 1


@each_machine
@pytest.mark.parametrize("outputs", [257, 3000])
def test_many_outputs(machine: str, outputs: int) -> None:
    """The sum over the outputs of a row is made of parts."""
    net = with_loss("mse", (5, outputs), dtype=torch.float32)
    assert_slope(net, machine, 9, net.loss)


@each_machine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("most", [0.01, 0.3, 1e3, math.inf])
def test_clipping(machine: str, most: float, bias: bool, dtype: torch.dtype) -> None:
    """PyTorch's, before the sign turns and the weight decays; twice, and the second time it is not clipped."""
    net = Net((300, 40, 10), ["tanh", "identity"], bias, dtype=dtype, rule=Rule("momentum", True, False, True))
    net.step = net.step._replace(clipped=True)
    row = {
        names.STEP_SIZE: 0.5, names.DECAY: 0.1, names.SIGN: -1.0, names.MOMENTUM: 0.5, names.UNDAMPED: 1.0,
    }  # fmt: skip
    table = net.table(row | {names.MAX_NORM: most}, row | {names.MAX_NORM: 1e6})
    table[:, 1:, names.MAX_NORM] = math.nan
    table[:, 2, names.STEP_SIZE] = 0.25
    expected = Net((300, 40, 10), ["tanh", "identity"], bias, dtype=dtype)
    expected.w, momenta = ([None if p is None else p.double() for p in of] for of in (expected.w, expected.states[0]))
    net.train(machine, table)
    for rows, largest in ((net.order[:33], most), (net.order[33:], 1e6)):
        _, grads = expected.gradients(rows)
        for p, grad in zip(expected.there(), grads, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(expected.there(), largest)
        for p, m in zip(expected.there(), expected.there(momenta), strict=True):
            assert p.grad is not None
            m.mul_(0.5).add_(0.1 * p - p.grad)
            p -= (0.25 if p is expected.w[2] else 0.5) * m
    for ours, theirs in ((net.w, expected.w), (net.states[0], momenta)):
        for new, wanted in zip(net.there(ours), expected.there(theirs), strict=True):
            assert_near(new, wanted, dtype)


@each_machine
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
def test_clipping_of_special_gradients(machine: str, value: float) -> None:
    """Where one is NaN all are; where one is infinite the others are 0, and that is NaN."""
    net = with_loss("mse", (3, 4), mean=False, dtype=torch.float32, clipped=True)
    net.there()[1][2] = value
    net.step = net.step._replace(rule=Rule("momentum"))
    net.train(machine, net.table({names.STEP_SIZE: 0.0, names.MOMENTUM: 0.0, names.UNDAMPED: 1.0, names.MAX_NORM: 1.0}))
    grads = torch.cat([m.flatten() for m in net.there(net.states[0])]).reshape(-1)
    _, expected = net.gradients(net.order[:33])
    for p, grad in zip(net.there(), expected, strict=True):
        p.grad = grad.float() if value != 1e30 else None
    if value == 1e30:  # whose square is no float
        assert_near(grads.double().norm(), torch.tensor(1.0), torch.float32)
    else:
        torch.nn.utils.clip_grad_norm_(net.there(), 1.0)
        wanted = torch.cat([p.grad.flatten() for p in net.there() if p.grad is not None])
        assert torch.equal(grads.isnan(), wanted.isnan())
        assert torch.equal(grads == 0, wanted == 0)


@each_machine
@pytest.mark.parametrize(("name", "sizes"), [("mse", (3, 2, 1)), ("cross_entropy", (2, 3))])
def test_sums_of_large_batches(machine: str, name: str, sizes: tuple[int, ...]) -> None:
    """Losses and gradients of a million rows, of which the numbers are some units; also where all rows are alike."""
    rows = 2**20 + 5
    for alike, units in ((False, 4), (True, 64)):
        net = with_loss(name, sizes, rows=rows, dtype=torch.float32, activations=["tanh", "identity"][1 - len(sizes) :])
        if alike:
            net.x[:], net.targets[:] = net.x[0].clone(), net.targets[0].clone()
        loss, grads = net.gradients(net.order)
        found, found_grads = net.slope(machine, rows)
        assert abs(found.double() - loss) <= 4 * 2**-24 * loss
        for ours, theirs in zip(found_grads, grads, strict=True):
            assert (ours - theirs).abs().max() <= units * 2**-24


@each_machine
def test_large_batches_of_wide_nets(machine: str) -> None:
    """The parts of dW of a batch of many parts: whole rows with and without gaps, and columns."""
    for dtype in (torch.float64, torch.float32):
        assert_gradients(Net((300, 21, 16, 10), ["tanh", "relu", "identity"], rows=4500, dtype=dtype), machine, 4500)


@each_machine
def test_no_rows_that_count(machine: str) -> None:
    """The mean over none is NaN and moves nothing; nor does an empty batch."""
    net = Net((37, 40, 10), ["relu", "identity"])
    before = [p.clone() for p in net.there()]
    net.targets.fill_(-100)
    table = net.table({names.STEP_SIZE: 1.0}, {names.STEP_SIZE: 1.0})
    for more in ({}, {"epoch_rows": 0}):
        losses, accuracies = net.train(machine, table, **more)
        assert losses.isnan().all()
        assert accuracies.isnan().all()
    net.step = net.step._replace(loss=Loss(mean=False))
    losses, _ = net.train(machine, table)
    assert losses.tolist() == [0, 0]
    assert all(torch.equal(old, new) for old, new in zip(before, net.there(), strict=True))


@each_machine
def test_labels_without_weight(machine: str) -> None:
    """The mean over weights of 0 is NaN, whatever smoothing adds, as in PyTorch."""
    net = Net((37, 40, 10), ["relu", "identity"])
    net.targets.fill_(3)
    options = {"weight": torch.ones(10).double().index_fill_(0, torch.tensor([3]), 0.0), "label_smoothing": 0.2}
    loss, _ = net.gradients(net.order[:33], **options)
    found, _ = net.slope(machine, 33, **with_options(net, options))
    torch.testing.assert_close(found, loss, equal_nan=True)


@each_machine
@pytest.mark.parametrize(
    "flags", [(False, False, False), (True, False, True), (False, True, True), (True, True, False)]
)
@pytest.mark.parametrize("name", names.RULES)
@pytest.mark.parametrize("sizes", [(37, 40, 10), (300, 40, 10), (1100, 7, 10)])
def test_rules(machine: str, sizes: tuple[int, ...], name: str, flags: tuple[bool, bool, bool]) -> None:
    """From a state that is not zero, with other numbers for each parameter."""
    net = Net(sizes, ["tanh", "identity"], rule=Rule(name, *flags))
    _, grads = net.gradients(net.order[:33])
    generator = torch.Generator().manual_seed(3)
    table = torch.rand(1, 4, names.ROW, dtype=torch.float64, generator=generator)
    table[:, :, names.SIGN] = torch.tensor([1.0, -1.0, -1.0, 1.0])
    states = [random_states(net.step.rule, p, generator) for p in net.there()]
    net.states = [[state[i] if i < len(state) else None for state in states] for i in range(3)]
    wanted = [
        expected(net.step.rule, table[0, i], *of) for i, of in enumerate(zip(net.there(), grads, states, strict=True))
    ]
    net.train(machine, table)
    for new, state, (w, *after) in zip(net.there(), states, wanted, strict=True):
        assert_near(new, w)
        for found, one in zip(state, after, strict=True):
            assert_near(found, one)
    assert [count.item() for count in net.counts] == [1] * 4


STILL = {
    names.STEP_SIZE: 0.5, names.ROOT: 1.0, names.EPS: 1.0, names.GRAD_PART: 0.0, names.SQUARE_KEPT: 1.0,
    names.SQUARE_PART: 0.0,
}  # fmt: skip
"""Of Adams whose states stay as they are."""


@each_machine
def test_an_amsgrad_that_is_not_a_number_stays_so(machine: str) -> None:
    """As torch.maximum has it; and a larger one is not taken for one that is."""
    net = Net((4, 3), ["identity"], rule=Rule("amsgrad"))
    tops, squares = net.states[2], net.states[1]
    for states, value in ((tops, math.nan), (squares, math.nan)):
        for state in net.there(states):
            state.view(-1)[1 if states is tops else 2] = value
    net.train(machine, net.table(STILL))
    for w, top in zip(net.there(), net.there(tops), strict=True):
        assert w.isnan().view(-1).nonzero().view(-1).tolist() == [1, 2]
        assert top.isnan().view(-1).nonzero().view(-1).tolist() == [1, 2]


@each_machine
def test_radam_without_a_quotient_does_not_read_the_squares(machine: str) -> None:
    net = Net((4, 3), ["identity"], rule=Rule("radam"))
    for state in net.there(net.states[1]):
        state.fill_(math.inf)
    before = [p.clone() for p in net.there()]
    moments = [m.clone() for m in net.there(net.states[0])]
    net.train(machine, net.table(STILL | {names.ROOT: 0.0}))
    for old, new, m in zip(before, net.there(), moments, strict=True):
        assert_near(new, old - 0.5 * m)


@each_machine
def test_a_decay_of_zero_leaves_infinity_alone(machine: str) -> None:
    net = Net((4, 3), ["identity"], rule=Rule("sgd", coupled=True))
    net.there()[1][0] = -math.inf
    net.train(machine, net.table({names.STEP_SIZE: 0.5}))
    assert not any(p.isnan().any() for p in net.there())


@each_machine
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_follow_the_order_and_the_table(machine: str, dtype: torch.dtype, bias: bool) -> None:
    """Four steps from 33 rows into an epoch of 50: 17 rows, then the next epoch's 33 and 17, and the next one's 33."""
    net, expected = (Net((37, 40, 21, 10), ["gelu", "tanh", "identity"], bias, dtype=dtype) for _ in range(2))
    net.order = torch.cat([net.order[33:], net.order.flip(0), net.order])
    rates = (0.5, 0.25, 0.125, 0.0625)
    losses, accuracies = net.train(machine, net.table(*[{names.STEP_SIZE: rate} for rate in rates]), position=33)
    expected.w = [None if p is None else p.double() for p in expected.w]
    for step, rows in enumerate(net.order[:100].split([17, 33, 17, 33])):
        right = expected.forward(rows, expected.w).argmax(1) == expected.targets[rows]
        loss, grads = expected.gradients(rows)
        for p, grad in zip(expected.there(), grads, strict=True):
            p -= rates[step] * grad
        assert_near(losses[step], loss, dtype)
        assert_near(accuracies[step], right.double().mean(), dtype)
    for new, wanted in zip(net.there(), expected.there(), strict=True):
        assert_near(new, wanted, dtype)
    assert [count.item() for count, p in zip(net.counts, net.w, strict=True) if p is not None] == [4] * len(net.there())


@each_machine
@pytest.mark.parametrize("batch", [3, 33])
def test_bits_repeat(machine: str, batch: int) -> None:
    """Not on the chunks, the strides or the other rows: losses of rows that are alone, and in a batch."""
    runs = []
    starts = [*range(0, 50, batch), 50]
    for chunks in ([2, 1], [3]):
        net, done = Net((37, 40, 10), ["gelu", "identity"], dtype=torch.float32), 0
        if len(chunks) == 1:
            net.x, net.targets = net.x.contiguous(), net.targets.contiguous()
        net.order = order = torch.cat([net.order] * 3)
        losses = []
        for steps in chunks:
            position = starts[done % (len(starts) - 1)]
            net.order = order[done // (len(starts) - 1) * 50 + position :]
            table = net.table(*[{names.STEP_SIZE: 0.1}] * steps)
            losses.append(net.train(machine, table, batch=batch, position=position)[0])
            done += steps
        runs.append([torch.cat(losses), *net.there()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_machine
def test_a_row_does_not_depend_on_the_batch_around_it(machine: str) -> None:
    for name in ACTIVATIONS:
        net = Net((37, 40, 10), [name, "identity"], dtype=torch.float32)
        still = net.table({names.STEP_SIZE: 0.0})
        net.step = net.step._replace(loss=Loss(mean=False))
        alone = torch.cat([net.train(machine, still, batch=1, order=address(net.order[i:]))[0] for i in range(20)])
        net.targets[net.order[:19]] = -100
        for rows in (20, 33):
            together, _ = net.train(machine, still, batch=rows, epoch_rows=20)
            assert together[0] == alone[19]


def through(net: Net, machine: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """What the activation of the first layer of a net 1-n-2 makes of z [n], and its slope there, with nothing rounded.

    The input is 1 and the first weight is z. A bias of 2**100 makes the gradient of the logits (-1, 1). So the gradient
    of W2[1] is the value; and with a power of two in W2[0], so small that values do not reach the bias, that of W1 is
    the slope.
    """
    table = net.table({names.STEP_SIZE: 0.0, names.MOMENTUM: 0.0, names.UNDAMPED: 1.0})
    (w1, w2, b2), (dw1, dw2, _) = net.there(), net.there(net.states[0])
    net.x.fill_(1)
    net.targets.zero_()
    values, scale = torch.zeros_like(z), torch.zeros_like(z)
    for _ in range(2):
        w1.copy_(z[:, None])
        w2.zero_()
        w2[0], b2[0], b2[1] = scale, 0.0, 2.0**100
        net.train(machine, table, batch=1)
        values = dw2[1].clone()
        scale = torch.ldexp(torch.ones_like(z), (80 - torch.frexp(values)[1]).clamp(max=0))
    return values, -dw1[:, 0] / scale


def exact(name: str, z: Tensor) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """Value and slope in 40 digits."""
    first, second = (*ACTIVATIONS[name][0], 0.0, 0.0)[:2]

    def sigmoid(x: mpmath.mpf) -> mpmath.mpf:
        return 1 / (1 + mpmath.exp(-x)) if abs(x) < 10**5 else mpmath.mpf(x > 0)

    def inner(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)

    def gelu(x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        below = mpmath.mpf(x > 0) if abs(x) > 60 else mpmath.erfc(-x / mpmath.sqrt(2)) / 2
        bell = 0 if abs(x) > 60 else mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi)
        return x * below, below + x * bell

    def gelu_tanh(x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        share, rest = sigmoid(2 * inner(x)), sigmoid(-2 * inner(x))
        slope = mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * mpmath.mpf("0.044715") * x * x)
        return x * share, share + 2 * x * share * rest * slope

    def softplus(x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        if x * first > second:
            return x, mpmath.mpf(1)
        return mpmath.log1p(mpmath.exp(x * first)) / first, sigmoid(x * first)

    pairs: dict[str, Callable[[mpmath.mpf], tuple[mpmath.mpf, mpmath.mpf]]] = {
        "identity": lambda x: (x, mpmath.mpf(1)),
        "relu": lambda x: (max(x, mpmath.mpf(0)), mpmath.mpf(x > 0)),
        "leaky_relu": lambda x: (x if x > 0 else first * x, mpmath.mpf(1 if x > 0 else first)),
        "elu": lambda x: (x, mpmath.mpf(1)) if x > 0 else (first * mpmath.expm1(x), first * mpmath.exp(x)),
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "silu": lambda x: (x * sigmoid(x), sigmoid(x) * (1 + x * sigmoid(-x))),
        "tanh": lambda x: (mpmath.tanh(x), 4 * sigmoid(2 * x) * sigmoid(-2 * x)),
        "sigmoid": lambda x: (sigmoid(x), sigmoid(x) * sigmoid(-x)),
        "softplus": softplus,
    }
    with mpmath.workdps(40):
        values, slopes = zip(*[pairs[name](mpmath.mpf(x)) for x in z.tolist()], strict=True)
        return list(values), list(slopes)


def errors(result: Tensor, expected: list[mpmath.mpf], floor: Tensor) -> Tensor:
    """How far the numbers are off, in units in the last place of the larger of what they should be and `floor`."""
    bits = 24 if result.dtype == torch.float32 else 53
    found = []
    for x, right, least in zip(result.tolist(), expected, floor.tolist(), strict=True):
        exponent = mpmath.frexp(max(abs(right), least, torch.finfo(result.dtype).tiny))[1] - bits
        found.append(float(mpmath.ldexp(abs(x - right), -exponent)) if math.isfinite(x) else 0.0)
    return torch.tensor(found, dtype=torch.float64)


def arguments(dtype: torch.dtype, count: int = 300) -> Tensor:
    """Tiny ones, huge ones, and many where something happens."""
    generator = torch.Generator().manual_seed(4)
    least, most = (-140, 100) if dtype == torch.float32 else (-1040, 900)
    exponents = least + (most - least) * torch.rand(count, generator=generator, dtype=torch.float64)
    signs = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    lines = [torch.linspace(-x, x, count, dtype=torch.float64) for x in (0.7, 3, 10, 40, 110, 800)]
    zeros = torch.tensor([0.0, -0.0])
    return torch.cat([*lines, signs * torch.exp2(exponents), zeros]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_slopes(name: str, dtype: torch.dtype) -> None:
    """The greatest error is at most twice PyTorch's, or 2 units; and NaN and infinity stand where PyTorch has them.

    Where PyTorch's tails vanish, that says nothing. So the same with 4 units of a floor; and GELU, whose formula is not
    PyTorch's, keeps to 4 alone.
    """
    z = arguments(dtype)
    given = z.clone().requires_grad_()
    theirs = ACTIVATIONS[name][1](given)
    slopes = torch.autograd.grad(theirs.sum(), given)[0]
    nets = {
        machine: Net((1, len(z), 2), [name, "identity"], [False, True], 1, dtype, rule=Rule("momentum"))
        for machine in MACHINES
    }
    found = {machine: through(net, machine, z) for machine, net in nets.items()}
    floors = z.abs().clamp(max=1) / 8, torch.full_like(z, 0.125)
    for i, (torchs, right, floor) in enumerate(zip((theirs.detach(), slopes), exact(name, z), floors, strict=True)):
        most = 2 * errors(torchs, right, torch.zeros_like(z)).max()
        most_above = 0.0 if name == "gelu" else 2 * errors(torchs, right, floor).max()
        for machine in MACHINES:
            ours = found[machine][i]
            assert torch.equal(ours.isnan(), torchs.isnan()), machine
            assert torch.equal(ours.isinf(), torchs.isinf()), machine
            assert errors(ours, right, torch.zeros_like(z)).max() <= max(most, 2), machine
            assert errors(ours, right, floor).max() <= max(most_above, 4), machine


@each_machine
def test_softplus_overflows_as_in_pytorch(machine: str) -> None:
    """Below a threshold that is larger than the logarithm of any number, where no stable form is taken."""
    numbers = (1.0, 1000.0)
    for bias, is_nan in ((80.0, False), (95.0, True), (1050.0, False)):
        net = Net((3, 4), ["softplus"], dtype=torch.float32)
        net.step = net.step._replace(activations=(Activation("softplus", numbers),))
        (w, b), rows = net.there(), net.order[:33]
        b[2] = bias
        loss = F.cross_entropy(F.softplus(F.linear(net.x[rows], w, b), *numbers), net.targets[rows])
        assert loss.isnan() == is_nan
        losses, _ = net.train(machine, net.table({names.STEP_SIZE: 0.0}))
        torch.testing.assert_close(losses[0], loss, equal_nan=True)
    b[1], b[2] = 95.0, math.nan  # which is larger than infinity
    _, accuracies = net.train(machine, net.table({names.STEP_SIZE: 0.0}), batch=50)
    assert accuracies[0] == (net.targets == 2).float().mean()


@each_machine
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e38, -1e38, 1e-42])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_numbers(machine: str, name: str, value: float) -> None:
    """NaN and infinity stand where autograd puts them, from an input on and from a bias of the last layer on."""
    for rows in (1, 5):
        for place in ("input", "bias"):
            net = Net((3, 4, 6), [name, name], dtype=torch.float32)
            if place == "input":
                net.x[net.order[0], 1] = value
            else:
                net.there()[-1][2] = value
            before = [p.clone() for p in net.there()]
            loss, grads = net.gradients(net.order[:rows], torch.float32)
            right = net.forward(net.order[:rows], net.w).argmax(1) == net.targets[net.order[:rows]]
            losses, accuracies = net.train(machine, net.table({names.STEP_SIZE: 1.0}), batch=rows)
            torch.testing.assert_close(losses[0], loss, equal_nan=True)
            assert accuracies[0] == right.float().mean()
            for old, new, grad in zip(before, net.there(), grads, strict=True):
                torch.testing.assert_close(new, old - grad, equal_nan=True, rtol=1e-4, atol=1e-5)


@each_machine
def test_accuracy_takes_the_first_of_equal_logits_and_nan_for_the_largest(machine: str) -> None:
    for largest in ([], [4, 7]):
        net = Net((37, 40, 10), ["relu", "identity"])
        for p in net.there():
            p.zero_()
        net.there()[-1][largest] = math.nan
        _, accuracies = net.train(machine, net.table({names.STEP_SIZE: 0.0}), batch=50)
        assert accuracies[0] == (net.targets == (largest or [0])[0]).double().mean()


@each_machine
def test_accuracy_that_is_not_asked_for_is_not_written(machine: str) -> None:
    net = Net((37, 40, 10), ["relu", "identity"], accuracy=False)
    _, accuracies = net.train(machine, net.table({names.STEP_SIZE: 1.0}))
    assert accuracies[0] == 7
    net.train(machine, net.table({names.STEP_SIZE: 1.0}), accuracies=0)
    net.step = net.step._replace(accuracy=True)
    with pytest.raises(ValueError, match="no place for accuracies"):
        net.train(machine, net.table({names.STEP_SIZE: 1.0}), accuracies=0)


@each_machine
@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_a_label_out_of_range_raises_before_the_first_step(machine: str, label: int) -> None:
    """Here it is the last row of the second step; of the first one alone nothing is said."""
    net = Net((37, 40, 10), ["relu", "identity"])
    before = [p.clone() for p in net.there()]
    net.targets[net.order[49]] = label
    table = net.table({names.STEP_SIZE: 1.0}, {names.STEP_SIZE: 1.0})
    with pytest.raises(IndexError, match=f"^Target {label} is out of bounds.$"):
        net.train(machine, table)
    assert all(torch.equal(old, new) for old, new in zip(before, net.there(), strict=True))
    net.train(machine, table[:1])
    net.train(machine, table, ignore_index=label)
    given = {"targets": address(net.targets), "stride": 3, "size": 50, "classes": 10, "ignore_index": -100}
    assert native.bad_label(**given) == label
    assert native.bad_label(**given | {"ignore_index": label}) is None
    assert native.bad_label(**given | {"classes": 2**41}) == (-1 if label == -1 else None)


@each_machine
def test_no_memory(machine: str) -> None:
    """For buffers of more bytes than there are numbers, also where what is left of that is few."""
    net = Net((64, 64, 64), ["relu", "identity"])
    with pytest.raises(MemoryError):
        net.train(machine, net.table(), batch=2**62)
    assert [count.item() for count in net.counts] == [0] * 4


def test_two_threads_train_two_nets() -> None:
    """Each its own, to the bits that it gets alone; and neither holds the other up, nor this thread."""
    machine = next(reversed(MACHINES))
    sizes, activations = (64, 512, 512, 10), ["gelu", "tanh", "identity"]
    nets = [Net(sizes, activations, rows=1024, dtype=torch.float32) for _ in range(3)]
    for net in nets:
        net.order = torch.cat([net.order] * 3)
    for net in nets[::2]:
        net.x.copy_(net.x.flip(0))
    table = nets[0].table(*[{names.STEP_SIZE: 0.1}] * 3)
    prepared = [net.prepare(machine) for net in nets]
    threads = [
        threading.Thread(target=net.train, args=(machine, table, 1024), kwargs={"prepared": made})
        for net, made in zip(nets[:2], prepared, strict=False)
    ]
    for thread in threads:
        thread.start()
    turns = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.001)
        turns += 1
    for thread in threads:
        thread.join()
    nets[2].train(machine, table, 1024, prepared=prepared[2])
    assert turns > 5
    assert all(torch.equal(a, b) for a, b in zip(nets[0].there(), nets[2].there(), strict=True))
    assert not torch.equal(nets[0].there()[0], nets[1].there()[0])


def test_names_are_those_of_the_description() -> None:
    """In the same order."""
    places = [name for name, value in vars(names).items() if name.isupper() and isinstance(value, int)]
    row = {name: getattr(names, name) for name in places if name != "MOST_LAYERS"}
    rules = {name: len(kind.states) for name, kind in names.RULES.items()}
    expected = {"activations": names.ACTIVATIONS, "losses": names.LOSSES, "rules": rules, "row": row}
    assert expected == native.NAMES
    assert [*LOSSES] == [*native.NAMES["losses"]] == [*names.LOSSES]
    assert [*native.NAMES["rules"]] == [*rules]
    assert [*ACTIVATIONS] == [*native.NAMES["activations"]] == [*names.ACTIVATIONS]


WRONG: dict[str, tuple[Callable[[Net], Any], str]] = {
    "activation": (lambda net: {"activations": (Activation("mish"), Activation())}, "'mish' is no activation"),
    "no text": (lambda net: {"activations": (Activation(7), Activation())}, "7 is no activation"),  # type: ignore[arg-type]
    "numbers": (lambda net: {"activations": (Activation("elu"), Activation())}, "elu takes 1 numbers, and not 0"),
    "more numbers": (lambda net: {"activations": (Activation("relu", (1.0,)), Activation())}, "relu takes 0 numbers"),
    "loss": (lambda net: {"loss": Loss("hinge")}, "'hinge' is no loss"),
    "rule": (lambda net: {"rule": Rule("lion")}, "'lion' is no rule"),
    "weights": (lambda net: {"loss": Loss(weighted=True)}, "class weights and the loss do not agree"),
    "weights of positives": (
        lambda net: {"loss": Loss("bce_with_logits", positive_weighted=True)}, "positive targets and the loss do not"
    ),
    "beta": (lambda net: {"loss": Loss("smooth_l1")}, "smooth_l1 takes 1 numbers, and not 0"),
    "accuracy": (lambda net: {"loss": Loss("mse")}, "has no accuracy"),
    "sizes": (lambda net: {"sizes": (37, 10)}, "not as many as the layers"),
    "activations": (lambda net: {"activations": (Activation(),)}, "not as many as the layers"),
    "no layer": (lambda net: {"sizes": (37,), "biases": (), "activations": ()}, "1 to 8 layers"),
    "nine": (
        lambda net: {"sizes": (4,) * 10, "biases": (True,) * 9, "activations": (Activation(),) * 9}, "1 to 8 layers"
    ),
    "no inputs": (lambda net: {"sizes": (0, 40, 10)}, "no inputs or no outputs"),
    "no outputs": (lambda net: {"sizes": (37, 40, -1)}, "no inputs or no outputs"),
    "biases": (lambda net: {"biases": (True, False)}, "parameters and biases do not agree"),
    "state": (lambda net: net.states[0].__setitem__(0, torch.empty(0)) or {"rule": Rule("momentum")}, "has no state"),
    "second state": (
        lambda net: net.states[1].__setitem__(3, torch.empty(0)) or {"rule": Rule("adam")}, "has no state"
    ),
    "third state": (
        lambda net: net.states[2].__setitem__(1, torch.empty(0)) or {"rule": Rule("amsgrad")}, "has no state"
    ),
    "weight": (lambda net: net.w.__setitem__(2, torch.empty(0)) or {}, "has no numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_raises(name: str) -> None:
    change, message = WRONG[name]
    net = Net((37, 40, 10), ["relu", "identity"])
    net.step = net.step._replace(**change(net))
    with pytest.raises(ValueError, match=message):
        net.prepare("plain")


def test_calls_that_make_no_sense_raise() -> None:
    net = Net((37, 40, 10), ["relu", "identity"])
    prepared = net.prepare("plain")
    given = {"machine": 0, "is_double": True, "step": net.step, "parameters": net.parameters(), "class_weight": 0}
    given["pos_weight"] = 0
    assert native.prepare(**dict(reversed(given.items()))) is not None  # in any order
    for wrong in (99, -1):
        with pytest.raises(ValueError, match=f"machine {wrong} is another one"):
            native.prepare(**given | {"machine": wrong})
    with pytest.raises(TypeError, match="6 keyword arguments alone"):
        native.prepare(**given | {"more": 1})
    with pytest.raises(TypeError, match="6 keyword arguments alone"):
        native.prepare(0, True, net.step, net.parameters(), 0, 0)
    with pytest.raises(TypeError, match="6 keyword arguments alone"):
        native.prepare(0, **given)
    with pytest.raises(ValueError, match="not as many as the layers"):
        native.prepare(**given | {"parameters": [*net.parameters(), None]})
    with pytest.raises(TypeError, match="18 keyword arguments alone"):
        native.train(prepared)
    with pytest.raises(TypeError, match="what prepare returns"):
        native.train()
    with pytest.raises(ValueError, match="PyCapsule"):
        native.train(None)
    with pytest.raises(TypeError, match="no keyword argument 'a'"):
        native.train(prepared, **dict.fromkeys("abcdefghijklmnopqr", 0))
    with pytest.raises(AttributeError, match="loss"):
        native.prepare(**given | {"step": net.step.activations[0]})
    with pytest.raises(TypeError):
        native.prepare(**given | {"parameters": 7})
    net.step = net.step._replace(loss=Loss(rows_weighted=True))
    with pytest.raises(ValueError, match="no weights of the rows"):
        net.train("plain", net.table({names.STEP_SIZE: 0.0}))
    with pytest.raises(TypeError):
        net.train("plain", net.table(), prepared=prepared, label_smoothing="much")
    with pytest.raises(TypeError):
        net.train("plain", net.table(), prepared=prepared, x=1.5)
