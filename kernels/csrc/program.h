/* A program: operations that all threads of a pool execute one after another. Operations know widths and buffers,
 * never architectures. boundary.c has judged every buffer and size before an operation gets here. */
#ifndef PI_PROGRAM_H
#define PI_PROGRAM_H

#include "kernels.h"
#include "operation_types.h"
#include "pool.h"

#include <stdatomic.h>

/* What a session keeps from token to token is a list of slots, and operations name a slot by its index: the buffers
 * are those of the session that a token belongs to. A program says what it needs in each slot. */
typedef enum { PI_SLOT_KV, PI_SLOT_RECURRENT, PI_SLOT_KINDS } pi_slot_kind;

typedef struct {
    pi_slot_kind kind;
    int64_t capacity, kv_heads, head_dim, value_dim; /* PI_SLOT_KV: a session's may hold fewer positions */
    int64_t count;                                   /* PI_SLOT_RECURRENT: floats */
} pi_slot_spec;

typedef struct { /* a slot of one session */
    pi_slot_kind kind;
    pi_cache cache;   /* PI_SLOT_KV */
    float *recurrent; /* PI_SLOT_RECURRENT: [count], zero before the first token */
    int64_t count;
} pi_slot;

typedef struct {    /* tokens [first, first + count) of a run: successive ones of one session, from `position` on */
    pi_slot *slots; /* NULL: of none */
    int64_t first, count, position;
} pi_span;

typedef struct { /* where one token of a run stands */
    pi_slot *slots;
    int64_t position;
} pi_place;

typedef struct {
    pi_op *ops;
    int64_t count;
    int64_t *nanoseconds;  /* [count], wall time added up */
    _Atomic int no_expert; /* a choice of this run names an expert that does not exist */
    pi_neurons *neurons;   /* [count]: of each operation, zeros but for the sparse ones */
    int64_t scratch_bytes; /* what one thread needs at most */
    int64_t shared_bytes;  /* what all threads of an operation share */
    uint8_t *scratch;      /* [scratch_threads, scratch_bytes], and the shared bytes */
    int scratch_threads;
    pi_slot_spec *slots; /* [slot_count] */
    int64_t slot_count;
    int64_t max_tokens;
    pi_span *spans;   /* [max_tokens]: of the present run */
    pi_place *places; /* [max_tokens] */
    int32_t *ids;     /* [embeddings, max_tokens] */
} pi_program;

typedef struct { /* one run, shared by its threads */
    const pi_kernels *kernels;
    pi_program *program;
    int64_t first, last, tokens;
    const pi_span *spans; /* [span_count]: every token is in one of them, in order */
    int64_t span_count;
    const pi_place *places; /* [tokens] */
    int unfetched;          /* set by a fetch that failed: the run ends after it */
    _Atomic int missing;    /* an operation needed weights that are not in memory */
} pi_run;

/* Fixes how the operations are shared out, and what scratch they need; max_tokens and slots are set. 0, or -1 when
 * memory is short. */
int pi_program_prepare(pi_program *program);
enum {
    PI_NO_EXPERT = -1,  /* a token's choice names an expert that does not exist; it counted for nothing */
    PI_NO_WEIGHTS = -2, /* weights could not be fetched */
};

/* Runs operations [first, last) over the tokens of program->spans, of which there are `span_count`. 0, an errno, or
 * PI_NO_EXPERT or PI_NO_WEIGHTS. Not for two threads at once. */
int pi_program_run(pi_program *program, pi_pool *pool, const pi_kernels *kernels, int64_t first, int64_t last,
                   int64_t span_count);
void pi_program_free(pi_program *program);

/* Whether the operation uses slots of sessions; if so, which one. */
int pi_op_slot(const pi_op *op, int64_t *slot);
/* ops.c: executes this thread's part of one operation. `slot` is free for a work share. */
void pi_op_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot);
int64_t pi_op_scratch_bytes(const pi_op *op);
uint8_t *pi_scratch_of(const pi_run *run, const pi_worker *worker);
uint8_t *pi_shared_scratch(const pi_run *run);
/* Sets columns [begin, end) of [tokens, width] to zero. */
void pi_clear_columns(float *out, int64_t width, int64_t tokens, int64_t begin, int64_t end);
void pi_sparse_ffn_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot); /* sparse_ffn.c */
void pi_fetch_records_execute(const pi_op *op, pi_run *run, pi_worker *worker);        /* the same */
int64_t pi_sparse_ffn_scratch_bytes(const pi_sparse_ffn *op);
int64_t pi_sparse_ffn_shared_bytes(const pi_sparse_ffn *op);
void pi_observe_execute(const pi_op *op, pi_run *run, pi_worker *worker); /* observe.c */

void pi_vector_execute(const pi_op *op, pi_run *run, pi_worker *worker); /* vector_ops.c */

void pi_route_execute(const pi_op *op, const pi_run *run, const pi_worker *worker);         /* route.c */
void pi_expert_gather_execute(const pi_op *op, const pi_run *run, const pi_worker *worker); /* experts.c */
void pi_expert_matmul_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot);
void pi_expert_rows_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot);
void pi_expert_columns_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot);
void pi_expert_activate_execute(const pi_op *op, const pi_run *run, const pi_worker *worker);
void pi_expert_sum_execute(const pi_op *op, const pi_run *run, const pi_worker *worker);
void pi_expert_count_execute(const pi_op *op, const pi_run *run, const pi_worker *worker);
void pi_head_matmul_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot);
void pi_recurrent_execute(const pi_op *op, const pi_run *run, const pi_worker *worker); /* recurrent_ops.c */
/* What the operation needs in its slot, in floats. */
int64_t pi_recurrent_count(const pi_op *op);
int64_t pi_expert_scratch_bytes(const pi_expert_choice *choice);
int64_t pi_head_matmul_scratch_bytes(const pi_head_matmul *op);

/* What a vector operation gives this thread: tokens [token0, token1) × columns [column0, column1). */
typedef struct {
    int64_t token0, token1, column0, column1;
} pi_part;
pi_part pi_part_of(const pi_op *op, const pi_run *run, const pi_worker *worker);

/* How a vector operation is split: whole tokens, or the same range of columns of every token. Two in a row with the
 * same split need no barrier between them, as each thread meets only what it has written itself. */
int pi_op_is_vector(const pi_op *op);
int pi_op_needs_tokens(const pi_op *op);
int64_t pi_op_width(const pi_op *op);
int pi_split_by_token(const pi_op *op, int64_t tokens, int threads);

#endif
