"""The native engine where it is alone: sizes and options at random, each kind of machine, who is chosen and why.

That it computes what the others compute the other files test, with the fixture `device`.
"""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

import fusednn
from fusednn import reference, train_steps
from fusednn.training import plan
from fusednn.training.engines import native as engine_of_cpus
from fusednn.training.engines.native import MACHINES, Native

from .conftest import serve_natively
from .runs import adam, assert_alike, data, net, train
from .test_train_steps import OPTIMIZERS

pytestmark = pytest.mark.skipif(not MACHINES, reason="the native engine was not built")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_natively(monkeypatch)


@st.composite
def jobs(draw: Any) -> dict[str, Any]:
    """Sizes around those of vectors and tiles, and whatever options there are."""
    size = st.integers(1, 40) | st.sampled_from([64, 65, 255, 257, 300])
    return {
        "sizes": (draw(size), draw(size), draw(st.integers(2, 20) | st.just(130))),
        "rows": draw(st.integers(0, 70)),
        "batch_size": draw(st.integers(1, 80)),
        "bias": draw(st.booleans()),
        "make": draw(st.sampled_from(sorted(set(OPTIMIZERS) - {"Adam, lr a tensor"}))),
        "labels": draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])),
        "every_other": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "weighted": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "ignored": draw(st.booleans()),
        "machine": draw(st.sampled_from(sorted(MACHINES))),
        "seed": draw(st.integers(0, 100)),
    }


