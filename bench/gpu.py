"""Runs the GPU tests, then the benchmarks, the most valuable first; docs/on-a-gpu.md tells more.

    python3 -m bench.gpu --minutes 5 --bundle build/results.tar.gz
    python3 -m bench.gpu --minutes 5 --only linear,growth

It needs a GPU, torch, Triton and pytest: no network, no make, no git. Without pytest-benchmark the benchmarks are left
out. Each part is a process of its own with a share of the time. Before the next part starts, the results of this one
are in the folder and in the bundle.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .packing import pack, pack_kernels, relocate
from .watch import AGAIN, COMPILATIONS, OUTCOMES

ROOT = Path(__file__).resolve().parent.parent

MINUTES = 9.0
"""For everything, by default."""

LAST_BENCHMARK = 10
"""Seconds that the last benchmark of a part may take: none starts later."""

GRACE = 15
"""Seconds before the end of its share at which a part is asked to report. At the end it is killed."""

LEAST = 45
"""A part with fewer seconds than this is not started: it needs some of them to import, and those above."""

MOST_WORKERS = 14
"""Processes of the pool of tests. They mostly wait for the compiler, and share the card."""

FEW = 16
"""With `--failed`, fewer tests than this run in one process, alone on the GPU."""

COMPILED_ONLY = "compiled, not run"
"""Status of a part under `--prepare`: its kernels were compiled and not run, so its checks mean nothing."""

TOLD = re.compile(r"FAILED |ERROR |.+: .+ (us|cycles)\b|  \(\"")
"""What of a part's log is printed: the tests that failed, the times and their ratios, the rows of a table."""

MOST_TOLD = 60
"""So many lines of it."""

PREPARED = ("tests", "step", "sweep", "cross_entropy", "growth", "clock", "linear", "sanitizer")
"""The parts whose kernels `--prepare` compiles: those that measure ours."""


class Part(NamedTuple):
    """The most seconds that a part may take, the arguments of Python, whether it runs without `--all`, the least."""

    seconds: int
    arguments: list[str]
    always: bool = True
    least: int = LEAST


def benchmark(file: str, tests: str = "") -> list[str]:
    """Python's arguments for the benchmarks of a file whose names have one of `tests`."""
    chosen = ["-k", tests] if tests else []
    return ["-m", "pytest", f"bench/{file}.py", *chosen, "-W", "default", "--benchmark-only"]


GPU_TEST = re.compile(r"\bdevice: str\b|\bmark\.gpu\b")
"""What a test file has if a test of it runs on a GPU: it takes tests/conftest.py's `device`, or is marked by itself."""

TESTS = [
    str(file.relative_to(ROOT))
    for file in sorted((ROOT / "tests").rglob("test_*.py"))
    if GPU_TEST.search(file.read_text(encoding="utf-8"))
]
"""Files with tests marked gpu. Others need packages that a machine with a GPU may not have."""

PEERS = ("liger-kernel", "quack-kernels", "cut-cross-entropy")

PARTS = {
    # without pytest-benchmark, which warns that it does not go with pytest-xdist: warnings are errors
    "tests": Part(120, ["-m", "pytest", "-p", "no:benchmark", "--tb=short", "-rfE", "-m", "gpu"]),
    "step": Part(80, benchmark("bench_train_steps", "test_step or test_call")),
    "sweep": Part(70, ["-m", "bench.sweep"]),
    "cross_entropy": Part(70, benchmark("bench_cross_entropy")),
    "linear": Part(90, benchmark("bench_linear")),
    "compiled": Part(80, benchmark("bench_train_steps", "test_compiled_step"), least=70),
    "growth": Part(60, benchmark("bench_train_steps", "test_growth")),
    "clock": Part(60, ["-m", "bench.clock"]),
    "sanitizer": Part(75, ["-m", "bench.sanitizer"]),
    "python": Part(60, benchmark("bench_python"), always=False),
    "simple_nn": Part(40, benchmark("bench_simple_nn"), always=False),
    "cold": Part(240, benchmark("bench_train_steps", "test_cold"), always=False, least=70),
}
"""In the order of what is worth most if time runs out."""


