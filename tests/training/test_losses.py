"""Every loss, weights of rows, scales of loss and decay, and clipping: each engine as the reference loop trains."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import fusednn
from fusednn import make_train_step, reference, train_steps
from fusednn.training.engines import captured
from fusednn.training.job import check

from .runs import INPUTS, ROWS, Run, assert_alike, data, one_call, train
from .test_any_net import chain

OUTPUTS = 5
VALUES = torch.tensor([0.3, 1.5, 1.0, 0.0, 2.0])

CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "labels": nn.CrossEntropyLoss,
    "labels, options": lambda **r: nn.CrossEntropyLoss(VALUES.clone(), ignore_index=1, label_smoothing=0.2, **r),
    "probabilities": nn.CrossEntropyLoss,
    "probabilities, options": lambda **r: nn.CrossEntropyLoss(VALUES.clone(), label_smoothing=0.2, **r),
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "smooth_l1": lambda **r: nn.SmoothL1Loss(beta=0.7, **r),
    "huber": lambda **r: nn.HuberLoss(delta=0.4, **r),
    "bce": nn.BCEWithLogitsLoss,
    "bce, options": lambda **r: nn.BCEWithLogitsLoss(VALUES.clone(), pos_weight=VALUES.flip(0), **r),
    "poisson": nn.PoissonNLLLoss,
    "fusednn's": fusednn.CrossEntropyLoss,
}
HAVE_CLASSES = ("labels", "probabilities", "bce", "fusednn's")
DEPTHS = {1: ["identity"], 2: ["relu", "identity"], 3: ["tanh", "gelu", "identity"]}


def targets_of(name: str, device: str, dtype: torch.dtype = torch.float32, outputs: int = OUTPUTS) -> Tensor:
    """Targets that such a loss takes, [ROWS] or [ROWS, outputs]."""
    generator = torch.Generator().manual_seed(5)
    if name.startswith(("labels", "fusednn")):
        return torch.randint(outputs, (ROWS,), generator=generator).to(device)
    values = torch.randn(ROWS, outputs, generator=generator, dtype=torch.float64)
    if name.startswith("probabilities"):
        values = values.softmax(1)
    elif name.startswith("bce"):
        values = (values > 0).double()
    elif name == "poisson":
        values = values.abs().round()
    return values.to(device, dtype)


def setting(name: str, depth: int, device: str, dtype: torch.dtype, **reduction: str) -> tuple[Any, ...]:
    """A net of so many Linears, inputs, targets and a criterion."""
    model = chain(device, [*[INPUTS, 17, 12][:depth], OUTPUTS], DEPTHS[depth], [True] * depth).to(dtype)
    criterion = CRITERIA[name](**reduction).to(device, dtype)
    return model, data(device)[0].to(dtype), targets_of(name, device, dtype), criterion


def both(model: nn.Module, x: Tensor, targets: Tensor, **arguments: Any) -> tuple[Run, Run]:
    """Trained by train_steps, and by the reference loop."""
    given = {"steps": 4, "batch_size": 24, "make": lambda p: SGD(p, lr=0.05)} | arguments
    ours, theirs = (train(loop, model, x, targets, **given) for loop in (train_steps, reference.train_steps))
    return ours, theirs


def distances(run: Run, exact: Run) -> list[float]:
    """How far its losses, relatively, and its parameters are from those of a run in float64."""
    pairs = [*zip(run.model.parameters(), exact.model.parameters(), strict=True)]
    of_losses = (run.losses.double() / exact.losses - 1).abs().max().item()
    return [of_losses, *((ours.double() - theirs).abs().max().item() for ours, theirs in pairs)]


EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", CRITERIA)
def test_as_the_loop(name: str, depth: int, reduction: str, device: str) -> None:
    """In float64 to its digits; in float32 at most four times as far from that as PyTorch is."""
    runs = {}
    for dtype in (torch.float64, torch.float32):
        model, x, targets, criterion = setting(name, depth, device, dtype, reduction=reduction)
        lr = 0.05 if reduction == "mean" else 1e-3
        given = {"criterion": criterion, "make": lambda p, lr=lr: SGD(p, lr=lr, momentum=0.9)}
        ours, theirs = both(model, x, targets, **given, return_accuracy=name.startswith(HAVE_CLASSES))
        assert ours.engine == one_call(device)
        runs[dtype] = ours, theirs
    assert_alike(*runs[torch.float64], **EXACT)
    exact = runs[torch.float64][1]
    ours, theirs = (max(distances(run, exact)) for run in runs[torch.float32])
    assert ours <= 4 * max(theirs, 1e-7)
    if name.startswith(HAVE_CLASSES):
        assert torch.equal(runs[torch.float32][0].accuracies, runs[torch.float32][1].accuracies)


EDGES = [0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e30, -1e30]


@pytest.mark.parametrize("name", [name for name in CRITERIA if not name.startswith(("labels", "fusednn"))])
def test_where_numbers_end(name: str, device: str) -> None:
    """NaN, infinite and huge outputs and targets: the loss of each row, and what it leaves of a bias, are PyTorch's."""
    identity = nn.Linear(1, 1, device=device, dtype=torch.float64)
    with torch.no_grad():
        identity.weight.fill_(1.0), identity.bias.fill_(0.0)
    options = {"weight": torch.tensor([1.5]), "pos_weight": torch.tensor([0.5])} if name == "bce, options" else {}
    criterion = (nn.BCEWithLogitsLoss(**options) if options else CRITERIA[name.split(",")[0]]()).to(device).double()
    for output in EDGES:
        for target in EDGES:
            x, t = (torch.full((1, 1), value, device=device, dtype=torch.float64) for value in (output, target))
            arguments = {"criterion": criterion, "steps": 1, "return_accuracy": False}
            found = []
            for loop in (train_steps, reference.train_steps):
                model = copy.deepcopy(identity)
                losses = loop(model, SGD(model.parameters(), lr=1.0), x, t, **arguments)
                found.append(torch.cat([losses, model.bias.detach()]))
            torch.testing.assert_close(*found, equal_nan=True, rtol=1e-12, atol=0.0, msg=f"{output} and {target}")


