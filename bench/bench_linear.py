"""linear_relu on a GPU, forward and forward plus backward, beside eager PyTorch and torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import functional

from .conftest import Stamp, capture, compiled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(32, 128, 64), (32, 10, 128), (256, 256, 256), (1024, 1024, 1024), (4096, 4096, 4096)]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """What linear_relu replaces."""
    return torch.relu(F.linear(x, w, b))


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "torch.compile": eager,
    "fusednn": functional.linear_relu,
}


@pytest.fixture
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype; float32 products with TF32 allowed or not."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if request.param == "tf32" else "ieee")
    return PRECISIONS[request.param]


@pytest.mark.benchmark(timer=Stamp)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear_relu(
    shape: tuple[int, int, int], precision: torch.dtype, backward: bool, implementation: str, benchmark: Any
) -> None:
    """GPU time of ten calls in a CUDA graph, which leaves out what Python costs."""
    m, n, k = shape
    x, w, b = (torch.randn(s, device="cuda", dtype=precision, requires_grad=True) for s in ((m, k), (n, k), (n,)))
    dy, function = torch.randn(m, n, device="cuda", dtype=precision), IMPLEMENTATIONS[implementation]
    function = compiled(function) if implementation == "torch.compile" else function
    torch.testing.assert_close(function(x, w, b), eager(x, w, b), rtol=2e-2, atol=2e-2 * k**0.5)

    def call() -> None:
        if backward:
            torch.autograd.grad(function(x, w, b), (x, w, b), dy)
        else:
            with torch.no_grad():
                function(x, w, b)

    graph = capture(call)
    benchmark.group = f"linear_relu {m}x{n}x{k} {precision} {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info["calls a round"] = 10
    benchmark.pedantic(graph.replay, rounds=30, warmup_rounds=5)
