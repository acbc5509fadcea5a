"""The command `fusednn train`: SimpleNN on the handwritten digits."""

import csv
import io
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .. import CrossEntropyLoss, SimpleNN, explain, train_steps
from .checkpoint import save_model, write_atomically
from .data import Digits, load
from .loop import Epoch, evaluate, fit
from .options import CommandError, choose_device, make_folder, printable
from .plots import draw_curves


def train(options: Namespace) -> None:
    """Train as `options` of the parser say, and leave model.safetensors, history.csv and curves.png in options.out.

    The same options give the same model and history, bit for bit, on the same machine.

    Raises CommandError for a device or folder that cannot be used and files that cannot be written, FloatingPointError
    for a loss that is no longer finite.
    """
    device, out = choose_device(options.device), make_folder(options.out)
    # On two cores, one of them busy, a step of the default net took 0.7 ms with one thread and 12 ms with two; up to
    # 8,192 hidden units two threads gained nothing. And the bits do not depend on how many there are.
    torch.set_num_threads(1)
    digits = Digits(*(part.to(device) for part in load(options.seed)))
    torch.manual_seed(options.seed)
    model = SimpleNN(64, options.hidden, 10).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    criterion = CrossEntropyLoss()

    _say(f"device: {device}")
    batch_size, (inputs, targets) = options.batch_size, digits.train
    # No steps train nothing; and the evaluation calls the operations whoever trains.
    training = explain(
        train_steps, model, optimizer, inputs, targets, batch_size=batch_size, steps=0, criterion=criterion
    )
    operations = explain(lambda: criterion(model(inputs[:batch_size]), targets[:batch_size]))
    for decision in training + operations:
        _say(str(decision))

    settings = {name: getattr(options, name) for name in ("epochs", "batch_size", "seed")}
    history = []
    with _progress_bar(options.epochs) as bar:
        for epoch in fit(model, optimizer, criterion, digits, **settings):
            history.append(epoch)
            losses = f"loss {epoch.train_loss:.4f}, validation accuracy {epoch.validation_accuracy:.3f}"
            bar.set_postfix_str(losses, refresh=False)
            bar.update()
    _, accuracy = evaluate(model, criterion, digits.test)

    sizes = {"input_size": 64, "hidden_size": options.hidden, "output_size": 10}
    files = [out / name for name in ("model.safetensors", "history.csv", "curves.png")]
    try:
        save_model(model, files[0], {**sizes, **settings, "lr": options.lr, "test_accuracy": accuracy})
        write_atomically(files[1], _csv(history))
        write_atomically(files[2], draw_curves(history, accuracy))
    except OSError as error:
        raise CommandError(1, f"cannot write in {out}: {error}; make room there or choose another --out") from error
    _say(f"test accuracy {accuracy:.3f}")
    for file in files:
        _say(f"wrote {file}")


def _say(line: str) -> None:
    print(printable(line), flush=True)  # now, and not after what goes to stderr


def _progress_bar(epochs: int) -> "tqdm[Any]":
    """On stderr: live on a terminal; in a log some five updates, however long the run, and nothing before the first."""
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(total=epochs, unit="epoch")
    tqdm.monitor_interval = 0  # the thread that would speed up rare updates
    return tqdm(
        total=epochs, unit="epoch", disable=sys.stderr is None, miniters=-(-epochs // 5), mininterval=0, delay=1e-3
    )


def _csv(history: Sequence[Epoch]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Epoch._fields)
    table.writerows(history)
    return text.getvalue().encode()
