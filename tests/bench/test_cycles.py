"""The static clock: control codes, loops and how often they run, the model of a multiprocessor, and the figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from bench import cycles, figures, gpu, sass
from bench.sass import Floor, Instruction, Loop, UnmatchedError


def test_control_codes_of_known_instructions() -> None:
    """As `nvdisasm -hex` lists them."""

    def controls(low: int, high: int) -> tuple[int, bool, int, int, int]:
        return sass.controls(low.to_bytes(8, "little") + high.to_bytes(8, "little"))

    assert controls(0x00000A00FF017B82, 0x000E300000000800) == (8, True, 0, 7, 0)  # LDC R1, c[0x0][0x28]
    assert controls(0x000000010000780C, 0x002FDA0003F06270) == (13, False, 7, 7, 2)  # ISETP.GE.AND P0, PT, R0, 0x1, PT
    assert controls(0x000000000000894D, 0x001FEA0003800000) == (5, True, 7, 7, 1)  # @!P0 EXIT
    assert controls(0x0038006C2E007388, 0x0009E20000000C00) == (1, True, 7, 4, 0)  # STS.128 [R46+0x3800], R108
    word = 9 | 1 << 4 | 2 << 5 | 3 << 8 | 0b100001 << 11 | 0b1111 << 17  # the last four tell which registers are reused
    assert sass.controls((word << 105).to_bytes(16, "little")) == (9, True, 2, 3, 33)


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/              @!P0 BRA 0x90 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   FFMA R2, R2, R3, R4 ;
        /*0050*/               @P1 BRA 0x40 ;
        /*0060*/                   FADD R2, R2, R3 ;
        /*0070*/               @P2 BRA 0x60 ;
        /*0080*/               @P1 BRA P2, 0x30 ;
        /*0090*/              @!P3 EXIT ;
        /*00a0*/                   BRA 0x20 ;
        /*00b0*/                   BRA 0xb0;
"""

STALLS = (8, 2, 5, 6, 4, 5, 0, 5, 5, 5, 7, 0)

SOURCE = """
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %c32_i32 = arith.constant 32 : i32
    %c100_i32 = arith.constant 100 : i32
    %order_ptr:2 = scf.for %step = %c0_i32 to %steps step %c1_i32 iter_args(%a = %b) -> (i32)  : i32 {
      %size_5 = arith.minsi %batch_size, %c : i32
      %db:3 = scf.for %x = %c0_i32 to %size_5 step %c32_i32 iter_args(%y = %z) -> (f32)  : i32 {
        %13 = "tt.reduce"(%12) <{axis = 0 : i32}> ({
        }) : (tensor<8xf32>) -> f32
        scf.for %k = %c0_i32 to %c100_i32 step %c32_i32  : i32 {
        } loc(#loc2)
        %z_2 = scf.for %k = %c0_i32 to %c32_i32 step %c1_i32 iter_args(%y = %z) -> (f32)  : i32 {
          scf.yield %y : f32
        } loc(#loc2)
      } loc(#loc1)
    } loc(#loc)
"""


def listed(text: str = LISTING) -> list[Instruction]:
    words = [(stall << 105 | 7 << 110 | 7 << 113).to_bytes(16, "little") for stall in STALLS]
    return sass.instructions(text, b"".join(words))


def test_a_listing() -> None:
    code = listed()
    assert len(code) == 12
    assert code[2] == Instruction(0x20, "BRA", "0x90", 5, False, 7, 7, 0)
    assert code[3].name == "BAR.SYNC.DEFER_BLOCKING"
    assert code[4].operands == "R2, R2, R3, R4"


def test_loops_and_their_nesting() -> None:
    (outer,) = sass.loops(listed())
    assert (outer.first, outer.last, outer.shape()) == (2, 10, "((()()))")
    (middle,) = outer.inside
    assert [(loop.first, loop.last) for loop in (middle, *middle.inside)] == [(3, 8), (4, 5), (6, 7)]
    side_by_side = sass.loops(listed(LISTING.replace("BRA 0x20", "BRA 0x90")))
    assert [loop.shape() for loop in side_by_side] == ["(()())", "()"]
    assert sass.longest(side_by_side) == side_by_side[0]


