// Whole training steps of Linear, ReLU, Linear with cross entropy on a CPU, as many as asked, in one call.
//
//     h = relu(x W1ᵀ + b1)        y = h W2ᵀ + b2           loss = cross entropy of y
//     dW2 = dyᵀ h                 db2 = Σ dy               dh = dy W2 where not (h <= 0)
//     dW1 = dhᵀ x                 db1 = Σ dh               then the optimizer's step (../adam.py) on each
//
// The same step as ../mlp_training.py, in the same order and with its names, by one thread, to which the batch is one
// tile. In the products (products.h) the innermost index n is the row of the batch for the forward and for dh; so x, h, dh
// and dy lie as [features, batch]. For dW1 and dW2 it is the feature, and x and h lie as [batch, features] beside them.
// Rows are padded to whole vectors: what stands in the padding is computed and never read. Where each sum is added up does
// not depend on the batch around it, so the bits repeat on one machine; machines with other vectors, or without a fused
// multiply-add, may round differently.
//
// Whoever calls this has checked every shape, dtype, stride and pointer: fusednn/training/native.py does.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>

#include "adam.h"
#include "facts.h"
#include "products.h"

namespace {

enum { W1, B1, W2, B2, PARAMETERS };

// What train_mlp of ../mlp_training.py is given.
template <class T>
struct Job {
    const T *x;              // [rows, I], any strides
    const Int *targets;      // [rows], any stride
    const Int *order;        // the rows of the steps, one after the other
    const T *class_weight;   // [O], or none
    T *weights[PARAMETERS];  // W1 [H, I], b1 [H] or none, W2 [O, H], b2 [O] or none
    T *firsts[PARAMETERS], *seconds[PARAMETERS];  // the state of each, as far as the rule has one
    const T *table;          // [steps, PARAMETERS, ROW]
    T *losses, *accuracies;  // [steps]; the second or none
    void *counts[PARAMETERS];  // of the steps that the optimizer made on each, or none; double where the bit of it is set
    Int stride_xm, stride_xi, stride_t, I, H, O, batch, epoch_rows, position, steps, ignore_index, double_counts;
    Kind kind;
    bool mean;
    double smoothing;
};

constexpr Int GRAD_M = 16, GRAD_N = 256;  // the part of dW that is computed and used at a time, in the L1 cache too

// What a step hands from one part to the next.
template <class T, int BYTES>
struct Buffers {
    const Int stride_b, stride_i, stride_h;
    Buffer<T> x, x_t;  // [batch, I] and [I, batch]
    Buffer<T> h, h_t;  // [H, batch] and [batch, H]
    Buffer<T> dh, dy;  // [H, batch] and [O, batch]; the logits come in the place of dy
    Buffer<T> dw, db;  // [GRAD_M, GRAD_N], and [H] or [O]

