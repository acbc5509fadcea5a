"""Products of tiles that are on chip, in the precision of the tiles: exact float32 too is made by tensor cores.

    x = x1 + x2, each of TF32's 11 bits;  a b = a1 b1 + (a1 b2 + a2 b1), summed in float32; a2 b2 is left out

On an H100 the errors of three such products were, with up to 784 terms, at most 10.7 u of the product of absolute
values; of cuBLAS' float32 16.9 u, and of a chain of float32 multiplications 36.6 u (bench/results). The method is that
of Markidis et al., 2018, with the rounding of Ootomo and Yokota, 2022.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(2.0**128 * (1 - 2.0**-12))
"""What is as large or larger rounds to infinity in TF32."""


@triton.jit
def fence(TILES: tl.constexpr):
    """What follows the definition of an operand of a product, before anything that has a barrier.

    A product of Hopper's or Blackwell's reads shared memory by another way than a thread writes it. The thread needs a
    fence after its store, which Triton makes where the tile is defined, and before the barrier behind which the product
    reads. Triton has a fence, but right before the product, and leaves out the barrier that should follow where there
    was another one since the store. `make resources` looks for what could be read too soon.
    """
    if TILES.fenced:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r,~{memory}", [], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def split(x):
    """x as the sum of two numbers of TF32, up to 2^-22 of it. What rounds to infinity, or is no number, stays whole."""
    is_split = tl.abs(x) < LARGEST
    first = ((x.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    return tl.where(is_split, first, x), tl.where(is_split, x - first, 0.0)


@triton.jit
def split_by_hardware(x):
    """The same in two instructions, where what rounds to infinity becomes that."""
    first = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return first, x - first


@triton.jit
def operand(x, TILES: tl.constexpr):
    """A tile as :func:`multiply` takes it: a tuple of its two parts, or of it alone."""
    parts = (x,)
    if TILES.precision == "tf32x3":
        parts = split_by_hardware(x) if TILES.fenced else split(x)
    fence(TILES)
    return parts


@triton.jit
def turned(x):
    """An operand transposed."""
    return (tl.trans(x[0]), tl.trans(x[1])) if len(x) == 2 else (tl.trans(x[0]),)


@triton.jit
def multiply(a, b, z, TILES: tl.constexpr):
    """z + a b of two operands."""
    if len(a) == 2:
        rest = tl.dot(a[1], b[0], input_precision="tf32")
        rest = tl.dot(a[0], b[1], rest, input_precision="tf32")
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # an infinite first part says it all
        z = tl.dot(a[0], b[0], z + rest, input_precision="tf32")
    else:
        z = tl.dot(a[0], b[0], z, input_precision=TILES.precision, out_dtype=z.dtype)
    return z


@triton.jit
def product(w, a, z, AS_ROWS: tl.constexpr, TILES: tl.constexpr):
    """z + w a, or as rows of the batch: the same tile, in another layout (see TILES.as_rows)."""
    return tl.trans(multiply(turned(a), turned(w), tl.trans(z), TILES)) if AS_ROWS else multiply(w, a, z, TILES)
