"""The training steps in C++, called directly, against autograd in float64: every layer, activation, rule and machine."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.dispatch import native
from fusednn.kernels import step as names
from fusednn.kernels.step import Activation, Loss, Rule, Step

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

SGD = Rule("sgd")


class Parameter(NamedTuple):
    weight: int
    first: int = 0
    second: int = 0
    count: int = 0
    double_count: bool = False


def address(tensor: Tensor | None) -> int:
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
        self.order = torch.randperm(rows, generator=generator)
        self.w: list[Tensor | None] = []
        for inputs, outputs, bias in zip(sizes, sizes[1:], biases, strict=False):
            self.w += [random(outputs, inputs) / inputs**0.5, random(outputs) if bias else None]
        self.m, self.v = ([None if p is None else random(*p.shape).abs() for p in self.w] for _ in range(2))
        self.counts = [torch.zeros((), dtype=[torch.float32, torch.float64][i % 2]) for i in range(len(self.w))]
        self.class_weight: Tensor | None = None

    def there(self, of: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """The parameters, or others of each, that there are."""
        return [p for p in (self.w if of is None else of) if p is not None]

    def forward(self, rows: Tensor, w: Sequence[Tensor | None]) -> Tensor:
        y = self.x[rows].to(next(p.dtype for p in w if p is not None))
        for layer, activation in enumerate(self.step.activations):
            y = ACTIVATIONS[activation.name][1](F.linear(y, w[2 * layer], w[2 * layer + 1]))
        return y

    def gradients(self, rows: Tensor, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss of `rows` and its gradients at the parameters as they are now, of those that there are."""
        w = [None if p is None else p.detach().to(dtype, copy=True).requires_grad_() for p in self.w]
        loss = F.cross_entropy(self.forward(rows, w), self.targets[rows], **options)
        return loss.detach(), list(torch.autograd.grad(loss, self.there(w)))

    def parameters(self) -> list[Parameter | None]:
        return [
            None if p is None else Parameter(*map(address, (p, m, v, count)), count.dtype == torch.float64)
            for p, m, v, count in zip(self.w, self.m, self.v, self.counts, strict=True)
        ]

    def prepare(self, machine: str) -> Any:
        return native.prepare(
            machine=MACHINES[machine], is_double=self.x.dtype == torch.float64, step=self.step,
            parameters=self.parameters(), class_weight=address(self.class_weight),
        )  # fmt: skip

    def train(self, machine: str, table: Tensor, batch: int = 33, **more: Any) -> tuple[Tensor, Tensor]:
        """Losses and accuracies of the steps that the table has rows for."""
        losses, accuracies = (torch.full((len(table),), 7.0, dtype=self.x.dtype) for _ in range(2))
        prepared = more.pop("prepared", None) or self.prepare(machine)
        given = {
            "x": address(self.x), "stride_xm": self.x.stride(0), "stride_xi": self.x.stride(1),
            "targets": address(self.targets), "stride_t": self.targets.stride(0), "order": address(self.order),
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
        losses, _ = self.train(machine, self.table({names.STEP_SIZE: 1.0}), batch=rows, **more)
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
    kinds = [*ACTIVATIONS][1:8], [*ACTIVATIONS][7:] + ["identity", "gelu", "relu"]
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


@each_machine
def test_no_rows_that_count(machine: str) -> None:
    """The mean over none is NaN and moves nothing, also with logits of NaN; nor does an empty batch."""
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
@pytest.mark.parametrize("flags", [(False, False, False), (True, False, True), (False, True, True), (True, True, False)])
@pytest.mark.parametrize("name", names.RULES)
@pytest.mark.parametrize("sizes", [(37, 40, 10), (300, 7, 10)])
def test_rules(machine: str, sizes: tuple[int, ...], name: str, flags: tuple[bool, bool, bool]) -> None:
    """From a state that is not zero, with other numbers for each parameter."""
    net = Net(sizes, ["tanh", "identity"], rule=Rule(name, *flags))
    coupled, decoupled, maximize = flags
    _, grads = net.gradients(net.order[:33])
    w, m, v = ([p.clone() for p in net.there(of)] for of in (net.w, net.m, net.v))
    table = torch.rand(1, 4, names.ROW, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    table[:, :, names.SIGN] = torch.tensor([1.0, -1.0, -1.0, 1.0])
    net.train(machine, table)
    for i, (old, grad) in enumerate(zip(w, grads, strict=True)):
        row = table[0, i]
        g = row[names.SIGN] * grad if maximize else grad
        g = g + row[names.DECAY] * old if coupled else g
        first, second = m[i], v[i]
        if name == "adam":
            first = first + row[names.GRAD_PART] * (g - first)
            second = row[names.SQUARE_KEPT] * second + row[names.SQUARE_PART] * g * g
            g = first / (second.sqrt() * row[names.ROOT] + row[names.EPS])
        elif name != "sgd":
            first = row[names.MOMENTUM] * first + row[names.UNDAMPED] * g
            g = first if name == "momentum" else g + row[names.MOMENTUM] * first
        shrunk = row[names.SHRINK] * old if decoupled else old
        assert_near(net.w[i], shrunk - row[names.STEP_SIZE] * g)
        assert_near(net.m[i], first)
        assert_near(net.v[i], second)
    assert [count.item() for count in net.counts] == [1] * 4


@each_machine
def test_a_decay_of_zero_leaves_infinity_alone(machine: str) -> None:
    net = Net((4, 3), ["identity"], rule=Rule("sgd", coupled=True))
    net.there()[1][0] = -math.inf
    net.train(machine, net.table({names.STEP_SIZE: 0.5}))
    assert not any(p.isnan().any() for p in net.there())


@each_machine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_follow_the_order_and_the_table(machine: str, dtype: torch.dtype) -> None:
    """Four steps from 33 rows into an epoch of 50: 17 rows, then the next epoch's 33 and 17, and the next one's 33."""
    net, expected = (Net((37, 40, 21, 10), ["gelu", "tanh", "identity"], dtype=dtype) for _ in range(2))
    net.order = torch.cat([net.order[33:], net.order.flip(0), net.order])
    rates = (0.5, 0.25, 0.125, 0.0625)
    losses, accuracies = net.train(machine, net.table(*[{names.STEP_SIZE: rate} for rate in rates]), position=33)
    expected.w = [None if p is None else p.double() for p in expected.w]
    for step, rows in enumerate(net.order[:100].split([17, 33, 17, 33])):
        right = expected.forward(rows, expected.w).argmax(1) == expected.targets[rows]
        loss, grads = expected.gradients(rows)
        expected.w = [p - rates[step] * grad for p, grad in zip(expected.there(), grads, strict=True)]
        assert_near(losses[step], loss, dtype)
        assert_near(accuracies[step], right.double().mean(), dtype)
    for new, wanted in zip(net.there(), expected.there(), strict=True):
        assert_near(new, wanted, dtype)
    assert [count.item() for count in net.counts] == [4] * 6


@each_machine
@pytest.mark.parametrize("batch", [3, 33])
def test_bits_repeat_and_depend_on_nothing_around(machine: str, batch: int) -> None:
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


def units(result: Tensor, expected: Tensor) -> float:
    """The greatest error, in units in the last place of the result's dtype; NaN and infinity must be where they should."""
    kind = torch.finfo(result.dtype)
    rounded = expected.to(result.dtype)
    special = ~rounded.isfinite()
    assert torch.equal(result[special].nan_to_num(7.0), rounded[special].nan_to_num(7.0))
    size = torch.frexp(expected[~special].abs().clamp(min=kind.tiny))[1].double() - 1
    unit = torch.ldexp(torch.full_like(size, kind.eps), size)
    error = (result[~special].to(expected.dtype) - expected[~special]).abs() / unit
    return 0.0 if not error.numel() else error.max().item()
