"""That the list of mutants keeps up with the kernels; `make mutants` runs it."""

import re
from collections import Counter

import pytest

from tests.mutants import ADAM, CROSS_ENTROPY, LINEAR, MUTANTS, ROOT, TRAINING, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_its_file(mutant: Mutant) -> None:
    source = mutant.source()
    assert source != (ROOT / mutant.file).read_text()
    if mutant.file.endswith(".py"):
        compile(source, mutant.file, "exec")


@pytest.mark.parametrize("file", [LINEAR, CROSS_ENTROPY, TRAINING, ADAM])
def test_every_kernel_has_three(file: str) -> None:
    counts = Counter(mutant.name.split(":")[0] for mutant in MUTANTS if mutant.file == file)
    kernels = re.findall(r"^def (\w+_kernel)\(", (ROOT / file).read_text(), re.MULTILINE)
    assert kernels
    assert {name: counts[name] for name in kernels if counts[name] < 3} == {}
