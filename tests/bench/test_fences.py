"""The gate for products that may read shared memory too early: on PTX by hand, and on what Triton makes of toys."""

import json
import os
import re
import subprocess
import sys

import pytest

from bench import fences, gpu
from bench.ptx import Registers, UnknownError, statements

HEAD = """
.visible .entry kernel(.param .u32 kernel_param_0)
.reqntid 128
{
    .reg .b32 %r<99>;
    ld.param.b32 %r9, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 64;
    setp.lt.u32 %p2, %r9, 64;
    shl.b32 %r2, %r1, 4;
    mov.b32 %r3, global_smem;
    add.s32 %r4, %r3, %r2;  // 16 bytes of each thread: bytes 0 to 2047
    add.s32 %r5, %r4, %r9;
    bfe.u32 %r6, %r3, 4, 14;
    cvt.u64.u32 %rd1, %r6;
    or.b64 %rd2, %rd1, 4611686293305294848;  // begins at 0
    add.s64 %rd3, %rd1, 4611686293305294976;  // at 2048
    add.s64 %rd4, %rd1, 4611686293305294912;  // at 1024
    cvt.u64.u32 %rd5, %r9;
    mov.b32 %r10, 1;
"""

PARTS = {
    "s": "st.shared.v4.b32 [ %r4 + 0 ], { %r1, %r1, %r1, %r1 };",
    "e": "st.shared.v4.b32 [ %r4 + 2048 ], { %r1, %r1, %r1, %r1 };",
    "u": "st.shared.b32 [ %r5 + 0 ], %r1;",
    "p": "@%p1 st.shared.v4.b32 [ %r4 + 0 ], { %r1, %r1, %r1, %r1 };",
    "n": "@!%p1 st.shared.v4.b32 [%r4+0], { %r1, %r1, %r1, %r1 };",
    "q": "@%p2 st.shared.b32 [ %r4 + 0 ], %r1;",
    "m": "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r4+768], {%r1, %r2};",  # lane 16, which does not count, at 1024
    "M": "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4+768], {%r1, %r2, %r1, %r2};",
    "F": "fence.proxy.async.shared::cta;",
    "f": "@%p1 fence.proxy.async.shared::cta;",
    "B": "bar.sync 	0;",
    "b": "bar.sync 1, 64;",
    "W": "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r50,%r51,%r52,%r53}, %rd2, %rd3, 0, 1, 1;",
    "R": "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r50,%r51,%r52,%r53}, {%r1,%r1,%r1,%r1}, %rd4, 0, 1, 1;",
    "X": "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r50,%r51,%r52,%r53}, %rd5, %rd5, 0, 1, 1;",
    "T": "@%p1 tcgen05.mma.cta_group::1.kind::tf32 [ %r50 + 0 ], %rd3, %rd2, %r9, %p1;",
    "A": "@%p1 tcgen05.mma.cta_group::1.kind::tf32 [ %r50 + 0 ], [ %r51 + 0 ], %rd3, %r9, %p1;",
    "D": "shl.b32 %r15, %r11, 7;\ncvt.u64.u32 %rd6, %r15;\nwgmma.mma_async.sync.aligned.m64n8k8 {%r50}, %rd6, %rd6;",
    "c": "cp.async.cg.shared.global [ %r4 + 0 ], [ %rd5 + 0 ], 0x10, %r9;\ncp.async.commit_group;",
    "w": "cp.async.wait_group 0;",
    "(": "$L__BB0_1:",
    ")": "@%p2 bra $L__BB0_1;",
    "[": "@%p2 bra $L__BB0_2;",
    "]": "$L__BB0_2:",
    "i": "{\nwait:\nmbarrier.try_wait.shared::cta.b64 done, [%r3], %r1;\n@!done bra.uni wait;\n}",
    "j": "bra.uni $L__BB0_2;",
    "0": "mov.b32 %r10, 0;\nmov.b32 %r11, %r10;",
    "+": "add.s32 %r12, %r11, 1;\nsetp.gt.s32 %p3, %r12, 1;\nselp.b32 %r11, 0, %r12, %p3;",
    "*": "add.s32 %r11, %r11, 1;",
    "t": "shl.b32 %r13, %r11, 12;\nadd.s32 %r14, %r4, %r13;\nst.shared.v4.b32 [ %r14 + 2048 ], { %r1, %r1, %r1, %r1 };",
}


