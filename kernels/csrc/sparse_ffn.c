/* The feed-forward block of a model over some of its neurons: those with a positive gate (gate-first), those that a
 * predictor names and whose gates confirm it, or those whose known factor, act(gate) or up, is large (thresholded). The
 * listed neurons' products go to `h` without gaps, in ascending order. An FFN of two matrices has gate and down rows:
 * the activation reads its first matrix, and there is nothing to multiply the result with. */
#include "sparse_ffn.h"

#include <math.h>
#include <string.h>

/* The contribution of a neuron; the same products as `activate` makes. */
static inline float contribution(int32_t kind, float gate, float up) {
    switch (kind) {
    case PI_RELU2: return (gate * gate) * up;
    case PI_DRELU: return gate * (0.0f > up ? 0.0f : up);
    default: return gate * up;
    }
}

/* The same where neurons are picked by the size of a factor, `select`: [begin, end) of at most 16 neurons. */
static void thresholded(const pi_sparse_ffn *op, const pi_run *run, const int32_t *index, int64_t count, int64_t begin,
                        int64_t end, const pi_ahead *ahead) {
    const float *select = op->select;
    float *h = op->h, known[PI_NEURONS_AT_ONCE];
    const pi_rows *rest = &op->bundle->part[op->rule == PI_BY_GATE_SIZE ? PI_UP : PI_GATE];
    run->kernels->product_rows(rest, index, count, begin, end, ahead, op->src, &op->acts, 0, h);
    for (int64_t k = begin; k < end; k++) known[k - begin] = select[index[k]];
    if (op->rule == PI_BY_UP_SIZE)
        run->kernels->activate(op->kind, op->cut, h + begin, known, end - begin, h + begin);
    else
        for (int64_t k = begin; k < end; k++) h[k] = known[k - begin] * h[k];
}

/* Neurons [begin, end) of the list, whose gates are positive: h[k] = contribution of index[k]. */
static void contributions(const pi_sparse_ffn *op, const pi_run *run, const int32_t *index, const float *gate,
                          int64_t count, int64_t begin, int64_t end, const pi_ahead *ahead) {
    const pi_rows *up = &op->bundle->part[PI_UP];
    const float *select = op->select;
    float *h = op->h;
    const int gated = up->data != NULL;
    if (gated) run->kernels->product_rows(up, index, count, begin, end, ahead, op->src, &op->acts, 0, h);
    for (int64_t k = begin; k < end; k++) {
        const float g = gate ? gate[k] : select[index[k]];
        /* Gates in scratch are above the cut. No second look at them: it would hide a row that was read in vain. */
        h[k] = !gate && g <= op->cut ? 0.0f : contribution(op->kind, g, gated ? h[k] : 1.0f);
    }
}

void pi_contribute(const pi_sparse_ffn *op, const pi_run *run, const pi_list_scratch *at, int64_t count, int64_t begin,
                   int64_t end, const pi_ahead *ahead) {
    if (op->rule == PI_BY_VALUE)
        contributions(op, run, at->index, op->gate ? at->gate : NULL, count, begin, end, ahead);
    else
        thresholded(op, run, at->index, count, begin, end, ahead);
}

pi_columns_part pi_columns_of(const pi_sparse_ffn *op, const pi_worker *worker) {
    int64_t units = (op->bundle->columns + PI_LINE_COLUMNS - 1) / PI_LINE_COLUMNS;
    int64_t thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    int64_t end = units * (thread + 1) / threads * PI_LINE_COLUMNS;
    return (pi_columns_part){units * thread / threads * PI_LINE_COLUMNS,
                             end < op->bundle->columns ? end : op->bundle->columns};
}

static int64_t list_bytes(const pi_sparse_ffn *op) {
    return pi_round_up(op->bundle->rows * (int64_t)sizeof(int32_t), 64);
}

int64_t pi_sparse_ffn_scratch_bytes(const pi_sparse_ffn *op) {
    return 2 * list_bytes(op) + pi_sum_scratch_bytes(op->bundle->columns);
}

