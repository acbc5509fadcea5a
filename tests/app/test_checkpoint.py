import errno
import json
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusednn import SimpleNN
from fusednn.app import checkpoint
from fusednn.app.checkpoint import CheckpointError, load_model, save_model, write_atomically


def metadata_of(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """What save_model would note of such parameters."""
    noted = {"format": checkpoint.FORMAT}
    return {"fusednn": json.dumps({**noted, "sha256": checkpoint._checksum(state, noted)})}


def test_write_makes_and_replaces_a_file(tmp_path: Path):
    path = tmp_path / "file"
    for content in (b"first", b"", b"third" * 1000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


def test_write_gives_the_mode_that_the_umask_asks_for(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [b"old", None])
def test_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None, step: str, error: BaseException
):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    reached = []

    def fail(*args: object) -> None:
        reached.append(os.listdir(tmp_path))
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert len(reached[0]) == 1 + (old is not None)  # the new content was beside the old one, in the same folder
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == (
        {} if old is None else {"file": old}
    )


def test_write_syncs_the_content_before_the_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomically(tmp_path / "file", b"12345")
    assert calls == [5, "replace", "folder"]


@pytest.mark.parametrize("bias", [True, False])
def test_model_comes_back(tmp_path: Path, bias: bool):
    model = SimpleNN(5, 7, 3, bias=bias)
    save_model(model, tmp_path / "model", {"seed": 4})
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_equal_models_are_equal_files(tmp_path: Path):
    model = SimpleNN(5, 7, 3)
    about = {letter: number for number, letter in enumerate("abcdefgh")}
    files = [tmp_path / str(number) for number in range(5)]
    for file in files:
        save_model(model, file, about)
    assert len({file.read_bytes() for file in files}) == 1


def test_metadata_says_what_the_model_is(tmp_path: Path):
    save_model(SimpleNN(5, 7, 3), tmp_path / "model", {"seed": 4, "test_accuracy": 0.5})
    with safe_open(tmp_path / "model", framework="pt") as file:
        noted = json.loads(file.metadata()["fusednn"])
    assert len(noted.pop("sha256")) == 64
    assert noted == {"format": 2, "seed": 4, "test_accuracy": 0.5}


def test_any_flipped_bit_is_noticed(tmp_path: Path):
    whole, flipped = tmp_path / "whole", tmp_path / "flipped"
    save_model(SimpleNN(5, 7, 3), whole, {"seed": 4})
    content = whole.read_bytes()
    for place in torch.randperm(8 * len(content), generator=torch.Generator().manual_seed(0))[:200].tolist():
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        flipped.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_model(flipped)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_in_its_dtype(tmp_path: Path, dtype: torch.dtype):
    model = SimpleNN(5, 7, 3, dtype=dtype)
    save_model(model, tmp_path / "model", {})
    torch.testing.assert_close(load_model(tmp_path / "model").state_dict(), model.state_dict(), rtol=0, atol=0)


def test_what_a_killed_run_left_is_cleaned_up(tmp_path: Path):
    old, young, other = (
        tmp_path / name for name in (f".fusednn-{1:016x}.tmp", f".fusednn-{2:016x}.tmp", ".fusednn-notes.tmp")
    )
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    write_atomically(tmp_path / "file", b"")
    assert sorted(os.listdir(tmp_path)) == [f".fusednn-{2:016x}.tmp", ".fusednn-notes.tmp", "file"]


def test_model_cut_short_is_refused_at_every_length(tmp_path: Path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    save_model(SimpleNN(2, 3, 2), whole, {})
    content = whole.read_bytes()
    for length in range(len(content)):
        part.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"part is damaged or not a safetensors file"):
            load_model(part)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"epoch,train_loss\n1,0.5\n", b"\xff" * 64]
)
def test_foreign_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(CheckpointError, match="foreign is damaged or not a safetensors file"):
        load_model(tmp_path / "foreign")


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The state of a SimpleNN(5, 7, 3) with some tensors replaced, added or, where None, left out."""
    state = SimpleNN(5, 7, 3).state_dict() | {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(2, 2)},
        changed(fc3_weight=torch.zeros(3)),
        changed(fc1_bias=None),
        changed(fc2_weight=None),
        changed(fc1_bias=torch.zeros(8)),
        changed(fc2_weight=torch.zeros(3, 8)),
        changed(fc1_weight=torch.zeros(35)),
        changed(fc2_bias=torch.zeros(3, dtype=torch.float64)),
        {name: tensor.int() for name, tensor in changed().items()},
    ],
    ids=["other", "extra", "no fc1.bias", "no fc2.weight", "fc1.bias", "fc2.weight", "flat", "mixed", "int"],
)
def test_other_tensors_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]):
    save_file(state, tmp_path / "other", metadata_of(state))
    with pytest.raises(CheckpointError, match="does not hold the parameters of a SimpleNN"):
        load_model(tmp_path / "other")


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"format": "pt"}, {"fusednn": "{"}, {"fusednn": "[]"}, {"fusednn": "{}"}, {"fusednn": "[" * 100_000}],
)
def test_metadata_of_others_is_refused(tmp_path: Path, metadata: dict[str, str] | None):
    save_file(changed(), tmp_path / "other", metadata)
    with pytest.raises(CheckpointError, match="was not written by fusednn"):
        load_model(tmp_path / "other")


def test_later_format_is_refused(tmp_path: Path):
    save_file(changed(), tmp_path / "later", {"fusednn": '{"format": 3}'})
    with pytest.raises(CheckpointError, match="has format 3; this version of fusednn reads format 2"):
        load_model(tmp_path / "later")


def test_missing_file_and_folder_are_the_systems_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "missing")
    with pytest.raises(OSError):  # noqa: PT011 (which one is safetensors' to choose)
        load_model(tmp_path)
