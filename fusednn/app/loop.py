"""The textbook training loop."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from .data import Digits, Images


class Epoch(NamedTuple):
    """What an epoch came to, a row of history.csv. Losses are means over the images, in nats."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float


def fit(
    model: nn.Module,
    criterion: nn.Module,
    digits: Digits,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Iterator[Epoch]:
    """Train `model` with Adam on `digits.train`, where both lie; yields after every epoch.

    The images come in a new order each epoch, drawn on the CPU from `seed`; the last batch is what is left.
    The training loss is taken along the way, before each step.

    Raises FloatingPointError when a loss is no longer finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = digits.train
    for epoch in range(1, epochs + 1):
        # Summed on the device: reading each loss would make an accelerator wait for every step.
        total = torch.zeros((), device=inputs.device)
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        for rows in order.split(batch_size):
            loss = criterion(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        result = Epoch(epoch, total.item() / len(inputs), *evaluate(model, criterion, digits.validation))
        if not (math.isfinite(result.train_loss) and math.isfinite(result.validation_loss)):
            raise FloatingPointError(f"the loss is no longer finite in epoch {epoch}")
        yield result


def evaluate(model: nn.Module, criterion: nn.Module, images: Images) -> tuple[float, float]:
    """The mean loss of `model` on `images`, in nats, and the share of them that it names right."""
    with torch.no_grad():
        logits = model(images.inputs)
        loss = criterion(logits, images.targets)
        right = (logits.argmax(dim=1) == images.targets).sum()
    return loss.item(), right.item() / len(images.targets)
