"""bench.traffic against counts done by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime import interpreter

from bench import traffic
from bench.traffic import (
    Counts,
    Operators,
    Row,
    calibrations,
    count,
    cross_entropy_row,
    linear_rows,
    measure,
    profiled,
    training_rows,
)
from fusednn import functional
from fusednn.kernels import linear, mlp_training
from fusednn.kernels.cross_entropy import (
    cross_entropy_forward,
    is_long,
    long_cross_entropy_forward,
    long_cross_entropy_gradient,
)


@triton.jit
def strided_kernel(x_ptr, y_ptr, size, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < size)
    tl.store(y_ptr + offs, x, mask=offs < size)


@triton.jit
def atomic_kernel(x_ptr, count_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + offs, 1.0, mask=offs < 5)
    tl.atomic_cas(count_ptr, 0, 1)


@triton.jit
def scalar_kernel(x_ptr):
    """Adds 1 to the element of this program in a grid of three dimensions."""
    row = tl.program_id(0) * tl.num_programs(1) * tl.num_programs(2)
    x_ptr += row + tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def descriptor_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    y.store([0, 0], x.load([0, 0]))


@triton.jit
def failing_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr))
    tl.device_assert(False)
    tl.static_assert(False)


def aligned(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros whose first element begins a sector."""
    x = torch.zeros(size + 64, dtype=dtype)
    return x[-x.data_ptr() % 32 // x.itemsize :][:size]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_a_copy_counts_live_lanes_only(dtype: torch.dtype) -> None:
    x, y = aligned(1000, dtype), aligned(1000, dtype)
    with count() as counted:
        strided_kernel[(4,)](x, y, 1000, 1, BLOCK=256)
    size = 1000 * x.itemsize
    sectors = triton.cdiv(size, 32)
    assert counted.kernels == {"strided_kernel": Counts(size, size, sectors, sectors, launches=1, programs=4)}
    assert (counted.loaded, counted.stored) == (size, size)


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (1, 8), (2, 16), (8, 64), (100, 64)])
def test_strides_touch_more_sectors_for_the_same_bytes(stride: int, sectors: int) -> None:
    with count() as counted:
        strided_kernel[(1,)](aligned(6400), aligned(64), 64, stride, BLOCK=64)
    assert (counted.loaded, counted.sectors_loaded) == (256, sectors)
    assert (counted.stored, counted.sectors_stored) == (256, 8)


def test_an_atomic_is_a_load_and_a_store() -> None:
    x, done = aligned(8), torch.zeros(1, dtype=torch.int32)
    with count() as counted:
        atomic_kernel[(1,)](x, done, BLOCK=8)
    assert x.tolist() == [1.0] * 5 + [0.0] * 3
    assert (counted.loaded, counted.stored) == (5 * 4 + 4, 5 * 4 + 4)
    assert (counted.sectors_loaded, counted.sectors_stored) == (2, 2)


def test_descriptors_are_counted_within_their_shape() -> None:
    x, y = torch.randn(5, 12), torch.empty(5, 12)
    with count() as counted:
        descriptor_kernel[(1,)](x, y, 5, 12, BLOCK=16)
    assert torch.equal(x, y)
    assert (counted.loaded, counted.stored) == (240, 240)


@pytest.mark.parametrize("grid", [(6,), (2, 3), (2, 3, 4), (2, 0)])
def test_programs_are_counted_and_an_empty_grid_is_no_launch(grid: tuple[int, ...]) -> None:
    x = torch.zeros(24, dtype=torch.int32)
    with count() as counted:
        scalar_kernel[grid](x)
        scalar_kernel[lambda _: grid](x)
    programs = 1
    for size in grid:
        programs *= size
    assert counted.programs == 2 * programs
    assert counted.launches == (2 if programs else 0)
    assert counted.loaded == counted.stored == 2 * programs * 4
    assert x.sum() == 2 * programs


