/* The operations of a program: each shares its work among the threads and calls the kernels. */
#include "bundle.h"
#include "program.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct {
    int64_t begin, end;
} range;

/* This thread's share of `count` things, as one range. */
static range share_of(const pi_worker *worker, int64_t count) {
    int64_t thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    return (range){count * thread / threads, count * (thread + 1) / threads};
}

/* The same in whole units (the last may be shorter). */
static range share_in_units(const pi_worker *worker, int64_t count, int64_t unit) {
    range units = share_of(worker, (count + unit - 1) / unit);
    return (range){units.begin * unit, min64(count, units.end * unit)};
}

int pi_op_is_vector(const pi_op *op) {
    switch (op->kind) {
    case PI_OP_MATMUL:
    case PI_OP_ATTENTION:
    case PI_OP_SUM_ROWS:
    case PI_OP_SPARSE_FFN:
    case PI_OP_SIGN_SCORES:
    case PI_OP_HEAD_MATMUL:
    case PI_OP_FETCH:
    case PI_OP_FETCH_RECORDS:
    case PI_OP_EXPERT_GATHER:
    case PI_OP_EXPERT_MATMUL:
    case PI_OP_EXPERT_ROWS:
    case PI_OP_EXPERT_COLUMNS:
    case PI_OP_EXPERT_ACTIVATE:
    case PI_OP_EXPERT_SUM:
    case PI_OP_EXPERT_COUNT:
    case PI_OP_CONVOLVE:
    case PI_OP_SCAN_CHANNELS:
    case PI_OP_SCAN_HEADS:
    case PI_OP_DELTA_NET:
    case PI_OP_GENERAL_DELTA:
    case PI_OP_OBSERVE: return 0;
    default: return 1;
    }
}

int pi_op_needs_tokens(const pi_op *op) {
    switch (op->kind) {
    case PI_OP_QUANTIZE:
    case PI_OP_ACTIVATE:
    case PI_OP_ADD:
    case PI_OP_KEEP_LARGE:
    case PI_OP_MULTIPLY:
    case PI_OP_MAP: return 0;
    default: return 1;
    }
}

int64_t pi_op_width(const pi_op *op) {
    switch (op->kind) {
    case PI_OP_QUANTIZE: return op->u.quantize.acts.columns;
    case PI_OP_ACTIVATE: return op->u.activate.width;
    case PI_OP_ADD: return op->u.add.width;
    case PI_OP_KEEP_LARGE: return op->u.keep.width;
    case PI_OP_MULTIPLY: return op->u.multiply.width;
    case PI_OP_MAP: return op->u.map.width;
    default: return 0;
    }
}

int pi_split_by_token(const pi_op *op, int64_t tokens, int threads) { return op->by_token || tokens >= threads; }

enum { COLUMN_UNIT = 64 /* one line of int8, four of float */ };

/* What a vector operation gives this thread: tokens × columns. */
typedef struct {
    range tokens, columns;
} part;

static part part_of(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    int64_t width = pi_op_width(op);
    if (pi_split_by_token(op, run->tokens, pi_worker_threads(worker)))
        return (part){share_of(worker, run->tokens), {0, width}};
    return (part){{0, run->tokens}, share_in_units(worker, width, COLUMN_UNIT)};
}

pi_part pi_part_of(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    part p = part_of(op, run, worker);
    return (pi_part){p.tokens.begin, p.tokens.end, p.columns.begin, p.columns.end};
}

static void embed(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_embed *e = &op->u.embed;
    range tokens = share_of(worker, run->tokens);
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        float *out = e->out + t * e->table.columns;
        run->kernels->dequantize_row(e->table.data + e->ids[t] * e->table.stride, e->table.row_type, e->table.columns,
                                     out);
        if (e->scale != 1.0f) run->kernels->scale(e->scale, e->table.columns, out);
    }
}

