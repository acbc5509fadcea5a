"""A run on a GPU, as far as it can be seen without one: its plan, what it leaves when it is cut off, and its parts on
a pretended card."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench import bench_linear, bench_train_steps, gpu

STUB = '''
import sys
from bench import gpu

hanging, stubborn, out = sys.argv[1], sys.argv[2] == "stubborn", sys.argv[3]
gpu.card = lambda: "stub"
gpu.GRACE = 1
WRITE = """
import os, signal, sys, time
open(sys.argv[1].removeprefix("--json="), "w").write("{}")
print("begun", os.getpid(), flush=True)
"""
HANG = "signal.signal(signal.SIGINT, signal.SIG_IGN)\\n" * stubborn + "while True: time.sleep(0.1)"
gpu.PARTS = {
    name: gpu.Part(3 if name == hanging else 30, ["-c", WRITE + HANG * (name == hanging)], least=0) for name in "abcd"
}
sys.exit(gpu.main(["--minutes", "1", "--out", out, "--bundle", f"{out}/made/bundle.tar.gz"]))
'''
"""A run of four parts, one of which does not end."""


def start(folder: Path, hanging: str, how: str = "stubborn") -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(gpu.ROOT)}
    command = [sys.executable, "-c", STUB, hanging, how, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")")[1].split()[0] != "Z"


def packed(folder: Path) -> set[str]:
    with tarfile.open(folder / "made" / "bundle.tar.gz") as bundle:
        return set(bundle.getnames())


@pytest.mark.parametrize("part", "bcd")
def test_a_run_that_is_killed_keeps_all_parts_before(part: str, tmp_path: Path) -> None:
    run = start(tmp_path, part)
    log = tmp_path / f"stub-{part}.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    part_pid = int(log.read_text().split()[1])
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 10
    while alive(part_pid):  # or it would hold the GPU
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = "abcd"[: "abcd".index(part)]
    for name in before:
        assert {f"stub-{name}.json", f"stub-{name}.log", "stub-parts.json"} <= packed(tmp_path)
        assert (tmp_path / f"stub-{name}.json").read_text() == "{}"
    assert [*json.loads((tmp_path / "stub-parts.json").read_text())] == [*before]


@pytest.mark.parametrize(("how", "status"), [("stubborn", "out of time, and killed"), ("", "out of time")])
def test_a_part_that_does_not_end_costs_that_part(how: str, status: str, tmp_path: Path) -> None:
    run = start(tmp_path, "b", how)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    ended = json.loads((tmp_path / "stub-parts.json").read_text())
    assert {name: part["status"] for name, part in ended.items()} == {
        "a": "exit status 0", "b": status, "c": "exit status 0", "d": "exit status 0",
    }  # fmt: skip
    assert {f"stub-{name}.json" for name in "abcd"} <= packed(tmp_path)
    assert f"b: {status}" in said


TESTS = """
import time, pytest

@pytest.mark.parametrize("n", range(4))
def test_ends(n): assert n != 2, "two is wrong"

def test_hangs():
    while True: time.sleep(0.1)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_tests_that_are_cut_off_report(workers: int, tmp_path: Path) -> None:
    """What failed is in the log and in the file of outcomes, from where `--failed` takes it."""
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    run = gpu.Run("stub", gpu.parse(["--out", str(tmp_path)]))
    environment = run.environment("tests", 60, str(tmp_path / "compilations"))
    options = ["-v", "--tb=short", "-rfE", "-p", "bench.watch", "-p", "no:cacheprovider"]
    options += ["-n", str(workers)] if workers else []
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path), "--rootdir", str(tmp_path)]
    with run.file("tests.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 60
        outcomes = run.file("tests.jsonl")
        while not outcomes.exists() or len(re.findall("passed|failed", outcomes.read_text())) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert gpu.finish(process, 0) == "out of time"
    said = run.file("tests.log").read_text()
    assert "two is wrong" in said
    assert "FAILED test_it.py::test_ends[2]" in said
    assert sorted(run.failed()) == ["test_it.py::test_ends[2]", "test_it.py::test_hangs"]
    again = tmp_path / "again"
    again.write_text(json.dumps(["test_it.py::test_ends[2]", "test_it.py::test_that_is_no_more"]))
    (tmp_path / "test_it.py").write_text(TESTS.replace("n != 2", "n != 7"))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {gpu.AGAIN: str(again)}, capture_output=True, text=True, check=False
    )
    assert "1 passed" in done.stdout, done.stdout
    assert run.failed() == ["test_it.py::test_hangs"]


