"""The operations on whatever hypothesis comes up with, against PyTorch in float64: shapes, strides, all arguments."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusednn import functional
from tests.accuracy import DTYPES, UNIT, assert_product

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@st.composite
def views(draw: Any, shape: tuple[int, ...]) -> Any:
    """A function that gives a tensor of `shape` other strides and leaves its values, but where it expands them."""
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    expanded = draw(st.lists(st.sampled_from([False, False, False, True]), min_size=len(shape), max_size=len(shape)))
    back = [order.index(i) for i in range(len(shape))]

    def view(tensor: Tensor) -> Tensor:
        large = tensor.new_zeros([size * by + 1 for size, by in zip(shape, step, strict=True)])
        part = large.permute(order).contiguous().permute(back)[tuple(slice(1, None, by) for by in step)]
        part.copy_(tensor)
        for dim, expand in enumerate(expanded):
            if expand and shape[dim]:
                part = part.narrow(dim, 0, 1).expand_as(part)
        return part

    return view


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Logits, target, the other arguments, and which of the two has a gradient."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    classes = draw(st.integers(1, 21))
    if draw(st.integers(0, 9)) == 0:
        shape: tuple[int, ...] = (classes,)
    else:
        blocks = draw(st.lists(st.integers(0, 4) if draw(st.booleans()) else st.integers(1, 4), max_size=3))
        shape = (draw(st.integers(0, 9)), classes, *blocks)
    without = shape[:1] + shape[2:] if len(shape) > 1 else ()
    dtype = draw(st.sampled_from(DTYPES))
    x = draw(views(shape))((torch.randn(shape) * draw(st.sampled_from([1.0, 20.0]))).to(dtype))
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(2 * classes).to(dtype)[:: draw(st.integers(1, 2))][:classes]
        weight[: draw(st.integers(0, 1))] = 0
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    smoothing = draw(st.one_of(st.just(0.0), st.floats(0, 1)))
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    if draw(st.booleans()):
        target = draw(views(shape))(torch.rand(shape).to(dtype))
    else:
        kind = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]))
        ignored = draw(st.one_of(st.integers(0, classes - 1), st.integers(-100, 100), st.integers(-(2**60), 2**60)))
        target = torch.randint(0, classes, without)
        if torch.iinfo(kind).min <= ignored <= torch.iinfo(kind).max:
            target = torch.where(torch.rand(without) < 0.3, ignored, target)
        target = draw(views(without))(target.to(kind))
        options["ignore_index"] = ignored
    needs = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    return {"x": x, "target": target, "options": options, "needs": needs, "dloss": draw(st.sampled_from([1.0, -3.0]))}


def results(operation: Any, x: Tensor, target: Tensor, call: dict[str, Any], options: dict[str, Any]) -> list[Tensor]:
    """The loss, and the gradients of a leaf of the strides given."""
    needs_x, needs_target = call["needs"]
    leaves = []
    if needs_x or not target.is_floating_point():
        leaves.append(x.requires_grad_())
    if needs_target and target.is_floating_point():
        leaves.append(target.requires_grad_())
    loss = operation(x, target, **options)
    sent = torch.full_like(loss, call["dloss"])
    if loss.dim():
        sent = sent * torch.linspace(0.5, 1, loss.numel()).reshape(loss.shape).to(sent.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, sent)]


@pytest.mark.usefixtures("small_tiles")
@QUICK
@given(call=calls())
def test_cross_entropy(call: dict[str, Any]) -> None:
    x, target, options = call["x"], call["target"], call["options"]
    wide = target.double() if target.is_floating_point() else target.long()
    exact = {**options, "weight": None if options["weight"] is None else options["weight"].double()}
    ours = results(functional.cross_entropy, x.detach(), target.detach(), call, options)
    right = results(F.cross_entropy, x.detach().double(), wide.detach(), call, exact)
    unit = UNIT[x.dtype]
    for value, wanted in zip(ours, right, strict=True):
        assert value.dtype == x.dtype
        assert value.shape == wanted.shape
        finite = wanted.isfinite()
        size = wanted[finite].abs().max().item() if finite.any() else 0.0
        assert torch.equal(value.isnan(), wanted.isnan())
        # the wider the target the more terms; a float16 result may leave the range of its dtype, not of the reference
        tolerance = {"rtol": 40 * unit, "atol": 200 * unit * max(size, 1e-3)}
        within = finite & (wanted.abs() < torch.finfo(x.dtype).max)
        torch.testing.assert_close(value[within].double(), wanted[within], **tolerance)
    assert torch.equal(x, call["x"])


@st.composite
def layers(draw: Any) -> dict[str, Any]:
    """x, W, b and the incoming gradient of any strides, and which of the first three want a gradient."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    sizes = st.one_of(st.integers(0, 3), st.integers(1, 40))
    leading, n, k = draw(st.lists(st.integers(0, 4), max_size=2)), draw(sizes), draw(sizes)
    leading = draw(st.sampled_from([leading, [draw(sizes)]]))
    dtype = draw(st.sampled_from(DTYPES))
    shapes = {"x": (*leading, k), "w": (n, k), "b": (n,), "dy": (*leading, n)}
    tensors = {name: draw(views(shape))(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    if draw(st.booleans()):
        tensors["b"] = None
    needs = {name: draw(st.booleans()) for name in ("x", "w", "b") if tensors[name] is not None}
    return tensors | {"needs": needs, "relu": draw(st.booleans())}


@pytest.mark.usefixtures("small_tiles")
@QUICK
@given(call=layers())
def test_linear(call: dict[str, Any]) -> None:
    x, w, b, dy = (call[name] for name in ("x", "w", "b", "dy"))
    before = [None if tensor is None else tensor.clone() for tensor in (x, w, b, dy)]
    leaves = {name: call[name].detach().requires_grad_(need) for name, need in call["needs"].items()}
    operation = functional.linear_relu if call["relu"] else functional.linear
    y = operation(leaves["x"], leaves["w"], leaves.get("b"))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, dy) if wanted else [])
    for tensor, old in zip((x, w, b, dy), before, strict=True):
        assert tensor is None or torch.equal(tensor, old)

    x, w, dy = (tensor.double().flatten(0, -2) if tensor.dim() > 1 else tensor.double()[None] for tensor in (x, w, dy))
    exact, magnitude = x @ w.T, x.abs() @ w.abs().T
    if b is not None:
        exact, magnitude = exact + b.double(), magnitude + b.double().abs()
    if call["relu"]:
        exact = exact.clamp(min=0)
    assert y.shape == call["dy"].shape
    y = y.detach().reshape(exact.shape)
    assert_product(y, exact, magnitude)
    g = torch.where(y <= 0, 0, dy) if call["relu"] else dy
    rights = {"x": (g @ w, g.abs() @ w.abs()), "w": (g.T @ x, g.abs().T @ x.abs()), "b": (g.sum(0), g.abs().sum(0))}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            grad, (right, size) = next(grads), rights[name]
            assert grad.shape == leaf.shape
            assert grad.dtype == leaf.dtype
            assert_product(grad.reshape(right.shape), right, size)
