"""The launchers of kernels/cross_entropy.py against PyTorch's loss and gradient in float64."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.kernels import cross_entropy as kernels
from tests.accuracy import DTYPES, UNIT, bits, sum_unit

REDUCTIONS = ["none", "mean", "sum"]
IGNORED = -100


class Case(NamedTuple):
    """What is given beside logits: labels or probabilities, class weights, smoothing."""

    probabilities: bool = False
    weighted: bool = False
    smoothing: float = 0.0

    def __str__(self) -> str:
        words = ["probabilities" if self.probabilities else "labels"]
        return ", ".join(words + ["weighted"] * self.weighted + ["smoothed"] * (self.smoothing > 0))


LABELS, SMOOTHED, WEIGHTED = Case(), Case(smoothing=0.1), Case(weighted=True)
PROBABILITIES = Case(probabilities=True)
CASES = [
    LABELS, SMOOTHED, WEIGHTED, Case(weighted=True, smoothing=0.3), PROBABILITIES,
    Case(probabilities=True, smoothing=0.1), Case(True, True), Case(True, True, 0.3),
]  # fmt: skip


def batch(*shape: int, dtype: torch.dtype, device: str, case: Case = LABELS) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, a target of which about one label in four is ignored, and class weights."""
    x = torch.randn(shape, device=device).to(dtype)
    weight = (torch.rand(shape[1], device=device) + 0.5).to(dtype) if case.weighted else None
    if case.probabilities:
        return x, torch.randn(shape, device=device).softmax(1).to(dtype), weight
    target = torch.randint(0, shape[1], shape[:1] + shape[2:], device=device)
    target[torch.rand(target.shape, device=device) < 0.25] = IGNORED
    return x, target, weight


def exact(
    x: Tensor, target: Tensor, reduction: str, case: Case = LABELS, weight: Tensor | None = None, ignored: int = IGNORED
) -> tuple[Tensor, Tensor]:
    """PyTorch's loss and gradient in float64."""
    leaf = x.double().detach().requires_grad_()
    loss = F.cross_entropy(
        leaf,
        target.double() if case.probabilities else target.long(),
        None if weight is None else weight.double(),
        reduction=reduction,
        label_smoothing=case.smoothing,
        ignore_index=ignored,
    )
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, ignored: int, reduction: str, smoothing: float, needs_grad: bool,
    needs_log_p: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, gradient, log p and the weight of the rows; of long rows the gradient of probabilities for log p."""
    arguments = (x, target, weight, ignored, reduction, smoothing)
    if not (needs_grad and kernels.is_long(x, target, weight, smoothing)):
        return kernels.cross_entropy_forward(*arguments, needs_grad, needs_log_p)
    loss, statistics, total = kernels.long_cross_entropy_forward(*arguments)
    dx, dq = x.new_empty(x.shape), x.new_empty(x.shape) if target.is_floating_point() else None
    divisor = total if reduction == "mean" else None
    kernels.long_cross_entropy_gradient(
        x.new_ones(()), x, target, weight, statistics, divisor, ignored, smoothing, dx, dq
    )
    return loss, dx, dx if dq is None else dq, total


def masses(x: Tensor, target: Tensor, case: Case, weight: Tensor | None) -> Tensor:
    """What each class weighs in each row's loss, in float64."""
    classes = torch.arange(x.shape[1], device=x.device).reshape(-1, *[1] * (x.dim() - 2))
    q = target.double() if case.probabilities else (classes == target.unsqueeze(1)).double()
    q = q * (1 - case.smoothing) + case.smoothing / x.shape[1]
    return q if weight is None else q * weight.double().reshape(classes.shape)


