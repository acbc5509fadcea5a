"""Cross entropy on a GPU from few classes to many, forward and forward plus backward, beside the peers."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import functional

from .conftest import Stamp, capture, compiled, occupy, peak

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CLASSES = [10, 100, 256, 1024, 4096, 16384, 32768, 131072, 262144]


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
    """bfloat16 logits of 512 MiB, or 2^20 rows; GPU time of ten calls, in a CUDA graph where the peer allows it."""
    module = {"liger": "liger_kernel", "quack": "quack"}.get(implementation)
    if module and find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    rows, function = min(2**20, 2**28 // classes), IMPLEMENTATIONS[implementation]
    function = compiled(function) if implementation == "torch.compile" else function
    x = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, classes, (rows,), device="cuda")
    logits = x.detach().clone().requires_grad_()  # Liger writes to its input
    torch.testing.assert_close(function(logits, target).float(), F.cross_entropy(x.float(), target), rtol=1e-2, atol=0)

    def call() -> None:
        if backward:
            torch.autograd.grad(function(logits, target), logits)
        else:
            with torch.no_grad():
                function(logits, target)

    run = capture(call).replay if implementation in ("eager", "fusednn", "torch.compile") else lambda: ten(call)
    benchmark.group = f"cross entropy, {classes} classes, {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info |= {"calls a round": 10, "logits": rows * classes}
    benchmark.pedantic(run, setup=occupy, rounds=10, warmup_rounds=3)
    median = benchmark.stats.stats.median / 10
    # the least that has to move: the logits once, and their gradient once
    benchmark.extra_info["GB/s of the floor"] = rows * classes * 2 * (2 if backward else 1) / median / 1e9


def ten(call: Callable[[], None]) -> None:
    """As many calls as a captured graph has."""
    for _ in range(10):
        call()


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
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()
    target = torch.randint(0, 128256, (8192,), device="cuda")

    def call() -> None:
        torch.autograd.grad(function(x, w, target, reduction), (x, w))

    call()
    benchmark.extra_info["peak bytes over the inputs"] = peak(call)
    benchmark.group = f"linear cross entropy, 8192x4096x128256, bfloat16, {reduction}"
    benchmark.pedantic(call, setup=occupy, rounds=10, warmup_rounds=1)
