// The Python module fusednn._native: mlp_training.cpp and facts.h for Python. What it is given has names throughout: a
// description is read by its attributes, and calls take keywords alone.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <iterator>
#include <new>
#include <variant>

#include "description.h"
#include "facts.h"
#include "step.h"

using namespace fusednn;

namespace {

struct Keyword {
    const char *text;
    PyObject *name;  // made at the first call
};

// The arguments of a call, all by keyword, in the order of `keywords`. The caller's names are mostly in that order, and
// the same objects as ours, since Python keeps one of each.
template <size_t COUNT>
bool read_keywords(
    Keyword (&keywords)[COUNT], PyObject *const *args, Py_ssize_t positional, PyObject *names, PyObject **into
) {
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
    enum { MACHINE, IS_DOUBLE, STEP, PARAMETERS, CLASS_WEIGHT, POS_WEIGHT, COUNT };
    static Keyword keywords[COUNT] = {
        {"machine", nullptr}, {"is_double", nullptr}, {"step", nullptr}, {"parameters", nullptr},
        {"class_weight", nullptr}, {"pos_weight", nullptr},
    };
    PyObject *given[COUNT];
    Int machine;
    bool is_double;
    if (!read_keywords(keywords, args, positional, names, given) || !read(given[MACHINE], machine) ||
        !read(given[IS_DOUBLE], is_double))
        return nullptr;
    if (!runs_on(machine))
        return PyErr_Format(PyExc_ValueError, "machine %lld is another one than this", static_cast<long long>(machine));
    Prepared *const made = new (std::nothrow) Prepared{machine, {}};
    if (!made) return PyErr_NoMemory();
    if (is_double) made->step = Step<double>{};
    const auto is_read = [&](auto &step) {
        return read(given[CLASS_WEIGHT], step.class_weight) && read(given[POS_WEIGHT], step.pos_weight) &&
               read_step(given[STEP], given[PARAMETERS], step);
    };
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
            bad = job.label(rows[b]);
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
        !read(*next++, job.targets) || !read(*next++, job.stride_tm) || !read(*next++, job.stride_to) ||
        !read(*next++, job.sample_weight) || !read(*next++, job.stride_w) || !read(*next++, job.order) ||
        !read(*next++, job.table) || !read(*next++, job.losses) || !read(*next++, job.accuracies) ||
        !read(*next++, job.batch) || !read(*next++, job.epoch_rows) || !read(*next++, job.position) ||
        !read(*next++, job.steps) || !read(*next++, job.ignore_index) || !read(*next++, job.label_smoothing))
        return nullptr;
    if (step.accuracy && job.steps > 0 && !job.accuracies) return wrong("there is no place for accuracies"), nullptr;
    if (step.loss.rows_weighted && job.steps > 0 && job.batch > 0 && !job.sample_weight)
        return wrong("there are no weights of the rows"), nullptr;
    bool has_memory = true, is_bad = false;
    Int bad = 0;
    Py_BEGIN_ALLOW_THREADS
    is_bad = LOSSES[step.loss.name].labels && finds_bad_label(job, step.layer[step.layers - 1].outputs, bad);
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
        {"x", nullptr}, {"stride_xm", nullptr}, {"stride_xi", nullptr}, {"targets", nullptr}, {"stride_tm", nullptr},
        {"stride_to", nullptr}, {"sample_weight", nullptr}, {"stride_w", nullptr}, {"order", nullptr},
        {"table", nullptr}, {"losses", nullptr}, {"accuracies", nullptr}, {"batch", nullptr}, {"epoch_rows", nullptr},
        {"position", nullptr}, {"steps", nullptr}, {"ignore_index", nullptr}, {"label_smoothing", nullptr},
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
    if (!read_keywords(keywords, args, positional, names, given) || !read(given[0], targets) ||
        !read(given[1], stride) || !read(given[2], size) || !read(given[3], classes) || !read(given[4], ignore_index))
        return nullptr;
    for (Int i = 0; i < size; ++i) {
        const Int label = targets[i * stride];
        if (is_bad(label, classes, ignore_index)) return PyLong_FromLongLong(label);
    }
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

// NAMES: those of step.h's tables, for the test that compares them with ../step.py's.
int add_names(PyObject *module) {
    const Held names(PyDict_New()), row(PyDict_New()), activations(PyDict_New());
    const Held losses(PyDict_New()), rules(PyDict_New());
    if (!names || !row || !activations || !losses || !rules) return -1;
    for (const auto &entry : ACTIVATIONS) {
        const Held kind(Py_BuildValue("(iN)", entry.numbers, PyBool_FromLong(entry.before)));
        if (!kind || PyDict_SetItemString(activations, entry.name, kind) < 0) return -1;
    }
    for (const auto &entry : LOSSES) {
        PyObject *const labels = PyBool_FromLong(entry.labels), *const per_output = PyBool_FromLong(entry.per_output);
        const Held kind(Py_BuildValue("(NNi)", labels, per_output, entry.numbers));
        if (!kind || PyDict_SetItemString(losses, entry.name, kind) < 0) return -1;
    }
    for (const auto &entry : RULES)
        if (!set_number(rules, entry.name, entry.states)) return -1;
    for (const auto &entry : PLACES)
        if (!set_number(row, entry.name, entry.place)) return -1;
    if (PyDict_SetItemString(names, "activations", activations) < 0 || PyDict_SetItemString(names, "losses", losses) < 0 ||
        PyDict_SetItemString(names, "rules", rules) < 0 || PyDict_SetItemString(names, "row", row) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "NAMES", names);
}

template <class Function>
PyCFunction with_keywords(Function function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
constexpr int KEYWORDS = METH_FASTCALL | METH_KEYWORDS;

const char *const PREPARE = R"(prepare(*, machine, is_double, step, parameters, class_weight, pos_weight): what train takes.

`step` is a Step of kernels/step.py. `parameters` has an object for W1, b1, W2, b2, ..., or None for a missing bias,
with the addresses `weight`, `first`, `second`, `third` and `count`, 0 for none, and whether the count is a
`double_count`. `class_weight` and `pos_weight` are addresses, or 0. Raises ValueError for a name that is unknown and
for sizes that make no sense.)";

const char *const TRAIN = R"(train(prepared, *, ...): make steps.

The keywords are x, stride_xm, stride_xi, targets, stride_tm, stride_to, sample_weight, stride_w, order, table, losses,
accuracies, batch, epoch_rows, position, steps, ignore_index, label_smoothing: addresses and numbers, those of Job in
kernels/native/step.h. Raises IndexError for a label out of range, and MemoryError, before the first step.)";

const char *const BAD_LABEL = R"(bad_label(*, targets, stride, size, classes, ignore_index): the first that is wrong.

That is, of the int64 labels that are none of a class and are not ignored; or None.)";

PyMethodDef methods[] = {
    {"prepare", with_keywords(prepare), KEYWORDS, PREPARE},
    {"train", with_keywords(train_prepared), KEYWORDS, TRAIN},
    {"bad_label", with_keywords(bad_label), KEYWORDS, BAD_LABEL},
    {"facts", facts, METH_VARARGS, "facts(items, attributes, lengths, keys, gone): those of fusednn/reading/facts.py."},
    {"hold", hold, METH_O, "hold(facts): whether all is as it was."},
    {"machines", machines, METH_NOARGS, "The kinds of machine that this one is, and their numbers; the last is best."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void *>(add_names)}, {0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fusednn._native", "Training steps in C++.", 0, methods, slots, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&module); }
