// Whole training steps of an MLP on a CPU, as many as asked, in one call.
//
//     for each layer:       z = a Wᵀ + b      h = activation(z), the next layer's a;      y is the last h
//     then the loss of y, and dy; for each layer, from the last to the first:
//         dz = dh activation'(z)      dW = dzᵀ a      db = Σ dz      dh of the layer before = dz W
//         and the optimizer's rule (updates.h) on W and b; or, if it is clipped, behind the gradients of all layers
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

// A larger batch is added up in parts of so many rows, and these in double: the sum of a million floats errs by 1e-2.
constexpr Int LARGE_BATCH = 4096, PART_ROWS = 256;

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
    alignas(64) double dw_sums[GRAD_SIZE];       // the same, of the rows so far of a large batch
    std::optional<Buffer<T>> grads;              // of all parameters, if their norm is clipped
    T *grad[2 * MOST_LAYERS] = {};               // there, where that of each parameter is to lie, or null
    Int parameters = 0;                          // the numbers of all of them

    Buffers(const Step<T> &step, Int batch, Int widest)
        : stride_b(padded_row<T, BYTES>(batch)), x_t(step.layer[0].inputs, stride_b), h(widest, stride_b),
          d{{widest, stride_b}, {widest, stride_b}}, db(1, widest) {
        for (Int l = 0; l < step.layers; ++l) {
            strides[l] = padded<T, BYTES>(step.layer[l].inputs);
            given[l].emplace(batch, strides[l]);
            kept[l].emplace(step.layer[l].outputs, stride_b);
            parameters += step.layer[l].outputs * (step.layer[l].inputs + (step.layer[l].b.weight != nullptr));
        }
        if (!step.clipped) return;
        grads.emplace(1, parameters);
        T *next = *grads;
        for (Int l = 0; l < step.layers; ++l) {
            grad[2 * l] = next, grad[2 * l + 1] = next + step.layer[l].outputs * step.layer[l].inputs;
            next = grad[2 * l + 1] + (step.layer[l].b.weight ? step.layer[l].outputs : 0);
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

// Step on n numbers of a parameter from `offset` on, whose gradient is g; or put that into its `grad`, if it has one.
template <class T>
INLINE void step_on(const Parameter<T> &p, Int offset, T *g, Int n, const T *row, Rule rule, T *grad) {
    if (grad) return void(std::copy_n(g, n, grad + offset));
    update(Part<T>(p, offset), g, n, row, rule);
}

// of.dw [rows, columns] = dz a of dz [rows, batch] and a [batch, columns].
template <class T, int BYTES>
INLINE void product_of_batch(
    Buffers<T, BYTES> &of, Int stride, const T *dz, const T *a, Int stride_a, Int rows, Int columns, Int size
) {
    const Int most = size > LARGE_BATCH ? PART_ROWS : LARGE_BATCH;
    for (Int k = 0; k == 0 || k < size; k += most) {
        const Int part = std::min(most, size - k);
        const T *a_k = a + k * stride_a;
        product<T, BYTES>(of.dw, stride, dz + k, of.stride_b, 1, a_k, stride_a, rows, columns, part, false);
        if (size <= most) return;
        for (Int r = 0; r < rows; ++r)
            for (Int i = r * stride; i < r * stride + columns; ++i)
                of.dw_sums[i] = (k > 0 ? of.dw_sums[i] : 0) + of.dw[i];
    }
    for (Int r = 0; r < rows; ++r)
        for (Int i = r * stride; i < r * stride + columns; ++i) of.dw[i] = T(of.dw_sums[i]);
}

// Step on W with dW = dzᵀ a of dz [M, batch] and a [batch, N], a part at a time.
template <class T, int BYTES>
INLINE void step_on_weight(
    const Parameter<T> &w, const T *row, Rule rule, const T *dz, const T *a, Int stride_a, Buffers<T, BYTES> &of,
    Int M, Int N, Int size, T *grad
) {
    T *const dw = of.dw;
    const Int longest = size <= SMALL_BATCH ? LONG_ROW : SHORT_ROW;
    const Int stride = std::min(longest, whole<T, BYTES>(N)), most = GRAD_SIZE / stride;
    for (Int m = 0; m < M; m += most)
        for (Int n = 0; n < N; n += stride) {
            const Int rows = std::min(most, M - m), columns = std::min(stride, N - n);
            product_of_batch<T, BYTES>(of, stride, dz + m * of.stride_b, a + n, stride_a, rows, columns, size);
            if (columns == N) {  // whole rows: without gaps they are one piece of W
                for (Int r = 1; r < rows && stride != N; ++r) std::copy_n(dw + r * stride, N, dw + r * N);
                step_on(w, m * N, dw, rows * N, row, rule, grad);
            } else {
                for (Int r = 0; r < rows; ++r) step_on(w, (m + r) * N + n, dw + r * stride, columns, row, rule, grad);
            }
        }
}

// The sum of n numbers. Each of 8 lanes adds up every eighth, since an addition waits for the one before it.
template <class T>
INLINE T sum_of(const T *x, Int n) {
    T sums[8] = {};
    Int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += x[i + lane];
    for (; i < n; ++i) sums[i % 8] += x[i];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// Step on b with db = Σ dz of dz [M, batch].
template <class T>
INLINE void step_on_bias(
    const Parameter<T> &b, const T *row, Rule rule, const T *dz, Int stride_b, T *db, Int M, Int size, T *grad
) {
    if (!b.weight) return;
    const Int most = size > LARGE_BATCH ? PART_ROWS : LARGE_BATCH;
    for (Int m = 0; m < M; ++m, dz += stride_b) {
        double sum = 0;
        for (Int k = 0; k < size; k += most) sum += sum_of(dz + k, std::min(most, size - k));
        db[m] = T(sum);
    }
    step_on(b, 0, db, M, row, rule, grad);
}

// The steps on all layers, from dy in of.d[0], or their gradients. `row` is the first of the step's rows of the table.
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
        step_on_weight<T, BYTES>(layer.w, row_w, step.rule, d, a, of.strides[l], of, M, N, size, of.grad[2 * l]);
        step_on_bias<T>(layer.b, row_b, step.rule, d, stride_b, of.db, M, size, of.grad[2 * l + 1]);
        std::swap(d, d_before);
    }
}

// By what n gradients are multiplied, so that their norm is at most `most`: torch.nn.utils.clip_grad_norm_. NaN stays.
template <class T>
INLINE T clipping_of(const T *grads, Int n, T most) {
    double squares[8] = {};
    for (Int i = 0; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; ++lane) squares[lane] += double(grads[i + lane]) * grads[i + lane];
    for (Int i = n / 8 * 8; i < n; ++i) squares[i % 8] += double(grads[i]) * grads[i];
    const double factor = most / (std::sqrt(sum_of(squares, 8)) + 1e-6);
    return factor > 1 ? T(1) : T(factor);
}

// The steps on all layers, by gradients that backward has left.
template <class T, int BYTES>
INLINE void step_clipped(const Step<T> &step, const T *row, Buffers<T, BYTES> &of) {
    T *const grads = *of.grads;
    const T factor = clipping_of<T>(grads, of.parameters, row[MAX_NORM]);
    for (Int i = 0; i < of.parameters; ++i) grads[i] *= factor;
    for (Int p = 0; p < 2 * step.layers; ++p) {
        const Layer<T> &layer = step.layer[p / 2];
        const Int n = p % 2 ? layer.outputs : layer.outputs * layer.inputs;
        const Parameter<T> &parameter = p % 2 ? layer.b : layer.w;
        if (parameter.weight) step_on<T>(parameter, 0, of.grad[p], n, row + p * ROW, step.rule, nullptr);
    }
}

// `loss` is batch_loss, compiled for the machine.
template <class T, int BYTES, class Loss>
INLINE void mlp_training(const Step<T> &step, const Job<T> &job, Loss loss) {
    Int widest = 0;
    for (Int l = 0; l < step.layers; ++l) widest = std::max(widest, step.layer[l].outputs);
    const auto buffers = std::make_unique<Buffers<T, BYTES>>(step, std::max(Int(1), job.batch), widest);
    job.each_step([&](Int s, const Int *rows, Int size) INLINED {
        gather<T, BYTES>(step, job, rows, *buffers, size);
        forward<T, BYTES>(step, *buffers, size);
        loss(step, job, s, rows, buffers->d[0], buffers->stride_b, size);
        backward<T, BYTES>(step, job.row(step, s), *buffers, size);
        if (step.clipped) step_clipped<T, BYTES>(step, job.row(step, s), *buffers);
        return true;
    });
}

// The same for each kind of machine. Flatten puts all of it into one function, compiled for that kind, and the losses
// into another: in one that is too long the compiler keeps fewer numbers in registers, for 1.07 times the time.
#define FOR_MACHINE(name, bytes, ...)                                                                                 \
    template <class T>                                                                                                \
    __VA_ARGS__ void name##_loss(                                                                                     \
        const Step<T> &step, const Job<T> &job, Int s, const Int *rows, T *y, Int stride_b, Int size                  \
    ) {                                                                                                               \
        batch_loss<T, bytes>(step, job, s, rows, y, stride_b, size);                                                  \
    }                                                                                                                 \
    template <class T>                                                                                                \
    __VA_ARGS__ void name(const Step<T> &step, const Job<T> &job) {                                                   \
        mlp_training<T, bytes>(step, job, name##_loss<T>);                                                            \
    }
FOR_MACHINE(train_plain, 16, __attribute__((noinline)))
#if defined(__x86_64__)
FOR_MACHINE(train_avx2, 32, __attribute__((noinline, flatten, target("avx2,fma"))))
FOR_MACHINE(train_avx512, 64, __attribute__((noinline, flatten, target("avx512f,avx512dq,avx512vl,avx2,fma"))))
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
