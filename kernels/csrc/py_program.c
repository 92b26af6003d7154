/* _kernels.Program(max_tokens, capacity): operations appended by the Python face, and judged by boundary.c. */
#include "boundary.h"

#include <stdlib.h>
#include <string.h>

PyTypeObject *pi_program_type;

typedef struct {
    PyObject_HEAD pi_program program;
    int64_t capacity, ops_capacity;
    int64_t serial;   /* no other program ever has this one */
    Py_buffer *views; /* everything the operations point into, held until the program ends */
    int64_t view_count, views_capacity;
    PyObject *weights;        /* list of the Matrix, Bundle and Units objects */
    units_object *units;      /* the one that is fetched from, or NULL */
    records_object *records;  /* as well */
    const pi_matrix ***lists; /* of matrices, which operations point to */
    int64_t list_count, lists_capacity;
    int sealed, complete;
    unsigned running; /* pi_run_mark of the process that runs it, or 0 */
} program_object;

/* Room for `more` elements behind `count`; -1 with MemoryError set. */
static int grow(void **items, int64_t *capacity, int64_t count, int64_t more, size_t size) {
    if (count + more <= *capacity) return 0;
    int64_t wanted = (count + more) * 2;
    void *grown = PyMem_Realloc(*items, (size_t)wanted * size);
    if (!grown) {
        PyErr_NoMemory();
        return -1;
    }
    *items = grown;
    *capacity = wanted;
    return 0;
}

/* A tuple of Matrix objects or None, as an array of pointers. */
static int take_matrices(program_object *self, PyObject *tuple, void **pointer) {
    const Py_ssize_t count = PyTuple_Size(tuple);
    if (grow((void **)&self->lists, &self->lists_capacity, self->list_count, 1, sizeof *self->lists) < 0) return -1;
    const pi_matrix **list = PyMem_Calloc((size_t)count + 1, sizeof *list);
    if (!list) {
        PyErr_NoMemory();
        return -1;
    }
    self->lists[self->list_count++] = list;
    *pointer = list;
    for (Py_ssize_t k = 0; k < count; k++) {
        PyObject *item = PyTuple_GetItem(tuple, k);
        if (item == Py_None) continue;
        list[k] = &((matrix_object *)item)->matrix;
        if (PyList_Append(self->weights, item) < 0) return -1;
    }
    return 0;
}

/* Keeps object k, which `pi_judge_object` has allowed, and points to it. */
static int take_object(program_object *self, const pi_op_shape *shape, int k, PyObject *object, pi_given *m) {
    if (grow((void **)&self->views, &self->views_capacity, self->view_count, 1, sizeof(Py_buffer)) < 0) return -1;
    Py_buffer *view = &self->views[self->view_count];
    int buffer = pi_judge_object(m, shape, k, object, view);
    if (buffer < 0 || object == Py_None) return buffer;
    if (buffer) {
        self->view_count++;
        m->p[k] = view->buf;
        return 0;
    }
    if (PyTuple_Check(object)) return take_matrices(self, object, &m->p[k]);
    if (PyObject_TypeCheck(object, pi_units_type)) {
        if (self->units && self->units != (units_object *)object) {
            PyErr_SetString(pi_kernel_error, "a program fetches from one object alone");
            return -1;
        }
        self->units = (units_object *)object;
        m->p[k] = &self->units->units;
    } else if (PyObject_TypeCheck(object, pi_records_type)) {
        if (self->records && self->records != (records_object *)object) {
            PyErr_SetString(pi_kernel_error, "a program fetches from one object alone");
            return -1;
        }
        self->records = (records_object *)object;
        m->p[k] = &self->records->records;
    } else if (PyObject_TypeCheck(object, pi_matrix_type))
        m->p[k] = &((matrix_object *)object)->matrix;
    else
        m->p[k] = &((bundle_object *)object)->bundle;
    return PyList_Append(self->weights, object);
}

static int take_numbers(const pi_op_shape *shape, PyObject *integers, PyObject *floats, pi_given *m) {
    for (int k = 0; k < shape->integers; k++) {
        m->i[k] = PyLong_AsLongLong(PyTuple_GetItem(integers, k));
        if (m->i[k] == -1 && PyErr_Occurred()) return -1;
        if (m->i[k] > -PI_LARGEST && m->i[k] < PI_LARGEST) continue;
        PyErr_Format(pi_kernel_error, "%s: integer %d is too large", shape->name, k);
        return -1;
    }
    for (int k = 0; k < shape->floats; k++) {
        double value = PyFloat_AsDouble(PyTuple_GetItem(floats, k));
        if (value == -1.0 && PyErr_Occurred()) return -1;
        m->f[k] = (float)value;
    }
    return 0;
}

