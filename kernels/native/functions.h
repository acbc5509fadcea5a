// exp, expm1, log1p, erf and tanh of a vector of numbers, without branches: the C library's take one at a time.
//
// V is a vector type of float or double. Each is right to about 1 or 2 units in the last place, also for numbers that are
// huge, denormal, infinite or NaN; tests/kernels/test_native.py holds what is made of them against float64. Polynomials
// are minimax, by Lawson's reweighted least squares in 50 digits; a float gets the shorter one.

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

// x = k ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + tail. Cody and Waite, 1980: ln 2 is two numbers, and the product of k
// with the first, which has few bits, is exact.
template <class V>
struct Exponential {
    Bits<V> k;
    V tail;

    INLINE explicit Exponential(V x) {
        typedef Number<V> T;
        constexpr T high = Lanes<V>::IS_FLOAT ? T(0.693359375) : T(0.693145751953125);
        constexpr T low = Lanes<V>::IS_FLOAT ? T(-2.12194440054690583e-4) : T(1.42860682030941723e-6);
        const V rounded = x * T(1.44269504088896341) + ROUNDER<T>, n = rounded - ROUNDER<T>;
        const V r = x - n * high - n * low;
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

// log(1 + x) of an x that is not negative: of u = 1 + x = 2 ** k (1 + f) with f around 0, and of what the sum has lost; with
// s = f / (2 + f) it is log((1 + s) / (1 - s)) = 2 s + s s² P(s²).
template <class V>
INLINE V log1p(V x) {
    typedef Number<V> T;
    constexpr T high = Lanes<V>::IS_FLOAT ? T(0.693359375) : T(0.693145751953125);
    constexpr T low = Lanes<V>::IS_FLOAT ? T(-2.12194440054690583e-4) : T(1.42860682030941723e-6);
    const V u = 1 + x;
    const V lost = (x > 1 ? 1 - (u - x) : x - (u - 1)) / u;
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
    const V y = n * high + (f - (s * (f - z * p) - (n * low + lost)));
    return x < std::numeric_limits<T>::infinity() ? y : x;
}

// Below 1 as x + x P(x²), above as 1 - exp(-Q(x - 1)), in whose end most bits of Q are not needed.
template <class V>
INLINE V erf(V x) {
    typedef Number<V> T;
    constexpr T highest = Lanes<V>::IS_FLOAT ? T(3.95) : T(5.95);  // 1
    const V a = abs(x), z = x * x, t = (a > highest ? V{} + highest : a) - 1;
    V p, q;
    if constexpr (Lanes<V>::IS_FLOAT) {
        p = polynomial(
            z, 0.1283791659, -0.3761262712, 0.1128360002, -0.02685443809, 0.005189523003, -0.0008020732973, 7.888762134e-5
        );
        q = polynomial(
            t, 1.849605517, 2.638966812, 0.843118332, 0.04150071305, -0.009890902459, 0.001826128344, -0.0001855521591
        );
    } else {
        p = polynomial(
            z, 0.128379167095512574, -0.376126389031837482, 0.112837916709548843, -0.0268661706450778388,
            0.00522397762482809114, -0.000854832698140677142, 0.000120553311322962007, -0.0000149255957568869354,
            1.6461008240773276e-6, -1.63503937922269801e-7, 1.46603128916666272e-8, -1.1374896422002989e-9,
            5.96058799250421282e-11
        );
        q = polynomial(
            t, 1.84960550993324829, 2.63896751423477573, 0.843107256359414865, 0.0415610980250358719,
            -0.0100338251786606911, 0.00197790121291494166, -0.000237316422927962728, -0.0000262963605008776127,
            0.0000271990406614043719, -9.67147700561462957e-6, 2.13204756724085225e-6, -2.04896872274464476e-7,
            -5.79629184107582476e-8, 3.33713091268393648e-8, -8.51309869865927611e-9, 1.31804328525073059e-9,
            -1.19209356963943637e-10, 4.85931843712375574e-12
        );
    }
    return a < 1 ? x + x * p : with_sign_of(x, 1 - exp(-q));
}

// With e = exp(-2 |x|) - 1 it is -e / (2 + e), and has the sign of x.
template <class V>
INLINE V tanh(V x) {
    const V e = expm1(-2 * abs(x));
    return with_sign_of(x, -e / (2 + e));
}

template <class V>
INLINE V sigmoid(V x) {
    return 1 / (1 + exp(-x));
}

}  // namespace
}  // namespace fusednn
