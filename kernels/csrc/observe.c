/* Profiling: what every neuron of one FFN contributed, for a batch of tokens. Counts and histograms are integers, so
 * they add up to the same whatever the order of tokens; sums of squares are doubles added token by token. */
#include "program.h"

/* AHEAD: a token's values lie a whole row after those of the token before, farther than the hardware fetches ahead. */
enum { CHUNK = 64, AHEAD = 6 };

/* The factors of neurons without gate. */
static const float ones[CHUNK] = {
#define PI_ONES 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1
    PI_ONES,
    PI_ONES,
    PI_ONES,
    PI_ONES,
#undef PI_ONES
};

/* The activation that makes a neuron's factor of up; -1 where up itself is. */
static int32_t kind_of_factor(const pi_observe *o) {
    switch (o->kind) {
    case PI_DRELU: return PI_RELU;
    case PI_SWIGLU_OAI: return o->up ? PI_OAI_UP : -1;
    case PI_SWIGLU_CLAMPED:
    case PI_CLAMPED_SILU: return o->up ? PI_CLAMPED_UP : -1;
    default: return -1;
    }
}

static void observe_chunk(const pi_observe *o, const pi_kernels *kernels, int64_t token, int64_t first, int64_t count) {
    float act[CHUNK], factor[CHUNK];
    int32_t bins[CHUNK];
    const float *up = o->up ? o->up + token * o->width + first : ones;
    const int32_t on_up = kind_of_factor(o);
    kernels->activate(o->kind, o->cut, o->gate + token * o->width + first, NULL, count, act);
    if (on_up >= 0) kernels->activate(on_up, o->cut, up, NULL, count, factor);
    const float *factors = on_up >= 0 ? factor : up;
    kernels->observe(act, factors, count, o->counts + first, o->gate_squares + first, o->up_squares + first,
                     o->histogram ? bins : NULL);
    for (int64_t i = 0; i < count && o->histogram; i++) o->histogram[(first + i) * PI_BINS + bins[i]]++;
}

static void prefetch_chunk(const pi_observe *o, int64_t token, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(float)) {
        __builtin_prefetch(o->gate + token * o->width + first + i, 0, 3);
        if (o->up) __builtin_prefetch(o->up + token * o->width + first + i, 0, 3);
    }
}

/* Each thread takes whole chunks of neurons over all tokens, so nothing is written by two threads. */
void pi_observe_execute(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_observe *o = &op->u.observe;
    int64_t chunks = (o->width + CHUNK - 1) / CHUNK, thread = pi_worker_thread(worker);
    int64_t threads = pi_worker_threads(worker);
    for (int64_t chunk = chunks * thread / threads; chunk < chunks * (thread + 1) / threads; chunk++) {
        int64_t first = chunk * CHUNK, count = o->width - first < CHUNK ? o->width - first : CHUNK;
        for (int64_t token = 0; token < run->tokens; token++) {
            if (token + AHEAD < run->tokens) prefetch_chunk(o, token + AHEAD, first, count);
            observe_chunk(o, run->kernels, token, first, count);
        }
    }
}