WEIGHTED = {
    "random": lambda: torch.rand(ROWS),
    "some of no weight": lambda: (torch.rand(ROWS) < 0.5).float(),
    "none of any": lambda: torch.zeros(ROWS),
    "negative": lambda: torch.randn(ROWS),
    "strided": lambda: torch.rand(ROWS, 3)[:, 1],
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CRITERIA)
def test_weights_of_rows(name: str, reduction: str, device: str) -> None:
    model, x, targets, criterion = setting(name, 2, device, torch.float64, reduction=reduction)
    for kind in WEIGHTED if name in ("labels, options", "mse") else ["random"]:
        torch.manual_seed(7)
        weights = WEIGHTED[kind]().to(device).double()
        arguments = {"criterion": criterion, "sample_weight": weights, "return_accuracy": name in HAVE_CLASSES}
        ours, theirs = both(model, x, targets, **arguments)
        assert ours.engine == one_call(device)
        assert_alike(ours, theirs, **EXACT)
        assert (kind == "none of any") == bool(theirs.losses.isnan().any() or not theirs.losses.any())


def test_weights_of_one_are_none(device: str) -> None:
    for name in CRITERIA:
        model, x, targets, criterion = setting(name, 2, device, torch.float64)
        plain, weighted = (
            train(train_steps, model, x, targets, steps=3, criterion=criterion, return_accuracy=False, **more)
            for more in ({}, {"sample_weight": torch.ones(ROWS, device=device, dtype=torch.float64)})
        )
        assert_alike(weighted, plain, **EXACT)


