import math

import pytest
import torch
from torch import nn

from fusednn import explain
from fusednn.app.data import load
from fusednn.app.loop import Epoch, evaluate, fit


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr)


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch trains, as in a process with neither Triton nor the native engine: the bits of the loop written out."""
    monkeypatch.setattr("fusednn.dispatch.INTERPRETED", False)
    monkeypatch.setattr("fusednn.training.plan.MACHINES", {})


@pytest.mark.usefixtures("looped")
def test_fit_is_the_textbook_loop():
    digits, criterion = load(0), nn.CrossEntropyLoss()
    model, reference = network(), network()
    history = list(fit(model, adam(model, 0.01), criterion, digits, epochs=2, batch_size=100, seed=7))

    optimizer = adam(reference, 0.01)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        for rows in torch.randperm(1437, generator=generator).split(100):
            loss = criterion(reference(digits.train.inputs[rows]), digits.train.targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert [row.epoch for row in history] == [1, 2]
    assert history[-1][2:] == evaluate(reference, criterion, digits.validation)


def test_every_epoch_is_one_call_of_train_steps():
    digits, model = load(0), network()
    epochs = fit(model, adam(model, 0.01), nn.CrossEntropyLoss(), digits, epochs=2, batch_size=500, seed=7)
    for _ in range(2):
        decisions = explain(next, epochs)
        assert [(decision.operation, decision.implementation) for decision in decisions] == [
            ("train_steps", "resident")
        ]


@pytest.mark.usefixtures("looped")
def test_losses_are_means_over_the_images():
    # One batch of 1,000 and one of 437, and steps too small to matter: a mean over the batches would differ.
    digits, model, criterion = load(0), network(), nn.CrossEntropyLoss()
    expected, _ = evaluate(model, criterion, digits.train)
    (row,) = fit(model, adam(model, 1e-12), criterion, digits, epochs=1, batch_size=1000, seed=0)
    assert row.train_loss == pytest.approx(expected, rel=1e-6)
    halves = [
        evaluate(model, criterion, type(digits.train)(*(t[rows] for t in digits.train)))[0]
        for rows in torch.randperm(1437, generator=torch.Generator().manual_seed(0)).split(1000)
    ]
    assert sum(halves) / 2 != pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("looped")
def test_a_loss_that_is_not_finite_ends_the_training():
    digits, model = load(0), network()
    with pytest.raises(FloatingPointError, match="in epoch 1"):
        list(fit(model, adam(model, 1e30), nn.CrossEntropyLoss(), digits, epochs=3, batch_size=500, seed=0))


def test_evaluate_counts_and_leaves_no_graph():
    images = load(0).test
    logits = nn.functional.one_hot(images.targets, 10).float()
    logits[:27] = -logits[:27]  # a tenth named wrong

    class Fixed(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return logits

    loss, accuracy = evaluate(Fixed(), nn.CrossEntropyLoss(), images)
    assert accuracy == pytest.approx(0.9)
    assert loss == pytest.approx(0.9 * math.log(1 + 9 / math.e) + 0.1 * math.log(1 + 9 * math.e))


def test_history_row_names():
    assert Epoch._fields == ("epoch", "train_loss", "validation_loss", "validation_accuracy")
