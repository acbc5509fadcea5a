"""fusednn.functional.linear_cross_entropy against cross_entropy(linear(...)) of PyTorch: gradients, memory, modes."""

import importlib
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fusednn import check_labels, explain, functional, ops, reference, strict
from tests.accuracy import UNIT

operation = importlib.import_module("fusednn.ops.linear_cross_entropy")  # the function hides its name
EACH_REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
CASES = {
    "plain": {},
    "weighted": {"weight": True, "ignore_index": 1},
    "smoothed": {"label_smoothing": 0.2},
    "weighted smoothed": {"weight": True, "label_smoothing": 0.2},
}
EACH_CASE = pytest.mark.parametrize("case", CASES)


def problem(
    case: str, device: str, n: int = 23, bias: bool = True
) -> tuple[list[Tensor | None], Tensor, dict[str, Any]]:
    """x, W and b in float64, labels, and the options of a case."""
    x, w, b = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in ((n, 4), (6, 4), (6,))
    )
    labels = torch.arange(n, device=device) % 6
    options = dict(CASES[case])
    labels[3::7] = options.get("ignore_index", -100)
    if "weight" in options:
        options["weight"] = torch.rand(6, dtype=torch.float64, device=device)
    return [x, w, b if bias else None], labels, options


def composed(x: Tensor, w: Tensor, labels: Tensor, linear_bias: Tensor | None = None, **options: Any) -> Tensor:
    """The two parts of PyTorch."""
    options.pop("chunk_rows", None)
    return F.cross_entropy(F.linear(x, w, linear_bias), labels, **options)


@EACH_CASE
@EACH_REDUCTION
def test_gradcheck(reduction: str, case: str, device: str) -> None:
    """Of every order, over five chunks, the last one smaller."""
    inputs, labels, options = problem(case, device)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.linear_cross_entropy(
            x, w, labels, linear_bias=b, reduction=reduction, chunk_rows=5, **options
        )

    assert gradcheck(loss, inputs, fast_mode=True)
    assert gradgradcheck(loss, inputs, fast_mode=True)


@EACH_REDUCTION
@pytest.mark.parametrize(
    ("chunk_rows", "needs"),
    [(5, "x"), (5, "w"), (5, "b"), (5, "xwb"), (1, "xwb"), (100, "xwb"), (None, "xwb")],
)
def test_gradients(chunk_rows: int | None, needs: str, reduction: str, device: str) -> None:
    """Only those asked for; for one, another scalar, a vector and an expanded one; twice through a retained graph."""
    inputs, labels, _ = problem("plain", device)
    for name, tensor in zip("xwb", inputs, strict=True):
        tensor.requires_grad_(name in needs)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    x, w, b = inputs
    ours, theirs = (
        f(x, w, labels, linear_bias=b, reduction=reduction, chunk_rows=chunk_rows)
        for f in (functional.linear_cross_entropy, composed)
    )
    torch.testing.assert_close(ours, theirs)
    one = torch.ones((), dtype=torch.float64, device=device)
    sent = [one.expand_as(theirs), (one * 3).expand_as(theirs), torch.randn_like(theirs)]
    for dloss in (*sent, *sent):
        right = torch.autograd.grad(theirs, leaves, dloss, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(ours, leaves, dloss, retain_graph=True), right)
    right = torch.autograd.grad(theirs, leaves, sent[1])
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, sent[1]), right)


@EACH_CASE
def test_no_bias_and_no_batch(case: str, device: str) -> None:
    (x, w, _), labels, options = problem(case, device, bias=False)
    for rows, targets in ((x, labels), (x[0], labels[0]), (x[:0], labels[:0])):
        for reduction in ("none", "mean", "sum"):
            both = [
                f(rows, w, targets, reduction=reduction, **options) for f in (functional.linear_cross_entropy, composed)
            ]
            torch.testing.assert_close(*both, equal_nan=True)
            torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), (x, w)) for loss in both))


@EACH_REDUCTION
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_that_weigh_nothing(label_smoothing: float, reduction: str, device: str) -> None:
    """The mean and its gradients are 0 / 0."""
    (x, w, b), labels, _ = problem("plain", device)
    weight = torch.ones(w.shape[0], dtype=w.dtype, device=device)
    weight[1] = 0.0
    given = {"linear_bias": b, "weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    both = [f(x, w, torch.ones_like(labels), **given) for f in (functional.linear_cross_entropy, composed)]
    torch.testing.assert_close(*both, equal_nan=True)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), (x, w, b)) for loss in both), equal_nan=True)