static int take_arguments(program_object *self, int kind, PyObject *objects, PyObject *integers, PyObject *floats,
                          pi_given *m) {
    const pi_op_shape *shape = &pi_op_shapes[kind];
    int count = pi_object_count(shape);
    if (PyTuple_Size(objects) != count || PyTuple_Size(integers) != shape->integers ||
        PyTuple_Size(floats) != shape->floats) {
        PyErr_Format(pi_kernel_error, "%s has the wrong number of arguments", shape->name);
        return -1;
    }
    if (take_numbers(shape, integers, floats, m) < 0) return -1;
    for (int k = 0; k < count; k++)
        if (pi_note_weights(m, PyTuple_GetItem(objects, k)) < 0) return -1;
    for (int k = 0; k < count; k++)
        if (take_object(self, shape, k, PyTuple_GetItem(objects, k), m) < 0) return -1;
    return pi_judge_condition(m, (pi_op_kind)kind);
}

static PyObject *program_append(PyObject *object, PyObject *args) {
    program_object *self = (program_object *)object;
    PyObject *objects, *integers, *floats;
    pi_given a = {.tokens = self->program.max_tokens, .capacity = self->capacity};
    int kind;
    if (!PyArg_ParseTuple(args, "iO!O!O!", &kind, &PyTuple_Type, &objects, &PyTuple_Type, &integers, &PyTuple_Type,
                          &floats))
        return NULL;
    if (!self->weights || self->sealed || kind < 0 || kind >= PI_OP_KINDS) {
        PyErr_SetString(pi_kernel_error, self->sealed    ? "the program is complete"
                                         : self->weights ? "unknown operation"
                                                         : "the program was not initialised");
        return NULL;
    }
    if (take_arguments(self, kind, objects, integers, floats, &a) < 0) return NULL;
    pi_program *program = &self->program;
    if (grow((void **)&program->ops, &self->ops_capacity, program->count, 1, sizeof(pi_op)) < 0) return NULL;
    program->ops[program->count++] = pi_op_of((pi_op_kind)kind, &a);
    Py_RETURN_NONE;
}

static int take_slots(pi_program *program, PyObject *slots) {
    int64_t count = PyTuple_Size(slots);
    program->slots = calloc((size_t)count + 1, sizeof(pi_slot_spec));
    if (!program->slots) {
        PyErr_NoMemory();
        return -1;
    }
    program->slot_count = count;
    for (int64_t k = 0; k < count; k++) {
        PyObject *item = PyTuple_GetItem(slots, k);
        long long a, b = 0, c = 0, d = 0;
        int kind;
        if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "iL|LLL", &kind, &a, &b, &c, &d)) return -1;
        const int64_t sizes[4] = {a, b, c, d};
        if (!pi_slot_possible(kind, sizes)) {
            PyErr_Format(pi_kernel_error, "slot %lld has impossible sizes", (long long)k);
            return -1;
        }
        program->slots[k] = (pi_slot_spec){.kind = (pi_slot_kind)kind};
        if (kind == PI_SLOT_KV) {
            program->slots[k].capacity = a;
            program->slots[k].kv_heads = b;
            program->slots[k].head_dim = c;
            program->slots[k].value_dim = d;
        } else
            program->slots[k].count = a;
    }
    return 0;
}

/* Operations learn the sizes of the slots that they name; -1 with KernelError set where one does not exist or has
 * another width. */
static int join_slots(pi_program *program) {
    for (int64_t i = 0, slot; i < program->count; i++) {
        pi_op *op = &program->ops[i];
        if (!pi_op_slot(op, &slot)) continue;
        const pi_slot_spec *spec = slot >= 0 && slot < program->slot_count ? &program->slots[slot] : NULL;
        int recurrent = op->kind != PI_OP_STORE_KV && op->kind != PI_OP_ATTENTION;
        int fits = spec && spec->kind == (recurrent ? PI_SLOT_RECURRENT : PI_SLOT_KV);
        if (fits && recurrent) fits = spec->count == pi_recurrent_count(op);
        if (fits && op->kind == PI_OP_STORE_KV)
            fits = op->u.store.width == spec->kv_heads * spec->head_dim &&
                   op->u.store.value_width == spec->kv_heads * spec->value_dim;
        if (fits && op->kind == PI_OP_ATTENTION) {
            op->u.attention.kv_heads = spec->kv_heads;
            op->u.attention.head_dim = spec->head_dim;
            op->u.attention.value_dim = spec->value_dim;
            op->u.attention.capacity = spec->capacity;
            const pi_attention *at = &op->u.attention;
            fits = at->heads > 0 && at->heads % spec->kv_heads == 0 &&
                   at->q_values == program->max_tokens * at->heads * spec->head_dim &&
                   at->out_values == program->max_tokens * at->heads * spec->value_dim;
        }
        if (fits) continue;
        PyErr_Format(pi_kernel_error, "operation %lld has no slot %lld of its kind", (long long)i, (long long)slot);
        return -1;
    }
    return 0;
}

