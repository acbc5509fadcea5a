"""What of the benchmarks of train_steps needs no GPU: its loops do the same, and what is printed and when it ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import bench_train_steps, conftest
from bench.bench_train_steps import COLD, DIGITS, IMPLEMENTATIONS, LEADING, Case, Loop

CASES = [*bench_train_steps.long_cases(), *bench_train_steps.call_cases(), *bench_train_steps.growth_cases()]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph is a function, capturable Adam plain, and Inductor left out."""

    def capture(call: Any, calls: int) -> Any:
        for _ in range(3 + calls):
            call()
        return SimpleNamespace(replay=call)

    monkeypatch.setattr(bench_train_steps, "capture", capture)
    monkeypatch.setattr(bench_train_steps, "compiled", lambda step: torch.compile(step, backend="eager"))
    for name, implementation in IMPLEMENTATIONS.items():
        adam = tuple(option for option in implementation.adam if option != "capturable")
        monkeypatch.setitem(IMPLEMENTATIONS, name, implementation._replace(adam=adam))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.filterwarnings("default")  # as there
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_loop_has_the_losses_of_eager(name: str) -> None:
    loop = Loop(Case(DIGITS, 32, 0, "ieee", name), "cpu")
    loop.check()
    loop.run(2)
    assert int(loop.optimizer.state[next(loop.model.parameters())]["step"]) == 12


@pytest.mark.parametrize(("place", "what"), [(0, "gradient"), (1, "gradient"), (3, "gradient"), (None, "not close")])
def test_a_loop_that_does_something_else_is_noticed(
    place: int | None, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient, or the losses."""
    train = Loop.train

    def wrong(loop: Loop, steps: int) -> torch.Tensor:
        losses = train(loop, steps)
        if place is not None:
            loop.optimizer.state[[*loop.model.parameters()][place]]["exp_avg"] *= 1.2
        return losses if place is not None else losses * 1.05

    monkeypatch.setattr(Loop, "train", wrong)
    with pytest.raises(AssertionError, match=what):
        Loop(Case(DIGITS, 32, 0, "tf32", "fusednn"), "cpu").check()


@pytest.mark.parametrize("case", [Case(sizes, batch, 0, "ieee", "fusednn") for sizes, batch, _ in LEADING])
def test_one_program_serves_what_is_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_train_steps.ROWS, 784, 256)
    assert Loop(case, "cpu").engine().startswith("train_steps: resident")


def test_the_first_call_of_a_process_is_timed(tmp_path: Path) -> None:
    assert conftest.cold(COLD, ["fusednn", "ieee", "cpu"], tmp_path) > 0


def test_cases_are_each_once_and_the_best_first() -> None:
    assert len({(case.group(), case.implementation) for case in CASES}) == len(CASES)
    assert [case.implementation for case in CASES[:3]] == ["eager", "fusednn", "CUDA graph"]
    ours = [case for case in CASES if case.implementation == "fusednn"]
    held = {case.group(): case.notes().get("most us") for case in ours if "goals" in case.notes()}
    assert held == {
        "training step, 64-128-10, batch 32, tf32": 5,
        "training step, 64-128-10, batch 32, ieee": 10,
        "training step, 784-128-10, batch 128, tf32": None,
        "training step, 784-128-10, batch 128, ieee": None,
    }


def timed(seconds: float, **notes: Any) -> Any:
    return SimpleNamespace(stats=SimpleNamespace(median=seconds), extra_info=notes)


def test_the_summary_holds_goals_and_microseconds() -> None:
    goals = {"eager": 1 / 50, "CUDA graph": 1 / 8, "absent": 1.0}
    ours = timed(4e-3, goals=goals, **{"steps a round": 1000, "most us": 5})
    group = {"eager": timed(250e-6), "fusednn": ours, "CUDA graph": timed(28e-6)}
    held, peer = conftest.summary("g", group)
    assert held.startswith("g: fusednn 4.00 us (budget 5 us: kept), 0.016 of eager's 250.00 us (budget 0.02: kept)")
    assert held.endswith(", 0.143 of CUDA graph's (budget 0.125: BROKEN)")
    assert peer == "g: CUDA graph 28.00 us, 0.112 of eager's 250.00 us"
    ours.extra_info["most us"] = 3
    assert conftest.summary("g", {"fusednn": ours}) == ["g: fusednn 4.00 us (budget 3 us: BROKEN)"]
