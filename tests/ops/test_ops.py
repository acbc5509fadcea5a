"""The operators in the PyTorch world, with Triton running: opcheck, compile, export, torch.func, checkpointing.

On the plain CPU path no operator runs and such a test would prove nothing: these run the kernels in the interpreter.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fusednn import CrossEntropyLoss, FallbackError, SimpleNN, explain, functional, reference, strict
from fusednn.kernels import linear as linear_kernels
from fusednn.ops import registry

# vmap runs an operator without a batching rule in a loop and warns of it
loops = pytest.mark.filterwarnings("ignore:There is a performance drop")


def samples(device: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Operators and arguments, by a name that tells what is special about them."""
    x, w, b, dy = (torch.randn(s, device=device) for s in ((5, 6), (4, 6), (4,), (5, 4)))
    y = torch.relu(dy)
    target = torch.tensor([0, 1, 2, 3, -100], device=device)
    blocks, labels, weight = torch.randn(5, 4, 3, device=device), target[:, None].expand(5, 3), b.abs()
    two, total = torch.tensor(2.0, device=device), torch.tensor(4.0, device=device)
    chunked, statistics = (x, w, b, target, weight, -100), torch.rand(3, 15, device=device) + 1
    long = (two, dy, target, weight, statistics[:, :5].contiguous(), total, -100)
    return {
        "linear": ("linear", (x, w, b, True)),
        "linear_input_grad": ("linear_input_grad", (dy, y, w)),
        "linear_weight_grad": ("linear_weight_grad", (dy, None, x, True, False)),
        "cross_entropy": ("cross_entropy", (dy, target, None, -100, "mean", 0.1, True)),
        "cross_entropy, blocks": ("cross_entropy", (blocks, labels, weight, -100, "none", 0.1, True)),
        "cross_entropy, transposed": ("cross_entropy", (x.T, target[:4].repeat(2)[:6], None, -100, "sum", 0.0, True)),
        "cross_entropy, no gradient": ("cross_entropy", (dy, target, None, -100, "none", 0.0, False)),
        "cross_entropy, float16": ("cross_entropy", (dy.half(), target, None, -100, "mean", 0.0, False)),
        "soft_cross_entropy": ("soft_cross_entropy", (dy, dy.softmax(1), weight, "mean", 0.1, True, True)),
        "soft_cross_entropy, blocks": ("soft_cross_entropy", (blocks, blocks, None, "none", 0.0, True, False)),
        "soft_cross_entropy, no gradient": ("soft_cross_entropy", (dy, dy, None, "sum", 0.0, False, False)),
        "long_cross_entropy": ("long_cross_entropy", (dy, target, weight, -100, "mean", 0.1)),
        "long_cross_entropy, blocks": ("long_cross_entropy", (blocks, blocks, None, -100, "none", 0.0)),
        "long_cross_entropy_gradient": ("long_cross_entropy_gradient", (*long, "mean", 0.1, True, False)),
        "long_cross_entropy_gradient, probabilities": (
            "long_cross_entropy_gradient",
            (labels.float(), blocks, blocks, weight, statistics, total, -100, "none", 0.0, True, True),
        ),
        "scale_gradient": ("scale_gradient", (two, dy, target, None, -100)),
        "scale_gradient, blocks": ("scale_gradient", (labels.float(), blocks, labels, None, -100)),
        "scale_gradient, divided": ("scale_gradient", (two, dy, None, total, 0, torch.bfloat16)),
        "linear_cross_entropy": ("linear_cross_entropy", (*chunked, "mean", 0.1, 2, True, True, True)),
        "linear_cross_entropy, rows": ("linear_cross_entropy", (*chunked, "none", 0.0, 2, False, False, False)),
        "linear_cross_entropy_rows_backward": (
            "linear_cross_entropy_rows_backward",
            (b[[0, 1, 2, 3, 0]], *chunked, 0.0, 2, True, False, True),
        ),
    }


