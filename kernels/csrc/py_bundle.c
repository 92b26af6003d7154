/* _kernels.Bundle(pool, sources, row_types, rows, columns): the rows of neurons, neuron by neuron (bundle.h), in memory
 * of its own. Sources: plain rows of gate, up and down, or None. */
#include "bundle.h"

#include "boundary.h"

#include <sys/mman.h>

PyTypeObject *pi_bundle_type;

typedef struct {
    const uint8_t *source[PI_PARTS];
    const int *types; /* of the sources */
    pi_bundle *bundle;
} pack_job;

enum { ROWS_AT_ONCE = 16 };

static void pack_row(const pack_job *job, int64_t row) {
    for (int k = 0; k < PI_PARTS; k++) {
        const pi_rows *part = &job->bundle->part[k];
        if (!part->data) continue;
        pi_pack_planar(job->source[k] + row * pi_row_bytes(job->types[k], part->columns), job->types[k], part->columns,
                       k == PI_DOWN, (uint8_t *)part->data + row * part->stride);
    }
}

static void pack_on_thread(void *argument, pi_worker *worker) {
    const pack_job *job = argument;
    pi_share share = pi_share_open(worker, 0, (job->bundle->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
    int64_t chunk;
    while ((chunk = pi_share_next(&share)) >= 0)
        for (int64_t row = chunk * ROWS_AT_ONCE; row < (chunk + 1) * ROWS_AT_ONCE && row < job->bundle->rows; row++)
            pack_row(job, row);
}

/* Offsets and stride of the parts that are `there`; the bytes of a record. */
static int64_t lay_out(pi_bundle *b, const int *there, const int *types, int64_t offsets[PI_PARTS]) {
    int64_t record = 0;
    for (int k = 0; k < PI_PARTS; k++) {
        offsets[k] = record;
        if (!there[k]) continue;
        b->part[k] = (pi_rows){
            .row_type = pi_form_of(types[k]), .table = pi_table_of(types[k]), .rows = b->rows, .columns = b->columns};
        record += pi_planar_of(b->part[k].row_type, b->columns, k == PI_DOWN).bytes;
    }
    return pi_round_up(record, 64);
}

/* Gives the parts that are `there` their places; the bytes of all records, or -1 with an error set. */
static int64_t place(bundle_object *object, const int *there, const int *types) {
    pi_bundle *b = &object->bundle;
    int64_t offsets[PI_PARTS], stride = lay_out(b, there, types, offsets);
    if (pi_memory_map(&object->memory, (size_t)(b->rows * stride) + PI_READ_AHEAD) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    for (int k = 0; k < PI_PARTS; k++) {
        if (!there[k]) continue;
        b->part[k].data = (const uint8_t *)object->memory.data + offsets[k];
        b->part[k].stride = stride;
    }
    return b->rows * stride;
}

static int fill(bundle_object *object, pool_object *pool, const Py_buffer *views, const int *types) {
    pack_job job = {.types = types, .bundle = &object->bundle};
    int there[PI_PARTS];
    for (int k = 0; k < PI_PARTS; k++) there[k] = views[k].obj != NULL;
    if (place(object, there, types) < 0) return -1;
    for (int k = 0; k < PI_PARTS; k++)
        if (there[k]) job.source[k] = views[k].buf;
    return pi_pool_object_run(pool, pack_on_thread, &job);
}

/* Addresses for rows that records.h brings; small pages, so that those of single records can be given back. */
static int reserve(bundle_object *object, PyObject **wanted, const int *types) {
    int there[PI_PARTS], any = 0;
    for (int k = 0; k < PI_PARTS; k++) {
        there[k] = wanted[k] != Py_None;
        any |= there[k];
        if (there[k] && pi_rows_bytes(types[k], object->bundle.rows, object->bundle.columns) < 0) return -1;
    }
    if (!any) {
        PyErr_SetString(pi_kernel_error, "a bundle of no rows at all");
        return -1;
    }
    const int64_t bytes = place(object, there, types);
    if (bytes < 0) return -1;
    madvise(object->memory.data, (size_t)bytes, MADV_NOHUGEPAGE);
    object->absent = 1;
    return 0;
}

/* The source of one part in `view`; 0, or -1 with an error set. */
static int take_source(PyObject *source, int row_type, int64_t rows, int64_t columns, Py_buffer *view) {
    const int64_t bytes = pi_rows_bytes(row_type, rows, columns);
    if (bytes < 0 || PyObject_GetBuffer(source, view, PyBUF_SIMPLE) < 0) return -1;
    if (view->len == bytes) return 0;
    PyErr_Format(pi_kernel_error, "the rows are %lld bytes, the source has %lld", (long long)bytes,
                 (long long)view->len);
    return -1;
}

static int bundle_init(PyObject *self, PyObject *args, PyObject *keywords) {
    bundle_object *object = (bundle_object *)self;
    PyObject *pool, *source[PI_PARTS];
    Py_buffer views[PI_PARTS] = {{0}};
    long long rows, columns;
    int types[PI_PARTS], failed = 0, absent = 0;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "O!(OOO)(iii)LL|p", pi_pool_type, &pool, source, source + 1, source + 2, types,
                          types + 1, types + 2, &rows, &columns, &absent))
        return -1;
    if (object->memory.data) {
        PyErr_SetString(pi_kernel_error, "the bundle exists already");
        return -1;
    }
    if (absent) {
        object->bundle = (pi_bundle){.rows = rows, .columns = columns};
        return reserve(object, source, types);
    }
    int sources = 0;
    for (int k = 0; k < PI_PARTS && !failed; k++) {
        if (source[k] == Py_None) continue;
        sources++;
        failed = take_source(source[k], types[k], rows, columns, &views[k]);
    }
    if (!failed && !sources) {
        PyErr_SetString(pi_kernel_error, "a bundle of no rows at all");
        failed = -1;
    }
    if (!failed) object->bundle = (pi_bundle){.rows = rows, .columns = columns};
    if (!failed) failed = fill(object, (pool_object *)pool, views, types);
    for (int k = 0; k < PI_PARTS; k++)
        if (views[k].obj) PyBuffer_Release(&views[k]);
    return failed;
}

static void bundle_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    pi_memory_unmap(&((bundle_object *)self)->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *bundle_nbytes(PyObject *self, void *unused) {
    const pi_bundle *b = &((bundle_object *)self)->bundle;
    int64_t stride = 0;
    (void)unused;
    for (int k = 0; k < PI_PARTS; k++)
        if (b->part[k].data) stride = b->part[k].stride;
    return PyLong_FromLongLong(b->rows * stride);
}

static PyObject *bundle_gate_nbytes(PyObject *self, void *unused) {
    const pi_bundle *b = &((bundle_object *)self)->bundle;
    (void)unused;
    if (!b->part[PI_GATE].data) return PyLong_FromLong(0);
    return PyLong_FromLongLong(b->rows * pi_planar_of(b->part[PI_GATE].row_type, b->columns, 0).bytes);
}

static PyGetSetDef bundle_getset[] = {
    {"gate_nbytes", bundle_gate_nbytes, NULL, PyDoc_STR("Bytes of the gate rows of all records."), NULL},
    {"nbytes", bundle_nbytes, NULL, PyDoc_STR("Bytes of all records."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot bundle_slots[] = {
    {Py_tp_init, bundle_init},
    {Py_tp_dealloc, bundle_dealloc},
    {Py_tp_getset, bundle_getset},
    {Py_tp_doc, (void *)PyDoc_STR("Bundle(pool, sources, row_types, rows, columns)")},
    {0, NULL},
};

PyType_Spec pi_bundle_spec = {"powerinfer_kernels._kernels.Bundle", sizeof(bundle_object), 0, Py_TPFLAGS_DEFAULT,
                              bundle_slots};
