"""The launchers of kernels/cross_entropy.py against PyTorch's loss and gradient in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.kernels import cross_entropy as kernels
from tests.accuracy import DTYPES, UNIT, bits, sum_unit

REDUCTIONS = ["none", "mean", "sum"]
IGNORED = -100


def batch(m: int, c: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which about one in four is ignored."""
    target = torch.randint(0, c, (m,), device=device)
    target[torch.rand(m, device=device) < 0.25] = IGNORED
    return torch.randn(m, c, device=device).to(dtype), target


def exact(x: Tensor, target: Tensor, reduction: str, smoothing: float, ignored: int = IGNORED) -> tuple[Tensor, Tensor]:
    leaf = x.double().detach().requires_grad_()
    loss = F.cross_entropy(leaf, target, reduction=reduction, label_smoothing=smoothing, ignore_index=ignored)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def check(x: Tensor, target: Tensor, reduction: str, smoothing: float, ignored: int = IGNORED) -> None:
    """Loss and gradient within the accuracy rule, and the logits untouched."""
    c = x.shape[1]
    before = bits(x).clone()
    loss, grad = kernels.cross_entropy_forward(x, target, ignored, reduction, smoothing, True)
    without, nothing = kernels.cross_entropy_forward(x, target, ignored, reduction, smoothing, False)
    assert torch.equal(bits(x), before)
    assert torch.equal(bits(without), bits(loss))
    assert nothing.numel() == 0
    assert (loss.dtype, grad.dtype, grad.shape) == (x.dtype, x.dtype, x.shape)
    right_loss, right_grad = exact(x, target, reduction, smoothing, ignored)

    u, unit, factor = sum_unit(x.dtype), UNIT[x.dtype], 8 if c <= 16 else 16
    valid = (target != ignored).double()
    x = x.double()
    distances = (x - x.max(1, keepdim=True).values).abs()
    at_target = distances.gather(1, target.clamp(0, c - 1)[:, None])[:, 0]
    scale = (1 - smoothing) * at_target + smoothing * distances.mean(1) + math.log(c) + 1
    scale = {"none": valid * scale, "sum": (valid * scale).sum(), "mean": (valid * scale).sum() / valid.sum()}[
        reduction
    ]
    # in float64 the reference is as inexact as the result, and adds its c smoothing terms one by one
    slack = 2 + c / 500 if loss.dtype == torch.float64 else 1
    bound = factor * u * scale * slack + unit * right_loss.abs() + 2.0**-126
    assert ((loss.double() - right_loss).abs() <= bound).all()

    weight = 1 / valid.sum() if reduction == "mean" else 1
    p = x.softmax(1)
    bound = factor * u * slack * (p * (distances + math.log(c) + 4) * weight + right_grad.abs())
    bound = bound + unit * right_grad.abs() + (2.0**-25 if grad.dtype == torch.float16 else 2.0**-126)
    assert ((grad.double() - right_grad).abs() <= bound).all()


CASES = [(dtype, "mean", 0.1) for dtype in DTYPES] + [
    (torch.float32, "none", 0.0),
    (torch.float32, "none", 0.1),
    (torch.float32, "mean", 0.0),
    (torch.float32, "sum", 0.0),
]


@pytest.mark.parametrize(("dtype", "reduction", "smoothing"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (7, 10), (300, 10), (33, 65), (5, 1000), (3, 33000)], ids=str)
def test_accuracy(shape: tuple[int, int], dtype: torch.dtype, reduction: str, smoothing: float, device: str) -> None:
    check(*batch(*shape, dtype, device), reduction, smoothing)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("classes", [3, 7, 20], ids=["4 rows a program", "2 rows a program", "rows in blocks"])
def test_many_programs_and_trips(
    classes: int, dtype: torch.dtype, reduction: str, smoothing: float, device: str
) -> None:
    rows = 33 if classes == 3 else 9
    plans = kernels.plan_forward(rows, classes, dtype, reduction, smoothing, True)
    assert plans[1].grid[0] >= 2
    assert plans[3] == (classes <= 8)  # whole on chip, or in blocks of 8
    check(*batch(rows, classes, dtype, device), reduction, smoothing)


