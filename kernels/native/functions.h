// exp, expm1, log1p, tanh, sigmoid and the normal distribution of a vector of numbers, without branches: the C library's take
// one number at a time.
//
// V is a vector type of float or double. Each is right to about 1 or 2 units in the last place, also for numbers that
// are huge, denormal, infinite or NaN; tests/kernels/test_native.py holds what is made of them against 40 digits.
// Polynomials are minimax, by Lawson's reweighted least squares in 50 digits; a float gets the shorter one.

#pragma once

#include <limits>
#include <utility>

#include "products.h"

namespace fusednn {
namespace {

// The numbers of a vector, and whole numbers as many and as wide.
template <class V>
struct Lanes {
    typedef std::remove_reference_t<decltype(std::declval<V &>()[0])> Number;
    typedef std::conditional_t<sizeof(Number) == 4, uint32_t, uint64_t> Bit;
    typedef Bit Bits __attribute__((vector_size(sizeof(V))));
    static constexpr bool IS_FLOAT = sizeof(Number) == 4;
    static constexpr int FRACTION = IS_FLOAT ? 23 : 52, BIAS = IS_FLOAT ? 127 : 1023;
};
template <class V>
using Number = typename Lanes<V>::Number;
template <class V>
using Bits = typename Lanes<V>::Bits;

template <class V>
INLINE Bits<V> bits_of(V x) {
    return reinterpret_cast<Bits<V>>(x);
}
template <class V>
INLINE V number_of(Bits<V> bits) {
    return reinterpret_cast<V>(bits);
}

// c0 + x (c1 + x (c2 + ...))
template <class V>
INLINE V polynomial(V, double c) {
    return V{} + Number<V>(c);
}
template <class V, class... More>
INLINE V polynomial(V x, double c, More... more) {
    return Number<V>(c) + x * polynomial(x, more...);
}

template <class V>
INLINE V abs(V x) {
    return number_of<V>(bits_of(x) << 1 >> 1);
}
template <class V>
INLINE V with_sign_of(V sign, V x) {  // of an x that is not negative
    return number_of<V>(bits_of(x) | (bits_of(sign) ^ bits_of(abs(sign))));
}

// 2 ** k of whole numbers k plus the exponent's bias.
template <class V>
INLINE V power_of_two(Bits<V> biased) {
    return number_of<V>(biased << Lanes<V>::FRACTION);
}

// A number that is added to one of few bits leaves it rounded to a whole one in the last bits of the sum.
template <class T>
constexpr T ROUNDER = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);

// ln 2 as two numbers: the product of a whole number with the first, which has few bits, is exact. Cody and Waite, 1980.
template <class V>
constexpr Number<V> LN2_HIGH = Lanes<V>::IS_FLOAT ? 0.693359375 : 0.693145751953125;
template <class V>
constexpr Number<V> LN2_LOW = Lanes<V>::IS_FLOAT ? -2.12194440054690583e-4 : 1.42860682030941723e-6;

// x = k ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + tail.
template <class V>
struct Exponential {
    Bits<V> k;
    V tail;

