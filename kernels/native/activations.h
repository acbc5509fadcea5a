// What stands behind a layer: the value of each activation of step.h at z, and its slope, with PyTorch's formulas, so
// that NaN and infinity come where they come there. What the slope is read off is the value h of some, and z of others.

#pragma once

#include <iterator>
#include <utility>

#include "functions.h"
#include "step.h"

namespace fusednn {
namespace {

// The activation of this name, with its numbers: LeakyReLU's slope, ELU's alpha, softplus' beta and threshold.
template <ActivationName NAME, class V>
struct Activated {
    typedef Number<V> T;
    const T first, second;

    // h of z.
    INLINE V value(V z) const {
        if constexpr (NAME == RELU) return z <= 0 ? V{} : z;  // NaN passes
        else if constexpr (NAME == LEAKY_RELU) return z > 0 ? z : z * first;
        else if constexpr (NAME == ELU) return z > 0 ? z : first * expm1(z);
        else if constexpr (NAME == GELU) return z * Normal<V>(z).below;
        else if constexpr (NAME == GELU_TANH) return T(0.5) * z * (1 + gelu_tanh(z));
        else if constexpr (NAME == SILU) return z / (1 + exp(-z));
        else if constexpr (NAME == TANH) return tanh(z);
        else if constexpr (NAME == SIGMOID) return sigmoid(z);
        else if constexpr (NAME == SOFTPLUS) return z * first > second ? z : log1p(exp(z * first)) / first;
        else static_assert(NAME == IDENTITY, "this activation has no formula");
    }

    // dz of dh; k is h or z.
    INLINE V gradient(V dh, V k) const {
        if constexpr (NAME == RELU) return k <= 0 ? V{} : dh;
        else if constexpr (NAME == LEAKY_RELU) return k > 0 ? dh : dh * first;
        else if constexpr (NAME == ELU) return k <= 0 ? dh * first * exp(k) : dh;
        else if constexpr (NAME == GELU) return dh * gelu_slope(k);
        else if constexpr (NAME == GELU_TANH) return dh * gelu_tanh_slope(k);
        else if constexpr (NAME == SILU) return dh * (sigmoid(k) * (1 + k * (1 - sigmoid(k))));
        else if constexpr (NAME == TANH) return dh * (1 - k * k);
        else if constexpr (NAME == SIGMOID) return dh * (1 - k) * k;
        else if constexpr (NAME == SOFTPLUS) return k * first > second ? dh : dh * softplus_slope(k);
        else static_assert(NAME == IDENTITY, "this activation has no formula");
    }

  private:
    static constexpr T TANH_SCALE = T(0.797884560802865356), CUBE = T(0.044715);  // sqrt(2 / π), and Hendrycks' number

    static INLINE V gelu_slope(V z) {
        const Normal<V> normal(z);
        return normal.below + z * (T(0.398942280401432678) * normal.bell);  // 1 / sqrt(2 π)
    }

    static INLINE V gelu_tanh(V z) { return tanh(TANH_SCALE * (z + CUBE * (z * z * z))); }

    static INLINE V gelu_tanh_slope(V z) {
        const V t = gelu_tanh(z);
        return T(0.5) * (1 + t) + T(0.5) * z * (1 - t * t) * (TANH_SCALE * (1 + 3 * CUBE * (z * z)));
    }

    INLINE V softplus_slope(V z) const {
        const V e = exp(z * first);
        return e / (1 + e);  // NaN beyond the largest number, as in PyTorch
    }
};

// Call `use` with the Activated of this activation; for the identity there is nothing to do.
template <class V, class Use, size_t... OTHERS>
INLINE void with_activation(const Activation &activation, Use use, std::index_sequence<OTHERS...>) {
    typedef Number<V> T;
    const T first = T(activation.numbers[0]), second = T(activation.numbers[1]);
    const auto tried = [&](auto name) INLINED {
        if (activation.name == name) use(Activated<decltype(name)::value, V>{first, second});
        return activation.name == name;
    };
    (void)(tried(std::integral_constant<ActivationName, ActivationName(OTHERS + 1)>()) || ...);
}
constexpr std::make_index_sequence<std::size(ACTIVATIONS) - 1> OTHER_THAN_IDENTITY;

// h = activation(z) of n numbers, and of those up to a whole vector.
template <class T, int BYTES>
INLINE void activate(const Activation &activation, T *h, const T *z, Int n) {
    typedef Vector<T, BYTES> V;
    const auto each_vector = [&](auto activated) INLINED {
        for (Int i = 0; i < n; i += LANES<T, BYTES>) store(h + i, activated.value(load<V>(z + i)));
    };
    with_activation<V>(activation, each_vector, OTHER_THAN_IDENTITY);
}

// Make dz of n numbers dh, and of those up to a whole vector; kept is h or z.
template <class T, int BYTES>
INLINE void deactivate(const Activation &activation, T *dh, const T *kept, Int n) {
    typedef Vector<T, BYTES> V;
    const auto each_vector = [&](auto activated) INLINED {
        for (Int i = 0; i < n; i += LANES<T, BYTES>)
            store(dh + i, activated.gradient(load<V>(dh + i), load<V>(kept + i)));
    };
    with_activation<V>(activation, each_vector, OTHER_THAN_IDENTITY);
}

}  // namespace
}  // namespace fusednn