static void norm(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_norm *n = &op->u.norm;
    range tokens = share_of(worker, run->tokens);
    int64_t width = n->width / n->groups;
    for (int64_t i = tokens.begin * n->groups; i < tokens.end * n->groups; i++) {
        const float *src = n->src + i * width;
        int64_t at = i % n->groups * n->weight_step;
        const float *weight = n->weight ? n->weight + at : NULL, *bias = n->bias ? n->bias + at : NULL;
        float *out = n->out + i * width;
        switch (op->kind) {
        case PI_OP_RMS_NORM: run->kernels->rms_norm(src, weight, n->eps, width, out); break;
        case PI_OP_LAYER_NORM: run->kernels->layer_norm(src, weight, bias, n->eps, width, out); break;
        case PI_OP_L2_NORM: run->kernels->l2_norm(src, n->eps, width, out); break;
        default: run->kernels->keep_top(src, n->eps, width, out); break;
        }
    }
}

static void quantize(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_quantize *q = &op->u.quantize;
    part p = part_of(op, run, worker);
    int64_t columns = q->acts.columns, blocks = columns / PI_BLOCK, count = p.columns.end - p.columns.begin;
    if (count <= 0) return;
    for (int64_t t = p.tokens.begin; t < p.tokens.end; t++) {
        int64_t at = t * columns + p.columns.begin, block = t * blocks + p.columns.begin / PI_BLOCK;
        run->kernels->quantize_acts(q->src + at, count, q->acts.q + at, q->acts.d + block, q->acts.s + block);
    }
}

static void activate(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_activate *a = &op->u.activate;
    part p = part_of(op, run, worker);
    int64_t count = p.columns.end - p.columns.begin;
    for (int64_t t = p.tokens.begin; t < p.tokens.end; t++) {
        int64_t at = t * a->width + p.columns.begin;
        run->kernels->activate(a->kind, a->cut, a->gate + at, a->up ? a->up + at : NULL, count, a->out + at);
    }
}

static void add(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_add *a = &op->u.add;
    part p = part_of(op, run, worker);
    for (int64_t t = p.tokens.begin; t < p.tokens.end; t++) {
        const float *src = a->src + t * a->src_stride + p.columns.begin;
        float *out = a->out + t * a->width + p.columns.begin;
        if (a->factor == 1.0f)
            run->kernels->add(src, p.columns.end - p.columns.begin, out);
        else
            run->kernels->add_scaled(src, a->factor, p.columns.end - p.columns.begin, out);
    }
}

static void keep_large(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_keep *k = &op->u.keep;
    part p = part_of(op, run, worker);
    int64_t column = p.columns.begin;
    for (int64_t t = p.tokens.begin; t < p.tokens.end; t++)
        run->kernels->keep_large(k->value + t * k->width + column, k->threshold + column, p.columns.end - column,
                                 k->out + t * k->width + column);
}

static void rope(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_rope *r = &op->u.rope;
    range tokens = share_of(worker, run->tokens);
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        int64_t angle = run->places[t].position * r->half;
        run->kernels->rope(r->x + t * r->heads * r->head_dim + r->offset, r->cos + angle, r->sin + angle, r->heads,
                           r->head_dim, r->half, r->neox);
    }
}

static void store_kv(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_store *s = &op->u.store;
    range tokens = share_of(worker, run->tokens);
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        const pi_place *place = &run->places[t];
        run->kernels->store_kv(s->k + t * s->width, s->v + t * s->value_width, &place->slots[s->slot].cache,
                               place->position);
    }
}

static void matmul(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_matmul *m = &op->u.matmul;
    const int64_t last = m->first_tile + m->tiles;
    int64_t chunks = (m->tiles + m->chunk - 1) / m->chunk, chunk;
    pi_share share = pi_share_open(worker, slot, chunks);
    if (!m->matrix->data) atomic_store_explicit(&run->missing, 1, memory_order_relaxed);
    while (m->matrix->data && (chunk = pi_share_next(&share)) >= 0)
        run->kernels->matmul(m->matrix, m->src, m->src ? NULL : &m->acts, 0, run->tokens,
                             m->first_tile + chunk * m->chunk, min64(last, m->first_tile + (chunk + 1) * m->chunk),
                             m->bias, m->accumulate, m->out, m->matrix->rows);
}