def card() -> str | None:
    """The name of the GPU as part of a file name, e.g. nvidia-h100-80gb-hbm3; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def ptxas() -> str | None:
    """The assembler that Triton brings."""
    triton = find_spec("triton")
    path = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" / "ptxas" if triton else None
    return str(path) if path and path.exists() else None


def machine() -> str:
    """The versions that matter, what is missing, and the GPU."""
    versions, missing = [f"Python {sys.version}", f"{os.cpu_count()} CPUs"], []
    for name in ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "pytest-xdist", *PEERS):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    missing += [name for name in ("compute-sanitizer", "nvidia-smi") if shutil.which(name) is None]
    if "nvidia-smi" not in missing:
        query = ["nvidia-smi", "--format=csv", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.sm"]
        versions.append(subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
    return "\n".join([*versions, f"not installed: {', '.join(missing) or 'nothing'}", ""])


class Run:
    """A run of parts on one card, and what they leave in a folder, in files that begin with the card's name."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.out = name, options, options.out
        self.begin: float = options.begin
        self.end = self.begin + 60 * options.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        before = self.file("parts.json")
        self.ended: dict[str, dict[str, object]] = json.loads(before.read_text()) if before.exists() else {}

    def file(self, ending: str) -> Path:
        """A file of results."""
        file: Path = self.out / f"{self.name}-{ending}"
        return file

    def share(self, part: str) -> float:
        """The most seconds of a part. If the minutes are more than all chosen parts take, each gets more."""
        chosen = sum(PARTS[name].seconds for name in self.options.parts)
        return PARTS[part].seconds * max(1.0, 60 * self.options.minutes / chosen)

    def measures(self, part: str) -> bool:
        """Whether a part runs benchmarks of pytest-benchmark."""
        return "--benchmark-only" in PARTS[part].arguments

    def plan(self) -> str:
        """The seconds of each part if those before it take all of theirs; a part that ends sooner leaves them more."""
        left, words = 60 * self.options.minutes, []
        for part in self.options.parts:
            seconds = min(self.share(part), left)
            fits = seconds >= PARTS[part].least
            words.append(f"{part} {seconds:.0f} s" if fits else f"{part} if time is left")
            left -= seconds * fits
        return "plan: " + ", ".join(words)

    def environment(self, part: str, seconds: float, compilations: str) -> dict[str, str]:
        """That of a part: Triton compiles and does not interpret, and the caller's PYTHONPATH is kept."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {
            "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0",
            "FUSEDNN_BENCH_UNTIL": str(time.time() + seconds - GRACE - LAST_BENCHMARK * self.measures(part)),
            COMPILATIONS: compilations,
        }  # fmt: skip
        if part == "tests":
            ours |= {OUTCOMES: str(self.file("tests.jsonl")), "OMP_NUM_THREADS": "1"}
            if assembler := ptxas():  # Inductor, which has tests too, would set another for the whole process
                ours["TRITON_PTXAS_PATH"] = os.environ.get("TRITON_PTXAS_PATH", assembler)
        if self.options.pretend:
            ours["FUSEDNN_PRETEND"] = self.options.pretend
        if self.options.prepare:
            ours |= {"TRITON_CACHE_DIR": str(self.options.prepare), "TRITON_STORE_BINARY_ONLY": "1"}
            ours |= {"PYTHONPYCACHEPREFIX": str(Path(compilations).parent)}  # of tests whose assertions pass
            ours |= {} if "pytest" in PARTS[part].arguments else {"PYTHONOPTIMIZE": "1"}
        return os.environ | ours

    def command(self, part: str, again: list[str]) -> list[str]:
        """The process of a part. If not all tests are to run, but those of `again`, few need no pool."""
        arguments, pretend = list(PARTS[part].arguments), self.options.pretend
        if arguments[1] == "pytest":
            arguments += ["-v", "-p", "bench.watch", "-p", "no:cacheprovider"]
            arguments += ["-p", "tests.pretended_card"] if pretend else []
        elif pretend:
            arguments.insert(1, "tests.pretended_card")
        if part == "tests":
            arguments += TESTS
            if find_spec("xdist") is not None and not 0 < len(again) < FEW:
                arguments += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
        elif arguments[1] == "pytest":
            arguments.append(f"--benchmark-json={self.file(f'{part}.json')}")
            arguments += ["-m", "not extra"] if PARTS[part].always and not self.options.all else []
        else:
            arguments.append(f"--json={self.file(f'{part}.json')}")
        return [sys.executable, *arguments]

    def run(self, part: str, again: list[str]) -> None:
        """Run a part within its time, and note how it ended."""
        seconds = min(self.share(part), self.end - time.monotonic()) if not self.options.pretend else 3600.0
        if self.measures(part) and find_spec("pytest_benchmark") is None:
            self.note(part, "left out: pytest-benchmark is not installed", {})
        elif seconds < PARTS[part].least:
            self.note(part, "not reached: no time left", {})
        else:
            self.run_for(seconds, part, again)

    def run_for(self, seconds: float, part: str, again: list[str]) -> None:
        """Run a part for so many seconds at most."""
        if part != "tests" or not again:
            for ending in ("json", "jsonl"):
                self.file(f"{part}.{ending}").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder, self.file(f"{part}.log").open("wb") as log:
            compilations = Path(folder) / "compilations"
            environment = self.environment(part, seconds, str(compilations))
            if again:
                environment[AGAIN] = str(Path(folder) / "again")
                Path(environment[AGAIN]).write_text(json.dumps(again))
            begin = time.monotonic()
            process = subprocess.Popen(
                self.command(part, again), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                process_group=0, preexec_fn=die_with_parent,
            )  # fmt: skip
            status = "interrupted"
            try:
                status = finish(process, seconds - GRACE)
                if self.measures(part) and not self.file(f"{part}.json").exists():
                    status += ", nothing measured"
                if self.options.prepare and status in ("exit status 0", "exit status 1"):
                    status = COMPILED_ONLY
            finally:
                self.note(part, status, {"seconds": round(time.monotonic() - begin, 1)} | compiled(compilations))

    def note(self, part: str, status: str, more: dict[str, object]) -> None:
        """Write down and print how a part ended, and pack what there is."""
        self.ended[part] = {"status": status, "ended": time.strftime("%Y-%m-%d %H:%M:%S")} | more
        lines = self.file(f"{part}.log").read_text(errors="replace").strip().splitlines() if more else []
        told = [line for line in lines[:-1] if TOLD.match(line)][:MOST_TOLD] + lines[-1:]
        told = told[-1:] if self.options.pretend else told  # a time would mean nothing
        kernels = f", kernels: {more['found']} found compiled, {more['compiled']} compiled" if more else ""
        line = f"{time.monotonic() - self.begin:5.0f} s  {part}: {status}{kernels}"
        print(line, *told, sep="\n         ", flush=True)
        self.file("parts.json").write_text(json.dumps(self.ended, indent=1) + "\n")
        if self.options.bundle:
            try:
                pack(self.options.bundle, sorted(self.out.glob(f"{self.name}-*")))
            except OSError as error:  # the next part is worth more
                print(f"error: no bundle: {error}", file=sys.stderr)

    def is_good(self) -> bool:
        """Whether no part failed, and the tests ran to their end, of the parts of this run."""
        ended = {part: str(self.ended[part]["status"]) for part in self.options.parts}
        bad = [part for part, status in ended.items() if status.startswith("exit status") and status != "exit status 0"]
        return not bad and not ended.get("tests", "").startswith("out of time")

    def failed(self) -> list[str]:
        """The tests that failed or did not end, when they last ran; FileNotFoundError without a run before."""
        lines = self.file("tests.jsonl").read_text(encoding="utf-8").splitlines()
        last = {line["test"]: line["outcome"] for line in map(json.loads, lines)}
        return [test for test, outcome in last.items() if outcome in ("failed", "begun")]


def die_with_parent() -> None:
    """In a new process: Linux kills it when its parent is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def finish(process: "subprocess.Popen[bytes]", seconds: float) -> str:
    """How the process ended, at the latest in so many seconds and GRACE; Ctrl-C ends it sooner."""
    try:
        return f"exit status {process.wait(max(seconds, 0))}"
    except subprocess.TimeoutExpired:
        return stop(process, "out of time")
    except KeyboardInterrupt:
        stop(process, "")
        raise


