/* Runs a program: which operations need a barrier between them, time of each, and memory of the threads. */
#include "program.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* In each run of neighbouring vector operations: if one of them needs whole tokens, all are split by token. */
static void join_vector_operations(pi_program *program) {
    for (int64_t begin = 0, end; begin < program->count; begin = end) {
        int by_token = 0;
        for (end = begin; end < program->count && pi_op_is_vector(&program->ops[end]); end++)
            by_token |= pi_op_needs_tokens(&program->ops[end]);
        for (int64_t i = begin; i < end; i++) program->ops[i].by_token = by_token;
        if (end == begin) end++;
    }
}

/* Room for the ids of every embedding. */
static int give_ids(pi_program *program) {
    int64_t embeddings = 0;
    for (int64_t i = 0; i < program->count; i++) embeddings += program->ops[i].kind == PI_OP_EMBED;
    program->ids = calloc((size_t)(embeddings * program->max_tokens) + 1, sizeof(int32_t));
    int32_t *ids = program->ids;
    for (int64_t i = 0; ids && i < program->count; i++) {
        if (program->ops[i].kind != PI_OP_EMBED) continue;
        program->ops[i].u.embed.ids = ids;
        ids += program->max_tokens;
    }
    return ids ? 0 : -1;
}

/* Counters of every sparse operation. */
static int give_counters(pi_program *program) {
    program->neurons = calloc((size_t)program->count + 1, sizeof(pi_neurons));
    for (int64_t i = 0; program->neurons && i < program->count; i++)
        if (program->ops[i].kind == PI_OP_SPARSE_FFN)
            program->ops[i].u.sparse_ffn.counted = &program->neurons[i];
        else if (program->ops[i].kind == PI_OP_EXPERT_COLUMNS)
            program->ops[i].u.expert_columns.counted = &program->neurons[i];
    return program->neurons ? 0 : -1;
}

int pi_program_prepare(pi_program *program) {
    join_vector_operations(program);
    for (int64_t i = 0; i < program->count; i++) {
        const pi_op *op = &program->ops[i];
        int64_t bytes = pi_op_scratch_bytes(op);
        if (bytes > program->scratch_bytes) program->scratch_bytes = bytes;
        bytes = op->kind == PI_OP_SPARSE_FFN ? pi_sparse_ffn_shared_bytes(&op->u.sparse_ffn) : 0;
        if (bytes > program->shared_bytes) program->shared_bytes = bytes;
        if (op->independent && (i + 1 == program->count || program->ops[i + 1].kind != op->kind))
            program->ops[i].independent = 0;
    }
    program->scratch_bytes = (program->scratch_bytes + 4095) / 4096 * 4096;
    program->shared_bytes = (program->shared_bytes + 4095) / 4096 * 4096;
    program->nanoseconds = calloc((size_t)program->count + 1, sizeof(int64_t));
    program->spans = calloc((size_t)program->max_tokens, sizeof(pi_span));
    program->places = calloc((size_t)program->max_tokens, sizeof(pi_place));
    if (!program->nanoseconds || !program->spans || !program->places) return -1;
    return give_ids(program) == 0 && give_counters(program) == 0 ? 0 : -1;
}

void pi_program_free(pi_program *program) {
    free(program->ops);
    free(program->ids);
    free(program->nanoseconds);
    free(program->neurons);
    free(program->spans);
    free(program->places);
    free(program->slots);
    free(program->scratch);
    memset(program, 0, sizeof *program);
}

static int grow_scratch(pi_program *program, int threads) {
    if (threads <= program->scratch_threads || program->scratch_bytes == 0) return 0;
    uint8_t *scratch = aligned_alloc(4096, (size_t)(program->scratch_bytes * threads + program->shared_bytes));
    if (!scratch) return ENOMEM;
    free(program->scratch);
    program->scratch = scratch;
    program->scratch_threads = threads;
    return 0;
}

static int barrier_between(const pi_op *op, const pi_op *next, int64_t tokens, int threads) {
    if (op->independent) return 0;
    /* The first thread alone asks for what is needed later: nobody waits for that. */
    if (op->kind == PI_OP_FETCH_RECORDS && op->u.fetch_records.ahead != PI_NEEDED_NOW) return 0;
    if (!pi_op_is_vector(op) || !pi_op_is_vector(next)) return 1;
    int by_token = pi_split_by_token(op, tokens, threads);
    if (by_token != pi_split_by_token(next, tokens, threads)) return 1;
    return !by_token && pi_op_width(op) != pi_op_width(next);
}

static void run_on_thread(void *argument, pi_worker *worker) {
    pi_run *run = argument;
    pi_program *program = run->program;
    int clock = pi_worker_thread(worker) == 0, threads = pi_worker_threads(worker), slot = 0;
    int64_t before = clock ? now() : 0;
    for (int64_t i = run->first; i < run->last; i++) {
        const pi_op *op = &program->ops[i];
        pi_op_execute(op, run, worker, slot++);
        if (i + 1 < run->last && (slot == PI_SLOTS || barrier_between(op, op + 1, run->tokens, threads))) {
            pi_barrier(worker);
            slot = 0;
            /* Nobody changes it before the barrier that follows: all threads see the same. */
            if ((op->kind == PI_OP_FETCH || op->kind == PI_OP_FETCH_RECORDS) && run->unfetched) break;
        }
        if (clock) {
            int64_t after = now();
            program->nanoseconds[i] += after - before;
            before = after;
        }
    }
}

/* Tells every token where it stands; returns how many there are. */
static int64_t place_tokens(pi_program *program, int64_t span_count) {
    int64_t tokens = 0;
    for (int64_t s = 0; s < span_count; s++) {
        const pi_span *span = &program->spans[s];
        for (int64_t i = 0; i < span->count; i++)
            program->places[tokens++] = (pi_place){span->slots, span->position + i};
    }
    return tokens;
}

int pi_program_run(pi_program *program, pi_pool *pool, const pi_kernels *kernels, int64_t first, int64_t last,
                   int64_t span_count) {
    int error = grow_scratch(program, pi_pool_threads(pool));
    if (error || first >= last) return error;
    pi_run run = {.kernels = kernels,
                  .program = program,
                  .first = first,
                  .last = last,
                  .tokens = place_tokens(program, span_count),
                  .spans = program->spans,
                  .span_count = span_count,
                  .places = program->places};
    program->no_expert = 0;
    error = pi_pool_run(pool, run_on_thread, &run);
    if (!error && (run.unfetched || run.missing)) error = PI_NO_WEIGHTS;
    return error || !program->no_expert ? error : PI_NO_EXPERT;
}
