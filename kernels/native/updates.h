// One step of an optimizer on a part of a parameter: Adam and AdamW, and SGD with and without momentum. The formulas
// are in ../updates.py; the numbers that it needs come as a row for each step and parameter.

#pragma once

#include <cmath>

#include "products.h"

namespace fusednn {
namespace {

// Make the step on n numbers of w, whose gradient is g, and of their state m and v. Uses up g.
template <class T>
INLINE void update(T *__restrict w, T *__restrict m, T *__restrict v, T *__restrict g, Int n, const T *row, Rule rule) {
    if (rule.maximize)
        for (Int i = 0; i < n; ++i) g[i] *= row[SIGN];
    if (rule.coupled && row[DECAY] != 0)  // w may be infinite
        for (Int i = 0; i < n; ++i) g[i] += row[DECAY] * w[i];
    if (rule.decoupled)
        for (Int i = 0; i < n; ++i) w[i] *= row[SHRINK];
    const T step_size = row[STEP_SIZE];
    if (rule.name == ADAM) {
        const T root = row[ROOT], eps = row[EPS];
        const T grad_part = row[GRAD_PART], square_kept = row[SQUARE_KEPT], square_part = row[SQUARE_PART];
        for (Int i = 0; i < n; ++i) {
            m[i] += grad_part * (g[i] - m[i]);
            v[i] = square_kept * v[i] + square_part * g[i] * g[i];
            w[i] -= step_size * (m[i] / (std::sqrt(v[i]) * root + eps));
        }
    } else if (rule.name == SGD) {
        for (Int i = 0; i < n; ++i) w[i] -= step_size * g[i];
    } else {
        const T momentum = row[MOMENTUM], undamped = row[UNDAMPED];
        for (Int i = 0; i < n; ++i) m[i] = momentum * m[i] + undamped * g[i];
        if (rule.name == NESTEROV)
            for (Int i = 0; i < n; ++i) w[i] -= step_size * (g[i] + momentum * m[i]);
        else
            for (Int i = 0; i < n; ++i) w[i] -= step_size * m[i];
    }
}

}  // namespace
}  // namespace fusednn
