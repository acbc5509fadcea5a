// Reads kernels/step.py's Step, and where its parameters lie, by the names of their attributes.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "step.h"

namespace fusednn {
namespace {

// A reference that is given back. What finds one answers false, with a Python error, if there is none.
struct Held {
    PyObject *object;
    explicit Held(PyObject *object = nullptr) : object(object) {}
    ~Held() { Py_XDECREF(object); }
    bool get_attribute(PyObject *of, const char *name) { return (object = PyObject_GetAttrString(of, name)); }
    bool get_item(PyObject *of, Py_ssize_t place) { return (object = PySequence_GetItem(of, place)); }
    Held(const Held &) = delete;
    Held &operator=(const Held &) = delete;
    operator PyObject *() const { return object; }
};

// So do the readers below.

bool read(PyObject *object, Int &number) {
    number = PyLong_AsLongLong(object);
    return number != -1 || !PyErr_Occurred();
}
bool read(PyObject *object, double &number) {
    number = PyFloat_AsDouble(object);
    return number != -1 || !PyErr_Occurred();
}
bool read(PyObject *object, bool &truth) {
    const int found = PyObject_IsTrue(object);
    truth = found > 0;
    return found >= 0;
}
template <class T>
bool read(PyObject *object, T *&address) {
    Int number;
    if (!read(object, number)) return false;
    address = reinterpret_cast<T *>(static_cast<uintptr_t>(number));
    return true;
}

template <class What>
bool read_attribute(PyObject *object, const char *name, What &to) {
    Held found;
    return found.get_attribute(object, name) && read(found, to);
}

// The place in the table of the object's name.
template <class Name, class Entry, size_t COUNT>
bool read_name(PyObject *object, const char *what, const Entry (&table)[COUNT], Name &to) {
    Held name;
    if (!name.get_attribute(object, "name")) return false;
    for (size_t i = 0; i < COUNT; ++i)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, table[i].name) == 0) {
            to = Name(i);
            return true;
        }
    PyErr_Format(PyExc_ValueError, "%R is no %s that there is", name.object, what);
    return false;
}

// The numbers of an activation or a loss, which takes so many.
template <class Entry>
bool read_numbers(PyObject *object, const Entry &entry, double *to) {
    Held numbers;
    if (!numbers.get_attribute(object, "numbers")) return false;
    const Py_ssize_t count = PySequence_Size(numbers);
    if (count < 0) return false;
    if (count != entry.numbers) {
        PyErr_Format(PyExc_ValueError, "%s takes %d numbers, and not %zd", entry.name, entry.numbers, count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        Held number;
        if (!number.get_item(numbers, i) || !read(number, to[i])) return false;
    }
    return true;
}

bool read_activation(PyObject *object, Activation &to) {
    return read_name(object, "activation", ACTIVATIONS, to.name) &&
           read_numbers(object, ACTIVATIONS[to.name], to.numbers);
}

bool read_loss(PyObject *object, Loss &to) {
    return read_name(object, "loss", LOSSES, to.name) && read_attribute(object, "mean", to.mean) &&
           read_attribute(object, "weighted", to.weighted) && read_attribute(object, "smoothed", to.smoothed) &&
           read_attribute(object, "positive_weighted", to.positive_weighted) &&
           read_attribute(object, "rows_weighted", to.rows_weighted) && read_attribute(object, "scaled", to.scaled) &&
           read_numbers(object, LOSSES[to.name], to.numbers);
}

bool read_rule(PyObject *object, Rule &to) {
    return read_name(object, "rule", RULES, to.name) && read_attribute(object, "coupled", to.coupled) &&
           read_attribute(object, "decoupled", to.decoupled) && read_attribute(object, "maximize", to.maximize);
}

bool wrong(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return false;
}

template <class T>
bool read_parameter(PyObject *object, Rule rule, Parameter<T> &to) {
    if (!read_attribute(object, "weight", to.weight) || !read_attribute(object, "first", to.first) ||
        !read_attribute(object, "second", to.second) || !read_attribute(object, "third", to.third) ||
        !read_attribute(object, "count", to.count) || !read_attribute(object, "double_count", to.double_count))
        return false;
    const T *const states[] = {to.first, to.second, to.third};
    if (!to.weight) return wrong("a parameter has no numbers");
    for (int i = 0; i < RULES[rule.name].states; ++i)
        if (!states[i]) return wrong("a parameter has no state");
    return true;
}

// The layers of kernels/step.py's Step: `sizes` has one more than `biases` and `activations`, `parameters` two of each.
template <class T>
bool read_layers(PyObject *step, PyObject *parameters, Step<T> &to) {
    Held sizes, biases, activations;
    if (!sizes.get_attribute(step, "sizes") || !biases.get_attribute(step, "biases") ||
        !activations.get_attribute(step, "activations"))
        return false;
    Int counts[4] = {};
    PyObject *const sequences[] = {biases, sizes, activations, parameters};
    for (int i = 0; i < 4; ++i)
        if ((counts[i] = PySequence_Size(sequences[i])) < 0) return false;
    to.layers = counts[0];
    if (to.layers < 1 || to.layers > MOST_LAYERS) return wrong("a net needs 1 to 8 layers");
    if (counts[1] != to.layers + 1 || counts[2] != to.layers || counts[3] != 2 * to.layers)
        return wrong("sizes, activations and parameters are not as many as the layers need");
    for (Int l = 0; l < to.layers; ++l) {
        Layer<T> &layer = to.layer[l];
        Held inputs, outputs, activation, has_bias, w, b;
        bool is_there = false;
        if (!inputs.get_item(sizes, l) || !outputs.get_item(sizes, l + 1) || !activation.get_item(activations, l) ||
            !has_bias.get_item(biases, l) || !w.get_item(parameters, 2 * l) || !b.get_item(parameters, 2 * l + 1))
            return false;
        if (!read(inputs, layer.inputs) || !read(outputs, layer.outputs) || !read(has_bias, is_there)) return false;
        if (layer.inputs < 1 || layer.outputs < 1) return wrong("a layer has no inputs or no outputs");
        if (!read_activation(activation, layer.activation)) return false;
        if (w == Py_None || (b != Py_None) != is_there) return wrong("parameters and biases do not agree");
        if (!read_parameter(w, to.rule, layer.w) || (is_there && !read_parameter(b, to.rule, layer.b))) return false;
    }
    return true;
}

// The rest of a step; its weights are there.
template <class T>
bool read_step(PyObject *step, PyObject *parameters, Step<T> &to) {
    Held loss, rule;
    if (!loss.get_attribute(step, "loss") || !read_loss(loss, to.loss)) return false;
    if (!rule.get_attribute(step, "rule") || !read_rule(rule, to.rule)) return false;
    if (!read_attribute(step, "accuracy", to.accuracy) || !read_attribute(step, "clipped", to.clipped)) return false;
    if (to.loss.weighted != (to.class_weight != nullptr)) return wrong("the class weights and the loss do not agree");
    if (to.loss.positive_weighted != (to.pos_weight != nullptr))
        return wrong("the weights of positive targets and the loss do not agree");
    if (to.accuracy && LOSSES[to.loss.name].per_output && to.loss.name != BCE_WITH_LOGITS)
        return wrong("this loss has no accuracy");
    return read_layers(step, parameters, to);
}

}  // namespace
}  // namespace fusednn
