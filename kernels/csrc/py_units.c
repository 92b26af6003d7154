/* _kernels.Units(): weights on disk and slots for some of them; opened by the Python face, which has checked sizes. */
#include "module.h"
#include "units.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

PyTypeObject *pi_units_type;

enum { MOST = 1 << 24 /* of anything that is counted here */ };

typedef struct {
    int *descriptors, *direct;
    pi_slot_kind_spec *kinds;
    pi_unit_spec *units;
    pi_unit_part *parts;
    Py_ssize_t files, kind_count, unit_count, part_count;
} specs;

static void free_specs(specs *s) {
    free(s->descriptors);
    free(s->direct);
    free(s->kinds);
    free(s->units);
    free(s->parts);
}

static int take_files(PyObject *files, specs *s) {
    s->files = PyTuple_Size(files);
    s->descriptors = calloc((size_t)s->files + 1, sizeof *s->descriptors);
    s->direct = calloc((size_t)s->files + 1, sizeof *s->direct);
    if (!s->descriptors || !s->direct) return PyErr_NoMemory() ? 0 : -1;
    for (Py_ssize_t i = 0; i < s->files; i++)
        if (!PyArg_ParseTuple(PyTuple_GetItem(files, i), "ip", &s->descriptors[i], &s->direct[i])) return -1;
    return 0;
}

static int take_kinds(PyObject *kinds, specs *s) {
    s->kind_count = PyTuple_Size(kinds);
    s->kinds = calloc((size_t)s->kind_count + 1, sizeof *s->kinds);
    if (!s->kinds) return PyErr_NoMemory() ? 0 : -1;
    for (Py_ssize_t i = 0; i < s->kind_count; i++) {
        long long count, bytes;
        if (!PyArg_ParseTuple(PyTuple_GetItem(kinds, i), "LL", &count, &bytes)) return -1;
        s->kinds[i] = (pi_slot_kind_spec){count, bytes};
        if (count < 1 || count > MOST || bytes < 1 || bytes > INT64_MAX / MOST) {
            PyErr_Format(pi_kernel_error, "%lld slots of %lld bytes cannot be", count, bytes);
            return -1;
        }
    }
    return 0;
}

static int take_part(PyObject *tuple, const specs *s, int kind, pi_unit_part *part) {
    PyObject *matrix;
    int row_type, file;
    long long offset, place, piece;
    if (!PyArg_ParseTuple(tuple, "O!iiLLL", pi_matrix_type, &matrix, &row_type, &file, &offset, &place, &piece))
        return -1;
    pi_matrix *m = &((matrix_object *)matrix)->matrix;
    *part = (pi_unit_part){m, row_type, file, offset, place, piece};
    const int fits = file >= 0 && file < s->files && offset >= 0 && place >= 0 && place % 64 == 0 && piece > 0 &&
                     !((matrix_object *)matrix)->memory.mapping &&
                     pi_tile_bytes(row_type, m->columns) == m->tile_bytes &&
                     place + m->tiles * m->tile_bytes <= s->kinds[kind].bytes;
    if (!fits) PyErr_SetString(pi_kernel_error, "a matrix does not fit its unit");
    return fits ? 0 : -1;
}

static int take_units(PyObject *units, specs *s) {
    s->unit_count = PyTuple_Size(units);
    for (Py_ssize_t i = 0; i < s->unit_count; i++) {
        PyObject *unit = PyTuple_GetItem(units, i);
        if (!PyTuple_Check(unit)) return -1;
        s->part_count += PyTuple_Size(unit) - 1;
    }
    s->units = calloc((size_t)s->unit_count + 1, sizeof *s->units);
    s->parts = calloc((size_t)s->part_count + 1, sizeof *s->parts);
    if (!s->units || !s->parts) return PyErr_NoMemory() ? 0 : -1;
    for (Py_ssize_t i = 0, at = 0; i < s->unit_count; i++) {
        PyObject *unit = PyTuple_GetItem(units, i);
        const Py_ssize_t parts = PyTuple_Size(unit) - 1;
        const long kind = PyLong_AsLong(PyTuple_GetItem(unit, 0));
        if (kind < 0 || kind >= s->kind_count || parts < 1) {
            if (!PyErr_Occurred()) PyErr_SetString(pi_kernel_error, "a unit has no such slots, or no matrices");
            return -1;
        }
        s->units[i] = (pi_unit_spec){(int32_t)kind, at, parts};
        for (Py_ssize_t p = 0; p < parts; p++)
            if (take_part(PyTuple_GetItem(unit, p + 1), s, (int)kind, &s->parts[at++]) < 0) return -1;
    }
    return 0;
}

static PyObject *units_open(PyObject *object, PyObject *args) {
    units_object *self = (units_object *)object;
    PyObject *files, *kinds, *units;
    specs s = {0};
    pi_unit_policy policy;
    if (!PyArg_ParseTuple(args, "O!O!O!id", &PyTuple_Type, &files, &PyTuple_Type, &kinds, &PyTuple_Type, &units,
                          &policy.threads, &policy.half_life))
        return NULL;
    if (self->units || policy.threads < 1 || policy.threads > PI_MAX_THREADS) {
        PyErr_SetString(pi_kernel_error, self->units ? "the units are open already" : "that many threads cannot read");
        return NULL;
    }
    const int failed = take_files(files, &s) < 0 || take_kinds(kinds, &s) < 0 || take_units(units, &s) < 0;
    if (!failed) {
        self->units = pi_units_new(s.descriptors, s.direct, (int)s.files, s.kinds, (int)s.kind_count, s.units,
                                   s.unit_count, s.parts, policy);
        if (!self->units) PyErr_Format(pi_kernel_error, "cannot keep units in memory: %s", strerror(errno));
        Py_INCREF(units);
        self->matrices = units;
    }
    free_specs(&s);
    if (failed && !PyErr_Occurred()) PyErr_SetString(pi_kernel_error, "units are given as tuples");
    if (failed || !self->units) return NULL;
    Py_RETURN_NONE;
}

