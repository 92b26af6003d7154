/* Experts that the tokens of a run have chosen. A token and one of its experts are a pair; pairs are numbered expert
 * by expert, and within an expert token by token, so that what one expert computes lies together. Every thread works
 * out that order for itself: it costs less than waiting for another. */
#include "program.h"

#include <string.h>

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {             /* pairs of the run in their order */
    int64_t active;          /* experts of this part that some token takes */
    int32_t *expert, *first; /* [active], and [active + 1]: their pairs are [first[i], first[i + 1]) */
    int32_t *pair;           /* [tokens · used]: the number of each choice, -1 where its expert is elsewhere */
    int64_t pairs;
} pi_order;

/* Of int32, in a thread's scratch. */
static int64_t order_words(const pi_expert_choice *c, int64_t tokens) {
    return 3 * (c->experts + 1) + tokens * c->used;
}

/* The expert of choice `i`; -1 where it names none, which fails the run. */
static int32_t choice_at(const pi_expert_choice *c, const pi_run *run, int64_t i) {
    const int32_t expert = c->chosen[i];
    if (expert >= 0 && expert < c->experts) return expert;
    run->program->no_expert = 1;
    return -1;
}

static pi_order order_of(const pi_expert_choice *c, const pi_run *run, const pi_worker *worker) {
    int32_t *scratch = (int32_t *)(void *)pi_scratch_of(run, worker), *next = scratch + 2 * (c->experts + 1);
    pi_order o = {.expert = scratch, .first = scratch + c->experts + 1, .pair = next + c->experts + 1};
    const int64_t choices = run->tokens * c->used;
    memset(next, 0, sizeof(int32_t) * (size_t)c->experts);
    /* Copied and checked: nothing below trusts the buffer, which another thread may be changing. */
    for (int64_t i = 0; i < choices; i++) {
        o.pair[i] = choice_at(c, run, i);
        if (o.pair[i] >= 0) next[o.pair[i]]++;
    }
    for (int64_t e = 0; e < c->experts; e++) {
        const int32_t count = next[e];
        next[e] = c->here[e] ? (int32_t)o.pairs : -1;
        if (!count || !c->here[e]) continue;
        o.expert[o.active] = (int32_t)e;
        o.first[o.active++] = (int32_t)o.pairs;
        o.pairs += count;
    }
    o.first[o.active] = (int32_t)o.pairs;
    for (int64_t i = 0; i < choices; i++) {
        const int32_t e = o.pair[i];
        o.pair[i] = e < 0 || next[e] < 0 ? -1 : next[e]++;
    }
    return o;
}

/* One token whose weights come later: its experts all read the same row. */
static int reads_tokens(const pi_expert_matmul *m, const pi_run *run) { return m->of_tokens && run->tokens == 1; }

/* Copies the input row of each pair, or weighs it. */
void pi_expert_gather_execute(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_expert_gather *g = &op->u.expert_gather;
    if (run->tokens == 1 && !g->weigh) return;
    const pi_order o = order_of(&g->choice, run, worker);
    const int64_t choices = run->tokens * g->choice.used, width = g->width, blocks = width / PI_BLOCK;
    const int64_t thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    for (int64_t i = choices * thread / threads; i < choices * (thread + 1) / threads; i++) {
        const int64_t pair = o.pair[i], token = i / g->choice.used;
        if (pair < 0) continue;
        const float *src = g->src + token * width;
        float *out = g->out + pair * width;
        if (g->needs_floats || g->weigh) memcpy(out, src, sizeof(float) * (size_t)width);
        if (g->weigh) run->kernels->scale(g->choice.weights[i], width, out);
        if (!g->out_acts.q) continue;
        int8_t *q = g->out_acts.q + pair * width;
        float *d = g->out_acts.d + pair * blocks, *s = g->out_acts.s + pair * blocks;
        if (g->weigh) {
            run->kernels->quantize_acts(out, width, q, d, s);
        } else {
            memcpy(q, g->acts.q + token * width, (size_t)width);
            memcpy(d, g->acts.d + token * blocks, sizeof(float) * (size_t)blocks);
            memcpy(s, g->acts.s + token * blocks, sizeof(float) * (size_t)blocks);
        }
    }
}

