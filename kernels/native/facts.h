// Whether what Python objects were asked for before still has the same answers: a call of train_steps looks at a hundred
// and fifty of them, and in Python that takes as long as a training step. fusednn/reading/facts.py says what they are.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <vector>

namespace {

const char *const FACTS = "fusednn.facts";

enum Look { ITEM, ATTRIBUTE, LENGTH, KEYS, LOOKS };

// ITEM: the mapping `owner`, or its attribute `name`, has `value` at `key`. ATTRIBUTE: that of `owner` is `value`. LENGTH:
// that of the attribute of `owner` is `length`. KEYS: those of that mapping are the list `value`, in order. Owner, key and
// value may be weak references, each to what it stands for.
struct Fact {
    Look look;
    PyObject *owner, *name, *key, *value;
    Py_ssize_t length;
};

struct Facts {
    std::vector<Fact> facts;
    PyObject *gone = nullptr;  // stands for what is not there
};

void forget(PyObject *capsule) {
    Facts *facts = static_cast<Facts *>(PyCapsule_GetPointer(capsule, FACTS));
    if (!facts) return PyErr_Clear();
    for (const Fact &fact : facts->facts)
        for (PyObject *held : {fact.owner, fact.name, fact.key, fact.value}) Py_XDECREF(held);
    Py_DECREF(facts->gone);
    delete facts;
}

// A field of a tuple, as a new reference; null with an error where there is none.
PyObject *field(PyObject *tuple, Py_ssize_t place) {
    PyObject *found = PyTuple_Check(tuple) ? PyTuple_GetItem(tuple, place) : nullptr;
    if (!found && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "expected a tuple");
    Py_XINCREF(found);
    return found;
}

// facts(items, attributes, lengths, keys, gone): lists of (owner, name or None, key, value), of (owner, name, value), of
// (owner, name, length) and of (owner, name, keys), for `hold`.
PyObject *facts(PyObject *, PyObject *args) {
    PyObject *lists[LOOKS], *gone;
    if (!PyArg_ParseTuple(
            args, "O!O!O!O!O", &PyList_Type, &lists[ITEM], &PyList_Type, &lists[ATTRIBUTE], &PyList_Type, &lists[LENGTH],
            &PyList_Type, &lists[KEYS], &gone
        ))
        return nullptr;
    Facts *made = new Facts;
    Py_INCREF(gone);
    made->gone = gone;
    PyObject *capsule = PyCapsule_New(made, FACTS, forget);
    if (!capsule) {
        Py_DECREF(gone);
        delete made;
    }
    for (int look = ITEM; capsule && look < LOOKS; ++look)
        for (Py_ssize_t i = 0; capsule && i < PyList_Size(lists[look]); ++i) {
            PyObject *tuple = PyList_GetItem(lists[look], i);
            Fact fact = {Look(look), field(tuple, 0), nullptr, nullptr, nullptr, 0};
            if (!PyErr_Occurred()) fact.name = field(tuple, 1);
            if (look == ITEM && !PyErr_Occurred()) fact.key = field(tuple, 2);
            if (look != LENGTH && !PyErr_Occurred()) fact.value = field(tuple, look == ITEM ? 3 : 2);
            if (look == LENGTH && !PyErr_Occurred()) fact.length = PyLong_AsSsize_t(PyTuple_GetItem(tuple, 2));
            made->facts.push_back(fact);
            if (PyErr_Occurred()) Py_CLEAR(capsule);
        }
    return capsule;
}

// What `held` stands for, as a new reference; None where it is gone.
PyObject *referent(PyObject *held) {
    PyObject *found = PyWeakref_CheckRef(held) ? PyWeakref_GetObject(held) : held;
    Py_XINCREF(found);
    return found;
}

// mapping.get(key): a new reference, or null, with an error or without.
PyObject *get(PyObject *mapping, PyObject *key) {
    if (PyDict_Check(mapping)) {  // also of a defaultdict, which would make what is not there
        PyObject *found = PyDict_GetItemWithError(mapping, key);
        Py_XINCREF(found);
        return found;
    }
    return PyObject_GetItem(mapping, key);
}

// What was looked at: a new reference, or null, with an error or without.
PyObject *look_at(const Fact &fact) {
    PyObject *owner = referent(fact.owner);
    if (!owner) return nullptr;
    PyObject *found = owner;
    if (fact.look != ITEM || fact.name != Py_None) {
        found = PyObject_GetAttr(owner, fact.name);
        Py_DECREF(owner);
    }
    if (!found || fact.look == ATTRIBUTE || fact.look == LENGTH) return found;
    PyObject *key = fact.look == ITEM ? referent(fact.key) : nullptr;
    PyObject *inner = fact.look == KEYS ? PySequence_List(found) : key ? get(found, key) : nullptr;
    Py_XDECREF(key);
    Py_DECREF(found);
    return inner;
}

// Whether `found`, or nothing, is what was found before; -1 for an error.
int is_same(const Fact &fact, PyObject *found, PyObject *gone) {
    if (fact.look == LENGTH) return found && PyObject_Size(found) == fact.length;
    if (fact.look == KEYS) return found ? PyObject_RichCompareBool(found, fact.value, Py_EQ) : 0;
    PyObject *before = referent(fact.value);
    Py_XDECREF(before);  // it is only compared
    return (found ? found : gone) == before;
}

// hold(facts): whether all is as it was.
PyObject *hold(PyObject *, PyObject *capsule) {
    const Facts *facts = static_cast<const Facts *>(PyCapsule_GetPointer(capsule, FACTS));
    if (!facts) return nullptr;
    for (const Fact &fact : facts->facts) {
        PyObject *found = look_at(fact);
        if (!found && PyErr_Occurred()) {
            if (!PyErr_ExceptionMatches(PyExc_AttributeError) && !PyErr_ExceptionMatches(PyExc_KeyError)) return nullptr;
            PyErr_Clear();
        }
        const int same = is_same(fact, found, facts->gone);
        Py_XDECREF(found);
        if (same != 1) return PyErr_Occurred() ? nullptr : PyBool_FromLong(0);
    }
    return PyBool_FromLong(1);
}

}  // namespace