def test_without_a_run_before_there_is_nothing_to_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "card", lambda: "stub")
    assert gpu.main(["--failed", "--out", str(tmp_path)]) == 2
    (tmp_path / "stub-tests.jsonl").write_text('{"test": "t", "outcome": "passed"}\n')
    assert gpu.main(["--failed", "--out", str(tmp_path)]) == 0


LOSES_THE_GPU = """
import pytest

lost = False

@pytest.mark.parametrize("n", range(8))
def test_one(n):
    global lost
    lost = lost or n == 1
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_a_process_that_lost_the_gpu_costs_one_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(LOSES_THE_GPU)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    run = gpu.Run("stub", gpu.parse(["--out", str(tmp_path)]))
    options = ["-p", "bench.watch", "-p", "no:cacheprovider", "-n", "1", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)], cwd=tmp_path, text=True, check=False,
        env=run.environment("tests", 60, str(tmp_path / "compilations")), capture_output=True,
    )  # fmt: skip
    assert "1 failed, 7 passed" in done.stdout, done.stdout
    assert run.failed() == ["test_it.py::test_one[1]"]
    assert "illegal memory access" in run.file("tests.jsonl").read_text()


def options_of(*arguments: str) -> Any:
    return gpu.parse([*arguments, "--out", tempfile.gettempdir()])


def test_the_plan() -> None:
    parts = ["tests", "step", "sweep", "cross_entropy", "linear", "compiled", "growth", "clock", "sanitizer"]
    assert options_of().parts == parts
    assert options_of("--all").parts[: len(parts)] == parts
    assert options_of("--only", "linear,cross_entropy").parts == ["cross_entropy", "linear"]
    assert options_of("--failed").parts == ["tests"]
    for wrong in (
        ["--only", "nothing"], ["--prepare", "/nowhere", "--only", "compiled"], ["--failed", "--only", "linear"]
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            options_of(*wrong)


def test_the_plan_is_for_the_minutes_that_there_are(tmp_path: Path) -> None:
    def plan(*arguments: str) -> str:
        return gpu.Run("stub", gpu.parse([*arguments, "--out", str(tmp_path)])).plan()

    parts = ("cross_entropy", "linear", "compiled", "growth", "clock", "sanitizer")
    later = ", ".join(f"{part} if time is left" for part in parts)
    assert plan("--minutes", "5") == f"plan: tests 120 s, step 80 s, sweep 70 s, {later}"
    assert plan("--minutes", "2.4", "--only", "linear,growth") == "plan: linear 90 s, growth 54 s"
    assert plan("--minutes", "5", "--only", "linear,growth") == "plan: linear 180 s, growth 120 s"


def test_every_benchmark_is_in_a_part() -> None:
    """Of the files, and of the functions in a file of which a part runs some."""
    benchmarks = [part.arguments for part in gpu.PARTS.values() if "--benchmark-only" in part.arguments]
    for file in (gpu.ROOT / "bench").glob("bench_*.py"):
        for test in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE):
            chosen = [words for words in benchmarks if f"bench/{file.name}" in words]
            wanted = [words[words.index("-k") + 1].split(" or ") if "-k" in words else [""] for words in chosen]
            parts = [words for words in wanted if any(word in test for word in words)]
            on_a_cpu = file.name in ("bench_batches.py", "bench_native.py") or test == "test_loop_on_a_cpu"
            assert len(parts) == (0 if on_a_cpu else 1), test


@pytest.mark.parametrize("part", ["compiled", "linear", "cold"])
def test_what_compiles_has_the_time_that_it_asks_for(part: str) -> None:
    """At least twice, by itself in 5 minutes; a whole training step also among the other parts."""
    asked = bench_linear.AUTOTUNE_SECONDS if part == "linear" else bench_train_steps.COMPILE_SECONDS
    margin = gpu.GRACE + gpu.LAST_BENCHMARK
    run = gpu.Run("stub", options_of("--only", part, "--minutes", "5"))
    assert run.share(part) - margin >= 2 * asked
    if part == "compiled":
        assert gpu.PARTS[part].seconds - margin >= 2 * asked


def test_a_part_finds_the_callers_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/peers")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    run = gpu.Run("stub", gpu.parse(["--out", str(tmp_path)]))
    environment = run.environment("step", 60, "")
    assert environment["PYTHONPATH"] == f"{gpu.ROOT}{os.pathsep}/peers"
    assert environment["TRITON_CACHE_DIR"] == "/cache"
    assert "FUSEDNN_PRETEND" not in environment
    assert "tests.pretended_card" not in run.command("step", [])
    assert run.command("step", [])[-2:] == ["-m", "not extra"]


def test_a_run_with_no_time_left_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = gpu.Run("stub", gpu.parse(["--out", str(tmp_path), "--minutes", "0.1"]))
    run.run("tests", [])
    assert "tests: not reached: no time left" in capsys.readouterr().out


def test_what_is_not_installed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    run = gpu.Run("stub", gpu.parse(["--out", str(tmp_path), "--only", "linear"]))
    run.run("linear", [])
    assert run.ended["linear"]["status"] == "left out: pytest-benchmark is not installed"
    assert run.is_good()
    assert "-n" not in run.command("tests", [])


def test_without_a_gpu_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "card", lambda: None)
    assert gpu.main(["--out", "/nowhere"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def on_pretended_card(tmp_path: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """How the parts ended."""
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out"), *arguments]
    ours = ("TRITON_INTERPRET", "PYTEST_")  # in a worker of pytest-xdist, pytest-benchmark would measure nothing
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command, cwd=gpu.ROOT, env=variables | environment, capture_output=True, text=True, check=False
    )
    logs = "\n".join(file.read_text() for file in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    parts: dict[str, Any] = json.loads((tmp_path / "out" / "pretended-h100-parts.json").read_text())
    ended = gpu.COMPILED_ONLY if "--prepare" in arguments else "exit status 0"
    assert {part["status"] for part in parts.values()} == {ended}, done.stdout + logs
    return parts


KEYS = """
import sys
from bench import watch
if sys.argv[1] == "watched":
    watch.compilations()