static pi_list_scratch scratch_of(const pi_sparse_ffn *op, const pi_run *run, const pi_worker *worker) {
    uint8_t *at = pi_scratch_of(run, worker);
    return (pi_list_scratch){(int32_t *)(void *)at, (float *)(void *)(at + list_bytes(op)), at + 2 * list_bytes(op)};
}

int64_t pi_keep_confirmed(const pi_sparse_ffn *op, int64_t begin, int64_t end, const pi_list_scratch *at) {
    const float *gate = op->gate;
    int64_t kept = begin;
    for (int64_t k = begin; k < end; k++) {
        const int32_t neuron = at->index[k];
        const float g = gate[k] + (op->bias ? op->bias[neuron] : 0.0f);
        at->index[kept] = neuron;
        at->gate[kept] = g;
        kept += !(g <= op->cut); /* NaN stays, so that it shows */
    }
    return kept;
}

/* Of the whole list of named neurons, whose gates all threads compute, those that are confirmed: as many as they are. */
static int64_t list_confirmed(const pi_sparse_ffn *op, const pi_run *run, pi_worker *worker, int slot, int64_t count,
                              const pi_list_scratch *at) {
    int64_t chunk;
    pi_share share = pi_share_open(worker, slot, (count + PI_NEURONS_AT_ONCE - 1) / PI_NEURONS_AT_ONCE);
    while ((chunk = pi_share_next(&share)) >= 0) {
        int64_t begin = chunk * PI_NEURONS_AT_ONCE, end = begin + PI_NEURONS_AT_ONCE;
        run->kernels->product_rows(&op->bundle->part[PI_GATE], at->index, count, begin, end < count ? end : count, NULL,
                                   op->src, &op->acts, 0, op->gate);
    }
    pi_barrier(worker);
    return pi_keep_confirmed(op, 0, count, at);
}

/* One token. Every thread makes the whole list for itself: that costs less than a barrier for handing it around. */
static void execute_listed(const pi_sparse_ffn *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_list_scratch at = scratch_of(op, run, worker);
    const pi_columns_part columns = pi_columns_of(op, worker);
    int64_t (*list)(const float *, const float *, int64_t, int32_t *) =
        op->rule == PI_BY_VALUE ? run->kernels->list_active : run->kernels->list_large;
    int64_t named = list(op->select, op->threshold, op->bundle->rows, at.index), chunk;
    if (pi_chunks_are_even(op, at.index, named, pi_worker_threads(worker))) {
        pi_execute_chunks(op, run, worker, slot, named, &at);
        return;
    }
    int64_t count = op->gate ? list_confirmed(op, run, worker, slot, named, &at) : named;
    pi_share share = pi_share_open(worker, slot, (count + PI_NEURONS_AT_ONCE - 1) / PI_NEURONS_AT_ONCE);
    while ((chunk = pi_share_next(&share)) >= 0) {
        int64_t begin = chunk * PI_NEURONS_AT_ONCE, end = begin + PI_NEURONS_AT_ONCE;
        if (end > count) end = count;
        pi_contribute(op, run, &at, count, begin, end, NULL);
    }
    pi_barrier(worker);
    if (columns.begin < columns.end) {
        if (!op->accumulate) pi_clear_columns(op->out, op->bundle->columns, 1, columns.begin, columns.end);
        run->kernels->sum_rows(&op->bundle->part[PI_DOWN], at.index, op->h, count, columns.begin, columns.end, at.sums,
                               op->out);
    }
    if (pi_worker_thread(worker) == 0) {
        op->counted->active += named;
        op->counted->confirmed += count;
    }
}

/* Of the neurons of a tile, over all tokens: those that are selected, and those of them that contribute. */
typedef struct {
    int64_t named, confirmed;
} selection;

