"""The textbook training loop, an epoch a call of train_steps."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .. import train_steps
from .data import Digits, Images


class Epoch(NamedTuple):
    """What an epoch came to, a row of history.csv. Losses are means over the images, in nats."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: nn.Module,
    digits: Digits,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Iterator[Epoch]:
    """Train `model` with `optimizer` on `digits.train`, where all of them lie; yields after every epoch.

    The images come in a new order each epoch, drawn on the CPU from `seed`; the last batch is what is left.
    The training loss is taken along the way, before each step.

    Raises FloatingPointError when a loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = digits.train
    for epoch in range(1, epochs + 1):
        losses = train_steps(
            model, optimizer, inputs, targets, batch_size=batch_size, epochs=1, generator=generator, criterion=criterion
        )
        # Read once an epoch: reading each loss would make an accelerator wait for every step.
        *whole, last = losses.tolist()
        left = len(inputs) - batch_size * len(whole)  # the images of the last batch
        train_loss = (batch_size * sum(whole) + left * last) / len(inputs)
        result = Epoch(epoch, train_loss, *evaluate(model, criterion, digits.validation))
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
