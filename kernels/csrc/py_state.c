/* _kernels.State(slots): the buffers that one session keeps from token to token, and the spans of tokens that a run
 * takes from sessions. */
#include "boundary.h"

#include <string.h>

PyTypeObject *pi_state_type;

enum { MAX_VIEWS = 4 /* of one slot */ };

typedef struct {
    PyObject_HEAD pi_slot *slots;
    int64_t slot_count;
    Py_buffer *views; /* [slot_count, MAX_VIEWS]; obj NULL where there is none */
    unsigned running; /* pi_run_mark of the run that has it, once and alone, or 0; changed with the GIL held only */
    int64_t fits;     /* serial number of the last program whose slots it was seen to fit; 0: none */
} state_object;

/* The buffer `object` in `view`, of `bytes` bytes or more; NULL with an error set. */
static void *take_buffer(PyObject *object, int64_t bytes, Py_buffer *view) {
    if (bytes < 0 || PyObject_GetBuffer(object, view, PyBUF_WRITABLE) < 0) return NULL;
    if (view->len >= bytes && (uintptr_t)view->buf % 64 == 0) return view->buf;
    PyErr_Format(pi_kernel_error, "a slot needs %lld aligned bytes, the buffer has %lld", (long long)bytes,
                 (long long)view->len);
    return NULL;
}

static int take_cache(PyObject *objects, const int64_t *n, Py_buffer *views, pi_slot *slot) {
    int64_t capacity = n[0], kv_heads = n[1], dim = n[2], value_dim = n[3];
    int64_t tiles = (capacity + PI_TILE - 1) / PI_TILE;
    int quantized = PyTuple_GetItem(objects, 2) != Py_None;
    int64_t element = quantized ? 1 : 2, blocks = dim / PI_BLOCK;
    pi_cache *cache = &slot->cache;
    *cache = (pi_cache){.capacity = capacity, .kv_heads = kv_heads, .head_dim = dim, .value_dim = value_dim};
    cache->keys = take_buffer(PyTuple_GetItem(objects, 0), kv_heads * tiles * dim * PI_TILE * element, views);
    if (!cache->keys) return -1;
    if (quantized && (dim % PI_BLOCK || value_dim % PI_BLOCK)) {
        PyErr_SetString(pi_kernel_error, "heads of a quantised cache are not whole blocks");
        return -1;
    }
    cache->values = take_buffer(PyTuple_GetItem(objects, 1),
                                kv_heads * capacity * value_dim * element + PI_CACHE_READ_AHEAD, views + 1);
    if (!cache->values || !quantized) return cache->values ? 0 : -1;
    cache->key_scales = take_buffer(PyTuple_GetItem(objects, 2), kv_heads * tiles * blocks * PI_TILE * 2, views + 2);
    if (!cache->key_scales) return -1;
    cache->value_scales =
        take_buffer(PyTuple_GetItem(objects, 3), kv_heads * capacity * (value_dim / PI_BLOCK) * 2, views + 3);
    return cache->value_scales ? 0 : -1;
}

static int take_slot(PyObject *item, Py_buffer *views, pi_slot *slot) {
    PyObject *objects;
    long long n[4] = {0};
    int kind;
    if (!PyTuple_Check(item) ||
        !PyArg_ParseTuple(item, "iO!L|LLL", &kind, &PyTuple_Type, &objects, n, n + 1, n + 2, n + 3))
        return -1;
    const int64_t sizes[4] = {n[0], n[1], n[2], n[3]};
    Py_ssize_t wanted = kind == PI_SLOT_KV ? 4 : 1;
    if (kind < 0 || kind >= PI_SLOT_KINDS || PyTuple_Size(objects) != wanted || !pi_slot_possible(kind, sizes)) {
        PyErr_SetString(pi_kernel_error, "no such slot");
        return -1;
    }
    slot->kind = (pi_slot_kind)kind;
    if (kind == PI_SLOT_KV) return take_cache(objects, sizes, views, slot);
    slot->count = sizes[0];
    slot->recurrent = take_buffer(PyTuple_GetItem(objects, 0), sizes[0] * (int64_t)sizeof(float), views);
    return slot->recurrent ? 0 : -1;
}

static int state_init(PyObject *object, PyObject *args, PyObject *keywords) {
    state_object *self = (state_object *)object;
    PyObject *items;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "O!", &PyTuple_Type, &items)) return -1;
    if (self->slots) {
        PyErr_SetString(pi_kernel_error, "the state exists already");
        return -1;
    }
    size_t count = (size_t)PyTuple_Size(items);
    self->slots = PyMem_Calloc(count + 1, sizeof(pi_slot));
    self->views = PyMem_Calloc((count + 1) * MAX_VIEWS, sizeof(Py_buffer));
    if (!self->slots || !self->views) {
        PyErr_NoMemory();
        return -1;
    }
    for (; self->slot_count < (int64_t)count; self->slot_count++) {
        int64_t k = self->slot_count;
        if (take_slot(PyTuple_GetItem(items, k), self->views + k * MAX_VIEWS, &self->slots[k]) == 0) continue;
        self->slot_count++; /* so that what was taken of it is given back */
        return -1;
    }
    return 0;
}

