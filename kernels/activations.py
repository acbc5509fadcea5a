"""The activations of step.py on a tile: the value and the slope.

As PyTorch has them, also where the slope jumps and where numbers are NaN or infinite (where its own code paths differ,
as its scalar one). A tile has any shape, float32 or float64. Errors are held against PyTorch's in test_activations.py.

triton.language has no expm1 and no log1p, and on a GPU its float32 exp loses a digit at large arguments. So they are
made here of products and sums, alike in the interpreter and compiled:

    exp z = 2ⁿ (1 + expm1 r), z = n log 2 + r, |r| <= log 2 / 2: a Taylor polynomial (Cody and Waite, Software Manual
    for the Elementary Functions, 1980)
    log1p x = 2 atanh(x / (2 + x)): its series (Muller, Elementary Functions, 2016)
"""

import math

import triton
import triton.language as tl

from .step import ACTIVATIONS

BEFORE: tl.constexpr = tl.constexpr(tuple(name for name, kind in ACTIVATIONS.items() if kind.before))
"""The activations whose slope is read off the number before."""

LOG2_E: tl.constexpr = tl.constexpr(1.0 / math.log(2.0))
LOG_2: tl.constexpr = tl.constexpr(math.log(2.0))
LOG_2_HIGH: tl.constexpr = tl.constexpr(355.0 / 512.0)  # of so few bits that n times it is exact
LOG_2_LOW: tl.constexpr = tl.constexpr(-2.121944400546905827679e-4)  # the rest
ROOT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
DENSITY: tl.constexpr = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
ROOT_8_PI: tl.constexpr = tl.constexpr(math.sqrt(8.0 / math.pi))
CUBE: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def value(z, ACTIVATION: tl.constexpr):
    """The activation of the tile z."""
    if ACTIVATION.name == "relu":
        h = relu(z)
    elif ACTIVATION.name == "leaky_relu":
        h = leaky_relu(z, ACTIVATION.numbers[0])
    elif ACTIVATION.name == "elu":
        h = elu(z, ACTIVATION.numbers[0])
    elif ACTIVATION.name == "gelu":
        h = gelu(z)
    elif ACTIVATION.name == "gelu_tanh":
        h = gelu_tanh(z)
    elif ACTIVATION.name == "silu":
        h = silu(z)
    elif ACTIVATION.name == "tanh":
        h = tanh(z)
    elif ACTIVATION.name == "sigmoid":
        h = sigmoid(z)
    elif ACTIVATION.name == "softplus":
        h = softplus(z, ACTIVATION.numbers[0], ACTIVATION.numbers[1])
    else:
        tl.static_assert(ACTIVATION.name == "identity", "this activation has no device function")
        h = z
    return h


@triton.jit
def slope(a, ACTIVATION: tl.constexpr):
    """The slope at a, the number before if `reads_before`, else the value. For relu: where it is 0. For identity: a."""
    if ACTIVATION.name == "relu":
        s = a <= 0
    elif ACTIVATION.name == "leaky_relu":
        s = leaky_relu_slope(a, ACTIVATION.numbers[0])
    elif ACTIVATION.name == "elu":
        s = elu_slope(a, ACTIVATION.numbers[0])
    elif ACTIVATION.name == "gelu":
        s = gelu_slope(a)
    elif ACTIVATION.name == "gelu_tanh":
        s = gelu_tanh_slope(a)
    elif ACTIVATION.name == "silu":
        s = silu_slope(a)
    elif ACTIVATION.name == "tanh":
        s = tanh_slope(a)
    elif ACTIVATION.name == "sigmoid":
        s = sigmoid_slope(a)
    elif ACTIVATION.name == "softplus":
        s = softplus_slope(a, ACTIVATION.numbers[0], ACTIVATION.numbers[1])
    else:
        s = a
    return s


