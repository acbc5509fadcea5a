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

// False for an error that is `missing`, which is cleared; -1 for another.
int unless(PyObject *missing) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(missing)) return -1;
    PyErr_Clear();
    return 0;
}

// Whether `found`, a new reference or null, is `value`; `gone` stands for what is not there. -1 for an error that is not
// `missing`.
int is(PyObject *found, PyObject *value, PyObject *gone, PyObject *missing) {
    if (!found) return unless(missing) ? -1 : value == gone;
    Py_DECREF(found);
    return found == value;
}

// The object that a field of a tuple in a list is a weak reference to, or that field; borrowed, None where it is gone.
PyObject *referent(PyObject *list, Py_ssize_t i, Py_ssize_t place) {
    PyObject *found = field(list, i, place);
    return found && PyWeakref_CheckRef(found) ? PyWeakref_GetObject(found) : found;
}

// items (owner, name or None, key, value): the mapping is the owner, or its attribute of that name. attributes (owner,
// name, value). lengths (owner, name, length) of a collection that is an attribute. gone. True if all are as they were.
PyObject *hold(PyObject *, PyObject *args) {
    PyObject *items, *attributes, *lengths, *gone;
    if (!PyArg_ParseTuple(args, "O!O!O!O", &PyList_Type, &items, &PyList_Type, &attributes, &PyList_Type, &lengths, &gone))
        return nullptr;
    int same = 1;
    for (Py_ssize_t i = 0; same == 1 && i < PyList_Size(items); ++i) {
        PyObject *owner = referent(items, i, 0), *name = field(items, i, 1), *key = referent(items, i, 2);
        PyObject *value = referent(items, i, 3);
        if (!owner || !name || !key || !value) return nullptr;
        Py_INCREF(owner);
        PyObject *mapping = owner;
        if (name != Py_None) {
            mapping = PyObject_GetAttr(owner, name);
            Py_DECREF(owner);
        }
        same = mapping ? is(get(mapping, key), value, gone, PyExc_KeyError) : unless(PyExc_AttributeError);
        Py_XDECREF(mapping);
    }
    for (Py_ssize_t i = 0; same == 1 && i < PyList_Size(attributes); ++i) {
        PyObject *owner = referent(attributes, i, 0), *name = field(attributes, i, 1), *value = referent(attributes, i, 2);
        if (!owner || !name || !value) return nullptr;
        same = is(PyObject_GetAttr(owner, name), value, gone, PyExc_AttributeError);
    }
    for (Py_ssize_t i = 0; same == 1 && i < PyList_Size(lengths); ++i) {
        PyObject *owner = referent(lengths, i, 0), *name = field(lengths, i, 1), *before = field(lengths, i, 2);
        if (!owner || !name || !before) return nullptr;
        PyObject *collection = PyObject_GetAttr(owner, name);
        same = collection ? PyObject_Size(collection) == PyLong_AsSsize_t(before) : unless(PyExc_AttributeError);
        Py_XDECREF(collection);
    }
    return same < 0 ? nullptr : PyBool_FromLong(same);
}

}  // namespace
