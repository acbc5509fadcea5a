import os
from pathlib import Path

import pytest
import torch

from fusednn.app.options import CommandError, choose_device, make_folder, parser


def test_defaults_are_the_textbook_run():
    assert vars(parser().parse_args(["train"])) == {
        "command": "train",
        "epochs": 30,
        "batch_size": 32,
        "lr": 0.01,
        "hidden": 128,
        "seed": 0,
        "device": "auto",
        "out": "runs/digits",
    }


def test_largest_values_are_taken():
    line = "train --seed 9223372036854775807 --hidden 1000000 --batch-size 1000000000 --epochs 1000000000 --lr 1e30"
    options = parser().parse_args(line.split())
    assert (options.seed, options.hidden, options.lr) == (2**63 - 1, 10**6, 1e30)


def test_error_stays_one_line():
    assert str(CommandError(2, "no folder 'a\nb';\tchoose")) == "no folder 'a b'; choose"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


@pytest.mark.usefixtures("two_gpus")
def test_devices_of_a_machine_with_two_gpus():
    assert [str(choose_device(name)) for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:1")] == [
        "cuda", "cpu", "cuda", "cuda:0", "cuda:1",
    ]  # fmt: skip


# torch.device itself takes cuda:2, meta, xpu and, as cuda:0, even cuda:256.
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "cuda:256", "cuda:-1", "xpu", "meta", "gpu", ""])
def test_device_that_is_not_there_is_refused(name: str):
    with pytest.raises(CommandError, match="choose auto or cpu or cuda or cuda:0 or cuda:1") as caught:
        choose_device(name)
    assert caught.value.code == 2
    assert repr(name) in str(caught.value)


@pytest.mark.usefixtures("no_accelerator")
def test_machine_without_accelerator_has_its_cpu():
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(CommandError, match="this machine has no device 'cuda'; choose auto or cpu"):
        choose_device("cuda")


def test_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path):
    assert make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []
    make_folder(str(tmp_path / "a" / "b"))


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below", "link", "n" * 300])
def test_folder_that_cannot_be_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(
        CommandError, match=r"--out: cannot write in .*; choose a folder that you may write in"
    ) as caught:
        make_folder(str(tmp_path / name))
    assert caught.value.code == 2


def test_folder_that_takes_no_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    # A mode would not do: the superuser may write anywhere.
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(CommandError, match=r"\(Permission denied\)"):
        make_folder(str(tmp_path))


def test_empty_folder_name_is_refused():
    with pytest.raises(CommandError, match="the name is empty"):
        make_folder("")