def test_bounds_in_the_source() -> None:
    (outer,) = sass.source_loops(SOURCE, 80)
    assert (outer.trips, outer.shape()) == (None, "((()()))")
    assert [loop.trips for loop in (outer.inside[0], *outer.inside[0].inside)] == [3, 4, 32]
    assert sass.source_loops(SOURCE, None)[0].inside[0].trips is None


def test_a_while_has_two_regions() -> None:
    loop = """
    %5 = scf.while (%arg5 = %0) : (i32) -> i32 {
      scf.condition(%6) %arg5 : i32
    } do {
      scf.for %k = %c0_i32 to %n step %c1_i32  : i32 {
      } loc(#loc2)
    } loc(#loc1)
    """
    assert [found.shape() for found in sass.source_loops(loop, None)] == ["(())"]


def test_how_often_each_instruction_runs() -> None:
    loop = sass.step_loop(listed(), SOURCE, "bar.sync 0;", 80)
    assert list(sass.times(loop)) == [
        (2, 1), (3, 3), (4, 12), (5, 12), (6, 96), (7, 96), (8, 3), (9, 1), (10, 1)
    ]  # fmt: skip
    ran = [place for places in sass.run_order(loop) for place in places]
    middle = [3, *[4, 5] * 4, *[6, 7] * 32, 8]
    assert ran == [2, *middle * 3, 9, 10]
    stalls = 5 + 3 * 6 + 12 * 4 + 12 * 5 + 96 * 1 + 96 * 5 + 3 * 5 + 5 + 7  # a count of 0 takes a cycle too
    assert sass.floor(listed(), loop, 8) == Floor(stalls, 2 * 225)
    assert sass.floor(listed(), loop, 2) == Floor(stalls, 225)
    assert sass.floor(listed(), loop, 16).cycles() == 900


@pytest.mark.parametrize(
    ("listing", "source", "ptx", "batch", "words"),
    [
        (LISTING.replace("@P2 BRA 0x60", "@P2 BRA 0x80"), SOURCE, 1, 80, "nested ((())) in the machine code, ((()()))"),
        (LISTING, SOURCE.replace("to %size_5", "to %other"), 1, 80, "bounds of the loop on line 8"),
        (LISTING, SOURCE, 1, None, "bounds of the loop on line 8"),
        (LISTING, SOURCE.replace("scf.for %k = %c0_i32 to %c100", "while"), 1, 80, "(()())"),
        (LISTING, SOURCE + SOURCE, 1, 80, "2 outermost loops"),
        (LISTING.replace("@P2 BRA 0x60", "@P2 BRA 0x50"), SOURCE, 1, 80, "overlap"),
        (LISTING, SOURCE, 2, 80, "2 barriers in PTX are 1"),
    ],
)
def test_a_mismatch_is_said(listing: str, source: str, ptx: int, batch: int | None, words: str) -> None:
    assert sass.step_loop(listed(), SOURCE, "bar.sync 0;", 80).inside
    with pytest.raises(UnmatchedError, match=re.escape(words)):
        sass.step_loop(listed(listing), source, "bar.sync 0;" * ptx, batch)


def instruction(name: str, stall: int = 1, written: int = 7, waits: int = 0, read: int = 7) -> Instruction:
    return Instruction(0, name, "", stall, False, written, read, waits)


def simulated(*code: Instruction, warps: int = 1, alone: bool = False, **changed: float) -> float:
    clock = cycles.best({name.replace("_", " "): value for name, value in changed.items()})
    return cycles.simulate([cycles.operation(one, clock) for one in code], warps, clock, alone)


