// The Python module fusednn._native: mlp_training.cpp and facts.h for Python. What it is given has names throughout: a
// description is read by its attributes, and calls take keywords alone.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <iterator>
#include <new>
#include <variant>

#include "facts.h"
#include "step.h"

using namespace fusednn;

namespace {

// A reference that is given back. What finds one answers false, with a Python error, if there is none.
struct Held {
    PyObject *object;
    explicit Held(PyObject *object = nullptr) : object(object) {}
    ~Held() { Py_XDECREF(object); }
    bool get_attribute(PyObject *of, const char *name) { return (object = PyObject_GetAttrString(of, name)) != nullptr; }
    bool get_item(PyObject *of, Py_ssize_t place) { return (object = PySequence_GetItem(of, place)) != nullptr; }
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

// The place among `names` of the object's name.
template <class Name, size_t COUNT>
bool read_name(PyObject *object, const char *what, const char *const (&names)[COUNT], Name &to) {
    Held name;
    if (!name.get_attribute(object, "name")) return false;
    for (size_t i = 0; i < COUNT; ++i)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, names[i]) == 0) {
            to = Name(i);
            return true;
        }
    PyErr_Format(PyExc_ValueError, "%R is no %s that there is", name.object, what);
    return false;
}

bool read_activation(PyObject *object, Activation &to) {
    if (!read_name(object, "activation", ACTIVATIONS, to.name)) return false;
    Held numbers;
    if (!numbers.get_attribute(object, "numbers")) return false;
    const Py_ssize_t count = PySequence_Size(numbers);
    const Py_ssize_t needed = to.name == SOFTPLUS ? 2 : to.name == LEAKY_RELU || to.name == ELU ? 1 : 0;
    if (count < 0) return false;
    if (count != needed) {
        PyErr_Format(PyExc_ValueError, "%s takes %zd numbers, and not %zd", ACTIVATIONS[to.name], needed, count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        Held number;
        if (!number.get_item(numbers, i) || !read(number, to.numbers[i])) return false;
    }
    return true;
}

bool read_loss(PyObject *object, Loss &to) {
    return read_name(object, "loss", LOSSES, to.name) && read_attribute(object, "mean", to.mean) &&
           read_attribute(object, "weighted", to.weighted) && read_attribute(object, "smoothed", to.smoothed);
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
        !read_attribute(object, "second", to.second) || !read_attribute(object, "count", to.count) ||
        !read_attribute(object, "double_count", to.double_count))
        return false;
    if (!to.weight) return wrong("a parameter has no numbers");
    if ((rule.name != SGD && !to.first) || (rule.name == ADAM && !to.second)) return wrong("a parameter has no state");
    return true;
}

// The layers of kernels/step.py's Step: `sizes` has one more than `biases` and `activations`, `parameters` two for each.
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
    if (to.layers < 1 || to.layers > MOST_LAYERS) return wrong("there are 1 to 8 layers");
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

template <class T>
bool read_step(PyObject *step, PyObject *parameters, Int class_weight, Step<T> &to) {
    Held loss, rule;
    if (!loss.get_attribute(step, "loss") || !read_loss(loss, to.loss)) return false;
    if (!rule.get_attribute(step, "rule") || !read_rule(rule, to.rule)) return false;
    if (!read_attribute(step, "accuracy", to.accuracy)) return false;
    to.class_weight = reinterpret_cast<const T *>(static_cast<uintptr_t>(class_weight));
    if (to.loss.weighted != (class_weight != 0)) return wrong("the class weights and the loss do not agree");
    return read_layers(step, parameters, to);
}

// Read the keywords of a call, `into` has one for each, in their order: as many as `names`, or an error. The caller's names
// are the same objects as ours, since Python keeps one of each; and mostly in the same order.
struct Keyword {
    const char *text;
    PyObject *name;  // made at the first call
};
template <size_t COUNT>
bool read_keywords(Keyword (&keywords)[COUNT], PyObject *const *args, Py_ssize_t positional, PyObject *names, PyObject **into) {
    const Py_ssize_t given = names ? PyTuple_Size(names) : 0;
    if (positional || given != Py_ssize_t(COUNT)) {
        PyErr_Format(PyExc_TypeError, "expected %zd keyword arguments alone", Py_ssize_t(COUNT));
        return false;
    }
    std::fill_n(into, COUNT, nullptr);
    for (Py_ssize_t i = 0; i < given; ++i) {
        PyObject *const name = PyTuple_GetItem(names, i);
        size_t place = i;
        for (size_t tried = 0; tried < COUNT; ++tried, place = (place + 1) % COUNT) {
            PyObject *&ours = keywords[place].name;
            if (!ours && !(ours = PyUnicode_InternFromString(keywords[place].text))) return false;
            if (ours == name || PyUnicode_CompareWithASCIIString(name, keywords[place].text) == 0) break;
            if (tried == COUNT - 1) {
                PyErr_Format(PyExc_TypeError, "there is no keyword argument %R", name);
                return false;
            }
        }
        into[place] = args[i];
    }
    return true;  // Python passes none of them twice, so all are there
}

