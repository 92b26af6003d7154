/* The Python types of the extension, shared by its files. Stable ABI only. */
#ifndef PI_MODULE_H
#define PI_MODULE_H

#include <Python.h>

#include "kernels.h"
#include "memory.h"
#include "pool.h"
#include "program.h"
#include "records.h"
#include "units.h"

extern PyObject *pi_kernel_error; /* powerinfer_kernels.KernelError */
extern PyTypeObject *pi_pool_type, *pi_matrix_type, *pi_bundle_type, *pi_program_type, *pi_state_type, *pi_units_type,
    *pi_records_type;
extern PyType_Spec pi_pool_spec, pi_matrix_spec, pi_bundle_spec, pi_program_spec, pi_state_spec, pi_units_spec,
    pi_records_spec;

typedef struct {
    PyObject_HEAD pi_pool *pool; /* NULL: closed */
    const pi_kernels *kernels;
    int threads, users; /* users: calls in progress; changed with the GIL held only */
    unsigned mark;      /* pi_run_mark when they came */
} pool_object;

typedef struct {
    PyObject_HEAD pi_matrix matrix;
    pi_memory memory;
} matrix_object;

typedef struct {
    PyObject_HEAD pi_bundle bundle;
    pi_memory memory;
    int absent; /* its rows are on disk */
} bundle_object;

typedef struct {
    PyObject_HEAD pi_units *units; /* NULL: not open */
    PyObject *matrices;            /* what was opened, which keeps the matrices alive */
    int users;                     /* runs and loads in progress; changed with the GIL held only */
} units_object;

typedef struct {
    PyObject_HEAD pi_records *records; /* NULL: not open */
    PyObject *bundles;                 /* what was opened, which keeps the bundles alive */
    int users;                         /* as of units */
} records_object;

enum { PI_READ_AHEAD = 64 << 10 /* kernels may prefetch past the end of weights, and read within a line of it */ };

/* The table of that name among those this CPU can run; NULL with KernelError set. */
const pi_kernels *pi_kernels_named(const char *isa);
/* Runs with the GIL released. 0, or -1 with KernelError set (closed pool, threads that did not start). */
int pi_pool_object_run(pool_object *pool, pi_task task, void *argument);
/* Marks the pool as in use, so that it cannot be closed meanwhile; -1 with KernelError set when it is closed. */
int pi_pool_object_enter(pool_object *pool);
void pi_pool_object_leave(pool_object *pool);
void pi_raise_thread_error(int error);
/* Puts a tuple of (State or None, position, count) into program->spans, and marks the states as running; 0, or -1 with
 * an error set and no state marked. `serial` tells programs apart, `capacity` bounds positions. */
int pi_spans_enter(PyObject *spans, pi_program *program, int64_t serial, int64_t capacity);
/* The first `count` states may run elsewhere. */
void pi_spans_leave(PyObject *spans, int64_t count);
/* Functions of the module (py_requantize.c). */
PyObject *pi_py_requantize(PyObject *module, PyObject *args);
PyObject *pi_py_first_not_finite(PyObject *module, PyObject *args);

#endif
