"""The training kernel against autograd in float64, also in tiles so small that every loop runs several times."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.kernels import mlp_training
from fusednn.kernels.mlp_training import train_mlp
from fusednn.kernels.step import (
    ACTIVATIONS,
    LOSS_SCALE,
    MAX_NORM,
    MOMENTUM,
    ROW,
    RULES,
    SIGN,
    UNDAMPED,
    Activation,
    Loss,
    Rule,
    Step,
)
from tests.kernels.rules import expected, random_states
from tests.kernels.test_activations import PYTORCH

INPUTS, HIDDEN, OUTPUTS = 37, 40, 10

NUMBERS: dict[str, tuple[float, ...]] = {"leaky_relu": (0.25,), "elu": (0.75,), "softplus": (1.5, 2.0)}


def describe(sizes: Sequence[int], names: Sequence[str], biases: Sequence[bool] | bool = True, **more: Any) -> Step:
    """A step by SGD of a net with these activations."""
    biases = (biases,) * (len(sizes) - 1) if isinstance(biases, bool) else tuple(biases)
    activations = tuple(Activation(name, NUMBERS.get(name, ())) for name in names)
    return Step(tuple(sizes), biases, activations, **{"rule": Rule("sgd"), **more})


PLAIN = describe((INPUTS, HIDDEN, OUTPUTS), ("relu", "identity"), accuracy=True)


WAYS: dict[str, mlp_training.Config] = {
    "one tile each": ("streamed", 64, 64, 64, 4, 1), "several": ("streamed", 16, 16, 16, 4, 1),
    "on chip": ("columns", 64, 64, 64, 4, 1), "on chip, as rows": ("rows", 64, 64, 16, 4, 1),
    "held": ("held", 64, 64, 64, 4, 1), "on chip, whole": ("columns whole", 64, 64, 64, 4, 1),
}  # fmt: skip
"""Configurations: "as rows" has several tiles of the inputs. Where one does not hold, steps are on chip, or several."""


@pytest.fixture(params=WAYS, autouse=True)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for key in mlp_training.CONFIGS:
        rows = [(None, None, None, WAYS[name]) for name in (request.param, "on chip", "several")]
        monkeypatch.setitem(mlp_training.CONFIGS, key, tuple(rows))
    mlp_training.plan_training.cache_clear()
    yield request.param
    mlp_training.plan_training.cache_clear()


class Net:
    """Random parameters, their gradients, and the data: x and targets are views with gaps, those of x full of NaN."""

    def __init__(self, device: str, step: Step = PLAIN, rows: int = 50, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype).to(device)

        inputs, outputs = step.sizes[0], step.sizes[-1]
        self.step = step
        self.x = torch.full((2 * rows, 2 * inputs), float("nan"), dtype=dtype, device=device)[::2, 1::2]
        self.x.copy_(random(rows, inputs))
        self.targets = torch.randint(0, outputs, (rows, 3), generator=generator).to(device)[:, 1]
        self.order = torch.randperm(rows, generator=generator).to(device)
        self.w: list[Any] = []
        for (k, n), bias in zip(pairwise(step.sizes), step.biases, strict=True):
            self.w += [random(n, k) / k**0.5, random(n) if bias else None]

    def outputs(self, rows: Tensor, w: list[Any]) -> Tensor:
        """What the net makes of `rows`, by PyTorch."""
        h = self.x[rows]
        for layer, activation in enumerate(self.step.activations):
            h = PYTORCH[activation.name](F.linear(h, w[2 * layer], w[2 * layer + 1]), *activation.numbers)
        return h

    def gradients(self, rows: Tensor, **options: Any) -> tuple[Tensor, list[Any]]:
        """The loss of `rows` and its gradients at the parameters as they are now."""
        w = [None if p is None else p.clone().requires_grad_() for p in self.w]
        loss = F.cross_entropy(self.outputs(rows, w), self.targets[rows], **options)
        grads = iter(torch.autograd.grad(loss, [p for p in w if p is not None]))
        return loss.detach(), [None if p is None else next(grads) for p in w]

    def train(self, table: Tensor, step: Step | None = None, states: Any = None, **arguments: Any) -> Any:
        defaults: dict[str, Any] = {
            "batch_size": 33, "position": 0, "epoch_rows": len(self.x), "ignore_index": -100, "label_smoothing": 0.0,
            "one_row": bool((table == table[:, :1]).all()),
        }  # fmt: skip
        weight, step = arguments.pop("class_weight", None), self.step if step is None else step
        states = [self.w] * len(RULES[step.rule.name].states) if states is None else states
        given = (self.x, self.targets, self.order, weight, self.w, states, table)
        return train_mlp(step, *given, **defaults | arguments)


def rows_of(*values: dict[int, float], device: str, dtype: torch.dtype = torch.float64, step: Step = PLAIN) -> Tensor:
    """A table of a step each: the numbers at their places, the same for all parameters."""
    table = torch.zeros(len(values), 2 * step.layers, ROW, dtype=dtype)
    for made, row in enumerate(values):
        for place, value in row.items():
            table[made, :, place] = value
    return table.to(device)


def assert_near(result: Any, expected: Any) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)


def assert_gradients(device: str, step: Step, batch_size: int = 33) -> None:
    """With a learning rate of 1 the step is the gradient."""
    net = Net(device, step)
    before = [None if p is None else p.clone() for p in net.w]
    loss, grads = net.gradients(net.order[:batch_size])
    losses, _ = net.train(rows_of({0: 1.0}, device=device, step=step), batch_size=batch_size)
    assert_near(losses[0], loss)
    for old, new, grad in zip(before, net.w, grads, strict=True):
        if old is not None:
            assert_near(old - new, grad)


def clip(grads: Sequence[Any], limit: float) -> list[Any]:
    """Gradients clipped by PyTorch."""
    holders = [None if grad is None else torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for holder, grad in zip(holders, grads, strict=True):
        if holder is not None:
            holder.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([holder for holder in holders if holder is not None], limit)
    return [None if holder is None else holder.grad for holder in holders]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_size", [1, 16, 33])
def test_gradients_of_one_step(device: str, batch_size: int, bias: bool) -> None:
    assert_gradients(device, PLAIN._replace(biases=(bias, bias)), batch_size)


DEPTHS = {
    1: (19, 5), 2: (19, 20, 5), 3: (19, 20, 33, 5), 4: (18, 33, 20, 17, 5), 5: (3, 17, 20, 33, 18, 5),
    8: (18, 33, 17, 20, 35, 17, 20, 18, 5),
}  # fmt: skip
"""Sizes of nets, of which each layer has two tiles where tiles are small."""


@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_any_depth(device: str, depth: int, bias: str) -> None:
    """With activations of both kinds by turns, also behind the last layer; some biases are not there."""
    names = [("tanh", "gelu")[layer % 2] for layer in range(depth)]
    biases = [bias == "all" or (bias == "some" and layer % 3 != 1) for layer in range(depth)]
    assert_gradients(device, describe(DEPTHS[depth], names, biases))


@pytest.mark.parametrize("place", ["hidden", "last"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_any_activation(device: str, name: str, place: str) -> None:
    """Behind all hidden layers of a net with three, the first two of which are computed in another way, or the last."""
    names = [name, name, name, "identity"] if place == "hidden" else ["relu", name]
    assert_gradients(device, describe(DEPTHS[4 if place == "hidden" else 2], names))


def test_layers_alternate_their_buffers_in_every_step(device: str) -> None:
    """Three steps of six layers: what one leaves is not read by the next, and each has its rows of the table."""
    step = describe((3, 17, 33, 20, 17, 18, 5), ["silu", "relu", "elu", "sigmoid", "softplus", "identity"])
    net, expected = Net(device, step), Net(device, step)
    rates = (0.5, 0.25, 0.125)
    losses, _ = net.train(rows_of(*({0: rate} for rate in rates), device=device, step=step), batch_size=16)
    for made, rows in enumerate(net.order[:48].split(16)):
        loss, grads = expected.gradients(rows)
        expected.w = [p - rates[made] * grad for p, grad in zip(expected.w, grads, strict=True)]
        assert_near(losses[made], loss)
    for new, wanted in zip(net.w, expected.w, strict=True):
        assert_near(new, wanted)


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"weight": torch.rand(200, generator=torch.Generator().manual_seed(2)).double() + 0.1},
    "ignored": {"ignore_index": 3},
}
OPTIONS["all"] = OPTIONS["smoothing"] | OPTIONS["weights"] | OPTIONS["ignored"]


@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_with(device: str, name: str) -> None:
    assert_cross_entropy(device, PLAIN, name)


def assert_cross_entropy(device: str, step: Step, name: str) -> None:
    """A step with these OPTIONS, and its accuracy."""
    net, given = Net(device, step), dict(OPTIONS[name])
    if "weight" in given:
        given["weight"] = given["weight"][: step.sizes[-1]].to(device)
    before, (loss, grads) = [p.clone() for p in net.w], net.gradients(net.order[:33], **given)
    loss_of = Loss("cross_entropy", "reduction" not in given, "weight" in given, "label_smoothing" in given)
    arguments = {key: value for key, value in given.items() if key in ("label_smoothing", "ignore_index")}
    table = rows_of({0: 1.0}, device=device)
    right = net.outputs(net.order[:33], net.w).argmax(1) == net.targets[net.order[:33]]
    counted = net.targets[net.order[:33]] != given.get("ignore_index", -100)
    losses, accuracies = net.train(table, step._replace(loss=loss_of), class_weight=given.get("weight"), **arguments)
    assert_near(losses[0], loss)
    assert_near(accuracies[0], right[counted].double().mean())
    for old, new, grad in zip(before, net.w, grads, strict=True):
        assert_near(old - new, grad)


def test_smoothing_leaves_nothing_behind_the_outputs(device: str) -> None:
    """Each class has its share of a label, and what is behind the last none: a second step would see it."""
    step = PLAIN._replace(loss=Loss("cross_entropy", smoothed=True))
    net, expected = Net(device, step), Net(device, step)
    losses, _ = net.train(rows_of({0: 1.0}, {0: 1.0}, device=device), batch_size=25, label_smoothing=0.2)
    for made, rows in enumerate(net.order.split(25)):
        loss, grads = expected.gradients(rows, label_smoothing=0.2)
        expected.w = [p - grad for p, grad in zip(expected.w, grads, strict=True)]
        assert_near(losses[made], loss)
    for new, wanted in zip(net.w, expected.w, strict=True):
        assert_near(new, wanted)


def test_steps_follow_the_order_and_the_table(device: str) -> None:
    """Three steps from 33 rows into an epoch of 50: 17 rows, then the next epoch's 33 and 17."""
    net, expected = Net(device), Net(device)
    net.order = torch.cat([net.order[33:], net.order.flip(0)])
    rates = (0.5, 0.25, 0.125)
    losses, accuracies = net.train(rows_of(*({0: rate} for rate in rates), device=device), position=33)
    for step, rows in enumerate(net.order.split([17, 33, 17])):
        right = expected.outputs(rows, expected.w).argmax(1) == expected.targets[rows]
        loss, grads = expected.gradients(rows)
        expected.w = [p - rates[step] * grad for p, grad in zip(expected.w, grads, strict=True)]
        assert_near(losses[step], loss)
        assert_near(accuracies[step], right.double().mean())
    for new, wanted in zip(net.w, expected.w, strict=True):
        assert_near(new, wanted)


