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
    PyObject *weights;        /* list of the Matrix and Bundle objects */
    const pi_matrix ***lists; /* of matrices, which operations point to */
    int64_t list_count, lists_capacity;
    int sealed, running;
} program_object;

static pi_rows rows_of(void *data, const int64_t *i) {
    return (pi_rows){.row_type = (int32_t)i[0], .rows = i[1], .columns = i[2], .stride = i[3], .data = data};
}

static pi_acts acts_of(void *const *p, int64_t columns) {
    return (pi_acts){.q = p[0], .d = p[1], .s = p[2], .columns = columns};
}

/* Tiles that a thread takes at once: some 16 KiB, so that taking costs nothing and threads end together. */
static int64_t chunk_of(const pi_matrix *m) {
    int64_t tiles = (16 << 10) / m->tile_bytes;
    return tiles > 1 ? tiles : 1;
}

static pi_expert_choice choice_of(const void *chosen, const void *weights, const void *here, const int64_t *i) {
    return (pi_expert_choice){chosen, weights, here, i[0], i[1], i[2]};
}

static pi_op expert_matmul_of(void *const *p, const int64_t *i) {
    const pi_matrix *const *here = p[1], *first = NULL;
    for (int64_t e = 0; e < i[0] && !first; e++) first = here[e];
    pi_op op = {.kind = PI_OP_EXPERT_MATMUL, .independent = (int)i[4]};
    op.u.expert_matmul = (pi_expert_matmul){.choice = choice_of(p[0], NULL, p[1], i),
                                            .token_src = p[2],
                                            .token_acts = acts_of(p + 3, first->columns),
                                            .src = p[6],
                                            .acts = acts_of(p + 7, first->columns),
                                            .bias = p[10],
                                            .out = p[11],
                                            .tiles = first->tiles,
                                            .chunk = chunk_of(first),
                                            .of_tokens = (int)i[3]};
    return op;
}

