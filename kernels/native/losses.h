// The loss of a batch and its gradient. The formulas are in ../losses.py. With l of a row, and s its weight, or 1:
//
//     scale Σ s l / Σ s w  for a mean, and  scale Σ s l  for a sum
//
// A loss with one for each output is l = Σ_o w_o e(y_o, t_o), and w how many they are. Cross entropy is
//
//     l = - Σ_o q_o log softmax(y)_o,  with q_o = w_o ((1 - smoothing) t_o + smoothing / classes)
//
// and t_o = [o = label], where w is the weight of the label, or a probability, where w is 1. Rows lie along vectors:
// what a row gets does not depend on others. What is added up over rows is a double.

#pragma once

#include <cmath>

#include "functions.h"
#include "step.h"

namespace fusednn {
namespace {

// Of each of a vector of rows: its l and w, how many answers count, and how many of these are right.
template <class V>
struct Rows {
    static constexpr Int SIZE = sizeof(V) / sizeof(Number<V>);
    Number<V> loss[SIZE] = {}, weight[SIZE] = {}, counted[SIZE] = {}, right[SIZE] = {};
};

struct Sums {
    double loss = 0, weight = 0, counted = 0, right = 0;

    // Add those rows, each of the loss and the divisor times its weight.
    template <class V>
    INLINE void add(const Rows<V> &rows, V weights, Int columns) {
        for (Int b = 0; b < columns; ++b) {
            loss += double(weights[b]) * rows.loss[b];
            if (rows.counted[b]) weight += double(weights[b]) * rows.weight[b];  // else its weight may be NaN
            counted += rows.counted[b];
            right += rows.right[b];
        }
    }
};

// The targets [O, a vector of rows] of a loss on numbers. The last row also stands behind the last one.
template <class V>
struct Targets {
    typedef Number<V> T;
    static constexpr Int SIZE = Rows<V>::SIZE;
    const T *row[SIZE];
    Int stride;

    INLINE Targets(const Job<T> &job, const Int *rows, Int columns) : stride(job.stride_to) {
        for (Int b = 0; b < SIZE; ++b)
            row[b] = static_cast<const T *>(job.targets) + rows[std::min(b, columns - 1)] * job.stride_tm;
    }
    INLINE V operator()(Int o) const {
        V t{};
        for (Int b = 0; b < SIZE; ++b) t[b] = row[b][o * stride];
        return t;
    }
};

// The loss of an output, and its slope.
template <class V>
struct Element {
    V loss, slope;
};

template <class V>
INLINE V sign(V x) {  // 0 of NaN, as in PyTorch
    return x > 0 ? V{} + 1 : x < 0 ? V{} - 1 : V{};
}
template <class V>
INLINE Element<V> mse(V d) {
    return {d * d, 2 * d};
}
template <class V>
INLINE Element<V> l1(V d) {
    return {abs(d), sign(d)};
}
template <class V>
INLINE Element<V> smooth_l1(V d, Number<V> beta) {
    const V z = abs(d);
    return {z < beta ? Number<V>(0.5) * z * z / beta : z - Number<V>(0.5) * beta, z >= beta ? sign(d) : d / beta};
}
template <class V>
INLINE Element<V> huber(V d, Number<V> delta) {
    const V z = abs(d);
    const auto is_far = z > delta;
    return {is_far ? delta * (z - Number<V>(0.5) * delta) : Number<V>(0.5) * z * z, is_far ? delta * sign(d) : d};
}
template <class V>
INLINE Element<V> poisson_nll(V y, V t) {
    const V e = y < std::numeric_limits<Number<V>>::infinity() ? exp(y) : y;  // rounded before it is less something
    return {e - t * y, e - t};
}

// Of a logit, with the weight of a positive target, or null for none.
template <class V>
INLINE Element<V> bce_with_logits(V y, V t, const Number<V> *positive) {
    const V e = exp(-abs(y)), sigmoid = (y < 0 ? e : V{} + 1) / (1 + e), log_sigmoid = (y < 0 ? y : V{}) - log1p(e);
    if (!positive) return {(1 - t) * y - log_sigmoid, sigmoid - t};
    const V share = *positive * t;
    return {(1 - t) * y - ((*positive - 1) * t + 1) * log_sigmoid, (share + 1 - t) * sigmoid - share};
}

// Of rows of outputs y [O, a vector]: dy in their place, by `element_of` a y, a target and an o.
template <class V, class T, class Of>
INLINE Rows<V> output_losses(const Step<T> &step, const Targets<V> &targets, T *y, Int stride_y, Of element_of) {
    constexpr Int PART = 256;  // so many are added up before they are added to others
    const Int O = step.layer[step.layers - 1].outputs;
    V total{}, right{};
    for (Int from = 0; from < O; from += PART) {
        V part{};
        for (Int o = from; o < std::min(O, from + PART); ++o) {
            const V output = load<V>(y + o * stride_y), target = targets(o);
            const Element<V> of = element_of(output, target, o);
            const T weight = step.class_weight ? step.class_weight[o] : T(1);
            part += weight * of.loss;
            store(y + o * stride_y, weight * of.slope);
            if (step.accuracy) right += (output > 0) == (target > T(0.5)) ? V{} + 1 : V{};
        }
        total += part;
    }
    Rows<V> sums;
    store(sums.loss, total);
    store(sums.right, right);
    std::fill_n(sums.weight, Rows<V>::SIZE, T(O));
    std::fill_n(sums.counted, Rows<V>::SIZE, T(O));
    return sums;
}

// The largest of a vector of rows of numbers, `at` of O, and where its first is. NaN is larger than any, but is not
// `value`.
template <class V>
struct Largest {
    V value;
    Bits<V> first;

