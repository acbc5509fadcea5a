"""What a step of each training build takes, committed in figures.json, so that `make resources` fails where one grew.

    python -m bench.resources --kernels mlp_training --write-figures

A figure is [barriers, instructions, floor]: the first two of the loop over steps, each counted once, the last in cycles
of a whole step (cycles.py; null where the loops are not understood). On AMD's GPUs barriers and instructions of the
whole kernel. They hold for the version of Triton that wrote them; under another nothing is compared.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

from . import sass

FILE = Path(__file__).with_name("figures.json")

NAMES = ("barriers", "instructions", "floor")

COMMAND = "python -m bench.resources --kernels mlp_training --write-figures"

Figure = list[int | None]


def name_of(label: str) -> str | None:
    """What a training build is called whatever its tiles, warps and stages are; None of other kernels' builds."""
    found = re.fullmatch(r"mlp_training (.+) \S+ w\d+ s\d+", label)
    return found[1] if found else None


def of_nvidia(label: str, compiled: Any, code: list[sass.Instruction]) -> dict[str, Any]:
    """The figure of a training build, and why it has no floor; nothing of other builds."""
    if name_of(label) is None:
        return {}
    batch = re.search(r" batch (\d+) ", label)
    inside = sass.inside(code)
    cycles, refusal = None, ""
    try:
        matched = sass.step_loop(code, compiled.asm["ttgir"], compiled.asm["ptx"], int(batch[1]) if batch else None)
        cycles = sass.floor(code, matched, compiled.metadata.num_warps).cycles()
    except sass.UnmatchedError as error:
        refusal = str(error)
    return {"figure": [sum(sass.is_barrier(one.name) for one in inside), len(inside), cycles], "no floor": refusal}


def of_amd(label: str, numbers: dict[str, int]) -> dict[str, Any]:
    """The same for AMD, whose assembly has no stall counts."""
    return {} if name_of(label) is None else {"figure": [numbers["barriers"], numbers["instructions"], None]}


def words(result: dict[str, Any]) -> str:
    """The figure of a result as `bench.resources` prints it."""
    barriers, instructions, floor = result["figure"]
    refusal = f" ({result['no floor']})" if result.get("no floor") else ""
    cycles = "no floor" if floor is None else f"predicted floor {floor:,} cycles"
    return f"a step: {barriers} barriers, {instructions:,} instructions, {cycles}{refusal}"


def compare(results: Iterable[dict[str, Any]], file: Path = FILE) -> tuple[list[str], str]:
    """A line for each result that grew or has no figure, and a line on the whole."""
    found = [result for result in results if "figure" in result]
    if not found:
        return [], "no training build: no figures"
    committed = json.loads(file.read_text()) if file.exists() else {"triton": triton.__version__}
    if committed["triton"] != triton.__version__:
        return [], f"figures are of Triton {committed['triton']}, this is {triton.__version__}: nothing is compared"
    bad = []
    for result in found:
        name, new = name_of(result["label"]), result["figure"]
        old = committed.get(result["target"], {}).get(name)
        if old is None:
            bad.append(f"{result['target']} {name}: no figure; run {COMMAND}")
            continue
        each = zip(NAMES, old, new, strict=True)
        if grown := [f"{what} {was} to {now}" for what, was, now in each if grew(was, now)]:
            bad.append(f"{result['target']} {name}: grew: {', '.join(grown)}; if it is worth it, run {COMMAND}")
    return bad, f"{len(found)} figures, {len(bad)} grew or are not there"


def grew(old: int | None, new: int | None) -> bool:
    """Whether a number is larger, or a floor is not known any more."""
    return old is not None and (new is None or new > old)


def write(results: Iterable[dict[str, Any]], file: Path = FILE) -> None:
    """Write the figures of all targets among the results anew, a line each; those of other targets stay."""
    committed = json.loads(file.read_text()) if file.exists() else {}
    if committed.pop("triton", None) != triton.__version__:
        committed = {}
    new: dict[str, dict[str, Figure]] = {}
    for result in results:
        if "figure" in result:
            new.setdefault(result["target"], {})[str(name_of(result["label"]))] = result["figure"]
    targets = [
        f"{json.dumps(target)}: {{\n"
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(figure)}" for name, figure in sorted(of.items()))
        + "\n}"
        for target, of in sorted((committed | new).items())
    ]
    file.write_text("{\n" + ",\n".join([f'"triton": {json.dumps(triton.__version__)}', *targets]) + "\n}\n")