SCALES: dict[str, Any] = {
    "a number": (2.5, 0.5),
    "one for each step": ([1.0, 0.5, 0.0, 3.0, 1.0], torch.tensor([2.0, 1.0, 0.0, 1.0, 7.0])),
    "functions": (lambda step: 1.0 + step, lambda step: 1 / (1 + step)),
    "of the loss alone": (0.25, 1.0),
    "of the decay alone": (1.0, lambda step: float(step)),
}


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
@pytest.mark.parametrize("kind", SCALES)
def test_scales(kind: str, optimizer: Any, device: str) -> None:
    """In one run, and in one that goes on where another was stopped."""
    model, x, targets, criterion = setting("mse", 2, device, torch.float64)
    loss_scale, decay_scale = SCALES[kind]
    make = lambda p: optimizer(p, lr=0.1, weight_decay=0.3)  # noqa: E731
    arguments = {"criterion": criterion, "loss_scale": loss_scale, "decay_scale": decay_scale, "make": make}
    ours, theirs = both(model, x, targets, **arguments, steps=5, return_accuracy=False)
    assert ours.engine == one_call(device)
    assert_alike(ours, theirs, **EXACT)
    ours, theirs = both(model, x, targets, **arguments, steps=5, start_step=2, return_accuracy=False)
    assert_alike(ours, theirs, **EXACT)


def test_a_scale_that_raises_ends_the_run_before_its_step(device: str) -> None:
    model, x, targets, criterion = setting("mse", 2, device, torch.float64)

    def scale(step: int) -> float:
        if step == 3:
            raise StopIteration("no scale")
        return 1.0

    left = []
    for loop in (train_steps, reference.train_steps):
        for name in ("loss_scale", "decay_scale"):
            twin = copy.deepcopy(model)
            optimizer = SGD(twin.parameters(), lr=0.1, weight_decay=0.1)
            generator = torch.Generator().manual_seed(0)
            with pytest.raises(StopIteration, match="no scale"):
                loop(twin, optimizer, x, targets, criterion=criterion, steps=9, generator=generator, **{name: scale})
            left.append(twin.state_dict())
    for state in left[1:]:
        torch.testing.assert_close(state, left[0], rtol=1e-9, atol=1e-12)
    assert not torch.equal(left[0]["0.weight"], model.state_dict()["0.weight"])


@pytest.mark.parametrize("optimizer", ["SGD", "momentum, decay, maximize", "Adam, decay", "AdamW"])
@pytest.mark.parametrize("most", [0.0, 0.05, 1e6])
def test_clipping(most: float, optimizer: str, device: str) -> None:
    makes: dict[str, Any] = {
        "SGD": lambda p: SGD(p, lr=0.1),
        "momentum, decay, maximize": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2, maximize=True),
        "Adam, decay": lambda p: Adam(p, lr=0.01, weight_decay=0.2, eps=1e-3),
        "AdamW": lambda p: AdamW(p, lr=0.01, eps=1e-3),
    }
    for depth in DEPTHS:
        model, x, targets, criterion = setting("labels, options", depth, device, torch.float64)
        ours, theirs = both(model, x, targets, criterion=criterion, max_grad_norm=most, make=makes[optimizer])
        assert ours.engine == one_call(device)
        assert_alike(ours, theirs, **EXACT)


def test_clipping_changes_what_is_trained(device: str) -> None:
    """So that the tests above compare something: the norm was above one limit, and below the other."""
    model, x, targets, criterion = setting("mse", 2, device, torch.float64)
    weights = [
        both(model, x, targets, criterion=criterion, return_accuracy=False, **more)[0].model[0].weight
        for more in ({}, {"max_grad_norm": 1e6}, {"max_grad_norm": 0.05})
    ]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(weights[2], weights[0], rtol=1e-3)


def test_clipping_of_gradients_that_are_no_numbers(device: str) -> None:
    for bad in (math.nan, math.inf):
        model, x, targets, criterion = setting("mse", 2, device, torch.float64)
        x[3, 2] = bad
        ours, theirs = both(model, x, targets, criterion=criterion, max_grad_norm=1.0, return_accuracy=False)
        assert_alike(ours, theirs, **EXACT)


