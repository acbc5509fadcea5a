"""Each file of bench can be imported: what pytest does not collect here nobody else would see."""

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("*.py")))
def test_each_can_be_imported(name: str) -> None:
    importlib.import_module("bench" if name == "__init__" else f"bench.{name}")