@triton.jit
def times_slope(dh, s, ACTIVATION: tl.constexpr):
    """dh times what `slope` returned; of relu 0 where the slope is, whatever dh is."""
    if ACTIVATION.name == "identity":
        dz = dh
    elif ACTIVATION.name == "relu":
        dz = tl.where(s, 0.0, dh)
    else:
        dz = dh * s
    return dz


@triton.constexpr_function
def reads_before(name, before):
    """Whether the slope is read off the number before. `before` is BEFORE: so Triton's key of a kernel contains it.

    Called with the name: of a NamedTuple Triton 3.6 makes a tuple without names.
    """
    return name in before


@triton.jit
def relu(z):
    """0 where z <= 0: NaN stays."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def leaky_relu(z, SLOPE: tl.constexpr):
    """z, times SLOPE where not z > 0."""
    return tl.where(z > 0, z, z * SLOPE)


@triton.jit
def leaky_relu_slope(z, SLOPE: tl.constexpr):
    """1, and SLOPE where not z > 0."""
    return tl.where(z > 0, tl.full(z.shape, 1.0, z.dtype), tl.full(z.shape, SLOPE, z.dtype))


@triton.jit
def elu(z, ALPHA: tl.constexpr):
    """z, and ALPHA (exp z - 1) where not z > 0."""
    return tl.where(z > 0, z, expm1(-tl.abs(z)) * ALPHA)


@triton.jit
def elu_slope(z, ALPHA: tl.constexpr):
    """1, and ALPHA exp z where z <= 0."""
    return tl.where(z <= 0, exp(-tl.abs(z)) * ALPHA, 1.0)


@triton.jit
def gelu(z):
    """z Φ(z), Φ the normal distribution."""
    return 0.5 * z * (1.0 + tl.erf(z * ROOT_HALF))


@triton.jit
def gelu_slope(z):
    """Φ(z) + z φ(z), φ the normal density."""
    return 0.5 * (1.0 + tl.erf(z * ROOT_HALF)) + z * (exp(-0.5 * z * z) * DENSITY)


@triton.jit
def gelu_tanh(z):
    """z (1 + tanh u) / 2 with u = √(2/π) (z + 0.044715 z³), as z sigmoid(2 u), in which nothing cancels."""
    return z * sigmoid((z + z * z * z * CUBE) * ROOT_8_PI)


@triton.jit
def gelu_tanh_slope(z):
    """s (1 + z (1 - s) 2 u') with s = sigmoid(2 u)."""
    square = z * z
    s, rest = sigmoid_and_rest((z + z * square * CUBE) * ROOT_8_PI)
    return s * (1.0 + z * rest * ((1.0 + square * (3.0 * CUBE)) * ROOT_8_PI))


@triton.jit
def silu(z):
    """z sigmoid(z)."""
    return z * sigmoid(z)


@triton.jit
def silu_slope(z):
    """s (1 + z (1 - s)) with s = sigmoid(z)."""
    s, rest = sigmoid_and_rest(z)
    return s * (1.0 + z * rest)


@triton.jit
def tanh(z):
    """1 - 2 e / (1 + e) with e = exp(-2 |z|), and the sign of z; near 0, where that cancels, a Taylor polynomial."""
    terms: tl.constexpr = 18 if z.dtype == tl.float64 else 9
    e = exp(-2.0 * tl.abs(z))
    large = 1.0 - 2.0 * e / (1.0 + e)
    square = z * z
    p = tl.zeros(z.shape, z.dtype)
    for k in tl.static_range(terms, 0, -1):
        p = p * square + tanh_coefficient(k)
    return tl.where(tl.abs(z) < 0.55, z + z * square * p, tl.where(z < 0, -large, large))


@triton.jit
def tanh_slope(h):
    """1 - h²."""
    return 1.0 - h * h


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), where z < 0 as exp z / (1 + exp z)."""
    e = exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_slope(h):
    """h (1 - h)."""
    return h * (1.0 - h)


@triton.jit
def sigmoid_and_rest(z):
    """s = sigmoid(z), and 1 - s without the difference."""
    e = exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z < 0, smaller, larger), tl.where(z < 0, larger, smaller)


@triton.jit
def softplus(z, BETA: tl.constexpr, THRESHOLD: tl.constexpr):
    """log(1 + exp(BETA z)) / BETA, and z where BETA z > THRESHOLD; infinite where exp(BETA z) is."""
    t = z * BETA
    e = exp(-tl.abs(t))
    sum_log = tl.where(t > 0, t, 0.0) + log1p(e)
    sum_log = tl.where((t > 0) & (1.0 / e == float("inf")), float("inf"), sum_log)
    return tl.where(t > THRESHOLD, z, sum_log / BETA)


@triton.jit
def softplus_slope(z, BETA: tl.constexpr, THRESHOLD: tl.constexpr):
    """e / (1 + e) with e = exp(BETA z), and 1 where BETA z > THRESHOLD."""
    t = z * BETA
    e = exp(-tl.abs(t))
    e = tl.where(t > 0, 1.0 / e, e)
    return tl.where(t > THRESHOLD, 1.0, e / (e + 1.0))


@triton.jit
def exp(z):
    """exp z for z up to where it is infinite, subnormal values too."""
    least: tl.constexpr = -746.0 if z.dtype == tl.float64 else -105.0  # where it is 0
    n, q = reduced_expm1(tl.where(z < least, least, z))
    half = tl.floor(0.5 * n)  # 2ⁿ may be too small for a normal number
    return (1.0 + q) * power_of_two(half) * power_of_two(n - half)


@triton.jit
def expm1(z):
    """exp z - 1 for z <= 0."""
    n, q = reduced_expm1(tl.where(z < -40.0, -40.0, z))  # at -40 it is -1
    power = power_of_two(n)
    return power * q + (power - 1.0)


@triton.jit
def reduced_expm1(z):
    """n, and expm1 of r = z - n log 2: r + r² (1/2! + r/3! + r²/4! + ...)."""
    terms: tl.constexpr = 13 if z.dtype == tl.float64 else 7
    n = tl.floor(z * LOG2_E + 0.5)
    r = (z - n * LOG_2_HIGH) - n * LOG_2_LOW
    p = tl.zeros(z.shape, z.dtype)
    for k in tl.static_range(terms, 1, -1):
        p = p * r + inverse_factorial(k)
    return n, r + r * r * p


@triton.jit
def power_of_two(n):
    """2ⁿ of whole numbers n for which it is normal, put together out of its bits."""
    if n.dtype == tl.float64:
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1: d (1 + (d/2)²/3 + ...) with d = 2 x / (2 + x); above √2 - 1 that of (1 + x) / 2."""
    terms: tl.constexpr = 10 if x.dtype == tl.float64 else 5
    is_large = x > 0.41421356
    x = tl.where(is_large, 0.5 * (x - 1.0), x)
    d = x / (1.0 + 0.5 * x)
    square = 0.25 * d * d
    p = tl.zeros(x.shape, x.dtype)
    for k in tl.static_range(terms, 0, -1):
        p = p * square + inverse_odd(k)
    logarithm = d + d * square * p
    return tl.where(is_large, logarithm + LOG_2, logarithm)


@triton.constexpr_function
def inverse_factorial(k):
    """1 / k!"""
    return 1.0 / math.factorial(k)


@triton.constexpr_function
def inverse_odd(k):
    """1 / (2 k + 1)"""
    return 1.0 / (2 * k + 1)


@triton.constexpr_function
def tanh_coefficient(k):
    """Of z^(2 k + 1) in the Taylor series of tanh, by tanh' = 1 - tanh²."""
    series = [1.0]
    for m in range(1, k + 1):
        series.append(-sum(series[i] * series[m - 1 - i] for i in range(m)) / (2 * m + 1))
    return series[k]
