"""Every kernel compiled ahead of time for the architectures that we ship to, without a GPU, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def check(*arguments: str) -> str:
    """Compile, hold against the budgets, and return the table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "bench.resources", "--check", *arguments],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_simple_nn_in_bfloat16() -> None:
    """What SimpleNN(64, 128, 10) launches, for all four targets."""
    table = check("--kernels", "bf16 64-128-10")
    for kernel in ("linear_forward", "linear_input_grad", "linear_weight_grad", "cross_entropy"):
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert any(line.startswith(kernel) and target in line for line in table.splitlines())


def test_the_training_loop_of_the_textbook_net() -> None:
    """On an H100 next to nothing spills in TF32; exact, and elsewhere, no more than the budgets and figures say."""
    table = check("--kernels", "fp32 64-128-10 batch 32 default", "--targets", "sm_80,sm_90,sm_100")
    lines = [line for line in table.splitlines() if line.startswith("mlp_training")]
    assert len(lines) == 6
    for line in lines:
        registers, stack, spills = map(int, line.split("sm_")[1].split()[1:4])
        assert 32 < registers <= 255
        if "tf32" in line and "sm_90" in line:
            assert stack <= 48
            assert spills <= 24


def test_a_training_loop_of_many_layers() -> None:
    """GPUs of NVIDIA's and AMD's."""
    table = check("--kernels", "fp32 64-128-64-10 batch 32 default ieee", "--targets", "sm_90,gfx942")
    assert len([line for line in table.splitlines() if line.startswith("mlp_training")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_everything_that_a_launcher_can_choose(target: str) -> None:
    assert "0 broken or not compiled" in check("--targets", target, "--jobs", "1")
