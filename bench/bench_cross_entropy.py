"""Cross entropy on a GPU from few classes to many, forward and forward plus backward, beside the peers."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import functional

from .conftest import PRETEND, WARMUPS, Stamp, amounts, capture, compiled, occupy, peak, repeat, seconds_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LARGEST = [40960, 65536] if PRETEND == "sample" else [131072, 262144]

CLASSES = [10, 100, 256, 1024, 4096, 16384, 32768, *LARGEST]

LOGITS = {"": 2**28, "compile": 2**16, "sample": 2**13}[PRETEND]

MOST_ERROR = 0.03
"""How far a bfloat16 loss, and by norm a gradient, may be from eager's float32."""


def check_close(function: Callable[..., Tensor], right: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Raise AssertionError unless loss and gradients are those of `right` on float32, which are made first.

    A peer may write its gradient over its input, so `function` gets copies.
    """
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    results = []
    for call, inputs in ((right, exact), (function, copies)):
        loss = call(*inputs)
        results.append([loss.detach().float(), *torch.autograd.grad(loss, inputs)])
    for theirs, ours in zip(*results, strict=True):
        error = torch.linalg.vector_norm(ours.float() - theirs)
        assert error <= MOST_ERROR * torch.linalg.vector_norm(theirs), f"off by {error:.2e}"


def liger(x: Tensor, target: Tensor) -> Tensor:
    """Liger's loss; it writes its gradient over the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss: Tensor = liger_cross_entropy(x, target)
    return loss


def quack(x: Tensor, target: Tensor) -> Tensor:
    """QuACK's loss."""
    from quack import cross_entropy

    loss: Tensor = cross_entropy(x, target, reduction="mean")
    return loss


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager": F.cross_entropy,
    "torch.compile": F.cross_entropy,
    "liger": liger,
    "quack": quack,
    "fusednn": functional.cross_entropy,
}


@pytest.mark.benchmark(timer=Stamp)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("classes", CLASSES)
def test_cross_entropy(classes: int, backward: bool, implementation: str, benchmark: Any) -> None:
    """bfloat16 logits of 512 MiB, or 2^20 rows; GPU time of some calls, in a CUDA graph where the peer allows it.

    Liger and QuACK are called from Python: with few classes their time is Python's.
    """
    module = {"liger": "liger_kernel", "quack": "quack"}.get(implementation)
    if module and find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    rows, function = max(2, min(2**20, LOGITS // classes)), IMPLEMENTATIONS[implementation]
    function = compiled(function) if implementation == "torch.compile" else function
    x = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, classes, (rows,), device="cuda")
    logits = x.detach().clone().requires_grad_()  # Liger writes to its input
    check_close(partial(function, target=target), partial(F.cross_entropy, target=target), logits)

    def call() -> None:
        if backward:
            torch.autograd.grad(function(logits, target), logits)
        else:
            with torch.no_grad():
                function(logits, target)

    calls, rounds = amounts(seconds_of(call), 10)
    captured = implementation in ("eager", "fusednn", "torch.compile")
    run = capture(call, calls).replay if captured else partial(repeat, call, calls)
    benchmark.group = f"cross entropy, {classes} classes, {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info |= {"calls a round": calls, "logits": rows * classes, "in a graph": captured}
    benchmark.pedantic(run, setup=occupy, rounds=rounds, warmup_rounds=WARMUPS)
    median = benchmark.stats.stats.median / calls
    # the least that has to move: the logits once, and their gradient once
    benchmark.extra_info["GB/s of the floor"] = rows * classes * 2 * (2 if backward else 1) / median / 1e9


def linear_liger(x: Tensor, w: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Liger's, in chunks."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(x, w, target, reduction=reduction)
    return loss


def linear_cut(x: Tensor, w: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Apple's, whose logits never leave the chip."""
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(x, w, target, reduction=reduction)
    return loss


def linear_eager(x: Tensor, w: Tensor, target: Tensor, reduction: str) -> Tensor:
    """PyTorch's two operations."""
    return F.cross_entropy(F.linear(x, w), target, reduction=reduction)


def linear_fusednn(x: Tensor, w: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Ours."""
    return functional.linear_cross_entropy(x, w, target, reduction=reduction)


LINEAR_SIZES, CHECKED_ROWS = {
    "": ((8192, 4096, 128256), 256), "compile": ((50, 2048, 40960), 40), "sample": ((5, 16, 33000), 4),
}[PRETEND]  # fmt: skip
"""Rows, width and classes; and how many rows are checked: of more, eager's float32 logits have no room. To compile, the
chunks begin at as odd places as the real ones do."""

LINEAR_IMPLEMENTATIONS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "eager": ("torch", linear_eager),
    "liger": ("liger_kernel", linear_liger),
    "cut-cross-entropy": ("cut_cross_entropy", linear_cut),
    "fusednn": ("fusednn", linear_fusednn),
}


@pytest.mark.benchmark(timer=Stamp)
@pytest.mark.parametrize("implementation", LINEAR_IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction: str, implementation: str, benchmark: Any) -> None:
    """8192 rows, 4096 wide, 128,256 classes, bfloat16, forward plus backward: GPU time of a call, and peak memory."""
    module, function = LINEAR_IMPLEMENTATIONS[implementation]
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    rows, inner, classes = LINEAR_SIZES
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(classes, inner, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()
    target = torch.randint(0, classes, (rows,), device="cuda")

    def call() -> None:
        torch.autograd.grad(function(x, w, target, reduction), (x, w))

    few = x[:CHECKED_ROWS].detach()
    check_close(
        partial(function, target=target[:CHECKED_ROWS], reduction=reduction),
        partial(linear_eager, target=target[:CHECKED_ROWS], reduction=reduction), few, w,
    )  # fmt: skip
    benchmark.extra_info["peak bytes over the inputs"] = peak(call)
    benchmark.group = f"linear cross entropy, 8192x4096x128256, bfloat16, {reduction}"
    benchmark.pedantic(call, setup=occupy, rounds=amounts(seconds_of(call), 1)[1], warmup_rounds=min(WARMUPS, 1))
