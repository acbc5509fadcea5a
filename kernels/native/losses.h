// The loss of a batch and its gradient. The formulas are in ../losses.py: cross entropy is
//
//     - Σ_o q_o log softmax(y)_o,  with q_o = w_o ((1 - smoothing) [o = label] + smoothing / classes)
//
// and its mean is over the weights of the labels. Rows lie along vectors: what a row gets does not depend on others.

#pragma once

#include <cmath>

#include "functions.h"
#include "step.h"

namespace fusednn {
namespace {

template <class T>
struct Sums {
    T loss = 0, weight = 0, counted = 0, right = 0;
};

// The largest of a vector of rows of logits y [O], and where its first is. NaN is larger than any, but is not `value`.
template <class V>
struct Largest {
    V value;
    Bits<V> first;

    INLINE Largest(const Number<V> *y, Int stride_y, Int O, bool finds_first) {
        value = V{} - std::numeric_limits<Number<V>>::infinity();
        for (Int o = 0; o < O; ++o) {
            const V next = load<V>(y + o * stride_y);
            value = value < next ? next : value;
        }
        first = Bits<V>{};
        V best = load<V>(y);
        for (Int o = 1; finds_first && o < O; ++o) {
            const V next = load<V>(y + o * stride_y);
            const auto better = (next > best) | ((next != next) & (best == best));
            first = better ? Bits<V>{} + typename Lanes<V>::Bit(o) : first;
            best = better ? next : best;
        }
    }
};

// Of `columns` rows of logits, y [O, a vector]: dy in their place, not yet divided for the mean; and their parts of
// the sums.
template <class V, class T>
INLINE void cross_entropy_rows(
    const Step<T> &step, const Job<T> &job, const Int *rows, T *y, Int stride_y, Int columns, T all_weights,
    Sums<T> &sums
) {
    constexpr Int SIZE = sizeof(V) / sizeof(T);
    const Int O = step.layer[step.layers - 1].outputs;
    const bool smoothed = step.loss.smoothed;
    const T certain = smoothed ? T(1 - job.label_smoothing) : T(1), share = T(job.label_smoothing / double(O));
    const auto weight_of = [&](Int o) INLINED { return step.class_weight ? step.class_weight[o] : T(1); };
    const Largest<V> largest(y, stride_y, O, step.accuracy);

    Int labels[SIZE];
    T of_label[SIZE];
    for (Int b = 0; b < columns; ++b) {
        const Int label = job.targets[rows[b] * job.stride_t];
        labels[b] = label >= 0 && label < O && label != job.ignore_index ? label : -1;
        if (labels[b] >= 0) of_label[b] = y[label * stride_y + b] - largest.value[b];
    }

    V total{}, spread{};
    for (Int o = 0; o < O; ++o) {
        const V shifted = load<V>(y + o * stride_y) - largest.value, e = exp(shifted);
        if (smoothed) spread += weight_of(o) * shifted;
        store(y + o * stride_y, e);
        total += e;
    }

    V scale{};
    for (Int b = 0; b < columns; ++b) {
        if (labels[b] < 0) continue;
        const T weight = weight_of(labels[b]), kept = weight * certain;
        const T mass = smoothed && step.class_weight ? kept + share * all_weights : weight;
        scale[b] = mass / total[b];
        sums.loss += -kept * of_label[b] - (smoothed ? share * spread[b] : T(0)) + mass * std::log(total[b]);
        sums.weight += weight;
        sums.counted += 1;
        sums.right += labels[b] == Int(largest.first[b]);
    }

    for (Int o = 0; o < O; ++o)
        store(y + o * stride_y, load<V>(y + o * stride_y) * scale - (smoothed ? share * weight_of(o) : T(0)));
    for (Int b = 0; b < columns; ++b) {
        if (labels[b] >= 0) {
            y[labels[b] * stride_y + b] -= weight_of(labels[b]) * certain;
            continue;
        }
        const bool ignored = job.targets[rows[b] * job.stride_t] == job.ignore_index;
        const T value = ignored ? T(0) : std::numeric_limits<T>::quiet_NaN();
        for (Int o = 0; o < O; ++o) y[o * stride_y + b] = value;
        sums.counted += ignored ? 0 : 1;
        sums.loss += value;
    }
}

// Of the outputs y [O, batch] of a batch: dy in their place; and the sums over its rows.
template <class T, int BYTES>
INLINE Sums<T> cross_entropy(const Step<T> &step, const Job<T> &job, const Int *rows, T *y, Int stride_b, Int size) {
    const Int O = step.layer[step.layers - 1].outputs;
    T all_weights = 0;
    for (Int o = 0; o < O; ++o) all_weights += step.class_weight ? step.class_weight[o] : T(0);
    Sums<T> sums;
    const auto by_vectors = [&](auto zero) INLINED {
        typedef decltype(zero) V;
        constexpr Int SIZE = sizeof(V) / sizeof(T);
        for (Int b = 0; b < size; b += SIZE) {
            const Int columns = std::min(SIZE, size - b);
            cross_entropy_rows<V>(step, job, rows + b, y + b, stride_b, columns, all_weights, sums);
        }
    };
    if (BYTES > FEW_BYTES && stride_b == LANES<T, FEW_BYTES>)
        by_vectors(Vector<T, FEW_BYTES>{});
    else
        by_vectors(Vector<T, BYTES>{});
    if (sums.weight == 0) sums.weight = std::numeric_limits<T>::quiet_NaN();  // 0 / 0, whatever smoothing adds
    const T scale = step.loss.mean && sums.counted > 0 ? 1 / sums.weight : T(1);  // no rows: no gradient
    for (Int i = 0; i < O * stride_b; ++i) y[i] *= scale;
    return sums;
}

}  // namespace
}  // namespace fusednn