def test_the_clock() -> None:
    """By hand, of a few instructions."""
    fma, load, wait = instruction("FFMA"), instruction("LDG.E", written=2), instruction("FADD", stall=4, waits=0b100)
    assert simulated(fma, fma, fma) == 3
    assert simulated(instruction("FFMA", stall=4), fma) == 5
    assert simulated(load, fma, wait, load_after_store=100) == 100 + 4
    assert simulated(load, fma, load_after_store=100) == 2
    assert simulated(*[fma] * 10, warps=4) == 10  # a scheduler each
    assert simulated(*[fma] * 10, warps=8) == 20
    assert simulated(*[fma] * 10, warps=8, alone=True) == 10
    assert simulated(*[instruction("MOV")] * 10, warps=8) == 20
    mufu = instruction("MUFU.EX2")
    assert simulated(mufu, mufu, mufu) == 2 * 8 + 1
    assert simulated(mufu, mufu, mufu, alone=True) == 3
    held = instruction("STS", read=0), instruction("FADD", waits=1)
    assert simulated(*held, operands_held=30) == 31


def test_the_clock_at_barriers() -> None:
    barrier, slow = instruction("BAR.SYNC.DEFER_BLOCKING"), instruction("FFMA", stall=9)
    assert simulated(slow, barrier, slow, warps=4, barrier=20) == 9 + 20 + 9
    assert (
        simulated(slow, barrier, slow, warps=8, barrier=20) == 1 + 9 + 20 + 1 + 9
    )  # the second of a scheduler is late
    assert simulated(slow, barrier, slow, warps=4, barrier=20, alone=True) == 9 + 1 + 9


def test_the_clock_at_the_load_store_unit() -> None:
    loads = [instruction("LDS.128")] * 10
    unit = {"load-store unit, bytes a cycle": 128.0}
    clock = cycles.best(unit)
    operations = [cycles.operation(one, clock) for one in loads]
    assert operations[0].transfer == 4
    assert cycles.operation(instruction("LDSM.16.M88.4"), clock).transfer == 4
    assert cycles.operation(instruction("LDSM.16.MT88.2"), clock).transfer == 2
    assert cycles.operation(instruction("STG.E"), clock).transfer == 1
    assert cycles.operation(instruction("FFMA"), clock).transfer == 0
    took = cycles.simulate(operations, 8, clock)
    assert 8 * 10 * 4 - 20 <= took <= 8 * 10 * 4  # all warps share it; its queue hides the last ones


def test_the_clock_of_products() -> None:
    clock = cycles.best()
    assert cycles.multiplications("HGMMA.64x32x8.F32.TF32") == 64 * 32 * 8
    assert cycles.multiplications("HMMA.1688.F32.TF32") == 16 * 8 * 8
    assert cycles.multiplications("HMMA.16816.F32.BF16") == 16 * 8 * 16
    assert cycles.multiplications("DMMA.884") == 8 * 8 * 4
    assert cycles.multiplications("FFMA") == 0
    assert cycles.operation(instruction("HGMMA.64x32x16.F32.BF16"), clock).interval == 16
    assert cycles.operation(instruction("DMMA.884"), clock).interval == 8
    assert cycles.operation(instruction("HGMMA.64x32x8.F32.TF32"), clock).interval == 16
    assert cycles.operation(instruction("HMMA.1688.F32.TF32"), clock).interval == 4
    product, wait = instruction("HGMMA.64x32x8.F32.TF32"), instruction("WARPGROUP.DEPBAR.LE")
    latency = clock["warp group's product"]
    assert simulated(product, product, wait) == 2 * 16 + latency + 1
    assert simulated(product, product, instruction("FFMA")) == 3


def test_deferred_waits_go_by_how_many_are_pending() -> None:
    loads = [instruction("LDGSTS", stall=10), instruction("LDGDEPBAR", written=1, stall=10)] * 2
    for pending, until in ((0, 30 + 100), (1, 10 + 100), (2, 40), (3, 40)):
        wait = instruction("DEPBAR.LE")._replace(operands=f"SB1, 0x{pending:x}")
        assert simulated(*loads, wait, load_after_store=100) == until + 1


LABEL = "mlp_training fp32 64-128-10 batch 32 default tf32 32x128x64x16 w8 s1"


def result(target: str = "sm_90", label: str = LABEL, figure: list[int | None] | None = None) -> dict[str, Any]:
    return {"target": target, "label": label, "figure": figure or [16, 1500, 4000]}


