"""The losses of the training kernel against PyTorch in float64: of tiles, and of whole steps, each in every way."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusednn.kernels import mlp_training
from fusednn.kernels.cross_entropy import float_bits
from fusednn.kernels.launch import LaunchConfig, launch, plan
from fusednn.kernels.losses import load_targets, loss_of
from fusednn.kernels.mlp_training_tiles import Data
from fusednn.kernels.step import LOSS_SCALE, LOSSES, Loss, Step
from tests.kernels.test_mlp_training import WAYS, Net, describe, rows_of

NUMBERS: dict[str, tuple[float, ...]] = {"smooth_l1": (0.3,), "huber": (1.7,)}

EACH = [name for name, kind in LOSSES.items() if kind.per_output]

ACCURATE = ("cross_entropy", "cross_entropy_probabilities", "bce_with_logits")
"""The losses that have an accuracy."""

SMOOTHING = 0.1


def loss(name: str, everything: bool = False, mean: bool = True) -> Loss:
    """By default, or with all that this loss may have."""
    is_binary, is_smoothed = name == "bce_with_logits", everything and "cross_entropy" in name
    weighted = everything and ("cross_entropy" in name or is_binary)
    numbers = NUMBERS.get(name, ())
    return Loss(name, mean, weighted, is_smoothed, numbers, everything and is_binary, everything, everything)


def pytorch(of: Loss, y: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
    """What PyTorch loses, of each output or row."""
    if "cross_entropy" in of.name:
        ignored: Any = {"ignore_index": 2} if LOSSES[of.name].labels else {}
        return F.cross_entropy(y, t, weight, reduction="none", label_smoothing=SMOOTHING * of.smoothed, **ignored)
    if of.name == "bce_with_logits":
        return F.binary_cross_entropy_with_logits(y, t, weight, reduction="none", pos_weight=pos_weight)
    call = {"mse": F.mse_loss, "l1": F.l1_loss, "poisson_nll": F.poisson_nll_loss}
    call |= {"smooth_l1": lambda y, t, reduction: F.smooth_l1_loss(y, t, reduction=reduction, beta=of.numbers[0])}
    call |= {"huber": lambda y, t, reduction: F.huber_loss(y, t, reduction=reduction, delta=of.numbers[0])}
    found: Tensor = call[of.name](y, t, reduction="none")
    return found


def gaps(values: Tensor) -> Tensor:
    """The same with strides of its own, NaN in between."""
    wide = values.new_full([2 * size for size in values.shape], float("nan") if values.is_floating_point() else 2**40)
    view = wide[::2] if values.dim() == 1 else wide[::2, 1::2]
    return view.copy_(values)


def before_nan(values: Tensor) -> Tensor:
    """The same, contiguous, with NaN behind it."""
    return torch.cat([values, values.new_full((64,), float("nan"))])[: len(values)]


class Targets:
    """Targets of a loss and its weights, for `rows` rows: all with NaN around. Label 2 is ignored."""

    def __init__(self, of: Loss, rows: int, outputs: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(5)
        t = torch.rand(rows, outputs, generator=generator, dtype=torch.float64)
        if of.name == "cross_entropy":
            t = torch.randint(0, outputs, (rows,), generator=generator)
            t[3] = min(2, outputs - 1)
        elif of.name == "cross_entropy_probabilities":
            t /= t.sum(1, keepdim=True)
        elif of.name == "poisson_nll":
            t = (4 * t).floor()
        elif of.name != "bce_with_logits":
            t = 8 * t - 4
        elif outputs > 2:
            t[:, :2] = t[:, :2].round()
        self.t = gaps((t if of.name == "cross_entropy" else t.to(dtype)).to(device))
        weights = torch.rand(2, outputs, generator=generator, dtype=torch.float64).to(device, dtype) + 0.25
        self.weight = before_nan(weights[0]) if of.weighted else None
        self.pos_weight = before_nan(3 * weights[1]) if of.positive_weighted else None
        row_weight = torch.rand(rows, generator=generator, dtype=torch.float64).to(device, dtype) + 0.5
        self.row_weight = gaps(row_weight) if of.rows_weighted else None

    def double(self, rows: Any = slice(None)) -> tuple[Any, ...]:
        """Targets of these rows, weight, pos_weight and the weights of the rows, in float64, and labels as they are."""
        t = self.t[rows] if self.t.dtype == torch.int64 else self.t[rows].double()
        others = (self.weight, self.pos_weight, None if self.row_weight is None else self.row_weight[rows])
        return t, *(None if tensor is None else tensor.double() for tensor in others)

    def train(self, net: Net, table: Tensor, step: Step, **arguments: Any) -> Any:
        """The steps of a net on these, by the kernel."""
        net.targets = self.t
        weights = {"class_weight": self.weight, "pos_weight": self.pos_weight, "sample_weight": self.row_weight}
        smoothing = SMOOTHING * step.loss.smoothed
        return net.train(table, step, **weights, ignore_index=2, label_smoothing=smoothing, **arguments)


def expected(of: Loss, y: Tensor, targets: Targets, rows: Any = slice(None), scale: float = 1.0) -> Tensor:
    """The loss of a step on the outputs y of these rows, in float64."""
    t, weight, pos_weight, row_weight = targets.double(rows)
    losses = pytorch(of, y, t, weight, pos_weight)
    divisors = torch.ones_like(y[:, 0])
    if LOSSES[of.name].per_output:
        losses, divisors = losses.sum(1), divisors * y.shape[1]
    if LOSSES[of.name].labels:
        divisors = (divisors if weight is None else weight[t]) * (t != 2)
    if row_weight is not None:
        losses, divisors = losses * row_weight, divisors * row_weight
    return (losses.sum() / divisors.sum() if of.mean else losses.sum()) * scale


def accuracy_of(of: Loss, y: Tensor, t: Tensor) -> Tensor:
    """The share of what is right."""
    if of.name == "bce_with_logits":
        return ((y > 0) == (t > 0.5)).double().mean()
    if of.name == "cross_entropy_probabilities":
        return (y.argmax(1) == t.argmax(1)).double().mean()
    return (y.argmax(1) == t)[t != 2].double().mean()


@triton.jit(do_not_specialize=["rows", "ignore_index", "smoothing"])
def losses_kernel(
    y_ptr, data, results, dy_ptr, rows, ignore_index, smoothing,
    OUTPUTS: tl.constexpr, LOSS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """loss_of the rows that `data.order` names: results [BLOCK_B] and dy [rows, OUTPUTS]."""
    offs_b, offs_o = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_O)
    mask_b = offs_b < rows
    offs, mask = offs_b[:, None] * OUTPUTS + offs_o[None, :], mask_b[:, None] & (offs_o < OUTPUTS)[None, :]
    y = tl.load(y_ptr + offs, mask=mask, other=float("nan"))  # of what is not there
    taken = tl.load(data.order + offs_b, mask=mask_b, other=0)
    targets = load_targets(data, taken, mask_b, offs_o, ignore_index, OUTPUTS, LOSS, y.dtype)
    loss, weight, dy, counted, right = loss_of(y, data, targets, mask_b, offs_o, smoothing, OUTPUTS, LOSS)
    tl.store(results[0] + offs_b, loss)
    tl.store(results[1] + offs_b, weight)
    tl.store(results[2] + offs_b, counted.to(y.dtype))
    tl.store(results[3] + offs_b, right.to(y.dtype))
    tl.store(dy_ptr + offs, dy, mask=mask)


def run(of: Loss, y: Tensor, targets: Targets) -> list[Tensor]:
    """Losses, weights, what counts and what is right of each row, and dy."""
    rows, outputs = y.shape
    block_b, block_o = triton.next_power_of_2(rows + 1), triton.next_power_of_2(outputs + 1)
    results = tuple(y.new_empty(block_b) for _ in range(4))
    dy, order = torch.empty_like(y), torch.arange(rows, device=y.device)
    weights = [y if tensor is None else tensor for tensor in (targets.weight, targets.pos_weight, targets.row_weight)]
    strides = *y.stride(), *targets.t.stride(), *([0] if targets.t.dim() == 1 else []), weights[2].stride(0)
    data = Data(y, targets.t, order, *weights, *strides)
    sizes = {"OUTPUTS": outputs, "LOSS": of, "BLOCK_B": block_b, "BLOCK_O": block_o}
    planned = plan(1, LaunchConfig(block_b, block_o, num_warps=4), **sizes)
    launch(losses_kernel, planned, y, data, results, dy, rows, 2, float_bits(SMOOTHING * of.smoothed))
    assert not any(result[rows:].any() for result in results)
    return [*(result[:rows] for result in results), dy]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("outputs", [1, 17])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_tiles(device: str, name: str, everything: bool, outputs: int, dtype: torch.dtype) -> None:
    """Losses and gradients of 19 rows within 8 units of rounding of what is summed up, and the rest to the bit."""
    of, u = loss(name, everything), torch.finfo(dtype).eps / 2
    targets = Targets(of, 19, outputs, dtype, device)
    y = (4 * torch.randn(19, outputs, generator=torch.Generator().manual_seed(6))).to(device, dtype)
    losses, weights, counted, right, dy = run(of, y, targets)
    exact = y.double().requires_grad_()
    t, weight, pos_weight, row_weight = targets.double()
    found = pytorch(of, exact, t, weight, pos_weight)
    rows = found.sum(1) if LOSSES[name].per_output else found
    rows = rows if row_weight is None else rows * row_weight
    (slopes,) = torch.autograd.grad(rows.sum(), exact)
    most = 8 if everything else 1  # weights of outputs, of positive targets and of rows
    assert ((losses - rows).abs() <= 8 * u * most * (rows.abs() + outputs + y.abs().sum(1))).all()
    assert ((dy - slopes).abs() <= 8 * u * most * (slopes.abs() + 1 + y.abs())).all()
    counts = t != 2 if LOSSES[name].labels else torch.ones_like(rows)
    counts = counts.double() * (outputs if LOSSES[name].per_output else 1)
    assert torch.equal(counted, counts.to(dtype))
    divisors = counts if weight is None or not LOSSES[name].labels else counts * weight[t]
    torch.testing.assert_close(weights, (divisors if row_weight is None else divisors * row_weight).to(dtype))
    if name in ACCURATE:
        assert right.sum() / counted.sum() == accuracy_of(of, y, targets.t).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*EACH, "bce_with_logits, positive_weighted"])
def test_extremes(device: str, name: str, dtype: torch.dtype) -> None:
    """NaN, infinity, large numbers, ties and where the slope jumps: a loss of one output is what PyTorch's is."""
    of = loss(name.split(",")[0])._replace(positive_weighted="positive" in name)
    inf, jump = float("inf"), of.numbers[0] if of.numbers else 1.0
    ends = [float("nan"), inf, -inf, 1e30, -1e30, 0.0, -0.0, 1.0, -1.0, 0.5, 88.5, -100.0, jump, -jump, 1e-30]
    pairs = torch.tensor(list(itertools.product(ends, ends)), dtype=dtype, device=device)
    targets = Targets(of, len(pairs), 1, dtype, device)
    targets.t = gaps(pairs[:, 1:].contiguous())
    losses, _, _, _, dy = run(of, pairs[:, :1].contiguous(), targets)
    y = pairs[:, :1].clone().requires_grad_()
    found = pytorch(of, y, pairs[:, 1:], None, targets.pos_weight)
    (slopes,) = torch.autograd.grad(found.sum(), y)
    near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close([losses[:, None], dy], [found.detach(), slopes], equal_nan=True, **near)