static PyObject *program_seal(PyObject *object, PyObject *args) {
    program_object *self = (program_object *)object;
    PyObject *slots;
    if (!PyArg_ParseTuple(args, "O!", &PyTuple_Type, &slots)) return NULL;
    if (self->sealed || !self->weights) {
        PyErr_SetString(pi_kernel_error, self->sealed ? "the program is complete" : "the program was not initialised");
        return NULL;
    }
    self->sealed = 1; /* once only, whether it works or not */
    if (take_slots(&self->program, slots) < 0 || join_slots(&self->program) < 0) return NULL;
    if (pi_program_prepare(&self->program) < 0) return PyErr_NoMemory();
    self->complete = 1;
    Py_RETURN_NONE;
}

/* Copies the ids first: another thread may change the buffer at any time. */
static int check_embedded(const pi_embed *e, int64_t tokens) {
    memcpy(e->ids, e->tokens, sizeof *e->ids * (size_t)tokens);
    for (int64_t t = 0; t < tokens; t++) {
        if (e->ids[t] >= 0 && e->ids[t] < e->table.rows) continue;
        PyErr_Format(pi_kernel_error, "token id %d at index %lld is outside the vocabulary of %lld", (int)e->ids[t],
                     (long long)t, (long long)e->table.rows);
        return -1;
    }
    return 0;
}

/* The spans of the run must suit its operations: token ids within their tables, and states where there are slots. */
static int check_operations(const pi_program *program, int64_t first, int64_t last, int64_t span_count) {
    const pi_span *end = &program->spans[span_count - 1];
    int64_t tokens = end->first + end->count, slot, homeless = 0;
    for (int64_t s = 0; s < span_count; s++) homeless += !program->spans[s].slots;
    for (int64_t i = first; i < last; i++) {
        const pi_op *op = &program->ops[i];
        if (op->kind == PI_OP_EMBED && check_embedded(&op->u.embed, tokens) < 0) return -1;
        if (homeless && pi_op_slot(op, &slot)) {
            PyErr_Format(pi_kernel_error, "operation %lld needs a state for every token", (long long)i);
            return -1;
        }
    }
    return 0;
}

static int check_range(const program_object *self, int64_t first, int64_t last) {
    if (!self->complete || self->running == pi_run_mark())
        PyErr_SetString(pi_kernel_error,
                        self->complete ? "the program is running in another thread" : "the program is not complete");
    else if (first < 0 || first > last || last > self->program.count)
        PyErr_Format(pi_kernel_error, "operations [%lld, %lld) are not within the program's %lld", (long long)first,
                     (long long)last, (long long)self->program.count);
    else
        return 0;
    return -1;
}

/* 0, or -1 with an error set. */
static int run_marked(program_object *self, pool_object *pool, int64_t first, int64_t last, PyObject *spans) {
    pi_program *program = &self->program;
    const int64_t count = PyTuple_Size(spans);
    if (pi_spans_enter(spans, program, self->serial, self->capacity) < 0) return -1;
    int error = 0, failed = check_operations(program, first, last, count) < 0 || pi_pool_object_enter(pool) < 0;
    if (!failed) {
        if (self->units) self->units->users++;
        if (self->records) self->records->users++;
        Py_BEGIN_ALLOW_THREADS error = pi_program_run(program, pool->pool, pool->kernels, first, last, count);
        Py_END_ALLOW_THREADS pi_pool_object_leave(pool);
        if (self->units) self->units->users--;
        if (self->records) self->records->users--;
    }
    pi_spans_leave(spans, count);
    if (failed) return -1;
    if (error == PI_NO_EXPERT)
        PyErr_SetString(pi_kernel_error, "a token's choice names an expert that does not exist");
    else if (error == PI_NO_WEIGHTS)
        PyErr_SetString(pi_kernel_error, "weights on disk could not be brought into memory");
    else if (error)
        pi_raise_thread_error(error);
    return error ? -1 : 0;
}

