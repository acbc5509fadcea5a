"""The direction of imports, by import-linter, and that import-linter would see a breach."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from importlinter.cli import lint_imports_command as main; sys.argv = ['lint-imports']; main()"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and the contract, without the installed ones in the way."""
    for name in ("fusednn", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_layers_hold(copy: Path) -> None:
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout
    assert "2 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels/linear.py", "import fusednn.modules"),
        ("kernels/cross_entropy.py", "from fusednn import dispatch"),
        ("fusednn/reference.py", "from . import functional"),
        ("fusednn/ops/linear.py", "from fusednn import functional"),
        ("fusednn/modules.py", "from .fuse import unfuse"),
        ("fusednn/reading/reader.py", "from ..fuse import fuse"),
        ("fusednn/fuse.py", "from .training import train_steps"),
        ("fusednn/training/plan.py", "import fusednn.app.cli"),
        ("kernels/mlp_training.py", "import fusednn.training"),
        ("kernels/step.py", "from . import launch"),
    ],
)
def test_an_upward_import_is_seen(copy: Path, module: str, line: str) -> None:
    path = copy / module
    path.write_text(path.read_text() + f"\n\ndef planted():\n    {line}\n")
    result = lint_imports(copy)
    assert result.returncode == 1, result.stdout
    assert "1 broken" in result.stdout