kernels = watch.all_kernels()
order = kernels if sys.argv[2] == "forwards" else kernels[::-1]
for kernel in order:
    kernel.cache_key
print([(kernel.__name__, kernel.cache_key) for kernel in kernels])
"""


def test_a_kernel_has_the_same_key_whatever_ran_before(tmp_path: Path) -> None:
    """In a pool each process runs other tests first. Without `compilations` the keys differ, or it is not needed."""

    def keys(*arguments: str) -> str:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
        variables |= {"FUSEDNN_COMPILATIONS": str(tmp_path / "compilations")}
        command = [sys.executable, "-c", KEYS, *arguments]
        return subprocess.run(command, cwd=gpu.ROOT, env=variables, capture_output=True, text=True, check=True).stdout

    assert keys("watched", "forwards") == keys("watched", "backwards")
    assert keys("not", "forwards") != keys("not", "backwards")


@pytest.mark.slow
def test_what_was_prepared_is_not_compiled_again(tmp_path: Path) -> None:
    """Also where the folder was packed, carried and unpacked elsewhere."""
    kernels, there = tmp_path / "kernels", tmp_path / "there"
    made = on_pretended_card(tmp_path, "--only", "sanitizer", "--prepare", str(kernels))["sanitizer"]
    assert made["found"] == 0
    assert made["compiled"] >= 15
    assert sum(made["kernels"].values()) == made["compiled"]
    with tarfile.open(tmp_path / "kernels.tar.xz") as archive:
        archive.extractall(there, filter="data")
    for file in kernels.glob("*/*"):
        file.unlink()
    cache = {"TRITON_CACHE_DIR": str(there / "kernels")}
    parts = on_pretended_card(tmp_path, "--rehearse", "--only", "compiled,sanitizer", **cache)
    assert parts["sanitizer"]["compiled"] == 0, parts
    assert parts["compiled"]["seconds"] > 0  # torch.compile returns there what it is given, and it is measured
    assert parts["sanitizer"]["found"] == made["compiled"]
