/* sparse_ffn.h: what the two ways of computing the listed neurons of one token share (sparse_ffn.c, sparse_chunks.c). */
#ifndef PI_SPARSE_FFN_H
#define PI_SPARSE_FFN_H

#include "bundle.h"
#include "program.h"

enum { PI_NEURONS_AT_ONCE = PI_TILE };

typedef struct {
    int64_t begin, end;
} pi_columns_part;

/* One thread's scratch: the list of neurons, the gate of each where it confirms, and what sum_rows needs. */
typedef struct {
    int32_t *index;
    float *gate;
    uint8_t *sums;
} pi_list_scratch;

/* The columns of the output that a thread adds up, in whole lines. */
pi_columns_part pi_columns_of(const pi_sparse_ffn *op, const pi_worker *worker);
/* Of the named neurons [begin, end) of the list, whose gates are computed, those whose gates are positive, with those
 * gates in scratch, from `begin` on: rows of the others need not be read any further. The end of those kept. */
int64_t pi_keep_confirmed(const pi_sparse_ffn *op, int64_t begin, int64_t end, const pi_list_scratch *at);
/* h[k] of neurons [begin, end) of the first `count` of the list, at most PI_NEURONS_AT_ONCE. */
void pi_contribute(const pi_sparse_ffn *op, const pi_run *run, const pi_list_scratch *at, int64_t count, int64_t begin,
                   int64_t end, const pi_ahead *ahead);
/* Whether threads can share the chunks of the list evenly: none has more than a third of a thread's neurons. */
int pi_chunks_are_even(const pi_sparse_ffn *op, const int32_t *index, int64_t count, int64_t threads);
/* The `named` neurons of the list, one chunk after the other, from their gates to the sum. */
void pi_execute_chunks(const pi_sparse_ffn *op, pi_run *run, pi_worker *worker, int slot, int64_t named,
                       const pi_list_scratch *at);

#endif
