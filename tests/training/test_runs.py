"""on_chunk, Ctrl-C and errors: whatever ends a run, whole steps are done, those that on_chunk was told of."""

import copy
import ctypes
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from fusednn import SimpleNN, reference, strict, train_steps
from fusednn.kernels import mlp_training
from fusednn.training import pacing
from fusednn.training.engines import captured, looped, resident
from fusednn.training.job import check

from .runs import adam, data, find_net, net, train


@pytest.fixture(params=["resident", "looped"])
def model(request: pytest.FixtureRequest, device: str) -> nn.Module:
    model = net(device)
    if request.param == "looped":
        model.register_forward_hook(lambda module, args, output: None)
    return model


class Watcher:
    """An on_chunk that keeps what it is told, and calls `then` at the end."""

    def __init__(self, then: Callable[[int], Any] = lambda done: None) -> None:
        self.done: list[int] = []
        self.losses: list[Tensor] = []
        self.then = then

    def __call__(self, done: int, losses: Tensor) -> None:
        self.done.append(done)
        self.losses.append(losses)
        self.then(done)


def after(steps: int, device: str) -> list[Tensor]:
    """The parameters after so many steps of the reference loop."""
    model = net(device)
    generator = torch.Generator().manual_seed(3)
    reference.train_steps(model, adam(model.parameters()), *data(device), steps=steps, generator=generator)
    return list(model.parameters())


def run(model: nn.Module, watcher: Watcher, **arguments: Any) -> Tensor:
    device = next(model.parameters()).device.type
    generator = torch.Generator().manual_seed(3)
    losses: Tensor = train_steps(
        model, adam(model.parameters()), *data(device), generator=generator, on_chunk=watcher, **arguments
    )
    return losses


def assert_stopped_after(steps: int, model: nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), after(steps, next(model.parameters()).device.type), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_so_many_steps(model: nn.Module) -> None:
    watcher = Watcher()
    losses = run(model, watcher, steps=8, chunk_steps=3)
    assert watcher.done == [3, 6, 8]
    assert [len(chunk) for chunk in watcher.losses] == [3, 3, 2]
    assert torch.equal(torch.cat(watcher.losses), losses)


def test_without_a_number_all_steps_are_told_of_once(model: nn.Module) -> None:
    watcher = Watcher()
    losses = run(model, watcher, steps=30)
    assert watcher.done[-1] == 30
    assert watcher.done == sorted(set(watcher.done))
    assert torch.equal(torch.cat(watcher.losses), losses)