def test_right_are_outputs_on_the_side_of_the_target(device: str) -> None:
    """Of binary cross entropy, whose target is 1 above one half; NaN is on the side of 0."""
    y = torch.tensor([[0.0, 1e-30, -1.0, float("nan"), 5.0]], device=device)
    targets = Targets(loss("bce_with_logits"), 1, 5, torch.float32, device)
    targets.t = torch.tensor([[0.5, 0.25, 0.75, 0.0, 1.0]], device=device)
    assert run(loss("bce_with_logits"), y, targets)[3].tolist() == [3.0]


def test_right_are_rows_with_the_first_largest_probability(device: str) -> None:
    """Of equal ones the first, of the outputs and of the targets, and NaN is the largest; what is none is no output."""
    nan = float("nan")
    y = torch.tensor([[1.0, 1.0, 0.0], [0.0, nan, 3.0], [0.0, 1.0, 2.0], [-3.0, -1.0, -2.0]], device=device)
    targets = Targets(loss("cross_entropy_probabilities"), 4, 3, torch.float32, device)
    targets.t = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, nan, 0.7], [-0.2, -0.1, -0.3]], device=device)
    right = (y.argmax(1) == targets.t.argmax(1)).float().tolist()
    assert run(loss("cross_entropy_probabilities"), y, targets)[3].tolist() == right == [1.0, 1.0, 0.0, 1.0]


