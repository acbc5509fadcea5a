// What a training step is: ../step.py, whose names these are, in the same order, which a test compares. And what a call
// that trains is given.
//
//     a = x;  for each layer: z = a Wᵀ + b, a = activation(z);  y = a
//     loss of y and the targets; the gradient of each W and b;  the optimizer's rule on each

#pragma once

#include <cstdint>

namespace fusednn {

typedef int64_t Int;

constexpr Int MOST_LAYERS = 8;

enum ActivationName { IDENTITY, RELU, LEAKY_RELU, ELU, GELU, GELU_TANH, SILU, TANH, SIGMOID, SOFTPLUS };
constexpr struct {
    const char *name;
    int numbers;  // so many it takes
    bool before;  // whether its slope is read off the number before, and not off the value
} ACTIVATIONS[] = {
    {"identity", 0, false}, {"relu", 0, false}, {"leaky_relu", 1, true}, {"elu", 1, true}, {"gelu", 0, true},
    {"gelu_tanh", 0, true}, {"silu", 0, true}, {"tanh", 0, false}, {"sigmoid", 0, false}, {"softplus", 2, true},
};

enum LossName { CROSS_ENTROPY, CROSS_ENTROPY_PROBABILITIES, MSE, L1, SMOOTH_L1, HUBER, BCE_WITH_LOGITS, POISSON_NLL };
constexpr struct {
    const char *name;
    bool labels;      // whether its targets are labels [N], and not numbers [N, outputs]
    bool per_output;  // whether a mean is over all outputs, and not over the rows
    int numbers;      // so many it takes
} LOSSES[] = {
    {"cross_entropy", true, false, 0}, {"cross_entropy_probabilities", false, false, 0}, {"mse", false, true, 0},
    {"l1", false, true, 0}, {"smooth_l1", false, true, 1}, {"huber", false, true, 1},
    {"bce_with_logits", false, true, 0}, {"poisson_nll", false, true, 0},
};

enum RuleName {
    ADAM, AMSGRAD, NADAM, RADAM, ADAGRAD, RMSPROP, RMSPROP_MOMENTUM, RMSPROP_CENTERED, RMSPROP_CENTERED_MOMENTUM, SGD,
    HEAVY_BALL, NESTEROV,  // HEAVY_BALL is "momentum": MOMENTUM is a place
};
constexpr struct {
    const char *name;
    int states;  // so many it keeps of each parameter
} RULES[] = {
    {"adam", 2}, {"amsgrad", 3}, {"nadam", 2}, {"radam", 2}, {"adagrad", 1}, {"rmsprop", 1}, {"rmsprop_momentum", 2},
    {"rmsprop_centered", 2}, {"rmsprop_centered_momentum", 3}, {"sgd", 0}, {"momentum", 1}, {"nesterov", 1},
};

// The places in a row of the optimizer's table.
enum Place {
    STEP_SIZE, DECAY, SHRINK, SIGN,
    LOSS_SCALE, MAX_NORM,  // of the step, in the row of the first parameter
    MOMENTUM, UNDAMPED,
    ROOT = 6, EPS, GRAD_PART, SQUARE_KEPT, SQUARE_PART, GRAD_STEP,
    ROW,
};
constexpr struct {
    const char *name;
    Place place;
} PLACES[] = {
    {"STEP_SIZE", STEP_SIZE}, {"DECAY", DECAY}, {"SHRINK", SHRINK}, {"SIGN", SIGN},
    {"LOSS_SCALE", LOSS_SCALE}, {"MAX_NORM", MAX_NORM}, {"MOMENTUM", MOMENTUM}, {"UNDAMPED", UNDAMPED},
    {"ROOT", ROOT}, {"EPS", EPS}, {"GRAD_PART", GRAD_PART}, {"SQUARE_KEPT", SQUARE_KEPT}, {"SQUARE_PART", SQUARE_PART},
    {"GRAD_STEP", GRAD_STEP}, {"ROW", ROW},
};

struct Activation {
    ActivationName name;
    double numbers[2];
};

struct Loss {
    LossName name;
    bool mean, weighted, smoothed;
    double numbers[1];
    bool positive_weighted, rows_weighted, scaled;
};

struct Rule {
    RuleName name;
    bool coupled, decoupled, maximize;
};

// A weight or a bias. Null stands for a missing bias, and for state that the rule does not keep.
template <class T>
struct Parameter {
    T *weight, *first, *second, *third;  // the numbers, and their states
    void *count;                         // of the steps that the optimizer made, a double or a float
    bool double_count;
};

template <class T>
struct Layer {
    Int inputs, outputs;
    Parameter<T> w, b;  // [outputs, inputs] and [outputs], contiguous
    Activation activation;
};

template <class T>
struct Step {
    Int layers;
    Layer<T> layer[MOST_LAYERS];
    Loss loss;
    Rule rule;
    bool accuracy, clipped;
    const T *class_weight;  // [outputs], or null
    const T *pos_weight;    // the same, of positive targets
};

// So many steps, the first one `position` rows into an epoch.
template <class T>
struct Job {
    const T *x;            // [rows, inputs], any strides
    Int stride_xm, stride_xi;
    const void *targets;   // [rows] of Int, or [rows, outputs] of T, as the loss has them, any strides
    Int stride_tm, stride_to;
    const T *sample_weight;  // [rows], any stride; or null
    Int stride_w;
    const Int *order;      // the rows of the steps, one after the other
    const T *table;        // [steps, 2 * layers, ROW]
    T *losses, *accuracies;  // [steps]; the second or null
    Int batch, epoch_rows, position, steps, ignore_index;
    double label_smoothing;

    Int label(Int row) const { return static_cast<const Int *>(targets)[row * stride_tm]; }
    const T *row(const Step<T> &step, Int s) const { return table + s * 2 * step.layers * ROW; }  // the first of step s

    // Call `use(step, rows, size)` for each step until it answers false.
    template <class Use>
    void each_step(Use use) const {
        const Int *rows = order;
        for (Int step = 0, from = position; step < steps; ++step) {
            const Int left = epoch_rows - from, size = batch < left ? batch : left;
            if (!use(step, rows, size)) return;
            rows += size;
            from = from + size >= epoch_rows ? 0 : from + size;
        }
    }
};

inline bool is_bad(Int label, Int classes, Int ignore_index) {
    return (label < 0 || label >= classes) && label != ignore_index;
}

// mlp_training.cpp. The kinds of machine that it was compiled for; a later one is the better one.
constexpr const char *MACHINES[] = {"plain", "AVX2", "AVX-512"};
bool runs_on(Int machine);

// Make the steps, and count them where the optimizer does. Throws std::bad_alloc before the first.
template <class T>
void train(Int machine, const Step<T> &step, const Job<T> &job);

}  // namespace fusednn