def test_all_at_once_in_float32(device: str) -> None:
    model, x, targets, criterion = setting("labels, options", 3, device, torch.float32)
    ours, theirs = both(
        model, x, targets, criterion=criterion, sample_weight=torch.rand(ROWS, device=device), loss_scale=2.0,
        decay_scale=lambda step: 1 / (1 + step), max_grad_norm=0.5, batch_size=20, epochs=2, steps=None,
        make=lambda p: AdamW(p, lr=0.01, eps=1e-3), return_accuracy=True,
    )  # fmt: skip
    assert ours.engine == one_call(device)
    assert_alike(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_step_a_call(device: str) -> None:
    """make_train_step with its keywords, a call each time with others."""
    for name in ("mse", "labels, options"):
        model, x, targets, criterion = setting(name, 2, device, torch.float64)
        weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)).to(x)
        left = []
        for make in (make_train_step, reference.make_train_step):
            twin = copy.deepcopy(model)
            optimizer = AdamW(twin.parameters(), lr=0.01, eps=1e-3)
            step = make(twin, optimizer, criterion, max_grad_norm=0.3)
            losses = [
                step(x[rows], targets[rows], **options)
                for rows in torch.arange(ROWS).split(20)
                for options in (
                    {}, {"sample_weight": weights[rows]}, {"loss_scale": 3.0}, {"decay_scale": 0.0}, {},
                    {"sample_weight": weights[rows], "loss_scale": 0.5, "decay_scale": 2.0},
                )
            ]  # fmt: skip
            left.append((torch.stack(losses), twin.state_dict()))
            assert make is reference.make_train_step or step.engine == one_call(device)
        torch.testing.assert_close(*left, **EXACT)


