"""On a GPU: the tests marked gpu, then every benchmark, within 9 minutes; needs no network and no virtual environment.

    make gpu                 # or: python -m bench.gpu --out bench/results

Each part is a process of its own with a share of the time; it writes its JSON and log when it ends, so that whatever is
cut off loses one part only. What is not installed (a peer, pytest-benchmark) is skipped and said to be.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 9 * 60 - 15
"""Seconds for everything, with some to spare for the last part to be stopped in: GRACE is below that."""

GPU_TEST = re.compile(r"\bdevice: str\b|\bmark\.gpu\b")
"""What a test file has if a test of it runs on a GPU: it takes tests/conftest.py's `device`, or is marked by itself."""

TESTS = [
    str(file.relative_to(ROOT))
    for file in sorted((ROOT / "tests").rglob("test_*.py"))
    if GPU_TEST.search(file.read_text(encoding="utf-8"))
]
"""Files with tests marked gpu. They run at once, a process each: they mostly wait for the compiler."""

BENCHMARKS = {"train_steps": 150, "simple_nn": 40, "linear": 100, "cross_entropy": 80, "python": 50}
"""bench_<name>.py and the most seconds it may take, in order of what is worth most if time runs out."""

TEST_SECONDS = 300

LAST_BENCHMARK = 20
"""Seconds that the last benchmark of a part may take, and pytest to write its JSON."""

GRACE = 10
"""Seconds in which a part that takes longer is to write its JSON after all."""


def card() -> str | None:
    """The name of the GPU as part of a file name, e.g. nvidia-h100-80gb-hbm3; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def start(arguments: list[str], log: Path, seconds: float) -> subprocess.Popen[bytes]:
    """A pytest process of compiled kernels, its output in `log`; after `seconds` it starts no more benchmarks."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "FUSEDNN_BENCH_SECONDS": str(seconds)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], seconds: float, grace: float = 0) -> str:
    """How the process ended, at the latest in so many seconds, or after a `grace` to write what it has."""
    with suppress(subprocess.TimeoutExpired):
        return f"exit status {process.wait(max(seconds, 0))}"
    process.send_signal(signal.SIGINT)  # on which pytest ends the session, and pytest-benchmark writes its JSON
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    process.kill()
    process.wait()
    return "out of time"


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; 1 if a test failed, 2 if there is no GPU or no pytest."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="default: %(default)s")
    options = parser.parse_args(arguments)
    name = card()
    if name is None or find_spec("pytest") is None:
        print("error: this needs a GPU that torch can use, and pytest", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    begin, ended = time.monotonic(), dict.fromkeys([*TESTS, *BENCHMARKS], "not reached: no time left")

    def left(most: float) -> float:
        return min(most, LIMIT - (time.monotonic() - begin))

    def note(part: str, status: str) -> None:
        ended[part] = status
        print(f"{time.monotonic() - begin:5.0f} s  {part}: {status}", flush=True)
        (options.out / f"{name}-parts.json").write_text(json.dumps(ended, indent=1) + "\n")

    logs = [options.out / f"{name}-{'-'.join(Path(file).with_suffix('').parts[1:])}.log" for file in TESTS]
    processes = [start([file, "-m", "gpu"], log, TEST_SECONDS) for file, log in zip(TESTS, logs, strict=True)]
    for file, process, log in zip(TESTS, processes, logs, strict=True):
        status = finish(process, left(TEST_SECONDS - (time.monotonic() - begin)))
        note(file, f"{status}, {(log.read_text().strip() or 'no output').splitlines()[-1]}")
    for part, most in BENCHMARKS.items():
        if find_spec("pytest_benchmark") is None:
            note(part, "skipped: pytest-benchmark is not installed")
        elif left(most) > 2 * LAST_BENCHMARK:
            files = [options.out / f"{name}-{part}.{suffix}" for suffix in ("json", "log")]
            arguments = [f"bench/bench_{part}.py", "-W", "default", "--benchmark-only", f"--benchmark-json={files[0]}"]
            note(part, finish(start(arguments, files[1], left(most) - LAST_BENCHMARK), left(most), GRACE))
    return int(any(not ended[file].startswith("exit status 0") for file in TESTS))


if __name__ == "__main__":
    sys.exit(main())
