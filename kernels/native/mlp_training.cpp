// Whole training steps of Linear, ReLU, Linear with cross entropy on a CPU, as many as asked, in one call.
//
//     h = relu(x W1ᵀ + b1)        y = h W2ᵀ + b2           loss = cross entropy of y
//     dW2 = dyᵀ h                 db2 = Σ dy               dh = dy W2 where not (h <= 0)
//     dW1 = dhᵀ x                 db1 = Σ dh               then the optimizer's step (../adam.py) on each
//
// The same step as ../mlp_training.py, in the same order and with its names, by one thread. Every product below is
// c[m, n] += Σ_k a[m, k] b[k, n] with n innermost in b and c: a number of a is multiplied with a vector of b, and no sum
// is split among the lanes of a vector, so nothing is added up in an order that the compiler chooses. For the forward and
// for dh, n is the row of the batch; so x, h, dh and dy lie as [features, batch]. For dW1 and dW2, n is the feature, and
// x and h lie as [batch, features] beside them. Rows are padded to whole vectors: what stands in the padding is computed
// and never read. Where each sum is added up does not depend on the batch around it, so the bits repeat on one machine;
// machines with other vectors, or without a fused multiply-add, round differently.
//
// Whoever calls this has checked every shape, dtype, stride and pointer: fusednn/training/native.py does.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>

#if !defined(__GNUC__)
#error "needs the vector types of GCC and Clang"  // without this file fusednn trains on CPUs as PyTorch does
#endif
#if !defined(__has_builtin)
#define __has_builtin(name) 0  // GCC 9
#endif
#define INLINE inline __attribute__((always_inline))  // into the functions for each kind of machine, at the end

