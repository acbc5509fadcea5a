"""fusednn.functional.cross_entropy against PyTorch's: gradients of every order, layouts, modes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fusednn import FallbackError, SimpleNN, check_labels, dispatch, functional, reference, strict
from fusednn.kernels import cross_entropy as kernels

REDUCTIONS = ["none", "mean", "sum"]


def batch(m: int, c: int, device: str) -> tuple[Tensor, Tensor]:
    """Logits in float64 that require grad, and labels of which all but the first may be ignored."""
    target = torch.randint(0, c, (m,), device=device)
    target[1::3] = -100
    return torch.randn(m, c, dtype=torch.float64, device=device, requires_grad=True), target


class Problem:
    """Float64 logits with a target, and maybe class weights and smoothing: our loss of them and PyTorch's."""

    def __init__(self, shape: tuple[int, ...], kind: str, reduction: str, device: str) -> None:
        self.x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        classes = shape[1] if len(shape) > 1 else shape[0]
        labels = torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else (), device=device)
        if labels.dim():
            labels[1::3] = -100
        probabilities = torch.rand(shape, dtype=torch.float64, device=device).requires_grad_()
        self.target = probabilities if "probabilities" in kind else labels
        self.leaves = (self.x, probabilities) if "probabilities" in kind else (self.x,)
        weight = torch.rand(classes, dtype=torch.float64, device=device) if "weighted" in kind else None
        self.options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.2 * ("smoothed" in kind)}

    def ours(self, *leaves: Tensor) -> Tensor:
        return functional.cross_entropy(leaves[0], (*leaves, self.target)[1], **self.options)

    def theirs(self, *leaves: Tensor) -> Tensor:
        return F.cross_entropy(leaves[0], (*leaves, self.target)[1], **self.options)


KINDS = ["labels", "smoothed labels", "weighted labels", "weighted smoothed labels", "probabilities",
         "smoothed probabilities", "weighted smoothed probabilities"]  # fmt: skip
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture
def length(request: pytest.FixtureRequest) -> str:
    """How a program has the rows: whole, or in pieces, so that backward computes the gradient."""
    if request.param == "long":
        request.getfixturevalue("long_rows")
    name: str = request.param
    return name


def each_length(test: Any) -> Any:
    """Run `test` with rows that a program holds, and with longer ones."""
    return pytest.mark.usefixtures("length")(pytest.mark.parametrize("length", ["whole", "long"], indirect=True)(test))


@each_length
@EACH_KIND
@EACH_REDUCTION
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 17), (3, 4, 2)], ids=str)
def test_gradcheck(shape: tuple[int, ...], reduction: str, kind: str, device: str) -> None:
    problem = Problem(shape, kind, reduction, device)
    assert gradcheck(problem.ours, problem.leaves, fast_mode=problem.x.numel() > 30)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["labels", "weighted smoothed labels", "weighted smoothed probabilities"])
@pytest.mark.parametrize("shape", [(33, 3), (5, 20), (3, 5, 7), (2, 20, 3)], ids=str)
def test_gradcheck_fast_over_many_programs(shape: tuple[int, ...], kind: str, device: str) -> None:
    problem = Problem(shape, kind, "mean", device)
    assert gradcheck(problem.ours, problem.leaves, fast_mode=True)


@pytest.mark.slow
@EACH_KIND
@pytest.mark.parametrize("shape", [(130, 3), (3, 130), (2, 130, 3)], ids=str)
def test_gradcheck_fast_at_130(shape: tuple[int, ...], kind: str, device: str) -> None:
    problem = Problem(shape, kind, "mean", device)
    assert gradcheck(problem.ours, problem.leaves, fast_mode=True)


@each_length
@EACH_KIND
@EACH_REDUCTION
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)], ids=str)
def test_gradgradcheck(shape: tuple[int, ...], reduction: str, kind: str, device: str) -> None:
    problem = Problem(shape, kind, reduction, device)
    assert gradgradcheck(problem.ours, problem.leaves)


