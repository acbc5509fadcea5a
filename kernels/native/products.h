// The matrix product of small matrices on one thread, with the vectors of GCC and Clang, and the memory for it.
//
//     c[m, n] = Σ_k a[m, k] b[k, n], with n innermost in b and c
//
// A number of a is multiplied with a vector of b, so no sum is split among the lanes of a vector, and nothing is added
// up in an order that the compiler chooses. BYTES is the size of a vector; whoever instantiates these does so inside a
// function that is compiled for a machine with such vectors, into which they are inlined.

#pragma once

#include <algorithm>
#include <new>
#include <type_traits>

#include "step.h"

#if !defined(__GNUC__)
#error "needs the vector types of GCC and Clang"  // without this file fusednn trains on CPUs as PyTorch does
#endif
#if !defined(__has_builtin)
#define __has_builtin(name) 0  // GCC 9
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // a lambda: else it is compiled for machines without such vectors
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are handed over to inlined functions alone
#endif

namespace fusednn {
namespace {

template <class T, int BYTES>
struct VectorOf {
    typedef T Type __attribute__((vector_size(BYTES)));
};
template <class T, int BYTES>
using Vector = typename VectorOf<T, BYTES>::Type;
template <class T, int BYTES>
constexpr Int LANES = BYTES / sizeof(T);

template <class V, class T>
INLINE V load(const T *from) {
    V v;
    __builtin_memcpy(&v, from, sizeof(V));
    return v;
}
template <class V, class T>
INLINE void store(T *to, V v) {
    __builtin_memcpy(to, &v, sizeof(V));
}

// Zeroed memory for rows x columns numbers, which begins with a cache line and ends with one.
template <class T>
struct Buffer {
    T *p;
    Buffer(Int rows, Int columns) {
        constexpr Int LINE = 64;
        Int bytes;
        if (__builtin_mul_overflow(rows, columns, &bytes) || __builtin_mul_overflow(bytes, Int(sizeof(T)), &bytes) ||
            __builtin_add_overflow(bytes, LINE - 1, &bytes))
            throw std::bad_alloc();
        bytes = bytes / LINE * LINE;
        p = static_cast<T *>(::operator new(bytes, std::align_val_t(LINE)));
        std::fill_n(p, bytes / Int(sizeof(T)), T(0));
    }
    ~Buffer() { ::operator delete(p, std::align_val_t(64)); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    operator T *() const { return p; }
};

constexpr Int TILE_K = 256;    // so many rows of b, two vectors wide, stay in the L1 cache
constexpr int FEW_BYTES = 16;  // the vector for rows that are no longer

// n numbers in whole vectors.
template <class T, int BYTES>
constexpr Int whole(Int n) {
    return (n + LANES<T, BYTES> - 1) / LANES<T, BYTES> * LANES<T, BYTES>;
}

// How far apart rows of n numbers lie: whole vectors, and not a power of two, whose rows share few lines of a cache.
template <class T, int BYTES>
constexpr Int padded(Int n) {
    n = whole<T, BYTES>(n);
    return n * sizeof(T) % 1024 ? n : n + LANES<T, BYTES>;
}

// The same for product_of_rows: short ones are a short vector.
template <class T, int BYTES>
constexpr Int padded_row(Int n) {
    return n <= LANES<T, FEW_BYTES> ? LANES<T, FEW_BYTES> : padded<T, BYTES>(n);
}

// c[0:R, 0:COUNT vectors] = Σ_k a[:, k] b[k, :], and what stood there before if it `adds`. The sums are in registers.
template <class T, int BYTES, int R, int COUNT>
INLINE void product_tile(
    T *c, Int stride_c, const T *a, Int stride_am, Int stride_ak, const T *b, Int stride_b, Int K, bool adds
) {
    typedef Vector<T, BYTES> V;
    V acc[R][COUNT];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < COUNT; ++i) acc[r][i] = adds ? load<V>(c + r * stride_c + i * LANES<T, BYTES>) : V{};
    for (Int k = 0; k < K; ++k) {
        V row[COUNT];
        for (int i = 0; i < COUNT; ++i) row[i] = load<V>(b + k * stride_b + i * LANES<T, BYTES>);
        for (int r = 0; r < R; ++r) {
            const T scalar = a[r * stride_am + k * stride_ak];
            for (int i = 0; i < COUNT; ++i) acc[r][i] += scalar * row[i];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < COUNT; ++i) store(c + r * stride_c + i * LANES<T, BYTES>, acc[r][i]);
}

// The same with as many rows as c has, 8 / COUNT at a time: an addition waits for the one before it, not for 7 others.
template <class T, int BYTES, int COUNT>
INLINE void product_columns(
    T *c, Int stride_c, const T *a, Int stride_am, Int stride_ak, const T *b, Int stride_b, Int M, Int K, bool adds
) {
    Int m = 0;
    const auto tiles = [&](auto rows) INLINED {
        for (; m + rows <= M; m += rows)
            product_tile<T, BYTES, decltype(rows)::value, COUNT>(
                c + m * stride_c, stride_c, a + m * stride_am, stride_am, stride_ak, b, stride_b, K, adds
            );
    };
    if constexpr (COUNT == 1) tiles(std::integral_constant<int, 8>());
    tiles(std::integral_constant<int, 4>());
    tiles(std::integral_constant<int, 2>());  // 10 outputs are 4, 4 and 2
    tiles(std::integral_constant<int, 1>());
}

// c[m, n] = Σ_k a[m, k] b[k, n], and what stood there before if it `adds`, up to the whole vectors that hold n < N.
template <class T, int BYTES>
INLINE void product(
    T *c, Int stride_c, const T *a, Int stride_am, Int stride_ak, const T *b, Int stride_b, Int M, Int N, Int K,
    bool adds
) {
    constexpr Int ONE = LANES<T, BYTES>;
    for (Int k = 0; k == 0 || k < K; k += TILE_K, adds = true) {  // without any k it is 0
        const Int size = std::min(TILE_K, K - k);
        const T *a_k = a + k * stride_ak, *b_k = b + k * stride_b;
        const auto columns = [&](Int n, auto count) INLINED {
            constexpr int COUNT = decltype(count)::value;
            product_columns<T, BYTES, COUNT>(
                c + n, stride_c, a_k, stride_am, stride_ak, b_k + n, stride_b, M, size, adds
            );
        };
        Int n = 0;
        for (; n + ONE < N; n += 2 * ONE) columns(n, std::integral_constant<int, 2>());
        if (n < N) columns(n, std::integral_constant<int, 1>());
    }
}

// The same where rows of b and c lie apart by `padded_row`, so that short ones need short vectors.
template <class T, int BYTES>
INLINE void product_of_rows(
    T *c, const T *a, Int stride_am, Int stride_ak, const T *b, Int stride, Int M, Int N, Int K, bool adds
) {
    if (BYTES > FEW_BYTES && stride == LANES<T, FEW_BYTES>)
        product_columns<T, FEW_BYTES, 1>(c, stride, a, stride_am, stride_ak, b, stride, M, K, adds);
    else
        product<T, BYTES>(c, stride, a, stride_am, stride_ak, b, stride, M, N, K, adds);
}

// to[n, m] = from[m, n], by blocks of 4 x 4 as long as there are such.
template <class T>
INLINE void transpose(T *__restrict to, Int stride_to, const T *__restrict from, Int stride_from, Int M, Int N) {
    Int whole_m = 0, whole_n = 0;
#if __has_builtin(__builtin_shufflevector)  // not in GCC 11
    typedef T Vector __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
    whole_m = M / 4 * 4, whole_n = N / 4 * 4;
    for (Int m = 0; m < whole_m; m += 4)
        for (Int n = 0; n < whole_n; n += 4) {
            Vector row[4];
            for (int i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const Vector *>(from + (m + i) * stride_from + n);
            const Vector even_l = __builtin_shufflevector(row[0], row[2], 0, 4, 1, 5);
            const Vector even_r = __builtin_shufflevector(row[0], row[2], 2, 6, 3, 7);
            const Vector odd_l = __builtin_shufflevector(row[1], row[3], 0, 4, 1, 5);
            const Vector odd_r = __builtin_shufflevector(row[1], row[3], 2, 6, 3, 7);
            row[0] = __builtin_shufflevector(even_l, odd_l, 0, 4, 1, 5);
            row[1] = __builtin_shufflevector(even_l, odd_l, 2, 6, 3, 7);
            row[2] = __builtin_shufflevector(even_r, odd_r, 0, 4, 1, 5);
            row[3] = __builtin_shufflevector(even_r, odd_r, 2, 6, 3, 7);
            for (int i = 0; i < 4; ++i) *reinterpret_cast<Vector *>(to + (n + i) * stride_to + m) = row[i];
        }
#endif
    for (Int m = 0; m < M; ++m)
        for (Int n = m < whole_m ? whole_n : 0; n < N; ++n) to[n * stride_to + m] = from[m * stride_from + n];
}

}  // namespace
}  // namespace fusednn