    Buffers(const Job<T> &job, Int batch)
        : stride_b(padded<T, BYTES>(batch)), stride_i(padded<T, BYTES>(job.I)), stride_h(padded<T, BYTES>(job.H)),
          x(batch * stride_i), x_t(job.I * stride_b), h(job.H * stride_b), h_t(batch * stride_h),
          dh(job.H * stride_b), dy(job.O * stride_b), dw(GRAD_M * GRAD_N), db(std::max(job.H, job.O)) {}
};

// to [M, batch] = W a + b of W [M, K], a [K, batch] and b [M] or none.
template <class T, int BYTES>
INLINE void linear(T *to, Int stride_b, const T *a, const T *w, const T *b, Int M, Int K, Int size) {
    for (Int m = 0; m < M; ++m) std::fill_n(to + m * stride_b, stride_b, b ? b[m] : T(0));
    product<T, BYTES>(to, stride_b, w, K, 1, a, stride_b, M, size, K);
}

// h = relu(x W1ᵀ + b1) of the rows of a batch.
template <class T, int BYTES>
INLINE void hidden_tile(const Job<T> &job, const Int *rows, Buffers<T, BYTES> &to, Int size) {
    const Int I = job.I, H = job.H;
    for (Int b = 0; b < size; ++b)
        for (Int i = 0; i < I; ++i) to.x[b * to.stride_i + i] = job.x[rows[b] * job.stride_xm + i * job.stride_xi];
    transpose<T>(to.x_t, to.stride_b, to.x, to.stride_i, size, I);
    linear<T, BYTES>(to.h, to.stride_b, to.x_t, job.weights[W1], job.weights[B1], H, I, size);
    for (Int i = 0; i < H * to.stride_b; ++i) to.h[i] = to.h[i] <= 0 ? T(0) : to.h[i];  // NaN passes
    transpose<T>(to.h_t, to.stride_h, to.h, to.stride_b, H, size);
}

template <class T>
struct Sums {
    T loss = 0, weight = 0, counted = 0, right = 0;
};

// Of the logits of a row, y [O]: dy in their place, not yet divided for the mean; and the row's part of the sums.
template <class T>
INLINE void loss_row(const Job<T> &job, Int label, T *y, Int stride_y, T all_weights, Sums<T> &sums) {
    const Int O = job.O;
    const bool ignored = label == job.ignore_index, known = label >= 0 && label < O;
    if (ignored || !known) {
        const T value = ignored ? T(0) : std::numeric_limits<T>::quiet_NaN();
        for (Int o = 0; o < O; ++o) y[o * stride_y] = value;
        sums.counted += ignored ? 0 : 1;
        sums.loss += value;
        return;
    }
    Int first = 0;  // of the largest; NaN is larger than any
    T largest = -std::numeric_limits<T>::infinity();
    for (Int o = 0; o < O; ++o) {
        const T value = y[o * stride_y], best = y[first * stride_y];
        if (value > best || (std::isnan(value) && !std::isnan(best))) first = o;
        largest = largest < value ? value : largest;
    }
    const auto weight_of = [&](Int o) { return job.class_weight ? job.class_weight[o] : T(1); };
    const T weight = weight_of(label), kept = weight * T(1 - job.smoothing), share = T(job.smoothing / double(O));
    const bool smoothed = job.smoothing > 0;
    T loss = -kept * (y[label * stride_y] - largest), spread = 0, total = 0;
    for (Int o = 0; o < O; ++o) {
        const T shifted = y[o * stride_y] - largest;
        if (smoothed) spread += weight_of(o) * shifted;
        y[o * stride_y] = std::exp(shifted);
        total += y[o * stride_y];
    }
    if (smoothed) loss -= share * spread;
    const T mass = smoothed && job.class_weight ? kept + share * all_weights : weight, scale = mass / total;
    for (Int o = 0; o < O; ++o) y[o * stride_y] = y[o * stride_y] * scale - (smoothed ? share * weight_of(o) : T(0));
    y[label * stride_y] -= kept;
    sums.loss += loss + mass * std::log(total);
    sums.weight += weight;
    sums.counted += 1;
    sums.right += label == first;
}

// h, dy and the sums over the rows of a batch.
template <class T, int BYTES>
INLINE Sums<T> forward_tile(const Job<T> &job, const Int *rows, Buffers<T, BYTES> &to, Int size) {
    hidden_tile<T, BYTES>(job, rows, to, size);
    linear<T, BYTES>(to.dy, to.stride_b, to.h, job.weights[W2], job.weights[B2], job.O, job.H, size);
    T all_weights = 0;
    for (Int o = 0; o < job.O; ++o) all_weights += job.class_weight ? job.class_weight[o] : T(0);
    Sums<T> sums;
    for (Int b = 0; b < size; ++b)
        loss_row<T>(job, job.targets[rows[b] * job.stride_t], to.dy + b, to.stride_b, all_weights, sums);
    if (sums.weight == 0) sums.weight = std::numeric_limits<T>::quiet_NaN();  // 0 / 0, whatever smoothing adds
    const T scale = job.mean && sums.counted > 0 ? 1 / sums.weight : T(1);    // no rows: no gradient
    for (Int i = 0; i < job.O * to.stride_b; ++i) to.dy[i] *= scale;
    return sums;
}

// Step on n numbers of parameter p from `offset` on, whose gradient is g.
template <class T>
INLINE void step_on(const Job<T> &job, int p, Int offset, T *g, Int n, const T *row) {
    T *first = job.firsts[p] ? job.firsts[p] + offset : nullptr;
    T *second = job.seconds[p] ? job.seconds[p] + offset : nullptr;
    update(job.weights[p] + offset, first, second, g, n, row + p * ROW, job.kind);
}

// Step on weight p with dW = dyᵀ x of dy [M, batch] and x [batch, N], a part at a time.
template <class T, int BYTES>
INLINE void step_on_weight(
    const Job<T> &job, int p, const T *row, const T *dy, Int stride_dy, const T *x, Int stride_x, T *dw, Int M, Int N, Int size
) {
    for (Int m = 0; m < M; m += GRAD_M)
        for (Int n = 0; n < N; n += GRAD_N) {
            const Int rows = std::min(GRAD_M, M - m), columns = std::min(GRAD_N, N - n);
            std::fill_n(dw, rows * GRAD_N, T(0));
            product<T, BYTES>(dw, GRAD_N, dy + m * stride_dy, stride_dy, 1, x + n, stride_x, rows, columns, size);
            for (Int r = 0; r < rows; ++r) step_on(job, p, (m + r) * N + n, dw + r * GRAD_N, columns, row);
        }
}

// Step on bias p with db = Σ dy of dy [M, batch]. Each of 8 lanes adds up every eighth row of the batch, since an addition
// waits for the one before it.
template <class T>
INLINE void step_on_bias(const Job<T> &job, int p, const T *row, const T *dy, Int stride_dy, T *db, Int M, Int size) {
    if (!job.weights[p]) return;
    for (Int m = 0; m < M; ++m, dy += stride_dy) {
        T sums[8] = {};
        Int b = 0;
        for (; b + 8 <= size; b += 8)
            for (int i = 0; i < 8; ++i) sums[i] += dy[b + i];
        for (; b < size; ++b) sums[b % 8] += dy[b];
        db[m] = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
    step_on(job, p, 0, db, M, row);
}

// dh = dy W2 where not (h <= 0); then step on W2 and b1.
template <class T, int BYTES>
INLINE void backward_output(const Job<T> &job, const T *row, Buffers<T, BYTES> &of, Int size) {
    const Int H = job.H, O = job.O, stride_b = of.stride_b;
    std::fill_n(of.dh.p, H * stride_b, T(0));
    product<T, BYTES>(of.dh, stride_b, job.weights[W2], 1, H, of.dy, stride_b, H, size, O);
    for (Int i = 0; i < H * stride_b; ++i) of.dh[i] = of.h[i] <= 0 ? T(0) : of.dh[i];
    step_on_weight<T, BYTES>(job, W2, row, of.dy, stride_b, of.h_t, of.stride_h, of.dw, O, H, size);
    step_on_bias<T>(job, B1, row, of.dh, stride_b, of.db, H, size);
}

// Step on W1.
template <class T, int BYTES>
INLINE void backward_input(const Job<T> &job, const T *row, Buffers<T, BYTES> &of, Int size) {
    step_on_weight<T, BYTES>(job, W1, row, of.dh, of.stride_b, of.x, of.stride_i, of.dw, job.H, job.I, size);
}

// job.steps steps, the first one job.position rows into an epoch.
template <class T, int BYTES>
INLINE void mlp_training(const Job<T> &job) {
    Buffers<T, BYTES> buffers(job, std::max(Int(1), job.batch));
    const Int *rows = job.order;
    Int position = job.position;
    for (Int step = 0; step < job.steps; ++step) {
        const Int size = std::min(job.batch, job.epoch_rows - position);
        const Sums<T> sums = forward_tile<T, BYTES>(job, rows, buffers, size);
        job.losses[step] = job.mean ? sums.loss / sums.weight : sums.loss;
        if (job.accuracies) job.accuracies[step] = sums.right / sums.counted;

        const T *row = job.table + step * PARAMETERS * ROW;
        backward_output<T, BYTES>(job, row, buffers, size);
        backward_input<T, BYTES>(job, row, buffers, size);
        step_on_bias<T>(job, B2, row, buffers.dy, buffers.stride_b, buffers.db, job.O, size);

        rows += size;
        position = position + size >= job.epoch_rows ? 0 : position + size;
    }
}

bool is_bad(Int label, Int classes, Int ignore_index) {
    return (label < 0 || label >= classes) && label != ignore_index;
}

// The first label of a step that is none of a class, in `bad`.
template <class T>
bool finds_bad_label(const Job<T> &job, Int &bad) {
    const Int *rows = job.order;
    Int position = job.position;
    for (Int step = 0; step < job.steps; ++step) {
        const Int size = std::min(job.batch, job.epoch_rows - position);
        for (Int b = 0; b < size; ++b) {
            bad = job.targets[rows[b] * job.stride_t];
            if (is_bad(bad, job.O, job.ignore_index)) return true;
        }
        rows += size;
        position = position + size >= job.epoch_rows ? 0 : position + size;
    }
    return false;
}

// Count the steps where the optimizer does.
template <class T>
void count_steps(const Job<T> &job) {
    for (int p = 0; p < PARAMETERS; ++p) {
        if (!job.counts[p]) continue;
        if (job.double_counts >> p & 1)
            *static_cast<double *>(job.counts[p]) += double(job.steps);
        else
            *static_cast<float *>(job.counts[p]) += float(job.steps);
    }
}

// The same for each kind of machine. Flatten puts all of it into one function, compiled for that kind.
template <class T>
void train_plain(const Job<T> &job) {
    mlp_training<T, 16>(job);
}
#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2,fma"), flatten)) void train_avx2(const Job<T> &job) {
    mlp_training<T, 32>(job);
}
template <class T>
__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"), flatten)) void train_avx512(const Job<T> &job) {
    mlp_training<T, 64>(job);
}
#endif

