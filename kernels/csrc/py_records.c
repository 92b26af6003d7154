/* _kernels.Records(): rows of neurons on disk, and memory for some of them; opened by the Python face. */
#include "records.h"

#include "boundary.h"
#include "bundle.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

PyTypeObject *pi_records_type;

enum { MOST_LAYERS = 4096, MOST_FILES = 4096 };

typedef struct {
    int descriptors[MOST_FILES], direct[MOST_FILES];
    pi_record_layer *layers;
    Py_ssize_t files, count;
} specs;

static int take_files(PyObject *files, specs *s) {
    s->files = PyTuple_Size(files);
    if (s->files > MOST_FILES) {
        PyErr_SetString(pi_kernel_error, "too many files");
        return -1;
    }
    for (Py_ssize_t i = 0; i < s->files; i++)
        if (!PyArg_ParseTuple(PyTuple_GetItem(files, i), "ip", &s->descriptors[i], &s->direct[i])) return -1;
    return 0;
}

/* Whether a part of the layer's records is the bundle's. */
static int part_fits(const pi_record_layer *l, int k) {
    const pi_rows *part = &l->bundle->part[k];
    if (l->row_type[k] < 0) return !part->data;
    if (!part->data || !pi_rows_readable(l->row_type[k], l->bundle->columns)) return 0;
    return pi_form_of(l->row_type[k]) == part->row_type && l->place[k] >= 0 &&
           l->place[k] + pi_row_bytes(l->row_type[k], l->bundle->columns) <= l->bytes;
}

static int take_layer(PyObject *tuple, const specs *s, pi_record_layer *l) {
    PyObject *object;
    long long offset, bytes, place[PI_PARTS], fixed;
    int file, type[PI_PARTS];
    if (!PyArg_ParseTuple(tuple, "O!iLL(LLL)(iii)L", pi_bundle_type, &object, &file, &offset, &bytes, &place[0],
                          &place[1], &place[2], &type[0], &type[1], &type[2], &fixed))
        return -1;
    const bundle_object *bundle = (bundle_object *)object;
    *l = (pi_record_layer){.bundle = &bundle->bundle, .file = file, .offset = offset, .bytes = bytes, .fixed = fixed};
    int fits = bundle->absent && file >= 0 && file < s->files && offset >= 0 && bytes > 0 && bytes < PI_LARGEST &&
               offset < INT64_MAX / 2 && bundle->bundle.rows <= INT32_MAX && fixed >= 0 && fixed <= bundle->bundle.rows;
    for (int k = 0; k < PI_PARTS; k++) {
        l->place[k] = place[k];
        l->row_type[k] = type[k];
        fits = fits && part_fits(l, k);
    }
    if (!fits) PyErr_SetString(pi_kernel_error, "records do not fit their bundle");
    return fits ? 0 : -1;
}

static int take_layers(PyObject *layers, specs *s) {
    s->count = PyTuple_Size(layers);
    if (s->count < 1 || s->count > MOST_LAYERS) {
        PyErr_SetString(pi_kernel_error, "records of no layer, or of too many");
        return -1;
    }
    s->layers = calloc((size_t)s->count, sizeof *s->layers);
    if (!s->layers) return PyErr_NoMemory() ? 0 : -1;
    for (Py_ssize_t i = 0; i < s->count; i++)
        if (take_layer(PyTuple_GetItem(layers, i), s, &s->layers[i]) < 0) return -1;
    return 0;
}

static PyObject *records_open(PyObject *object, PyObject *args) {
    records_object *self = (records_object *)object;
    PyObject *files, *layers;
    long long pages, reading;
    if (!PyArg_ParseTuple(args, "O!O!LL", &PyTuple_Type, &files, &PyTuple_Type, &layers, &pages, &reading)) return NULL;
    if (self->records || pages < 1 || pages > INT64_MAX / PI_PAGE || reading < 1 || reading > PI_LARGEST) {
        PyErr_SetString(pi_kernel_error, self->records ? "the records are open already" : "that much memory cannot be");
        return NULL;
    }
    specs *s = calloc(1, sizeof *s);
    if (!s) return PyErr_NoMemory();
    if (take_files(files, s) == 0 && take_layers(layers, s) == 0) {
        self->records = pi_records_new(s->descriptors, s->direct, (int)s->files, s->layers, s->count, pages, reading);
        if (!self->records) PyErr_Format(pi_kernel_error, "cannot keep records in memory: %s", strerror(errno));
    }
    free(s->layers);
    free(s);
    if (!self->records) return NULL;
    Py_INCREF(layers);
    self->bundles = layers;
    Py_RETURN_NONE;
}

static pi_records *opened(PyObject *object) {
    pi_records *records = ((records_object *)object)->records;
    if (!records) PyErr_SetString(pi_kernel_error, "the records are not open");
    return records;
}

typedef struct {
    pi_records *records;
    int64_t layer, count;
    const int32_t *number;
    int error;
} load_job;

static void load_on_thread(void *argument, pi_worker *worker) {
    load_job *job = argument;
    if (pi_records_fetch(job->records, worker, job->layer, job->number, job->count) < 0)
        __atomic_store_n(&job->error, 1, __ATOMIC_RELAXED);
}