static pi_op op_of(pi_op_kind kind, const pi_given *a) {
    pi_op op = {.kind = kind};
    void *const *p = a->p;
    const int64_t *i = a->i;
    switch (kind) {
    case PI_OP_EMBED: op.u.embed = (pi_embed){p[0], rows_of(p[1], i), p[2], a->f[0]}; break;
    case PI_OP_RMS_NORM: op.u.norm = (pi_norm){p[0], p[1], NULL, p[2], i[0], i[1], i[2], a->f[0]}; break;
    case PI_OP_LAYER_NORM: op.u.norm = (pi_norm){p[0], p[1], p[2], p[3], i[0], i[1], i[2], a->f[0]}; break;
    case PI_OP_L2_NORM:
    case PI_OP_KEEP_TOP: op.u.norm = (pi_norm){p[0], NULL, NULL, p[1], i[0], i[1], 0, a->f[0]}; break;
    case PI_OP_QUANTIZE: op.u.quantize = (pi_quantize){p[0], acts_of(p + 1, i[0])}; break;
    case PI_OP_MATMUL: {
        const pi_matrix *m = p[0];
        op.u.matmul = (pi_matmul){.matrix = m,
                                  .src = p[1],
                                  .acts = acts_of(p + 2, m->columns),
                                  .bias = p[5],
                                  .out = p[6],
                                  .accumulate = (int)i[0],
                                  .chunk = chunk_of(m)};
        op.independent = (int)i[1];
        break;
    }
    case PI_OP_ROPE: op.u.rope = (pi_rope){p[0], p[1], p[2], i[0], i[1], i[2], i[3], (int)i[4]}; break;
    case PI_OP_STORE_KV: op.u.store = (pi_store){p[0], p[1], i[0], i[1], i[2]}; break;
    case PI_OP_ATTENTION:
        op.u.attention = (pi_attention){.q = p[0],
                                        .out = p[1],
                                        .q_values = a->values[0],
                                        .out_values = a->values[1],
                                        .sinks = p[2],
                                        .slopes = p[3],
                                        .slot = i[0],
                                        .heads = i[1],
                                        .window = i[2],
                                        .chunk = i[3],
                                        .scale = a->f[0],
                                        .softcap = a->f[1]};
        break;
    case PI_OP_ACTIVATE: op.u.activate = (pi_activate){(int32_t)i[0], a->f[0], p[0], p[1], p[2], i[1]}; break;
    case PI_OP_ADD: op.u.add = (pi_add){p[0], p[1], i[0], i[1], a->f[0]}; break;
    case PI_OP_SUM_ROWS: op.u.sum = (pi_sum){p[0], p[1], p[2], (int)i[0]}; break;
    case PI_OP_OBSERVE:
        op.u.observe = (pi_observe){(int32_t)i[0], a->f[0], p[0], p[1], i[1], p[2], p[3], p[4], p[5]};
        break;
    case PI_OP_KEEP_LARGE: op.u.keep = (pi_keep){p[0], p[1], p[2], i[0]}; break;
    case PI_OP_SIGN_CODE: op.u.sign_code = (pi_sign_code){p[0], p[1], i[0]}; break;
    case PI_OP_SIGN_SCORES: op.u.sign_scores = (pi_sign_scores){p[0], p[1], p[2], i[0], i[1]}; break;
    case PI_OP_MULTIPLY: op.u.multiply = (pi_multiply){p[0], p[1], i[0], i[1], i[2]}; break;
    case PI_OP_MAP: op.u.map = (pi_map_op){(int32_t)i[0], {a->f[0], a->f[1], a->f[2], a->f[3]}, p[0], i[1]}; break;
    case PI_OP_COPY: op.u.copy = (pi_copy){p[0], p[1], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]}; break;
    case PI_OP_HEAD_MATMUL:
        op.u.head_matmul = (pi_head_matmul){p[0], p[1], p[2], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]};
        break;
    case PI_OP_ROUTE:
        op.u.route =
            (pi_route){p[0], p[1], p[2], p[3], p[4], p[5], i[0], i[1], i[2], i[3], (int)i[4], (int)i[5], a->f[0]};
        break;
    case PI_OP_EXPERT_GATHER:
        op.u.expert_gather = (pi_expert_gather){.choice = choice_of(p[0], p[1], p[2], i),
                                                .src = p[3],
                                                .acts = acts_of(p + 4, i[3]),
                                                .out = p[7],
                                                .out_acts = acts_of(p + 8, i[3]),
                                                .width = i[3],
                                                .weigh = (int)i[4],
                                                .needs_floats = (int)i[5]};
        break;
    case PI_OP_EXPERT_MATMUL: op = expert_matmul_of(p, i); break;
    case PI_OP_EXPERT_ACTIVATE:
        op.u.expert_activate = (pi_expert_activate){
            choice_of(p[0], NULL, p[1], i), (int32_t)i[3], a->f[0], p[2], p[3], p[4], acts_of(p + 5, i[4]), i[4]};
        break;
    case PI_OP_EXPERT_SUM:
        op.u.expert_sum = (pi_expert_sum){choice_of(p[0], p[1], p[2], i), p[3], p[4], i[3], (int)i[4], (int)i[5]};
        break;
    case PI_OP_EXPERT_COUNT:
        op.u.expert_count = (pi_expert_count){choice_of(p[0], p[1], NULL, i), p[2], p[3], p[4], p[5]};
        break;
    case PI_OP_CONVOLVE:
        op.u.convolve = (pi_convolve){p[0], p[1], p[2], p[3], i[0], i[1], i[2], i[3], i[4], (int)i[5]};
        break;
    case PI_OP_SCAN_CHANNELS:
    case PI_OP_SCAN_HEADS:
        op.u.scan = (pi_scan){p[0], p[1], p[2], p[3], p[4], p[5], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8]};
        break;
    case PI_OP_DELTA_NET:
        op.u.delta_net =
            (pi_delta_net){p[0], p[1], p[2], p[3], p[4], i[0], i[1], i[2], i[3], i[4], i[5], i[6], (int)i[7], a->f[0]};
        break;
    case PI_OP_SCALE_BY_POSITION: op.u.scale_by_position = (pi_scale_by_position){p[0], p[1], i[0]}; break;
    default: /* SPARSE_FFN */
        op.u.sparse_ffn = (pi_sparse_ffn){.kind = (int32_t)i[0],
                                          .cut = a->f[0],
                                          .select = p[0],
                                          .threshold = p[1],
                                          .src = p[2],
                                          .acts = acts_of(p + 3, ((const pi_bundle *)p[6])->columns),
                                          .bundle = p[6],
                                          .out = p[7],
                                          .h = p[8],
                                          .gate = p[9],
                                          .bias = p[10],
                                          .accumulate = (int)i[1],
                                          .rule = (int32_t)i[2]};
        break;
    }
    return op;
}

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
    if (PyObject_TypeCheck(object, pi_matrix_type))
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
    if (self->sealed || kind < 0 || kind >= PI_OP_KINDS) {
        PyErr_SetString(pi_kernel_error, self->sealed ? "the program is complete" : "unknown operation");
        return NULL;
    }
    if (take_arguments(self, kind, objects, integers, floats, &a) < 0) return NULL;
    pi_program *program = &self->program;
    if (grow((void **)&program->ops, &self->ops_capacity, program->count, 1, sizeof(pi_op)) < 0) return NULL;
    program->ops[program->count++] = op_of(kind, &a);
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
    if (self->sealed) {
        PyErr_SetString(pi_kernel_error, "the program is complete");
        return NULL;
    }
    if (take_slots(&self->program, slots) < 0 || join_slots(&self->program) < 0) return NULL;
    if (pi_program_prepare(&self->program) < 0) return PyErr_NoMemory();
    self->sealed = 1;
    Py_RETURN_NONE;
}

