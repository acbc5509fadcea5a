"""Device functions that the kernels share: which dtype sums run in, float64 arguments, bfloat16 in the interpreter.

The Triton interpreter keeps a bfloat16 tile as raw 16-bit integers: arithmetic on it is meaningless, a conversion
from float32 truncates, and one to float32 loses subnormals. So a kernel reads through :func:`load` and writes through
:func:`store`; compiled for a GPU both are the plain `tl` operation.
"""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether the kernels of this process run in the Triton interpreter (TRITON_INTERPRET=1 at import)."""


@triton.jit
def load(pointers, mask, other=0.0):
    """`tl.load` that hands out bfloat16 as float32 in the interpreter."""
    tile = tl.load(pointers, mask=mask, other=other)
    if INTERPRETED and tile.dtype == tl.bfloat16:
        bits = tile.to(tl.uint16, bitcast=True).to(tl.uint32) << 16  # its own conversion loses subnormals
        return bits.to(tl.float32, bitcast=True)
    return tile


@triton.jit
def store(pointers, tile, mask):
    """`tl.store` of a tile rounded once, to nearest even, to the dtype that `pointers` point to."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        bits = tile.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40  # rounding up a NaN could carry it into infinity or zero
        rounded = tl.where(tile == tile, rounded, quiet_nan)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, tile.to(dtype), mask=mask)


@triton.jit
def from_bits(bits):
    """The float64 with these bits: a Python float would arrive as float32, and as a constexpr compile anew."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.constexpr_function
def sum_dtype(dtype):
    """The dtype that sums over elements of `dtype` run in: float64 for float64, else float32."""
    return tl.float64 if dtype == tl.float64 else tl.float32