@each_length
@EACH_KIND
@EACH_REDUCTION
def test_against_pytorch_in_every_order(reduction: str, kind: str, device: str) -> None:
    """Loss, first, second and third derivatives, of a function of the loss."""
    problem, results = Problem((5, 4, 3), kind, reduction, device), []
    for loss in (problem.ours, problem.theirs):
        torch.manual_seed(1)
        values = [loss(*problem.leaves)]
        for _ in range(3):
            scalar = (values[-1] * torch.randn_like(values[-1])).pow(2).sum()
            values.append(torch.cat(torch.autograd.grad(scalar, problem.leaves, create_graph=True)))
        results.append(values)
    torch.testing.assert_close(*results)


@each_length
def test_hessian_vector_product_of_a_model(device: str) -> None:
    """Through SimpleNN and the loss, as a second-order optimiser takes it."""
    model, plain = SimpleNN(6, 8, 4, device=device).double(), reference.SimpleNN(6, 8, 4).to(device).double()
    plain.load_state_dict(model.state_dict())
    x, target = torch.randn(9, 6, dtype=torch.float64, device=device), torch.arange(9, device=device) % 4
    products = []
    for net, loss in ((model, functional.cross_entropy), (plain, F.cross_entropy)):
        parameters = list(net.parameters())
        grads = torch.autograd.grad(loss(net(x), target), parameters, create_graph=True)
        torch.manual_seed(1)
        product = sum((grad * torch.randn_like(grad)).sum() for grad in grads)
        products.append(torch.autograd.grad(product, parameters))
    torch.testing.assert_close(*products)


@each_length
@EACH_KIND
def test_unbatched(kind: str, device: str) -> None:
    for reduction in REDUCTIONS:
        problem = Problem((5,), kind, reduction, device)
        ours, theirs = problem.ours(*problem.leaves), problem.theirs(*problem.leaves)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(loss, problem.leaves) for loss in (ours, theirs)))


@each_length
@EACH_KIND
@EACH_REDUCTION
def test_incoming_gradients(reduction: str, kind: str, device: str) -> None:
    """One, another scalar, a vector, an expanded one; and the same again through a retained graph."""
    for shape in ((9, 5), (3, 5, 4)):
        problem = Problem(shape, kind, reduction, device)
        ours, theirs = problem.ours(*problem.leaves), problem.theirs(*problem.leaves)
        one = torch.ones((), dtype=torch.float64, device=device)
        sent = [one.expand_as(theirs), (one * 3).expand_as(theirs), torch.randn_like(theirs)]
        for dloss in (*sent, *sent):
            right = torch.autograd.grad(theirs, problem.leaves, dloss, retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(ours, problem.leaves, dloss, retain_graph=True), right)
        right = torch.autograd.grad(theirs, problem.leaves, sent[1])
        torch.testing.assert_close(torch.autograd.grad(ours, problem.leaves, sent[1]), right)


@each_length
@EACH_KIND
def test_batched_gradients(kind: str, device: str) -> None:
    problem = Problem((4, 5), kind, "none", device)
    eye = torch.eye(4, dtype=torch.float64, device=device)
    both = [
        torch.autograd.grad(loss(*problem.leaves), problem.leaves, eye, is_grads_batched=True)
        for loss in (problem.ours, problem.theirs)
    ]
    torch.testing.assert_close(*both)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "sliced": lambda t: torch.cat([t, t], 3)[..., ::2].contiguous().repeat(2, 2, 2, 2)[::2, : t.shape[1], ::2, ::2],
    "expanded": lambda t: t[:, :, :1, :1].expand_as(t),
}


