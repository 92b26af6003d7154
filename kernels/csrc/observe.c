/* Profiling: what every neuron of one FFN contributed, for a batch of tokens. Counts and histograms are integers, so
 * they add up to the same whatever the order of tokens; sums of squares are doubles added token by token. */
#include "program.h"

#include <math.h>
#include <string.h>

enum { CHUNK = 64 };

/* Four bins to an octave from 2^-16 to 2^16: the top bits of the float. Zero and everything smaller: bin 0. NaN and
 * everything larger: the last bin. */
static int bin_of(float contribution) {
    uint32_t bits;
    memcpy(&bits, &contribution, sizeof bits);
    int64_t bin = (int64_t)(bits >> 21) - ((127 - 16) << 2);
    return bin < 0 ? 0 : bin >= PI_BINS ? PI_BINS - 1 : (int)bin;
}

/* The factors of neurons without gate. */
static const float ones[CHUNK] = {
#define PI_ONES 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1
    PI_ONES,
    PI_ONES,
    PI_ONES,
    PI_ONES,
#undef PI_ONES
};

static void observe_chunk(const pi_observe *o, const pi_kernels *kernels, int64_t token, int64_t first, int64_t count) {
    float act[CHUNK], factor[CHUNK];
    const float *up = o->up ? o->up + token * o->width + first : ones;
    int32_t on_up = o->kind == PI_DRELU ? PI_RELU : o->kind == PI_SWIGLU_OAI && o->up ? PI_OAI_UP : -1;
    kernels->activate(o->kind, o->cut, o->gate + token * o->width + first, NULL, count, act);
    if (on_up >= 0) kernels->activate(on_up, o->cut, up, NULL, count, factor);
    const float *factors = on_up >= 0 ? factor : up;
    for (int64_t i = 0; i < count; i++) {
        int64_t neuron = first + i;
        float contribution = fabsf(act[i] * factors[i]);
        if (o->histogram) o->histogram[neuron * PI_BINS + bin_of(contribution)]++;
        o->counts[neuron] += act[i] != 0.0f && factors[i] != 0.0f;
        o->gate_squares[neuron] += (double)act[i] * act[i];
        o->up_squares[neuron] += (double)factors[i] * factors[i];
    }
}

/* Each thread takes whole chunks of neurons over all tokens, so nothing is written by two threads. */
void pi_observe_execute(const pi_op *op, pi_run *run, pi_worker *worker) {
    const pi_observe *o = &op->u.observe;
    int64_t chunks = (o->width + CHUNK - 1) / CHUNK, thread = pi_worker_thread(worker);
    int64_t threads = pi_worker_threads(worker);
    for (int64_t chunk = chunks * thread / threads; chunk < chunks * (thread + 1) / threads; chunk++) {
        int64_t first = chunk * CHUNK, count = o->width - first < CHUNK ? o->width - first : CHUNK;
        for (int64_t token = 0; token < run->tokens; token++) observe_chunk(o, run->kernels, token, first, count);
    }
}
