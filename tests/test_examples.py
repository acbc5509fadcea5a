"""The examples run, and compute what plain PyTorch computes."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def losses(source: str, interpreted: str) -> list[float]:
    result = subprocess.run(
        [sys.executable, "-c", source],
        env={"PATH": "", "HOME": str(Path.home()), "TRITON_INTERPRET": interpreted},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(line.split()[-1]) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("interpreted", ["0", "1"], ids=["plain", "interpreter"])
@pytest.mark.parametrize(
    ("name", "line", "plain_line"),
    [
        (
            "simple_nn.py",
            "from fusednn import CrossEntropyLoss, SimpleNN",
            "from torch.nn import CrossEntropyLoss\nfrom fusednn.reference import SimpleNN",
        ),
        (
            "train_steps.py",
            "from fusednn import SimpleNN, train_steps",
            "from fusednn.reference import SimpleNN, train_steps",
        ),
        (
            "data_loader.py",
            "from fusednn import SimpleNN, make_train_step",
            "from fusednn.reference import SimpleNN, make_train_step",
        ),
    ],
    ids=["simple_nn", "train_steps", "data_loader"],
)
def test_is_the_textbook_script(name: str, line: str, plain_line: str, interpreted: str) -> None:
    """With its one import line changed back it is a plain PyTorch script; losses agree from the same seed."""
    source = (EXAMPLES / name).read_text()
    plain = source.replace(line, plain_line)
    assert plain != source
    found = losses(source, interpreted)
    assert found == pytest.approx(losses(plain, "0"), abs=1e-4)
    assert len(found) == 10
