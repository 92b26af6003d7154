/* _kernels.Pool(threads, isa): a thread pool together with the kernels of one instruction set. */
#include "module.h"

#include <errno.h>
#include <string.h>

PyTypeObject *pi_pool_type;

const pi_kernels *pi_kernels_named(const char *isa) {
    for (const pi_kernels *const *k = pi_available_kernels(); *k; k++)
        if (strcmp((*k)->isa, isa) == 0) return *k;
    PyErr_Format(pi_kernel_error, "instruction set '%s' is not available on this machine", isa);
    return NULL;
}

void pi_raise_thread_error(int error) {
    PyErr_Format(pi_kernel_error, "cannot run on the thread pool: %s", strerror(error));
}

int pi_pool_object_enter(pool_object *pool) {
    if (!pool->pool) {
        PyErr_SetString(pi_kernel_error, "the thread pool is closed");
        return -1;
    }
    if (pool->mark != pi_run_mark()) pool->users = 0; /* those were threads of the process that forked */
    pool->mark = pi_run_mark();
    pool->users++;
    return 0;
}

void pi_pool_object_leave(pool_object *pool) { pool->users--; }

int pi_pool_object_run(pool_object *pool, pi_task task, void *argument) {
    int error;
    if (pi_pool_object_enter(pool) < 0) return -1;
    Py_BEGIN_ALLOW_THREADS error = pi_pool_run(pool->pool, task, argument);
    Py_END_ALLOW_THREADS pi_pool_object_leave(pool);
    if (error) pi_raise_thread_error(error);
    return error ? -1 : 0;
}

static int pool_init(PyObject *self, PyObject *args, PyObject *keywords) {
    pool_object *pool = (pool_object *)self;
    const char *isa;
    int threads;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "is", &threads, &isa)) return -1;
    if (pool->pool) {
        PyErr_SetString(pi_kernel_error, "the pool exists already");
        return -1;
    }
    if (threads < 1 || threads > PI_MAX_THREADS) {
        PyErr_Format(pi_kernel_error, "threads must be between 1 and %d, got %d", (int)PI_MAX_THREADS, threads);
        return -1;
    }
    if (!(pool->kernels = pi_kernels_named(isa))) return -1;
    pool->threads = threads;
    if (!(pool->pool = pi_pool_new(threads))) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void pool_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    pi_pool_free(((pool_object *)self)->pool);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *pool_close(PyObject *self, PyObject *unused) {
    pool_object *pool = (pool_object *)self;
    (void)unused;
    if (pool->users && pool->mark == pi_run_mark()) {
        PyErr_SetString(pi_kernel_error, "the thread pool is in use by another thread and cannot be closed");
        return NULL;
    }
    pi_pool_free(pool->pool);
    pool->pool = NULL;
    Py_RETURN_NONE;
}

static PyMethodDef pool_methods[] = {
    {"close", pool_close, METH_NOARGS, PyDoc_STR("Ends the threads; further runs raise KernelError.")},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot pool_slots[] = {
    {Py_tp_init, pool_init},
    {Py_tp_dealloc, pool_dealloc},
    {Py_tp_methods, pool_methods},
    {Py_tp_doc, (void *)PyDoc_STR("Pool(threads, isa)")},
    {0, NULL},
};

PyType_Spec pi_pool_spec = {"powerinfer_kernels._kernels.Pool", sizeof(pool_object), 0, Py_TPFLAGS_DEFAULT, pool_slots};
