"""That the list of mutants keeps up with the kernels; `make mutants` runs it."""

import re
from collections import Counter
from itertools import groupby

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_its_file(mutant: Mutant) -> None:
    source = mutant.source()
    assert source != (ROOT / mutant.file).read_text()
    if not mutant.is_native:
        compile(source, mutant.file, "exec")


def test_no_name_stands_twice() -> None:
    names = Counter(mutant.name for mutant in MUTANTS)
    files = Counter(file for file, _ in groupby(mutant.file for mutant in MUTANTS))
    assert [name for name, count in (names + files).items() if count > 1] == []


def test_the_tests_are_there() -> None:
    paths = {path for mutant in MUTANTS for path in mutant.tests if path.startswith("tests/")}
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_kernel_has_three() -> None:
    counts = Counter((mutant.file, mutant.function) for mutant in MUTANTS)
    kernels = [
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    ]
    assert kernels
    assert [kernel for kernel in kernels if counts[kernel] < 3] == []


def test_no_mutant_stands_twice() -> None:
    sources = Counter((mutant.file, mutant.source()) for mutant in MUTANTS)
    assert max(sources.values()) == 1


def test_the_documents_say_how_many() -> None:
    for name, words in (("CONTRIBUTING.md", "times"), ("docs/evidence.md", "ways")):
        assert f"{len(MUTANTS)} {words}" in (ROOT / name).read_text()