@pytest.mark.parametrize("name", samples("cpu"))
def test_opcheck(name: str, device: str) -> None:
    operator, arguments = samples(device)[name]
    results = torch.library.opcheck(getattr(torch.ops.fusednn, operator).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_has_a_sample() -> None:
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusednn::")}
    assert {operator.split(".")[0] for operator in defined} == {operator for operator, _ in samples("cpu").values()}


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
    step, counter = Step(device), CompileCounter()
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


def of_logits(**options: Any) -> Callable[[Any], Callable[[Tensor, Tensor], Tensor]]:
    """A loss (w, x) of an implementation of cross entropy."""
    return lambda f: lambda w, x: f(x @ w.T, torch.arange(x.shape[0]) % 4, **options)


def of_probabilities(f: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, x: f(x @ w.T, (x.flip(0) @ w.T).softmax(1), torch.arange(1.0, 5.0), label_smoothing=0.1)


def of_blocks(f: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        logits = x @ w.T
        labels = torch.arange(2 * x.shape[0]).reshape(-1, 2) % 4
        return f(torch.stack((logits, logits * 2), 2), labels, torch.arange(1.0, 5.0), reduction="none").pow(2).sum()

    return loss


def chunked(f: Any, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """`f`: linear_cross_entropy, in chunks of 2 rows, or PyTorch's."""
    return lambda w, x: f(x, w, torch.arange(x.shape[0]) % 4, **options).pow(2).sum()


def composed(x: Tensor, w: Tensor, labels: Tensor, chunk_rows: int, reduction: str) -> Tensor:
    return F.cross_entropy(F.linear(x, w), labels, reduction=reduction)


def losses() -> dict[str, "Pair"]:
    """Ours and PyTorch's loss of w and x, by name."""
    both = functional.cross_entropy, F.cross_entropy
    weights = {"weight": torch.arange(1.0, 5.0), "ignore_index": 1}
    chunks = functional.linear_cross_entropy, composed
    return {
        "linear_relu": (
            lambda w, x: functional.linear_relu(x, w).pow(2).sum(),
            lambda w, x: torch.relu(F.linear(x, w)).pow(2).sum(),
        ),
        "cross_entropy": tuple(of_logits(label_smoothing=0.1)(f) for f in both),
        "cross_entropy, weighted": tuple(of_logits(**weights)(f) for f in both),
        "cross_entropy, probabilities": tuple(of_probabilities(f) for f in both),
        "cross_entropy, blocks": tuple(of_blocks(f) for f in both),
        "cross_entropy, long": tuple(of_logits(label_smoothing=0.1, ignore_index=1)(f) for f in both),
        "cross_entropy, long, probabilities": tuple(of_probabilities(f) for f in both),
        "cross_entropy, long, blocks": tuple(of_blocks(f) for f in both),
        "linear_cross_entropy": tuple(chunked(f, chunk_rows=2, reduction="mean") for f in chunks),
        "linear_cross_entropy, rows": tuple(chunked(f, chunk_rows=2, reduction="none") for f in chunks),
    }


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]


@pytest.fixture
def pair(name: str, request: pytest.FixtureRequest) -> Pair:
    """Ours and PyTorch's loss of this name; its rows are long where the name says so."""
    if "long" in name:
        request.getfixturevalue("long_rows")
    return losses()[name]


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
def test_torch_func(pair: Pair, transform: str) -> None:
    ours, theirs = pair
    w, x = torch.randn(4, 6), torch.randn(3, 5, 6)
    torch.testing.assert_close(TRANSFORMS[transform](ours)(w, x), TRANSFORMS[transform](theirs)(w, x))


@loops
@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "grad(vmap)"])
@pytest.mark.parametrize("name", losses())
def test_compile_over_torch_func(pair: Pair, transform: str) -> None:
    """Where torch.compile would trace into an autograd.Function it returns zero gradients, with only a warning."""
    torch._dynamo.reset()
    ours, theirs = pair
    w, x = torch.randn(4, 6), torch.randn(3, 5, 6)
    compiled = torch.compile(TRANSFORMS[transform](ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w, x), TRANSFORMS[transform](theirs)(w, x))


@pytest.mark.parametrize("name", losses())
def test_compile_without_a_gradient(pair: Pair) -> None:
    """Inference, under no_grad and of tensors that require none: no Function is in the way, the operator is."""
    torch._dynamo.reset()
    ours, theirs = pair
    w, x = torch.randn(4, 6), torch.randn(5, 6)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(w, x), theirs(w, x))
    with torch.no_grad():
        model = Step("cpu").model
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("operation", ["linear", "linear_relu"])
def test_a_graph_of_batched_gradients(operation: str) -> None:
    """`is_grads_batched=True` with a graph: its second derivative must not get lost with the batch."""

    def second(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (4, 6), (4,)))
        jacobian = torch.autograd.functional.jacobian(
            lambda *a: f(*a).pow(2).sum(0), (x, w, b), vectorize=True, create_graph=True
        )
        return torch.autograd.grad(sum(j.pow(2).sum() for j in jacobian), (x, w, b))

    theirs = {"linear": F.linear, "linear_relu": lambda x, w, b: torch.relu(F.linear(x, w, b))}[operation]
    torch.testing.assert_close(second(getattr(functional, operation)), second(theirs))