const char *const PREPARED = "fusednn.prepared";

struct Prepared {
    Int machine;
    std::variant<Step<float>, Step<double>> step;
};

void discard(PyObject *capsule) {
    delete static_cast<Prepared *>(PyCapsule_GetPointer(capsule, PREPARED));
}

PyObject *prepare(PyObject *, PyObject *const *args, Py_ssize_t positional, PyObject *names) {
    enum { MACHINE, IS_DOUBLE, STEP, PARAMETERS, CLASS_WEIGHT, COUNT };
    static Keyword keywords[COUNT] = {
        {"machine", nullptr}, {"is_double", nullptr}, {"step", nullptr}, {"parameters", nullptr}, {"class_weight", nullptr},
    };
    PyObject *given[COUNT];
    Int machine, class_weight;
    bool is_double;
    if (!read_keywords(keywords, args, positional, names, given) || !read(given[MACHINE], machine) ||
        !read(given[IS_DOUBLE], is_double) || !read(given[CLASS_WEIGHT], class_weight))
        return nullptr;
    if (!runs_on(machine)) return PyErr_Format(PyExc_ValueError, "machine %lld is another one than this", (long long)machine);
    Prepared *const made = new (std::nothrow) Prepared{machine, {}};
    if (!made) return PyErr_NoMemory();
    if (is_double) made->step = Step<double>{};
    const auto is_read = [&](auto &step) { return read_step(given[STEP], given[PARAMETERS], class_weight, step); };
    PyObject *const capsule = std::visit(is_read, made->step) ? PyCapsule_New(made, PREPARED, discard) : nullptr;
    if (!capsule) delete made;
    return capsule;
}

// The first label of the steps that is none of a class, in `bad`.
template <class T>
bool finds_bad_label(const Job<T> &job, Int classes, Int &bad) {
    bool found = false;
    job.each_step([&](Int, const Int *rows, Int size) {
        for (Int b = 0; b < size && !found; ++b) {
            bad = job.targets[rows[b] * job.stride_t];
            found = is_bad(bad, classes, job.ignore_index);
        }
        return !found;
    });
    return found;
}

