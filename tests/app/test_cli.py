import csv
import errno
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fusednn
from fusednn.app import train
from fusednn.app.checkpoint import load_model
from fusednn.app.cli import main
from fusednn.app.data import load
from fusednn.app.loop import evaluate
from fusednn.training.engines.native import MACHINES, Native
from fusednn.training.engines.resident import Resident

FILES = ["curves.png", "history.csv", "model.safetensors"]
# What the console script does; and Ctrl-C works in it even if pytest is a job in the background, which ignores it.
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fusednn.app.cli import main
sys.exit(main())
"""


@pytest.fixture
def pytorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch serves the operations, as in a process without TRITON_INTERPRET: the interpreter takes 0.3 s a step."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("fusednn.dispatch.INTERPRETED", False)
    yield
    torch.set_num_threads(threads)


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own: without the interpreter, and with its output buffered as by default."""
    without = ("TRITON_INTERPRET", "PYTHONUNBUFFERED")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=environment, text=True, **pipes | options)


def test_train_leaves_a_model_a_history_and_a_picture(
    tmp_path: Path, pytorch: None, capsys: pytest.CaptureFixture[str]
):
    options = ["train", "--epochs", "2", "--hidden", "16", "--seed", "5", "--out"]
    process = start(*options, tmp_path / "a")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert lines[0] == "device: cpu"
    reason = "(a CPU tensor: the kernels are for GPUs)"
    unbuilt = "looped (the native engine was not built)"
    serves = f"native ({Native.machine}, torch.float32, 64-16-10, batch 32)" if MACHINES else unbuilt
    assert lines[1:5] == [
        f"train_steps: {serves}",
        f"linear_relu: PyTorch {reason}",
        f"linear: PyTorch {reason}",
        f"cross_entropy: PyTorch {reason}",
    ]
    assert lines[6:] == [f"wrote {tmp_path / 'a' / name}" for name in reversed(FILES)]
    assert sorted(os.listdir(tmp_path / "a")) == FILES

    model = load_model(tmp_path / "a" / "model.safetensors")
    assert model.fc1.weight.shape == (16, 64)
    _, accuracy = evaluate(model, fusednn.CrossEntropyLoss(), load(5).test)
    assert lines[5] == f"test accuracy {accuracy:.3f}"
    with open(tmp_path / "a" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert f"loss {float(rows[1]['train_loss']):.4f}, validation accuracy" in errors

    # The same again, in another process, is the same to the bit.
    assert main([*options, str(tmp_path / "b")]) == 0
    capsys.readouterr()
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_seed_decides_the_first_weights(tmp_path: Path, pytorch: None):
    for seed in ("1", "2"):  # with steps too small to change a weight
        assert main(["train", "--epochs", "1", "--lr", "1e-30", "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    one, two = (load_file(tmp_path / seed / "model.safetensors") for seed in ("1", "2"))
    assert not torch.equal(one["fc1.weight"], two["fc1.weight"])


OPERATIONS = ["linear_relu: Triton interpreter", "linear: Triton interpreter", "cross_entropy: Triton interpreter"]


def test_train_runs_the_kernels_in_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # Batches larger than the training set: one step, of more rows than the training kernel takes.
    assert main(["train", "--epochs", "1", "--batch-size", "2000", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("train_steps: looped (64-128-10 with batches of 1437")
    assert [line.split(" (")[0] for line in lines[2:5]] == OPERATIONS


def test_train_runs_the_training_kernel_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    steps = []
    launch = Resident._launch

    def watched(self: Resident, number: int) -> None:
        steps.append(number)
        launch(self, number)

    monkeypatch.setattr(Resident, "_launch", watched)
    options = ["train", "--epochs", "2", "--batch-size", "500", "--hidden", "16"]
    assert main([*options, "--out", str(tmp_path / "kernel")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "train_steps: resident (Triton interpreter, torch.float32, 64-16-10, batch 500)"
    assert [line.split(" (")[0] for line in lines[2:5]] == OPERATIONS
    assert sum(steps) == 2 * 3  # and none before the training

    with monkeypatch.context() as without:
        without.setattr("fusednn.dispatch.INTERPRETED", False)
        assert main([*options, "--out", str(tmp_path / "loop")]) == 0
    assert sum(steps) == 2 * 3
    kernel, loop = (load_file(tmp_path / name / "model.safetensors") for name in ("kernel", "loop"))
    for name, parameter in kernel.items():
        torch.testing.assert_close(parameter, loop[name], rtol=0, atol=1e-4)


def test_bar_in_a_log_is_a_handful_of_updates(tmp_path: Path, pytorch: None, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--epochs", "60", "--batch-size", "2000", "--out", str(tmp_path)]) == 0
    errors = capsys.readouterr().err
    assert "60/60" in errors
    assert 2 <= errors.count("\r") <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs x", "argument --epochs: needs a whole number from 1 to"),
        ("--epochs 0", "argument --epochs: needs"),
        ("--epochs 1.5", "argument --epochs: needs"),
        ("--batch-size -1", "argument --batch-size: needs"),
        ("--batch-size nan", "argument --batch-size: needs"),
        ("--hidden 0", "argument --hidden: needs a whole number from 1 to 1000000"),
        ("--hidden 100000000000", "argument --hidden: needs"),
        ("--lr x", "argument --lr: needs a number above 0"),
        ("--lr nan", "argument --lr: needs"),
        ("--lr inf", "argument --lr: needs"),
        ("--lr -inf", "argument --lr: expected one argument"),
        ("--lr 0", "argument --lr: needs"),
        ("--lr -0.1", "argument --lr: needs"),
        ("--lr 1e31", "argument --lr: needs"),
        ("--seed -1", "argument --seed: needs a whole number from 0 to 9223372036854775807"),
        ("--seed 9223372036854775808", "argument --seed: needs"),
        ("--device cuda:99", "--device: this machine has no device 'cuda:99'; choose auto or cpu"),
        ("--device toaster", "--device: this machine has no device 'toaster'; choose auto or cpu"),
        ("--out {file}", "--out: cannot write in '{file}' (File exists); choose"),
        ("--out {file}/below", "--out: cannot write in '{file}/below' (Not a directory); choose"),
        ("--epoch 3", "unrecognized arguments: --epoch 3; see 'fusednn train --help'"),
        ("--unknown", "unrecognized arguments: --unknown; see 'fusednn train --help'"),
        ("more", "unrecognized arguments: more"),
        ("--epochs", "argument --epochs: expected one argument"),
    ],
)
def test_wrong_call_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str):
    file = tmp_path / "file"
    file.touch()
    assert main(["train", "--out", str(tmp_path / "out"), *arguments.format(file=file).split()]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: " + message.format(file=file))
    assert re.fullmatch(r"error: .+; .+\n", errors)
    assert os.listdir(tmp_path) == ["file"]


def test_control_characters_of_a_name_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    assert main(["train", "--out", f"{tmp_path}/file/\x1b[31m\x07"]) == 2
    assert main(["train", "--epochs", "1", "--out", f"{tmp_path}/\x1b[31m"]) == 0
    output, errors = capsys.readouterr()
    assert "\x1b" not in output + errors
    assert "\x07" not in output + errors
    assert output.count("\\x1b[31m") == 3


@pytest.mark.parametrize("argument", ["fly", "tra", "--vers"])
def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str], argument: str):
    assert main([argument]) == 2
    assert re.fullmatch(rf"error: .*{argument}.*; see 'fusednn --help'\n", capsys.readouterr().err)


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    nothing = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == nothing
    assert "train SimpleNN on the handwritten digits" in nothing


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fusednn {fusednn.__version__}\n"


@pytest.mark.parametrize("package", ["matplotlib", "safetensors", "sklearn", "tqdm"])
def test_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("checkpoint", "data", "loop", "plots", "train"):
        monkeypatch.delitem(sys.modules, f"fusednn.app.{name}")
    assert main(["train", "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{package}.*; .*pip install 'fusednn\[app\]'\n", errors)
    assert os.listdir(tmp_path) == []


def test_loss_that_is_not_finite_is_one_line(tmp_path: Path, pytorch: None, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--lr", "1e30", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: the loss is no longer finite in epoch 1; try a smaller --lr\n"
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_line_and_leaves_the_old_files(
    tmp_path: Path, pytorch: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model.safetensors").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    assert main(["train", "--epochs", "1", "--batch-size", "2000", "--out", str(tmp_path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: cannot write in .*No space left on device; make room there or .*", line)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None],
    ids=["python", "accelerator", "cpu"],
)
def test_no_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception | None
):
    def fail(*sizes: int) -> None:
        if error is not None:
            raise error
        torch.ones(2**50)

    monkeypatch.setattr(train, "SimpleNN", fail)
    assert main(["train", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: out of memory; try a smaller --hidden or --batch-size\n"


def test_defects_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*sizes: int) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(train, "SimpleNN", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", "--out", str(tmp_path)])


def test_interrupt_is_one_line_and_leaves_nothing(tmp_path: Path):
    process = start("train", "--epochs", "1000000", "--out", tmp_path)
    assert process.stdout is not None
    for _ in range(5):  # the device, the training and the operations: training begins
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted; run it again to start over"
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_backend_that_matplotlib_does_not_know_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "nonsense")  # as notebooks and shells set it
    process = start("train", "--epochs", "1", "--batch-size", "2000", "--out", tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert sorted(os.listdir(tmp_path)) == FILES


def test_reader_that_leaves_gets_no_traceback(tmp_path: Path):
    with start("train", "--epochs", "1", "--out", tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors == ""


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("--version", stdout=full)
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors == "error: [Errno 28] No space left on device; make room where the output goes\n"


@pytest.mark.slow
def test_accuracy_of_the_default_run_over_five_seeds(tmp_path: Path, pytorch: None, capsys: pytest.CaptureFixture[str]):
    accuracies = []
    for seed in range(5):
        assert main(["train", "--seed", str(seed), "--out", str(tmp_path)]) == 0
        found = re.search(r"^test accuracy (\d\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
        assert found
        accuracies.append(float(found[1]))
    assert min(accuracies) >= 0.97
    assert statistics.median(accuracies) >= 0.975