/* The first thread waits; the barrier that follows makes the others wait for it. */
static void fetch(const pi_op *op, pi_run *run, const pi_worker *worker) {
    const pi_fetch *f = &op->u.fetch;
    if (pi_worker_thread(worker) != 0) return;
    run->unfetched = !*f->units || pi_units_fetch(*f->units, &f->now, f->next, run->tokens) < 0;
}

uint8_t *pi_scratch_of(const pi_run *run, const pi_worker *worker) {
    return run->program->scratch + run->program->scratch_bytes * pi_worker_thread(worker);
}

uint8_t *pi_shared_scratch(const pi_run *run) {
    return run->program->scratch + run->program->scratch_bytes * run->program->scratch_threads;
}

/* The first position that the query at `position` sees. */
static int64_t first_seen(const pi_attention *a, int64_t position) {
    int64_t first = a->window ? max64(0, position + 1 - a->window) : 0;
    return a->chunk ? max64(first, position / a->chunk * a->chunk) : first;
}

/* Queries [begin, end) of one key head of a span, counted token by token and within a token head by head. */
static void attend(const pi_attention *a, const pi_run *run, const pi_worker *worker, const pi_span *span,
                   int64_t kv_head, int64_t begin, int64_t end) {
    int64_t group = a->heads / a->kv_heads;
    pi_query queries[PI_QUERIES];
    for (int64_t i = begin; i < end; i++) {
        int64_t token = i / group, head = kv_head * group + i % group, at = (span->first + token) * a->heads + head;
        int64_t position = span->position + token;
        queries[i - begin] = (pi_query){.q = a->q + at * a->head_dim,
                                        .out = a->out + at * a->value_dim,
                                        .first = first_seen(a, position),
                                        .last = position + 1,
                                        .slope = a->slopes ? a->slopes[head] : 0.0f,
                                        .sink = a->sinks ? a->sinks[head] : -INFINITY};
    }
    run->kernels->attend(queries, end - begin, &span->slots[a->slot].cache, kv_head, a->scale, a->softcap,
                         (float *)(void *)pi_scratch_of(run, worker));
}

/* Tasks of several tokens: blocks of `size` queries that belong to one span and one key head. */
static int64_t tasks_of(const pi_attention *a, const pi_span *span, int64_t size) {
    return (span->count * (a->heads / a->kv_heads) + size - 1) / size * a->kv_heads;
}

/* One token: neighbouring heads to each thread, cut where the key head changes. Several tokens: blocks of queries, the
 * last tokens of a span first since they see most keys. */
static void attention(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_attention *a = &op->u.attention;
    int64_t group = a->heads / a->kv_heads, threads = pi_worker_threads(worker);
    const pi_span *span = run->spans;
    if (run->tokens == 1) {
        range heads = share_of(worker, a->heads);
        for (int64_t head = heads.begin, end; head < heads.end; head = end) {
            int64_t kv_head = head / group, start = kv_head * group;
            end = min64(min64(heads.end, start + group), head + PI_QUERIES);
            attend(a, run, worker, span, kv_head, head - start, end - start);
        }
        return;
    }
    int64_t size = min64(PI_QUERIES, max64(4, run->tokens * group * a->kv_heads / (4 * threads) / 4 * 4));
    int64_t tasks = 0, before = 0, task; /* `before`: tasks of the spans before `span` */
    for (int64_t s = 0; s < run->span_count; s++) tasks += tasks_of(a, &run->spans[s], size);
    while ((task = pi_take_next(worker, slot, tasks)) >= 0) {
        for (int64_t own; task >= before + (own = tasks_of(a, span, size)); span++) before += own;
        int64_t queries = span->count * group, blocks = (queries + size - 1) / size;
        int64_t block = blocks - 1 - (task - before) / a->kv_heads;
        attend(a, run, worker, span, (task - before) % a->kv_heads, block * size, min64(queries, (block + 1) * size));
    }
}

