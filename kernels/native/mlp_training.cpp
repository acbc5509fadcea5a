// Whole training steps of an MLP on a CPU, as many as asked, in one call.
//
//     for each layer:       z = a Wᵀ + b      h = activation(z), the next layer's a;      y is the last h
//     then the loss of y, and dy; for each layer, from the last to the first:
//         dz = dh activation'(z)      dW = dzᵀ a      db = Σ dz      dh of the layer before = dz W
//         and the optimizer's rule (updates.h) on W and b
//
// The same step as ../mlp_training_kernels.py, with its names, by one thread, to which the batch is one tile.
// In the products (products.h) the innermost index n is the row of the batch for the forward and for dh; so a, h, dh and dz lie as
// [features, batch]. For dW it is the feature, and what a layer is given lies as [batch, features] beside it. Rows are
// padded to whole vectors: what stands in the padding is computed and never read. Where each sum is added up does not
// depend on the batch around it, so the bits repeat on one machine; machines with other vectors, or without a fused
// multiply-add, may round differently.
//
// Whoever calls this has checked every shape, dtype, stride and pointer: fusednn/training/engines/native.py does.

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>

#include "activations.h"
#include "losses.h"
#include "products.h"
#include "step.h"
#include "updates.h"

namespace fusednn {
namespace {

// So many numbers of dW are computed and used at a time, in the L1 cache too. For a small batch in long rows, since the
// step on W takes longer where it leaps from row to row: a third, at 784-2048-10 and batch 1. For a large one in many
// rows, for each 4 of which a tile of the batch is read again: at batch 512 long ones take a fifth longer.
constexpr Int GRAD_SIZE = 4096, LONG_ROW = 1024, SHORT_ROW = 256, SMALL_BATCH = 32;

// What a step hands from one part to the next.
template <class T, int BYTES>
struct Buffers {
    Int stride_b;                                // of what lies as [features, batch]
    Int strides[MOST_LAYERS];                    // of `given`
    std::optional<Buffer<T>> given[MOST_LAYERS];  // [batch, inputs], what each layer is given
    std::optional<Buffer<T>> kept[MOST_LAYERS];   // [outputs, batch], what the slope of its activation is read off
    Buffer<T> x_t, h;                            // [inputs, batch], and the h of a layer that keeps z
    Buffer<T> d[2];                              // [outputs, batch], dz of a layer and dh of the one before, by turns
    Buffer<T> db;                                // [outputs]
    alignas(64) T dw[GRAD_SIZE];                 // a part of dW