def check(
    x: Tensor, target: Tensor, reduction: str, case: Case = LABELS, weight: Tensor | None = None, ignored: int = IGNORED
) -> None:
    """Loss and gradient within the accuracy rule, log p right, and nothing that was given touched."""
    c, given = x.shape[1], [tensor for tensor in (x, target, weight) if tensor is not None]
    before = [bits(tensor).clone() for tensor in given]
    arguments = (x, target, weight, ignored, reduction, case.smoothing)
    loss, grad, log_p, total = forward(*arguments, True, case.probabilities)
    without, nothing, _, _ = forward(*arguments, False)
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(given, before, strict=True))
    assert nothing.numel() == 0
    assert (loss.dtype, grad.dtype, grad.shape) == (x.dtype, x.dtype, x.shape)
    right_loss, right_grad = exact(x, target, reduction, case, weight, ignored)

    long = kernels.is_long(x, target, weight, case.smoothing)
    u, unit, factor = sum_unit(x.dtype), UNIT[x.dtype], 8 if c <= 16 else 16
    a, x = masses(x, target, case, weight), x.double()
    valid = torch.ones_like(a[:, 0]) if case.probabilities else (target != ignored).double()
    weights = valid if case.probabilities or weight is None else valid * weight.double()[target.clamp(0, c - 1)]
    mass, distances = a.sum(1), (x - x.amax(1, keepdim=True)).abs()
    scale = valid * ((a * distances).sum(1) + mass * (math.log(c) + 1))
    sums = {"none": scale, "sum": scale.sum(), "mean": scale.sum() / weights.sum()}
    # in float64 the reference is as inexact as the result, and adds its c terms one by one
    slack = 2 + c / 500 if loss.dtype == torch.float64 else 1
    bound = factor * u * sums[reduction] * slack + unit * right_loss.abs() + 2.0**-126
    for value in (loss, without):
        assert ((value.double() - right_loss).abs() <= bound).all()
    if reduction == "mean":
        torch.testing.assert_close(total.double(), weights.sum(), rtol=1e-6, atol=0)

    divisor = weights.sum() if reduction == "mean" else torch.ones((), device=x.device)
    if kernels.is_deferred(grad.dtype, reduction) and not long:
        right_grad, divisor = right_grad * divisor, divisor / divisor
    p, mass = x.softmax(1), mass.unsqueeze(1)
    bound = factor * u * slack * ((p * mass * (distances + math.log(c) + 4) + a) / divisor + right_grad.abs())
    bound = bound + unit * right_grad.abs() + (2.0**-25 if grad.dtype == torch.float16 else 2.0**-126)
    assert ((grad.double() - right_grad).abs() <= bound).all()
    if case.probabilities:
        right, scale = x.log_softmax(1), torch.ones((), dtype=x.dtype, device=x.device)
        if long:  # the gradient of the probabilities, -w (1 - s) log p
            scale = scale * (case.smoothing - 1) / divisor
            scale = scale if weight is None else scale * weight.double().reshape(-1, *[1] * (x.dim() - 2))
        least = 2.0**-25 if grad.dtype == torch.float16 else 0.0
        bound = scale.abs() * (factor * u * slack * (right.abs() + 1) + unit * right.abs()) + least
        assert ((log_p.double() - scale * right).abs() <= bound).all()


SHAPES = [(5, 1), (7, 10), (300, 10), (33, 65), (5, 1000), (3, 33000), (3, 10, 7), (2, 65, 40), (2, 600, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(*(given := batch(*shape, dtype=dtype, device=device, case=SMOOTHED))[:2], "mean", SMOOTHED, given[2])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7, 10), (300, 10), (5, 300), (3, 10, 7)], ids=str)
def test_accuracy_of_each_case(shape: tuple[int, ...], reduction: str, case: Case, device: str) -> None:
    x, target, weight = batch(*shape, dtype=torch.float32, device=device, case=case)
    check(x, target, reduction, case, weight)


@pytest.mark.parametrize("case", [LABELS, Case(True, True, 0.3)], ids=str)
def test_accuracy_of_long_rows(case: Case, device: str) -> None:
    x, target, weight = batch(3, 33000, dtype=torch.float32, device=device, case=case)
    check(x, target, "mean", case, weight)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "shape", [(33, 3), (9, 7), (5, 20), (5, 3, 3), (5, 7, 3), (2, 20, 5)],
    ids=["4 rows a program", "2 rows a program", "in blocks", "4 rows, apart", "2 blocks, apart", "5 blocks, apart"],
)  # fmt: skip
def test_many_programs_and_trips(
    shape: tuple[int, ...], case: Case, reduction: str, dtype: torch.dtype, device: str
) -> None:
    rows, classes, apart = shape[0] * math.prod(shape[2:]), shape[1], len(shape) == 3
    long = classes > (4 if apart else 8)
    plans = kernels.plan_forward(
        rows, classes, apart, dtype, reduction, *case[:2], case.smoothing > 0, True, False, long
    )
    assert plans.rows.grid[0] >= 2
    x, target, weight = batch(*shape, dtype=dtype, device=device, case=case)
    assert kernels.is_long(x, target, weight, case.smoothing) == long
    check(x, target, reduction, case, weight)