RULE_OPTIONS = [Rule("adam", *options) for options in ((True, True, True), (True, False, False), (False, True, False))]
RULE_OPTIONS += [Rule(name, coupled=True, maximize=True) for name in RULES if name != "adam"]


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("rule", RULE_OPTIONS, ids=lambda rule: f"{rule.name}{rule[1:]}")
def test_each_parameter_has_its_row_and_its_states(device: str, rule: Rule, clipped: bool, tiles: str) -> None:
    """Other numbers for each parameter, from states that are not zero; what is no option is not read."""
    if clipped and rule.name not in ("adam", "amsgrad", "momentum"):
        pytest.skip("some are enough")
    if tiles == "held" and len(RULES[rule.name].states) > mlp_training.MOST_HELD:
        pytest.skip("a rule with so many states is not held")
    net, generator = Net(device), torch.Generator().manual_seed(3)
    before, (_, grads) = [p.clone() for p in net.w], net.gradients(net.order[:33])
    table = torch.rand(1, 4, ROW, dtype=torch.float64, generator=generator).to(device)
    table[:, :, SIGN] = torch.tensor([1.0, -1.0, -1.0, 1.0])
    states = [random_states(rule, p, generator) for p in net.w]
    grads = clip(grads, table[0, 0, MAX_NORM].item()) if clipped else grads
    wanted = [expected(rule, table[0, i], p, grads[i], states[i]) for i, p in enumerate(before)]
    net.train(table, PLAIN._replace(rule=rule, clipped=clipped), [*zip(*states, strict=True)])
    for new, state, (w, *after) in zip(net.w, states, wanted, strict=True):
        assert_near(new, w)
        assert_near(state, after)


