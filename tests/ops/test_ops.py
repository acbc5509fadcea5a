"""The operators in the PyTorch world, with Triton running: opcheck, compile, export, torch.func, checkpointing.

On the plain CPU path no operator runs and such a test would prove nothing: these run the kernels in the interpreter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fusednn import CrossEntropyLoss, SimpleNN, functional, reference
from fusednn.ops import registry

# vmap runs an operator without a batching rule in a loop and warns of it
loops = pytest.mark.filterwarnings("ignore:There is a performance drop")


def samples(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator."""
    x, w, b, dy = (torch.randn(s, device=device) for s in ((5, 6), (4, 6), (4,), (5, 4)))
    y = torch.relu(dy)
    target = torch.tensor([0, 1, 2, 3, -100], device=device)
    return {
        "linear": (x, w, b, True),
        "linear_input_grad": (dy, y, w),
        "linear_weight_grad": (dy, None, x, True, False),
        "cross_entropy": (dy, target, -100, "mean", 0.1, True),
        "scale_gradient": (torch.tensor(2.0, device=device), dy, target, -100),
    }


@pytest.mark.parametrize("name", samples("cpu"))
def test_opcheck(name: str, device: str) -> None:
    operator = getattr(torch.ops.fusednn, name).default
    results = torch.library.opcheck(operator, samples(device)[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_opcheck_without_a_gradient(reduction: str, device: str) -> None:
    logits, target, ignored, _, _, _ = samples(device)["cross_entropy"]
    torch.library.opcheck(torch.ops.fusednn.cross_entropy.default, (logits, target, ignored, reduction, 0.0, False))


class Step:
    """One training step of SimpleNN, ours or PyTorch's: loss and gradients."""

    def __init__(self, device: str) -> None:
        self.model, self.plain = SimpleNN(6, 8, 4, device=device), reference.SimpleNN(6, 8, 4).to(device)
        self.plain.load_state_dict(self.model.state_dict())
        self.x = torch.randn(5, 6, device=device)
        self.target = torch.tensor([0, 1, 2, 3, -100], device=device)

    def ours(self, x: Tensor, target: Tensor) -> Tensor:
        return CrossEntropyLoss()(self.model(x), target)

    def check(self, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor) -> None:
        self.model.zero_grad()
        self.plain.zero_grad()
        value, right = loss(x, target), F.cross_entropy(self.plain(x), target)
        value.backward()
        right.backward()
        torch.testing.assert_close(value, right)
        for ours, theirs in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend: str, device: str) -> None:
    torch._dynamo.reset()
    step = Step(device)
    compiled = torch.compile(step.ours, fullgraph=True, backend=backend)
    step.check(compiled, step.x, step.target)
    for rows in (7, 9, 1):
        step.check(compiled, torch.randn(rows, 6, device=device), torch.arange(rows, device=device) % 4)


def test_compile_recompiles_once_for_dynamic_shapes(device: str) -> None:
    """Once when the batch first changes, and once for a batch of one."""
    torch._dynamo.reset()
    step, counter = Step(device), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(step.ours, fullgraph=True, backend=counter)
    for rows in (5, 7, 9, 33, 1):
        compiled(torch.randn(rows, 6, device=device), torch.arange(rows, device=device) % 4)
    assert counter.frame_count <= 3


def test_export(device: str) -> None:
    step = Step(device)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(step.model, (step.x,), dynamic_shapes=({0: rows},))
    assert "fusednn.linear" in str(exported.graph)
    x = torch.randn(11, 6, device=device)
    torch.testing.assert_close(exported.module()(x), step.plain(x))


def losses() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    return {
        "linear_relu": (
            lambda w, x: functional.linear_relu(x, w).pow(2).sum(),
            lambda w, x: torch.relu(F.linear(x, w)).pow(2).sum(),
        ),
        "cross_entropy": (
            lambda w, x: functional.cross_entropy(x @ w.T, torch.arange(len(x)) % 4, label_smoothing=0.1),
            lambda w, x: F.cross_entropy(x @ w.T, torch.arange(len(x)) % 4, label_smoothing=0.1),
        ),
    }


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: lambda w, x: grad(f, (0, 1))(w, x[0]),
    "vmap(grad)": lambda f: vmap(grad(f), (None, 0)),
    "grad(vmap)": lambda f: grad(lambda w, x: vmap(f, (None, 0))(w, x).sum()),
    "batched weights": lambda f: lambda w, x: vmap(grad(f))(w.expand(3, 4, 6) * 2, x),
    "jacrev": lambda f: lambda w, x: jacrev(f)(w, x[0]),
    "grad(grad)": lambda f: lambda w, x: grad(lambda v: grad(f)(v, x[0]).pow(2).sum())(w),
}