def kernels_launched(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    """The names of the kernels that a forward launches."""
    launched: list[str] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *a: launched.append(kernel.fn.__name__))
    forward(*arguments)
    return launched


def test_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One where a program has the batch or nothing is reduced; two where nothing is counted beforehand; else three."""
    count, rows, total = "count_labels_kernel", "cross_entropy_kernel", "sum_losses_kernel"
    for size, reduction, needs_grad, wanted in (
        (256, "mean", True, [rows]),
        (257, "none", True, [rows]),
        (257, "sum", True, [rows, total]),
        (257, "mean", False, [rows, total]),
        (257, "mean", True, [count, rows, total]),
    ):
        x, target, _ = batch(size, 10, dtype=torch.float32, device=device)
        assert kernels_launched(monkeypatch, x, target, None, IGNORED, reduction, 0.0, needs_grad) == wanted
    x, target, _ = batch(257, 10, dtype=torch.float32, device=device, case=PROBABILITIES)
    assert kernels_launched(monkeypatch, x, target, None, IGNORED, "mean", 0.0, True) == [rows, total]
    x, target, _ = batch(257, 10, dtype=torch.float16, device=device)
    assert kernels_launched(monkeypatch, x, target, None, IGNORED, "mean", 0.0, True) == [rows, total]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("classes", [7, 20])
def test_label_dtypes(classes: int, dtype: torch.dtype, device: str) -> None:
    x, _, weight = batch(30, classes, dtype=torch.float32, device=device, case=WEIGHTED)
    target = torch.randint(0, classes, (30,), device=device)
    ignored = 255 if dtype == torch.uint8 else -7
    target[::5] = ignored
    right_loss, right_grad = exact(x, target, "mean", WEIGHTED, weight, ignored)
    loss, grad, _, _ = forward(x, target.to(dtype), weight, ignored, "mean", 0.0, True)
    torch.testing.assert_close(loss, right_loss.float())
    torch.testing.assert_close(grad, right_grad.float())


@pytest.mark.parametrize("ignored", [3, 0, 10, 2**40])
def test_any_ignore_index(ignored: int, device: str) -> None:
    """Also one that is a class, or just outside."""
    for case in (SMOOTHED, WEIGHTED):
        x, target, weight = batch(33, 10, dtype=torch.float32, device=device, case=case)
        target[target == IGNORED] = ignored
        check(x, target, "mean", case, weight, ignored)


def views(tensor: Tensor) -> list[Tensor]:
    """Equal tensors of other strides: transposed, and a slice of a larger one full of NaN."""
    wide = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan") if tensor.is_floating_point() else -1)
    wide = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    order = list(range(tensor.dim()))[::-1]
    return [tensor.permute(order).contiguous().permute(order), wide.copy_(tensor)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", [Case(weighted=True, smoothing=0.1), Case(probabilities=True)], ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (9, 20), (3, 3, 5), (3, 7, 5)], ids=str)
def test_strides(shape: tuple[int, ...], case: Case, device: str) -> None:
    """Transposed, sliced and expanded logits and targets; labels that are a column or start unaligned."""
    x, target, weight = batch(*shape, dtype=torch.float32, device=device, case=case)
    check(x, target, "mean", case, weight)
    right = forward(x, target, weight, IGNORED, "mean", case.smoothing, True)
    for logits in (x, *views(x)):
        for labels in (target, *views(target)):
            results = forward(logits, labels, weight, IGNORED, "mean", case.smoothing, True)
            for result, value in zip(results[:2], right[:2], strict=True):
                torch.testing.assert_close(result, value, rtol=2e-7, atol=1e-8)
    check(x[:1].expand(shape), target, "mean", case, weight)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
@pytest.mark.parametrize("label", [-1, "classes", 10**9, -(2**40)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", [LABELS, Case(weighted=True, smoothing=0.1)], ids=str)
def test_label_out_of_range(case: Case, label: int | str, classes: int, reduction: str, device: str) -> None:
    """Its row's loss and gradient are NaN, the other rows' gradients right; nothing out of bounds is read."""
    x, target, weight = batch(9, classes, dtype=torch.float32, device=device, case=case)
    target[0], target[4] = 1, classes if label == "classes" else int(label)
    loss, grad, _, _ = forward(x, target, weight, IGNORED, reduction, case.smoothing, True)
    bad = torch.arange(9, device=device) == 4
    assert torch.equal(loss.isnan(), bad if reduction == "none" else torch.tensor(True, device=device))
    assert torch.equal(grad.isnan().all(1), bad)
    assert torch.equal(grad.isnan().any(1), bad)
    if reduction != "mean" or weight is None:
        target[4] = 0
        torch.testing.assert_close(grad[~bad], exact(x, target, reduction, case, weight)[1].float()[~bad])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("case", [SMOOTHED, WEIGHTED], ids=str)
def test_all_ignored(case: Case, reduction: str, rows: int, device: str) -> None:
    """The mean is NaN as in PyTorch, and every gradient is zero."""
    x, _, weight = batch(rows, 10, dtype=torch.float32, device=device, case=case)
    target = torch.full((rows,), IGNORED, device=device)
    loss, grad, _, _ = forward(x, target, weight, IGNORED, reduction, case.smoothing, True)
    expected = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=case.smoothing)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_of_zero(classes: int, smoothing: float, device: str) -> None:
    """A row may weigh nothing, and all rows together: 0 / 0 as in PyTorch."""
    x, target, _ = batch(9, classes, dtype=torch.float32, device=device)
    for weight in (torch.arange(classes, device=device).float() // 3, torch.zeros(classes, device=device)):
        for reduction in REDUCTIONS:
            right = exact(x, target, reduction, Case(weighted=True, smoothing=smoothing), weight)
            results = forward(x, target, weight, IGNORED, reduction, smoothing, True)
            torch.testing.assert_close(results[0], right[0].float(), equal_nan=True)
            torch.testing.assert_close(results[1], right[1].float(), equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 10), (0, 10, 3), (2, 10, 0)], ids=str)
@pytest.mark.parametrize("case", [LABELS, PROBABILITIES], ids=str)
def test_no_rows(case: Case, shape: tuple[int, ...], reduction: str, device: str) -> None:
    x, target, _ = batch(*shape, dtype=torch.float32, device=device, case=case)
    loss, grad, _, _ = forward(x, target, None, IGNORED, reduction, 0.0, True)
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    assert grad.shape == shape


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
@pytest.mark.parametrize("case", [LABELS, SMOOTHED, WEIGHTED, PROBABILITIES], ids=str)
def test_nan_and_infinity(case: Case, classes: int, device: str) -> None:
    """Row by row they go where PyTorch sends them; a first block of -inf is an ordinary one."""
    inf, nan = float("inf"), float("nan")
    x, target, weight = batch(11, classes, dtype=torch.float32, device=device, case=case)
    x = x - 1000
    if not case.probabilities:
        target[:] = classes - 1
    x[0, :8] = -inf if classes > 8 else x[0, :8]  # the first block
    x[1, 3] = nan
    x[2, 3] = inf
    x[3, 3] = -inf
    x[4, classes - 1] = -inf
    x[5] = -inf
    x[6] = inf
    x[7, classes - 1] = inf
    x[8] = nan
    x[9, :4] = -inf
    loss, grad, _, _ = forward(x, target, weight, IGNORED, "none", case.smoothing, True)
    right_loss, right_grad = exact(x, target, "none", case, weight)
    torch.testing.assert_close(loss, right_loss.float(), equal_nan=True)
    torch.testing.assert_close(grad, right_grad.float(), equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_large_logits_keep_their_accuracy(classes: int, offset: float, device: str) -> None:
    """Logits around 1e4 with differences of 1: logsumexp(x) - x_t would lose three digits."""
    x = torch.randint(-3, 4, (9, classes), device=device) + torch.tensor(offset, device=device)
    for case in (LABELS, SMOOTHED, Case(True, True, 0.1)):
        _, target, weight = batch(9, classes, dtype=torch.float32, device=device, case=case)
        check(x, target, "none", case, weight)
        check(x, target, "mean", case, weight)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("far", [300.0, -300.0], ids=["first block", "last block"])
@pytest.mark.parametrize("case", [LABELS, SMOOTHED, Case(True, True, 0.1)], ids=str)
def test_the_maximum_can_be_in_any_block(case: Case, far: float, device: str) -> None:
    """exp of the distance between two blocks would overflow."""
    x, target, weight = batch(5, 20, dtype=torch.float32, device=device, case=case)
    x[:, :8] += far
    check(x, target, "none", case, weight)


@pytest.mark.parametrize("smoothing", [1e-17, 1e-3, 1 / 3, 1.0])
def test_smoothing_is_a_float64(smoothing: float, device: str) -> None:
    """As a float32, or from the constants of another launch, it would be off by more than the rule allows."""
    x, target, _ = batch(5, 7, dtype=torch.float64, device=device)
    check(x, target, "mean", Case(smoothing=smoothing))


@pytest.mark.parametrize("classes", [10, 33000])
def test_in_place(classes: int, device: str) -> None:
    """The logits give their place to the gradient; losses in float32, the incoming gradient of any stride."""
    x, target, weight = batch(3, classes, dtype=torch.bfloat16, device=device, case=WEIGHTED)
    target[0] = IGNORED
    right = forward(x, target, weight, IGNORED, "none", 0.1, True)
    for dloss in (None, torch.tensor([float("inf"), 9.0, 3.0, 9.0, -0.5], device=device)[::2]):
        losses, logits = torch.empty(3, device=device), x.clone()
        kernels.cross_entropy_in_place(logits, target, weight, IGNORED, 0.1, losses, dloss)
        torch.testing.assert_close(losses.bfloat16(), right[0])
        if dloss is None:
            assert torch.equal(bits(logits), bits(right[1]))
        else:
            torch.testing.assert_close(logits, (right[1] * dloss[:, None]).bfloat16().nan_to_num(nan=0.0))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_of_long_rows_is_refused(needs: tuple[bool, bool], device: str) -> None:
    """With the loss; backward computes it."""
    x, q, _ = batch(2, 33000, dtype=torch.float32, device=device, case=PROBABILITIES)
    with pytest.raises(ValueError, match="rows of 33000 classes are longer than a program holds"):
        kernels.cross_entropy_forward(x, q, None, IGNORED, "mean", 0.0, *needs)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("weighted", [False, True])
def test_weigh_labels(weighted: bool, device: str) -> None:
    target = torch.tensor([[0, 7], [1, 7], [-100, 7], [6, 7], [2, 7], [2, 7]], device=device)[:, 0]
    weight = torch.rand(7, device=device) if weighted else None
    right = weight[[0, 1, 6, 2, 2]].sum() if weighted else torch.tensor(5.0, device=device)
    torch.testing.assert_close(kernels.weigh_labels(target, weight, 7, IGNORED, torch.float32), right)
    assert kernels.weigh_labels(target[:0], weight, 7, IGNORED, torch.float64) == 0


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (5, 20), (5, 3, 4), (2, 20, 7)], ids=str)
def test_scale_gradient(shape: tuple[int, ...], dtype: torch.dtype, in_place: bool, device: str) -> None:
    """Row by row, for scalars, vectors and expanded vectors; ignored rows stay zero whatever comes in."""
    _, labels, _ = batch(*shape, dtype=dtype, device=device)
    labels[0] = IGNORED
    grad = torch.randn(shape, device=device).to(dtype).masked_fill((labels == IGNORED).unsqueeze(1), 0)
    one = torch.ones((), device=device, dtype=dtype)
    vector = torch.randn([2 * size for size in labels.shape], device=device).to(dtype)
    vector = vector[tuple(slice(None, None, 2) for _ in labels.shape)]
    some_ones = vector.clone()
    some_ones[:3] = 1
    total = torch.tensor(8.0, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def scale(dloss: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
        source = grad.clone()
        out = source if in_place else torch.empty_like(source)
        assert kernels.scale_gradient(dloss, source, labels, total, IGNORED, out) is out
        return source, out

    for dloss in (one, one * -2.5, vector, one.expand_as(vector), (one * 3).expand_as(vector), some_ones):
        for divisor in (None, total):
            source, out = scale(dloss, divisor)
            wanted = grad.double() * (dloss.double().unsqueeze(1) if dloss.dim() else dloss.double())
            wanted = (wanted / (1 if divisor is None else divisor)).to(dtype)
            assert torch.equal(out, wanted)
            assert torch.equal(source, wanted if in_place else grad)
    for dloss in (one * float("inf"), one * float("nan"), torch.full_like(vector, float("-inf"))):
        _, out = scale(dloss, None)
        assert torch.equal(
            out.masked_select((labels == IGNORED).unsqueeze(1)), grad.masked_select((labels == IGNORED).unsqueeze(1))
        )
        kept = (labels != IGNORED).unsqueeze(1) & (grad != 0)
        assert not out.masked_select(kept).isfinite().any()


def test_scale_gradient_to_another_dtype(device: str) -> None:
    grad, out = torch.randn(5, 3, device=device), torch.empty(5, 3, device=device, dtype=torch.bfloat16)
    kernels.scale_gradient(torch.tensor(3.0, device=device), grad, None, None, 0, out)
    assert torch.equal(out, (grad.double() * 3).to(torch.bfloat16))


@pytest.mark.parametrize("classes", [10, 300])
def test_same_bits_twice(classes: int, device: str) -> None:
    for case in (SMOOTHED, WEIGHTED):
        x, target, weight = batch(600, classes, dtype=torch.float32, device=device, case=case)
        first, second = (forward(x, target, weight, IGNORED, "mean", case.smoothing, True) for _ in range(2))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.unpoisoned  # poisoning would touch all of the memory that this test only reserves
@pytest.mark.parametrize("small", [True, False], ids=["rows in blocks", "rows on chip"])
@pytest.mark.parametrize("case", [WEIGHTED, PROBABILITIES], ids=str)
def test_offsets_past_32_bits(case: Case, small: bool, request: pytest.FixtureRequest) -> None:
    """Rows, classes and targets of which the last lie past 2^31 elements, in memory that is reserved, not touched."""
    if small:
        request.getfixturevalue("small_tiles")
    apart = 2**30 + 64
    x, target, weight = batch(3, 20, dtype=torch.float16, device="cpu", case=case)
    target = target if case.probabilities else target.abs() % 20
    right = forward(x, target, weight, IGNORED, "none", 0.0, True)

    def far(tensor: Tensor, *strides: int) -> Tensor:
        return torch.empty(2 * apart + 64, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)

    step = 2 * apart // 19  # 20 classes: the last lies past 2^31
    if case.probabilities:
        targets = [(x, far(target, apart, 1)), (x, far(target, 1, step))]
    else:
        targets = [(x, far(target.to(torch.int8), apart))]
    for logits, labels in [(far(x, apart, 1), target), (far(x, 1, step), target), *targets]:
        results = forward(logits, labels, weight, IGNORED, "none", 0.0, True)
        for result, value in zip(results[:2], right[:2], strict=True):
            assert torch.equal(bits(result), bits(value))
    if not case.probabilities:
        blocks, labels = torch.stack((x, x), 2), target[:, None].expand(3, 2)
        right = forward(blocks, labels, weight, IGNORED, "none", 0.0, True)
        results = forward(far(blocks, 20, 1, apart), labels, weight, IGNORED, "none", 0.0, True)
        for result, value in zip(results[:2], right[:2], strict=True):
            assert torch.equal(bits(result), bits(value))