/* The products of one expert for `count` pairs, rows from `row` on, times its scale, and its bias added. */
static void scale_products(const pi_run *run, float scale, const float *bias, int64_t count, int64_t row, int64_t end,
                           int64_t rows, float *out) {
    for (int64_t pair = 0; pair < count; pair++) {
        float *products = out + pair * rows + row;
        run->kernels->scale(scale, end - row, products);
        if (bias) run->kernels->add(bias + row, end - row, products);
    }
}

void pi_expert_matmul_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_expert_matmul *m = &op->u.expert_matmul;
    const pi_order o = order_of(&m->choice, run, worker);
    const int64_t chunks = (m->tiles + m->chunk - 1) / m->chunk;
    const int same = reads_tokens(m, run);
    pi_share share = pi_share_open(worker, slot, o.active * chunks);
    int64_t task;
    while ((task = pi_share_next(&share)) >= 0) {
        const int64_t at = task / chunks, tile = task % chunks * m->chunk, expert = o.expert[at];
        const int64_t first = o.first[at], count = o.first[at + 1] - first;
        const pi_matrix *w = m->choice.here[expert];
        if (!w->data) {
            atomic_store_explicit(&run->missing, 1, memory_order_relaxed);
            continue;
        }
        const float *bias = m->bias ? m->bias + expert * w->rows : NULL;
        const int is_float = pi_row_is_float(w->row_type);
        const float *src = same ? m->token_src : m->src;
        const pi_acts *acts = same ? &m->token_acts : &m->acts;
        const int64_t end = min64(m->tiles, tile + m->chunk);
        float *out = m->out + first * w->rows;
        /* With one row for all, the output's place still is the pair's. */
        run->kernels->matmul(w, is_float ? src : NULL, is_float ? NULL : acts, same ? 0 : first, count, tile, end,
                             m->scales ? NULL : bias, 0, same ? out : m->out, w->rows);
        if (m->scales)
            scale_products(run, m->scales[expert], bias, count, tile * PI_TILE, min64(w->rows, end * PI_TILE), w->rows,
                           out);
    }
}

enum {
    STRETCH = 128, /* neighbouring rows; the picked ones among them are computed together */
    BEYOND = 64,   /* following rows; the picked ones among them are prefetched meanwhile */
    FEW = 8,       /* pairs of an expert up to here are picked for each; beyond, nearly all rows are read anyway */
};

/* Lists the rows from `begin` on whose gates are above the cut; a NaN is no gate to leave out. */
static int64_t list_rows(const float *gate, float cut, int64_t begin, int64_t end, int32_t *index) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; i++) {
        index[count] = (int32_t)i;
        count += !(gate[i] <= cut);
    }
    return count;
}

/* One pair: the picked rows of a stretch. */
static void pick_rows(const pi_expert_rows *e, const pi_run *run, const pi_rows *rows, int64_t pair, int64_t row,
                      int64_t begin, int64_t end, const float *bias) {
    const pi_expert_matmul *m = &e->product;
    const int same = reads_tokens(m, run);
    const float *gate = e->gate + pair * rows->rows;
    float *out = m->out + pair * rows->rows, product[STRETCH];
    int32_t index[STRETCH + BEYOND];
    const int64_t count = list_rows(gate, e->cut, begin, end, index);
    const int64_t after = list_rows(gate, e->cut, end, min64(rows->rows, end + BEYOND), index + count);
    memset(out + begin, 0, sizeof(float) * (size_t)(end - begin));
    run->kernels->product_rows(rows, index, count + after, 0, count, NULL, same ? m->token_src : m->src,
                               same ? &m->token_acts : &m->acts, row, product);
    for (int64_t k = 0; k < count; k++) out[index[k]] = bias ? product[k] + bias[index[k]] : product[k];
}

/* Many pairs of one expert: all rows of a stretch, as whole experts are computed. */
static void all_rows(const pi_expert_rows *e, const pi_run *run, const pi_rows *rows, int64_t first, int64_t count,
                     int64_t begin, int64_t end, const float *bias) {
    const pi_expert_matmul *m = &e->product;
    const int64_t blocks = rows->columns / PI_BLOCK, columns = rows->columns;
    const pi_acts *a = &m->acts;
    const int is_float = pi_row_is_float(rows->row_type);
    const pi_acts acts =
        is_float ? *a : (pi_acts){a->q + first * columns, a->d + first * blocks, a->s + first * blocks, columns};
    run->kernels->product_many_rows(rows, NULL, rows->rows, begin / PI_TILE, (end + PI_TILE - 1) / PI_TILE,
                                    is_float ? m->src + first * columns : NULL, &acts, count,
                                    m->out + first * rows->rows, rows->rows);
    for (int64_t pair = first; bias && pair < first + count; pair++)
        run->kernels->add(bias + begin, end - begin, m->out + pair * rows->rows + begin);
}

