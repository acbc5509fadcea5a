"""Importing fusednn: what it costs, and what it does without."""

import os
import subprocess
import sys

import pytest

import fusednn

BLOCK_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
"""


def run(program: str, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=plain | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_everything_public_is_there() -> None:
    for name in fusednn.__all__:
        assert getattr(fusednn, name) is not None
        assert getattr(fusednn, name).__doc__


def test_import_needs_no_triton() -> None:
    program = BLOCK_TRITON + (
        "import torch, fusednn\n"
        "model = fusednn.SimpleNN(6, 8, 4)\n"
        "loss = fusednn.CrossEntropyLoss()(model(torch.randn(5, 6)), torch.zeros(5, dtype=torch.int64))\n"
        "loss.backward()\n"
        "print(fusednn.explain(model, torch.randn(5, 6))[0].reason)\n"
    )
    assert run(program) == "Triton is not installed\n"


def test_import_brings_nothing_heavy_and_asks_no_driver() -> None:
    """Neither Triton nor torch._dynamo, a second each, nor a CUDA context."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fusednn\n"
        "roots = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(roots, torch.cuda.is_initialized(), 'torch._dynamo' in sys.modules)\n"
    )
    assert run(program) == "{'fusednn'} False False\n"


def test_the_interpreter_is_asked_for_by_the_environment() -> None:
    program = "import torch, fusednn\nprint(fusednn.explain(fusednn.Linear(3, 2), torch.ones(1, 3))[0].implementation)"
    assert run(program, TRITON_INTERPRET="1") == "Triton interpreter\n"
    assert run(program, TRITON_INTERPRET="0") == "PyTorch\n"


def test_kernels_refuse_plain_cpu_tensors() -> None:
    """An operator called on its own, past dispatch, says what is wrong."""
    program = (
        "import torch, fusednn\n"
        "try:\n    torch.ops.fusednn.linear(torch.ones(2, 3), torch.ones(4, 3), None, True)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    assert "only under TRITON_INTERPRET=1" in run(program)


def test_version_is_setup_pys() -> None:
    from importlib.metadata import version

    assert fusednn.__version__ == version("fusednn")


@pytest.mark.parametrize("module", ["fusednn.kernels.linear", "fusednn.kernels.cross_entropy"])
def test_kernel_modules_import_without_a_driver(module: str) -> None:
    assert run(f"import {module}; print('imported')") == "imported\n"