def program(order: str) -> str:
    """PTX of a kernel with these parts; each is in line 10 and on of a file, and called from line 99."""
    parts = [f".loc 1 {n} 0 // toy.py:{n}:0 @[ toy.py:99:0 ]\n{PARTS[one]}" for n, one in enumerate(order, 10)]
    return HEAD + "\n".join(parts) + "\nret;\n}\n.section .debug_abbrev\n"


@pytest.mark.parametrize(
    "order",
    [
        "W", "sFBW", "sFBWW", "seFBW", "sBFBW", "sFFBW", "pFBR", "iiW",
        "eFBWsFB", "(sFBW)", "(FBWs)", "sFB(W)", "uFBX", "s[jFB]BF(BW)", "s[F]FBW",
        "pR", "mR", "T", "eR", "bW", "cwBW", "cW", "(cwBW)", "cwFBW", "0(+tR)", "siFBiW",
    ],
)  # fmt: skip
def test_right_code(order: str) -> None:
    """Fence and barrier behind each store, or the store goes elsewhere."""
    assert fences.races(program(order)) == []


@pytest.mark.parametrize(
    ("order", "lacks", "at"),
    [
        # what is missing, and the lines of product and store
        ("sW", "no fence behind it", (11, 10)), ("sFW", "no barrier behind its fence", (12, 10)),
        ("sBW", "no fence behind it", (12, 10)), ("sBFW", "no barrier behind its fence", (13, 10)),
        ("eBFW", "no barrier behind its fence", (13, 10)), ("FBsW", "no fence behind it", (13, 12)),
        ("sFBsW", "no fence behind it", (14, 13)), ("sfBW", "no fence behind it", (13, 10)),
        ("sFbW", "no barrier behind its fence", (13, 10)), ("sBFR", "no barrier behind its fence", (13, 10)),
        ("nBFR", "no barrier behind its fence", (13, 10)), ("MR", "no fence behind it", (11, 10)),
        ("qFW", "no barrier behind its fence", (12, 10)),
        ("(BFWs)", "no barrier behind its fence", (13, 14)), ("FB(Ws)", "no fence behind it", (13, 14)),
        ("sB[F]BW", "no fence behind it", (16, 10)), ("s[FBj]W", "no fence behind it", (16, 10)),
        ("sBiFW", "no barrier behind its fence", (14, 10)), ("sBFT", "no barrier behind its fence", (13, 10)),
        ("eBFA", "no barrier behind its fence", (13, 10)), ("cwW", "no barrier behind its wait", (12, 10)),
        ("0(+eD)", "no fence behind it", (14, 13)), ("0(+sD)", "no fence behind it", (14, 13)),
        ("cBwFW", "no barrier behind its wait", (14, 10)), ("(WcBw)", "no barrier behind its wait", (11, 12)),
    ],
)  # fmt: skip
def test_wrong_code(order: str, lacks: str, at: tuple[int, int]) -> None:
    (race,) = fences.races(program(order))
    assert f" reads what was written with {lacks}" in race
    assert tuple(map(int, re.findall(r" at toy\.py:(\d+)", race))) == at
    assert " < toy.py:99 reads " in race


@pytest.mark.parametrize("order", ["uBFW", "uBFR", "sBFX", "(Xs)", "0(*tW)"])
def test_what_is_not_known_may_be_the_operand(order: str) -> None:
    (race,) = fences.races(program(order))
    assert " may read what was written with no" in race