void pi_expert_rows_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_expert_rows *e = &op->u.expert_rows;
    const pi_expert_matmul *m = &e->product;
    const pi_order o = order_of(&m->choice, run, worker);
    const int64_t neurons = m->tiles, stretches = (neurons + STRETCH - 1) / STRETCH;
    const int same = reads_tokens(m, run);
    pi_share share = pi_share_open(worker, slot, o.active * stretches);
    int64_t task;
    while ((task = pi_share_next(&share)) >= 0) {
        const int64_t at = task / stretches, begin = task % stretches * STRETCH, end = min64(neurons, begin + STRETCH);
        const int64_t first = o.first[at], count = o.first[at + 1] - first, expert = o.expert[at];
        const pi_matrix *w = m->choice.here[expert];
        const pi_rows rows = {w->row_type, w->table, w->rows, w->columns, w->tile_bytes / PI_TILE, w->data};
        const float *bias = m->bias ? m->bias + expert * neurons : NULL;
        if (count > FEW)
            all_rows(e, run, &rows, first, count, begin, end, bias);
        else
            for (int64_t pair = first; pair < first + count; pair++)
                pick_rows(e, run, &rows, pair, same ? 0 : pair, begin, end, bias);
    }
}

enum { LINE = 128 /* rows whose codes share 64 bytes or more of a column */ };

/* Counts the neurons of a pair that were read. */
static int64_t nonzero(const int8_t *q, int64_t count) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) found += q[i] != 0;
    return found;
}

void pi_expert_columns_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_expert_columns *e = &op->u.expert_columns;
    const pi_order o = order_of(&e->choice, run, worker);
    const int64_t lines = (e->rows + LINE - 1) / LINE, neurons = e->acts.columns;
    /* About two parts a thread, so that columns are read in long runs. */
    const int64_t wanted = 2 * pi_worker_threads(worker) / (o.active ? o.active : 1), parts = min64(lines, wanted + 1);
    pi_share share = pi_share_open(worker, slot, o.active * parts);
    int64_t task, active = 0, total = 0;
    while ((task = pi_share_next(&share)) >= 0) {
        const int64_t at = task / parts, part = task % parts, line = lines * part / parts,
                      end = lines * (part + 1) / parts;
        const int64_t row = line * LINE, count = min64(e->rows, end * LINE) - row, expert = o.expert[at];
        for (int64_t pair = o.first[at]; pair < o.first[at + 1]; pair++) {
            const int64_t block = pair * (neurons / PI_BLOCK);
            const int8_t *q = e->acts.q + pair * neurons;
            float *out = e->out + pair * e->rows;
            memset(out + row, 0, sizeof(float) * (size_t)count);
            run->kernels->sum_columns(e->choice.here[expert], q, e->acts.d + block, e->acts.s + block, line, end, out);
            if (e->bias) run->kernels->add(e->bias + expert * e->rows + row, count, out + row);
            if (line == 0) active += nonzero(q, neurons), total += neurons;
        }
    }
    __atomic_fetch_add(&e->counted->active, active, __ATOMIC_RELAXED);
    __atomic_fetch_add(&e->counted->confirmed, active, __ATOMIC_RELAXED);
    __atomic_fetch_add(&e->counted->total, total, __ATOMIC_RELAXED);
}

enum { UNIT = 64 /* columns that a thread takes at once */ };

void pi_expert_activate_execute(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_expert_activate *a = &op->u.expert_activate;
    const pi_order o = order_of(&a->choice, run, worker);
    const int64_t units = (a->width + UNIT - 1) / UNIT, blocks = a->width / PI_BLOCK, all = o.pairs * units;
    const int64_t thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    for (int64_t i = all * thread / threads; i < all * (thread + 1) / threads; i++) {
        const int64_t pair = i / units, column = i % units * UNIT, count = min64(UNIT, a->width - column);
        const int64_t at = pair * a->width + column, block = pair * blocks + column / PI_BLOCK;
        run->kernels->activate(a->kind, a->cut, a->gate + at, a->up ? a->up + at : NULL, count, a->out + at);
        if (a->acts.q)
            run->kernels->quantize_acts(a->out + at, count, a->acts.q + at, a->acts.d + block, a->acts.s + block);
    }
}