/* The same as `thresholded` for 16 neighbouring neurons and all tokens. */
static selection threshold_tile(const pi_sparse_ffn *op, const pi_run *run, int64_t tile) {
    const pi_rows *rest = &op->bundle->part[op->rule == PI_BY_GATE_SIZE ? PI_UP : PI_GATE];
    int64_t neurons = op->bundle->rows, first = tile * PI_TILE, active = 0;
    int64_t count = first + PI_TILE < neurons ? PI_TILE : neurons - first;
    run->kernels->product_many_rows(rest, NULL, neurons, tile, tile + 1, op->src, &op->acts, run->tokens, op->h,
                                    neurons);
    for (int64_t t = 0; t < run->tokens; t++) {
        const float *known = op->select + t * neurons + first, *threshold = op->threshold + first;
        float *h = op->h + t * neurons + first;
        if (op->rule == PI_BY_UP_SIZE)
            run->kernels->activate(op->kind, op->cut, h, known, count, h);
        else
            for (int64_t i = 0; i < count; i++) h[i] = known[i] * h[i];
        run->kernels->keep_large(known, threshold, count, h);
        for (int64_t i = 0; i < count; i++) active += !(fabsf(known[i]) <= threshold[i]);
    }
    return (selection){active, active};
}

/* Contributions of 16 neighbouring neurons to all tokens: zero for the neurons that are not selected. */
static selection contribute_tile(const pi_sparse_ffn *op, const pi_run *run, int64_t tile) {
    const pi_rows *part = op->bundle->part;
    int64_t neurons = op->bundle->rows, first = tile * PI_TILE;
    selection found = {0, 0};
    int64_t last = first + PI_TILE < neurons ? first + PI_TILE : neurons;
    if (op->gate)
        run->kernels->product_many_rows(&part[PI_GATE], NULL, neurons, tile, tile + 1, op->src, &op->acts, run->tokens,
                                        op->gate, neurons);
    const int gated = part[PI_UP].data != NULL;
    if (gated)
        run->kernels->product_many_rows(&part[PI_UP], NULL, neurons, tile, tile + 1, op->src, &op->acts, run->tokens,
                                        op->h, neurons);
    for (int64_t t = 0; t < run->tokens; t++)
        for (int64_t i = first; i < last; i++) {
            float select = op->select[t * neurons + i], gate = op->gate ? op->gate[t * neurons + i] : select;
            float *h = &op->h[t * neurons + i];
            if (op->gate && op->bias) gate += op->bias[i];
            int selected = !(select <= (op->threshold ? op->threshold[i] : 0.0f));
            const int confirmed = selected && !(gate <= op->cut);
            found.named += selected;
            found.confirmed += confirmed;
            *h = confirmed ? contribution(op->kind, gate, gated ? *h : 1.0f) : 0.0f;
        }
    return found;
}

static void execute_all(const pi_sparse_ffn *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_columns_part columns = pi_columns_of(op, worker);
    int64_t width = op->bundle->columns, tile;
    selection found = {0, 0};
    pi_share share = pi_share_open(worker, slot, (op->bundle->rows + PI_TILE - 1) / PI_TILE);
    while ((tile = pi_share_next(&share)) >= 0) {
        const selection of = (op->rule == PI_BY_VALUE ? contribute_tile : threshold_tile)(op, run, tile);
        found.named += of.named;
        found.confirmed += of.confirmed;
    }
    __atomic_fetch_add(&op->counted->active, found.named, __ATOMIC_RELAXED);
    __atomic_fetch_add(&op->counted->confirmed, found.confirmed, __ATOMIC_RELAXED);
    pi_barrier(worker);
    if (columns.begin >= columns.end) return;
    if (!op->accumulate) pi_clear_columns(op->out, width, run->tokens, columns.begin, columns.end);
    run->kernels->sum_all_rows(&op->bundle->part[PI_DOWN], op->h, run->tokens, columns.begin, columns.end, op->out);
}

/* ---- a few tokens: the rows that any of them selects ---- */

typedef struct {
    int64_t neurons, named, confirmed; /* of the union, and of all tokens together */
} selected_union;

static inline int is_selected(const pi_sparse_ffn *op, int64_t token, int32_t neuron) {
    const float value = op->select[token * op->bundle->rows + neuron];
    const float threshold = op->threshold ? op->threshold[neuron] : 0.0f;
    return !((op->rule == PI_BY_VALUE ? value : fabsf(value)) <= threshold);
}