def test_registers_of_a_loop() -> None:
    """A store to either of two stages, 2048 and 6144 bytes behind: the second operand of W begins at the first."""
    assert " reads what was written with no fence" in "".join(fences.races(program("0(+tW)")))
    registers = Registers([*statements(program("0(+t)"))], 128)
    assert sorted(state["%r11"][0] for state in registers.states("%r14")) == [0, 1]


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("add.s32 %r9, %r1, -1", lambda t: (t - 1) & 0xFFFFFFFF),
        ("sub.s64 %r9, 1, %r1", lambda t: (1 - t) % 2**64),
        ("mul.lo.s32 %r9, %r1, 3", lambda t: 3 * t),
        ("mul.wide.u32 %r9, %r1, 1073741824", lambda t: t << 30),
        ("mad.wide.u32 %r9, %r1, 2, 4294967296", lambda t: 2 * t + 2**32),
        ("mad.lo.s32 %r9, %r1, 2, 5", lambda t: 2 * t + 5),
        ("shl.b32 %r9, %r1, 28", lambda t: (t << 28) & 0xFFFFFFFF),
        ("shl.b32 %r8, %r1, 25; shr.s32 %r9, %r8, 30", lambda t: [0, 1, -2, -1][t >> 5] & 0xFFFFFFFF),
        ("shl.b32 %r8, %r1, 25; shr.u32 %r9, %r8, 30", lambda t: t >> 5),
        ("bfe.u32 %r9, %r1, 2, 3", lambda t: t >> 2 & 7),
        ("bfe.s32 %r9, %r1, 2, 1", lambda t: 0xFFFFFFFF * (t >> 2 & 1)),
        ("bfi.b32 %r9, %r1, 255, 4, 2", lambda t: 0xCF | (t & 3) << 4),
        ("xor.b32 %r8, %r1, 5; and.b32 %r9, %r8, 126", lambda t: (t ^ 5) & 126),
        ("not.b32 %r8, %r1; or.b32 %r9, %r8, 1", lambda t: ~t & 0xFFFFFFFF | 1),
        ("lop3.b32 %r9, %r1, 12, 10, 0x96", lambda t: t ^ 12 ^ 10),
        ("lop3.b32 %r9, %r1, 12, 10, 0xEA", lambda t: t & 12 | 10),
        ("prmt.b32 %r9, %r1, 255, 0x4080", lambda t: t | t << 16 | 255 << 24),
        ("setp.lt.s32 %p1, %r1, 7; selp.b32 %r9, 1, %r1, %p1", lambda t: 1 if t < 7 else t),
        ("setp.lt.u32 %p1, %r1, -1; not.pred %p2, %p1; selp.b32 %r9, 1, 2, %p2", lambda t: 2),
        ("min.s32 %r8, %r1, 9; max.s32 %r9, %r8, 3", lambda t: max(min(t, 9), 3)),
        ("cvt.s64.s32 %r9, -1", lambda t: 2**64 - 1),
        ("cvt.u64.u32 %r9, -1", lambda t: 2**32 - 1),
        ("cvt.u16.u32 %r9, 65537", lambda t: 1),
        ("shfl.sync.idx.b32 %r9, %r1, 3, 31, -1", lambda t: t // 32 * 32 + 3),
        ("shfl.sync.idx.b32 %r9|%p1, %r1, 0, 31, -1", lambda t: t // 32 * 32),
    ],
)
def test_instructions(code: str, value: object) -> None:
    registers = Registers([*statements(f"mov.u32 %r1, %tid.x;\n{code};")], 128)
    assert callable(value)
    assert registers.value("[ %r9 + 16 ]", {}) == [value(thread) + 16 for thread in range(128)]


@pytest.mark.parametrize(
    "code",
    [
        "mul.hi.u32 %r9, %r1, 3", "cvt.rzi.s32.f32 %r9, 0f00000000", "ld.shared.b32 %r9, [%r1]", "popc.b32 %r9, %r1",
        "mov.b32 {%r8, %r9}, 3", "@%p1 mov.b32 %r9, 3", "elect.sync %r8|%r9, -1", "prmt.b32.f4e %r9, %r1, 1, 2",
        "setp.lt.and.s32 %r9, %r1, 3, %p1", "mov.b32 %r7, 0", "mov.b64 %r9, {%r1, %r1}", "mov.u32 %r9, %ctaid.x",
    ],
)  # fmt: skip
def test_what_is_not_followed(code: str) -> None:
    registers = Registers([*statements(f"mov.u32 %r1, %tid.x;\n{code};")], 32)
    with pytest.raises(UnknownError):
        registers.value("%r9", {})