namespace {

typedef int64_t Int;

// The places in a row of the optimizer's table: fusednn/training/optimizers.py.
enum { STEP_SIZE, DECAY, SHRINK, SIGN, MOMENTUM, UNDAMPED, ROOT = 4, EPS, GRAD_PART, SQUARE_KEPT, SQUARE_PART, ROW };
enum Rule { ADAM, SGD, HEAVY_BALL, NESTEROV };  // fusednn/training/native.py has their names in this order
enum { W1, B1, W2, B2, PARAMETERS };

// What train_mlp of ../mlp_training.py is given.
template <class T>
struct Job {
    const T *x;                // [rows, I], any strides
    const Int *targets;        // [rows], any stride
    const Int *order;          // the rows of the steps, one after the other
    const T *class_weight;     // [O], or none
    T *weights[PARAMETERS];    // W1 [H, I], b1 [H] or none, W2 [O, H], b2 [O] or none
    T *firsts[PARAMETERS], *seconds[PARAMETERS];  // the state of each, as far as the rule has one
    const T *table;            // [steps, PARAMETERS, ROW]
    T *losses, *accuracies;    // [steps]; the second or none
    Int stride_xm, stride_xi, stride_t, I, H, O, batch, epoch_rows, position, steps, ignore_index, rule;
    double smoothing;
    bool mean, coupled, decoupled, maximize;
};

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

constexpr Int TILE_M = 4;               // rows of a whose sums are held in registers, two vectors each
constexpr Int TILE_K = 256;             // so many rows of b, two vectors wide, stay in the L1 cache
constexpr Int GRAD_M = 16, GRAD_N = 256;  // the part of dW that is computed and used at a time, in the L1 cache too

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
            const T *b_kn = b + k * stride_b + n;
            Int m = 0;
            for (; m + TILE_M <= M; m += TILE_M)
                product_tile<T, BYTES, TILE_M>(
                    c + m * stride_c + n, stride_c, a + m * stride_am + k * stride_ak, stride_am, stride_ak, b_kn,
                    stride_b, size
                );
            for (; m + 2 <= M; m += 2)  // 10 outputs are 4, 4 and 2
                product_tile<T, BYTES, 2>(
                    c + m * stride_c + n, stride_c, a + m * stride_am + k * stride_ak, stride_am, stride_ak, b_kn,
                    stride_b, size
                );
            for (; m < M; ++m)
                product_tile<T, BYTES, 1>(
                    c + m * stride_c + n, stride_c, a + m * stride_am + k * stride_ak, stride_am, stride_ak, b_kn,
                    stride_b, size
                );
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

// Make the step on n numbers of w, whose gradient is g, and of their state m and v. Uses up g.
template <class T>
INLINE void update(
    const Job<T> &job, T *__restrict w, T *__restrict m, T *__restrict v, T *__restrict g, const T *row, Int n
) {
    if (job.maximize)
        for (Int i = 0; i < n; ++i) g[i] *= row[SIGN];
    if (job.coupled)
        for (Int i = 0; i < n; ++i) g[i] += row[DECAY] * w[i];
    if (job.decoupled)
        for (Int i = 0; i < n; ++i) w[i] *= row[SHRINK];
    const T step_size = row[STEP_SIZE];
    if (job.rule == ADAM) {
        const T root = row[ROOT], eps = row[EPS];
        const T grad_part = row[GRAD_PART], square_kept = row[SQUARE_KEPT], square_part = row[SQUARE_PART];
        for (Int i = 0; i < n; ++i) {
            m[i] += grad_part * (g[i] - m[i]);
            v[i] = square_kept * v[i] + square_part * g[i] * g[i];
            w[i] -= step_size * (m[i] / (std::sqrt(v[i]) * root + eps));
        }
    } else if (job.rule == SGD) {
        for (Int i = 0; i < n; ++i) w[i] -= step_size * g[i];
    } else {
        const T momentum = row[MOMENTUM], undamped = row[UNDAMPED];
        for (Int i = 0; i < n; ++i) m[i] = momentum * m[i] + undamped * g[i];
        if (job.rule == NESTEROV)
            for (Int i = 0; i < n; ++i) w[i] -= step_size * (g[i] + momentum * m[i]);
        else
            for (Int i = 0; i < n; ++i) w[i] -= step_size * m[i];
    }
}

// dW = dyᵀ x of dy [M, batch] and x [batch, N], a part at a time, and the step with it on parameter p.
template <class T, int BYTES>
INLINE void backward_weight(
    const Job<T> &job, int p, const T *row, const T *dy, Int stride_dy, const T *x, Int stride_x, T *dw, Int M, Int N, Int size
) {
    for (Int m = 0; m < M; m += GRAD_M)
        for (Int n = 0; n < N; n += GRAD_N) {
            const Int rows = std::min(GRAD_M, M - m), columns = std::min(GRAD_N, N - n);
            std::fill(dw, dw + rows * GRAD_N, T(0));
            product<T, BYTES>(dw, GRAD_N, dy + m * stride_dy, stride_dy, 1, x + n, stride_x, rows, columns, size);
            for (Int r = 0; r < rows; ++r) {
                const Int offset = (m + r) * N + n;
                T *first = job.firsts[p] ? job.firsts[p] + offset : nullptr;
                T *second = job.seconds[p] ? job.seconds[p] + offset : nullptr;
                update(job, job.weights[p] + offset, first, second, dw + r * GRAD_N, row + p * ROW, columns);
            }
        }
}

// db = Σ dy of dy [M, batch], and the step with it on parameter p. Each of 8 lanes adds up every eighth row of the batch,
// since an addition waits for the one before it.
template <class T>
INLINE void backward_bias(const Job<T> &job, int p, const T *row, const T *dy, Int stride_dy, T *db, Int M, Int size) {
    if (!job.weights[p]) return;
    for (Int m = 0; m < M; ++m, dy += stride_dy) {
        T sums[8] = {};
        Int b = 0;
        for (; b + 8 <= size; b += 8)
            for (int i = 0; i < 8; ++i) sums[i] += dy[b + i];
        for (; b < size; ++b) sums[b % 8] += dy[b];
        db[m] = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
    update(job, job.weights[p], job.firsts[p], job.seconds[p], db, row + p * ROW, M);
}

template <class T>
struct Sums {
    T loss = 0, weight = 0, counted = 0, right = 0;
};

// Of logits y [O, batch]: dy in their place, which is not yet divided for the mean, and the sums over the rows.
template <class T>
INLINE Sums<T> loss_rows(const Job<T> &job, const Int *rows, T *y, Int stride_y, T *largest, T *total, Int size) {
    const Int O = job.O;
    const bool smoothed = job.smoothing > 0;
    const T share = T(job.smoothing / double(O));
    Sums<T> sums;
    if (job.accuracies)
        for (Int b = 0; b < size; ++b) {
            Int first = 0;  // the first of several; NaN is the largest
            for (Int o = 1; o < O; ++o) {
                const T value = y[o * stride_y + b], best = y[first * stride_y + b];
                if (value > best || (std::isnan(value) && !std::isnan(best))) first = o;
            }
            const Int label = job.targets[rows[b] * job.stride_t];
            sums.right += label != job.ignore_index && label == first;
        }

    std::fill(largest, largest + size, -std::numeric_limits<T>::infinity());
    std::fill(total, total + size, T(0));
    for (Int o = 0; o < O; ++o)
        for (Int b = 0; b < size; ++b) largest[b] = largest[b] < y[o * stride_y + b] ? y[o * stride_y + b] : largest[b];
    for (Int o = 0; o < O; ++o)
        for (Int b = 0; b < size; ++b) y[o * stride_y + b] -= largest[b];  // shifted

    for (Int b = 0; b < size; ++b) {  // the parts of the losses that are linear in the logits
        const Int label = job.targets[rows[b] * job.stride_t];
        largest[b] = 0;  // from here on the loss, and only of rows that count
        if (label == job.ignore_index) continue;
        sums.counted += 1;
        if (label < 0 || label >= O) {
            largest[b] = std::numeric_limits<T>::quiet_NaN();
            continue;
        }
        const T weight = job.class_weight ? job.class_weight[label] : T(1);
        sums.weight += weight;
        largest[b] -= weight * T(1 - job.smoothing) * y[label * stride_y + b];
        if (smoothed) {
            T shifted = 0;
            for (Int o = 0; o < O; ++o) shifted += (job.class_weight ? job.class_weight[o] : T(1)) * y[o * stride_y + b];
            largest[b] -= share * shifted;
        }
    }

    for (Int o = 0; o < O; ++o)
        for (Int b = 0; b < size; ++b) y[o * stride_y + b] = std::exp(y[o * stride_y + b]);
    for (Int o = 0; o < O; ++o)
        for (Int b = 0; b < size; ++b) total[b] += y[o * stride_y + b];

    T all_weights = 0;
    for (Int o = 0; o < O; ++o) all_weights += job.class_weight ? job.class_weight[o] : T(0);
    for (Int b = 0; b < size; ++b) {
        const Int label = job.targets[rows[b] * job.stride_t];
        if (label == job.ignore_index || label < 0 || label >= O) {
            const T nothing = label == job.ignore_index ? T(0) : std::numeric_limits<T>::quiet_NaN();
            for (Int o = 0; o < O; ++o) y[o * stride_y + b] = nothing;
            sums.loss += largest[b];
            continue;
        }
        const T weight = job.class_weight ? job.class_weight[label] : T(1), kept = weight * T(1 - job.smoothing);
        const T mass = smoothed && job.class_weight ? kept + share * all_weights : weight;
        sums.loss += largest[b] + mass * std::log(total[b]);
        const T scale = mass / total[b];
        for (Int o = 0; o < O; ++o) {
            T &dy = y[o * stride_y + b];
            dy = dy * scale - (smoothed ? share * (job.class_weight ? job.class_weight[o] : T(1)) : T(0));
        }
        y[label * stride_y + b] -= kept;
    }
    return sums;
}

// job.steps steps, the first one job.position rows into an epoch.
template <class T, int BYTES>
INLINE void train(const Job<T> &job) {
    const Int I = job.I, H = job.H, O = job.O, batch = std::max(Int(1), job.batch);
    const Int stride_b = padded<T, BYTES>(batch), stride_i = padded<T, BYTES>(I), stride_h = padded<T, BYTES>(H);
    Buffer<T> x(batch * stride_i), x_t(I * stride_b), h(H * stride_b), h_t(batch * stride_h), dh(H * stride_b);
    Buffer<T> y(O * stride_b), dw(GRAD_M * GRAD_N), db(std::max(H, O)), largest(batch), total(batch);
    const Int *rows = job.order;
    Int position = job.position;
    for (Int step = 0; step < job.steps; ++step) {
        const Int size = std::min(job.batch, job.epoch_rows - position);
        for (Int b = 0; b < size; ++b)
            for (Int i = 0; i < I; ++i) x[b * stride_i + i] = job.x[rows[b] * job.stride_xm + i * job.stride_xi];
        transpose<T>(x_t, stride_b, x, stride_i, size, I);

        for (Int j = 0; j < H; ++j) std::fill_n(h + j * stride_b, stride_b, job.weights[B1] ? job.weights[B1][j] : T(0));
        product<T, BYTES>(h, stride_b, job.weights[W1], I, 1, x_t, stride_b, H, size, I);
        for (Int i = 0; i < H * stride_b; ++i) h[i] = h[i] <= 0 ? T(0) : h[i];  // NaN passes
        transpose<T>(h_t, stride_h, h, stride_b, H, size);
        for (Int o = 0; o < O; ++o) std::fill_n(y + o * stride_b, stride_b, job.weights[B2] ? job.weights[B2][o] : T(0));
        product<T, BYTES>(y, stride_b, job.weights[W2], H, 1, h, stride_b, O, size, H);

        const Sums<T> sums = loss_rows<T>(job, rows, y, stride_b, largest, total, size);
        job.losses[step] = job.mean ? sums.loss / sums.weight : sums.loss;
        if (job.accuracies) job.accuracies[step] = sums.right / sums.counted;
        const T scale = job.mean && sums.counted > 0 ? 1 / sums.weight : T(1);  // no rows: no gradient
        for (Int o = 0; o < O; ++o)
            for (Int b = 0; b < size; ++b) y[o * stride_b + b] *= scale;  // dy

        const T *row = job.table + step * PARAMETERS * ROW;
        std::fill_n(dh.p, H * stride_b, T(0));
        product<T, BYTES>(dh, stride_b, job.weights[W2], 1, H, y, stride_b, H, size, O);
        for (Int i = 0; i < H * stride_b; ++i) dh[i] = h[i] <= 0 ? T(0) : dh[i];
        backward_weight<T, BYTES>(job, W2, row, y, stride_b, h_t, stride_h, dw, O, H, size);
        backward_bias<T>(job, B1, row, dh, stride_b, db, H, size);
        backward_weight<T, BYTES>(job, W1, row, dh, stride_b, x, stride_i, dw, H, I, size);
        backward_bias<T>(job, B2, row, y, stride_b, db, O, size);

        rows += size;
        position = position + size >= job.epoch_rows ? 0 : position + size;
    }
}

// The same for each kind of machine. Flatten puts all of it into one function, compiled for that kind.
template <class T>
void train_plain(const Job<T> &job) {
    train<T, 16>(job);
}
#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2,fma"), flatten)) void train_avx2(const Job<T> &job) {
    train<T, 32>(job);
}
template <class T>
__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"), flatten)) void train_avx512(const Job<T> &job) {
    train<T, 64>(job);
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
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], smoothing,
        n[12] != 0, n[13] != 0, n[14] != 0, n[15] != 0,
    };
    bool done = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        train_on(machine, job);
    } catch (const std::bad_alloc &) {  // before the first step
        done = false;
    }
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *train_mlp(PyObject *, PyObject *args) {
    PyObject *addresses, *numbers;
    int machine, is_double;
    double smoothing;
    Int p[19], n[16];
    if (!PyArg_ParseTuple(args, "ipOOd", &machine, &is_double, &addresses, &numbers, &smoothing)) return nullptr;
    if (!read(addresses, p, 19) || !read(numbers, n, 16)) return nullptr;
    if (!runs_on(machine)) return PyErr_Format(PyExc_ValueError, "machine %d is another one than this", machine);
    return is_double ? run<double>(machine, p, n, smoothing) : run<float>(machine, p, n, smoothing);
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
    {"machines", machines, METH_NOARGS, "The kinds of machine that this one is, and their numbers; the last is the best."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef_Slot slots[] = {{0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fusednn._native", "Training steps in C++.", 0, methods, slots, nullptr, nullptr, nullptr,
};
}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&module); }