    template <class At>
    INLINE Largest(At at, Int O, bool finds_first) {
        value = V{} - std::numeric_limits<Number<V>>::infinity();
        for (Int o = 0; o < O; ++o) {
            const V next = at(o);
            value = value < next ? next : value;
        }
        first = Bits<V>{};
        V best = at(0);
        for (Int o = 1; finds_first && o < O; ++o) {
            const V next = at(o);
            const auto better = (next > best) | ((next != next) & (best == best));
            first = better ? Bits<V>{} + typename Lanes<V>::Bit(o) : first;
            best = better ? next : best;
        }
    }
};

// Of a vector of rows of logits: e^(y - largest) in their place and the sum of these; and, if some are to be,
// Σ q and Σ q (y - largest) over outputs.
template <class V>
struct Softmax {
    V total{}, mass{}, spread{};

    template <class T, class Q>
    INLINE Softmax(T *y, Int stride_y, Int O, V largest, bool adds_up, Q q) {
        for (Int o = 0; o < O; ++o) {
            const V shifted = load<V>(y + o * stride_y) - largest, e = exp(shifted);
            if (adds_up) {
                const V part = q(o);
                mass += part;
                spread += part * shifted;
            }
            store(y + o * stride_y, e);
            total += e;
        }
    }
};

// What cross entropy has of its options: `share` of a weight for each class, and `certain` for the target.
template <class T>
struct Smoothing {
    T certain, share;
    INLINE Smoothing(const Step<T> &step, const Job<T> &job)
        : certain(step.loss.smoothed ? T(1 - job.label_smoothing) : T(1)),
          share(step.loss.smoothed ? T(job.label_smoothing / double(step.layer[step.layers - 1].outputs)) : T(0)) {}
};

// Of `columns` rows of logits y [O, a vector]: dy in their place.
template <class V, class T>
INLINE Rows<V> cross_entropy(
    const Step<T> &step, const Job<T> &job, const Int *rows, T *y, Int stride_y, Int columns
) {
    const Int O = step.layer[step.layers - 1].outputs;
    const bool smoothed = step.loss.smoothed;
    const Smoothing<T> smoothing(step, job);
    const auto weight_of = [&](Int o) INLINED { return step.class_weight ? step.class_weight[o] : T(1); };
    const Largest<V> largest([&](Int o) INLINED { return load<V>(y + o * stride_y); }, O, step.accuracy);

    Int labels[Rows<V>::SIZE];
    T of_label[Rows<V>::SIZE];
    for (Int b = 0; b < columns; ++b) {
        const Int label = job.label(rows[b]);
        labels[b] = label >= 0 && label < O && label != job.ignore_index ? label : -1;
        if (labels[b] >= 0) of_label[b] = y[label * stride_y + b] - largest.value[b];
    }
    const auto share_of = [&](Int o) INLINED { return V{} + smoothing.share * weight_of(o); };
    const Softmax<V> softmax(y, stride_y, O, largest.value, smoothed, share_of);

    Rows<V> sums;
    V scale{};
    for (Int b = 0; b < columns; ++b) {
        if (labels[b] < 0) continue;
        const T weight = weight_of(labels[b]), kept = weight * smoothing.certain;
        const T mass = smoothed && step.class_weight ? kept + softmax.mass[b] : weight;
        scale[b] = mass / softmax.total[b];
        sums.loss[b] = -kept * of_label[b] - softmax.spread[b] + mass * std::log(softmax.total[b]);
        sums.weight[b] = weight;
        sums.counted[b] = 1;
        sums.right[b] = labels[b] == Int(largest.first[b]);
    }

    for (Int o = 0; o < O; ++o)
        store(y + o * stride_y, load<V>(y + o * stride_y) * scale - (smoothed ? share_of(o) : V{}));
    for (Int b = 0; b < columns; ++b) {
        if (labels[b] >= 0) {
            y[labels[b] * stride_y + b] -= weight_of(labels[b]) * smoothing.certain;
            continue;
        }
        const bool ignored = job.label(rows[b]) == job.ignore_index;
        const T value = ignored ? T(0) : std::numeric_limits<T>::quiet_NaN();
        for (Int o = 0; o < O; ++o) y[o * stride_y + b] = value;
        sums.counted[b] = ignored ? 0 : 1;
        sums.loss[b] = value;
    }
    return sums;
}

// The same where the targets are probabilities.
template <class V, class T>
INLINE Rows<V> cross_entropy_probabilities(
    const Step<T> &step, const Job<T> &job, const Targets<V> &targets, T *y, Int stride_y
) {
    const Int O = step.layer[step.layers - 1].outputs;
    const Smoothing<T> smoothing(step, job);
    const auto q = [&](Int o) INLINED {
        const T weight = step.class_weight ? step.class_weight[o] : T(1);
        return weight * (targets(o) * smoothing.certain + smoothing.share);
    };
    const Largest<V> largest([&](Int o) INLINED { return load<V>(y + o * stride_y); }, O, step.accuracy);
    const Largest<V> target(targets, step.accuracy ? O : 0, true);
    const Softmax<V> softmax(y, stride_y, O, largest.value, true, q);
    const V scale = softmax.mass / softmax.total;
    for (Int o = 0; o < O; ++o) store(y + o * stride_y, load<V>(y + o * stride_y) * scale - q(o));
    Rows<V> sums;
    for (Int b = 0; b < Rows<V>::SIZE; ++b) {
        sums.loss[b] = softmax.mass[b] * std::log(softmax.total[b]) - softmax.spread[b];
        sums.weight[b] = sums.counted[b] = 1;
        sums.right[b] = largest.first[b] == target.first[b];
    }
    return sums;
}

// Of `columns` rows of outputs y [O, a vector]: dy in their place, of the sum of their l.
template <class V, class T>
INLINE Rows<V> losses_of(const Step<T> &step, const Job<T> &job, const Int *rows, T *y, Int stride_y, Int columns) {
    if (step.loss.name == CROSS_ENTROPY) return cross_entropy<V>(step, job, rows, y, stride_y, columns);
    const Targets<V> targets(job, rows, columns);
    if (step.loss.name == CROSS_ENTROPY_PROBABILITIES)
        return cross_entropy_probabilities<V>(step, job, targets, y, stride_y);
    const T number = T(step.loss.numbers[0]);
    const auto by = [&](auto element) INLINED { return output_losses<V>(step, targets, y, stride_y, element); };
    switch (step.loss.name) {
    case MSE: return by([](V y, V t, Int) INLINED { return mse(y - t); });
    case L1: return by([](V y, V t, Int) INLINED { return l1(y - t); });
    case SMOOTH_L1: return by([=](V y, V t, Int) INLINED { return smooth_l1(y - t, number); });
    case HUBER: return by([=](V y, V t, Int) INLINED { return huber(y - t, number); });
    case POISSON_NLL: return by([](V y, V t, Int) INLINED { return poisson_nll(y, t); });
    default:
        return by([&](V y, V t, Int o) INLINED {
            return bce_with_logits(y, t, step.pos_weight ? step.pos_weight + o : nullptr);
        });
    }
}

// Of the outputs y [O, batch] of step s, on `size` rows: dy in their place, its loss and its accuracy.
template <class T, int BYTES>
INLINE void batch_loss(const Step<T> &step, const Job<T> &job, Int s, const Int *rows, T *y, Int stride_b, Int size) {
    const Int O = step.layer[step.layers - 1].outputs;
    Sums sums;
    const auto by_vectors = [&](auto zero) INLINED {
        typedef decltype(zero) V;
        for (Int b = 0; b < size; b += Rows<V>::SIZE) {
            const Int columns = std::min(Rows<V>::SIZE, size - b);
            const Rows<V> found = losses_of<V>(step, job, rows + b, y + b, stride_b, columns);
            V weights = V{} + 1;
            for (Int i = 0; step.loss.rows_weighted && i < columns; ++i)
                weights[i] = job.sample_weight[rows[b + i] * job.stride_w];
            sums.add(found, weights, columns);
            for (Int i = 0; step.loss.rows_weighted && i < columns; ++i)
                if (!found.counted[i]) weights[i] = 0;
            for (Int o = 0; step.loss.rows_weighted && o < O; ++o)
                store(y + o * stride_b + b, load<V>(y + o * stride_b + b) * weights);
        }
    };
    if (BYTES > FEW_BYTES && stride_b == LANES<T, FEW_BYTES>)
        by_vectors(Vector<T, FEW_BYTES>{});
    else
        by_vectors(Vector<T, BYTES>{});
    if (sums.weight == 0 && !step.loss.rows_weighted)
        sums.weight = std::numeric_limits<T>::quiet_NaN();  // 0 / 0, whatever smoothing adds
    const double scale = step.loss.scaled ? job.row(step, s)[LOSS_SCALE] : T(1);
    const double divisor = step.loss.mean ? sums.weight : 1;
    job.losses[s] = T(scale * sums.loss / divisor);
    if (step.accuracy) job.accuracies[s] = T(sums.right / sums.counted);
    const T factor = sums.counted > 0 ? T(scale / divisor) : T(1);  // no rows: no gradient
    for (Int i = 0; i < O * stride_b; ++i) y[i] *= factor;
}

}  // namespace
}  // namespace fusednn
