/* Everything that comes from Python is checked here: kind, length and alignment of every object of an operation. A wrong one is a
 * KernelError, never a wild read. */
#ifndef PI_BOUNDARY_H
#define PI_BOUNDARY_H

#include "module.h"

enum {
    PI_MAX_OBJECTS = 13,
    PI_MAX_INTEGERS = 9,
    PI_MAX_FLOATS = 4,
    PI_LARGEST = 1 << 30, /* of an integer: keeps sums of two products within 64 bits */
};

typedef struct {
    const char *name, *objects;
    int integers, floats;
} pi_op_shape;

typedef struct { /* what an operation was given */
    int64_t tokens, capacity;
    void *p[PI_MAX_OBJECTS];
    int64_t i[PI_MAX_INTEGERS];
    float f[PI_MAX_FLOATS];
    int64_t values[PI_MAX_OBJECTS]; /* elements of the buffers */
    unsigned given;                 /* bit k: object k is not None */
    int64_t rows, columns;          /* of its weights; 0 until they are seen */
    int32_t row_type;
    const pi_bundle *bundle;
    int64_t units; /* how many there are */
    const pi_records *records;
    int all_there; /* no None in a tuple of matrices */
} pi_given;

extern const pi_op_shape pi_op_shapes[PI_OP_KINDS];

/* Whether there are rows of that type and width that can be read now: its grid is set. */
int pi_rows_readable(int32_t row_type, int64_t columns);
/* The bytes of rows × row of that type, or -1 with KernelError set. */
int64_t pi_rows_bytes(int32_t row_type, int64_t rows, int64_t columns);
/* Whether a slot of a session can have these sizes (capacity, kv_heads, head_dim, value_dim; or count). */
int pi_slot_possible(int kind, const int64_t sizes[4]);

int pi_object_count(const pi_op_shape *shape);
/* The word of object k in `shape`. */
const char *pi_object_word(const pi_op_shape *shape, int k);
int pi_word_has(const char *word, char flag);
/* Notes the weights of `object` (a Matrix, a Bundle or a tuple of Matrix objects), which sizes are counted by; no
 * effect on other objects. -1 with KernelError set where matrices of a tuple differ, or all are None. */
int pi_note_weights(pi_given *m, PyObject *object);
/* The weights, or the buffer in `view` (which is to be released by the caller where it returns 1), as what `word` says.
 * 1: a buffer, 0: no buffer, -1 with KernelError set. */
int pi_judge_object(pi_given *m, const pi_op_shape *shape, int k, PyObject *object, Py_buffer *view);
/* 0, or -1 with KernelError set where the condition of the operation does not hold. */
int pi_judge_condition(const pi_given *m, pi_op_kind kind);
/* The operation that `m` makes (py_operation.c). */
pi_op pi_op_of(pi_op_kind kind, const pi_given *m);

#endif