@pytest.mark.parametrize("sizes", [(64, 64, 10), (16, 32, 13), (16, 16, 14), (32, 16, 16), (17, 20, 15)])
def test_sizes_at_the_edges_of_tiles(device: str, sizes: tuple[int, ...]) -> None:
    """Layers that fill their tile, and outputs behind which there is no place for sums: two steps, with accuracy."""
    step = describe(sizes, ["relu", "identity"], accuracy=True)
    net, expected = Net(device, step), Net(device, step)
    losses, accuracies = net.train(rows_of({0: 0.5}, {0: 0.25}, device=device, step=step), batch_size=25)
    for made, rows in enumerate(net.order.split(25)):
        right = expected.outputs(rows, expected.w).argmax(1) == expected.targets[rows]
        loss, grads = expected.gradients(rows)
        expected.w = [p - (0.5, 0.25)[made] * grad for p, grad in zip(expected.w, grads, strict=True)]
        assert_near(losses[made], loss)
        assert_near(accuracies[made], right.double().mean())
    for new, wanted in zip(net.w, expected.w, strict=True):
        assert_near(new, wanted)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_no_row_behind_the_last_step_is_read(device: str, steps: int) -> None:
    """Rows are looked up ahead; what lies in memory behind those of the last step is no row, and may be no memory."""
    net, sizes = Net(device), (33, 17, 33)
    net.order = torch.cat([*[net.order] * 2, net.order.new_full((64,), 2**40)])
    net.order[sum(sizes[:steps]) :] = 2**40
    losses, _ = net.train(rows_of(*[{0: 0.1}] * steps, device=device))
    assert losses.isfinite().all()


