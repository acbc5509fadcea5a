// The matrix product of small matrices on one thread, with the vectors of GCC and Clang, and what it needs of memory.
//
//     c[m, n] += Σ_k a[m, k] b[k, n], with n innermost in b and c
//
// A number of a is multiplied with a vector of b, so no sum is split among the lanes of a vector, and nothing is added
// up in an order that the compiler chooses. BYTES is the size of a vector; whoever instantiates these does so inside a
// function that is compiled for a machine with such vectors, into which they are inlined.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>

#if !defined(__GNUC__)
#error "needs the vector types of GCC and Clang"  // without this file fusednn trains on CPUs as PyTorch does
#endif
#if !defined(__has_builtin)
#define __has_builtin(name) 0  // GCC 9
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

typedef int64_t Int;

// Zeroed memory that begins with a cache line.
template <class T>
struct Buffer {
    T *p;
    explicit Buffer(Int size) : p(static_cast<T *>(::operator new(size * sizeof(T), std::align_val_t(64)))) {
        std::fill(p, p + size, T(0));
    }
    ~Buffer() { ::operator delete(p, std::align_val_t(64)); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    operator T *() const { return p; }
};

constexpr int TILE_M = 4;    // rows of a whose sums are held in registers, two vectors each
constexpr Int TILE_K = 256;  // so many rows of b, two vectors wide, stay in the L1 cache

// How far apart rows of n numbers lie: whole vectors, and not a power of two, whose rows share few lines of a cache.
template <class T, int BYTES>
constexpr Int padded(Int n) {
    constexpr Int lanes = 2 * BYTES / sizeof(T);
    n = (n + lanes - 1) / lanes * lanes;
    return n * sizeof(T) % 1024 ? n : n + lanes;
}

// c[0:R, 0:2 vectors] += Σ_k a[:, k] b[k, :].
template <class T, int BYTES, int R>
INLINE void product_tile(T *c, Int stride_c, const T *a, Int stride_am, Int stride_ak, const T *b, Int stride_b, Int K) {
    typedef T Vector __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
    constexpr Int LANES = BYTES / sizeof(T);
    Vector acc[R][2];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) acc[r][i] = *reinterpret_cast<const Vector *>(c + r * stride_c + i * LANES);
    for (Int k = 0; k < K; ++k) {
        const Vector b0 = *reinterpret_cast<const Vector *>(b + k * stride_b);
        const Vector b1 = *reinterpret_cast<const Vector *>(b + k * stride_b + LANES);
        for (int r = 0; r < R; ++r) {
            const T scalar = a[r * stride_am + k * stride_ak];
            acc[r][0] += scalar * b0;
            acc[r][1] += scalar * b1;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) *reinterpret_cast<Vector *>(c + r * stride_c + i * LANES) = acc[r][i];
}

// c[m, n] += Σ_k a[m, k] b[k, n], up to the whole vectors that hold n < N.
template <class T, int BYTES>
INLINE void product(
    T *c, Int stride_c, const T *a, Int stride_am, Int stride_ak, const T *b, Int stride_b, Int M, Int N, Int K
) {
    constexpr Int LANES = 2 * BYTES / sizeof(T);
    for (Int k = 0; k < K; k += TILE_K)
        for (Int n = 0; n < N; n += LANES) {
            const Int size = std::min(TILE_K, K - k);
            const T *a_k = a + k * stride_ak, *b_kn = b + k * stride_b + n;
            Int m = 0;
            const auto tiles = [&](auto rows) {
                for (; m + rows <= M; m += rows)
                    product_tile<T, BYTES, decltype(rows)::value>(
                        c + m * stride_c + n, stride_c, a_k + m * stride_am, stride_am, stride_ak, b_kn, stride_b, size
                    );
            };
            tiles(std::integral_constant<int, TILE_M>());
            tiles(std::integral_constant<int, 2>());  // 10 outputs are 4, 4 and 2
            tiles(std::integral_constant<int, 1>());
        }
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