@pytest.fixture(params=["several", "on chip, as rows", "held"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The training kernel cuts every step in this way."""
    for key in mlp_training.CONFIGS:
        monkeypatch.setitem(mlp_training.CONFIGS, key, ((None, None, None, WAYS[request.param]),))
    mlp_training.plan_training.cache_clear()
    yield
    mlp_training.plan_training.cache_clear()


RATE = 1 / 32  # of which no loss leaps away


def assert_steps(device: str, step: Step, dtype: torch.dtype, bound: float) -> None:
    """Two steps of 33 and 17 rows, which move by the gradients of what PyTorch loses."""
    net, scales = Net(device, step, dtype=dtype), (1.5, 0.25)
    targets = Targets(step.loss, len(net.x), step.sizes[-1], dtype, device)
    table = rows_of({0: RATE}, {0: RATE}, device=device, dtype=dtype, step=step)
    table[:, 0, LOSS_SCALE] = torch.tensor(scales)
    w = [p.clone().double() for p in net.w]
    losses, accuracies = targets.train(net, table, step)
    net.x = net.x.double()
    for made, rows in enumerate(net.order.split([33, 17])):
        w = [p.detach().requires_grad_() for p in w]
        y = net.outputs(rows, w)
        wanted = expected(step.loss, y, targets, rows, scales[made] if step.loss.scaled else 1.0)
        near = {"rtol": bound, "atol": bound * float(wanted.detach().abs())}
        torch.testing.assert_close(losses[made].double(), wanted.detach(), **near)
        if step.accuracy:
            torch.testing.assert_close(accuracies[made], accuracy_of(step.loss, y, targets.t[rows]).to(dtype))
        w = [p - RATE * grad for p, grad in zip(w, torch.autograd.grad(wanted, w), strict=True)]
    for new, old in zip(net.w, [p.detach() for p in w], strict=True):
        torch.testing.assert_close(new.double(), old, rtol=bound, atol=bound * float(old.abs().max()))


DEPTHS = {1: (19, 5), 2: (19, 20, 5), 3: (19, 20, 17, 5)}


CASES = [(1, True, True), (2, False, True), (2, True, False), (3, True, True)]


@pytest.mark.parametrize(("depth", "everything", "mean"), CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_steps(device: str, way: None, name: str, depth: int, everything: bool, mean: bool) -> None:
    names = ["relu"] * (depth - 1) + ["identity"]
    step = describe(DEPTHS[depth], names, loss=loss(name, everything, mean), accuracy=name in ACCURATE)
    assert_steps(device, step, torch.float64, 1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_steps_in_float32(device: str, way: None, name: str) -> None:
    step = describe((5, 16, 17), ["tanh", "identity"], loss=loss(name, True), accuracy=name in ACCURATE)
    assert_steps(device, step, torch.float32, 2e-5)


@pytest.mark.parametrize("name", ["mse", "cross_entropy", "cross_entropy_probabilities"])
def test_rows_that_weigh_nothing(device: str, way: None, name: str) -> None:
    """Their mean is 0 / 0, and NaN goes where autograd sends it: to no unit that is 0 in all rows."""
    of = Loss(name, rows_weighted=True)
    step = describe((19, 20, 5), ["relu", "identity"], loss=of)
    net, targets = Net(device, step), Targets(of, 50, 5, torch.float64, device)
    targets.row_weight = torch.zeros(50, dtype=torch.float64, device=device)
    net.w[1][:7] = -1e3
    w = [p.clone().requires_grad_() for p in net.w]
    grads = torch.autograd.grad(expected(of, net.outputs(net.order, w), targets, net.order), w)
    losses, _ = targets.train(net, rows_of({0: 1.0}, device=device, step=step), step, batch_size=50)
    assert losses.isnan().all()
    assert not all(grad.isnan().all() for grad in grads)
    for new, grad in zip(net.w, grads, strict=True):
        assert torch.equal(new.isnan(), grad.isnan())


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", ["mse", "cross_entropy_probabilities"])
def test_no_rows(device: str, way: None, name: str, mean: bool) -> None:
    """The mean over none is NaN and the sum 0, whatever the scale is; both move nothing."""
    of = loss(name, True, mean)
    step = describe((19, 20, 5), ["relu", "identity"], loss=of)
    net = Net(device, step)
    before, table = [p.clone() for p in net.w], rows_of({0: 1.0, LOSS_SCALE: 2.0}, device=device, step=step)
    losses, _ = Targets(of, 50, 5, torch.float64, device).train(net, table, step, epoch_rows=0)
    assert losses.isnan().all() if mean else losses.tolist() == [0.0]
    assert all(torch.equal(new, old) for new, old in zip(net.w, before, strict=True))
