"""The sweep, as far as it needs no GPU: which configurations it tries, and what it reports."""

import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch

from bench import builds, gpu, sweep
from bench.bench_train_steps import DIGITS, MNIST, Case, Loop
from bench.sweep import Setting, Timed
from fusednn.kernels import mlp_training

SETTINGS = [Setting(*case, precision, "sm_90") for precision, cases in sweep.CASES.items() for case in cases]


def launched(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The configuration that the launcher chooses."""
    plans: list[Any] = []
    monkeypatch.setattr(mlp_training, "precision_of", lambda x: setting.precision)
    monkeypatch.setattr(mlp_training, "architecture_of", lambda x: setting.architecture)
    monkeypatch.setattr(mlp_training, "launch", lambda kernel, plan, *arguments: plans.append(plan))
    builds.train(setting.step(), setting.batch, torch.float32)
    options = plans[0].options
    tiles = options["TILES"]
    words = ["held"] * tiles.held + ["rows"] * tiles.as_rows + ["split"] * (tiles.precision == mlp_training.SPLIT)
    if not tiles.held and not tiles.as_rows:
        words = [*(["columns"] + ["whole"] * (tiles.least > 16) if tiles.on_chip else ["streamed"]), *words]
    return (" ".join(words), *tiles[:3], options["num_warps"], options["num_stages"])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_is_tried_is_what_is_launched(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = setting.configs()
    assert configs[0] == setting.current() == launched(setting, monkeypatch)
    assert len({*configs}) == len(configs) >= 12
    before = dict(mlp_training.CONFIGS)
    for config in configs:
        with sweep.table_of(setting, config):
            assert launched(setting, monkeypatch) == config
    assert before == mlp_training.CONFIGS
    assert launched(setting, monkeypatch) == configs[0]


def test_both_ways_are_tried_where_they_fit() -> None:
    """On chip in tiles of 64 and 32 inputs, exact also split, next to streamed tiles; at most 25 or so a case."""
    configs = {str(setting): setting.configs() for setting in SETTINGS}
    tried = configs["784-128-10, batch 128, tf32"]
    on_chip = {(way, 128, 128, inputs, 8, 1) for way in ("columns", "rows") for inputs in (64, 32)}
    current = ("columns whole", 128, 128, 64, 8, 1)
    assert {config for config in tried if config[0] != "streamed"} == {*on_chip, current}
    assert {config[1:4] for config in tried if config[0] == "streamed"} == {*product((64, 32), (128, 64, 32), (64, 32))}
    ways = {"columns", "rows", "held", "held rows"}
    assert {config[0] for config in configs["64-128-10, batch 32, tf32"]} == ways | {"streamed"}
    exact = {config[0] for config in configs["64-128-10, batch 32, ieee"]}
    assert exact == ways | {f"{way} split" for way in ways} | {"streamed"}
    for too_large in ("64-128-10, batch 256, tf32", "64-256-10, batch 32, tf32"):
        assert {config[0] for config in configs[too_large]} == {"streamed"}
    assert sum(map(len, configs.values())) <= 25 * len(SETTINGS)


SHALLOW = [
    (inputs, *[hidden] * (layers - 1), outputs)
    for inputs, hidden, outputs, layers in product((4, 64, 784), (32, 64, 128, 256), (2, 10, 100), (1, 2, 3))
]


@pytest.mark.parametrize("precision", sweep.CASES)
def test_each_row_of_the_table_has_a_case(precision: str) -> None:
    """Of an H100, but those that serve only nets of more than three layers."""

    def rows(cases: Iterable[tuple[tuple[int, ...], int]]) -> set[tuple[Any, ...]]:
        return {Setting(*case, precision, "sm_90").row() for case in cases}

    served = rows(product(SHALLOW, (1, 32, 64, 128, 256, 512)))
    left = [row for row in mlp_training.CONFIGS["sm_90", precision] if row not in served]
    assert rows(sweep.CASES[precision]) == served
    assert all(row[0] is None for row in left)
    assert sweep.CASES[precision][:2] == [(DIGITS, 32), (MNIST, 128)]


def test_what_spills_is_not_timed_but_little_on_chip() -> None:
    streamed, spilling = ("streamed", 32, 64, 64, 8, 1), ("streamed", 32, 64, 64, 8, 2)
    little, much = ("columns", 32, 64, 64, 8, 1), ("rows", 32, 64, 64, 8, 1)
    found = {streamed: 0, spilling: 8, little: sweep.MOST_STACK, much: sweep.MOST_STACK + 8}
    assert sweep.worth_timing(found, streamed) == [streamed, little]
    assert sweep.worth_timing(found, spilling) == [streamed, spilling, little]
    assert sweep.worth_timing(found, much) == [streamed, little, much]
    assert sweep.worth_timing(found | {little: sweep.MOST_STACK + 8}, much) == [streamed, little, much]
    del found[little]  # the current one does not compile
    assert sweep.worth_timing(found, little) == [streamed]


def test_a_deep_net_trains_as_eager() -> None:
    loop = Loop(Case(sweep.DEEP, 32, 0, "ieee", "fusednn"), "cpu")
    assert loop.engine().startswith("train_steps: resident")
    loop.restart()
    loop.check()


def test_the_report_names_the_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    setting = SETTINGS[0]
    config = ("columns", 32, 128, 32, 16, 1)
    best, other = Timed(config, None, 10, [3.0, 2.0, 2.5]), Timed(setting.current(), None, 10, [5.0])  # type: ignore[arg-type]
    sweep.report(setting, [best, other])
    said = capsys.readouterr().out
    row = f'("sm_90", "tf32"): (2, 64, None, {config}),'
    assert f"{row}  # 64-128-10, batch 32, tf32: 2.50 us on a card, 0.500 of the current row" in said
    assert "2.00 to     3.00" in said
    sweep.report(setting, [best])
    assert "2.50 us on a card\n" in capsys.readouterr().out


def test_a_streamed_row_takes_no_more_from_one_on_chip_than_was_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    config = ("streamed", 32, 64, 64, 8, 1)
    for setting, most in ((SETTINGS[0], "2, 32, 64"), (Setting(DIGITS, 256, "tf32", "sm_90"), "2, None, 64")):
        sweep.report(setting, [Timed(config, None, 10, [3.0])])  # type: ignore[arg-type]
        assert f'("sm_90", "tf32"): ({most}, {config}),' in capsys.readouterr().out


COMPILE = """
from bench import resources, sweep

if __name__ == "__main__":
    sweep.Setting.configs = lambda setting: [("streamed", 64, 32, 64, 8, 1), ("streamed", 128, 64, 64, 8, 1)]
    with resources.workers(2, sweep.stand_in, 90) as pool:
        stacks = sweep.stacks(pool, sweep.Setting((64, 64, 10), 256, "tf32", "sm_90"))
    print([stack > 0 for stack in stacks.values()])
"""


def test_what_spills_is_found() -> None:
    """Compiled by processes that have no GPU, in a process that has none either."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=gpu.ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[False, True]\n", done.stdout + done.stderr