def test_contexts_nest_and_tell_kernels_apart() -> None:
    x = torch.zeros(64)
    with count() as outer:
        scalar_kernel[(3,)](x)
        with count() as inner:
            strided_kernel[(1,)](x, torch.empty(64), 64, 1, BLOCK=64)
        scalar_kernel[(2,)](x)
    assert set(inner.kernels) == {"strided_kernel"}
    assert inner.loaded == 256
    assert set(outer.kernels) == {"strided_kernel", "scalar_kernel"}
    assert outer.kernels["scalar_kernel"].programs == 5
    assert outer.loaded == 256 + 5 * 4


def patched() -> list[object]:
    memory = [getattr(interpreter._interpreter, name) for name in traffic.ACCESSES]
    return [*memory, interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.set_grid_dim]


def test_the_interpreter_is_restored_also_after_an_exception() -> None:
    before = patched()
    x = torch.zeros(64)
    with count() as counted:
        assert all(a is not b for a, b in zip(before, patched(), strict=True))
        scalar_kernel[(3,)](x)
    assert patched() == before
    scalar_kernel[(3,)](x)
    assert counted.programs == 3
    with pytest.raises(Exception, match="Assert"), count() as counted:
        failing_kernel[(1,)](x)
    assert (counted.loaded, counted.stored) == (4, 4)
    assert patched() == before


def test_refuses_to_count_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), count():
        pass


def test_calibration_on_a_copy_and_on_liger() -> None:
    pytest.importorskip("liger_kernel")
    passes = {row.name: f"{measure(row)['passes']:.2f}" for row in calibrations()}
    assert passes == {"copy": "2.00", "Liger cross_entropy, one": "3.00"}


