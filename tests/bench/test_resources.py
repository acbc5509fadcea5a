"""bench.resources on toy kernels, in a process of its own: this one runs Triton's interpreter, which cannot compile."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

TOYS = """
import os
from types import SimpleNamespace

import triton
import triton.language as tl


@triton.jit
def double(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def center(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x - tl.max(x))


@triton.jit
def scatter(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK) * 2
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def product(x_ptr, y_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def early(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    total = tl.sum(x, axis=0)
    tl.store(y_ptr + offs, tl.dot(x, x, input_precision="tf32") + total[None, :])


@triton.jit
def wrong(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "this toy does not compile")


class Crash:
    @property
    def arg_names(self):
        os.abort()


def build(label, kernel, divisible, **constexprs):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32"} | ({"N": "i32"} if kernel is double else {})
    warps = 1 if kernel is center else 2 if label == "no warp group" else 4
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    return SimpleNamespace(label=label, kernel=kernel, dtype="fp32", signature=signature, constexprs=constexprs,
                           divisible=divisible, options=options)


def builds(arch):
    pointers = ("x_ptr", "y_ptr")
    yield build("aligned", double, (*pointers, "N"), BLOCK=1024)
    yield build("odd size", double, pointers, BLOCK=1024)
    yield build("scattered", scatter, pointers, BLOCK=1024)
    yield build("too large", center, pointers, BLOCK=16384)
    yield build("tf32", product, pointers, BLOCK=64, PRECISION="tf32")
    yield build("no warp group", product, pointers, BLOCK=64, PRECISION="tf32")
    yield build("ieee", product, pointers, BLOCK=32, PRECISION="ieee")
    yield build("early", early, pointers, BLOCK=64)
    yield build("wrong", wrong, pointers, BLOCK=64)
    yield build("crash", Crash(), pointers)
"""


def resources(folder: Path, *arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m bench.resources` on the toys."""
    (folder / "toys.py").write_text(TOYS)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", "bench.resources", "--modules", "toys", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run with --check over all toys and two targets, and its rows by target and label."""
    folder = tmp_path_factory.mktemp("toys")
    run = resources(folder, "--targets", "sm_90,gfx942", "--check", "--json", str(folder / "rows.json"))
    rows = json.loads((folder / "rows.json").read_text())
    return run, {f"{row['target']} {row['label']}": row for row in rows}


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        ("sm_90 aligned", []),
        ("gfx942 aligned", []),
        ("sm_90 odd size", []),
        ("sm_90 scattered", ["16-byte accesses"]),
        ("gfx942 scattered", ["16-byte accesses"]),
        ("sm_90 too large", ["no local memory"]),
        ("sm_90 tf32", []),
        ("sm_90 no warp group", ["wgmma"]),
        ("gfx942 no warp group", []),
        ("sm_90 ieee", []),
        ("sm_90 early", ["fenced operands"]),
        ("gfx942 early", []),
    ],
)
def test_a_broken_budget_is_found_and_named(checked: Any, row: str, broken: list[str]) -> None:
    run, rows = checked
    assert rows[row]["broken"] == broken
    assert run.returncode == 1
    assert (f"  {row}: {', '.join(broken)}" in run.stdout) == bool(broken)


@pytest.mark.parametrize(("target", "lanes"), [("sm_90", 128), ("gfx942", 256)])
def test_numbers_of_a_streaming_kernel(checked: Any, target: str, lanes: int) -> None:
    row = checked[1][f"{target} aligned"]
    each = 1024 // lanes  # elements of 4 bytes that a lane loads, and then stores
    assert (row["wide"], row["narrow"]) == (2 * each // 4, 0)
    assert (row["stack"], row["spills"], row["tensor_core"]) == (0, 0, 0)
    assert 4 < row["registers"] < 64
    odd = checked[1][f"{target} odd size"]
    assert (odd["wide"], odd["narrow"]) == (0, 2 * each)


def test_numbers_of_a_product_and_of_a_spill(checked: Any) -> None:
    _, rows = checked
    assert rows["sm_90 tf32"]["tensor_core"] == rows["sm_90 tf32"]["warp_group"] > 0
    assert (rows["sm_90 tf32"]["dot_rows"], rows["sm_90 aligned"]["dot_rows"]) == (64, 0)
    assert rows["sm_90 ieee"]["tensor_core"] == 0
    assert rows["gfx942 tf32"]["tensor_core"] > 0
    assert rows["sm_90 tf32"]["shared"] >= 64 * 64 * 4
    assert rows["sm_90 too large"]["spills"] > 100
    assert rows["sm_90 too large"]["stack"] > 1000


def test_a_product_that_reads_too_early_is_named(checked: Any) -> None:
    """With Triton's barriers of the sum in between, its product has none behind the fence."""
    run, rows = checked
    (race,) = rows["sm_90 early"]["races"]
    assert race.startswith("wgmma.mma_async at toys.py:")
    assert f"  sm_90 early: fenced operands\n    {race}\n" in run.stdout
    assert rows["sm_90 tf32"]["races"] == rows["gfx942 early"]["races"] == []


def test_what_does_not_compile_is_named_and_hides_nothing(checked: Any) -> None:
    run, rows = checked
    assert len(rows) == 20
    for target in ("sm_90", "gfx942"):
        assert "this toy does not compile" in rows[f"{target} wrong"]["error"]
        assert rows[f"{target} crash"]["error"] == "the compiler crashed"
        assert f"  {target} crash: the compiler crashed" in run.stdout


def test_exit_status(tmp_path: Path) -> None:
    fine = resources(tmp_path, "--targets", "sm_80", "--kernels", "aligned", "--check")
    assert (fine.returncode, "1 builds, 0 broken" in fine.stdout) == (0, True)
    nothing = resources(tmp_path, "--targets", "sm_80", "--kernels", "no such label", "--check")
    assert nothing.returncode == 1
    unchecked = resources(tmp_path, "--targets", "sm_80", "--kernels", "wrong")
    assert unchecked.returncode == 0


def test_refuses_the_interpreter(tmp_path: Path) -> None:
    run = resources(tmp_path, interpret=True)
    assert run.returncode == 2
    assert "unset TRITON_INTERPRET" in run.stderr
