"""scikit-learn's MLPs, step by step from equal weights: its losses and its weight decay are scales of PyTorch's.

With O outputs its regressor has the gradient of half the squared error summed over the outputs, that is O / 2 times
nn.MSELoss, or O times nn.PoissonNLLLoss; its classifier that of the binary log loss summed over the outputs, O times
nn.BCEWithLogitsLoss, or nn.CrossEntropyLoss. Its penalty is alpha / 2 times the squares of the weights, biases apart,
divided by the rows of the batch, or by the sum of their weights; so a ragged batch decays more.
"""

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import nn

import fusednn
from fusednn import train_steps

from .runs import one_call

ROWS, BATCH, ALPHA, RATE, EPOCHS = 50, 16, 0.3, 0.05, 3
SIZES = {"regressor": 3, "one output": 1, "counts": 2, "labels at once": 4, "classes": 3, "two classes": 1}
REGRESSORS = ("regressor", "one output", "counts")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid}


def problem(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and what scikit-learn is to learn of them."""
    rng = np.random.default_rng(0)
    x, outputs = rng.normal(size=(ROWS, 6)), SIZES[kind]
    if kind == "counts":
        return x, rng.poisson(2.0, size=(ROWS, outputs)).astype(float)
    if kind in REGRESSORS:
        return x, rng.normal(size=(ROWS, outputs))
    if kind == "labels at once":
        return x, (rng.random((ROWS, outputs)) < 0.5).astype(int)
    return x, rng.permutation(np.arange(ROWS) % (3 if kind == "classes" else 2))


def net_of(estimator: Any, device: str) -> nn.Sequential:
    """Its layers, as they are now."""
    sizes = [len(estimator.coefs_[0]), *(w.shape[1] for w in estimator.coefs_)]
    layers: list[nn.Module] = []
    for (inputs, outputs), w, b in zip(pairwise(sizes), estimator.coefs_, estimator.intercepts_, strict=True):
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        linear.weight.data, linear.bias.data = torch.tensor(w.T).contiguous(), torch.tensor(b)
        layers += [linear, ACTIVATIONS[estimator.activation]()]
    return nn.Sequential(*layers[:-1]).to(device)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", SIZES)
def test_step_by_step(kind: str, activation: str, weighted: bool, device: str) -> None:
    x, y = problem(kind)
    weights = np.random.default_rng(1).random(ROWS) if weighted else None
    make = MLPRegressor if kind in REGRESSORS else MLPClassifier
    loss = {"loss": "poisson" if kind == "counts" else "squared_error"} if make is MLPRegressor else {}
    estimator = make(
        hidden_layer_sizes=(8, 7), activation=activation, solver="sgd", alpha=ALPHA, batch_size=BATCH,
        learning_rate_init=RATE, momentum=0.9, nesterovs_momentum=True, shuffle=False, random_state=0,
        max_iter=1, **loss,
    )  # fmt: skip
    more = {} if make is MLPRegressor else {"classes": np.unique(y) if y.ndim == 1 else np.arange(SIZES[kind])}
    given = y.ravel() if kind == "one output" else y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.partial_fit(x, given, **more)  # makes the weights; the optimizer is to begin anew
        del estimator._optimizer
        model = net_of(estimator, device)
        for _ in range(EPOCHS):
            estimator.partial_fit(x, given, sample_weight=weights)

    outputs, dtype = SIZES[kind], torch.float64
    criterion, scale = {
        "regressor": (nn.MSELoss(), outputs / 2), "one output": (nn.MSELoss(), 0.5),
        "counts": (nn.PoissonNLLLoss(), outputs),
        "labels at once": (nn.BCEWithLogitsLoss(), outputs), "two classes": (nn.BCEWithLogitsLoss(), 1.0),
        "classes": (nn.CrossEntropyLoss(), 1.0),
    }[kind]  # fmt: skip
    targets = torch.tensor(y) if kind == "classes" else torch.tensor(y, dtype=dtype).view(ROWS, outputs)
    sums = [float(part.sum()) for part in np.array_split(np.ones(ROWS) if weights is None else weights, [16, 32, 48])]
    matrices = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    vectors = [layer.bias for layer in model if isinstance(layer, nn.Linear)]
    groups = [{"params": matrices, "weight_decay": ALPHA}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    arguments: dict[str, Any] = {
        "criterion": criterion, "epochs": EPOCHS, "batch_size": BATCH, "shuffle": False, "loss_scale": scale,
        "decay_scale": lambda step: 1 / sums[step % len(sums)],
        "sample_weight": None if weights is None else torch.tensor(weights, device=device),
    }  # fmt: skip
    x, targets = torch.tensor(x, device=device), targets.to(device)
    decision = fusednn.explain(train_steps, model, optimizer, x, targets, **arguments)[0]
    assert decision.implementation == one_call(device)
    for ours, theirs in zip(matrices, estimator.coefs_, strict=True):
        np.testing.assert_allclose(ours.detach().cpu().numpy(), theirs.T, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(vectors, estimator.intercepts_, strict=True):
        np.testing.assert_allclose(ours.detach().cpu().numpy(), theirs, rtol=1e-9, atol=1e-11)