/* Lists the neurons that any token selects in at->index; at->gate is used up. */
static selected_union list_union(const pi_sparse_ffn *op, const pi_run *run, const pi_list_scratch *at) {
    selected_union u = {0};
    const int64_t neurons = op->bundle->rows;
    uint8_t *mark = (uint8_t *)at->gate;
    int64_t (*list)(const float *, const float *, int64_t, int32_t *) =
        op->rule == PI_BY_VALUE ? run->kernels->list_active : run->kernels->list_large;
    memset(mark, 0, (size_t)neurons);
    for (int64_t t = 0; t < run->tokens; t++) {
        const int64_t count = list(op->select + t * neurons, op->threshold, neurons, at->index);
        for (int64_t k = 0; k < count; k++) mark[at->index[k]] = 1;
        u.named += count;
    }
    for (int64_t i = 0; i < neurons; i++) {
        at->index[u.neurons] = (int32_t)i;
        u.neurons += mark[i];
    }
    u.confirmed = u.named;
    return u;
}

/* Gates of the union; keeps the neurons that one of the tokens that named them confirms, with their former positions,
 * where their gates lie, in at->gate. */
static void confirm_union(const pi_sparse_ffn *op, pi_run *run, pi_worker *worker, int slot, const pi_list_scratch *at,
                          selected_union *u) {
    const int64_t neurons = op->bundle->rows;
    int32_t *position = (int32_t *)at->gate;
    int64_t tile, kept = 0;
    pi_share share = pi_share_open(worker, slot, (u->neurons + PI_TILE - 1) / PI_TILE);
    while ((tile = pi_share_next(&share)) >= 0)
        run->kernels->product_many_rows(&op->bundle->part[PI_GATE], at->index, u->neurons, tile, tile + 1, op->src,
                                        &op->acts, run->tokens, op->gate, neurons);
    pi_barrier(worker);
    u->confirmed = 0;
    for (int64_t k = 0; k < u->neurons; k++) {
        const int32_t neuron = at->index[k];
        int any = 0;
        for (int64_t t = 0; t < run->tokens; t++) {
            const float gate = op->gate[t * neurons + k] + (op->bias ? op->bias[neuron] : 0.0f);
            any += is_selected(op, t, neuron) && !(gate <= op->cut);
        }
        at->index[kept] = neuron;
        position[kept] = (int32_t)k;
        kept += any > 0;
        u->confirmed += any;
    }
    u->neurons = kept;
}

/* h[t, k] = contribution of neuron index[k] to token t, zero where that does not select it; k of one tile. */
static void contribute_union(const pi_sparse_ffn *op, const pi_run *run, int64_t tile, const pi_list_scratch *at,
                             int64_t count) {
    const int64_t neurons = op->bundle->rows, first = tile * PI_TILE;
    const int64_t n = count - first < PI_TILE ? count - first : PI_TILE;
    const pi_rows *rest = &op->bundle->part[op->rule == PI_BY_UP_SIZE ? PI_GATE : PI_UP];
    const int32_t *index = at->index + first, *position = (const int32_t *)at->gate + first;
    if (rest->data)
        run->kernels->product_many_rows(rest, at->index, count, tile, tile + 1, op->src, &op->acts, run->tokens, op->h,
                                        neurons);
    for (int64_t t = 0; t < run->tokens; t++) {
        float *h = op->h + t * neurons + first, known[PI_TILE];
        for (int64_t k = 0; k < n; k++) known[k] = op->select[t * neurons + index[k]];
        if (op->rule == PI_BY_UP_SIZE) run->kernels->activate(op->kind, op->cut, h, known, n, h);
        for (int64_t k = 0; k < n; k++) {
            float gate = known[k];
            if (op->gate) gate = op->gate[t * neurons + position[k]] + (op->bias ? op->bias[index[k]] : 0.0f);
            const int zero = op->rule == PI_BY_VALUE && gate <= op->cut;
            if (op->rule == PI_BY_GATE_SIZE) h[k] = gate * h[k];
            if (op->rule == PI_BY_VALUE) h[k] = contribution(op->kind, gate, rest->data ? h[k] : 1.0f);
            if (zero || !is_selected(op, t, index[k])) h[k] = 0.0f;
        }
    }
}