static int check_embedded(const pi_embed *e, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++) {
        if (e->tokens[t] >= 0 && e->tokens[t] < e->table.rows) continue;
        PyErr_Format(pi_kernel_error, "token id %d at index %lld is outside the vocabulary of %lld", (int)e->tokens[t],
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
    if (!self->sealed || self->running)
        PyErr_SetString(pi_kernel_error,
                        self->sealed ? "the program is running in another thread" : "the program is not complete");
    else if (first < 0 || first > last || last > self->program.count)
        PyErr_Format(pi_kernel_error, "operations [%lld, %lld) are not within the program's %lld", (long long)first,
                     (long long)last, (long long)self->program.count);
    else
        return 0;
    return -1;
}

static PyObject *program_run(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    program_object *self = (program_object *)object;
    if (count != 4 || !PyObject_TypeCheck(args[0], pi_pool_type) || !PyTuple_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError, "run takes a Pool, two integers and a tuple of spans");
        return NULL;
    }
    int64_t first = PyLong_AsLongLong(args[1]), last = PyLong_AsLongLong(args[2]), spans = PyTuple_Size(args[3]);
    if (PyErr_Occurred() || check_range(self, first, last) < 0) return NULL;
    if (pi_spans_enter(args[3], &self->program, self->serial, self->capacity) < 0) return NULL;
    pool_object *pool = (pool_object *)args[0];
    if (check_operations(&self->program, first, last, spans) < 0 || pi_pool_object_enter(pool) < 0) {
        pi_spans_leave(args[3], spans);
        return NULL;
    }
    int error;
    self->running = 1;
    Py_BEGIN_ALLOW_THREADS error = pi_program_run(&self->program, pool->pool, pool->kernels, first, last, spans);
    Py_END_ALLOW_THREADS self->running = 0;
    pi_pool_object_leave(pool);
    pi_spans_leave(args[3], spans);
    if (error) {
        pi_raise_thread_error(error);
        return NULL;
    }
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
    return Py_BuildValue("LLL", (long long)program->active, (long long)program->confirmed, (long long)program->total);
}

static PyObject *program_reset_counters(PyObject *object, PyObject *unused) {
    pi_program *program = &((program_object *)object)->program;
    (void)unused;
    program->active = program->confirmed = program->total = 0;
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
    {"neurons", program_neurons, METH_NOARGS, PyDoc_STR("(active, confirmed, total) of the sparse operations")},
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