/* out (+)= Σ weight · row of the token's pairs, in ascending order of experts. */
void pi_expert_sum_execute(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_expert_sum *s = &op->u.expert_sum;
    const pi_order o = order_of(&s->choice, run, worker);
    const int64_t used = s->choice.used, thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    const int64_t units = (s->width + UNIT - 1) / UNIT, all = run->tokens * units;
    for (int64_t i = all * thread / threads; i < all * (thread + 1) / threads; i++) {
        const int64_t token = i / units, column = i % units * UNIT, count = min64(UNIT, s->width - column);
        float *out = s->out + token * s->width + column;
        if (!s->accumulate) memset(out, 0, sizeof(float) * (size_t)count);
        for (int64_t k = token * used; k < (token + 1) * used; k++) {
            if (o.pair[k] < 0) continue;
            const float *row = s->rows + o.pair[k] * s->width + column;
            if (s->weigh)
                run->kernels->add_scaled(row, s->choice.weights[k], count, out);
            else
                run->kernels->add(row, count, out);
        }
    }
}

/* Adds up the choices: tokens and squared weights of each expert, runs, and experts of a run. */
void pi_expert_count_execute(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_expert_count *c = &op->u.expert_count;
    if (pi_worker_thread(worker) != 0) return;
    const int64_t choices = run->tokens * c->choice.used;
    int32_t *seen = (int32_t *)(void *)pi_scratch_of(run, worker);
    memset(seen, 0, sizeof(int32_t) * (size_t)c->choice.experts);
    for (int64_t i = 0; i < choices; i++) {
        const int32_t expert = choice_at(&c->choice, run, i);
        if (expert < 0) continue;
        c->totals[1] += !seen[expert];
        seen[expert] = 1;
        if (!c->counts) continue;
        const double weight = c->choice.weights[i];
        c->counts[expert]++;
        c->gate_squares[expert] += weight * weight;
        c->up_squares[expert] += 1.0;
    }
    c->totals[0]++;
}

int64_t pi_expert_scratch_bytes(const pi_expert_choice *choice) {
    return order_words(choice, choice->max_tokens) * (int64_t)sizeof(int32_t);
}

/* Each head's slice of the input times a matrix of its own. */
void pi_head_matmul_execute(const pi_op *op, pi_run *run, pi_worker *worker, int slot) {
    const pi_head_matmul *h = &op->u.head_matmul;
    const int64_t columns = h->matrices[0]->columns, blocks = columns / PI_BLOCK;
    float *x = (float *)(void *)pi_scratch_of(run, worker), *d = x + h->max_tokens * columns;
    float *s = d + h->max_tokens * blocks;
    const pi_acts acts = {.q = (int8_t *)(s + h->max_tokens * blocks), .d = d, .s = s, .columns = columns};
    const int is_float = pi_row_is_float(h->matrices[0]->row_type);
    int64_t head;
    while ((head = pi_take_next(worker, slot, h->heads)) >= 0) {
        const pi_matrix *m = h->matrices[head];
        if (!m->data) {
            atomic_store_explicit(&run->missing, 1, memory_order_relaxed);
            continue;
        }
        for (int64_t t = 0; t < run->tokens; t++) {
            const float *src = h->src + t * h->src_width + h->src_first + head * h->src_step;
            memcpy(x + t * columns, src, sizeof(float) * (size_t)columns);
            if (!is_float)
                run->kernels->quantize_acts(src, columns, acts.q + t * columns, d + t * blocks, s + t * blocks);
        }
        run->kernels->matmul(m, is_float ? x : NULL, is_float ? NULL : &acts, 0, run->tokens, 0, m->tiles, NULL, 0,
                             h->out + h->out_first + head * h->out_step, h->out_width);
    }
}

int64_t pi_head_matmul_scratch_bytes(const pi_head_matmul *h) {
    const int64_t columns = h->matrices[0]->columns;
    return h->max_tokens * (columns * 5 + columns / PI_BLOCK * 8) + 64;
}