@pytest.mark.parametrize(
    ("n", "v"),
    [(600, 2), (600, 10), (64, 256), (4, 4096), pytest.param(2, 32768, marks=pytest.mark.slow),
     pytest.param(2, 131072, marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize("sent", traffic.SENT)
def test_cross_entropy_keeps_its_passes(sent: str, n: int, v: int) -> None:
    """Whatever comes in from behind the loss."""
    row = cross_entropy_row("", functional.cross_entropy, n, v, sent)
    assert 0 < measure(row)["passes"] <= traffic.SENT[sent][v > 32768]


@pytest.mark.parametrize("v", [2, 3, 10, 100, 1000, 1024])
@pytest.mark.parametrize("kind", ["labels", "probabilities", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_classes_touch_their_sectors_once(dtype: torch.dtype, kind: str, v: int) -> None:
    """Bytes and sectors of the rows' kernel, beside what the tensors occupy: logits, target, gradient, and losses."""
    n = 8 * max(1, 2048 // v)
    shape = (2, v, n // 2) if kind == "blocks" else (n, v)
    x, losses = torch.randn(shape).to(dtype), shape[:1] + shape[2:]
    target = x.softmax(1) if kind == "probabilities" else torch.randint(v, losses)
    long = is_long(x, target, None, 0.0)
    assert long == (kind == "blocks" and v > 256)  # rows apart that do not fit a program with their neighbours
    with count() as counted:
        if long:
            loss, grad, _ = long_cross_entropy_forward(x, target, None, -100, "none", 0.0)
            long_cross_entropy_gradient(
                torch.ones(()), x, target, None, grad, None, -100, 0.0, torch.empty_like(x), None
            )
        else:
            loss, grad, *_ = cross_entropy_forward(x, target, None, -100, "none", 0.0, True)
    kernels = list(counted.kernels.values())
    assert len(kernels) == 1 + long
    occupied = x.nbytes + target.nbytes + grad.nbytes + loss.nbytes
    # once more the logits and their gradient; for each 32 classes of 16 rows, labels and what was summed of the rows
    occupied += (2 * x.nbytes + target.nbytes * v // 32 + grad.nbytes * v // 32) if long else 0
    assert sum(kernel.loaded + kernel.stored for kernel in kernels) <= 1.05 * occupied
    assert 32 * sum(kernel.sectors_loaded + kernel.sectors_stored for kernel in kernels) <= 1.05 * occupied


LAYERS = [(32, 64, 128, True, (1, 2)), (512, 16, 16, True, (1, 3)), (32, 128, 10, False, (1, 2))]
"""The layers of the report, but for the one with split rows, which is smaller here."""


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "x".join(map(str, layer[:3])))
def test_linear_keeps_its_launches(layer: tuple[int, int, int, bool, tuple[int, int]]) -> None:
    """And forward and backward counted apart are what both are together."""
    rows = list(linear_rows(*layer))
    apart = [measure(row) for row in rows]
    assert [row.broken(result) for row, result in zip(rows, apart, strict=True)] == [[]] * 4
    forward, backward = apart[2:]
    whole = measure(replace(rows[3], backward_alone=False))
    for name in ("loaded", "stored", "launches", "programs"):
        assert forward[name] + backward[name] == whole[name] > 0
    relu = layer[3]
    assert [result["operators"] for result in apart[:2]] == ([2, 4] if relu else [1, 3])  # addmm; mm, mm, sum


def test_bytes_of_a_linear_layer() -> None:
    """One program has it all, so each operand is loaded as often as a kernel needs it, and each result stored once."""
    m, k, n = 16, 16, 16
    forward, backward = (measure(row) for row in list(linear_rows(m, k, n, True, (1, 2)))[2:])
    assert (forward["loaded"], forward["stored"]) == (4 * (m * k + n * k + n), 4 * m * n)
    assert backward["loaded"] <= 4 * (4 * m * n + n * k + m * k)  # dy and y, twice; W; x
    assert backward["stored"] == 4 * (m * k + n * k + n)


@pytest.mark.parametrize(
    ("launcher", "line"),
    [
        ("linear_forward", "forward, 32x8 16x8 16: 2 launches, at most 1"),
        ("linear_input_grad", "backward, 32x8 16x8 16: 3 launches, at most 2"),
        ("linear_weight_grad", "backward, 32x8 16x8 16: 3 launches, at most 2"),
    ],
)
def test_a_planted_launch_is_noticed(
    launcher: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = getattr(linear, launcher)

    def twice(*arguments: Any) -> Any:
        once(*arguments)
        return once(*arguments)

    monkeypatch.setattr(traffic, "calibrations", lambda: iter(()))
    monkeypatch.setattr(traffic, "operations", lambda: linear_rows(32, 8, 16, True, (1, 2)))
    assert traffic.main([]) == 0
    monkeypatch.setattr(linear, launcher, twice)
    assert traffic.main([]) == 1
    broken = [said for said in capsys.readouterr().out.splitlines() if said.startswith("over its limit")]
    assert broken == [f"over its limit: fusednn linear_relu, {line}"]


def test_training_keeps_its_limits() -> None:
    """Two steps of 64-128-10. An order is one operator; the others are a step's."""
    rows = list(training_rows(steps=2))
    results = [measure(row) for row in rows]
    assert [row.broken(result) for row, result in zip(rows, results, strict=True)] == [[]] * 3
    assert [result["launches"] for result in results] == [0, 2 * 7, 1]
    # gather 2; linear, relu, linear; loss 2; its gradient 3; products 3, sums 2, mask 1; Adam and its count of steps
    assert results[0]["operators"] == 1 + 2 * 18
    assert results[1]["operators"] == 1 + 2 * 5  # gather, the gradient of one, Adam
    assert results[2]["operators"] is None


def test_bytes_of_a_training_step() -> None:
    """Everything is one tile, so each part of the step loads what it needs once, and stores each result once."""
    size, steps = 16, 3
    row = list(training_rows((size, size, size), size, steps))[2]
    tile, vector, numbers = 4 * size * size, 4 * size, 8 * size
    forward = numbers + tile + 2 * (tile + vector) + numbers  # rows of x by their numbers, both layers, labels
    output = 3 * tile + 3 * tile + 3 * vector  # W2, h, dy; then W2 and b1 with their states
    inputs = numbers + 2 * tile + 3 * tile + 3 * vector  # rows of x, dh; then W1 and b2 with their states
    scalars = 4 * 4 * 6  # of Adam, for each of four parameters
    result = measure(row)
    assert result["launches"] == result["programs"] == 1
    assert 0 < result["loaded"] <= steps * (forward + output + inputs + scalars)
    assert 0 < result["stored"] <= steps * (3 * tile + 4 + 3 * 2 * (tile + vector))  # h, dy, dh; the loss; the net
    assert result["stored"] >= steps * 3 * 2 * (tile + vector)


@pytest.mark.unpoisoned
def test_the_operators_of_train_steps_are_those_of_a_call() -> None:
    """And not of a step."""
    totals = []
    for steps in (2, 6):  # one is made without what many need
        row, mode = list(training_rows((16, 16, 16), 16, steps))[2], Operators()
        with count(), mode:
            row.run()
        totals.append(mode.total)
    assert totals[0] == totals[1] > 0


def test_a_planted_launch_of_training_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = mlp_training.train_mlp

    def twice(*arguments: Any, **options: Any) -> Any:
        once(*arguments, **options)
        return once(*arguments, **options)

    monkeypatch.setattr(traffic, "calibrations", lambda: iter(()))
    monkeypatch.setattr(traffic, "operations", lambda: training_rows(steps=2))
    assert traffic.main([]) == 0
    monkeypatch.setattr(mlp_training, "train_mlp", twice)
    assert traffic.main([]) == 1
    broken = [said for said in capsys.readouterr().out.splitlines() if said.startswith("over its limit")]
    assert len(broken) == 2
    assert broken[0].startswith("over its limit: fusednn train_steps, 64-128-10, 2 steps, 64x64 64: 2.")
    assert broken[0].endswith(" passes, at most 1.2")
    assert broken[1].endswith(": 2 launches, at most 1")


def pytorch_rows() -> dict[str, Row]:
    rows = [row for layer in LAYERS for row in linear_rows(*layer) if row.name.startswith("PyTorch")]
    rows += [cross_entropy_row("PyTorch cross_entropy", F.cross_entropy, 16, 10, sent) for sent in ("one", "a vector")]
    rows.append(next(training_rows((8, 8, 8), 4, 2)))
    return {f"{row.name}, {len(row.inputs[0])}": row for row in rows}


@pytest.mark.parametrize("name", pytorch_rows())
def test_the_profiler_and_a_dispatch_mode_count_the_same(name: str) -> None:
    run, mode = pytorch_rows()[name].ready(), Operators()
    with mode:
        run()
    assert len(profiled(pytorch_rows()[name].ready())) == mode.total > 0


@pytest.mark.unpoisoned
def test_the_profiler_names_what_computes() -> None:
    """Neither an allocation nor a view is named; what a sum or a cast does on a CPU is not looked into."""
    x = torch.randn(4, 6, requires_grad=True)
    assert profiled(lambda: torch.empty(4).unsqueeze(0).reshape(2, 2).detach()) == []
    assert profiled(lambda: F.linear(x, x).to(torch.float64).sum(0)) == ["aten::mm", "aten::_to_copy", "aten::sum"]
    y, ones = torch.relu(x.t() @ x), torch.ones(6, 6)
    backward = ["aten::add_", "aten::mm", "aten::mm", "aten::threshold_backward"]
    assert sorted(profiled(lambda: torch.autograd.grad(y, x, ones))) == backward


def test_operators_are_those_that_compute() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    with Operators() as operators:
        torch.empty(4).unsqueeze(0)  # an allocation and a view
    assert operators.total == 0
    with count(), Operators() as operators:
        y = torch.relu(x.t() @ x)  # mm, relu
        traffic.copy(y.detach())  # one launch, and what the interpreter does for it
    assert operators.total == 2
    with Operators() as operators:
        torch.autograd.grad(y, x, torch.ones(6, 6))  # ones, threshold_backward, mm twice, and their sum
    assert operators.total == 5


def test_report_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = next(calibrations())
    monkeypatch.setattr(traffic, "calibrations", lambda: iter((copy,)))
    monkeypatch.setattr(traffic, "operations", lambda: iter(()))
    assert traffic.main(["--json", str(tmp_path / "traffic.json")]) == 0
    results = json.loads((tmp_path / "traffic.json").read_text())
    assert results[0]["implementation"] == "copy"
    assert results[0]["kernels"]["copy_kernel"]["loaded"] == results[0]["loaded"] == 400_000


def test_report_fails_where_the_calibration_is_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = replace(next(calibrations()), expected=2.01)
    monkeypatch.setattr(traffic, "calibrations", lambda: iter((off,)))
    assert traffic.main([]) == 1
    assert "calibration failed: copy makes 2.01 passes, not 2.00" in capsys.readouterr().out
