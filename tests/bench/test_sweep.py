"""The sweep, as far as it needs no GPU: which configurations it tries, and what it reports."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench import builds, gpu, sweep
from bench.bench_train_steps import DIGITS, MNIST
from bench.sweep import Setting, Timed
from fusednn.kernels import mlp_training

SETTINGS = [Setting(*case, precision, "sm_90") for precision in sweep.PRECISIONS for case in sweep.CASES]


def launched(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The configuration that the launcher chooses."""
    plans: list[Any] = []
    monkeypatch.setattr(mlp_training, "precision_of", lambda x: setting.precision)
    monkeypatch.setattr(mlp_training, "architecture_of", lambda x: setting.architecture)
    monkeypatch.setattr(mlp_training, "launch", lambda kernel, plan, *arguments: plans.append(plan))
    builds.train(setting.step(), setting.batch, torch.float32)
    options = plans[0].options
    return (*options["TILES"][:3], options["num_warps"], options["num_stages"])


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


def test_each_row_of_the_table_has_a_case() -> None:
    """Of an H100 in TF32, but that of nets with more layers than any case."""
    rows = [config for *_, config in mlp_training.CONFIGS["sm_90", "tf32"][:-1]]
    chosen = [mlp_training.choose(builds.DEFAULT.step(sizes), batch, "sm_90", "tf32") for sizes, batch in sweep.CASES]
    assert {*chosen} == {*rows}
    assert sweep.CASES[:2] == [(DIGITS, 32), (MNIST, 128)]


def test_the_report_names_the_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    setting = SETTINGS[0]
    best, other = Timed((32, 64, 64, 8, 1), None, 10, [3.0, 2.0, 2.5]), Timed(setting.current(), None, 10, [5.0])  # type: ignore[arg-type]
    sweep.report(setting, [best, other])
    said = capsys.readouterr().out
    row = '("sm_90", "tf32"): (2, 32, None, (32, 64, 64, 8, 1)),'
    assert f"{row}  # 64-128-10, batch 32, tf32: 2.50 us on a card, 0.500 of the current row" in said
    assert "2.00 to     3.00" in said
    sweep.report(setting, [best])
    assert "2.50 us on a card\n" in capsys.readouterr().out


COMPILE = """
from bench import resources, sweep

if __name__ == "__main__":
    sweep.Setting.configs = lambda setting: [(64, 32, 64, 8, 1), (128, 64, 64, 8, 1)]
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
