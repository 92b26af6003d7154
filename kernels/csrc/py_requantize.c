/* requantize and first_not_finite for Python. */
#include "boundary.h"
#include "requantize.h"
#include "rows_decode.h"

static int is_written(int row_type) {
    return row_type == PI_F32 || row_type == PI_F16 || row_type == PI_BF16 || row_type == PI_Q8_0 ||
           row_type == PI_Q4_0;
}

/* 0, or -1 with KernelError set: `source` are all rows of `from`, and [begin, end) what can be taken of them. */
static int judge_source(const Py_buffer *source, const pi_plain *from, int64_t begin, int64_t end, int columns) {
    const int64_t bytes = pi_rows_bytes(from->row_type, from->rows, from->columns);
    const int64_t most = columns ? from->columns : from->rows;
    if (bytes < 0) return -1;
    const int64_t block = columns ? pi_layout_of(from->row_type).columns : 1;
    if (source->len == bytes && 0 <= begin && begin < end && end <= most && begin % block == 0 && end % block == 0)
        return 0;
    PyErr_SetString(pi_kernel_error, "the source has another size, or is not taken in whole blocks");
    return -1;
}

/* The same for `out`, uint8 [rows, bytes of a row] whose rows may lie apart. */
static int judge_out(const Py_buffer *out, int64_t rows, int64_t bytes) {
    if (bytes > 0 && out->ndim == 2 && out->itemsize == 1 && out->shape[0] == rows && out->shape[1] == bytes &&
        out->strides[1] == 1 && out->strides[0] >= bytes)
        return 0;
    PyErr_SetString(pi_kernel_error, "the rows to be written have another shape, or overlap");
    return -1;
}

PyObject *pi_py_requantize(PyObject *module, PyObject *args) {
    const char *isa;
    Py_buffer source, out;
    pi_plain from = {0};
    PyObject *target, *result = NULL;
    long long rows, columns, begin, end;
    int row_type, to, by_columns;
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*iLLpLLiO", &isa, &source, &row_type, &rows, &columns, &by_columns, &begin, &end,
                          &to, &target))
        return NULL;
    from = (pi_plain){source.buf, row_type, rows, columns};
    const pi_kernels *kernels = pi_kernels_named(isa);
    if (!kernels || judge_source(&source, &from, begin, end, by_columns) < 0 ||
        PyObject_GetBuffer(target, &out, PyBUF_STRIDED) < 0) {
        PyBuffer_Release(&source);
        return NULL;
    }
    const int64_t bytes = is_written(to) ? pi_row_bytes(to, by_columns ? rows : columns) : 0;
    if (judge_out(&out, end - begin, bytes) == 0) {
        pi_squares sums;
        Py_BEGIN_ALLOW_THREADS sums = (by_columns ? pi_requantize_columns : pi_requantize_rows)(
            kernels, &from, begin, end, to, out.buf, out.strides[0]);
        Py_END_ALLOW_THREADS result = Py_BuildValue("dd", sums.lost, sums.norm);
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&source);
    return result;
}

PyObject *pi_py_first_not_finite(PyObject *module, PyObject *args) {
    const char *isa;
    Py_buffer source;
    long long rows, columns, row = -1;
    int row_type, failed;
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*iLL", &isa, &source, &row_type, &rows, &columns)) return NULL;
    const pi_plain from = {source.buf, row_type, rows, columns};
    const pi_kernels *kernels = pi_kernels_named(isa);
    failed = !kernels || judge_source(&source, &from, 0, rows, 0) < 0;
    if (!failed) {
        Py_BEGIN_ALLOW_THREADS row = pi_first_not_finite(kernels, &from);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    return failed ? NULL : PyLong_FromLongLong(row);
}