@each_length
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["weighted labels", "weighted smoothed probabilities"])
@EACH_REDUCTION
def test_layouts(reduction: str, kind: str, layout: str, device: str) -> None:
    problem = Problem((3, 5, 4, 2), kind, reduction, device)
    x = LAYOUTS[layout](problem.x.detach()).requires_grad_()
    target = problem.target.detach()
    target = LAYOUTS[layout](target) if target.dim() == 4 else target.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    results = []
    for operation in (functional.cross_entropy, F.cross_entropy):
        loss = operation(x, target, **problem.options)
        results.append((loss.contiguous(), torch.autograd.grad(loss.pow(2).sum(), x)[0].contiguous()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_blocks_are_not_copied(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the logits, nor their gradient, which lies in memory as they do."""
    seen = []
    forward = kernels.cross_entropy_forward
    monkeypatch.setattr(
        kernels, "cross_entropy_forward", lambda x, *rest: seen.append(x.data_ptr()) or forward(x, *rest)
    )
    x = LAYOUTS[layout](torch.randn(3, 5, 4, 2, device=device)).requires_grad_()
    target = torch.randint(0, 5, (3, 4, 2), device=device)
    (grad,) = torch.autograd.grad(functional.cross_entropy(x, target), x)
    assert seen == [x.data_ptr()]
    assert grad.stride() == x.stride()


def test_unaligned_and_strided_labels(device: str) -> None:
    """`labels[1:]`, a column, and one label for all rows."""
    x, labels = torch.randn(8, 5, device=device), torch.randint(0, 5, (9, 3), device=device)
    for target in (labels[1:, 0].contiguous()[0:], labels.flatten()[1:9], labels[1:, 1], labels[0, 0].expand(8)):
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            ours = functional.cross_entropy(x, target.to(dtype), reduction="none")
            torch.testing.assert_close(ours, F.cross_entropy(x, target, reduction="none"))


@each_length
@pytest.mark.parametrize(
    ("logits", "probabilities"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)],
    ids=str,
)
def test_probabilities_of_another_dtype(logits: torch.dtype, probabilities: torch.dtype, device: str) -> None:
    """The loss has the wider of the two dtypes, each gradient that of its leaf."""
    x = torch.randn(5, 4, device=device).to(logits).requires_grad_()
    q = torch.rand(5, 4, device=device).to(probabilities).requires_grad_()
    ours, theirs = functional.cross_entropy(x, q), F.cross_entropy(x, q)
    tolerance = {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (x, q)) for loss in (ours, theirs)), **tolerance)


def test_class_weights_with_a_gradient_are_pytorchs(device: str) -> None:
    """PyTorch has a gradient for them beside probabilities, and an error beside labels."""
    x, q = torch.randn(5, 4, device=device), torch.rand(5, 4, device=device)
    weight, results = torch.rand(4, device=device, requires_grad=True), []
    for operation in (functional.cross_entropy, F.cross_entropy):
        results.append(torch.autograd.grad(operation(x, q, weight), weight))
    torch.testing.assert_close(*results)
    with strict(), pytest.raises(FallbackError, match="weight"):
        functional.cross_entropy(x, q, weight)


@each_length
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_float16_keeps_small_gradients(scale: float, device: str) -> None:
    """Of the mean over many rows, for one that scales the loss: 1 / rows, applied too soon, takes them out of range."""
    x = torch.randn(512, 100, device=device).half().requires_grad_()
    target = torch.randint(0, 100, (512,), device=device)
    wide = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(F.cross_entropy(wide, target) * scale, wide)
    errors = []
    for operation in (functional.cross_entropy, F.cross_entropy):
        loss = operation(x, target)
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, scale))
        errors.append(((grad.double() - right).abs() / right.abs()).median())
    assert errors[0] <= 2 * errors[1]


@each_length
@EACH_REDUCTION
def test_all_rows_ignored(reduction: str, device: str) -> None:
    """PyTorch's NaN for the mean, zero gradients; of the gradient too."""
    x = torch.randn(4, 3, device=device, requires_grad=True)
    target = torch.full((4,), -100, device=device)
    for weight in (None, torch.rand(3, device=device)):
        loss = functional.cross_entropy(x, target, weight, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(x, target, weight, reduction=reduction), equal_nan=True)
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        assert torch.equal(grad, torch.zeros_like(x))
        assert torch.equal(torch.autograd.grad(grad.sum(), x)[0], torch.zeros_like(x))


@each_length
@EACH_REDUCTION
@pytest.mark.parametrize("rows", [4, 600])  # one program, and several
def test_labels_that_weigh_nothing(rows: int, reduction: str, device: str) -> None:
    """The mean and its gradients are 0 / 0; an ignored row's are 0. With smoothing the kernels' mean is infinite."""
    x = torch.randn(rows, 3, device=device, requires_grad=True)
    target, weight = torch.ones(rows, dtype=torch.int64, device=device), torch.tensor([1.0, 0.0, 2.0], device=device)
    target[0] = -100
    given = {"weight": weight, "reduction": reduction}
    ours, theirs = (f(x, target, **given) for f in (functional.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    for scale in (1.0, 3.0):
        right, grad = (torch.autograd.grad(loss.sum() * scale, x, retain_graph=True)[0] for loss in (theirs, ours))
        torch.testing.assert_close(grad, right, equal_nan=True)


@each_length
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@EACH_REDUCTION
def test_labels_out_of_range(reduction: str, compiled: bool, device: str) -> None:
    """One policy for every reduction, eager and compiled: IndexError on a CPU, a NaN row on a GPU."""
    for shape, bad in (((4, 3), (2,)), ((4, 3, 2), (2, 1))):
        x = torch.randn(shape, device=device, requires_grad=True)
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
        target[bad] = 3

        def loss(x: Tensor, target: Tensor) -> Tensor:
            return functional.cross_entropy(x, target, reduction=reduction)

        if compiled:
            torch._dynamo.reset()
        call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        with pytest.raises(IndexError, match="Target 3 is out of bounds"), check_labels():
            call(x, target)
        if device == "cpu":
            with pytest.raises(IndexError, match="Target 3 is out of bounds"):
                call(x, target)
        else:
            value = call(x, target)
            wrong = torch.zeros_like(target, dtype=torch.bool)
            wrong[bad] = True
            assert torch.equal(value.isnan(), wrong if reduction == "none" else wrong.any())
            nan = torch.autograd.grad(value.sum(), x)[0].isnan()
            assert torch.equal(nan, wrong.unsqueeze(1).expand_as(nan))


def test_check_labels_nests_and_ends(device: str) -> None:
    assert not dispatch.checks_labels()
    with check_labels():
        with check_labels():
            assert dispatch.checks_labels()
        assert dispatch.checks_labels()
    assert not dispatch.checks_labels()


@each_length
@pytest.mark.parametrize("kind", ["weighted labels", "smoothed probabilities"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_float32(dtype: torch.dtype, kind: str, device: str) -> None:
    problem = Problem((6, 5, 2), kind, "mean", device)
    x, target = problem.x.detach().to(dtype).requires_grad_(), problem.target.detach()
    target = target.to(dtype) if target.is_floating_point() else target
    weight = problem.options.pop("weight")
    weight = None if weight is None else weight.to(dtype)
    with torch.autocast(device, dtype=dtype):
        loss = functional.cross_entropy(x, target, weight, **problem.options)
    assert loss.dtype == torch.float32
    # PyTorch adds weights, and smooths probabilities, in the half precision that it gets; on a GPU also under autocast
    target = target.float() if target.is_floating_point() else target
    right = F.cross_entropy(x.float(), target, None if weight is None else weight.float(), **problem.options)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(right, x))


@each_length
def test_the_logits_can_be_used_again(device: str) -> None:
    """Nothing is written to the caller's tensors, nor does the gradient buffer show up anywhere."""
    x, target = batch(9, 5, device)
    h = torch.tanh(x)
    total = functional.cross_entropy(h, target) * 2 + h.pow(2).sum() + functional.cross_entropy(h, target) * 3
    right = F.cross_entropy(h, target) * 5 + h.pow(2).sum()
    (grad,) = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(right, x)[0])


@each_length
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_first_and_second_derivative_in_one_backward(reduction: str, device: str) -> None:
    """The last backward, which may scale the saved gradient in place, also reads it for the second derivative."""
    x, target = batch(4, 3, device)
    results = []
    for operation in (functional.cross_entropy, F.cross_entropy):
        loss = operation(x, target, reduction=reduction)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(3 * loss + g.pow(2).sum(), x)[0])
    torch.testing.assert_close(*results)


@each_length
def test_a_graph_of_the_gradient_keeps_it(device: str) -> None:
    x, target = batch(4, 3, device)
    c, results = torch.randn_like(x), []
    for operation in (functional.cross_entropy, F.cross_entropy):
        a = torch.ones((), dtype=x.dtype, device=device, requires_grad=True)
        loss = operation(x, target)
        (g,) = torch.autograd.grad(a * loss, x, create_graph=True)
        torch.autograd.grad(loss, x, torch.full_like(loss, 3.0))
        results.append(torch.autograd.grad((g.detach() * 0 + g * c).sum(), a)[0])
    torch.testing.assert_close(*results)


@each_length
def test_the_gradient_has_no_graph(device: str) -> None:
    x, target = batch(4, 3, device)
    (grad,) = torch.autograd.grad(2 * functional.cross_entropy(x, target), x)
    assert not grad.requires_grad
    assert grad.is_leaf


@each_length
def test_uint8_labels_and_a_graph(device: str) -> None:
    x = torch.randn(3, 200, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([156, 3, 199], dtype=torch.uint8, device=device)
    both = [
        torch.autograd.grad(operation(x, target), x, create_graph=True)[0]
        for operation in (functional.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*both)


def test_a_lazily_negated_input(device: str) -> None:
    x = torch.randn(4, 3, dtype=torch.complex128, device=device).conj().imag
    assert x.is_neg()
    w, target = torch.randn(5, 3, dtype=torch.float64, device=device), torch.tensor([0, 1, 2, 0], device=device)
    torch.testing.assert_close(functional.linear_relu(x, w), torch.relu(F.linear(x, w)))
    torch.testing.assert_close(functional.cross_entropy(x, target), F.cross_entropy(x, target))


@each_length
def test_a_hook_on_saved_tensors_sees_no_change(device: str) -> None:
    x, target = batch(9, 5, device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = functional.cross_entropy(x, target) * 3
    before = [tensor.clone() for tensor in kept]
    loss.backward()
    assert all(torch.equal(tensor, old) for tensor, old in zip(kept, before, strict=True))
    assert kept


def test_no_gradient_is_computed_without_need(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    plan = kernels.plan_forward
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: seen.append(a[8]) or plan(*a))
    x, target = batch(4, 3, device)
    functional.cross_entropy(x, target)
    functional.cross_entropy(x.detach(), target)
    functional.cross_entropy(x.detach(), x.detach())
    with torch.no_grad():
        functional.cross_entropy(x, target)
    assert seen == [True, False, False, False]


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_legacy_arguments(device: str) -> None:
    x, target = batch(4, 3, device)
    for average, reduce in ((True, None), (False, None), (None, False), (True, True)):
        ours, theirs = (
            f(x, target, size_average=average, reduce=reduce) for f in (functional.cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(ours, theirs)


@each_length
def test_third_derivatives_of_a_row_without_probability(device: str) -> None:
    """Whose masses sum to 0, but not their derivatives."""
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    q, results = torch.zeros_like(x, requires_grad=True), []
    for operation in (functional.cross_entropy, F.cross_entropy):
        torch.manual_seed(1)
        value = operation(x, q)
        for leaf in (x, x, q):
            (value,) = torch.autograd.grad((value * torch.randn_like(value)).sum(), leaf, create_graph=True)
        results.append(value)
    torch.testing.assert_close(*results)


@each_length
def test_logits_of_inference_mode(device: str) -> None:
    """They cannot be saved for backward, which the gradient of probabilities needs."""
    with torch.inference_mode():
        x = torch.randn(4, 5, device=device)
    q = torch.rand(4, 5, device=device, requires_grad=True)
    both = [torch.autograd.grad(f(x, q), q)[0] for f in (functional.cross_entropy, F.cross_entropy)]
    torch.testing.assert_close(*both)


def test_gradients_of_class_weights_under_transforms() -> None:
    """Which `requires_grad` does not tell of there: PyTorch serves, and none is lost."""
    x, q, weights = torch.randn(4, 5), torch.rand(4, 5), torch.rand(3, 5)
    results = []
    for f in (functional.cross_entropy, F.cross_entropy):
        over = torch.func.grad(lambda w, f=f: torch.func.vmap(lambda w: f(x, q, w))(w).sum())
        of_one = torch.compile(torch.func.grad(lambda w, f=f: f(x, q, w)), fullgraph=True, backend="aot_eager")
        results.append((over(weights), of_one(weights[0])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_small_labels_without_triton(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """PyTorch takes uint8 for [N, C] alone, and the others nowhere."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    x, target = torch.randn(shape), torch.randint(4, (shape[0], *shape[2:]))
    expected = F.cross_entropy(x, target)
    torch.testing.assert_close(functional.cross_entropy(x, target.to(dtype)), expected)
    assert dispatch.explain(functional.cross_entropy, x, target.to(dtype))[0].implementation == "PyTorch"
