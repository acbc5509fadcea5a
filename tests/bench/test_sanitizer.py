"""The kernels under compute-sanitizer: that all are launched, and what is made of what the tool says."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import sanitizer

TOOL = """#!/bin/sh
echo "$@" >> {folder}/called
echo "========= ERROR SUMMARY: {errors}"
exit {status}
"""


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "launch_all", lambda: None)


def install(folder: Path, errors: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compute-sanitizer that runs nothing."""
    tool = folder / "compute-sanitizer"
    tool.write_text(TOOL.format(folder=folder, errors=errors, status=status))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_every_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for module in sanitizer.MODULES:

        def launch(kernel: Any, *arguments: Any, really: Any = module.launch) -> None:
            launched.append(kernel.__name__)
            really(kernel, *arguments)

        monkeypatch.setattr(module, "launch", launch)
    sanitizer.launch_all("cpu", steps=2)
    assert {*launched} == {*sanitizer.KERNELS}
    assert launched.count("mlp_training_kernel") >= 2


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize(("errors", "status", "ended"), [("0 errors", 0, 0), ("3 errors", 9, 1)])
def test_what_the_tool_says(
    errors: str, status: int, ended: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, errors, status, monkeypatch)
    assert sanitizer.main([f"--json={tmp_path}/said.json"]) == ended
    said = json.loads((tmp_path / "said.json").read_text())
    assert [*said] == ["memcheck", "racecheck"]
    for result in said.values():
        assert result["status"] == f"exit status {status}"
        assert errors in result["said"]
    calls = (tmp_path / "called").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["--tool=memcheck", "--tool=racecheck"]
    for name in sanitizer.KERNELS:
        assert all(f"--kernel-name=kne={name} " in call for call in calls)


@pytest.mark.usefixtures("no_launches")
def test_a_tool_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "none", 0, monkeypatch)
    (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\necho begun\nsleep 61.5 & echo $! > {tmp_path}/pid; wait\n")
    monkeypatch.setattr(sanitizer, "seconds_left", lambda: 2.0)
    assert sanitizer.main([f"--json={tmp_path}/said.json"]) == 1
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["racecheck"] == {"status": "out of time", "said": "begun\n"}
    state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # what it watched is gone too


@pytest.mark.usefixtures("no_launches")
def test_without_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitizer.main([]) == 0
    assert "compute-sanitizer is not installed" in capsys.readouterr().out