@pytest.mark.parametrize(("rows", "launches"), [(256, 1), (257, 3)])
def test_launches(rows: int, launches: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that fits one program takes one launch for count, losses, gradient and sum; else three."""
    launched = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *arguments: launched.append(kernel))
    kernels.cross_entropy_forward(*batch(rows, 10, torch.float32, device), IGNORED, "mean", 0.0, True)
    assert len(launched) == launches


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_dtypes(dtype: torch.dtype, device: str) -> None:
    x, _ = batch(300, 10, torch.float32, device)
    target = torch.randint(0, 10, (300,), device=device)
    ignored = 255 if dtype == torch.uint8 else -7
    target[::5] = ignored
    right_loss, right_grad = exact(x, target, "mean", 0.0, ignored)
    loss, grad = kernels.cross_entropy_forward(x, target.to(dtype), ignored, "mean", 0.0, True)
    torch.testing.assert_close(loss, right_loss.float())
    torch.testing.assert_close(grad, right_grad.float())


@pytest.mark.parametrize("ignored", [3, 0, 10, 2**40])
def test_any_ignore_index(ignored: int, device: str) -> None:
    """Also one that is a class, or just outside."""
    x, target = batch(33, 10, torch.float32, device)
    target[target == IGNORED] = ignored
    check(x, target, "mean", 0.2, ignored)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
def test_strides(classes: int, device: str) -> None:
    """Transposed, sliced and expanded logits, and labels that are a column or start unaligned."""
    x, target = batch(9, classes, torch.float32, device)
    right = kernels.cross_entropy_forward(x, target, IGNORED, "mean", 0.1, True)
    wide = torch.full((18, 2 * classes), float("nan"), device=device)
    wide[::2, ::2] = x
    labels = torch.full((10, 3), -1, device=device)
    labels[1:, 1] = target
    for logits in (x.T.contiguous().T, wide[::2, ::2]):
        for result, value in zip(
            kernels.cross_entropy_forward(logits, labels[1:, 1], IGNORED, "mean", 0.1, True), right, strict=True
        ):
            assert torch.equal(bits(result), bits(value))
    check(x[:1].expand(9, classes), target, "mean", 0.1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
@pytest.mark.parametrize("label", [-1, "classes", 10**9, -(2**40)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_label_out_of_range(label: int | str, classes: int, reduction: str, device: str) -> None:
    """Its row's loss and gradient are NaN, the other rows' gradients right; nothing out of bounds is read."""
    x, target = batch(9, classes, torch.float32, device)
    target[0], target[4] = 1, classes if label == "classes" else int(label)
    loss, grad = kernels.cross_entropy_forward(x, target, IGNORED, reduction, 0.0, True)
    bad = torch.arange(9, device=device) == 4
    assert torch.equal(loss.isnan(), bad if reduction == "none" else torch.tensor(True, device=device))
    assert torch.equal(grad.isnan().all(1), bad)
    assert torch.equal(grad.isnan().any(1), bad)
    target[4] = 0
    torch.testing.assert_close(grad[~bad], exact(x, target, reduction, 0.0)[1].float()[~bad])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [3, 300])
def test_all_ignored(reduction: str, rows: int, device: str) -> None:
    """The mean is NaN as in PyTorch, and every gradient is zero."""
    x = torch.randn(rows, 10, device=device)
    target = torch.full((rows,), IGNORED, device=device)
    loss, grad = kernels.cross_entropy_forward(x, target, IGNORED, reduction, 0.1, True)
    expected = F.cross_entropy(x, target, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction: str, device: str) -> None:
    x, target = torch.randn(0, 10, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    loss, grad = kernels.cross_entropy_forward(x, target, IGNORED, reduction, 0.0, True)
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    assert grad.shape == (0, 10)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_and_infinity(classes: int, smoothing: float, device: str) -> None:
    """Row by row they go where PyTorch sends them; a first block of -inf is an ordinary one."""
    inf, nan = float("inf"), float("nan")
    x = torch.randn(11, classes, device=device) - 1000
    target = torch.full((11,), classes - 1, device=device)
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
    loss, grad = kernels.cross_entropy_forward(x, target, IGNORED, "none", smoothing, True)
    right_loss, right_grad = exact(x, target, "none", smoothing)
    torch.testing.assert_close(loss, right_loss.float(), equal_nan=True)
    torch.testing.assert_close(grad, right_grad.float(), equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [7, 20])
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_large_logits_keep_their_accuracy(classes: int, offset: float, device: str) -> None:
    """Logits around 1e4 with differences of 1: logsumexp(x) - x_t would lose three digits."""
    x = torch.randint(-3, 4, (9, classes), device=device) + torch.tensor(offset, device=device)
    target = torch.randint(0, classes, (9,), device=device)
    check(x, target, "none", 0.0)
    check(x, target, "mean", 0.1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("far", [300.0, -300.0], ids=["first block", "last block"])
def test_the_maximum_can_be_in_any_block(far: float, device: str) -> None:
    """exp of the distance between two blocks would overflow."""
    x, target = batch(5, 20, torch.float32, device)
    x[:, :8] += far
    check(x, target, "none", 0.1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 20])
def test_scale_gradient(classes: int, dtype: torch.dtype, in_place: bool, device: str) -> None:
    """Row by row, for scalars, vectors and expanded vectors; ignored rows stay zero whatever comes in."""
    _, target = batch(5, classes, dtype, device)
    target[0] = IGNORED
    grad = torch.randn(5, classes, device=device).to(dtype)
    grad[target == IGNORED] = 0
    one = torch.ones((), device=device, dtype=dtype)
    vector = torch.randn(10, device=device).to(dtype)[::2]
    some_ones = torch.where(torch.arange(5, device=device) % 2 == 0, one, vector)
    for dloss in (one, one * -2.5, vector, one.expand(5), (one * 3).expand(5), some_ones):
        source = grad.clone()
        result = kernels.scale_gradient(dloss, source, target, IGNORED, in_place)
        wanted = (grad.double() * (dloss.double()[:, None] if dloss.dim() else dloss.double())).to(dtype)
        assert torch.equal(result, wanted)
        assert (result is source) == in_place
        assert torch.equal(source, wanted if in_place else grad)
    result = kernels.scale_gradient(one * float("inf"), grad.clone(), target, IGNORED, in_place)
    assert torch.equal(result[0], torch.zeros_like(result[0]))


@pytest.mark.parametrize("classes", [10, 300])
def test_same_bits_twice(classes: int, device: str) -> None:
    x, target = batch(600, classes, torch.float32, device)
    first = kernels.cross_entropy_forward(x, target, IGNORED, "mean", 0.1, True)
    second = kernels.cross_entropy_forward(x, target, IGNORED, "mean", 0.1, True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.unpoisoned  # poisoning would touch all of the memory that this test only reserves
@pytest.mark.parametrize("small", [True, False], ids=["rows in blocks", "rows on chip"])
def test_offsets_past_32_bits(small: bool, request: pytest.FixtureRequest) -> None:
    """Rows, classes and labels of which the last lie past 2^31 elements, in memory that is reserved and not touched."""
    if small:
        request.getfixturevalue("small_tiles")
    apart = 2**30 + 64
    x = torch.randn(3, 20).half()
    target = torch.tensor([3, 19, 7])
    right = kernels.cross_entropy_forward(x, target, IGNORED, "mean", 0.0, True)
    memory = torch.empty(2 * apart + 64, dtype=torch.float16)
    rows = memory.as_strided((3, 20), (apart, 1)).copy_(x)
    labels = torch.empty(2 * apart + 64, dtype=torch.int8).as_strided((3,), (apart,)).copy_(target)
    for logits, label in ((rows, target), (x, labels)):
        results = kernels.cross_entropy_forward(logits, label, IGNORED, "mean", 0.0, True)
        for result, value in zip(results, right, strict=True):
            assert torch.equal(bits(result), bits(value))
    step = apart // 9
    classes = torch.empty(20 * step, dtype=torch.float16).as_strided((3, 20), (1, step)).copy_(x)
    results = kernels.cross_entropy_forward(classes, target, IGNORED, "mean", 0.0, True)
    for result, value in zip(results, right, strict=True):
        assert torch.equal(bits(result), bits(value))
