/* Gate-first: the feed-forward block of a gated ReLU model, exactly, reading up and down rows only where the gate is
 * positive. The active neurons' products go to `h` without gaps, in ascending order of neurons. */
#include "program.h"

#include <string.h>

enum { NEURONS_AT_ONCE = 16 };

/* h[k] (holding up · x of the k-th active neuron) becomes its contribution. Same products as `activate` makes. */
static void multiply_gates(int32_t kind, const float *gate, const int32_t *index, int64_t count, float *h) {
    for (int64_t k = 0; k < count; k++) {
        float g = gate[index[k]], u = h[k];
        switch (kind) {
        case PI_RELU2: h[k] = (g * g) * u; break;
        case PI_DRELU: h[k] = g * (0.0f > u ? 0.0f : u); break;
        default: h[k] = g * u; break;
        }
    }
}

static void contributions(const pi_gate_first *op, const pi_run *run, int64_t token, const int32_t *index,
                          int64_t begin, int64_t end) {
    float *h = op->h + token * op->up.rows;
    run->kernels->dot_rows(&op->up, index + begin, end - begin, op->src ? op->src + token * op->up.columns : NULL,
                           op->src ? NULL : &op->acts, token, h + begin);
    multiply_gates(op->kind, op->gate + token * op->up.rows, index + begin, end - begin, h + begin);
}

static void accumulate(const pi_gate_first *op, const pi_run *run, int64_t token, const int32_t *index, int64_t count,
                       int64_t column0, int64_t column1) {
    if (column0 >= column1) return;
    float *out = op->out + token * op->down.columns;
    if (!op->accumulate) memset(out + column0, 0, sizeof(float) * (size_t)(column1 - column0));
    run->kernels->accumulate_listed_rows(&op->down, index, op->h + token * op->up.rows, count, column0, column1, out);
}

/* Every thread makes the whole list for itself: that costs less than a barrier for handing it around. */
static void execute_together(const pi_gate_first *op, pi_run *run, pi_worker *worker, int slot, int32_t *index) {
    int64_t unit = pi_column_unit(op->down.row_type), units = (op->down.columns + unit - 1) / unit;
    int64_t thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    int64_t column0 = units * thread / threads * unit, column1 = units * (thread + 1) / threads * unit;
    if (column1 > op->down.columns) column1 = op->down.columns;
    for (int64_t t = 0; t < run->tokens; t++) {
        int64_t count = run->kernels->list_active(op->gate + t * op->up.rows, op->up.rows, index), chunk;
        pi_share share = pi_share_open(worker, slot, (count + NEURONS_AT_ONCE - 1) / NEURONS_AT_ONCE);
        while ((chunk = pi_share_next(&share)) >= 0) {
            int64_t begin = chunk * NEURONS_AT_ONCE, end = begin + NEURONS_AT_ONCE;
            contributions(op, run, t, index, begin, end < count ? end : count);
        }
        pi_barrier(worker);
        accumulate(op, run, t, index, count, column0, column1);
        if (thread == 0) run->program->active += count;
    }
}

static void execute_tokens(const pi_gate_first *op, pi_run *run, pi_worker *worker, int32_t *index) {
    int64_t thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    for (int64_t t = run->tokens * thread / threads; t < run->tokens * (thread + 1) / threads; t++) {
        int64_t count = run->kernels->list_active(op->gate + t * op->up.rows, op->up.rows, index);
        contributions(op, run, t, index, 0, count);
        accumulate(op, run, t, index, count, 0, op->down.columns);
        __atomic_fetch_add(&run->program->active, count, __ATOMIC_RELAXED);
    }
}

void pi_gate_first_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_gate_first *g = &op->u.gate_first;
    int32_t *index = (int32_t *)(void *)pi_scratch_of(run, worker);
    if (pi_worker_thread(worker) == 0)
        __atomic_fetch_add(&run->program->total, run->tokens * g->up.rows, __ATOMIC_RELAXED);
    if (run->tokens >= 2 * pi_worker_threads(worker))
        execute_tokens(g, run, worker, index);
    else
        execute_together(g, run, worker, slot, index);
}
