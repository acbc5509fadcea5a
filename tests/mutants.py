"""Kernels broken on purpose: `make mutants` breaks each one way at a time and fails if the tests let a breakage live.

    python -m tests.mutants [--only SUBSTRING] [--jobs 2]

A mutant is one replaced line in a copy of the repository; it is killed when the tests of its file fail there. A test
that a wrong kernel passes is a defect, so whoever writes a kernel adds its mutants to `mutants.toml`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """The first `old` in `function` of `file` becomes `new`; `tests` is what pytest runs, and one of them must fail."""

    file: str
    tests: list[str]
    function: str
    change: str
    old: str
    new: str

    @property
    def is_native(self) -> bool:
        """Whether the file is C++, and not Python."""
        return not self.file.endswith(".py")

    @property
    def name(self) -> str:
        """What `--only` searches and what is printed."""
        return f"{'native ' * self.is_native}{self.function}: {self.change}"

    def source(self) -> str:
        """The broken file. Raises ValueError where the function has nothing to break: the list must keep up."""
        text = (ROOT / self.file).read_text()
        before, behind = (" ", "\n}\n") if self.is_native else ("def ", "\n\n\n")
        start = text.index(f"{before}{self.function}(")
        end = text.find(behind, start)
        place = text.index(self.old, start, len(text) if end < 0 else end)
        return text[:place] + self.new + text[place + len(self.old) :]


MUTANTS = [
    Mutant(file["path"], file["tests"], function, change, old, new)
    for file in tomllib.loads((ROOT / "tests/mutants.toml").read_text())["file"]
    for function, changes in file.items()
    if function not in ("path", "tests")
    for change, (old, new) in changes.items()
]


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass on a copy of the repository with `mutant` in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        (copy / mutant.file).write_text(mutant.source())
        if mutant.is_native:
            for built in (copy / "fusednn").glob("_native*"):
                built.unlink()
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=copy, capture_output=True, check=True)
            if not list((copy / "fusednn").glob("_native*")):
                raise RuntimeError(f"{mutant.name}: does not compile")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if result.returncode > 1:  # pytest could not run; a crash, of a read out of bounds, is negative and a kill
        raise RuntimeError(f"{mutant.name}: pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants; 1 if one lives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only mutants with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once; default: %(default)s")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    living = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, lives in zip(mutants, pool.map(survives, mutants), strict=True):
            print(f"{'LIVES ' if lives else 'killed'}  {mutant.file}  {mutant.name}", flush=True)
            living += [mutant.name] * lives
    print(f"{len(mutants)} mutants, {len(living)} alive")
    return int(bool(living) or not mutants)


if __name__ == "__main__":
    sys.exit(main())