@pytest.mark.parametrize("sizes", [DEPTHS[1], (64, 40, 10), DEPTHS[3], DEPTHS[4]])
def test_clipped_steps(device: str, sizes: tuple[int, ...]) -> None:
    """Three steps with momentum, whose norms are above the limit, below it and above; the second layer has no bias."""
    names = ("tanh", "gelu", "relu", "identity")[-len(sizes) + 1 :]
    step = describe(sizes, names, [layer != 1 for layer in range(len(names))], rule=Rule("momentum"), clipped=True)
    net, expected = Net(device, step), Net(device, step)
    momenta, wanted = ([None if p is None else torch.zeros_like(p) for p in net.w] for _ in range(2))
    table, beyond = [], []
    for limit, rows in zip((0.25, 1e3, 0.125), net.order[:48].split(16), strict=True):
        _, grads = expected.gradients(rows)
        beyond.append(sum(grad.square().sum() for grad in grads if grad is not None).sqrt() > limit)
        table.append({0: 0.5, MAX_NORM: limit, MOMENTUM: 0.75, UNDAMPED: 1.0})
        for i, grad in enumerate(clip(grads, limit)):
            if grad is not None:
                wanted[i] = 0.75 * wanted[i] + grad
                expected.w[i] = expected.w[i] - 0.5 * wanted[i]
    net.train(rows_of(*table, device=device, step=step), batch_size=16, states=(momenta,))
    assert beyond == [True, False, True]
    for new, old in zip([*net.w, *momenta], [*expected.w, *wanted], strict=True):
        if new is not None:
            assert_near(new, old)