@loops
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", losses())
def test_torch_func(name: str, transform: str) -> None:
    ours, theirs = losses()[name]
    w, x = torch.randn(4, 6), torch.randn(3, 5, 6)
    torch.testing.assert_close(TRANSFORMS[transform](ours)(w, x), TRANSFORMS[transform](theirs)(w, x))


@loops
@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "grad(vmap)"])
@pytest.mark.parametrize("name", losses())
def test_compile_over_torch_func(name: str, transform: str) -> None:
    """Where torch.compile would trace into an autograd.Function it returns zero gradients, with only a warning."""
    torch._dynamo.reset()
    ours, theirs = losses()[name]
    w, x = torch.randn(4, 6), torch.randn(3, 5, 6)
    compiled = torch.compile(TRANSFORMS[transform](ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w, x), TRANSFORMS[transform](theirs)(w, x))


@loops
def test_per_sample_gradients() -> None:
    step = Step("cpu")

    def loss(model: nn.Module) -> Callable[..., Tensor]:
        return lambda parameters, x, target: F.cross_entropy(functional_call(model, parameters, x), target)

    target = torch.tensor([0, 1, 2, 3, 1])
    for_ours, for_plain = (
        vmap(grad(loss(model)), (None, 0, 0))(dict(model.named_parameters()), step.x, target)
        for model in (step.model, step.plain)
    )
    torch.testing.assert_close(for_ours, for_plain)


@pytest.mark.parametrize("name", losses())
def test_forward_mode_refuses(name: str) -> None:
    """There is no rule for it yet; dropping the tangent would be silent."""
    ours, _ = losses()[name]
    w, x = torch.randn(4, 6), torch.randn(5, 6)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda w: ours(w, x), (w,), (w,))
    with pytest.raises((NotImplementedError, RuntimeError)):
        hessian(lambda w: ours(w, x))(w)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        functional.linear_relu(x, torch.autograd.forward_ad.make_dual(w, w))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, device: str) -> None:
    step = Step(device)
    x = step.x.clone().requires_grad_()
    step.check(lambda x, t: checkpoint(lambda x: step.ours(x, t), x, use_reentrant=use_reentrant), x, step.target)


def test_a_subclass_and_a_mode_go_through_the_operator(device: str) -> None:
    """Where somebody overrides PyTorch's dispatch, the call must not pass them by."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    x, w = torch.randn(5, 6, device=device), torch.randn(4, 6, device=device)
    assert registry.eager(x, w, None, True)
    assert not registry.eager(x, w.as_subclass(Subclass), None, True)
    with Watch():
        functional.linear_relu(x, w)
    assert "fusednn.linear.default" in seen


def test_the_operators_refuse_autograd(device: str) -> None:
    """Called without the Function around them they must not lose a gradient silently."""
    x, w, b, relu = samples(device)["linear"]
    y = torch.ops.fusednn.linear(x, w.requires_grad_(), b, relu)
    with pytest.raises((RuntimeError, UserWarning), match="autograd"):
        y.sum().backward()


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """Nothing syncs: a whole training step can be captured and replayed."""
    step = Step("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.model.zero_grad()
            step.ours(step.x, step.target).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    step.model.zero_grad()
    with torch.cuda.graph(graph):
        loss = step.ours(step.x, step.target)
        loss.backward()
    step.x.copy_(torch.randn_like(step.x))
    graph.replay()
    right = F.cross_entropy(step.plain(step.x), step.target)
    right.backward()
    torch.testing.assert_close(loss, right)
    for ours, theirs in zip(step.model.parameters(), step.plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.gpu
def test_side_stream() -> None:
    step, stream = Step("cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        step.check(step.ours, step.x, step.target)