EXAMPLE = {
    "sizes": (300, 17, 10), "rows": 70, "batch_size": 33, "bias": True, "make": "Adam, options", "labels": torch.uint8,
    "every_other": True, "reduction": "mean", "weighted": True, "label_smoothing": 0.1, "ignored": True,
    "machine": next(iter(MACHINES), ""), "seed": 0,
}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs())
@example(EXAMPLE)
@example(EXAMPLE | {"rows": 0})
@example(EXAMPLE | {"sizes": (5, 4, 1), "make": "SGD"})  # all its gradients are rounding, by which Adam would divide
@example(EXAMPLE | {"sizes": (257, 255, 130), "machine": next(reversed(MACHINES), "")})
def test_as_the_loop_in_float64(job: dict[str, Any]) -> None:
    inputs, _, outputs = job["sizes"]
    generator = torch.Generator().manual_seed(job["seed"])
    stride = 2 if job["every_other"] else 1
    x = torch.randn(stride * job["rows"], stride * inputs, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, min(outputs, 128), (stride * job["rows"],), generator=generator).to(job["labels"])
    x, targets = x[::stride, ::stride], targets[::stride]
    criterion = nn.CrossEntropyLoss(
        weight=torch.rand(outputs, generator=generator, dtype=torch.float64) + 0.1 if job["weighted"] else None,
        ignore_index=int(targets[0]) if job["ignored"] and len(targets) else -100,
        reduction=job["reduction"],
        label_smoothing=job["label_smoothing"],
    )
    model = net("cpu", job["sizes"], job["bias"]).double()
    make: Any = OPTIMIZERS[job["make"] if job["bias"] or "groups" not in job["make"] else "Adam"]
    given = {"steps": 5, "batch_size": job["batch_size"], "criterion": criterion, "make": make}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Native, "machine", job["machine"])
        ours = train(train_steps, model, x, targets, **given)
    assert ours.engine == "native"
    theirs = train(reference.train_steps, model, x, targets.long(), **given)  # PyTorch smooths no uint8
    assert_alike(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_kind_of_machine(monkeypatch: pytest.MonkeyPatch, machine: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(Native, "machine", machine)
    x, targets = data("cpu")
    model, given = net("cpu").to(dtype), {"epochs": 5, "batch_size": 16}
    ours, theirs = (train(loop, model, x.to(dtype), targets, **given) for loop in (train_steps, reference.train_steps))
    assert_alike(ours, theirs)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_same_bits_again(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Also in chunks of another length, and with the data elsewhere in memory."""
    monkeypatch.setattr(Native, "machine", machine)
    x, targets = data("cpu", 500, 65)
    given: dict[str, Any] = {"epochs": 3, "batch_size": 48}
    first = train(train_steps, net("cpu", (65, 100, 10)), x, targets, **given)
    apart = torch.empty(len(x), 131)[:, 1::2]
    apart.copy_(x)
    second = train(train_steps, net("cpu", (65, 100, 10)), apart, targets, chunk_steps=2, **given)
    assert torch.equal(first.losses, second.losses)
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e38, 1e-42])
def test_special_numbers(value: float) -> None:
    """NaN and inf stand where they stand after the loop."""
    x, targets = data("cpu")
    x[20, 3] = value
    given: dict[str, Any] = {"steps": 3, "batch_size": 16, "shuffle": False, "make": OPTIMIZERS["SGD"]}
    ours, theirs = (train(loop, net("cpu"), x, targets, **given) for loop in (train_steps, reference.train_steps))
    assert ours.engine == "native"
    assert_alike(ours, theirs)


def test_a_logit_of_nan_is_the_largest() -> None:
    """As torch.argmax has it, also behind others and before others."""
    x, targets = data("cpu")
    model = net("cpu")
    with torch.no_grad():
        model[2].bias[torch.tensor([4, 7])] = float("nan")
    given: dict[str, Any] = {"steps": 1, "batch_size": len(x)}
    ours, theirs = (train(loop, model, x, targets, **given) for loop in (train_steps, reference.train_steps))
    assert 0 < theirs.accuracies < 1
    assert torch.equal(ours.accuracies, theirs.accuracies)


def test_a_label_that_on_chunk_makes_wrong_raises() -> None:
    """As in the loop, before the first step of its chunk; here it is the last row of two steps, in a strided view."""
    x, targets = data("cpu")
    targets = torch.stack([targets, torch.zeros_like(targets)], 1)[:, 0]
    model = net("cpu")

    def change(done: int, losses: torch.Tensor) -> None:
        targets[-1] = 2**40

    optimizer = adam(model.parameters())
    given: dict[str, Any] = {"steps": 4, "chunk_steps": 2, "batch_size": 16, "shuffle": False}
    with pytest.raises(IndexError, match=f"Target {2**40} is out of bounds"):
        train_steps(model, optimizer, x, targets, on_chunk=change, **given)
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("name", ["inputs", "targets", "parameter"])
def test_memory_that_on_chunk_frees(name: str) -> None:
    x, targets = data("cpu")
    model = net("cpu")
    tensor = {"inputs": x, "targets": targets, "parameter": model[0].weight.data}[name]
    with pytest.raises(RuntimeError, match=f"{name}: a tensor of .* has no memory"):
        train_steps(
            model, adam(model.parameters()), x, targets, steps=4, chunk_steps=2,
            on_chunk=lambda done, losses: tensor.untyped_storage().resize_(0),
        )  # fmt: skip


def test_tensors_without_memory_and_transforms_are_left_to_pytorch() -> None:
    x, targets = data("cpu")
    model = net("cpu")
    for inputs, labels in (
        (torch._efficientzerotensor(x.shape), targets),
        (x, torch._efficientzerotensor(targets.shape, dtype=torch.int64)),
    ):
        decision = fusednn.explain(train_steps, model, adam(model.parameters()), inputs, labels, steps=1)[0]
        assert decision.implementation == "looped"
    given: dict[str, Any] = {"steps": 1, "criterion": nn.CrossEntropyLoss()}
    with pytest.raises(RuntimeError, match="functorch transform"):
        torch.func.functionalize(lambda x: train_steps(model, adam(model.parameters()), x, targets, **given))(x)


class Twice(TorchFunctionMode):
    """F.linear gives twice what it gives."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.nn.functional.linear else result


def test_modes_are_heard() -> None:
    x, targets = data("cpu")
    with Twice():
        ours, theirs = (train(loop, net("cpu"), x, targets, steps=2) for loop in (train_steps, reference.train_steps))
    assert ours.engine == "looped"
    assert_alike(ours, theirs)
    with torch.device("cpu"):
        assert train(train_steps, net("cpu"), x, targets, steps=2).engine == "native"


def test_a_bias_of_minus_infinity_without_decay_beside_weights_with() -> None:
    """It masks a class; 0 times infinity would be NaN."""
    model = net("cpu")
    with torch.no_grad():
        model[2].bias[3] = -float("inf")
    x, targets = data("cpu")
    targets[targets == 3] = 4

    def make(parameters: Any) -> torch.optim.Optimizer:
        both = list(parameters)
        groups = [{"params": [p for p in both if p.dim() == 2], "weight_decay": 0.1}]
        return torch.optim.SGD([*groups, {"params": [p for p in both if p.dim() == 1]}], lr=0.1)

    ours, theirs = (train(loop, model, x, targets, steps=3, make=make) for loop in (train_steps, reference.train_steps))
    assert ours.engine == "native"
    assert_alike(ours, theirs)


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: setattr(m[0].weight, "data", torch.zeros(1, 2))])
def test_parameters_that_on_chunk_replaces_are_refused(change: Any) -> None:
    model = net("cpu")
    optimizer = adam(model.parameters())
    with pytest.raises(RuntimeError, match="on_chunk changed what is trained"):
        train_steps(model, optimizer, *data("cpu"), steps=4, chunk_steps=2, on_chunk=lambda done, losses: change(model))


def interrupted(sizes: tuple[int, int, int], rows: int, batch_size: int) -> tuple[float, float]:
    """How long Ctrl-C waits, and a step takes, in seconds; the steps before are done, and no part of another."""
    x, targets = data("cpu", rows, sizes[0])
    model, told, sent = net("cpu", sizes), [0], [0.0]
    start = copy.deepcopy(model)

    def interrupt() -> None:
        sent[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    def run(model: nn.Module, **more: Any) -> None:
        given = {"batch_size": batch_size, "generator": torch.Generator().manual_seed(0), **more}
        train_steps(model, adam(model.parameters()), x, targets, **given)

    threading.Timer(0.5, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(model, steps=10**6, on_chunk=lambda done, losses: told.append(done))
    waited = time.monotonic() - sent[0]
    assert told[-1] > 0
    begin = time.monotonic()
    run(start, steps=told[-1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    return waited, (time.monotonic() - begin) / told[-1]


@pytest.mark.parametrize(("sizes", "rows", "batch_size"), [((256, 512, 10), 1000, 256), ((8, 16, 10), 10**6, 10**6)])
def test_ctrl_c_is_heard_within_100_ms(sizes: tuple[int, int, int], rows: int, batch_size: int) -> None:
    """Of the end of a step, the soonest of some times: the machine may have other things to do."""
    late = []
    while (not late or late[-1] >= 0.1) and len(late) < 8:
        waited, step = interrupted(sizes, rows, batch_size)
        late.append(waited - step)
    assert min(late) < 0.1, late


def test_other_threads_run_meanwhile() -> None:
    """The GIL is released: this thread counts while the other makes one long step."""
    x, targets = data("cpu", 4096, 512)
    model = net("cpu", (512, 512, 10))
    thread = threading.Thread(
        target=train_steps, args=(model, adam(model.parameters()), x, targets),
        kwargs={"batch_size": 4096, "steps": 1, "shuffle": False},
    )  # fmt: skip
    thread.start()
    gaps, before = [], time.monotonic()
    while thread.is_alive():
        time.sleep(0.001)
        gaps.append(time.monotonic() - before)
        before = time.monotonic()
    assert len(gaps) > 5


ASK = """
import sys, torch
if sys.argv[1] == "unbuilt":
    sys.modules["fusednn._native"] = None
import fusednn
model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
x, targets = torch.randn(64, 10), torch.randint(10, (64,))
optimizer = torch.optim.SGD(model.parameters())
decision = fusednn.explain(fusednn.train_steps, model, optimizer, x, targets, steps=2)[0]
print(decision, "fusednn.kernels.launch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("case", "answer"),
    [
        ("plain", f"train_steps: native ({Native.machine}, torch.float32, 10-16-10, batch 32) False"),
        ("unbuilt", "train_steps: looped (the native engine was not built)"),
    ],
)
def test_who_serves_a_plain_cpu(case: str, answer: str) -> None:
    """In a process without the interpreter; the native engine does not import what needs Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, "-c", ASK, case], env=environment, capture_output=True, text=True, check=False
    )
    assert answer in result.stdout, result.stderr


@pytest.mark.parametrize(("threads", "fused"), [(1, False), (2, False), (2, True), (8, False)])
def test_a_large_net_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch, threads: int, fused: bool) -> None:
    """Sooner where PyTorch has more than one thread, and where the optimizer is fused."""
    monkeypatch.undo()
    monkeypatch.setattr(plan, "on_plain_cpu", lambda x: x.is_cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    most = engine_of_cpus.most_products(threads, fused) // (3 * 320 * 20)
    for hidden, engine in ((most, "native"), (most + 1, "looped")):
        model = net("cpu", (10, hidden, 10))
        optimizer = torch.optim.Adam(model.parameters(), fused=fused)
        given: dict[str, Any] = {"steps": 1, "batch_size": 320}
        decision = fusednn.explain(train_steps, model, optimizer, *data("cpu", 320, 10), **given)[0]
        assert decision.implementation == engine
        assert ("PyTorch's own products are quicker" in decision.reason) == (engine == "looped")


def test_limits_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    limits = [engine_of_cpus.most_products(threads, False) for threads in (1, 2, 4, 8)]
    assert limits == sorted(limits, reverse=True)
    assert engine_of_cpus.most_products(2, True) * 2 == limits[1]


@pytest.mark.parametrize(("rows", "hidden"), [(1, 2**15), (2, 2**17)])
def test_a_wide_layer_is_left_to_pytorch(rows: int, hidden: int) -> None:
    """Sooner where there is one row."""
    for units, engine in ((hidden, "native"), (hidden + 1, "looped")):
        model = net("cpu", (1, units, 2))
        given: dict[str, Any] = {"steps": 0, "batch_size": rows}
        decision = fusednn.explain(train_steps, model, adam(model.parameters()), *data("cpu", 4, 1, 2), **given)[0]
        assert decision.implementation == engine
        assert ("so wide that PyTorch is quicker" in decision.reason) == (engine == "looped")


def test_the_interpreter_keeps_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = net("cpu")
    decision = fusednn.explain(train_steps, model, adam(model.parameters()), *data("cpu"), steps=1)[0]
    assert decision.implementation == "resident"


def test_without_a_compiler_the_build_succeeds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "setup.py",
        "build",
        "--build-base",
        str(tmp_path),
        "egg_info",
        "--egg-base",
        str(tmp_path),
    ]
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("**/fusednn/training/engines/native.py"))
    assert not list(tmp_path.glob("**/_native*"))


def test_another_thread_may_exchange_memory_meanwhile() -> None:
    """The steps under way are made where the parameters lay when they began."""
    x, targets = data("cpu", 2000)
    model = net("cpu")
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        with suppress(RuntimeError):  # it is the loop's to say that a gradient has lost its parameter's memory
            for _ in range(20):
                train_steps(model, adam(model.parameters()), x, targets, epochs=2)
    finally:
        done.set()
        thread.join()