@pytest.mark.parametrize("value", [1.5e308, 1e200, float("nan")])
def test_clipping_what_has_no_norm(device: str, value: float) -> None:
    """Gradients of which some are infinite, finite ones whose squares are not, and NaN."""
    step = describe((4, 3), ["identity"], clipped=True, loss=Loss("cross_entropy", mean=False))
    net = Net(device, step)
    net.x[:, 1], net.targets[:] = value, 2
    net.w[0].zero_()
    before, (_, grads) = [p.clone() for p in net.w], net.gradients(net.order[:33], reduction="sum")
    net.train(rows_of({0: 1.0, MAX_NORM: 1.0}, device=device, step=step))
    for old, new, grad in zip(before, net.w, clip(grads, 1.0), strict=True):
        torch.testing.assert_close(old - new, grad, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_one_nan_is_in_all_clipped_gradients(device: str) -> None:
    """Also in those of a unit that is 0 in all rows, which are 0 themselves."""
    net = Net(device)
    net.w[1][3], net.w[3][0] = -1e9, float("nan")
    _, grads = net.gradients(net.order[:33])
    assert (grads[0][3] == 0).all()
    net.train(rows_of({0: 1.0, MAX_NORM: 1.0}, device=device), PLAIN._replace(clipped=True))
    assert all(p.isnan().all() for p in net.w)


def test_no_rows_that_count(device: str) -> None:
    """The mean over none is NaN and moves nothing; nor does an empty batch."""
    net = Net(device)
    before = [p.clone() for p in net.w]
    net.targets = torch.full_like(net.targets, -100)
    losses, accuracies = net.train(rows_of({0: 1.0}, {0: 1.0}, device=device))
    assert losses.isnan().all()
    assert accuracies.isnan().all()
    losses, _ = net.train(rows_of({0: 1.0}, device=device), epoch_rows=0)
    assert losses.isnan().all()
    assert all(torch.equal(old, new) for old, new in zip(before, net.w, strict=True))


@pytest.mark.parametrize("label", [-1, OUTPUTS, 2**40])
def test_a_label_out_of_range_is_nan_and_never_an_offset(device: str, label: int) -> None:
    net = Net(device)
    net.targets[net.order[2]] = label
    step = PLAIN._replace(loss=Loss("cross_entropy", weighted=True))
    weight = torch.ones(OUTPUTS, dtype=torch.float64, device=device)
    losses, _ = net.train(rows_of({0: 1.0}, device=device), step, class_weight=weight)
    assert losses.isnan().all()
    assert all(p.isnan().any() for p in net.w)


def test_nan_goes_where_autograd_sends_it(device: str) -> None:
    net = Net(device)
    net.x[net.order[5], 7] = float("nan")
    _, grads = net.gradients(net.order[:33])
    before = [p.clone() for p in net.w]
    losses, _ = net.train(rows_of({0: 1.0}, device=device))
    assert losses.isnan().all()
    for old, new, grad in zip(before, net.w, grads, strict=True):
        torch.testing.assert_close((old - new).isnan(), grad.isnan())


def test_no_row_counts_that_is_not_in_the_batch(device: str) -> None:
    """A tile has more rows than the batch; the row in their place is full of NaN."""
    net = Net(device)
    net.order = net.order[net.order != 0]
    net.x[0] = float("nan")
    _, grads = net.gradients(net.order[:33])
    before = [p.clone() for p in net.w]
    net.train(rows_of({0: 1.0}, device=device))
    for old, new, grad in zip(before, net.w, grads, strict=True):
        assert_near(old - new, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accuracy_takes_the_first_of_equal_logits(device: str, dtype: torch.dtype) -> None:
    net = Net(device, dtype=dtype)
    for p in net.w:
        p.zero_()
    _, accuracies = net.train(rows_of({}, device=device, dtype=dtype), batch_size=50)
    assert accuracies[0] == torch.tensor((net.targets == 0).sum().item() / 50, dtype=dtype)


def test_accuracy_takes_nan_for_the_largest_logit(device: str) -> None:
    """As argmax does in PyTorch: in every row it is that of class 3, behind others."""
    net = Net(device)
    net.w[3][3] = float("nan")
    _, accuracies = net.train(rows_of({}, device=device), batch_size=50)
    assert_near(accuracies[0], (net.targets == 3).double().mean())


STREAMED = pytest.mark.parametrize("tiles", ["one tile each", "several"], indirect=True)

MANY = describe((19, 20, 150), ("relu", "identity"), accuracy=True)


@STREAMED
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_outputs_in_several_tiles(device: str, depth: int) -> None:
    """Behind nets of any depth, some of whose biases are not there, and with an activation behind the last layer."""
    sizes = {1: (3, 1000), 2: (19, 40, 129), 3: (19, 20, 33, 144), 5: (3, 17, 20, 33, 18, 200)}[depth]
    names = [("tanh", "gelu")[layer % 2] for layer in range(depth)]
    assert_gradients(device, describe(sizes, names, [layer % 3 != 1 for layer in range(depth)]))


@STREAMED
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_in_several_tiles(device: str, name: str) -> None:
    assert_cross_entropy(device, MANY, name)


@STREAMED
def test_several_steps_of_several_tiles(device: str) -> None:
    """Of four layers, clipped, and of batches of several tiles: 33 rows, then 17, then 33."""
    step = describe((18, 33, 20, 17, 140), ["silu", "relu", "elu", "identity"], clipped=True)
    net, expected = Net(device, step), Net(device, step)
    net.order = torch.cat([net.order] * 2)
    losses, _ = net.train(rows_of(*[{0: 0.5, MAX_NORM: 0.25}] * 3, device=device, step=step))
    for made, rows in enumerate(net.order[:83].split([33, 17, 33])):
        loss, grads = expected.gradients(rows)
        expected.w = [p - 0.5 * grad for p, grad in zip(expected.w, clip(grads, 0.25), strict=True)]
        assert_near(losses[made], loss)
    for new, wanted in zip(net.w, expected.w, strict=True):
        assert_near(new, wanted)


@STREAMED
@pytest.mark.parametrize("label", [-1, 150, 2**40])
def test_a_label_out_of_range_in_several_tiles(device: str, label: int) -> None:
    """Its row is NaN, in all outputs and in no other row: the bias of the last layer is NaN."""
    net = Net(device, MANY)
    net.targets[net.order[2]] = label
    losses, _ = net.train(rows_of({0: 1.0}, device=device))
    assert losses.isnan().all()
    assert net.w[3].isnan().all()


@STREAMED
@pytest.mark.parametrize("infinite", [range(130), range(40, 150)])
def test_tiles_of_infinitely_small_outputs(device: str, infinite: range) -> None:
    """The first tiles, or the last ones; the labels are others."""
    net = Net(device, MANY._replace(loss=Loss("cross_entropy")))
    net.w[3][infinite.start : infinite.stop] = -float("inf")
    net.targets.copy_(net.targets % 20 + (130 if infinite.start == 0 else 0))
    before, (loss, grads) = [p.clone() for p in net.w], net.gradients(net.order[:33])
    losses, _ = net.train(rows_of({0: 1.0}, device=device))
    assert_near(losses[0], loss)
    for old, new, grad in zip(before, net.w, grads, strict=True):
        assert_near(torch.where(old.isinf(), 0.0, old - new), torch.where(old.isinf(), 0.0, grad))


@STREAMED
@pytest.mark.parametrize("where", [(0,), (140,), (20, 100)])
@pytest.mark.parametrize("value", [float("nan"), 1e3])
def test_the_largest_of_several_tiles(device: str, value: float, where: tuple[int, ...]) -> None:
    """It is NaN, if there is one, behind larger ones; and the first of equal ones."""
    net = Net(device, MANY)
    net.w[2].zero_()
    net.w[3].zero_()
    net.w[3][list(where)] = value
    net.w[3][77] = 100.0
    net.targets[:] = where[-1]
    net.targets[net.order[:11]] = where[0]
    _, accuracies = net.train(rows_of({}, device=device))
    assert_near(accuracies[0], (net.targets[net.order[:33]] == where[0]).double().mean())


LOSSES_IN_TILES = {
    "labels": Loss("cross_entropy", True, True, True, rows_weighted=True, scaled=True),
    "probabilities": Loss("cross_entropy_probabilities", True, True, True, rows_weighted=True, scaled=True),
    "plain probabilities": Loss("cross_entropy_probabilities", False),
    "mse": Loss("mse", rows_weighted=True), "l1": Loss("l1", False), "smooth_l1": Loss("smooth_l1", numbers=(0.5,)),
    "huber": Loss("huber", numbers=(0.75,)), "poisson_nll": Loss("poisson_nll", scaled=True),
    "bce_with_logits": Loss("bce_with_logits", True, True, positive_weighted=True, rows_weighted=True),
}  # fmt: skip


@STREAMED
@pytest.mark.parametrize("name", LOSSES_IN_TILES)
def test_any_loss_in_several_tiles(device: str, name: str, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is that of outputs that are one tile, which other tests hold against PyTorch."""
    loss = LOSSES_IN_TILES[name]
    accuracy = loss.name in ("cross_entropy", "cross_entropy_probabilities", "bce_with_logits")
    step = describe((19, 20, 75), ("relu", "identity"), loss=loss, accuracy=accuracy)
    results = []
    for most in (128, 16):
        monkeypatch.setattr(mlp_training, "MOST_IN_TILE", most)
        mlp_training.plan_training.cache_clear()
        net, generator = Net(device, step), torch.Generator().manual_seed(5)
        numbers = torch.rand(50, 80, generator=generator, dtype=torch.float64).to(device)
        if name != "labels":
            net.targets = numbers[:, :75]
        weights = {"class_weight": numbers[0, :75] + 0.5, "pos_weight": numbers[1, :75] + 0.5}
        table = rows_of({0: 0.5, LOSS_SCALE: 1.5}, device=device, step=step)
        traces = net.train(table, label_smoothing=0.25, sample_weight=numbers[:, 79], **weights)
        results.append([*traces, *net.w])
        cut = mlp_training.plan_training(step, 33, "other", torch.float64, "ieee", True).options["TILES"]
        assert (cut.outputs < 75) == (most == 16)
    for one, several in zip(*results, strict=True):
        assert_near(several, one)


def test_bits_repeat_and_do_not_depend_on_the_chunks(device: str) -> None:
    runs = []
    for chunks in ([6], [6], [1, 3, 2]):
        net, done = Net(device, dtype=torch.float32), 0
        net.order = torch.cat([net.order] * 3)
        order, starts = net.order, [0, 33, 50, 83, 100, 133]
        losses = []
        for steps in chunks:
            net.order = order[starts[done] :]
            table = rows_of(*[{0: 0.1}] * steps, device=device, dtype=torch.float32)
            losses.append(net.train(table, position=starts[done] % 50)[0])
            done += steps
        runs.append([torch.cat(losses), *net.w])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_every_table_holds_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one program, and in tiles no smaller than a product may be."""
    monkeypatch.undo()
    mlp_training.plan_training.cache_clear()
    nets = [(1, 1, 1), (4096, 4096, 128), (65, 7, 100), (3, 2), (5000, 128), (64, 128, 64, 10), (4, *[64] * 7, 2)]
    for architecture, precision in mlp_training.CONFIGS:
        for sizes in nets:
            for batch in (1, 33, 512):
                step = describe(sizes, ["relu"] * (len(sizes) - 1))
                dtype = torch.float64 if precision == "fp64" else torch.float32
                kind = (architecture, dtype, "ieee" if precision == "fp64" else precision)
                launched = mlp_training.plan_training(step, batch, *kind)
                tiles = launched.options["TILES"]
                assert min(tiles[:4]) >= 16
                assert tiles.outputs >= sizes[-1]
                assert tiles.one_batch == (batch <= tiles.batch)
                way = mlp_training.choose(step, batch, architecture, precision)[0]
                assert tiles.precision == (mlp_training.SPLIT if "split" in way else kind[2])
                assert tiles.held == ("held" in way)
                assert tiles.fenced == (architecture in ("sm_90", "sm_100"))
                assert launched.grid == (1,)
                assert not tiles.on_chip or (tiles.one_batch and max(sizes[1:-1], default=0) <= tiles.hidden)


def test_what_is_on_chip(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net of the goals is, as long as its sums fit into the tile of the outputs."""
    monkeypatch.undo()
    mlp_training.plan_training.cache_clear()
    relu = ["relu", "identity"]

    def cut(sizes: Sequence[int], batch: int, precision: str = "tf32", **more: Any) -> mlp_training.Tiles:
        step = describe(sizes, relu, **more)
        found: mlp_training.Tiles = mlp_training.plan_training(step, batch, "sm_90", torch.float32, precision).options[
            "TILES"
        ]
        return found

    plain, split = ("tf32", True), (mlp_training.SPLIT, True)
    assert cut((64, 128, 10), 32)[:7] == (32, 128, 64, 16, True, *plain)
    assert cut((64, 128, 10), 32, "ieee")[:7] == (32, 128, 64, 16, True, *split)
    assert cut((64, 128, 14), 32).outputs == 16
    assert cut((64, 128, 14), 32, accuracy=True)[:7] == (32, 128, 64, 16, True, "tf32", False)  # 17 columns
    assert cut((64, 64, 14), 32, accuracy=True)[:7] == (32, 64, 64, 32, True, *plain)
    assert cut((64, 64, 14), 32, loss=Loss("cross_entropy", weighted=True)).outputs == 32
    assert cut((64, 64, 14), 32, loss=Loss("mse", rows_weighted=True)).outputs == 32
    assert cut((64, 64, 14), 32, loss=Loss("bce_with_logits", weighted=True)).outputs == 16  # of outputs, not of rows
    assert cut((784, 128, 10), 128).on_chip
    assert cut((64, 128, 10), 32, clipped=True)[:9] == (32, 128, 64, 16, True, *plain, False, False)  # and not held
    assert not cut((64, 128, 10), 129).on_chip
    assert not cut((64, 129, 10), 32).on_chip
    for precision, most in (("tf32", 64), ("ieee", 32)):  # rows of a batch whose parameters are held
        assert cut((64, 128, 10), most, precision).held
        assert not cut((64, 128, 10), most + 1, precision).held
        assert cut((64, 128, 10), 2 * most, precision).on_chip
        assert not cut((65, 128, 10), 16, precision).held
        assert cut((65, 128, 10), 16, precision).on_chip


def test_nothing_of_many_outputs_is_loaded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of outputs Triton would have what it loads ahead where other tiles are stored."""
    monkeypatch.undo()
    mlp_training.plan_training.cache_clear()
    for outputs, stages, tile in ((128, 2, 128), (129, 1, 128), (1000, 1, 128)):
        step = describe((384, outputs), ["identity"])
        planned = mlp_training.plan_training(step, 32, "sm_90", torch.float32, "tf32")
        assert planned.options["num_stages"] == stages
        assert planned.options["TILES"].outputs == tile


def test_what_differs_is_compiled_apart() -> None:
    """Triton's key of a kernel has the str() of a compile-time argument: that of a step must say all of it."""
    activations = PLAIN.activations
    others = [
        PLAIN._replace(sizes=(INPUTS, HIDDEN + 1, OUTPUTS)), PLAIN._replace(biases=(True, False)),
        PLAIN._replace(activations=activations[::-1]), PLAIN._replace(accuracy=False),
        PLAIN._replace(activations=(Activation("elu", (1.0,)), activations[1])),
        PLAIN._replace(activations=(Activation("elu", (1.5,)), activations[1])),
        PLAIN._replace(loss=Loss("cross_entropy", True, True)), PLAIN._replace(rule=Rule("sgd", maximize=True)),
    ]  # fmt: skip
    steps = [PLAIN, *others]
    plans = [mlp_training.plan_training(step, 32, "other", torch.float32, "ieee") for step in steps]
    assert len({str(planned.options["STEP"]) for planned in plans}) == len(steps)
