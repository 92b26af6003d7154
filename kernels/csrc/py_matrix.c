/* _kernels.Matrix(pool, source, row_type, rows, columns, layout): weights in memory of their own; without a source, tiles
 * of a unit, which are sometimes in memory. */
#include "boundary.h"
#include "columns.h"
#include "transcode.h"

PyTypeObject *pi_matrix_type;

typedef struct {
    const uint8_t *source;
    int row_type; /* of the source */
    pi_matrix *matrix;
} pack_job;

enum { TILES_AT_ONCE = 4 };

/* Tiles [first, last), or groups of 16 picked rows, or stored blocks of picked columns. */
static void pack_part(const pack_job *job, int64_t first, int64_t last) {
    const pi_matrix *m = job->matrix;
    const int64_t row_bytes = pi_row_bytes(job->row_type, m->columns), stride = m->tile_bytes / PI_TILE;
    switch (m->layout) {
    case PI_PICKED_ROWS:
        for (int64_t row = first * PI_TILE; row < last * PI_TILE && row < m->rows; row++)
            pi_pack_planar(job->source + row * row_bytes, job->row_type, m->columns, 0, m->data + row * stride);
        break;
    case PI_PICKED_COLUMNS:
        pi_pack_columns(job->source, job->row_type, m->rows, m->columns, first, last, m->data);
        break;
    default: pi_pack_tiles(job->source, job->row_type, m->rows, m->columns, first, last, m->data);
    }
}

/* What the weights are as `layout`; tiles 0 and KernelError set where they cannot be. */
static pi_matrix matrix_of(int row_type, int layout, int64_t rows, int64_t columns) {
    pi_matrix m = {.row_type = pi_form_of(row_type),
                   .layout = layout,
                   .table = pi_table_of(row_type),
                   .rows = rows,
                   .columns = columns,
                   .tiles = (rows + PI_TILE - 1) / PI_TILE};
    if (layout == PI_TILES) {
        m.tile_bytes = pi_tile_bytes(row_type, columns);
    } else if (layout == PI_PICKED_ROWS) {
        m.tile_bytes = PI_TILE * pi_round_up(pi_planar_of(m.row_type, columns, 0).bytes, 64);
    } else if (layout == PI_PICKED_COLUMNS && pi_columns_possible(row_type, rows)) {
        m.tiles = columns / pi_layout_of(row_type).columns;
        m.tile_bytes = pi_columns_of(row_type, rows).stored;
    } else {
        PyErr_Format(pi_kernel_error, "%lld rows of type %d have no layout %d", (long long)rows, row_type, layout);
        m.tiles = 0;
    }
    return m;
}

static void pack_on_thread(void *argument, pi_worker *worker) {
    const pack_job *job = argument;
    const pi_matrix *m = job->matrix;
    pi_share share = pi_share_open(worker, 0, (m->tiles + TILES_AT_ONCE - 1) / TILES_AT_ONCE);
    int64_t chunk;
    while ((chunk = pi_share_next(&share)) >= 0) {
        int64_t first = chunk * TILES_AT_ONCE, last = first + TILES_AT_ONCE;
        pack_part(job, first, last < m->tiles ? last : m->tiles);
    }
}

static int matrix_init(PyObject *self, PyObject *args, PyObject *keywords) {
    matrix_object *object = (matrix_object *)self;
    pi_matrix *m = &object->matrix;
    PyObject *pool, *source;
    long long rows, columns;
    int row_type, layout = PI_TILES;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "O!OiLL|i", pi_pool_type, &pool, &source, &row_type, &rows, &columns, &layout))
        return -1;
    if (m->tiles) {
        PyErr_SetString(pi_kernel_error, "the matrix exists already");
        return -1;
    }
    int64_t bytes = pi_rows_bytes(row_type, rows, columns);
    const pi_matrix is = bytes < 0 ? (pi_matrix){0} : matrix_of(row_type, layout, rows, columns);
    if (!is.tiles) return -1;
    if (source == Py_None && layout == PI_TILES) { /* units.h gives it a place */
        *m = is;
        return 0;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(source, &view, PyBUF_SIMPLE) < 0) return -1;
    if (view.len != bytes) {
        PyErr_Format(pi_kernel_error, "the rows are %lld bytes, the source has %lld", (long long)bytes,
                     (long long)view.len);
        PyBuffer_Release(&view);
        return -1;
    }
    *m = is;
    int failed = -1;
    if (pi_memory_map(&object->memory, (size_t)(m->tiles * m->tile_bytes) + PI_READ_AHEAD) < 0) {
        PyErr_NoMemory();
    } else {
        m->data = object->memory.data;
        pack_job job = {.source = view.buf, .row_type = row_type, .matrix = m};
        failed = pi_pool_object_run((pool_object *)pool, pack_on_thread, &job);
    }
    PyBuffer_Release(&view);
    return failed;
}

static void matrix_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    pi_memory_unmap(&((matrix_object *)self)->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *matrix_nbytes(PyObject *self, void *unused) {
    const pi_matrix *m = &((matrix_object *)self)->matrix;
    (void)unused;
    return PyLong_FromLongLong(m->tiles * m->tile_bytes);
}

static PyGetSetDef matrix_getset[] = {
    {"nbytes", matrix_nbytes, NULL, PyDoc_STR("Bytes of the packed weights."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot matrix_slots[] = {
    {Py_tp_init, matrix_init},
    {Py_tp_dealloc, matrix_dealloc},
    {Py_tp_getset, matrix_getset},
    {Py_tp_doc, (void *)PyDoc_STR("Matrix(pool, source, row_type, rows, columns, layout=0)")},
    {0, NULL},
};

PyType_Spec pi_matrix_spec = {"powerinfer_kernels._kernels.Matrix", sizeof(matrix_object), 0, Py_TPFLAGS_DEFAULT,
                              matrix_slots};
