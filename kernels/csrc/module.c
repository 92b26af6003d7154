/* The extension module: types, and the functions that need no program. */
#include "boundary.h"

#include "bandwidth.h"
#include "bus_error.h"
#include "transcode.h"

#include <errno.h>

PyObject *pi_kernel_error;

static PyObject *available_isas(PyObject *module, PyObject *unused) {
    const pi_kernels *const *kernels = pi_available_kernels();
    PyObject *names = PyList_New(0);
    (void)module, (void)unused;
    for (int i = 0; names && kernels[i]; i++) {
        PyObject *name = PyUnicode_FromString(kernels[i]->isa);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    PyObject *result = names ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return result;
}

static PyObject *operations(PyObject *module, PyObject *unused) {
    PyObject *names = PyTuple_New(PI_OP_KINDS);
    (void)module, (void)unused;
    for (int kind = 0; names && kind < PI_OP_KINDS; kind++) {
        PyObject *name = PyUnicode_FromString(pi_op_shapes[kind].name);
        if (!name || PyTuple_SetItem(names, kind, name) < 0) Py_CLEAR(names);
    }
    return names;
}

static PyObject *row_bytes(PyObject *module, PyObject *args) {
    int row_type;
    long long columns;
    (void)module;
    if (!PyArg_ParseTuple(args, "iL", &row_type, &columns)) return NULL;
    return PyLong_FromLongLong(pi_row_bytes(row_type, columns));
}

static PyObject *packed_row_bytes(PyObject *module, PyObject *args) {
    int row_type;
    long long columns;
    (void)module;
    if (!PyArg_ParseTuple(args, "iL", &row_type, &columns)) return NULL;
    return PyLong_FromLongLong(pi_row_bytes(pi_form_of(row_type), columns));
}

static PyObject *repack(PyObject *module, PyObject *args) {
    Py_buffer source, out;
    int row_type;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*i", &source, &out, &row_type)) return NULL;
    const int64_t from = pi_layout_of(row_type).bytes, blocks = from ? source.len / from : 0;
    const pi_layout form = pi_layout_of(pi_form_of(row_type));
    const int64_t to = from ? pi_layout_of(row_type).columns / form.columns * form.bytes : 0;
    if (!pi_rows_readable(row_type, pi_layout_of(row_type).columns) || source.len != blocks * from ||
        out.len != blocks * to) {
        PyErr_Format(pi_kernel_error, "%lld bytes are no rows of type %d for %lld", (long long)source.len, row_type,
                     (long long)out.len);
        PyBuffer_Release(&source);
        PyBuffer_Release(&out);
        return NULL;
    }
    const uint8_t *p = source.buf;
    uint8_t *made = out.buf;
    Py_BEGIN_ALLOW_THREADS if (pi_form_of(row_type) == row_type) memcpy(made, p, (size_t)source.len);
    else for (int64_t b = 0; b < blocks; b++) pi_transcode_block(row_type, p + b * from, made + b * to);
    Py_END_ALLOW_THREADS PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    Py_RETURN_NONE;
}

static PyObject *grid_bytes(PyObject *module, PyObject *args) {
    int row_type;
    (void)module;
    if (!PyArg_ParseTuple(args, "i", &row_type)) return NULL;
    return PyLong_FromLongLong(pi_has_grid(row_type) ? 0 : pi_grid_bytes(row_type));
}

static PyObject *set_grid(PyObject *module, PyObject *args) {
    int row_type, failed;
    Py_buffer codes;
    (void)module;
    if (!PyArg_ParseTuple(args, "iy*", &row_type, &codes)) return NULL;
    const int wrong = codes.len != pi_grid_bytes(row_type);
    failed = wrong ? 0 : pi_set_grid(row_type, codes.buf);
    PyBuffer_Release(&codes);
    if (failed) return PyErr_NoMemory();
    if (wrong) {
        PyErr_Format(pi_kernel_error, "a grid of type %d has another size", row_type);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* `packed` are rows, and `values` as many floats; 0, or -1 with KernelError set. */
static int judge_rows(const Py_buffer *packed, int row_type, const Py_buffer *values, int64_t rows, int64_t columns) {
    const int64_t bytes = pi_rows_bytes(row_type, rows, columns), part = row_type == PI_F32 ? 4 : 2;
    if (bytes < 0) return -1;
    if (packed->len == bytes && values->len == rows * columns * 4 && (uintptr_t)values->buf % 4 == 0 &&
        (row_type == PI_MXFP4 || (uintptr_t)packed->buf % (uintptr_t)part == 0))
        return 0;
    PyErr_SetString(pi_kernel_error, "buffers of rows have another size, or are not aligned to their values");
    return -1;
}

static PyObject *dequantize(PyObject *module, PyObject *args) {
    const char *isa;
    Py_buffer source, out;
    int row_type;
    long long rows, columns;
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*w*iLL", &isa, &source, &out, &row_type, &rows, &columns)) return NULL;
    const pi_kernels *kernels = pi_kernels_named(isa);
    if (kernels && judge_rows(&source, row_type, &out, rows, columns) < 0) kernels = NULL;
    if (kernels) {
        int64_t stride = pi_row_bytes(row_type, columns);
        const uint8_t *from = source.buf;
        float *to = out.buf;
        Py_BEGIN_ALLOW_THREADS for (int64_t row = 0; row < rows; row++)
            kernels->dequantize_row(from + row * stride, row_type, columns, to + row * columns);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    if (!kernels) return NULL;
    Py_RETURN_NONE;
}

static PyObject *quantize(PyObject *module, PyObject *args) {
    Py_buffer values, out;
    int row_type, failed = 0;
    long long rows, columns;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*iLL", &values, &out, &row_type, &rows, &columns)) return NULL;
    if (judge_rows(&out, row_type, &values, rows, columns) < 0) {
        PyBuffer_Release(&values);
        PyBuffer_Release(&out);
        return NULL;
    }
    int64_t stride = pi_row_bytes(row_type, columns);
    const float *from = values.buf;
    uint8_t *to = out.buf;
    Py_BEGIN_ALLOW_THREADS for (int64_t row = 0; row < rows && !failed; row++) failed =
        pi_quantize_row(from + row * columns, row_type, columns, to + row * stride);
    Py_END_ALLOW_THREADS PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    if (failed) {
        PyErr_Format(pi_kernel_error, "rows of type %d can be read but not written", row_type);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *read_bandwidth(PyObject *module, PyObject *args) {
    PyObject *object;
    long long bytes;
    double seconds, rate;
    int huge, error;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!Ldp", pi_pool_type, &object, &bytes, &seconds, &huge)) return NULL;
    pool_object *pool = (pool_object *)object;
    if (bytes < 1 || bytes > 1LL << 46 || !(seconds >= 0 && seconds < 1e6)) {
        PyErr_SetString(pi_kernel_error, "a bandwidth is measured over a positive number of bytes and seconds");
        return NULL;
    }
    if (pi_pool_object_enter(pool) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS rate = pi_read_bandwidth(pool->pool, pool->kernels, bytes, seconds, huge, &error);
    Py_END_ALLOW_THREADS pi_pool_object_leave(pool);
    if (error) {
        pi_raise_thread_error(error);
        return NULL;
    }
    return PyFloat_FromDouble(rate);
}

static PyObject *guard_mapped_files(PyObject *module, PyObject *args) {
    int code, error;
    (void)module;
    if (!PyArg_ParseTuple(args, "i", &code)) return NULL;
    if ((error = pi_guard_mapped_files(code))) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"available_isas", available_isas, METH_NOARGS, PyDoc_STR("Names of the instruction sets, best first.")},
    {"operations", operations, METH_NOARGS, PyDoc_STR("Names of the operations of programs, by number.")},
    {"row_bytes", row_bytes, METH_VARARGS, PyDoc_STR("row_bytes(row_type, columns): 0 when there is no such row")},
    {"packed_row_bytes", packed_row_bytes, METH_VARARGS, PyDoc_STR("packed_row_bytes(row_type, columns): in its form")},
    {"repack", repack, METH_VARARGS, PyDoc_STR("repack(source, out, row_type)")},
    {"grid_bytes", grid_bytes, METH_VARARGS,
     PyDoc_STR("grid_bytes(row_type): of a grid that is still to be set, or 0")},
    {"set_grid", set_grid, METH_VARARGS, PyDoc_STR("set_grid(row_type, numbers): what set_grid of grids.py makes")},
    {"dequantize", dequantize, METH_VARARGS, PyDoc_STR("dequantize(isa, source, out, row_type, rows, columns)")},
    {"quantize", quantize, METH_VARARGS, PyDoc_STR("quantize(values, out, row_type, rows, columns)")},
    {"requantize", pi_py_requantize, METH_VARARGS,
     PyDoc_STR("requantize(isa, source, row_type, rows, columns, by_columns, begin, end, to, out)")},
    {"first_not_finite", pi_py_first_not_finite, METH_VARARGS,
     PyDoc_STR("first_not_finite(isa, source, row_type, rows, columns): a row, or -1")},
    {"guard_mapped_files", guard_mapped_files, METH_VARARGS,
     PyDoc_STR("guard_mapped_files(code): SIGBUS ends the process with this exit code and a line")},
    {"read_bandwidth", read_bandwidth, METH_VARARGS, PyDoc_STR("read_bandwidth(pool, nbytes, seconds, huge)")},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", PyDoc_STR("C kernels of powerinfer."), -1, functions, NULL, NULL, NULL, NULL,
};

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type) {
    *type = (PyTypeObject *)PyType_FromSpec(spec);
    return *type ? PyModule_AddType(module, *type) : -1;
}

PyMODINIT_FUNC PyInit__kernels(void) {
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    pi_kernel_error = PyErr_NewException("powerinfer_kernels.KernelError", NULL, NULL);
    if (!pi_kernel_error || PyModule_AddObjectRef(module, "KernelError", pi_kernel_error) < 0 ||
        add_type(module, &pi_pool_spec, &pi_pool_type) < 0 || add_type(module, &pi_matrix_spec, &pi_matrix_type) < 0 ||
        add_type(module, &pi_bundle_spec, &pi_bundle_type) < 0 ||
        add_type(module, &pi_program_spec, &pi_program_type) < 0 ||
        add_type(module, &pi_state_spec, &pi_state_type) < 0 || add_type(module, &pi_units_spec, &pi_units_type) < 0 ||
        add_type(module, &pi_records_spec, &pi_records_type) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
