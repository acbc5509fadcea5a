"""start_step: a run that was stopped anywhere goes on to the bits of one that was not."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fusednn import reference, train_steps
from fusednn.training.engines import captured
from fusednn.training.job import check

from .runs import adam, assert_alike, data, net, train

ORDERS: dict[str, dict[str, Any]] = {
    "torch": {},
    "philox": {"order": "philox", "seed": 5, "generator": None},
    "in order": {"shuffle": False, "generator": None},
    "whole batches": {"drop_last": True},
}
EPOCHS, BATCH = 3, 16  # of 50 rows: four steps, of two rows the last; or three


def fresh(device: str, engine: str) -> nn.Module:
    model = net(device)
    if engine == "looped":
        model.register_forward_hook(lambda module, args, output: None)
    return model


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Saved(dict[int, Any]):
    """An on_chunk that keeps copies of model, optimizer and schedule as they are after each step."""

    def __init__(self, model: nn.Module, optimizer: Any, schedule: Any) -> None:
        super().__init__()
        self.kept = model, optimizer, schedule
        self(0)

    def __call__(self, done: int, losses: Any = None) -> None:
        self[done] = copy.deepcopy([thing.state_dict() for thing in self.kept])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("engine", ["one call", "looped"])
def test_stopped_anywhere(device: str, engine: str, order: str) -> None:
    x, targets = data(device)
    arguments = {"batch_size": BATCH, "epochs": EPOCHS, "generator": generator()} | ORDERS[order]
    model = fresh(device, engine)
    optimizer = adam(model.parameters())
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.95)
    saved = Saved(model, optimizer, schedule)
    whole = train_steps(model, optimizer, x, targets, lr_schedule=schedule, on_chunk=saved, chunk_steps=1, **arguments)
    assert len(saved) == len(whole) + 1 == EPOCHS * (3 if order == "whole batches" else 4) + 1
    for done, states in saved.items():
        again = fresh(device, engine)
        optimizer = adam(again.parameters())
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.95)
        for thing, state in zip((again, optimizer, schedule), states, strict=True):
            thing.load_state_dict(state)
        told: list[int] = []
        if arguments["generator"] is not None:
            arguments["generator"] = generator()
        losses = train_steps(
            again, optimizer, x, targets, lr_schedule=schedule, start_step=done,
            on_chunk=lambda done, losses, told=told: told.append(done), chunk_steps=5, **arguments,
        )  # fmt: skip
        assert torch.equal(losses, whole[done:])
        assert told == [step for step in (5, 10, len(whole)) if done < step <= len(whole)]
        for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert str(schedule.state_dict()) == str(saved[len(whole)][2])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("start_step", [1, 4, 7])
def test_as_the_reference_loop(device: str, start_step: int, order: str) -> None:
    x, targets = data(device)
    arguments = {"batch_size": BATCH, "steps": 9, "start_step": start_step} | ORDERS[order]
    assert_alike(*(train(loop, net(device), x, targets, **arguments) for loop in (train_steps, reference.train_steps)))


@pytest.mark.parametrize("start_step", [1, 4, 7])
def test_captured(monkeypatch: pytest.MonkeyPatch, start_step: int) -> None:
    monkeypatch.setattr(captured, "capture", lambda step, stream: step)
    x, targets = data("cpu")
    given: dict[str, Any] = {"batch_size": BATCH, "steps": 30, "start_step": start_step}
    given["criterion"] = nn.CrossEntropyLoss()
    model = net("cpu")
    expected = reference.train_steps(model, adam(model.parameters()), x, targets, generator=generator(), **given)
    model = net("cpu")
    options: Any = given | {"generator": generator()}
    engine = captured.Captured(check(model, adam(model.parameters()), x, targets, False, options), None)
    while engine.done < engine.job.steps:
        engine.advance(engine.job.steps - engine.done, None)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(engine.losses), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"start_step": -1, "steps": 3}, ValueError, "start_step needs to be at least 0, not -1"),
        ({"start_step": 1.0, "steps": 3}, TypeError, "start_step needs a whole number, not 1.0"),
        ({"start_step": 4, "steps": 3}, ValueError, "start_step=4 is past the end of 3 steps"),
        ({"start_step": 5, "epochs": 1, "batch_size": 16}, ValueError, "start_step=5 is past the end of 4 steps"),
    ],
)
def test_wrong_start_steps(given: dict[str, Any], error: type[Exception], words: str) -> None:
    model = net("cpu")
    with pytest.raises(error, match=words):
        train_steps(model, adam(model.parameters()), *data("cpu"), **given)


def test_at_the_end_nothing_is_left(device: str) -> None:
    model = net(device)
    before = copy.deepcopy(model.state_dict())
    losses = train_steps(model, adam(model.parameters()), *data(device), steps=4, start_step=4)
    assert losses.shape == (0,)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


PROGRAM = """
import sys, torch
from torch import nn
from fusednn import train_steps

path, stop = sys.argv[1], int(sys.argv[2])
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
x, targets = torch.randn(50, 20), torch.randint(10, (50,))
start = 0
if len(sys.argv) > 3:
    saved = torch.load(path)
    start = saved["done"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])

def save(done, losses):
    if done == stop:
        torch.save({"done": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        raise StopIteration

generator = torch.Generator().manual_seed(3)
train_steps(
    model, optimizer, x, targets, batch_size=16, epochs=3, generator=generator, start_step=start,
    on_chunk=save, chunk_steps=1,
)
torch.save(model.state_dict(), path + ".end")
"""


@pytest.mark.slow
def test_in_a_new_process(tmp_path: Path) -> None:
    """Where the native engine is built, by it."""
    ends = []
    for stops in ((99,), (5, 99)):
        path = str(tmp_path / str(len(stops)))
        for number, stop in enumerate(stops):
            arguments = [path, str(stop), *["go on"] * number]
            subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True)
        ends.append(torch.load(path + ".end"))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