@EACH_REDUCTION
def test_all_rows_ignored(reduction: str, device: str) -> None:
    """NaN for the mean, but zero gradients, not NaN ones."""
    (x, w, b), labels, _ = problem("plain", device)
    loss = functional.linear_cross_entropy(
        x, w, torch.full_like(labels, -100), linear_bias=b, reduction=reduction, chunk_rows=5
    )
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    for grad in torch.autograd.grad(loss.sum(), (x, w, b)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_dtypes_and_strides(dtype: torch.dtype, device: str) -> None:
    (x, w, b), labels, _ = problem("plain", device)
    labels = labels.clamp(0)
    column = torch.stack((labels, labels), 1).to(dtype)[:, 1]
    strided = torch.stack((x, x), 2)[..., 1]
    loss = functional.linear_cross_entropy(strided, w.T.contiguous().T, column, linear_bias=b, chunk_rows=5)
    torch.testing.assert_close(loss, composed(x, w, labels, b))


def test_what_has_whole_logits_anyway(device: str) -> None:
    """Class probabilities, with a gradient, and a weight of more dimensions: composed, and so served by our kernels."""
    x, q = torch.randn(5, 4, device=device, requires_grad=True), torch.rand(5, 6, device=device, requires_grad=True)
    w, blocks = torch.randn(6, 4, device=device), torch.randn(6, 2, 3, 4, device=device)
    with strict():
        ours = functional.linear_cross_entropy(x, w, q, label_smoothing=0.1)
        labels = torch.randint(0, 6, (5, 2, 3), device=device)
        of_blocks = functional.linear_cross_entropy(x, blocks, labels, linear_bias=blocks[..., 0])
    theirs = composed(x, w, q, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (x, q)) for loss in (ours, theirs)))
    logits = F.linear(x, blocks.flatten(0, 2), blocks[..., 0].flatten()).reshape(5, 6, 2, 3)
    torch.testing.assert_close(of_blocks, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """The products in the ambient dtype, the loss in float32, gradients in each leaf's dtype."""
    inputs, labels, options = problem("weighted", device)
    x, w, b = (tensor.detach().float().requires_grad_() for tensor in inputs)
    options["weight"] = options["weight"].float()
    with torch.autocast(device, dtype=dtype):
        losses = [f(x, w, labels, linear_bias=b, **options) for f in (functional.linear_cross_entropy, composed)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (x, w, b)) for loss in losses), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_is_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    """Over 64 chunks of one row each: summed in the weight's own dtype it would be off by many roundings of it."""
    x, w = torch.rand(64, 8, device=device).to(dtype), torch.randn(5, 8, device=device).to(dtype).requires_grad_()
    b = torch.zeros(5, device=device, dtype=dtype, requires_grad=True)
    labels = torch.arange(64, device=device) % 5
    loss = functional.linear_cross_entropy(x, w, labels, linear_bias=b, reduction="sum", chunk_rows=1)
    logits = F.linear(x, w, b).detach().double().requires_grad_()  # as they were rounded
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    dw, db = torch.autograd.grad(loss, (w, b))
    for ours, right, terms in (
        (dw, grad.T @ x.double(), grad.abs().T @ x.double()),
        (db, grad.sum(0), grad.abs().sum(0)),
    ):
        # each row's gradient was rounded once, and the sum once: no rounding for each chunk
        assert ((ours.double() - right).abs() <= UNIT[dtype] * (1.1 * terms + right.abs())).all()
        assert ((ours.double() - right).abs() <= 3 * UNIT[dtype] * right.abs().max()).all()


def test_labels_out_of_range(device: str) -> None:
    (x, w, b), labels, _ = problem("plain", device)
    labels[7] = 6
    for reduction in ("none", "mean", "sum"):
        with pytest.raises(IndexError, match="Target 6 is out of bounds"), check_labels():
            functional.linear_cross_entropy(x, w, labels, linear_bias=b, reduction=reduction)
        if device == "cpu":
            with pytest.raises(IndexError, match="Target 6 is out of bounds"):
                functional.linear_cross_entropy(x, w, labels, linear_bias=b, reduction=reduction)
        else:
            loss = functional.linear_cross_entropy(x, w, labels, linear_bias=b, reduction=reduction)
            assert loss.isnan().sum() == 1


