"""The launchers of kernels/linear.py against float64 products."""

import itertools

import pytest
import torch
from torch import Tensor

from fusednn.kernels import linear as kernels
from tests.accuracy import DTYPES, assert_product, bits

SHAPES = [(1, 1, 1), (3, 17, 33), (17, 3, 130), (33, 65, 17), (65, 130, 3), (130, 10, 65), (32, 128, 64)]


def operands(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((m, k), (n, k), (n,), (m, n))
    x, w, b, dy = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return x, w, b, dy


def check_all(x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, relu: bool) -> None:
    """Forward and every gradient within the accuracy rule, and the operands untouched."""
    before = [bits(tensor).clone() for tensor in (x, w, dy)]
    y = kernels.linear_forward(x, w, b, relu)
    saved = y if relu else None
    dx = kernels.linear_input_grad(dy, saved, w)
    dw, db = kernels.linear_weight_grad(dy, saved, x, True, True)
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip((x, w, dy), before, strict=True))
    for result, like in ((y, dy), (dx, x), (dw, w)):
        assert result.shape == like.shape
        assert result.dtype == x.dtype
        assert result.is_contiguous()

    x, w, dy = x.double(), w.double(), dy.double()
    exact, magnitude = x @ w.T, x.abs() @ w.abs().T
    if b is not None:
        exact, magnitude = exact + b.double(), magnitude + b.double().abs()
    assert_product(y, exact.clamp(min=0) if relu else exact, magnitude)
    g = torch.where(y <= 0, 0, dy) if relu else dy
    assert_product(dx, g @ w, g.abs() @ w.abs())
    assert_product(dw, g.T @ x, g.abs().T @ x.abs())
    assert_product(db, g.sum(0), g.abs().sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("relu", "bias"), [(True, True), (False, False)], ids=["relu-bias", "plain"])
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, relu: bool, bias: bool, device: str) -> None:
    x, w, b, dy = operands(*shape, dtype, device)
    check_all(x, w, b if bias else None, dy, relu)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 34, 35), (65, 17, 40)], ids=str)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "plain"])
def test_many_programs_and_trips(shape: tuple[int, int, int], dtype: torch.dtype, relu: bool, device: str) -> None:
    m, n, k = shape
    assert kernels.plan_forward(m, n, dtype, "ieee", True, relu).grid[0] >= 4
    assert kernels.plan_weight_grad(m, n, k, dtype, "ieee", relu, True)[2] >= 2  # splits
    x, w, b, dy = operands(m, n, k, dtype, device)
    check_all(x, w, b, dy, relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype: torch.dtype, device: str) -> None:
    """Products of integers in -8..8 are exact in every accumulator, so the result is the float64 one rounded once."""
    x, w, b, dy = (torch.randint(-8, 9, s, device=device).to(dtype) for s in ((33, 65), (17, 65), (17,), (33, 17)))
    y = kernels.linear_forward(x, w, b, True)
    exact = (x.double() @ w.double().T + b.double()).clamp(min=0)
    assert torch.equal(y, exact.to(dtype))
    g = torch.where(y <= 0, 0, dy.double())
    dw, db = kernels.linear_weight_grad(dy, y, x, True, True)
    assert torch.equal(kernels.linear_input_grad(dy, y, w), (g @ w.double()).to(dtype))
    assert torch.equal(dw, (g.T @ x.double()).to(dtype))
    assert torch.equal(db, g.sum(0).to(dtype))


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values behind other strides; `expanded` has the first row's values in every row."""
    rows, columns = tensor.shape
    wide = tensor.new_full((2 * rows + 1, 3 * columns + 1), float("nan"))
    wide[1::2, 1::3] = tensor
    return {
        "transposed": tensor.T.contiguous().T,
        "sliced": wide[1::2, 1::3],
        "expanded": tensor[:1].expand(rows, columns),
    }


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("operand", ["x", "w", "b", "dy"])
def test_strides(operand: str, layout: str, device: str) -> None:
    """Any strides give the bits that a contiguous copy gives."""
    tensors = dict(zip(("x", "w", "b", "dy"), operands(33, 18, 35, torch.float32, device), strict=True))
    tensors[operand] = (
        layouts(tensors[operand][:, None])[layout][:, 0] if operand == "b" else layouts(tensors[operand])[layout]
    )
    assert not tensors[operand].is_contiguous() or (operand, layout) == ("b", "transposed")

    def run(x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
        y = kernels.linear_forward(x, w, b, True)
        return [y, kernels.linear_input_grad(dy, y, w), *kernels.linear_weight_grad(dy, y, x, True, True)]

    results = run(**tensors)
    expected = run(**{name: tensor.contiguous() for name, tensor in tensors.items()})
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(bits(result), bits(right))


def test_scalar_gradient(device: str) -> None:
    """`.sum().backward()` sends one element with strides (0, 0)."""
    x, w, b, _ = operands(33, 18, 35, torch.float32, device)
    check_all(x, w, b, torch.ones((), device=device).expand(33, 18), True)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)], ids=str)
