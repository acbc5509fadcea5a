// Whether what Python objects were asked for before still has the same answers: a call of train_steps looks at some
// hundred of them, and in Python that takes as long as a training step.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace {

// A field of a tuple in a list, borrowed; null and an error if there is none.
PyObject *field(PyObject *list, Py_ssize_t i, Py_ssize_t place) { return PyTuple_GetItem(PyList_GetItem(list, i), place); }

// mapping.get(key): a new reference, or null, with an error or without.
PyObject *get(PyObject *mapping, PyObject *key) {
    if (PyDict_Check(mapping)) {  // also of a defaultdict, which would make what is not there
        PyObject *found = PyDict_GetItemWithError(mapping, key);
        Py_XINCREF(found);
        return found;
    }
    return PyObject_GetItem(mapping, key);
}

// Whether `found`, a new reference or null, is `value`; `gone` stands for what is not there. -1 for an error that is not
// `missing`.
int is(PyObject *found, PyObject *value, PyObject *gone, PyObject *missing) {
    if (!found) {
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(missing)) return -1;
        PyErr_Clear();
        return value == gone;
    }
    Py_DECREF(found);
    return found == value;
}

// items (mapping, key, value), attributes (owner, name, value), lengths (collection, length), gone. True if all are as
// they were.
PyObject *hold(PyObject *, PyObject *args) {
    PyObject *items, *attributes, *lengths, *gone;
    if (!PyArg_ParseTuple(args, "O!O!O!O", &PyList_Type, &items, &PyList_Type, &attributes, &PyList_Type, &lengths, &gone))
        return nullptr;
    int same = 1;
    for (Py_ssize_t i = 0; same == 1 && i < PyList_Size(items); ++i) {
        PyObject *mapping = field(items, i, 0), *key = field(items, i, 1), *value = field(items, i, 2);
        if (!mapping || !key || !value) return nullptr;
        same = is(get(mapping, key), value, gone, PyExc_KeyError);
    }
    for (Py_ssize_t i = 0; same == 1 && i < PyList_Size(attributes); ++i) {
        PyObject *owner = field(attributes, i, 0), *name = field(attributes, i, 1), *value = field(attributes, i, 2);
        if (!owner || !name || !value) return nullptr;
        same = is(PyObject_GetAttr(owner, name), value, gone, PyExc_AttributeError);
    }
    for (Py_ssize_t i = 0; same == 1 && i < PyList_Size(lengths); ++i) {
        PyObject *collection = field(lengths, i, 0), *before = field(lengths, i, 1);
        if (!collection || !before) return nullptr;
        const Py_ssize_t length = PyObject_Size(collection);
        same = length < 0 ? -1 : length == PyLong_AsSsize_t(before);
    }
    return same < 0 ? nullptr : PyBool_FromLong(same);
}

}  // namespace
