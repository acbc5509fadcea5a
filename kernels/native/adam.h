// One step of an optimizer on a part of a parameter: Adam and AdamW, and SGD with and without momentum. The formulas
// are in ../adam.py, whose `update` this is; the numbers that it needs come as a row for each step and parameter.

#pragma once

#include <cmath>

#include "products.h"

namespace {

// The places in a row of the table: fusednn/training/optimizers.py.
enum { STEP_SIZE, DECAY, SHRINK, SIGN, MOMENTUM, UNDAMPED, ROOT = 4, EPS, GRAD_PART, SQUARE_KEPT, SQUARE_PART, ROW };
enum Rule : Int { ADAM, SGD, HEAVY_BALL, NESTEROV };  // fusednn/training/native.py has their names in this order

struct Kind {
    Int rule;
    bool coupled, decoupled, maximize;
};

// Make the step on n numbers of w, whose gradient is g, and of their state m and v. Uses up g.
template <class T>
INLINE void update(T *__restrict w, T *__restrict m, T *__restrict v, T *__restrict g, Int n, const T *row, Kind kind) {
    if (kind.maximize)
        for (Int i = 0; i < n; ++i) g[i] *= row[SIGN];
    if (kind.coupled && row[DECAY] != 0)  // w may be infinite
        for (Int i = 0; i < n; ++i) g[i] += row[DECAY] * w[i];
    if (kind.decoupled)
        for (Int i = 0; i < n; ++i) w[i] *= row[SHRINK];
    const T step_size = row[STEP_SIZE];
    if (kind.rule == ADAM) {
        const T root = row[ROOT], eps = row[EPS];
        const T grad_part = row[GRAD_PART], square_kept = row[SQUARE_KEPT], square_part = row[SQUARE_PART];
        for (Int i = 0; i < n; ++i) {
            m[i] += grad_part * (g[i] - m[i]);
            v[i] = square_kept * v[i] + square_part * g[i] * g[i];
            w[i] -= step_size * (m[i] / (std::sqrt(v[i]) * root + eps));
        }
    } else if (kind.rule == SGD) {
        for (Int i = 0; i < n; ++i) w[i] -= step_size * g[i];
    } else {
        const T momentum = row[MOMENTUM], undamped = row[UNDAMPED];
        for (Int i = 0; i < n; ++i) m[i] = momentum * m[i] + undamped * g[i];
        if (kind.rule == NESTEROV)
            for (Int i = 0; i < n; ++i) w[i] -= step_size * (g[i] + momentum * m[i]);
        else
            for (Int i = 0; i < n; ++i) w[i] -= step_size * m[i];
    }
}

}  // namespace
