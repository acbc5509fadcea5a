"""Cross entropy on a GPU from few classes to many, forward and forward plus backward, beside the peers."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import functional

from .conftest import Stamp, capture, compiled

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
    benchmark.pedantic(run, rounds=10, warmup_rounds=3)
    median = benchmark.stats.stats.median / 10
    # the least that has to move: the logits once, and their gradient once
    benchmark.extra_info["GB/s of the floor"] = rows * classes * 2 * (2 if backward else 1) / median / 1e9


def ten(call: Callable[[], None]) -> None:
    """As many calls as a captured graph has."""
    for _ in range(10):
        call()
