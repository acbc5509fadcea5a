"""Every kernel under NVIDIA's compute-sanitizer: accesses outside of the tensors, and races over shared memory.

    python -m bench.sanitizer          # on a GPU; with --once it only launches, for the sanitizer to watch

The training kernel makes 100 steps; each other kernel runs at a few sizes, once. Only kernels of ours are watched. A
race over global memory is not seen: tests/test_real_sizes.py compares bits for that.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from fusednn import CrossEntropyLoss, SimpleNN, functional, train_steps
from fusednn.kernels import cross_entropy, linear, mlp_training, updates
from fusednn.kernels.step import ROW, Rule

from . import watch
from .conftest import seconds_left

MODULES = (linear, cross_entropy, mlp_training, updates)

KERNELS = sorted({name for module in MODULES for name in vars(module) if name.endswith("_kernel")})
"""The names of all kernels that are launched."""

TOOLS = ("memcheck", "racecheck")


def launch_all(device: str = "cuda", steps: int = 100) -> None:
    """Launch each kernel: ragged sizes, so that every mask has something to hide."""
    torch.manual_seed(0)
    for sizes, batch in (((64, 128, 10), 32), ((100, 96, 100), 48), ((20, 40, 36, 70, 10), 48)):
        layers = [layer for shape in pairwise(sizes) for layer in (nn.Linear(*shape), nn.GELU())]
        model = nn.Sequential(*layers[:-1]).to(device)
        x, t = torch.randn(250, sizes[0], device=device), torch.randint(sizes[-1], (250,), device=device)
        train_steps(model, torch.optim.Adam(model.parameters()), x, t, batch_size=batch, steps=steps)
    for sizes in ((20, 40, 10), (20, 40, 200)):  # the outputs are one tile, or several
        model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).to(device)
        x, weights = torch.randn(250, 20, device=device), torch.rand(250, device=device)
        for criterion in (nn.BCEWithLogitsLoss(pos_weight=torch.rand(sizes[-1])), nn.CrossEntropyLoss()):
            t = torch.rand(250, sizes[-1], device=device).softmax(1)
            options = {"criterion": criterion.to(device), "sample_weight": weights, "max_grad_norm": 0.1}
            train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), x, t, batch_size=48, steps=steps, **options)

    step = torch.zeros(1, dtype=torch.int64, device=device)
    w, table = torch.randn(1500, device=device), torch.ones(1, 1, ROW, device=device)
    updates.optimizer_step(w, [w.clone(), w.abs()], w.clone(), table, step, 0, Rule("adam"))

    net, criterion = SimpleNN(100, 96, 10).to(device), CrossEntropyLoss()
    for rows in (33, 5000):  # one program and many, without splits and with
        x, t = torch.randn(rows, 100, device=device, requires_grad=True), torch.randint(10, (rows,), device=device)
        criterion(net(x), t).backward()
    for classes in (10, 1000, 40000):
        logits = torch.randn(2100 if classes == 10 else 5, classes, device=device, requires_grad=True)
        t = torch.randint(classes, (len(logits),), device=device)
        (2 * functional.cross_entropy(logits, t, label_smoothing=0.1)).backward()


def sanitize(tool: str, seconds: float | None) -> dict[str, str]:
    """Run this module under a tool; what it said."""
    options = ["--error-exitcode=9", "--report-api-errors=no", "--target-processes=application-only"]
    names = [f"--kernel-name=kne={name}" for name in KERNELS]
    once = [sys.executable, "-m", "bench.sanitizer", "--once"]
    command = ["compute-sanitizer", f"--tool={tool}", *options, *names, *once]
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor its own allocation, past whose end an access is seen
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, env=os.environ | alone, stdout=said, stderr=subprocess.STDOUT, process_group=0
        )
        status = "out of time"
        with suppress(subprocess.TimeoutExpired):
            try:
                status = f"exit status {process.wait(seconds)}"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the program that it watches too, which holds the GPU
                process.wait()
        said.seek(0)
        return {"status": status, "said": said.read()}


def main(arguments: list[str] | None = None) -> int:
    """1 if a tool found something or could not run."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="launch each kernel, and no more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the tools said to FILE")
    options = parser.parse_args(arguments)
    watch.compilations()
    if options.once:
        launch_all()
        torch.cuda.synchronize()
        return 0
    launch_all()  # so that what has to be compiled is, at full speed
    if shutil.which("compute-sanitizer") is None or torch.version.hip:
        print("compute-sanitizer is not installed: the kernels ran without it")
        return 0
    said = {}
    for place, tool in enumerate(TOOLS):
        left = seconds_left()
        said[tool] = sanitize(tool, None if left is None else left / (len(TOOLS) - place))
        print(said[tool]["said"], flush=True)
        if options.json:
            options.json.write_text(json.dumps(said, indent=1) + "\n")
    print(", ".join(f"{tool}: {result['status']}" for tool, result in said.items()))
    return int(any(result["status"] != "exit status 0" for result in said.values()))


if __name__ == "__main__":
    sys.exit(main())