def test_chunk_size() -> None:
    """At most a tenth of the rows and 256 MiB, or what the weight takes and 512 MiB; in chunks as equal as can be."""
    assert ops.chunk_size(8192, 128256, 2) == 745  # in 11 chunks; 819 would leave two rows for the last
    assert ops.chunk_size(2**20, 128256, 2) <= 2**28 // (128256 * 2)
    assert ops.chunk_size(8192, 128256, 2, 4096) == 2048
    assert ops.chunk_size(8192, 128256, 2, 1024) == 1024
    assert ops.chunk_size(100, 10, 4, 64) == 50
    for rows in (0, 1, 9, 10, 11, 99, 1000):
        size = ops.chunk_size(rows, 10, 4)
        assert 1 <= size <= max(1, rows / 10)


def test_the_chunk_is_what_the_options_say(device: str) -> None:
    (x, w, _), labels, _ = problem("plain", device)
    seen: list[int] = []
    chunks = operation._chunks
    with patch.object(operation, "_chunks", lambda *a: seen.append(a[-1]) or chunks(*a)):
        functional.linear_cross_entropy(x, w, labels, chunk_rows=7)
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=3)
            functional.linear_cross_entropy(x, w, labels, options=options)
            assert seen.pop() == 3
        functional.linear_cross_entropy(x, w, labels)
    assert seen == [7, 2]


def peak(step: Any) -> int:
    """The most bytes that PyTorch's CPU allocator held at once during `step`, over what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@EACH_REDUCTION
def test_memory(reduction: str) -> None:
    """The chunk, one float32 buffer of W's shape, and the gradients; the logits took ten times the chunk and more."""
    n, k, v = 400, 4, 1000
    x, w = torch.randn(n, k, requires_grad=True), torch.randn(v, k, requires_grad=True)
    labels = torch.randint(0, v, (n,))

    def step(loss: Any) -> int:
        return peak(lambda: torch.autograd.grad(loss(x, w, labels, reduction=reduction).sum(), (x, w)))

    step(functional.linear_cross_entropy)  # imports
    ours, theirs = step(functional.linear_cross_entropy), step(composed)
    logits, gradients = 4 * n * v, 4 * (n * k + v * k)
    # Triton 3.9's interpreter holds the forward's until the next launch
    chunks = 2 if reduction == "none" and triton.__version__ >= "3.9" else 1
    assert ours <= chunks * logits / 10 + 2 * gradients + 16 * 4 * n
    assert theirs >= 2 * logits


def test_explain(device: str) -> None:
    (x, w, b), labels, _ = problem("plain", device)
    (decision,) = explain(functional.linear_cross_entropy, x, w, labels, linear_bias=b)
    assert decision.operation == "linear_cross_entropy"
    assert decision.implementation.startswith("Triton")
    (decision,) = explain(
        functional.linear_cross_entropy, x, w, labels, linear_bias=b, label_smoothing=torch.tensor(0.1)
    )
    assert decision.implementation == "PyTorch"
    assert "label_smoothing" in decision.reason


def test_reference_where_pytorch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, w, b), labels, _ = problem("plain", "cpu")
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    loss = reference.linear_cross_entropy(x, w, labels.int(), linear_bias=b)
    torch.testing.assert_close(loss, composed(x, w, labels, b))


def test_autocast_leaves_float64_and_class_weights_alone(device: str) -> None:
    """Weights of 1e-9 or 1e5 are scaled out by the mean; rounded to half precision they would lose digits."""
    (x, w, b), labels, options = problem("weighted", device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert functional.linear_cross_entropy(x, w, labels, linear_bias=b, **options).dtype == torch.float64
    # whole numbers, of which each way to multiply makes the same logits in bfloat16
    x, w = x.detach().float().round(), w.detach().float().mul(2).round().requires_grad_()
    for factor in (1e-9, 1e5):
        options["weight"] = torch.rand(6, device=device) * factor
        with torch.autocast(device, dtype=torch.bfloat16):
            ours, logits = functional.linear_cross_entropy(x, w, labels, **options), F.linear(x, w)
        # not within autocast, which on a GPU leaves the logarithms of the probabilities in half precision
        both = ours, F.cross_entropy(logits.float(), labels, **options)
        torch.testing.assert_close(*both, rtol=1e-5, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(loss, w)[0] for loss in both), rtol=5e-2, atol=2e-2)


def test_backward_makes_no_zeros_of_what_was_saved(device: str) -> None:
    """For outputs that have no gradient, each as large as dx or dW."""
    (x, w, b), labels, _ = problem("plain", device)
    seen: list[object] = []
    backward = operation.LinearCrossEntropy.backward
    with patch.object(
        operation.LinearCrossEntropy, "backward", lambda ctx, *a: seen.extend(a[1:]) or backward(ctx, *a)
    ):
        loss = functional.linear_cross_entropy(x, w, labels, linear_bias=b)
        torch.autograd.grad(loss, (x, w, b))
    assert seen == [None] * 4