static PyObject *program_run(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    program_object *self = (program_object *)object;
    if (count != 4 || !PyObject_TypeCheck(args[0], pi_pool_type) || !PyTuple_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError, "run takes a Pool, two integers and a tuple of spans");
        return NULL;
    }
    int64_t first = PyLong_AsLongLong(args[1]), last = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred() || check_range(self, first, last) < 0) return NULL;
    self->running = pi_run_mark(); /* from here on: reading the spans may call Python code */
    int failed = run_marked(self, (pool_object *)args[0], first, last, args[3]);
    self->running = 0;
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *program_nanoseconds(PyObject *object, PyObject *unused) {
    const pi_program *program = &((program_object *)object)->program;
    (void)unused;
    return PyBytes_FromStringAndSize((const char *)program->nanoseconds,
                                     program->nanoseconds ? program->count * (Py_ssize_t)sizeof(int64_t) : 0);
}

static PyObject *program_neurons(PyObject *object, PyObject *unused) {
    const pi_program *program = &((program_object *)object)->program;
    (void)unused;
    return PyBytes_FromStringAndSize((const char *)program->neurons,
                                     program->neurons ? program->count * (Py_ssize_t)sizeof(pi_neurons) : 0);
}

static PyObject *program_reset_counters(PyObject *object, PyObject *unused) {
    pi_program *program = &((program_object *)object)->program;
    (void)unused;
    if (program->neurons) memset(program->neurons, 0, (size_t)program->count * sizeof(pi_neurons));
    if (program->nanoseconds) memset(program->nanoseconds, 0, (size_t)program->count * sizeof(int64_t));
    Py_RETURN_NONE;
}

static int program_init(PyObject *object, PyObject *args, PyObject *keywords) {
    program_object *self = (program_object *)object;
    long long max_tokens, capacity;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "LL", &max_tokens, &capacity)) return -1;
    if (self->weights) {
        PyErr_SetString(pi_kernel_error, "the program exists already");
        return -1;
    }
    if (max_tokens < 1 || max_tokens >= PI_LARGEST || capacity < 1 || capacity >= 4LL * PI_LARGEST) {
        PyErr_SetString(pi_kernel_error, "a program takes a positive number of tokens and positions");
        return -1;
    }
    static int64_t serials; /* changed with the GIL held only */
    self->serial = ++serials;
    self->program.max_tokens = max_tokens;
    self->capacity = capacity;
    return (self->weights = PyList_New(0)) ? 0 : -1;
}

static void program_dealloc(PyObject *object) {
    program_object *self = (program_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    for (int64_t i = 0; i < self->view_count; i++) PyBuffer_Release(&self->views[i]);
    PyMem_Free(self->views);
    for (int64_t i = 0; i < self->list_count; i++) PyMem_Free((void *)self->lists[i]);
    PyMem_Free((void *)self->lists);
    PyMem_Free(self->program.ops);
    self->program.ops = NULL;
    pi_program_free(&self->program);
    Py_XDECREF(self->weights);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef program_methods[] = {
    {"append", program_append, METH_VARARGS, PyDoc_STR("append(kind, objects, integers, floats)")},
    {"seal", program_seal, METH_VARARGS, PyDoc_STR("seal(slots): ends the appending; the program can run.")},
    {"run", (PyCFunction)(void (*)(void))program_run, METH_FASTCALL,
     PyDoc_STR("run(pool, first, last, spans): a span is (State or None, position, count)")},
    {"nanoseconds", program_nanoseconds, METH_NOARGS, PyDoc_STR("int64 per operation, as bytes")},
    {"neurons", program_neurons, METH_NOARGS, PyDoc_STR("int64 (active, confirmed, total) per operation, as bytes")},
    {"reset_counters", program_reset_counters, METH_NOARGS, PyDoc_STR("Zeroes times and neuron counts.")},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot program_slots[] = {
    {Py_tp_init, program_init},
    {Py_tp_dealloc, program_dealloc},
    {Py_tp_methods, program_methods},
    {Py_tp_doc, (void *)PyDoc_STR("Program(max_tokens, capacity)")},
    {0, NULL},
};

PyType_Spec pi_program_spec = {"powerinfer_kernels._kernels.Program", sizeof(program_object), 0, Py_TPFLAGS_DEFAULT,
                               program_slots};