def test_an_empty_batch_of_vmap() -> None:
    w, x = torch.randn(4, 6), torch.zeros(0, 5, 6)
    f, g = losses()["linear_relu"]
    torch.testing.assert_close(vmap(f, (None, 0))(w, x), vmap(g, (None, 0))(w, x))
    assert vmap(functional.linear, (0, None))(x, w).shape == (0, 5, 4)
    assert vmap(grad(f, 1), (None, 0))(w, x).shape == x.shape


def launched(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the linear kernels that `call` launches, in order."""
    names: list[str] = []

    def launch(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.__name__.removesuffix("_kernel"))
        original(kernel, *arguments)

    original = linear_kernels.launch
    monkeypatch.setattr(linear_kernels, "launch", launch)
    call()
    return names


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the gradients asked for. vmap adds none: its batch is folded into the rows.

    A gradient for each of its elements is a batched product, which PyTorch has.
    """
    f = losses()["linear_relu"][0]
    w, x = torch.randn(4, 6), torch.randn(3, 5, 6)
    forward, dx, dw = "linear_forward", "linear_input_grad", "linear_weight_grad"
    both, batch = grad(f, (0, 1)), (None, 0)
    for call, kernels in (
        (lambda: f(w, x[0]), [forward]),
        (lambda: vmap(f, batch)(w, x), [forward]),
        (lambda: vmap(f, (None, 1))(w, x), [forward]),
        (lambda: vmap(vmap(f, batch), batch)(w, x[None].expand(2, 3, 5, 6)), [forward]),
        (lambda: both(w, x[0]), [forward, dx, dw]),
        (lambda: grad(f)(w, x[0]), [forward, dw]),  # a first layer, whose input needs no gradient
        (lambda: grad(f, 1)(w, x[0]), [forward, dx]),
        (lambda: grad(lambda w, x: vmap(f, batch)(w, x).sum(), (0, 1))(w, x), [forward, dx, dw]),
        (lambda: vmap(both, batch)(w, x), [forward, dx]),
        (lambda: jacrev(functional.linear_relu, 0)(x[0], w), [forward, dx]),
        (lambda: vmap(f)(w.expand(3, 4, 6) * 2, x), []),
        (lambda: vmap(functional.linear_relu, (0, None, 0))(x, w, torch.randn(3, 4)), [forward]),
    ):
        assert launched(call, monkeypatch) == kernels


def test_explain_tells_of_batched_products() -> None:
    f = losses()["linear_relu"][0]
    w, x = torch.randn(3, 4, 6), torch.randn(3, 5, 6)
    (weights,) = explain(vmap(f), w, x)
    assert (weights.operation, weights.implementation) == ("linear_relu", "PyTorch")
    assert "vmap" in weights.reason
    decisions = explain(vmap(grad(f), (None, 0)), w[0], x)
    assert [(d.operation, d.implementation) for d in decisions] == [
        ("linear_relu", "Triton interpreter"),
        ("linear_weight_grad", "PyTorch"),
    ]
    with strict(), pytest.raises(FallbackError, match="vmap"):
        vmap(f)(w, x)


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (None, 0, None), (None, None, 1), (1, 1, 2), (0, None, 0)], ids=str
)
def test_vmap_over_any_operands(in_dims: tuple[int | None, ...]) -> None:
    """Values, gradients and gradients of those, whichever operands are batched, and along any dimension."""
    plain = {"w": torch.randn(4, 6), "b": torch.randn(4), "x": torch.randn(5, 6)}
    operands = []
    for tensor, dim in zip(plain.values(), in_dims, strict=True):
        batched = torch.randn(3, *tensor.shape, dtype=torch.float64)
        operands.append(tensor.double() if dim is None else batched.movedim(0, dim))

    def first(f: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad(lambda w, b, x: f(x, w, b).pow(3).sum(), (0, 1, 2))

    def second(f: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad(lambda *a: sum(g.pow(2).sum() for g in first(f)(*a)), (0, 1, 2))

    for order in (lambda f: lambda w, b, x: f(x, w, b), first, second):
        ours = vmap(order(functional.linear_relu), in_dims)(*operands)
        right = vmap(order(lambda x, w, b: torch.relu(F.linear(x, w, b))), in_dims)(*operands)
        torch.testing.assert_close(ours, right)


def test_an_ensemble_of_models() -> None:
    """torch.func.stack_module_state: each model has weights of its own."""
    models = [SimpleNN(6, 8, 4) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(5, 6)
    y = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("when", ["imported before", "made before"])
def test_flops_are_counted_as_pytorchs(when: str) -> None:
    """The counter may have been made before our first operator told it."""
    step, (w, x) = Step("cpu"), (torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True))
    labels = torch.tensor([0, 1, 2, 3, 0])

    def count(call: Callable[[], Tensor]) -> int:
        counter = FlopCounterMode(display=False)
        if when == "made before":
            for operator in registry._flops:
                counter.flop_registry.pop(operator, None)
        with counter:
            call().backward()
        return counter.get_total_flops()

    assert count(lambda: step.ours(step.x, step.target)) == 2 * 5 * (2 * 6 * 8 + 3 * 8 * 4)
    assert count(lambda: F.cross_entropy(step.plain(step.x), step.target)) == 2 * 5 * (2 * 6 * 8 + 3 * 8 * 4)
    for reduction, products in (("mean", 3), ("none", 4)):  # "none" computes the logits again
        call = partial(functional.linear_cross_entropy, x, w, labels, reduction=reduction, chunk_rows=2)
        assert count(lambda call=call: call().sum()) == products * 2 * 5 * 6 * 4


def test_importing_fusednn_does_not_import_the_flop_counter() -> None:
    """Which imports Triton, for a quarter of a second."""
    program = "import sys, fusednn; sys.exit('torch.utils.flop_counter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_symbolic_trace() -> None:
    """torch.fx sees our functions as it sees PyTorch's: one node each."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = SimpleNN(6, 8, 4), CrossEntropyLoss(label_smoothing=0.1)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.criterion(self.model(x), target)

    loss, x, target = Loss(), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, -100])
    traced = torch.fx.symbolic_trace(loss)
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert functions == [functional.linear_relu, functional.linear, functional.cross_entropy]
    torch.testing.assert_close(traced(x, target), loss(x, target))


def test_torch_function_overrides_ours_too() -> None:
    """A subclass or a mode that overrides PyTorch's functions sees ours with all their arguments."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__module__ == "fusednn.functional":
                seen.append((func, kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs)

    x, w, labels = torch.randn(5, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 3, 0])
    for arguments in ((x.as_subclass(Logged), w), (x, w.as_subclass(Logged))):
        y = functional.linear_relu(*arguments)
        assert type(y) is Logged
        torch.testing.assert_close(y.as_subclass(torch.Tensor), functional.linear_relu(x, w))
    functional.linear(x.as_subclass(Logged), w)
    options = {"weight": torch.rand(4), "ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1}
    for call, arguments in (
        (functional.cross_entropy, (x @ w.T, labels)),
        (functional.linear_cross_entropy, (x, w, labels)),
    ):
        logged = call(arguments[0].as_subclass(Logged), *arguments[1:], **options)
        torch.testing.assert_close(logged.as_subclass(torch.Tensor), call(*arguments, **options))
    names = [func.__name__ for func, _ in seen]
    assert names == ["linear_relu", "linear_relu", "linear", "cross_entropy", "linear_cross_entropy"]
    assert all(kwargs[name] == value for name, value in list(options.items())[1:] for _, kwargs in seen[3:])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load's own, in torch 2.11
def test_export_and_reload(tmp_path: Path) -> None:
    step, path = Step("cpu"), tmp_path / "model.pt2"
    rows = torch.export.Dim("rows", min=2)
    torch.export.save(torch.export.export(step.model, (step.x,), dynamic_shapes=({0: rows},)), path)
    x = torch.randn(9, 6)
    torch.testing.assert_close(torch.export.load(path).module()(x), step.plain(x))


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


@pytest.mark.parametrize(
    "name",
    ["linear_relu", "cross_entropy", "cross_entropy, long", "linear_cross_entropy", "linear_cross_entropy, rows"],
)
def test_forward_mode_refuses(pair: Pair) -> None:
    """There is no rule for it yet; dropping the tangent would be silent. (With class weights PyTorch serves.)"""
    ours, _ = pair
    w, x = torch.randn(4, 6), torch.randn(5, 6)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda w: ours(w, x), (w,), (w,))
    with pytest.raises((NotImplementedError, RuntimeError)):
        hessian(lambda w: ours(w, x))(w)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        functional.linear_relu(x, torch.autograd.forward_ad.make_dual(w, w))


@pytest.mark.parametrize("name", list(losses())[1:])
def test_compile_each_loss(pair: Pair) -> None:
    """Static shapes, then others; values and gradients."""
    torch._dynamo.reset()
    ours, theirs = pair
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for rows in (5, 7, 9, 1):
        w, x = torch.randn(4, 6, requires_grad=True), torch.randn(rows, 6, requires_grad=True)
        value, right = compiled(w, x), theirs(w, x)
        torch.testing.assert_close(value, right)
        gradients = (torch.autograd.grad(loss * 3, (w, x)) for loss in (value, right))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # sums of machines with other vectors differ


@pytest.mark.parametrize("length", ["whole", "long"])
def test_compile_images_of_several_sizes(length: str, request: pytest.FixtureRequest) -> None:
    """[B, C, H, W] whose strides are then symbols: the second size compiles once more, and no third."""
    if length == "long":
        request.getfixturevalue("long_rows")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(functional.cross_entropy, fullgraph=True, backend=counter)
    for size in (4, 6, 5, 7):
        x, target = torch.randn(2, 5, size, size, requires_grad=True), torch.randint(5, (2, size, size))
        both = compiled(x, target), F.cross_entropy(x, target)
        torch.testing.assert_close(*both)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in both))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", losses())