static PyObject *records_load(PyObject *object, PyObject *args) {
    pi_records *records = opened(object);
    PyObject *pool;
    long long layer;
    Py_buffer list;
    if (!records || !PyArg_ParseTuple(args, "O!Ly*", pi_pool_type, &pool, &layer, &list)) return NULL;
    load_job job = {records, layer, list.len / (Py_ssize_t)sizeof(int32_t), list.buf, 0};
    int wrong = layer < 0 || layer >= pi_records_layers(records), failed = 0;
    for (int64_t i = 0; i < job.count && !wrong; i++)
        wrong = job.number[i] < 0 || job.number[i] >= pi_records_neurons(records, layer) ||
                (i && job.number[i] <= job.number[i - 1]);
    records_object *self = (records_object *)object;
    if (!wrong) {
        self->users++;
        failed = pi_pool_object_run((pool_object *)pool, load_on_thread, &job) < 0;
        self->users--;
    }
    PyBuffer_Release(&list);
    if (failed) return NULL;
    if (!wrong) return PyBool_FromLong(!job.error);
    PyErr_SetString(pi_kernel_error, "there are no such records, or they do not ascend");
    return NULL;
}

static PyObject *records_reset(PyObject *object, PyObject *unused) {
    pi_records *records = opened(object);
    (void)unused;
    if (!records) return NULL;
    pi_records_reset(records);
    Py_RETURN_NONE;
}

static PyObject *records_taken(PyObject *object, PyObject *args) {
    pi_records *records = opened(object);
    long long layer;
    if (!records || !PyArg_ParseTuple(args, "L", &layer)) return NULL;
    if (layer < 0 || layer >= pi_records_layers(records)) {
        PyErr_SetString(pi_kernel_error, "there is no such layer");
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, pi_records_neurons(records, layer) * (Py_ssize_t)sizeof(int64_t));
    if (bytes) pi_records_taken(records, layer, (int64_t *)(void *)PyBytes_AsString(bytes));
    return bytes;
}

static PyObject *records_counters(PyObject *object, PyObject *unused) {
    pi_records *records = opened(object);
    (void)unused;
    if (!records) return NULL;
    const pi_record_counters c = pi_records_counters(records);
    return Py_BuildValue("LLLLLLLLL", (long long)c.taken, (long long)c.hits, (long long)c.late, (long long)c.ahead,
                         (long long)c.ahead_used, (long long)c.read_bytes, (long long)c.hit_bytes, (long long)c.moved,
                         (long long)c.wait_nanoseconds);
}

static PyObject *records_fault(PyObject *object, PyObject *unused) {
    pi_records *records = opened(object);
    (void)unused;
    if (!records) return NULL;
    const pi_unit_fault f = pi_records_fault(records);
    if (!f.error) Py_RETURN_NONE;
    return Py_BuildValue("iiLL", f.error, (int)f.file, (long long)f.offset, (long long)f.bytes);
}

static PyObject *records_close(PyObject *object, PyObject *unused) {
    records_object *self = (records_object *)object;
    (void)unused;
    if (self->users) {
        PyErr_SetString(pi_kernel_error, "the records are in use by another thread and cannot be closed");
        return NULL;
    }
    pi_records_free(self->records);
    self->records = NULL;
    Py_RETURN_NONE;
}

static PyObject *records_nbytes(PyObject *object, void *unused) {
    pi_records *records = opened(object);
    (void)unused;
    return records ? PyLong_FromLongLong(pi_records_memory(records)) : NULL;
}

static PyObject *records_asynchronous(PyObject *object, void *unused) {
    pi_records *records = opened(object);
    (void)unused;
    return records ? PyBool_FromLong(pi_records_asynchronous(records)) : NULL;
}

static void records_dealloc(PyObject *object) {
    records_object *self = (records_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    pi_records_free(self->records);
    Py_XDECREF(self->bundles);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef records_methods[] = {
    {"open", records_open, METH_VARARGS, PyDoc_STR("open(files, layers, pages, reading_bytes)")},
    {"load", records_load, METH_VARARGS, PyDoc_STR("load(pool, layer, numbers): whether they are in memory now")},
    {"reset", records_reset, METH_NOARGS, PyDoc_STR("Counts from here on.")},
    {"taken", records_taken, METH_VARARGS, PyDoc_STR("taken(layer): int64 of every neuron, as bytes")},
    {"counters", records_counters, METH_NOARGS, PyDoc_STR("pi_record_counters as a tuple")},
    {"fault", records_fault, METH_NOARGS, PyDoc_STR("(error, file, offset, bytes) of the first fault, or None")},
    {"close", records_close, METH_NOARGS, PyDoc_STR("Closes the files, gives the memory back.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef records_getset[] = {
    {"nbytes", records_nbytes, NULL, PyDoc_STR("Bytes of the records in memory and of what is being read."), NULL},
    {"asynchronous", records_asynchronous, NULL, PyDoc_STR("Whether the system reads while nobody waits."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot records_slots[] = {
    {Py_tp_dealloc, records_dealloc},
    {Py_tp_methods, records_methods},
    {Py_tp_getset, records_getset},
    {Py_tp_doc, (void *)PyDoc_STR("Records()")},
    {0, NULL},
};

PyType_Spec pi_records_spec = {"powerinfer_kernels._kernels.Records", sizeof(records_object), 0, Py_TPFLAGS_DEFAULT,
                               records_slots};