TOYS = """
import json
import sys

import triton
import triton.language as tl
from bench.resources import compile_build
from types import SimpleNamespace


@triton.jit
def plain(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x, input_precision="tf32"))


@triton.jit
def barrier(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.debug_barrier()
    tl.store(y_ptr + offs, tl.dot(x, x, input_precision="tf32"))


@triton.jit
def summed(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    total = tl.sum(x, axis=0)
    y = tl.dot(x, x, input_precision="tf32")
    tl.store(y_ptr + offs, y / total[None, :])


@triton.jit
def chained(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    y = tl.dot(x, x, input_precision="tf32")
    y = tl.dot(y / tl.sum(y, axis=0)[None, :], x, input_precision="tf32")
    tl.store(y_ptr + offs, y)


found = {}
for kernel, target, warps in (
    (plain, "sm_90", 4), (barrier, "sm_90", 8), (summed, "sm_90", 4), (summed, "sm_90", 8), (chained, "sm_90", 8),
    (plain, "sm_100", 4), (barrier, "sm_100", 4), (summed, "sm_80", 4),
):
    build = SimpleNamespace(kernel=kernel, signature={"x_ptr": "*fp32", "y_ptr": "*fp32"}, constexprs={"BLOCK": 64},
                            divisible=("x_ptr", "y_ptr"), options={"num_warps": warps, "num_stages": 2})
    found[f"{kernel.__name__} {target} {warps}"] = compile_build(build, target).asm["ptx"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The PTX of each toy, compiled in a process that does not run Triton's interpreter."""
    file = tmp_path_factory.mktemp("toys") / "toys.py"
    file.write_text(TOYS)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(gpu.ROOT), "TRITON_CACHE_DIR": str(file.parent / "cache")}
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["plain sm_90 4", "chained sm_90 8", "plain sm_100 4", "summed sm_80 4"])
def test_right_kernels(name: str, compiled: dict[str, str]) -> None:
    assert fences.races(compiled[name]) == []


@pytest.mark.parametrize("name", ["barrier sm_90 8", "summed sm_90 4", "summed sm_90 8", "barrier sm_100 4"])
def test_kernels_that_triton_makes_wrong(name: str, compiled: dict[str, str]) -> None:
    """A barrier of something else between the loaded tile, which is stored at once, and the product."""
    (race,) = fences.races(compiled[name])
    source = TOYS.splitlines()
    product, *stores = (source[int(line) - 1] for line in re.findall(r" at toys\.py:(\d+)", race))
    assert "no barrier behind its fence" in race
    assert "may read" not in race
    assert "tl.dot(x, x" in product
    assert {line.strip() for line in stores} == {"x = tl.load(x_ptr + offs)"}


def test_right_kernels_broken_by_hand(compiled: dict[str, str]) -> None:
    ptx = compiled["plain sm_90 4"]
    fence, barrier = "fence.proxy.async.shared::cta;", "bar.sync"
    assert re.search(rf"{fence}\s*{barrier}", re.sub(r"(//.*|\$L\w+:.*|\.loc.*)", "", ptx))
    assert "no fence behind it" in "".join(fences.races(ptx.replace(fence, "")))
    swapped = ptx.replace(fence, "").replace("wgmma.fence.sync.aligned;", f"{fence}\nwgmma.fence.sync.aligned;")
    assert "no barrier behind its fence" in "".join(fences.races(swapped))
    before, _, after = ptx.partition(fence)
    assert "no barrier behind its fence" in "".join(fences.races(before + fence + after.replace(barrier, "//", 1)))