def test_vjp_is_called_when_its_transform_has_ended(pair: Pair) -> None:
    results, (w, x) = [], (torch.randn(4, 6), torch.randn(5, 6))
    for loss in pair:
        value, pull = torch.func.vjp(loss, w, x)
        results.append((value, *pull(torch.full_like(value, 0.5))))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("long_rows")
def test_export_for_any_number_of_classes() -> None:
    """What is exported has no gradient, so that it matters for nothing whether a program holds the rows."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return functional.cross_entropy(x * self.scale, target)

    target = torch.zeros(5, dtype=torch.int64)
    exported = torch.export.export(
        Loss(), (torch.randn(5, 6), target), dynamic_shapes=({1: torch.export.Dim("c")}, None)
    )
    for classes in (2, 40):
        x = torch.randn(5, classes)
        torch.testing.assert_close(exported.module()(x, target), F.cross_entropy(x, target))


@pytest.mark.parametrize("name", list(losses())[1:])
def test_export_each_loss(pair: Pair) -> None:
    ours, theirs = pair

    class Loss(nn.Module):
        def forward(self, w: Tensor, x: Tensor) -> Tensor:
            return ours(w, x)

    w, x = torch.randn(4, 6), torch.randn(5, 6)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(Loss(), (w, x), dynamic_shapes=(None, {0: rows}))
    assert "fusednn." in str(exported.graph)
    for rows in (3, 8):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(exported.module()(w, x), theirs(w, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", list(losses())[1:])
def test_activation_checkpointing_of_each_loss(pair: Pair, use_reentrant: bool) -> None:
    ours, theirs = pair
    w, x = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    value, right = checkpoint(ours, w, x, use_reentrant=use_reentrant), theirs(w, x)
    right_grads = torch.autograd.grad(right, (w, x))
    value.backward()  # the reentrant kind takes no autograd.grad
    torch.testing.assert_close((w.grad, x.grad), right_grads)


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
    x, w, b, relu = samples(device)["linear"][1]
    y = torch.ops.fusednn.linear(x, w.requires_grad_(), b, relu)
    with pytest.raises((RuntimeError, UserWarning), match="autograd"):
        y.sum().backward()


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """Nothing syncs: a whole training step can be captured and replayed."""
    step = Step("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
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