/* 1 when the union is so large that it is better to read all rows: then nothing has been computed. */
static int execute_union(const pi_sparse_ffn *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_list_scratch at = scratch_of(op, run, worker);
    const pi_columns_part columns = pi_columns_of(op, worker);
    const int64_t neurons = op->bundle->rows, width = op->bundle->columns;
    selected_union u = list_union(op, run, &at);
    int64_t tile;
    if (pi_reads_all(run->tokens, u.neurons, neurons)) return 1;
    if (op->gate) confirm_union(op, run, worker, slot, &at, &u);
    pi_share share = pi_share_open(worker, slot, (u.neurons + PI_TILE - 1) / PI_TILE);
    while ((tile = pi_share_next(&share)) >= 0) contribute_union(op, run, tile, &at, u.neurons);
    pi_barrier(worker);
    if (columns.begin < columns.end) {
        if (!op->accumulate) pi_clear_columns(op->out, width, run->tokens, columns.begin, columns.end);
        for (int64_t t = 0; t < run->tokens; t++)
            run->kernels->sum_rows(&op->bundle->part[PI_DOWN], at.index, op->h + t * neurons, u.neurons, columns.begin,
                                   columns.end, at.sums, op->out + t * width);
    }
    if (pi_worker_thread(worker) == 0) {
        op->counted->active += u.named;
        op->counted->confirmed += u.confirmed;
    }
    return 0;
}

void pi_sparse_ffn_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_sparse_ffn *s = &op->u.sparse_ffn;
    if (pi_worker_thread(worker) == 0)
        __atomic_fetch_add(&s->counted->total, run->tokens * s->bundle->rows, __ATOMIC_RELAXED);
    if (run->tokens == 1)
        execute_listed(s, run, worker, slot);
    else if (run->tokens > PI_FEW_TOKENS || execute_union(s, run, worker, slot))
        execute_all(s, run, worker, slot);
}

/* ---- rows that are on disk ---- */

/* The neurons in the range of the operation that some token selects: the list of them, or NULL for all of the range. */
static const int32_t *list_selected(const pi_fetch_records *f, const pi_run *run, pi_records *records, int64_t *count) {
    int32_t *list = pi_records_list(records);
    uint8_t *mark = pi_records_marks(records);
    const float *select = f->select + f->first, *threshold = f->threshold ? f->threshold + f->first : NULL;
    int64_t (*large)(const float *, const float *, int64_t, int32_t *) =
        f->rule == PI_BY_VALUE ? run->kernels->list_active : run->kernels->list_large;
    if (run->tokens == 1) {
        *count = large(select, threshold, f->count, list);
        for (int64_t k = 0; f->first && k < *count; k++) list[k] += (int32_t)f->first;
        return list;
    }
    if (pi_reads_all(run->tokens, 0, f->count)) return NULL;
    memset(mark, 0, (size_t)f->count);
    for (int64_t t = 0; t < run->tokens; t++) {
        const int64_t one = large(select + t * f->neurons, threshold, f->count, list);
        for (int64_t k = 0; k < one; k++) mark[list[k]] = 1;
    }
    *count = 0;
    for (int64_t i = 0; i < f->count; i++) {
        list[*count] = (int32_t)(f->first + i);
        *count += mark[i];
    }
    return pi_reads_all(run->tokens, *count, f->count) ? NULL : list;
}

/* The first thread asks; all lay out what arrives. */
void pi_fetch_records_execute(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_fetch_records *f = &op->u.fetch_records;
    const int first = pi_worker_thread(worker) == 0;
    pi_records *records = *f->records;
    int64_t count = 0;
    if (!records) {
        __atomic_store_n(&run->unfetched, 1, __ATOMIC_RELAXED);
        return;
    }
    const int32_t *list = first ? list_selected(f, run, records, &count) : NULL;
    if (f->ahead != PI_NEEDED_NOW) {
        if (list) pi_records_ahead(records, f->layer, list, count, f->ahead == PI_NEEDED_SOON);
        return;
    }
    if (pi_records_fetch(records, worker, f->layer, list, count) < 0)
        __atomic_store_n(&run->unfetched, 1, __ATOMIC_RELAXED);
}