def test_no_elements(shape: tuple[int, int, int], device: str) -> None:
    x, w, b, dy = operands(*shape, torch.float32, device)
    y = kernels.linear_forward(x, w, b, True)
    assert torch.equal(y, torch.relu(x @ w.T + b))
    g = torch.where(y <= 0, 0, dy)
    dw, db = kernels.linear_weight_grad(dy, y, x, True, True)
    torch.testing.assert_close(kernels.linear_input_grad(dy, y, w), g @ w)
    torch.testing.assert_close(dw, g.T @ x)
    torch.testing.assert_close(db, g.sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype, device: str) -> None:
    """They go where PyTorch sends them: relu keeps NaN, and its gradient passes there and is zero at zero."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0], [0.0], [-1.0], [inf], [-inf], [nan]], dtype=dtype, device=device)
    w = torch.tensor([[1.0], [-1.0]], dtype=dtype, device=device)
    dy = torch.tensor([[3.0, 5.0]], dtype=dtype, device=device).repeat(6, 1)
    y = kernels.linear_forward(x, w, None, True)
    leaf = (x.double() @ w.double().T).requires_grad_()
    torch.relu(leaf).backward(dy.double())
    assert torch.equal(y.double().nan_to_num(99.0), torch.relu(leaf).detach().nan_to_num(99.0))
    dx = kernels.linear_input_grad(dy, y, w)
    assert torch.equal(dx.double(), leaf.grad @ w.double())
    for bad in (inf, nan):  # behind the mask they are gone, as torch.relu's backward has it
        dy[2, 0] = bad
        assert kernels.linear_input_grad(dy, y, w)[2].isfinite().all()


@pytest.mark.parametrize(("needs_dw", "needs_db"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("rows", [20, 300])
def test_only_what_is_needed(rows: int, needs_dw: bool, needs_db: bool, device: str) -> None:
    x, _, _, dy = operands(rows, 18, 35, torch.float32, device)
    full = kernels.linear_weight_grad(dy, None, x, True, True)
    part = kernels.linear_weight_grad(dy, None, x, needs_dw, needs_db)
    for result, whole, needed in zip(part, full, (needs_dw, needs_db), strict=True):
        torch.testing.assert_close(result, whole if needed else whole.new_empty(0))


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_twice(device: str) -> None:
    x, w, b, dy = operands(70, 33, 35, torch.float32, device)

    def run() -> list[Tensor]:
        y = kernels.linear_forward(x, w, b, True)
        return [y, kernels.linear_input_grad(dy, y, w), *kernels.linear_weight_grad(dy, y, x, True, True)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(bits(first), bits(second))


@pytest.mark.usefixtures("small_tiles")
def test_a_row_does_not_depend_on_the_batch(device: str) -> None:
    x, w, b, _ = operands(70, 33, 35, torch.float32, device)
    whole = kernels.linear_forward(x, w, b, True)
    row = 40 if device == "cuda" else 32  # numpy, in the interpreter, depends on the place of a row in its tile
    assert torch.equal(bits(kernels.linear_forward(x[row : row + 1], w, b, True)), bits(whole[row : row + 1]))


@pytest.mark.unpoisoned  # poisoning would touch all of the memory that this test only reserves
def test_offsets_past_32_bits() -> None:
    """Rows so far apart that only the last lies past 2^31 elements, in memory that is reserved and not touched."""
    apart = 2**30 + 64

    def far(columns: int) -> tuple[Tensor, Tensor]:
        near = torch.randn(3, columns).half()
        memory = torch.empty(2 * apart + 64, dtype=torch.float16)
        return near, memory.as_strided((3, columns), (apart, 1)).copy_(near)

    (x, far_x), (w, far_w), (dy, far_dy) = far(8), far(8), far(3)
    assert torch.equal(kernels.linear_forward(far_x, far_w, None, False), kernels.linear_forward(x, w, None, False))
    assert torch.equal(kernels.linear_input_grad(far_dy, None, far_w), kernels.linear_input_grad(dy, None, w))
    results = kernels.linear_weight_grad(far_dy, None, far_x, True, True)
    for result, right in zip(results, kernels.linear_weight_grad(dy, None, x, True, True), strict=True):
        assert torch.equal(result, right)


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("small_tiles")
def test_a_step_past_32_bits() -> None:
    """A trip through a loop can pass 2^31 elements: columns 2^27 apart, 16 a trip."""
    x, w = torch.randn(3, 18).half(), torch.randn(2, 18).half()
    far = torch.empty(18 * 2**27 + 64, dtype=torch.float16).as_strided((3, 18), (1, 2**27)).copy_(x)
    assert torch.equal(kernels.linear_forward(far, w, None, False), kernels.linear_forward(x, w, None, False))
    rows = torch.empty(18 * 2**27 + 64, dtype=torch.float16).as_strided((18, 3), (2**27, 1)).copy_(x.T)
    dy = torch.randn(18, 2).half()
    assert torch.equal(
        kernels.linear_weight_grad(dy, None, rows, True, False)[0],
        kernels.linear_weight_grad(dy, None, x.T.contiguous(), True, False)[0],
    )


def test_tables_are_complete() -> None:
    """Every dtype and size has a configuration, and its blocks are ones that tl.dot takes on every architecture."""
    for dtype, rows, columns in itertools.product(DTYPES, (1, 16, 17, 64, 65, 512, 10**6), (1, 16, 17, 512, 10**6)):
        for precision in ("ieee", "tf32"):
            config = kernels.choose(rows, columns, dtype, precision)
            assert min(config.block_m, config.block_n, config.block_k) >= 16


@pytest.mark.gpu
def test_tf32_where_pytorch_allows_it() -> None:
    """float32 products are exact until PyTorch's own setting allows TF32; then they are not."""
    x, w = torch.randn(128, 512, device="cuda"), torch.randn(128, 512, device="cuda")
    exact = kernels.linear_forward(x, w, None, False)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = kernels.linear_forward(x, w, None, False)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert_product(exact, x.double() @ w.double().T, x.double().abs() @ w.double().abs().T)
    with pytest.raises(AssertionError):
        assert_product(rounded, x.double() @ w.double().T, x.double().abs() @ w.double().abs().T)