def test_a_slow_loop_tells_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all for a chunk each step is one."""
    monkeypatch.setattr(looped, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(pacing, "CHUNK_SECONDS", 0.0)
    for hook in (True, False):
        watcher, model = Watcher(), net("cpu")
        if hook:
            model.register_forward_hook(lambda module, args, output: None)
        run(model, watcher, steps=4)
        assert watcher.done == [1, 2, 3, 4]


def test_stop_iteration_ends_the_training(model: nn.Module) -> None:
    def stop(done: int) -> None:
        if done == 4:
            raise StopIteration

    watcher = Watcher(stop)
    losses = run(model, watcher, steps=10, chunk_steps=2)
    assert watcher.done == [2, 4]
    assert losses.shape == (4,)
    assert_stopped_after(4, model)


def test_an_error_in_on_chunk(model: nn.Module) -> None:
    def fail(done: int) -> None:
        if done == 4:
            raise ZeroDivisionError

    watcher = Watcher(fail)
    with pytest.raises(ZeroDivisionError):
        run(model, watcher, steps=10, chunk_steps=2)
    assert watcher.done == [2, 4]
    assert_stopped_after(4, model)


CHANGES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "frozen": lambda model, optimizer, criterion: model[0].weight.requires_grad_(False),
    "the model has hooks": lambda model, optimizer, criterion: model.register_forward_hook(lambda *args: None),
    "not exactly the model's": lambda model, optimizer, criterion: setattr(
        model[0], "weight", nn.Parameter(torch.zeros(10, 10).to(model[0].weight))
    ),
    "other parameters": lambda model, optimizer, criterion: swap(model),
    "dtype": lambda model, optimizer, criterion: model.double(),
    "the optimizer's state is not Adam's": lambda model, optimizer, criterion: optimizer.param_groups[0].update(
        amsgrad=True
    ),
    "other sizes or activations": lambda model, optimizer, criterion: setattr(model, "1", nn.GELU()),
    "no training kernel computes Hardtanh": lambda model, optimizer, criterion: setattr(model, "1", nn.Hardtanh()),
    "reduction 'none'": lambda model, optimizer, criterion: setattr(criterion, "reduction", "none"),
    "the criterion has hooks": lambda model, optimizer, criterion: criterion.register_forward_hook(lambda *args: None),
}


def swap(model: Any) -> None:
    """The same parameters in other places."""
    model[0], model[2] = model[2], model[0]


@pytest.mark.parametrize("reason", CHANGES)
def test_on_chunk_that_changes_what_a_step_is(reason: str, device: str) -> None:
    """A kernel would go on as before; the loop would not."""
    model = net(device, (10, 10, 10))
    optimizer, criterion = adam(model.parameters()), nn.CrossEntropyLoss()
    change = CHANGES[reason]
    with pytest.raises(RuntimeError, match=f"on_chunk changed what is trained, .*{reason}"):
        train_steps(
            model, optimizer, *data(device, 50, 10), steps=4, chunk_steps=2, criterion=criterion,
            on_chunk=lambda *args: change(model, optimizer, criterion),
        )  # fmt: skip


def test_a_parameter_that_the_model_does_not_use_is_no_change(device: str) -> None:
    model = SimpleNN(20, 24, 10).to(device)
    optimizer = adam(model.parameters())
    model.register_parameter("scale", nn.Parameter(torch.ones((), device=device)))
    losses = train_steps(model, optimizer, *data(device), steps=4, chunk_steps=2, on_chunk=lambda *args: None)
    assert losses.shape == (4,)


@pytest.mark.parametrize("rows", [5, 100])
def test_on_chunk_that_resizes_the_data(rows: int, device: str) -> None:
    """The order of the epoch would lead past its end."""
    x, targets = data(device)
    model = net(device)
    optimizer = adam(model.parameters())

    def resize(done: int, losses: Tensor) -> None:
        x.resize_(rows, 20)
        targets.resize_(rows)

    with pytest.raises(RuntimeError, match="the inputs became"):
        train_steps(model, optimizer, x, targets, batch_size=8, steps=4, chunk_steps=2, on_chunk=resize)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_another_signal_whose_handler_raises(device: str) -> None:
    """As a time limit does: whole steps are done, those that on_chunk was told of."""
    model, watcher = net(device, (64, 128, 10)), Watcher()
    before = signal.signal(signal.SIGALRM, lambda *args: (_ for _ in ()).throw(TimeoutError()))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    optimizer = adam(model.parameters())
    try:
        with pytest.raises(TimeoutError):
            train_steps(model, optimizer, *data(device, 50, 64), steps=10**6, on_chunk=watcher)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert {int(state["step"]) for state in optimizer.state.values()} == {watcher.done[-1]}
    assert sum(len(losses) for losses in watcher.losses) == watcher.done[-1]


def test_on_chunk_may_change_the_learning_rate(model: nn.Module) -> None:
    device = next(model.parameters()).device.type
    optimizer, other = adam(model.parameters()), net(device)
    slower = lambda *args: optimizer.param_groups[0].update(lr=0.001)  # noqa: E731
    train_steps(model, optimizer, *data(device), steps=4, chunk_steps=2, shuffle=False, on_chunk=slower)
    reference_optimizer = adam(other.parameters())
    x, targets = data(device)
    reference.train_steps(other, reference_optimizer, x, targets, steps=2, shuffle=False)
    reference_optimizer.param_groups[0]["lr"] = 0.001
    reference.train_steps(other, reference_optimizer, x, targets, steps=2, shuffle=False)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def own_handler() -> Iterator[Any]:
    before = signal.getsignal(signal.SIGINT)
    yield before
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_middle_of_a_step(own_handler: Any) -> None:
    """It comes while the model runs; the step is finished, and told of, before KeyboardInterrupt is raised."""
    model, calls = net("cpu"), []

    def interrupt(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    model.register_forward_hook(interrupt)
    watcher = Watcher()
    with pytest.raises(KeyboardInterrupt):
        run(model, watcher, steps=10_000, chunk_steps=1000)
    assert watcher.done == [3]
    assert len(watcher.losses[0]) == 3
    assert_stopped_after(3, model)


def test_ctrl_c_in_a_resident_run(own_handler: Any) -> None:
    watcher, model = Watcher(), net("cpu")
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(model, watcher, steps=10_000)
    assert 0 < watcher.done[-1] < 10_000
    assert sum(map(len, watcher.losses)) == watcher.done[-1]
    assert_stopped_after(watcher.done[-1], model)


def test_ctrl_c_in_the_middle_of_a_launch(own_handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer has counted the steps by then, and the kernel has not made them."""
    launches, train_mlp = [], mlp_training.train_mlp

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        launches.append(1)
        if len(launches) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train_mlp(*args, **kwargs)

    monkeypatch.setattr(mlp_training, "train_mlp", interrupted)
    watcher, model = Watcher(), net("cpu")
    with pytest.raises(KeyboardInterrupt):
        run(model, watcher, steps=100, chunk_steps=100)
    assert len(launches) == 3
    assert len(watcher.done) == 1
    assert len(watcher.losses[0]) == watcher.done[0] >= 3
    assert_stopped_after(watcher.done[0], model)