enum Machine { PLAIN, AVX2, AVX512 };
const char *const MACHINES[] = {"plain", "AVX2", "AVX-512"};

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
void train_on(Int machine, const Job<T> &job) {
#if defined(__x86_64__)
    if (machine == AVX2) return train_avx2(job);
    if (machine == AVX512) return train_avx512(job);
#endif
    return train_plain(job);
}

// The whole numbers of a tuple.
bool read(PyObject *tuple, Int *numbers, Py_ssize_t count) {
    if (PyTuple_Size(tuple) != count) {
        if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "expected %zd numbers", count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        numbers[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
        if (numbers[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

template <class T>
T *at(Int address) {
    return reinterpret_cast<T *>(static_cast<uintptr_t>(address));
}

template <class T>
PyObject *run(Int machine, const Int *p, const Int *n, double smoothing) {
    const Job<T> job = {
        at<T>(p[0]), at<Int>(p[1]), at<Int>(p[2]), at<T>(p[3]),
        {at<T>(p[4]), at<T>(p[5]), at<T>(p[6]), at<T>(p[7])},
        {at<T>(p[8]), at<T>(p[9]), at<T>(p[10]), at<T>(p[11])},
        {at<T>(p[12]), at<T>(p[13]), at<T>(p[14]), at<T>(p[15])},
        at<T>(p[16]), at<T>(p[17]), at<T>(p[18]),
        {at<void>(p[19]), at<void>(p[20]), at<void>(p[21]), at<void>(p[22])},
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11],
        {n[12], n[13] != 0, n[14] != 0, n[15] != 0}, n[16] != 0, smoothing,
    };
    bool has_memory = true, is_bad = false;
    Int bad = 0;
    Py_BEGIN_ALLOW_THREADS
    is_bad = finds_bad_label(job, bad);
    if (!is_bad) try {
            train_on(machine, job);
            count_steps(job);
        } catch (const std::bad_alloc &) {  // before the first step
            has_memory = false;
        }
    Py_END_ALLOW_THREADS
    if (is_bad) return PyErr_Format(PyExc_IndexError, "Target %lld is out of bounds.", static_cast<long long>(bad));
    if (!has_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *train_mlp(PyObject *, PyObject *args) {
    PyObject *addresses, *numbers;
    int machine, is_double;
    double smoothing;
    Int p[23], n[17];
    if (!PyArg_ParseTuple(args, "ipOOd", &machine, &is_double, &addresses, &numbers, &smoothing)) return nullptr;
    if (!read(addresses, p, 23) || !read(numbers, n, 17)) return nullptr;
    if (!runs_on(machine)) return PyErr_Format(PyExc_ValueError, "machine %d is another one than this", machine);
    return is_double ? run<double>(machine, p, n, smoothing) : run<float>(machine, p, n, smoothing);
}

// The first of `size` labels that is none of a class, or None.
PyObject *bad_label(PyObject *, PyObject *args) {
    Int address, stride, size, classes, ignore_index;
    if (!PyArg_ParseTuple(args, "LLLLL", &address, &stride, &size, &classes, &ignore_index)) return nullptr;
    for (Int i = 0; i < size; ++i) {
        const Int label = at<Int>(address)[i * stride];
        if (is_bad(label, classes, ignore_index)) return PyLong_FromLongLong(label);
    }
    Py_RETURN_NONE;
}

PyObject *machines(PyObject *, PyObject *) {
    PyObject *found = PyDict_New();
    for (int machine = PLAIN; found && machine <= AVX512; ++machine) {
        if (!runs_on(machine)) continue;
        PyObject *number = PyLong_FromLong(machine);
        if (!number || PyDict_SetItemString(found, MACHINES[machine], number) < 0) Py_CLEAR(found);
        Py_XDECREF(number);
    }
    return found;
}

PyMethodDef methods[] = {
    {"train_mlp", train_mlp, METH_VARARGS,
     "train_mlp(machine, is_double, addresses, numbers, smoothing): the members of Job, in their order."},
    {"bad_label", bad_label, METH_VARARGS,
     "bad_label(address, stride, size, classes, ignore_index): the first of the int64 labels out of range, or None."},
    {"facts", facts, METH_VARARGS, "facts(items, attributes, lengths, keys, gone): those of fusednn/reading/facts.py's Facts, for hold."},
    {"hold", hold, METH_O, "hold(facts): whether all is as it was."},
    {"machines", machines, METH_NOARGS, "The kinds of machine that this one is, and their numbers; the last is the best."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef_Slot slots[] = {{0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fusednn._native", "Training steps in C++.", 0, methods, slots, nullptr, nullptr, nullptr,
};
}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&module); }