/* Columns [begin, end) of Σ h_i row_i for all tokens. */
static void sum_rows(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_sum *a = &op->u.sum;
    const pi_rows *rows = &a->bundle->part[PI_DOWN];
    range columns = share_in_units(worker, rows->columns, PI_LINE_COLUMNS);
    if (columns.begin >= columns.end) return;
    if (!a->accumulate) pi_clear_columns(a->out, rows->columns, run->tokens, columns.begin, columns.end);
    if (run->tokens == 1) /* rows are read once either way, and this way prefetches them */
        run->kernels->sum_rows(rows, NULL, a->h, rows->rows, columns.begin, columns.end, pi_scratch_of(run, worker),
                               a->out);
    else
        run->kernels->sum_all_rows(rows, a->h, run->tokens, columns.begin, columns.end, a->out);
}

static void sign_code(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_sign_code *s = &op->u.sign_code;
    range tokens = share_of(worker, run->tokens);
    int64_t words = pi_sign_code_words(s->width);
    for (int64_t t = tokens.begin; t < tokens.end; t++)
        run->kernels->sign_code(s->src + t * s->width, s->width, s->code + t * words);
}

enum { SIGN_TILES = 8 /* that a thread takes at once */ };

static void sign_scores(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_sign_scores *s = &op->u.sign_scores;
    int64_t tiles = (s->rows + PI_TILE - 1) / PI_TILE, words = pi_sign_code_words(s->width), chunk;
    pi_share share = pi_share_open(worker, slot, (tiles + SIGN_TILES - 1) / SIGN_TILES);
    while ((chunk = pi_share_next(&share)) >= 0)
        for (int64_t t = 0; t < run->tokens; t++)
            run->kernels->sign_scores(s->signs, s->code + t * words, s->width, s->rows, chunk * SIGN_TILES,
                                      min64(tiles, (chunk + 1) * SIGN_TILES), s->out + t * s->rows);
}

void pi_clear_columns(float *out, int64_t width, int64_t tokens, int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens; t++) memset(out + t * width + begin, 0, sizeof(float) * (size_t)(end - begin));
}

void pi_op_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    switch (op->kind) {
    case PI_OP_EMBED: embed(op, run, worker); break;
    case PI_OP_RMS_NORM:
    case PI_OP_L2_NORM:
    case PI_OP_KEEP_TOP:
    case PI_OP_LAYER_NORM: norm(op, run, worker); break;
    case PI_OP_QUANTIZE: quantize(op, run, worker); break;
    case PI_OP_MATMUL: matmul(op, run, worker, slot); break;
    case PI_OP_ROPE: rope(op, run, worker); break;
    case PI_OP_STORE_KV: store_kv(op, run, worker); break;
    case PI_OP_ATTENTION: attention(op, run, worker, slot); break;
    case PI_OP_ACTIVATE: activate(op, run, worker); break;
    case PI_OP_ADD: add(op, run, worker); break;
    case PI_OP_SUM_ROWS: sum_rows(op, run, worker); break;
    case PI_OP_SPARSE_FFN: pi_sparse_ffn_execute(op, run, worker, slot); break;
    case PI_OP_KEEP_LARGE: keep_large(op, run, worker); break;
    case PI_OP_OBSERVE: pi_observe_execute(op, run, worker); break;
    case PI_OP_SIGN_CODE: sign_code(op, run, worker); break;
    case PI_OP_SIGN_SCORES: sign_scores(op, run, worker, slot); break;
    case PI_OP_HEAD_MATMUL: pi_head_matmul_execute(op, run, worker, slot); break;
    case PI_OP_FETCH: fetch(op, run, worker); break;
    case PI_OP_FETCH_RECORDS: pi_fetch_records_execute(op, run, worker); break;
    case PI_OP_ROUTE: pi_route_execute(op, run, worker); break;
    case PI_OP_EXPERT_GATHER: pi_expert_gather_execute(op, run, worker); break;
    case PI_OP_EXPERT_MATMUL: pi_expert_matmul_execute(op, run, worker, slot); break;
    case PI_OP_EXPERT_ROWS: pi_expert_rows_execute(op, run, worker, slot); break;
    case PI_OP_EXPERT_COLUMNS: pi_expert_columns_execute(op, run, worker, slot); break;
    case PI_OP_EXPERT_ACTIVATE: pi_expert_activate_execute(op, run, worker); break;
    case PI_OP_EXPERT_SUM: pi_expert_sum_execute(op, run, worker); break;
    case PI_OP_EXPERT_COUNT: pi_expert_count_execute(op, run, worker); break;
    case PI_OP_CONVOLVE:
    case PI_OP_SCAN_CHANNELS:
    case PI_OP_SCAN_HEADS:
    case PI_OP_DELTA_NET:
    case PI_OP_GENERAL_DELTA: pi_recurrent_execute(op, run, worker); break;
    default: pi_vector_execute(op, run, worker); break;
    }
}

