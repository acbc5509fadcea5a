"""What fits the static clock to a GPU, as far as it needs none."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bench import clock, cycles, gpu
from bench.sass import Instruction, Loop

LOAD, WAIT = Instruction(0, "LDG.E", "", 2, True, 0, 7, 0), Instruction(16, "FADD", "", 4, True, 7, 7, 1)

ROOT, THEN = Instruction(32, "MUFU.SQRT", "", 1, True, 1, 7, 0), Instruction(48, "FADD", "", 4, True, 7, 7, 2)

READING = cycles.Reading([LOAD, WAIT, ROOT, THEN] * 8, Loop(0, 31), 4)
"""Loads and roots that are waited for."""

PROBE = clock.Probe(clock.loads_kernel, 4, 128, "LDG", "load after store")


@pytest.mark.parametrize("cycles_of_a_load", [30.0, 100.0, 700.0])
def test_a_constant_is_what_explains_the_time(cycles_of_a_load: float) -> None:
    measured = READING.cycles(cycles.best({"load after store": cycles_of_a_load}))
    assert clock.fit(PROBE, READING, measured, {}) == pytest.approx(cycles_of_a_load)


def test_what_was_fitted_before_is_known() -> None:
    known = {"special function": 70.0}
    measured = READING.cycles(cycles.best({**known, "load after store": 100.0}))
    assert clock.fit(PROBE, READING, measured, known) == pytest.approx(100)
    assert clock.fit(PROBE, READING, measured, {}) > 101


def test_a_probe_that_measures_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="does not wait for its BAR"):
        clock.fit(PROBE._replace(constant="barrier", instruction="BAR"), READING, 100.0, {})


def test_errors() -> None:
    assert clock.error_of((5.0, 9.0), 7.0) == "+0%"
    assert clock.error_of((5.0, 9.0), 10.0) == "-10%"
    assert clock.error_of((5.0, 9.0), 4.0) == "+25%"


def test_a_trip_is_timed_without_what_a_launch_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Stamp:
        def __init__(self) -> None:
            self.seconds = now[0]

        def __sub__(self, earlier: "Stamp") -> float:
            return self.seconds - earlier.seconds

    def run(trips: int) -> None:
        now[0] += 5.0 + 0.25 * trips

    monkeypatch.setattr(clock, "Stamp", Stamp)
    assert clock.seconds_a_trip(run, 10, 30) == pytest.approx(0.25)


COMPILE = """
import json, torch
from bench import clock, cycles
from bench.sweep import stand_in

stand_in(90)
found = []
for probe in (clock.SPEED, *clock.PROBES):
    dtype = torch.int32 if probe.kernel is clock.loads_kernel else torch.float32
    compiled = probe.kernel.warmup(dtype, 2, BLOCK=probe.block, num_warps=probe.warps, grid=(1,))
    reading, unrolled = clock.loop_of(probe, compiled)
    count, _ = reading.counted(lambda name: name.startswith(probe.instruction))
    ends = [cycles.CONSTANTS[probe.constant][:2] if probe.constant else (0, 0)][0]
    times = [reading.cycles(cycles.best({probe.constant: end})) for end in ends]
    found.append([probe.constant, count / (unrolled * probe.each * 8), (times[1] - times[0]) / unrolled / 8, *ends])
print(json.dumps(found))
"""


def test_the_probes_have_what_they_measure() -> None:
    """Compiled for an H100: as many of its instruction as the source says, each waited for in turn."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=gpu.ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    assert [name for name, *_ in found] == ["", *(probe.constant for probe in clock.PROBES)]
    for name, count, more, best, worst in found:
        assert 1 <= count < 1.15, name
        assert more == 0 if not name else more >= 0.9 * (worst - best), name
