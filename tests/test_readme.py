"""What stands in the README runs, and what it links to is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fusednn
from fusednn.app.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that the diff adds, the loop in one line, and the model that `make train` leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusednn.dispatch.INTERPRETED", False)
    (diff,), python = blocks("diff"), blocks("python")
    assert len(python) == 2
    scope: dict[str, Any] = {"fusednn": fusednn}
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(added) == 2
    exec("\n".join(added), scope)
    scope["optimizer"] = torch.optim.Adam(scope["model"].parameters())
    scope["inputs"], scope["targets"] = torch.randn(64, 64), torch.randint(10, (64,))
    exec(python[0], scope)
    assert scope["losses"].shape == (20,)
    threads = torch.get_num_threads()
    assert main(["train", "--epochs", "1"]) == 0
    torch.set_num_threads(threads)
    scope = {}
    exec(python[1], scope)
    state = load_file("runs/digits/model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in scope["model"].state_dict().items())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"`[^`\n]*`", "", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_no_figure_is_left_out() -> None:
    """A cell of a table that is one word in capitals stands for a number that was to be measured."""
    for page in ("README.md", "CONTRIBUTING.md", "docs/evidence.md", "docs/limits.md"):
        cells = {cell.strip() for cell in re.split(r"[|\n]", (ROOT / page).read_text())}
        assert {cell for cell in cells if re.fullmatch(r"[A-Z]{4,}", cell)} <= {"NVIDIA"}, page


def test_the_first_screen_is_short() -> None:
    """A newcomer reads what it is, sees the chart and types a command: all before the first heading but the title."""
    title, first_screen, *_ = re.split(r"^#+ .*$", README, maxsplit=2, flags=re.MULTILINE)
    assert title == ""
    assert len(first_screen.split()) < 250
    for needed in ("training-step.svg", "make train", "make test", "train_steps(", "```diff"):
        assert needed in first_screen


def test_every_name_of_the_table_is_public() -> None:
    names = set(
        re.findall(r"`(?:\w+ = )?(?:with )?(?:print\()?(\w+)\(", README.split("## Use it")[1].split("## Read")[0])
    )
    assert names - {*fusednn.__all__} - {"step", "relu"} == set()
    assert len(names) > 8