@pytest.mark.parametrize(
    ("figure", "grown"),
    [
        ([16, 1500, 4000], ""),
        ([15, 1400, 3000], ""),
        ([17, 1500, 4000], "barriers 16 to 17"),
        ([16, 1501, 4000], "instructions 1500 to 1501"),
        ([10, 1000, 4001], "floor 4000 to 4001"),
        ([16, 1500, None], "floor 4000 to None"),
    ],
)
def test_what_grew_fails(figure: list[int | None], grown: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures.write([result(), result("gfx942", figure=[9, 800, None])], file)
    retiled = LABEL.replace("32x128x64x16 w8", "32x64x64x16 w4")
    bad, summary = figures.compare(
        [result(label=retiled, figure=figure), result("gfx942", figure=[9, 800, None])], file
    )
    assert bool(bad) == bool(grown)
    assert grown in "".join(bad)
    assert summary == f"2 figures, {int(bool(grown))} grew or are not there"


def test_the_figure_of_a_build() -> None:
    """What is before the loop is not in it."""
    code = listed(LISTING.replace("S2R R0, SR_TID.X", "BAR.SYNC 0x0"))
    compiled = SimpleNamespace(asm={"ttgir": SOURCE, "ptx": "bar.sync;" * 2}, metadata=SimpleNamespace(num_warps=8))
    floor = sass.floor(code, sass.step_loop(code, SOURCE, "bar.sync;" * 2, 32), 8).cycles()
    assert figures.of_nvidia(LABEL, compiled, code) == {"figure": [1, 9, floor], "no floor": ""}
    compiled.asm["ttgir"] = ""
    unknown = figures.of_nvidia(LABEL, compiled, code)
    assert unknown["figure"] == [1, 9, None]
    assert "0 outermost loops in Triton's IR" in figures.words(unknown)
    assert figures.of_nvidia("linear_forward tf32 64x512 32x32x32 w4 s2", compiled, code) == {}
    amd = figures.of_amd(LABEL, {"barriers": 9, "instructions": 800})
    assert amd == {"figure": [9, 800, None]}
    assert figures.words(amd) == "a step: 9 barriers, 800 instructions, no floor"


def test_a_build_without_a_figure_fails(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    ((missing,), _) = figures.compare([result()], file)
    assert "no figure" in missing
    assert figures.COMMAND in missing
    figures.write([result()], file)
    assert figures.compare([result()], file)[0] == []
    assert len(figures.compare([result("sm_80")], file)[0]) == 1
    assert len(figures.compare([result(label=LABEL.replace("default", "adamw"))], file)[0]) == 1
    figures.write([result("sm_80")], file)
    assert figures.compare([result(), result("sm_80")], file)[0] == []
    assert figures.compare([{"target": "sm_90", "label": "linear_forward"}], file) == (
        [],
        "no training build: no figures",
    )


def test_figures_hold_for_one_version_of_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    figures.write([result()], file)
    monkeypatch.setattr(triton, "__version__", "9.9")
    bad, summary = figures.compare([result(figure=[99, 9999, 9999])], file)
    assert bad == []
    assert "this is 9.9: nothing is compared" in summary
    figures.write([result("sm_80")], file)
    assert {*json.loads(file.read_text())} == {"triton", "sm_80"}


REAL = """
import json
from bench import builds, cycles, figures, resources, sass

build = builds.training_build("sm_90", "tf32", (16, 16, 4), 16)
compiled = resources.compile_build(build, "sm_90")
reading = cycles.read(compiled, 16)
((numbers, code),) = resources.read_nvidia([compiled])
streamed = builds.training_build("sm_90", "ieee", (16, 64, 64, 64, 4), 300)
streamed = cycles.read(resources.compile_build(streamed, "sm_90"), 300)
print(json.dumps({
    "listing": resources.run_on(compiled.asm["cubin"], cycles.triton.knobs.nvidia.nvdisasm.path, "-gi", "-hex", "-c"),
    "ptx": compiled.asm["ptx"].count("bar.sync"),
    "code": reading.code,
    "loop": [reading.code[reading.loop.first].address, reading.code[reading.loop.last].address],
    "floor": reading.floor(),
    "chain": reading.chain(),
    "estimate": reading.estimate(),
    "fitted": reading.estimate({name: constant.best for name, constant in cycles.CONSTANTS.items()}),
    "warps": reading.warps,
    "numbers": numbers,
    "figure": figures.of_nvidia(build.label, compiled, code)["figure"],
    "report": list(cycles.report(reading, 1.0)),
    "barriers": cycles.barriers(compiled),
    "streamed": [streamed.loop.shape(), streamed.counted(lambda name: True)],
}))
"""


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """A small build, compiled for an H100 in a process that does not run Triton's interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", REAL], cwd=gpu.ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_both_readings_of_a_real_build_agree(real: dict[str, Any]) -> None:
    """Control bits from the bytes by address, and from the listing of the whole cubin."""
    halves = re.findall(
        r"/\*([0-9a-f]{4})\*/ +(?:@!?U?P\w+ +)?(\S+?)[ ;].*/\* 0x(\w{16}) \*/\n.*/\* 0x(\w{16}) \*/", real["listing"]
    )
    listed = {int(address, 16): (name, int(high, 16) >> 41) for address, name, _, high in halves}
    code = [Instruction(*one) for one in real["code"]]
    assert len(code) == len(listed) == real["numbers"]["instructions"] > 300
    for one in code:
        name, bits = listed[one.address]
        assert (name, bits & 15) == (one.name, one.stall)
        assert (bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63) == (one.written, one.read, one.waits)
    first, last = real["loop"]
    inside = [listed[address] for address in sorted(listed) if first <= address <= last]
    assert real["floor"][0] == sum(max(1, bits & 15) for _, bits in inside)
    assert real["floor"][1] == len(inside) * real["warps"] // 4
    barriers = sum(name.startswith("BAR") for name, _ in inside)
    assert real["figure"] == [barriers, len(inside), max(real["floor"])]


def test_a_real_build_is_plausible(real: dict[str, Any]) -> None:
    assert 5 <= real["figure"][0] <= real["numbers"]["barriers"] == real["ptx"] <= 40
    assert 300 < real["floor"][0] < real["chain"] < real["estimate"][0] < real["estimate"][1] < 20_000
    assert real["fitted"] == [real["estimate"][0]] * 2
    assert any(one[5] != sass.NO_SCOREBOARD for one in real["code"])
    assert all("predicted" in line for line in real["report"][1:])
    assert f"{real['chain']:,.0f} cycles, {real['chain'] / 1000:.2f} us at 1.0 GHz" in "\n".join(real["report"])


def test_barriers_have_their_lines(real: dict[str, Any]) -> None:
    """Those of device functions go back to the kernel through all who call."""
    places = [re.findall(r"(\S+) \((\S+):(\d+)\)", line) for line in real["barriers"]]
    assert len(places) == real["ptx"]
    calls = [[name for name, *_ in place] for place in places]
    assert all(names[-1] == "mlp_training_kernel" for names in calls)
    assert any("finish_forward" in names and "on_chip_steps" in names for names in calls)
    place = next(place for place in places if "finish_forward" in [name for name, *_ in place])
    caller = next(place[at + 1] for at in range(len(place)) if place[at][0] == "finish_forward")
    line = (gpu.ROOT / "kernels" / caller[1]).read_text().splitlines()[int(caller[2]) - 1]
    assert "finish_forward(" in line


def test_loops_of_a_real_build_run_as_often_as_the_batch_has_tiles(real: dict[str, Any]) -> None:
    shape, (length, run) = real["streamed"]
    assert shape.count("(") > 3
    assert run > 5 * length


@pytest.mark.parametrize("loop", [Loop(0, 3), Loop(0, 9, None, (Loop(2, 4, 3),))])
def test_a_warp_alone_takes_no_less_than_its_stall_counts(loop: Loop) -> None:
    code = listed()
    reading = cycles.Reading(code, loop, 8)
    assert reading.chain() >= reading.floor().stalls