static pi_units *opened(PyObject *object) {
    pi_units *units = ((units_object *)object)->units;
    if (!units) PyErr_SetString(pi_kernel_error, "the units are not open");
    return units;
}

static PyObject *units_load(PyObject *object, PyObject *args) {
    pi_units *units = opened(object);
    Py_buffer list;
    int fixed;
    if (!units || !PyArg_ParseTuple(args, "y*p", &list, &fixed)) return NULL;
    const int64_t count = list.len / (Py_ssize_t)sizeof(int32_t);
    const int32_t *number = list.buf;
    int64_t done = 0, wrong = 0;
    for (int64_t i = 0; i < count; i++) wrong |= number[i] < 0 || number[i] >= pi_units_count(units);
    units_object *self = (units_object *)object;
    if (!wrong) {
        self->users++;
        Py_BEGIN_ALLOW_THREADS done = pi_units_load(units, number, count, fixed);
        Py_END_ALLOW_THREADS self->users--;
    }
    PyBuffer_Release(&list);
    if (wrong) {
        PyErr_SetString(pi_kernel_error, "there is no unit of that number");
        return NULL;
    }
    return PyLong_FromLongLong(done);
}

static PyObject *units_set_use(PyObject *object, PyObject *args) {
    pi_units *units = opened(object);
    Py_buffer use;
    if (!units || !PyArg_ParseTuple(args, "y*", &use)) return NULL;
    const int fits = use.len == pi_units_count(units) * (Py_ssize_t)sizeof(double);
    if (fits) pi_units_set_use(units, use.buf);
    PyBuffer_Release(&use);
    if (fits) Py_RETURN_NONE;
    PyErr_SetString(pi_kernel_error, "a use is needed of every unit");
    return NULL;
}

static PyObject *units_taken(PyObject *object, PyObject *unused) {
    pi_units *units = opened(object);
    (void)unused;
    if (!units) return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, pi_units_count(units) * (Py_ssize_t)sizeof(int64_t));
    if (bytes) pi_units_taken(units, (int64_t *)(void *)PyBytes_AsString(bytes));
    return bytes;
}

static PyObject *units_counters(PyObject *object, PyObject *unused) {
    pi_units *units = opened(object);
    (void)unused;
    if (!units) return NULL;
    const pi_unit_counters c = pi_units_counters(units);
    return Py_BuildValue("LLLLLLLLL", (long long)c.taken, (long long)c.hits, (long long)c.late, (long long)c.ahead,
                         (long long)c.ahead_used, (long long)c.read_bytes, (long long)c.hit_bytes, (long long)c.moved,
                         (long long)c.wait_nanoseconds);
}

static PyObject *units_fault(PyObject *object, PyObject *unused) {
    pi_units *units = opened(object);
    (void)unused;
    if (!units) return NULL;
    const pi_unit_fault f = pi_units_fault(units);
    if (!f.error) Py_RETURN_NONE;
    return Py_BuildValue("iiLL", f.error, (int)f.file, (long long)f.offset, (long long)f.bytes);
}

static PyObject *units_close(PyObject *object, PyObject *unused) {
    units_object *self = (units_object *)object;
    (void)unused;
    if (self->users) {
        PyErr_SetString(pi_kernel_error, "the units are in use by another thread and cannot be closed");
        return NULL;
    }
    pi_units_free(self->units);
    self->units = NULL;
    Py_RETURN_NONE;
}

static PyObject *units_nbytes(PyObject *object, void *unused) {
    pi_units *units = opened(object);
    (void)unused;
    return units ? PyLong_FromLongLong(pi_units_memory(units)) : NULL;
}

static void units_dealloc(PyObject *object) {
    units_object *self = (units_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    pi_units_free(self->units);
    Py_XDECREF(self->matrices);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef units_methods[] = {
    {"open", units_open, METH_VARARGS, PyDoc_STR("open(files, kinds, units, threads, half_life)")},
    {"load", units_load, METH_VARARGS, PyDoc_STR("load(numbers, fixed): how many are in memory, -1 after a fault")},
    {"set_use", units_set_use, METH_VARARGS, PyDoc_STR("set_use(float64 of every unit)")},
    {"taken", units_taken, METH_NOARGS, PyDoc_STR("int64 of every unit, as bytes: tokens that took it")},
    {"counters", units_counters, METH_NOARGS, PyDoc_STR("pi_unit_counters as a tuple")},
    {"fault", units_fault, METH_NOARGS, PyDoc_STR("(error, file, offset, bytes) of the first fault, or None")},
    {"close", units_close, METH_NOARGS, PyDoc_STR("Ends the threads, closes the files, gives the memory back.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef units_getset[] = {
    {"nbytes", units_nbytes, NULL, PyDoc_STR("Bytes of the slots and of the readers' buffers."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot units_slots[] = {
    {Py_tp_dealloc, units_dealloc},
    {Py_tp_methods, units_methods},
    {Py_tp_getset, units_getset},
    {Py_tp_doc, (void *)PyDoc_STR("Units()")},
    {0, NULL},
};

PyType_Spec pi_units_spec = {"powerinfer_kernels._kernels.Units", sizeof(units_object), 0, Py_TPFLAGS_DEFAULT,
                             units_slots};