@pytest.mark.parametrize("hook", [False, True], ids=["resident", "looped"])
def test_a_handler_that_does_not_raise_lets_the_training_go_on(hook: bool) -> None:
    heard, model = [], net("cpu")
    if hook:
        model.register_forward_hook(lambda module, args, output: None)
    before = signal.signal(signal.SIGINT, lambda *args: heard.append(1))
    try:
        watcher = Watcher(lambda done: os.kill(os.getpid(), signal.SIGINT))
        assert run(model, watcher, steps=6, chunk_steps=2).shape == (6,)
    finally:
        signal.signal(signal.SIGINT, before)
    assert watcher.done == [2, 4, 6]
    assert len(heard) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's struct sigaction")
def test_what_siginterrupt_has_set_stays(device: str) -> None:
    """A call that a signal comes in goes on by itself, as `signal.siginterrupt(number, False)` asks."""
    before = signal.signal(signal.SIGUSR1, lambda *args: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    sigaction, flags = ctypes.CDLL(None).sigaction, []
    try:
        for run in (None, train_steps):
            if run is not None:
                model = net(device)
                run(model, adam(model.parameters()), *data(device), steps=2, chunk_steps=1)
            action = ctypes.create_string_buffer(512)
            assert sigaction(signal.SIGUSR1, None, action) == 0
            flags.append(int.from_bytes(action.raw[136:140], sys.byteorder))  # sa_flags, on Linux
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert flags[0] == flags[1]
    assert flags[0] & 0x10000000  # SA_RESTART


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = net("cpu")
        model.register_forward_hook(lambda module, args, output: os.kill(os.getpid(), signal.SIGINT))
        assert run(model, Watcher(), steps=3).shape == (3,)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_on_chunk_is_heard_there(own_handler: Any) -> None:
    watcher, model = Watcher(lambda done: os.kill(os.getpid(), signal.SIGINT)), net("cpu")
    with pytest.raises(KeyboardInterrupt):
        run(model, watcher, steps=10, chunk_steps=2)
    assert watcher.done == [2]
    assert_stopped_after(2, model)


def test_in_another_thread(model: nn.Module) -> None:
    watcher, losses = Watcher(), []
    thread = threading.Thread(target=lambda: losses.append(run(model, watcher, steps=4, chunk_steps=2)))
    thread.start()
    thread.join()
    assert losses[0].shape == (4,)
    assert watcher.done == [2, 4]


def test_an_error_in_a_step_tells_of_those_before_it() -> None:
    """A label that only the loop meets, in the third batch."""
    model, (x, targets) = net("cpu"), data("cpu")
    model.register_forward_hook(lambda module, args, output: None)
    targets[35] = 10
    watcher = Watcher()
    with pytest.raises(IndexError, match="Target 10 is out of bounds"):
        train_steps(
            model, adam(model.parameters()), x, targets, batch_size=16, epochs=1, shuffle=False, on_chunk=watcher
        )
    assert watcher.done[-1] == sum(map(len, watcher.losses)) == 2


@pytest.mark.parametrize("chunk", [1, 100], ids=["step by step", "at once"])
def test_a_schedule_at_its_end(model: nn.Module, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OneCycleLR raises behind its last step: that step is made, and told of, as the reference loop makes it."""
    monkeypatch.setattr(pacing.Pace, "_adapt", lambda self, steps, seconds: setattr(self, "chunk", chunk))
    x, targets = data(device := next(model.parameters()).device.type)
    watcher, states = Watcher(), []
    for ours in (True, False):
        trained = model if ours else net(device)
        optimizer, generator = adam(trained.parameters()), torch.Generator().manual_seed(3)
        given: dict[str, Any] = {"lr_schedule": OneCycleLR(optimizer, 0.1, total_steps=5), "generator": generator}
        loop = train_steps if ours else reference.train_steps
        with pytest.raises(ValueError, match="Tried to step 6 times"):
            loop(trained, optimizer, x, targets, steps=20, **given, **({"on_chunk": watcher} if ours else {}))
        states.append((trained.state_dict(), optimizer.state_dict()["state"], generator.get_state()))
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    assert watcher.done[-1] == sum(map(len, watcher.losses)) == states[0][1][0]["step"]


def test_a_criterion_that_fails_leaves_the_steps_before(device: str) -> None:
    x, targets = data(device)
    watcher, model, calls = Watcher(), net(device), []

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError
        return nn.functional.cross_entropy(outputs, targets)

    optimizer, generator = adam(model.parameters()), torch.Generator().manual_seed(3)
    with pytest.raises(ZeroDivisionError):
        train_steps(model, optimizer, x, targets, steps=9, criterion=criterion, generator=generator, on_chunk=watcher)
    assert watcher.done[-1] == sum(map(len, watcher.losses)) == 3
    assert_stopped_after(3, model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inference_mode_fails_as_the_loop_does(device: str) -> None:
    """A kernel would train there, and leave moments that no optimizer can go on with."""
    model = net(device)
    optimizer = adam(model.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="does not require grad"):
        train_steps(model, optimizer, *data(device), steps=1)
    assert not optimizer.state
    assert_stopped_after(0, model)


@pytest.mark.parametrize("arguments", [{"steps": 12, "batch_size": 7}, {"epochs": 4, "batch_size": 16}], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_captured_loop(monkeypatch: pytest.MonkeyPatch, momentum: float, arguments: dict[str, Any]) -> None:
    """As the reference loop; what on a GPU is a graph is here the function that it would have been captured from."""
    captures: list[Any] = []
    monkeypatch.setattr(captured, "capture", lambda step, stream: captures.append(step) or step)
    monkeypatch.setattr(pacing, "CHUNK_SECONDS", 10.0)
    x, targets = data("cpu")
    states = []
    for loop in (True, False):
        torch.manual_seed(1)
        layers = nn.Linear(20, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
        model = nn.Sequential(*layers)
        make = torch.optim.SGD if momentum else torch.optim.AdamW
        groups = [{"params": layers[0].parameters()}, {"params": nn.Sequential(*layers[1:]).parameters(), "lr": 0.03}]
        optimizer = make(groups, lr=0.01, weight_decay=0.1, **({"momentum": momentum} if momentum else {}))
        given: dict[str, Any] = {
            "generator": torch.Generator().manual_seed(3), "criterion": nn.CrossEntropyLoss(label_smoothing=0.1),
            "lr_schedule": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "return_accuracy": True,
        }  # fmt: skip
        if loop:
            traces = reference.train_steps(model, optimizer, x, targets, **given, **arguments)
        else:
            options: Any = given | arguments
            job = check(model, optimizer, x, targets, options.pop("return_accuracy"), options)
            engine = captured.Captured(job, None)
            while engine.done < job.steps:
                engine.advance(job.steps - engine.done, None)
            traces = torch.cat(engine.losses), torch.cat(engine.accuracies)
        state = [list(entry.values()) for entry in optimizer.state_dict()["state"].values()]
        states.append((*traces, model.state_dict(), state, given["generator"].get_state()))
    assert len(captures) == 1
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "most"), [(10, 33), (16, 2)])
def test_a_chunk_of_replays_has_several_epochs(monkeypatch: pytest.MonkeyPatch, batch_size: int, most: int) -> None:
    """Where no batch is ragged; else the last batch of an epoch is a chunk of its own."""
    monkeypatch.setattr(captured, "capture", lambda step, stream: step)
    x, targets = data("cpu", 40)
    chunks, results = [], []
    for loop in (True, False):
        model, generator = net("cpu"), torch.Generator().manual_seed(3)
        optimizer = adam(model.parameters())
        given = {"batch_size": batch_size, "steps": 40, "generator": generator, "criterion": nn.CrossEntropyLoss()}
        if loop:
            results.append(reference.train_steps(model, optimizer, x, targets, **given))
            continue
        engine = captured.Captured(check(model, optimizer, x, targets, False, given), None)
        job = engine.job
        while engine.done < job.steps:
            engine.pace.chunk, done = 33, engine.done
            engine.advance(job.steps - done, None)
            chunks.append(engine.done - done)
        results.append(torch.cat(engine.losses))
    assert max(chunks) == most
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "graph"), [(128, False), (256, True)])
def test_large_steps_are_a_graph(monkeypatch: pytest.MonkeyPatch, batch_size: int, graph: bool) -> None:
    """Of 64-128-10, on a GPU, from the sizes on at which it was measured to be quicker than one program."""
    monkeypatch.setattr(captured.Captured, "refusal", lambda job, net: None)
    inputs = SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda:0")
    job: Any = SimpleNamespace(inputs=inputs, batch_size=batch_size, epoch_rows=1797)
    found = find_net(net("cpu", (64, 128, 10)))
    refusal = resident.Resident.refusal(job, found)
    assert (refusal or "").endswith("many programs are quicker") is graph
    job.inputs.dtype = torch.float64
    assert resident.Resident.refusal(job, found) is None
    job.inputs.is_cuda, job.inputs.dtype = False, torch.float32
    assert resident.Resident.refusal(job, found) is None


@pytest.mark.gpu
def test_mnist_is_a_graph_on_a_gpu() -> None:
    """As the reference loop, also within `strict`; a short call is one program."""
    x, targets = data("cuda", 300, 784)
    model, other = net("cuda", (784, 128, 10)), net("cuda", (784, 128, 10))
    ours, theirs = (
        train(loop, one, x, targets, make=lambda parameters: torch.optim.SGD(parameters, lr=0.01), steps=60,
              batch_size=100) for loop, one in ((train_steps, model), (reference.train_steps, other))
    )  # fmt: skip
    assert ours.engine == "captured"
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-4, atol=1e-5)
    with strict():
        train_steps(model, adam(model.parameters()), x, targets, steps=60, batch_size=100)


def test_a_graph_is_not_replayed_for_other_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """on_chunk may load a checkpoint, and with it tensors that the graph does not have."""
    replays: list[Any] = []
    monkeypatch.setattr(captured, "capture", lambda step, stream: lambda: replays.append(1) or step())
    model, (x, targets) = net("cpu"), data("cpu")
    optimizer = adam(model.parameters())
    engine = captured.Captured(check(model, optimizer, x, targets, False, {"batch_size": 10, "steps": 20}), None)
    while engine.done < 8:
        engine.advance(1, None)
    assert len(replays) == 5
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    engine.advance(1, None)
    assert engine.done == 9
    assert len(replays) == 5


@pytest.mark.gpu
def test_captured_on_a_gpu() -> None:
    """The same bits as the loop that is not captured, and the reference's values."""
    x, targets = data("cuda", 500)
    results = []
    for threshold in (50, 10**9):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 24), nn.GELU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)).cuda()
        optimizer, generator = adam(model.parameters()), torch.Generator().manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(captured, "LEAST_STEPS", threshold)
            losses = train_steps(model, optimizer, x, targets, epochs=5, generator=generator)
        results.append([losses, *model.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_the_options_are_those_of_the_reference_loop() -> None:
    """help() and editors show them with their defaults; one that is unknown raises, as of any function."""
    ours, theirs = (inspect.signature(loop).parameters for loop in (train_steps, reference.train_steps))
    assert ours.keys() - theirs.keys() == {"on_chunk", "chunk_steps"}
    assert theirs.keys() <= ours.keys()
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())
    assert ours["batch_size"].annotation is int
    model, (x, targets) = net("cpu"), data("cpu")
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        train_steps(model, adam(model.parameters()), x, targets, steps=1, batchsize=3)