    Buffers(const Step<T> &step, Int batch, Int widest)
        : stride_b(padded_row<T, BYTES>(batch)), x_t(step.layer[0].inputs, stride_b), h(widest, stride_b),
          d{{widest, stride_b}, {widest, stride_b}}, db(1, widest) {
        for (Int l = 0; l < step.layers; ++l) {
            strides[l] = padded<T, BYTES>(step.layer[l].inputs);
            given[l].emplace(batch, strides[l]);
            kept[l].emplace(step.layer[l].outputs, stride_b);
        }
    }
};

// to [M, batch] = W a + b of W [M, K], a [K, batch] and b [M] or none.
template <class T, int BYTES>
INLINE void linear(T *to, Int stride_b, const T *a, const T *w, const T *b, Int M, Int K, Int size) {
    for (Int m = 0; b && m < M; ++m) std::fill_n(to + m * stride_b, stride_b, b[m]);
    product_of_rows<T, BYTES>(to, w, K, 1, a, stride_b, M, size, K, b != nullptr);
}

// The rows of a batch, as [batch, inputs] and [inputs, batch].
template <class T, int BYTES>
INLINE void gather(const Step<T> &step, const Job<T> &job, const Int *rows, Buffers<T, BYTES> &to, Int size) {
    const Int I = step.layer[0].inputs, stride_i = to.strides[0];
    T *x = *to.given[0];
    for (Int b = 0; b < size; ++b) {
        const T *row = job.x + rows[b] * job.stride_xm;
        if (job.stride_xi == 1)
            std::copy_n(row, I, x + b * stride_i);
        else
            for (Int i = 0; i < I; ++i) x[b * stride_i + i] = row[i * job.stride_xi];
    }
    transpose<T>(to.x_t, to.stride_b, x, stride_i, size, I);
}

// y, in to.d[0], of the gathered rows; and what the layers keep.
template <class T, int BYTES>
INLINE void forward(const Step<T> &step, Buffers<T, BYTES> &to, Int size) {
    const T *a = to.x_t;
    for (Int l = 0; l < step.layers; ++l) {
        const Layer<T> &layer = step.layer[l];
        const Int numbers = layer.outputs * to.stride_b;
        const bool is_last = l == step.layers - 1, keeps_h = !ACTIVATIONS[layer.activation.name].before;
        T *kept = *to.kept[l], *h = is_last ? to.d[0].p : keeps_h ? kept : to.h.p;
        T *z = is_last && layer.activation.name == IDENTITY ? h : kept;
        linear<T, BYTES>(z, to.stride_b, a, layer.w.weight, layer.b.weight, layer.outputs, layer.inputs, size);
        activate<T, BYTES>(layer.activation, keeps_h ? z : h, z, numbers);
        if (is_last && keeps_h && z != h) std::copy_n(z, numbers, h);
        if (!is_last) transpose<T>(*to.given[l + 1], to.strides[l + 1], h, to.stride_b, layer.outputs, size);
        a = h;
    }
}

// Step on n numbers of a parameter from `offset` on, whose gradient is g.
template <class T>
INLINE void step_on(const Parameter<T> &p, Int offset, T *g, Int n, const T *row, Rule rule) {
    T *first = p.first ? p.first + offset : nullptr, *second = p.second ? p.second + offset : nullptr;
    update(p.weight + offset, first, second, g, n, row, rule);
}

// Step on W with dW = dzᵀ a of dz [M, batch] and a [batch, N], a part at a time.
template <class T, int BYTES>
INLINE void step_on_weight(
    const Parameter<T> &w, const T *row, Rule rule, const T *dz, Int stride_b, const T *a, Int stride_a, T *dw,
    Int M, Int N, Int size
) {
    const Int longest = size <= SMALL_BATCH ? LONG_ROW : SHORT_ROW;
    const Int stride = std::min(longest, whole<T, BYTES>(N)), most = GRAD_SIZE / stride;
    for (Int m = 0; m < M; m += most)
        for (Int n = 0; n < N; n += stride) {
            const Int rows = std::min(most, M - m), columns = std::min(stride, N - n);
            product<T, BYTES>(dw, stride, dz + m * stride_b, stride_b, 1, a + n, stride_a, rows, columns, size, false);
            if (columns == N) {  // whole rows: without gaps they are one piece of W
                for (Int r = 1; r < rows && stride != N; ++r) std::copy_n(dw + r * stride, N, dw + r * N);
                step_on(w, m * N, dw, rows * N, row, rule);
            } else {
                for (Int r = 0; r < rows; ++r) step_on(w, (m + r) * N + n, dw + r * stride, columns, row, rule);
            }
        }
}

// Step on b with db = Σ dz of dz [M, batch]. Each of 8 lanes adds up every eighth row of the batch, since an addition
// waits for the one before it.
template <class T>
INLINE void step_on_bias(
    const Parameter<T> &b, const T *row, Rule rule, const T *dz, Int stride_b, T *db, Int M, Int size
) {
    if (!b.weight) return;
    for (Int m = 0; m < M; ++m, dz += stride_b) {
        T sums[8] = {};
        Int i = 0;
        for (; i + 8 <= size; i += 8)
            for (int lane = 0; lane < 8; ++lane) sums[lane] += dz[i + lane];
        for (; i < size; ++i) sums[i % 8] += dz[i];
        db[m] = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
    step_on(b, 0, db, M, row, rule);
}

// The steps on all layers, from dy in of.d[0]. `row` is the first of the step's rows of the table.
template <class T, int BYTES>
INLINE void backward(const Step<T> &step, const T *row, Buffers<T, BYTES> &of, Int size) {
    T *d = of.d[0], *d_before = of.d[1];
    for (Int l = step.layers - 1; l >= 0; --l) {
        const Layer<T> &layer = step.layer[l];
        const Int M = layer.outputs, N = layer.inputs, stride_b = of.stride_b;
        deactivate<T, BYTES>(layer.activation, d, *of.kept[l], M * stride_b);
        if (l > 0)  // before the step on W
            product_of_rows<T, BYTES>(d_before, layer.w.weight, 1, N, d, stride_b, N, size, M, false);
        const T *row_w = row + 2 * l * ROW, *row_b = row_w + ROW, *a = *of.given[l];
        step_on_weight<T, BYTES>(layer.w, row_w, step.rule, d, stride_b, a, of.strides[l], of.dw, M, N, size);
        step_on_bias<T>(layer.b, row_b, step.rule, d, stride_b, of.db, M, size);
        std::swap(d, d_before);
    }
}

template <class T, int BYTES>
INLINE void mlp_training(const Step<T> &step, const Job<T> &job) {
    Int widest = 0;
    for (Int l = 0; l < step.layers; ++l) widest = std::max(widest, step.layer[l].outputs);
    const auto buffers = std::make_unique<Buffers<T, BYTES>>(step, std::max(Int(1), job.batch), widest);
    job.each_step([&](Int s, const Int *rows, Int size) INLINED {
        gather<T, BYTES>(step, job, rows, *buffers, size);
        forward<T, BYTES>(step, *buffers, size);
        const Sums<T> sums = cross_entropy<T, BYTES>(step, job, rows, buffers->d[0], buffers->stride_b, size);
        job.losses[s] = step.loss.mean ? sums.loss / sums.weight : sums.loss;
        if (step.accuracy) job.accuracies[s] = sums.right / sums.counted;
        backward<T, BYTES>(step, job.table + s * 2 * step.layers * ROW, *buffers, size);
        return true;
    });
}

// The same for each kind of machine. Flatten puts all of it into one function, compiled for that kind.
template <class T>
void train_plain(const Step<T> &step, const Job<T> &job) {
    mlp_training<T, 16>(step, job);
}
#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2,fma"), flatten)) void train_avx2(const Step<T> &step, const Job<T> &job) {
    mlp_training<T, 32>(step, job);
}
template <class T>
__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"), flatten)) void train_avx512(
    const Step<T> &step, const Job<T> &job
) {
    mlp_training<T, 64>(step, job);
}
#endif

enum Machine { PLAIN, AVX2, AVX512 };

// Count the steps where the optimizer does.
template <class T>
void count_steps(const Parameter<T> &p, Int steps) {
    if (!p.count) return;
    if (p.double_count)
        *static_cast<double *>(p.count) += double(steps);
    else
        *static_cast<float *>(p.count) += float(steps);
}

}  // namespace

bool runs_on(Int machine) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (machine == AVX2) return avx2;
    if (machine == AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#endif
    return machine == PLAIN;
}

template <class T>
void train(Int machine, const Step<T> &step, const Job<T> &job) {
#if defined(__x86_64__)
    if (machine == AVX2)
        train_avx2(step, job);
    else if (machine == AVX512)
        train_avx512(step, job);
    else
#endif
        train_plain(step, job);
    for (Int l = 0; l < step.layers; ++l) {
        count_steps(step.layer[l].w, job.steps);
        count_steps(step.layer[l].b, job.steps);
    }
}

template void train(Int machine, const Step<float> &step, const Job<float> &job);
template void train(Int machine, const Step<double> &step, const Job<double> &job);

}  // namespace fusednn
