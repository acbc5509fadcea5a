"""On a GPU: the kernels at the sizes and in the precisions that are timed, whose tiles no smaller test reaches.

The bounds are of errors by norm. With PyTorch on a CPU, each factor cut to TF32, one product is off by 7.7e-4 and a
gradient of a training step by at most 1.7e-3; results rounded to bfloat16 are off by 1.7e-3, to float16 by 2.1e-4. A
hidden unit so near 0 that TF32 turns it over would be an error of another size (1.5e-2): no input here leads to one.
"""

import copy
import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import float32_products
from fusednn import explain, functional, reference, train_steps
from fusednn.kernels.linear import is_library

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]

PRETEND = os.environ.get("FUSEDNN_PRETEND", "")
"""Set on a pretended GPU: fewer steps and rows, the same kernels."""

NETS = [
    # sizes and batch: those of the benchmarks, and one of each row of an H100's that serves two layers
    ((64, 128, 10), 32), ((784, 128, 10), 128), ((64, 128, 10), 8), ((64, 128, 10), 256), ((64, 256, 10), 32),
    ((100, 96, 100), 32), ((784, 128, 10), 256),
]  # fmt: skip

NEAR_ZERO = 4e-3
"""Hidden units below this share of their standard deviation could turn over in TF32."""

STEPS = 6 if PRETEND else 3000


@pytest.fixture(params=["tf32", "ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    with float32_products(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """A pool of processes shares the card, and each keeps what it once had."""
    yield
    torch.cuda.empty_cache()


def distance(ours: Tensor, right: Tensor) -> float:
    """Of two tensors, by norm, relative to the second."""
    return float(torch.linalg.vector_norm(ours.double() - right) / torch.linalg.vector_norm(right))


def clear_inputs(model: reference.SimpleNN, rows: int) -> Tensor:
    """So many random rows that bring no hidden unit near 0."""
    x = torch.randn(8 * rows, model.fc1.in_features)
    z = model.fc1.double()(x.double()).detach()
    clear = (z.abs() > NEAR_ZERO * z.std()).all(1)
    model.float()
    assert clear.sum() >= rows
    return x[clear][:rows]


@pytest.mark.parametrize(("sizes", "batch"), NETS, ids=str)
def test_gradients_of_a_training_step(sizes: tuple[int, int, int], batch: int, precision: str) -> None:
    """The momentum of SGD after one step is the gradient."""
    model = reference.SimpleNN(*sizes)
    x, t = clear_inputs(model, batch).cuda(), torch.randint(sizes[2], (batch,)).cuda()
    exact = copy.deepcopy(model).double().cuda()
    model.cuda()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []

    def call() -> None:
        losses.append(train_steps(model, sgd, x, t, batch_size=batch, steps=1, shuffle=False))

    assert "resident" in str(explain(call)[0])
    loss = F.cross_entropy(exact(x.double()), t)
    most = 3e-3 if precision == "tf32" else 4e-6
    assert distance(losses[0], loss.detach()[None]) < most
    for w, right in zip(model.parameters(), torch.autograd.grad(loss, list(exact.parameters())), strict=True):
        assert distance(sgd.state[w]["momentum_buffer"], right) < most


@pytest.mark.parametrize(("sizes", "batch"), NETS, ids=str)
def test_bits_repeat_over_many_steps(sizes: tuple[int, int, int], batch: int, precision: str) -> None:
    """A missing barrier shows as bits that differ between two runs, or between chunks of other lengths."""
    torch.manual_seed(0)
    start = reference.SimpleNN(*sizes).cuda()
    x, t = torch.randn(1792, sizes[0], device="cuda"), torch.randint(sizes[2], (1792,), device="cuda")
    runs = []
    for chunk in (None, None, STEPS // 4 + 1):
        model, generator = copy.deepcopy(start), torch.Generator("cuda").manual_seed(1)
        adam = torch.optim.Adam(model.parameters(), lr=0.003)
        chunks = {} if chunk is None else {"chunk_steps": chunk, "on_chunk": lambda done, losses: None}
        losses = train_steps(model, adam, x, t, batch_size=batch, steps=STEPS, generator=generator, **chunks)
        runs.append([losses, *(w.detach() for w in model.parameters())])
    assert runs[0][0].isfinite().all()
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


CLASSES = [10, 100, 256, 1024, 4096, 16384, 32768, 65536, 131072, 262144]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_cross_entropy(classes: int, dtype: torch.dtype) -> None:
    """Loss and gradient. Away from the labels the gradient is so small that beside theirs its error would not show."""
    rows = max(3, min(4096, 2 ** (18 if PRETEND else 26) // classes)) + 1
    x = torch.randn(rows, classes, device="cuda").to(dtype).requires_grad_()
    t = torch.randint(classes, (rows,), device="cuda")
    counted = torch.ones(rows, dtype=torch.bool, device="cuda")
    counted[::7] = False
    exact = x.detach().double().requires_grad_()
    results = []
    for function, leaf in ((functional.cross_entropy, x), (F.cross_entropy, exact)):
        loss = function(leaf, torch.where(counted, t, -100), label_smoothing=0.1)
        (grad,) = torch.autograd.grad(loss, leaf)
        at_labels = torch.zeros_like(grad, dtype=torch.bool).scatter_(1, t[:, None], True)
        assert not grad[~counted].any()
        results.append((loss.detach(), grad[at_labels], grad[~at_labels]))
    for ours, right in zip(*results, strict=True):
        assert distance(ours, right) < (2**-8 if dtype == torch.bfloat16 else 1e-5)


SHAPES = [
    (32, 128, 64), (32, 10, 128), (256,) * 3, (1024,) * 3, (4096, 512, 512), (2048,) * 3, (50000, 128, 784),
    (4096,) * 3, (8192,) * 3,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32", "ieee"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_relu(shape: tuple[int, int, int], kind: str) -> None:
    """Output and gradients. The incoming gradient is 0 where rounding could turn the ReLU over."""
    if PRETEND and is_library(*shape):
        pytest.skip("PyTorch multiplies")
    m, n, k = (min(shape[0], 2048), shape[1], min(shape[2], 96)) if PRETEND == "sample" else shape
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    with float32_products(kind):
        inputs = [torch.randn(size, device="cuda").to(dtype).requires_grad_() for size in ((m, k), (n, k), (n,))]
        exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
        z = F.linear(*exact)
        y, right = functional.linear_relu(*inputs), torch.relu(z)
        dy = torch.randn_like(y) * (z.detach().abs() > 0.05 * k**0.5)
        ours = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    theirs = [right.detach(), *torch.autograd.grad(right, exact, dy.double())]
    most = {"bf16": 2**-8, "fp16": 2**-11, "tf32": 2e-3, "ieee": 1e-5}[kind]
    for one, other in zip(ours, theirs, strict=True):
        assert distance(one, other) < most
