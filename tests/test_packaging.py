"""What setup.py promises, and what is in an sdist."""

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OTHERS = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "results")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an sdist, made from a copy of the tree: their text, by path."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    for name in ("fusednn", "kernels", "tests", "bench", "docs", "examples"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=OTHERS)
    for file in (*ROOT.glob("*.*"), ROOT / "LICENSE", ROOT / "Makefile", ROOT / ".pre-commit-config.yaml"):
        if file.is_file():
            shutil.copy(file, tree)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats=gztar", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        members = [member for member in packed.getmembers() if member.isfile()]
        files = {member.name: packed.extractfile(member) for member in members}
        return {name.partition("/")[2]: file.read().decode(errors="replace") for name, file in files.items() if file}


def files(*folders: str) -> set[str]:
    found = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts and path.suffix != ".so"}


def test_an_sdist_has_all_that_the_tests_need(sdist: dict[str, str]) -> None:
    wanted = {name for name in files("tests", "bench", "docs", "examples") if "results" not in name}
    assert len(wanted) > 70
    assert wanted - {*sdist} == set()
    assert {"Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} <= {*sdist}
    for name in files("kernels"):
        assert name in sdist
    for name in files("fusednn"):
        assert name in sdist
    assert "kernels/launch.py" in sdist
    assert "fusednn/kernels/launch.py" in sdist
    assert not [name for name in sdist if "__pycache__" in name or name.endswith(".so")]


def test_the_bounds_are_those_of_the_readme(sdist: dict[str, str]) -> None:
    """The highest is that of the next release, which may be another."""
    metadata, readme = sdist["PKG-INFO"], (ROOT / "README.md").read_text()
    for package in ("torch", "triton"):
        said = re.search(rf"{package} (\d)\.(\d+) to \d\.(\d+)", readme, re.IGNORECASE)
        assert said
        major, least, most = said.groups()
        wanted = {f">={major}.{least}", f"<{major}.{int(most) + 1}"}
        (line,) = re.findall(rf"^Requires-Dist: {package}([<>=][^;\n]*)", metadata, re.MULTILINE)
        assert {*line.split(",")} == wanted
    (python,) = re.findall(r"^Requires-Python: >=(.*)$", metadata, re.MULTILINE)
    assert f"Python {python}" in readme


def test_an_older_python_is_told_which_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit, match=r"fusednn needs Python 3\.11 or newer; this is"):
        runpy.run_path(str(ROOT / "setup.py"))