    INLINE explicit Exponential(V x) {
        typedef Number<V> T;
        const V rounded = x * T(1.44269504088896341) + ROUNDER<T>, n = rounded - ROUNDER<T>;
        const V r = x - n * LN2_HIGH<V> - n * LN2_LOW<V>;
        k = bits_of(rounded) - bits_of(V{} + ROUNDER<T>);
        if constexpr (Lanes<V>::IS_FLOAT)
            tail = r + r * r * polynomial(r, 0.5000000102, 0.1666651627, 0.04166618462, 0.008369195445, 0.001395182777);
        else
            tail = r + r * r * polynomial(
                r, 0.500000000000001351, 0.166666666666666921, 0.0416666666665086018, 0.00833333333331113464,
                0.00138888889489062061, 0.000198412699096719976, 0.0000248014878831319138, 2.75572226515973137e-6,
                2.76320488170946485e-7, 2.51159856571943747e-8
            );
    }
};

template <class V>
INLINE V exp(V x) {
    typedef Number<V> T;
    constexpr T lowest = Lanes<V>::IS_FLOAT ? -104 : -746, highest = Lanes<V>::IS_FLOAT ? 89 : 710;  // 0 and infinity
    x = x < lowest ? V{} + lowest : x;  // NaN stays
    x = x > highest ? V{} + highest : x;
    const Exponential<V> e(x);
    const Bits<V> half = (e.k + 2048) >> 1;  // in two steps: 2 ** k may be no number, and a denormal is rounded once
    const V first = power_of_two<V>(half - (1024 - Lanes<V>::BIAS));
    return (1 + e.tail) * first * power_of_two<V>(e.k - half + (1024 + Lanes<V>::BIAS));
}

// e^x - 1 of an x that is not positive.
template <class V>
INLINE V expm1(V x) {
    typedef Number<V> T;
    constexpr T lowest = Lanes<V>::IS_FLOAT ? -30 : -60;  // -1
    const Exponential<V> e(x < lowest ? V{} + lowest : x);
    const V scale = power_of_two<V>(e.k + Lanes<V>::BIAS);
    return e.tail * scale + (scale - 1);
}

// log(1 + x) of an x that is not negative: of u = 1 + x = 2 ** k (1 + f) with f around 0, and of what the sum has lost.
// With s = f / (2 + f) it is log((1 + s) / (1 - s)) = 2 s + s s² P(s²).
template <class V>
INLINE V log1p(V x) {
    typedef Number<V> T;
    const V u = 1 + x;
    const V lost = (x - (u - 1)) / u;
    const Bits<V> k = (bits_of(u) - bits_of(V{} + T(0.70710678118654752))) >> Lanes<V>::FRACTION;
    const V f = number_of<V>(bits_of(u) - (k << Lanes<V>::FRACTION)) - 1;
    const V n = number_of<V>(bits_of(V{} + ROUNDER<T>) + k) - ROUNDER<T>;
    const V s = f / (2 + f), z = s * s;
    V p;
    if constexpr (Lanes<V>::IS_FLOAT)
        p = polynomial(z, 0.6666666563, 0.4000033954, 0.2853700962, 0.2358826745);
    else
        p = polynomial(
            z, 0.666666666666673708, 0.399999999993947716, 0.285714287472410084, 0.222221980347383807,
            0.181835942757180377, 0.153132368977085231, 0.148045402558093683
        );
    const V y = n * LN2_HIGH<V> + (f - (s * (f - z * p) - (n * LN2_LOW<V> + lost)));
    return x < std::numeric_limits<T>::infinity() ? y : x;
}

// Up to 0.55, where it is 1/2, as x + x³ P(x²); beyond as 1 - 2 E / (1 + E) of E = exp(-2 |x|), with the sign of x.
template <class V>
INLINE V tanh(V x) {
    const V z = x * x, e = exp(-2 * abs(x));
    V p;
    if constexpr (Lanes<V>::IS_FLOAT)
        p = polynomial(z, -0.3333331794, 0.1333259801, -0.05385344367, 0.02107592655, -0.006279704766);
    else
        p = polynomial(
            z, -0.333333333333332992, 0.133333333333267395, -0.0539682539638232634, 0.0218694883874788859,
            -0.00886323262544346406, 0.00359209224864230861, -0.00145554410568339958, 0.000588449112147720016,
            -0.000233392002524181548, 0.0000833296037167815577, -0.000019501753927607748
        );
    return abs(x) < Number<V>(0.55) ? x + x * (z * p) : with_sign_of(x, 1 - 2 * e / (1 + e));
}

// What the normal distribution has below z: up to 1 as 1/2 + z P(z²). Beyond, its tail is exp(-z² / 2) t Q(2 t - 1)
// with t = 1 / (1 + c |z|), as of Shepherd and Laframboise, 1981; and that exponential is wanted too.
template <class V>
struct Normal {
    V bell, below;

    INLINE explicit Normal(V z) {
        typedef Number<V> T;
        constexpr T c = Lanes<V>::IS_FLOAT ? T(0.3) : T(0.21);
        bell = exp(z * z * T(-0.5));
        const V t = 1 / (1 + c * abs(z)), u = 2 * t - 1;
        V p, q;
        if constexpr (Lanes<V>::IS_FLOAT) {
            p = polynomial(
                z * z, 0.3989422787, -0.06649033234, 0.009973170899, -0.001185984627, 0.000113143575, -7.530279975e-6
            );
            q = polynomial(
                u, 0.2219706131, 0.1645794855, 0.08654970973, 0.02776033572, 0.001816037313, -0.002423489379,
                -0.0005697157091, 0.0002806070327, 7.671633976e-5, -4.030132251e-5
            );
        } else {
            p = polynomial(
                z * z, 0.398942280401432677, -0.0664903800669053652, 0.00997355701003370079, -0.00118732821545496416,
                0.000115434687445469508, -9.44465556064105967e-6, 6.65967511467043592e-7, -4.12234907325644647e-8,
                2.26992424164782907e-9, -1.10425831074092268e-10, 4.03292666271949134e-12
            );
            q = polynomial(
                u, 0.160977015859008867, 0.137378626299397348, 0.0993766059098049204, 0.0599804159971961092,
                0.0292752549085284299, 0.0108063209802433983, 0.00248616784057262057, 1.46971217931110688e-6,
                -0.000238611754667900013, -0.0000648484665375897532, 0.000012748426201502165, 0.000010343452687598908,
                -1.73024782985285105e-7, -1.45535906353664498e-6, -8.31773467881426956e-8, 2.18732857026337365e-7,
                1.56096272568986163e-8, -3.59897546068431109e-8, -7.77301276162500337e-10, 5.86527584007421225e-9,
                -5.42856482464753236e-10, -6.67593163821514621e-10, 1.66324098405182578e-10
            );
        }
        const V tail = bell * (t * q);
        below = abs(z) < 1 ? T(0.5) + z * p : z < 0 ? tail : 1 - tail;
    }
};

template <class V>
INLINE V sigmoid(V x) {
    return 1 / (1 + exp(-x));
}

}  // namespace
}  // namespace fusednn