static void state_dealloc(PyObject *object) {
    state_object *self = (state_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    for (int64_t i = 0; self->views && i < self->slot_count * MAX_VIEWS; i++)
        if (self->views[i].obj) PyBuffer_Release(&self->views[i]);
    PyMem_Free(self->views);
    PyMem_Free(self->slots);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static int slot_fits(const pi_slot *slot, const pi_slot_spec *spec) {
    if (slot->kind != spec->kind) return 0;
    if (slot->kind == PI_SLOT_RECURRENT) return slot->count == spec->count;
    const pi_cache *cache = &slot->cache;
    return cache->kv_heads == spec->kv_heads && cache->head_dim == spec->head_dim &&
           cache->value_dim == spec->value_dim && cache->capacity <= spec->capacity;
}

/* The slots of `state`, when they fit the program and hold `positions`; NULL with KernelError set. */
static pi_slot *slots_of(state_object *state, const pi_program *program, int64_t serial, int64_t positions) {
    if (state->fits != serial) {
        int fits = state->slots && state->slot_count == program->slot_count;
        for (int64_t k = 0; fits && k < program->slot_count; k++)
            fits = slot_fits(&state->slots[k], &program->slots[k]);
        if (!fits) {
            PyErr_SetString(pi_kernel_error, "the state has not the slots that the program needs");
            return NULL;
        }
        state->fits = serial;
    }
    for (int64_t k = 0; k < state->slot_count; k++) {
        const pi_slot *slot = &state->slots[k];
        if (slot->kind != PI_SLOT_KV || positions <= slot->cache.capacity) continue;
        PyErr_Format(pi_kernel_error, "%lld positions do not fit a cache of %lld", (long long)positions,
                     (long long)slot->cache.capacity);
        return NULL;
    }
    return state->slots;
}

static int take_span(PyObject *item, const pi_program *program, int64_t serial, int64_t capacity, pi_span *span) {
    PyObject *object;
    long long position, count;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "OLL", &object, &position, &count)) return -1;
    int64_t room = program->max_tokens - span->first;
    if (count < 1 || count > room)
        PyErr_Format(pi_kernel_error, "n_tokens must be between 1 and %lld, got %lld", (long long)room, count);
    else if (position < 0 || position > capacity - count)
        PyErr_Format(pi_kernel_error, "positions [%lld, %lld) do not fit a context of %lld", position, position + count,
                     (long long)capacity);
    else if (object != Py_None && !PyObject_TypeCheck(object, pi_state_type))
        PyErr_SetString(PyExc_TypeError, "a span is (State or None, position, count)");
    else if (object != Py_None && ((state_object *)object)->running == pi_run_mark())
        PyErr_SetString(pi_kernel_error, "the state is in a run already");
    else {
        span->position = position;
        span->count = count;
        span->slots = NULL;
        if (object == Py_None) return 0;
        span->slots = slots_of((state_object *)object, program, serial, position + count);
        if (!span->slots) return -1;
        ((state_object *)object)->running = pi_run_mark();
        return 0;
    }
    return -1;
}

void pi_spans_leave(PyObject *spans, int64_t count) {
    for (int64_t s = 0; s < count; s++) {
        PyObject *object = PyTuple_GetItem(PyTuple_GetItem(spans, s), 0);
        if (object != Py_None) ((state_object *)object)->running = 0;
    }
}

int pi_spans_enter(PyObject *spans, pi_program *program, int64_t serial, int64_t capacity) {
    int64_t count = PyTuple_Size(spans), first = 0;
    if (count < 1 || count > program->max_tokens) {
        PyErr_Format(pi_kernel_error, "a run takes 1 to %lld spans, got %lld", (long long)program->max_tokens,
                     (long long)count);
        return -1;
    }
    for (int64_t s = 0; s < count; s++) {
        pi_span *span = &program->spans[s];
        span->first = first;
        if (take_span(PyTuple_GetItem(spans, s), program, serial, capacity, span) < 0) {
            pi_spans_leave(spans, s);
            return -1;
        }
        first += span->count;
    }
    return 0;
}

static PyType_Slot state_slots[] = {
    {Py_tp_init, state_init},
    {Py_tp_dealloc, state_dealloc},
    {Py_tp_doc, (void *)PyDoc_STR("State(slots): a slot is (kind, buffers, sizes…)")},
    {0, NULL},
};

PyType_Spec pi_state_spec = {"powerinfer_kernels._kernels.State", sizeof(state_object), 0, Py_TPFLAGS_DEFAULT,
                             state_slots};