template <class T>
PyObject *train_steps(Int machine, const Step<T> &step, PyObject *const *given) {
    Job<T> job;
    PyObject *const *next = given;
    if (!read(*next++, job.x) || !read(*next++, job.stride_xm) || !read(*next++, job.stride_xi) ||
        !read(*next++, job.targets) || !read(*next++, job.stride_t) || !read(*next++, job.order) ||
        !read(*next++, job.table) || !read(*next++, job.losses) || !read(*next++, job.accuracies) ||
        !read(*next++, job.batch) || !read(*next++, job.epoch_rows) || !read(*next++, job.position) ||
        !read(*next++, job.steps) || !read(*next++, job.ignore_index) || !read(*next++, job.label_smoothing))
        return nullptr;
    if (step.accuracy && job.steps > 0 && !job.accuracies) return wrong("there is no place for accuracies"), nullptr;
    bool has_memory = true, is_bad = false;
    Int bad = 0;
    Py_BEGIN_ALLOW_THREADS
    is_bad = finds_bad_label(job, step.layer[step.layers - 1].outputs, bad);
    if (!is_bad) try {
            train(machine, step, job);
        } catch (const std::bad_alloc &) {  // before the first step
            has_memory = false;
        }
    Py_END_ALLOW_THREADS
    if (is_bad) return PyErr_Format(PyExc_IndexError, "Target %lld is out of bounds.", static_cast<long long>(bad));
    if (!has_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

// train(prepared, *, ...): the members of Job.
PyObject *train_prepared(PyObject *, PyObject *const *args, Py_ssize_t positional, PyObject *names) {
    static Keyword keywords[] = {  // as train_steps reads them
        {"x", nullptr}, {"stride_xm", nullptr}, {"stride_xi", nullptr}, {"targets", nullptr}, {"stride_t", nullptr},
        {"order", nullptr}, {"table", nullptr}, {"losses", nullptr}, {"accuracies", nullptr}, {"batch", nullptr},
        {"epoch_rows", nullptr}, {"position", nullptr}, {"steps", nullptr}, {"ignore_index", nullptr},
        {"label_smoothing", nullptr},
    };
    PyObject *given[std::size(keywords)];
    if (positional != 1) return PyErr_Format(PyExc_TypeError, "expected what prepare returns, and keyword arguments");
    const auto *prepared = static_cast<const Prepared *>(PyCapsule_GetPointer(args[0], PREPARED));
    if (!prepared || !read_keywords(keywords, args + 1, 0, names, given)) return nullptr;
    return std::visit([&](const auto &step) { return train_steps(prepared->machine, step, given); }, prepared->step);
}

// The first of `size` labels that is none of a class, or None.
PyObject *bad_label(PyObject *, PyObject *const *args, Py_ssize_t positional, PyObject *names) {
    static Keyword keywords[] = {
        {"targets", nullptr}, {"stride", nullptr}, {"size", nullptr}, {"classes", nullptr}, {"ignore_index", nullptr},
    };
    PyObject *given[std::size(keywords)];
    const Int *targets;
    Int stride, size, classes, ignore_index;
    if (!read_keywords(keywords, args, positional, names, given) || !read(given[0], targets) || !read(given[1], stride) ||
        !read(given[2], size) || !read(given[3], classes) || !read(given[4], ignore_index))
        return nullptr;
    for (Int i = 0; i < size; ++i)
        if (const Int label = targets[i * stride]; is_bad(label, classes, ignore_index)) return PyLong_FromLongLong(label);
    Py_RETURN_NONE;
}

bool set_number(PyObject *dict, const char *key, Int value) {
    const Held number(PyLong_FromLongLong(value));
    return number && PyDict_SetItemString(dict, key, number) == 0;
}

PyObject *machines(PyObject *, PyObject *) {
    PyObject *found = PyDict_New();
    for (Int machine = 0; found && machine < Int(std::size(MACHINES)); ++machine)
        if (runs_on(machine) && !set_number(found, MACHINES[machine], machine)) Py_CLEAR(found);
    return found;
}

template <size_t COUNT>
bool set_names(PyObject *dict, const char *key, const char *const (&names)[COUNT]) {
    const Held tuple(PyTuple_New(COUNT));
    for (size_t i = 0; tuple && i < COUNT; ++i) {
        PyObject *const name = PyUnicode_FromString(names[i]);
        if (!name || PyTuple_SetItem(tuple, i, name) < 0) return false;
    }
    return tuple && PyDict_SetItemString(dict, key, tuple) == 0;
}

// NAMES: those of step.h's tables, for the test that compares them with ../step.py's.
int add_names(PyObject *module) {
    const Held names(PyDict_New()), row(PyDict_New());
    if (!names || !row) return -1;
    for (const auto &entry : PLACES)
        if (!set_number(row, entry.name, entry.place)) return -1;
    if (!set_names(names, "activations", ACTIVATIONS) || !set_names(names, "losses", LOSSES) ||
        !set_names(names, "rules", RULES) || PyDict_SetItemString(names, "row", row) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "NAMES", names);
}

PyMethodDef methods[] = {
    {"prepare", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(prepare)), METH_FASTCALL | METH_KEYWORDS,
     "prepare(*, machine, is_double, step, parameters, class_weight): what train takes.\n\n"
     "`step` is a Step of kernels/step.py. `parameters` has an object for W1, b1, W2, b2, ..., or None for a missing bias,\n"
     "with the addresses `weight`, `first`, `second` and `count`, 0 for none, and whether the count is a `double_count`.\n"
     "`class_weight` is an address, or 0. Raises ValueError for a name that is unknown and for sizes that make no sense."},
    {"train", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(train_prepared)), METH_FASTCALL | METH_KEYWORDS,
     "train(prepared, *, x, stride_xm, stride_xi, targets, stride_t, order, table, losses, accuracies, batch, epoch_rows,\n"
     "position, steps, ignore_index, label_smoothing): addresses and numbers, those of Job in kernels/native/step.h.\n\n"
     "Raises IndexError for a label out of range, and MemoryError, before the first step."},
    {"bad_label", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bad_label)), METH_FASTCALL | METH_KEYWORDS,
     "bad_label(*, targets, stride, size, classes, ignore_index): the first of the int64 labels out of range, or None."},
    {"facts", facts, METH_VARARGS, "facts(items, attributes, lengths, keys, gone): those of fusednn/reading/facts.py's Facts, for hold."},
    {"hold", hold, METH_O, "hold(facts): whether all is as it was."},
    {"machines", machines, METH_NOARGS, "The kinds of machine that this one is, and their numbers; the last is the best."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void *>(add_names)}, {0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fusednn._native", "Training steps in C++.", 0, methods, slots, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&module); }