def stop(process: "subprocess.Popen[bytes]", status: str) -> str:
    """Ask the process to end, on which pytest reports and pytest-benchmark writes its JSON; at last kill its group."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver
        process.wait(GRACE)
    return f"{status}, and killed" if process.returncode in (None, -signal.SIGKILL) else status


def compiled(file: Path) -> dict[str, object]:
    """How many kernels of ours were found compiled and how many were compiled, each counted once, and which."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    new = {line["key"]: line["kernel"] for line in lines if not line["found"]}
    found = {line["key"] for line in lines} - {*new}
    return {"found": len(found), "compiled": len(new), "kernels": Counter(new.values())}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts; default: %(default)s")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--failed", action="store_true", help="only the tests that failed before, by the results in the folder"
    )
    parser.add_argument(
        "--all", action="store_true", help="also the parts python, simple_nn and cold, and torch.compile's max-autotune"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results; default: bench/results")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="an archive (tar.gz) of the results so far")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the parts, small, on a pretended H100")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="without a GPU: compile for an H100 into FOLDER")
    options = parser.parse_args(arguments)
    options.begin = time.monotonic()
    if options.failed and options.only:
        parser.error("--failed runs tests: it goes with no --only")
    options.bundle = options.bundle and options.bundle.resolve()
    options.pretend = "compile" if options.prepare else "sample" if options.rehearse else ""
    options.out = (options.out or ROOT / ("build/pretended" if options.pretend else "bench/results")).resolve()
    options.prepare = options.prepare and options.prepare.resolve()
    known = [name for name, part in PARTS.items() if part.always or options.all]
    wanted = options.only.split(",") if options.only else ["tests"] if options.failed else known
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known are {list(PARTS)}")
    options.parts = [name for name in PARTS if name in wanted and not (options.prepare and name not in PREPARED)]
    if not options.parts:
        parser.error(f"--prepare has something to compile in {', '.join(PREPARED)} alone")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the parts. Returns 1 if a part failed or the tests did not end, 2 if nothing could be run."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the part that runs ends too
    name = "pretended-h100" if options.pretend else card()
    if name is None or find_spec("pytest") is None:
        print("error: this needs a GPU that torch can use, and pytest", file=sys.stderr)
        return 2
    run = Run(name, options)
    if cache := os.environ.get("TRITON_CACHE_DIR"):
        os.environ["TRITON_CACHE_DIR"] = str(Path(cache).resolve())  # the parts run elsewhere
        relocate(Path(os.environ["TRITON_CACHE_DIR"]))
    again: list[str] = []
    if options.failed:
        try:
            again = run.failed()
        except FileNotFoundError as error:
            print(f"error: no run before: {error}", file=sys.stderr)
            return 2
        if not again:
            print("no test failed in the run before")
            return 0
    said = machine()
    run.file("machine.txt").write_text(said)
    print(said + ("no limit of time" if options.pretend else run.plan()), flush=True)
    for part in options.parts:
        run.run(part, again)
    if options.prepare:
        pack_kernels(options.prepare)
    return int(not run.is_good())


if __name__ == "__main__":
    sys.exit(main())
