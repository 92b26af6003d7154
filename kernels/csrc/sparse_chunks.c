/* One token's listed neurons, a chunk (PI_CHUNK neurons) after the other, each by one thread from gates to sums.
 *
 * A thread reads the rows of a neuron within a short time of each other, and whole. Memory gives records read so at 0.95
 * of the rate of a stream, the same rows in three passes over all neurons at 0.79 (docs/LOG.md): what the hardware
 * fetches beyond the end of a row is wanted then. Sums of chunks are added up in their order by whoever made them: the
 * bits do not depend on threads, and are those of sparse_ffn.c, where threads share the columns. */
#include "sparse_ffn.h"

typedef struct { /* of the list: the neurons of one chunk */
    int64_t begin, end;
} stretch;

/* The first position of the list whose neuron is at least `neuron`. */
static int64_t position_of(const int32_t *index, int64_t count, int64_t neuron) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (index[middle] < neuron)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static stretch stretch_of(const int32_t *index, int64_t count, int64_t chunk) {
    const int64_t begin = position_of(index, count, chunk * PI_CHUNK);
    return (stretch){begin, begin + position_of(index + begin, count - begin, (chunk + 1) * PI_CHUNK)};
}

static int64_t chunks_of(const pi_sparse_ffn *op) { return (op->bundle->rows + PI_CHUNK - 1) / PI_CHUNK; }

int pi_chunks_are_even(const pi_sparse_ffn *op, const int32_t *index, int64_t count, int64_t threads) {
    for (int64_t c = 0; c < chunks_of(op); c++) {
        const stretch s = stretch_of(index, count, c);
        if ((s.end - s.begin) * threads * 3 > count) return 0;
    }
    return 1;
}

typedef struct {   /* what threads leave for each other */
    int32_t *some; /* [chunks]: 0 where no neuron contributes */
    float *terms;  /* [chunks, pi_sum_terms] */
} chunk_terms;

int64_t pi_sparse_ffn_shared_bytes(const pi_sparse_ffn *op) {
    const int64_t chunks = chunks_of(op);
    return pi_round_up(chunks * (int64_t)sizeof(int32_t), 64) +
           chunks * pi_sum_terms(op->bundle->columns) * (int64_t)sizeof(float);
}

static chunk_terms terms_of(const pi_sparse_ffn *op, const pi_run *run) {
    uint8_t *at = pi_shared_scratch(run);
    const int64_t flags = pi_round_up(chunks_of(op) * (int64_t)sizeof(int32_t), 64);
    return (chunk_terms){(int32_t *)(void *)at, (float *)(void *)(at + flags)};
}

/* Asks for the scales of neurons' down rows: they are needed before any codes. */
static void prefetch_scales(const pi_rows *down, const int32_t *index, int64_t count) {
    const int64_t bytes = pi_planar_of(down->row_type, down->columns, 1).high;
    for (int64_t k = 0; k < count; k++)
        for (int64_t line = 0; line < bytes; line += 64)
            __builtin_prefetch(down->data + index[k] * down->stride + line, 0, 2);
}

/* The neurons of one chunk from their gates to their sum, which is added to the output or, where they are not NULL, left
 * in `terms`; `next`: those of the chunk that follows. As many as their gates confirm. */
static int64_t execute_chunk(const pi_sparse_ffn *op, const pi_run *run, const pi_list_scratch *at, stretch s,
                             stretch next, int32_t *some, float *terms) {
    const pi_rows *part = op->bundle->part, *first = op->rule == PI_BY_UP_SIZE ? &part[PI_GATE] : &part[PI_UP];
    const int32_t *index = at->index;
    const pi_rows *begins = op->gate ? &part[PI_GATE] : first->data ? first : &part[PI_DOWN];
    const pi_ahead later = {begins, index + next.begin, next.end - next.begin};
    if (op->gate) {
        const pi_ahead rest = {first->data ? first : &part[PI_DOWN], index + s.begin, s.end - s.begin};
        run->kernels->product_rows(&part[PI_GATE], index, s.end, s.begin, s.end, &rest, op->src, &op->acts, 0,
                                   op->gate);
        s.end = pi_keep_confirmed(op, s.begin, s.end, at);
    }
    const pi_ahead down = {&part[PI_DOWN], index + s.begin, s.end - s.begin};
    for (int64_t begin = s.begin; begin < s.end; begin += PI_NEURONS_AT_ONCE) {
        const int64_t end = begin + PI_NEURONS_AT_ONCE < s.end ? begin + PI_NEURONS_AT_ONCE : s.end;
        prefetch_scales(&part[PI_DOWN], index + begin, end - begin);
        pi_contribute(op, run, at, s.end, begin, end, &down);
    }
    const float *h = op->h;
    *some = run->kernels->sum_chunk(&part[PI_DOWN], index + s.begin, h + s.begin, s.end - s.begin, &later, at->sums,
                                    op->out, terms) &&
            terms;
    return s.end - s.begin;
}

void pi_execute_chunks(const pi_sparse_ffn *op, pi_run *run, pi_worker *worker, int slot, int64_t named,
                       const pi_list_scratch *at) {
    const pi_columns_part columns = pi_columns_of(op, worker);
    const chunk_terms all = terms_of(op, run);
    const int64_t chunks = chunks_of(op), size = pi_sum_terms(op->bundle->columns);
    int64_t c, active = 0, confirmed = 0;
    int64_t added = pi_worker_thread(worker) == 0 ? 0 : chunks; /* by the first thread, so far, to the output itself */
    pi_share share = pi_share_open(worker, slot, chunks);
    if (added == 0 && !op->accumulate) pi_clear_columns(op->out, op->bundle->columns, 1, 0, op->bundle->columns);
    while ((c = pi_share_next(&share)) >= 0) {
        const stretch s = stretch_of(at->index, named, c), next = stretch_of(at->index, named, c + 1);
        active += s.end - s.begin;
        confirmed += execute_chunk(op, run, at, s, next, &all.some[c], c == added ? NULL : all.terms + c * size);
        added += c == added;
    }
    __atomic_fetch_add(&op->counted->active, active, __ATOMIC_RELAXED);
    __atomic_fetch_add(&op->counted->confirmed, confirmed, __ATOMIC_RELAXED);
    pi_barrier(worker);
    if (columns.begin >= columns.end) return;
    for (c = 0; c < chunks; c++)
        if (all.some[c])
            run->kernels->add_terms(&op->bundle->part[PI_DOWN], all.terms + c * size, columns.begin, columns.end,
                                    op->out);
}