REFUSED: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "a vector, which is broadcast": (nn.MSELoss(), lambda t: t[:, 0]),
    "a column, which is broadcast": (nn.L1Loss(), lambda t: t[:, :1]),
    "whole numbers": (nn.MSELoss(), lambda t: t.round().long()),
    "float64": (nn.SmoothL1Loss(), lambda t: t.double()),
    "a beta of 0": (nn.SmoothL1Loss(beta=0.0), lambda t: t),
    "with full": (nn.PoissonNLLLoss(full=True), lambda t: t.abs()),
    "not of a logarithm": (nn.PoissonNLLLoss(log_input=False), lambda t: t.abs()),
    "weights of all numbers": (nn.BCEWithLogitsLoss(torch.rand(16, OUTPUTS)), lambda t: (t > 0).float()),
    "one weight for all": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), lambda t: (t > 0).float()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_to_the_loop(name: str) -> None:
    """And is trained there, with PyTorch's warnings."""
    criterion, change = REFUSED[name]
    model, x, targets, _ = setting("mse", 2, "cpu", torch.float32)
    targets = change(targets)
    arguments = {"criterion": criterion, "steps": 2, "batch_size": 16, "return_accuracy": False, "shuffle": False}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if "vector" in name:
            x, targets = x[:OUTPUTS], targets[:OUTPUTS]
            arguments["batch_size"] = OUTPUTS
        ours = train(train_steps, model, x, targets, **arguments)
        ours_told = [*map(str, told)]
        theirs = train(reference.train_steps, model, x, targets, **arguments)
    assert ours.engine == "looped"
    assert_alike(ours, theirs)
    assert ("broadcast" in name) == bool(ours_told)


ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no tensor": ("mse", {"sample_weight": [1.0] * ROWS}, TypeError, "sample_weight need a torch.Tensor"),
    "too few weights": ("mse", {"sample_weight": torch.rand(ROWS - 1)}, ValueError, "each of 50 rows"),
    "weights of numbers": ("mse", {"sample_weight": torch.rand(ROWS, OUTPUTS)}, ValueError, "each of 50 rows"),
    "whole weights": ("mse", {"sample_weight": torch.ones(ROWS).long()}, ValueError, "floating-point"),
    "a function": (lambda y, t: (y - t).sum(), {"sample_weight": torch.rand(ROWS)}, TypeError, "with a reduction"),
    "no reduction": (
        nn.MSELoss(reduction="none"), {"sample_weight": torch.rand(ROWS)}, ValueError, "of the reduction mean or sum"
    ),
    "few scales": ("mse", {"loss_scale": [1.0, 2.0]}, ValueError, "loss_scale has 2 numbers for 3 steps"),
    "scales of words": ("mse", {"decay_scale": "abc"}, TypeError, "decay_scale needs a number"),
    "no scale": ("mse", {"loss_scale": None}, TypeError, "loss_scale needs a number"),
    "a negative norm": ("mse", {"max_grad_norm": -1.0}, ValueError, "max_grad_norm needs to be at least 0"),
    "no norm": ("mse", {"max_grad_norm": "1"}, TypeError, "max_grad_norm needs a number"),
    "NaN": ("mse", {"max_grad_norm": math.nan}, ValueError, "max_grad_norm needs to be at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    criterion, arguments, error, words = ERRORS[name]
    model, x, targets, _ = setting("mse", 2, "cpu", torch.float32)
    criterion = nn.MSELoss() if criterion == "mse" else criterion
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        train_steps(model, SGD(model.parameters(), lr=0.1), x, targets, criterion=criterion, steps=3, **arguments)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_weights_of_another_dtype_are_the_loops() -> None:
    model, x, targets, criterion = setting("mse", 2, "cpu", torch.float32)
    ours, theirs = both(
        model, x, targets, criterion=criterion, sample_weight=torch.rand(ROWS).double(), return_accuracy=False
    )
    assert ours.engine == "looped"
    assert_alike(ours, theirs)


def test_weights_want_no_gradient() -> None:
    """Whoever trains a model that makes them gets none by the way."""
    model, x, targets, criterion = setting("mse", 2, "cpu", torch.float32)
    weights = torch.rand(ROWS, requires_grad=True)
    for loop in (train_steps, reference.train_steps):
        twin = copy.deepcopy(model)
        loop(twin, SGD(twin.parameters(), lr=0.1), x, targets, criterion=criterion, steps=2, sample_weight=weights)
        assert weights.grad is None


def test_a_row_counts_as_often_as_its_weight_says(device: str) -> None:
    """A row of weight 2 is that row twice."""
    for name in ("labels, options", "bce, options", "probabilities"):
        model, x, targets, criterion = setting(name, 2, device, torch.float64)
        weights = torch.ones(ROWS, dtype=torch.float64, device=device)
        weights[:7] = 2
        rows = torch.cat([torch.arange(ROWS), torch.arange(7)]).to(device)
        arguments = {"criterion": criterion, "steps": 3, "shuffle": False, "return_accuracy": False}
        once = train(train_steps, model, x, targets, sample_weight=weights, batch_size=ROWS, **arguments)
        twice = train(train_steps, model, x[rows], targets[rows], batch_size=len(rows), **arguments)
        torch.testing.assert_close(once.losses, twice.losses, **EXACT)
        torch.testing.assert_close(once.model.state_dict(), twice.model.state_dict(), **EXACT)


def test_on_chunk_may_change_the_criterion(device: str) -> None:
    """Its numbers are read at each chunk."""
    left = []
    for changes in (True, False):
        model, x, targets, criterion = setting("huber", 2, device, torch.float64)
        if changes:
            criterion.delta = 0.1

        def on_chunk(done: int, losses: Tensor, criterion: Any = criterion) -> None:
            criterion.delta = 3.0

        optimizer = SGD(model.parameters(), lr=0.1)
        options = {"criterion": criterion, "shuffle": False, "batch_size": 16}
        if changes:
            train_steps(model, optimizer, x, targets, steps=4, chunk_steps=2, on_chunk=on_chunk, **options)
        else:
            for delta, steps in ((0.1, (0, 2)), (3.0, (2, 4))):
                criterion.delta = delta
                reference.train_steps(model, optimizer, x, targets, start_step=steps[0], steps=steps[1], **options)
        left.append(model.state_dict())
    torch.testing.assert_close(*left, **EXACT)


@pytest.mark.parametrize("name", ["mse", "labels, options", "bce, options", "probabilities, options"])
def test_as_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured loop with all at once; what on a GPU is a graph is here the function that it is captured from."""
    monkeypatch.setattr(captured, "capture", lambda step, stream: step)
    for clipped, weighted, scaled in ((1.0, True, True), (None, False, True), (0.1, False, False), (None, True, False)):
        model, x, targets, criterion = setting(name, 3, "cpu", torch.float64)
        given: dict[str, Any] = {
            "criterion": criterion, "batch_size": 25, "steps": 14, "max_grad_norm": clipped,
            "sample_weight": torch.rand(ROWS, dtype=torch.float64) if weighted else None,
            "loss_scale": (lambda step: 1.0 + step % 3) if scaled else 1.0, "decay_scale": [0.5] * 14,
        }  # fmt: skip
        left = []
        for loop in (True, False):
            twin = copy.deepcopy(model)
            optimizer = AdamW(twin.parameters(), lr=0.01, eps=1e-3, weight_decay=0.3)
            given["generator"] = torch.Generator().manual_seed(3)
            if loop:
                losses = reference.train_steps(twin, optimizer, x, targets, **given)
            else:
                engine = captured.Captured(check(twin, optimizer, x, targets, False, given), None)
                while engine.done < 14:
                    engine.advance(14 - engine.done, None)
                losses = torch.cat(engine.losses)
            left.append((losses, twin.state_dict()))
        torch.testing.assert_close(*left, **EXACT)


@pytest.mark.parametrize("name", ["labels", "probabilities", "bce"])
def test_a_probe_of_a_thousand_classes(name: str, device: str) -> None:
    model = nn.Linear(9, 1000, device=device)
    x, targets = data(device, 12, 9)[0], targets_of(name, device, outputs=1000)[:12]
    arguments = {"criterion": CRITERIA[name](), "batch_size": 8, "steps": 2, "return_accuracy": True}
    ours, theirs = both(model, x, targets, **arguments)
    assert ours.engine == one_call(device)
    assert_alike(ours, theirs)


def replaced(criterion: Any, name: str, value: Any) -> Any:
    """The criterion, with something else in the place of its weights."""
    setattr(criterion, name, value)
    return criterion


FREE = {"requires_grad": False}
ODD: dict[str, Callable[[], nn.Module]] = {
    "a parameter of one number": lambda: replaced(
        nn.BCEWithLogitsLoss(), "pos_weight", nn.Parameter(torch.tensor([3.0]), **FREE)
    ),
    "a parameter": lambda: replaced(nn.BCEWithLogitsLoss(), "weight", nn.Parameter(VALUES.clone(), **FREE)),
    "no weight of this loss": lambda: replaced(nn.MSELoss(), "weight", VALUES.clone()),
    "a buffer that this loss has not": lambda: replaced(nn.MSELoss(), "pos_weight", nn.Buffer(VALUES.clone())),
    "no smoothing of this loss": lambda: replaced(nn.L1Loss(), "label_smoothing", None),
}


@pytest.mark.parametrize("name", ODD)
def test_weights_are_what_pytorch_reads(name: str, device: str) -> None:
    model, x, targets, _ = setting("bce", 2, device, torch.float32)
    ours, theirs = both(model, x, targets, criterion=ODD[name]().to(device), return_accuracy=False)
    assert_alike(ours, theirs)


def test_weights_that_get_other_data(device: str) -> None:
    """A shorter one is PyTorch's, which broadcasts it, and not what lies behind it in memory."""
    model, x, targets, _ = setting("bce", 2, device, torch.float32)
    left = []
    for make in (make_train_step, reference.make_train_step):
        twin, criterion = copy.deepcopy(model), nn.BCEWithLogitsLoss(pos_weight=VALUES.to(device))
        step = make(twin, SGD(twin.parameters(), lr=0.1), criterion)
        losses = [step(x, targets)]
        for data_ in (VALUES.to(device)[:1], VALUES.to(device).repeat_interleave(2)[::2], VALUES.to(device)):
            criterion.pos_weight.data = data_
            losses += [step(x, targets), step(x, targets)]
        left.append((torch.stack(losses), twin.state_dict()))
    torch.testing.assert_close(*left)


def test_a_criterion_of_another_class(device: str) -> None:
    """The step looks again who may serve."""

    class Halved(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) / 2

    model, x, targets, criterion = setting("mse", 2, device, torch.float64)
    step = make_train_step(model, SGD(model.parameters(), lr=0.0), criterion)
    whole = step(x, targets)
    criterion.__class__ = Halved
    torch.testing.assert_close(step(x, targets), whole / 2)
    assert step.engine == "looped"


def test_no_rows_with_weights(device: str) -> None:
    model, x, targets, criterion = setting("mse", 2, device, torch.float32)
    left = []
    for make in (make_train_step, reference.make_train_step):
        twin = copy.deepcopy(model)
        step = make(twin, SGD(twin.parameters(), lr=0.1, weight_decay=0.1), criterion)
        loss = step(x[:0], targets[:0], sample_weight=x[:0, 0])
        assert loss.isnan()
        left.append(twin.state_dict())
    torch.testing.assert_close(*left)


def test_weights_that_sum_to_nothing(device: str) -> None:
    """But are not: the loss is infinite."""
    model, x, targets, criterion = setting("mse", 2, device, torch.float64)
    weights = torch.tensor([1.0, -1.0] * (ROWS // 2), dtype=torch.float64, device=device)
    arguments = {"criterion": criterion, "sample_weight": weights, "shuffle": False, "return_accuracy": False}
    ours, theirs = both(model, x, targets, **arguments, steps=1)
    assert theirs.losses.isinf().all()
    assert torch.equal(ours.losses, theirs.losses)


def test_a_weight_of_an_ignored_row_is_nothing(device: str) -> None:
    """Though it is NaN; the loss is."""
    model, x, targets, criterion = setting("labels, options", 2, device, torch.float64)
    weights = torch.where(targets == criterion.ignore_index, torch.nan, 1.0).double()
    ours, theirs = both(model, x, targets, criterion=criterion, sample_weight=weights)
    assert theirs.losses.isnan().any()
    assert theirs.model[0].weight.isfinite().all()
    assert_alike(ours, theirs, **EXACT)


KINDS_OF_SCALES: dict[str, Any] = {
    "an int": 2, "a 0-d tensor": torch.tensor(0.5), "numpy's": np.float32(0.5), "an array": np.array([1.0, 2.0, 0.5]),
    "a tuple": (1.0, 2.0, 0.5), "a tensor": torch.tensor([1.0, 2.0, 0.5]), "a function of ints": lambda step: step,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS_OF_SCALES)
def test_kinds_of_scales(name: str) -> None:
    model, x, targets, criterion = setting("mse", 2, "cpu", torch.float64)
    scale = KINDS_OF_SCALES[name]
    ours, theirs = both(model, x, targets, criterion=criterion, loss_scale=scale, return_accuracy=False, steps=3)
    assert_alike(ours, theirs, **EXACT)


@pytest.mark.parametrize("scale", ["12", {1.0: 2.0}, itertools.repeat(1.0), True, None], ids=str)
def test_what_is_no_scale(scale: Any) -> None:
    model, x, targets, criterion = setting("mse", 2, "cpu", torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="loss_scale needs a number"):
        train_steps(model, optimizer, x, targets, criterion=criterion, steps=2, loss_scale=scale)
    step = make_train_step(model, optimizer, criterion)
    for wrong in (scale, [1.0], lambda step: 1.0, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match="loss_scale needs a number"):
            step(x, targets, loss_scale=wrong)


def test_a_decay_that_is_not_there() -> None:
    model, x, targets, criterion = setting("mse", 2, "cpu", torch.float64)
    optimizer = torch.optim.Rprop(model.parameters())
    with pytest.raises(ValueError, match="Rprop has no weight_decay"):
        train_steps(model, optimizer, x, targets, criterion=criterion, steps=2, decay_scale=0.5)
    with pytest.raises(ValueError, match="Rprop has no weight_decay"):
        make_train_step(model, optimizer, criterion)(x, targets, decay_scale=0.5)
