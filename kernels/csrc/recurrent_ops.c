/* Recurrent operations: the tokens of a session one after the other, channels or heads shared among the threads. */
#include "program.h"

typedef struct {
    int64_t begin, end;
} range;

/* This thread's share of `count` things in whole units. */
static range share_of(const pi_worker *worker, int64_t count, int64_t unit) {
    const int64_t thread = pi_worker_thread(worker), threads = pi_worker_threads(worker);
    const int64_t units = (count + unit - 1) / unit, end = units * (thread + 1) / threads * unit;
    return (range){units * thread / threads * unit, end < count ? end : count};
}

static float *state_of(const pi_run *run, int64_t token, int64_t slot) {
    return run->places[token].slots[slot].recurrent;
}

static void convolve(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_convolve *c = &op->u.convolve;
    const range channels = share_of(worker, c->width, PI_TILE);
    if (channels.begin >= channels.end) return;
    for (int64_t t = 0; t < run->tokens; t++)
        run->kernels->convolve(c->src + t * c->src_width + c->src_first, c->weight, c->bias, c->length, c->width,
                               channels.begin, channels.end, c->silu, state_of(run, t, c->slot), c->out + t * c->width);
}

static void scan_channels(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_scan *s = &op->u.scan;
    const range channels = share_of(worker, s->heads, PI_TILE);
    if (channels.begin >= channels.end) return;
    for (int64_t t = 0; t < run->tokens; t++)
        run->kernels->scan_channels(s->x + t * s->x_width, s->step + t * s->heads, s->decay,
                                    s->in + t * s->in_width + s->in_first, s->in + t * s->in_width + s->read_first,
                                    s->direct, s->size, s->heads, channels.begin, channels.end,
                                    state_of(run, t, s->slot), s->out + t * s->heads);
}

static void scan_heads(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_scan *s = &op->u.scan;
    const range heads = share_of(worker, s->heads, 1);
    const int64_t shared = s->heads / s->groups;
    for (int64_t t = 0; t < run->tokens; t++)
        for (int64_t h = heads.begin; h < heads.end; h++) {
            const int64_t vector = t * s->in_width + h / shared * s->size;
            run->kernels->scan_head(s->x + t * s->x_width + h * s->head_dim, s->step[t * s->heads + h], s->decay[h],
                                    s->in + vector + s->in_first, s->in + vector + s->read_first, s->direct[h], s->size,
                                    s->head_dim, state_of(run, t, s->slot) + h * s->size * s->head_dim,
                                    s->out + (t * s->heads + h) * s->head_dim);
        }
}

static void delta_net(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_delta_net *d = &op->u.delta_net;
    const range heads = share_of(worker, d->heads, 1);
    const int64_t repeats = d->heads / d->key_heads;
    for (int64_t t = 0; t < run->tokens; t++)
        for (int64_t h = heads.begin; h < heads.end; h++) {
            const int64_t key_head = d->interleaved ? h / repeats : h % d->key_heads;
            const float *qk = d->qk + t * 2 * d->key_heads * d->size + key_head * d->size;
            run->kernels->delta_head(
                qk, qk + d->key_heads * d->size, d->v + t * d->v_width + d->v_first + h * d->head_dim,
                d->decay + (t * d->heads + h) * d->decays, d->decays, d->rate[t * d->heads + h], d->scale, d->size,
                d->head_dim, state_of(run, t, d->slot) + h * d->size * d->head_dim,
                d->out + (t * d->heads + h) * d->head_dim);
        }
}

static void general_delta(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_general_delta *d = &op->u.general_delta;
    const range heads = share_of(worker, d->heads, 1);
    for (int64_t t = 0; t < run->tokens; t++)
        for (int64_t h = heads.begin; h < heads.end; h++) {
            const int64_t key = (t * d->heads + h) * d->size, value = (t * d->heads + h) * d->head_dim;
            run->kernels->general_delta_head(d->q + key, d->k + key, d->v + value, d->decay + key, d->unit + key,
                                             d->rate + key, d->size, d->head_dim,
                                             state_of(run, t, d->slot) + h * d->size * d->head_dim, d->out + value);
        }
}

void pi_recurrent_execute(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    switch (op->kind) {
    case PI_OP_CONVOLVE: convolve(op, run, worker); break;
    case PI_OP_SCAN_CHANNELS: scan_channels(op, run, worker); break;
    case PI_OP_SCAN_HEADS: scan_heads(op, run, worker); break;
    case PI_OP_GENERAL_DELTA: general_delta(op, run, worker); break;
    default: delta_net(op, run, worker); break;
    }
}

int64_t pi_recurrent_count(const pi_op *op) {
    switch (op->kind) {
    case PI_OP_CONVOLVE: return (op->u.convolve.length - 1) * op->u.convolve.width;
    case PI_OP_DELTA_NET: return op->u.delta_net.heads * op->u.delta_net.size * op->u.delta_net.head_dim;
    case PI_OP_GENERAL_DELTA:
        return op->u.general_delta.heads * op->u.general_delta.size * op->u.general_delta.head_dim;
    default: return op->u.scan.heads * op->u.scan.size * op->u.scan.head_dim;
    }
}
