// One step of an optimizer on a part of a parameter: torch.optim's Adam, RMSprop, Adagrad and SGD, and their kin. The
// formulas are in ../updates.py; the numbers that they need come as a row for each step and parameter.

#pragma once

#include <cmath>

#include "products.h"
#include "step.h"

namespace fusednn {
namespace {

// The numbers of a part of a parameter, which is `from` numbers behind the first, and of its states.
template <class T>
struct Part {
    T *w, *first, *second, *third;

    Part(const Parameter<T> &p, Int from)
        : w(p.weight + from), first(at(p.first, from)), second(at(p.second, from)), third(at(p.third, from)) {}
    static T *at(T *p, Int from) { return p ? p + from : nullptr; }
};

// The rules below make the step on n numbers, whose gradient is g, and may use g up.

template <class T>
INLINE void adam(const Part<T> &part, T *__restrict g, Int n, const T *row, RuleName name) {
    T *__restrict w = part.w, *__restrict m = part.first, *__restrict v = part.second, *__restrict top = part.third;
    const T grad_part = row[GRAD_PART], square_kept = row[SQUARE_KEPT], square_part = row[SQUARE_PART];
    const T step_size = row[STEP_SIZE], grad_step = row[GRAD_STEP], root = row[ROOT], eps = row[EPS];
    const auto moments = [=](Int i) INLINED {
        m[i] += grad_part * (g[i] - m[i]);
        v[i] = square_kept * v[i] + square_part * g[i] * g[i];
    };
    if (name == ADAM) {  // in one loop: in two a step of 64-128-10 takes 1.1 times as long
        for (Int i = 0; i < n; ++i) {
            moments(i);
            w[i] -= step_size * (m[i] / (std::sqrt(v[i]) * root + eps));
        }
        return;
    }
    for (Int i = 0; i < n; ++i) moments(i);
    if (name == AMSGRAD)
        for (Int i = 0; i < n; ++i) {
            top[i] = v[i] > top[i] || v[i] != v[i] ? v[i] : top[i];
            w[i] -= step_size * (m[i] / (std::sqrt(top[i]) * root + eps));
        }
    else if (name == NADAM)
        for (Int i = 0; i < n; ++i) w[i] -= (step_size * m[i] + grad_step * g[i]) / (std::sqrt(v[i]) * root + eps);
    else if (name == RADAM && root == 0)  // v may be infinite
        for (Int i = 0; i < n; ++i) w[i] -= step_size * (m[i] / eps);
    else
        for (Int i = 0; i < n; ++i) w[i] -= step_size * (m[i] / (std::sqrt(v[i]) * root + eps));
}

template <class T>
INLINE void adagrad(const Part<T> &part, T *__restrict g, Int n, const T *row) {
    T *__restrict w = part.w, *__restrict v = part.first;
    const T step_size = row[STEP_SIZE], eps = row[EPS];
    for (Int i = 0; i < n; ++i) {
        v[i] += g[i] * g[i];
        w[i] -= step_size * (g[i] / (std::sqrt(v[i]) + eps));
    }
}

// The mean of the gradients is the last state.
template <class T>
INLINE void rmsprop(const Part<T> &part, T *__restrict g, Int n, const T *row, RuleName name) {
    const bool heavy = name == RMSPROP_MOMENTUM || name == RMSPROP_CENTERED_MOMENTUM;
    const bool centered = name == RMSPROP_CENTERED || name == RMSPROP_CENTERED_MOMENTUM;
    T *__restrict w = part.w, *__restrict v = part.first, *__restrict m = part.second;
    T *__restrict mean = heavy ? part.third : part.second;
    const T square_kept = row[SQUARE_KEPT], square_part = row[SQUARE_PART], grad_part = row[GRAD_PART];
    const T step_size = row[STEP_SIZE], momentum = row[MOMENTUM], eps = row[EPS];
    for (Int i = 0; i < n; ++i) v[i] = square_kept * v[i] + square_part * g[i] * g[i];
    if (centered)
        for (Int i = 0; i < n; ++i) {
            mean[i] += grad_part * (g[i] - mean[i]);
            g[i] /= std::sqrt(v[i] - mean[i] * mean[i]) + eps;
        }
    else
        for (Int i = 0; i < n; ++i) g[i] /= std::sqrt(v[i]) + eps;
    if (heavy)
        for (Int i = 0; i < n; ++i) g[i] = m[i] = momentum * m[i] + g[i];
    for (Int i = 0; i < n; ++i) w[i] -= step_size * g[i];
}

template <class T>
INLINE void sgd(const Part<T> &part, T *__restrict g, Int n, const T *row, RuleName name) {
    T *__restrict w = part.w, *__restrict m = part.first;
    const T step_size = row[STEP_SIZE], momentum = row[MOMENTUM], undamped = row[UNDAMPED];
    if (name != SGD)
        for (Int i = 0; i < n; ++i) m[i] = momentum * m[i] + undamped * g[i];
    if (name == SGD)
        for (Int i = 0; i < n; ++i) w[i] -= step_size * g[i];
    else if (name == NESTEROV)
        for (Int i = 0; i < n; ++i) w[i] -= step_size * (g[i] + momentum * m[i]);
    else
        for (Int i = 0; i < n; ++i) w[i] -= step_size * m[i];
}

// Make the step on n numbers of a parameter, whose gradient is g, and of their states. Uses up g.
template <class T>
INLINE void update(const Part<T> &part, T *__restrict g, Int n, const T *row, Rule rule) {
    T *__restrict w = part.w;
    if (rule.maximize)
        for (Int i = 0; i < n; ++i) g[i] *= row[SIGN];
    if (rule.coupled && row[DECAY] != 0)  // w may be infinite
        for (Int i = 0; i < n; ++i) g[i] += row[DECAY] * w[i];
    if (rule.decoupled)
        for (Int i = 0; i < n; ++i) w[i] *= row[SHRINK];
    switch (rule.name) {
        case ADAM: case AMSGRAD: case NADAM: case RADAM: return adam(part, g, n, row, rule.name);
        case ADAGRAD: return adagrad(part, g, n, row);
        case SGD: case HEAVY_BALL: case NESTEROV: return sgd(part, g, n, row, rule.name);
        default: return rmsprop(part, g, n, row, rule.name);
    }
}

}  // namespace
}  // namespace fusednn