int pi_op_slot(const pi_op *op, int64_t *slot) {
    switch (op->kind) {
    case PI_OP_STORE_KV: *slot = op->u.store.slot; return 1;
    case PI_OP_ATTENTION: *slot = op->u.attention.slot; return 1;
    case PI_OP_CONVOLVE: *slot = op->u.convolve.slot; return 1;
    case PI_OP_SCAN_CHANNELS:
    case PI_OP_SCAN_HEADS: *slot = op->u.scan.slot; return 1;
    case PI_OP_DELTA_NET: *slot = op->u.delta_net.slot; return 1;
    case PI_OP_GENERAL_DELTA: *slot = op->u.general_delta.slot; return 1;
    default: return 0;
    }
}

int64_t pi_op_scratch_bytes(const pi_op *op) {
    if (op->kind == PI_OP_ATTENTION) {
        const pi_attention *a = &op->u.attention;
        int64_t scores = (a->capacity + PI_TILE - 1) / PI_TILE * PI_TILE;
        return PI_QUERIES * (scores + (a->value_dim + 15) / 16 * 16) * (int64_t)sizeof(float);
    }
    if (op->kind == PI_OP_HEAD_MATMUL) return pi_head_matmul_scratch_bytes(&op->u.head_matmul);
    if (op->kind == PI_OP_EXPERT_GATHER) return pi_expert_scratch_bytes(&op->u.expert_gather.choice);
    if (op->kind == PI_OP_EXPERT_MATMUL) return pi_expert_scratch_bytes(&op->u.expert_matmul.choice);
    if (op->kind == PI_OP_EXPERT_ROWS) return pi_expert_scratch_bytes(&op->u.expert_rows.product.choice);
    if (op->kind == PI_OP_EXPERT_COLUMNS) return pi_expert_scratch_bytes(&op->u.expert_columns.choice);
    if (op->kind == PI_OP_EXPERT_ACTIVATE) return pi_expert_scratch_bytes(&op->u.expert_activate.choice);
    if (op->kind == PI_OP_EXPERT_SUM) return pi_expert_scratch_bytes(&op->u.expert_sum.choice);
    if (op->kind == PI_OP_EXPERT_COUNT) return pi_expert_scratch_bytes(&op->u.expert_count.choice);
    if (op->kind == PI_OP_SUM_ROWS) return pi_sum_scratch_bytes(op->u.sum.bundle->columns);
    if (op->kind == PI_OP_SPARSE_FFN) return pi_sparse_ffn_scratch_bytes(&op->u.sparse_ffn);
    return 0;
}
