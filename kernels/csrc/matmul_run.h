/* matmul_run.h: blocks of 16 rows, unpacked once, times the activations of several tokens.
 *
 * Per (row, token) there is one f32 accumulator, and it sees the blocks in column order:
 *   acc = fma(scale·dx, Σ(code - offset)·x, acc),  with a minimum then  acc = fma(minimum, dx·Σx, acc)
 * With a scale for each half of a block, both sums are what reference_quants.py says.
 * Everything that multiplies quantised rows with activations keeps this order, and so has the same bits.
 */
#ifndef PI_MATMUL_RUN_H
#define PI_MATMUL_RUN_H

#include "matmul_blocks.h"

enum {
    RUN = 8,                                 /* blocks unpacked at a time: 4 KiB of codes stay in L1 */
    TOKEN_GROUP = 64,                        /* tokens that use an unpacked run before the next is unpacked */
    TOKEN_STEP = PI_REGISTERS == 32 ? 8 : 4, /* tokens whose sums are in registers together */
    FEW_STEP = PI_REGISTERS == 32 ? 4 : 2,   /* the same beside the codes that are being unpacked */
    FEW_TOKENS = 8,                          /* tokens up to which nothing unpacked is stored */
};

typedef struct { /* what one call computes */
    int64_t rows;
    const int8_t *q;
    const float *d, *s;
    int64_t columns, blocks; /* of the activations: columns, and blocks of 32 */
    const float *bias;
    int accumulate;
    float *out;
    int64_t out_stride;
} job;

PI_INLINE void store_rows(const job *w, int64_t tile, int64_t token, v16f acc) {
    const int64_t first = tile * PI_TILE, left = w->rows - first;
    const int n = left < PI_TILE ? (int)left : PI_TILE;
    float *out = w->out + token * w->out_stride + first;
    if (w->bias) acc = v16f_add(acc, v16f_load_n(w->bias + first, n));
    if (w->accumulate) acc = v16f_add(v16f_load_n(out, n), acc);
    v16f_store_n(out, acc, n);
}

/* `weight`: what the minimum is multiplied by, dx·Σx. */
PI_INLINE v16f add_block(int type, const pi_scales *at, v16f sum, float d, v16f weight, v16f acc) {
    acc = v16f_fma(v16f_mul(at->scale, v16f_set1(d)), sum, acc);
    return pi_has_minima(type) ? v16f_fma(at->minimum, weight, acc) : acc;
}

PI_INLINE v16f minimum_weight(int type, const pi_scales *at, const int8_t *x, float d, float s) {
    return pi_has_minima(type) ? v16f_mul(v16f_set1(d), pi_minimum_sum(type, at, x, s)) : v16f_zero();
}

typedef struct { /* a run of blocks of one tile, unpacked */
    _Alignas(64) uint8_t codes[RUN][512];
    pi_scales at[RUN];
} run;

/* `count` tokens (a constant) from `token` on, over an unpacked run that starts at block `first`. */
PI_INLINE void step_tokens(int type, int count, const job *w, const run *r, int64_t first, int blocks, int64_t token,
                           v16f *acc) {
    const int8_t *q = w->q + token * w->columns + first * PI_BLOCK;
    const float *d = w->d + token * w->blocks + first, *s = w->s + token * w->blocks + first;
    const int at_once = pi_has_minima(type) && !pi_has_halves(type); /* the weights of all blocks in one product */
    _Alignas(64) float weights[TOKEN_STEP][PI_TILE];
    if (at_once)
        PI_UNROLL for (int t = 0; t < count; t++) v16f_store(
            weights[t], v16f_mul(v16f_load_n(d + t * w->blocks, blocks), v16f_load_n(s + t * w->blocks, blocks)));
    for (int i = 0; i < blocks; i++) {
        v16f sum[TOKEN_STEP];
        pi_dot_codes(type, count, r->codes[i], q + i * PI_BLOCK, w->columns, s + i, w->blocks, r->at[i].sub, sum);
        PI_UNROLL for (int t = 0; t < count; t++) {
            const int8_t *x = q + t * w->columns + i * PI_BLOCK;
            const float dx = d[t * w->blocks + i];
            const v16f weight =
                at_once ? v16f_set1(weights[t][i]) : minimum_weight(type, &r->at[i], x, dx, s[t * w->blocks + i]);
            acc[t] = add_block(type, &r->at[i], sum[t], dx, weight, acc[t]);
        }
    }
}

/* The same of any number of tokens. */
PI_INLINE void all_tokens(int type, const job *w, const run *r, int64_t first, int blocks, int64_t token, int n,
                          v16f *acc) {
    int t = 0;
    for (; t + TOKEN_STEP <= n; t += TOKEN_STEP) step_tokens(type, TOKEN_STEP, w, r, first, blocks, token + t, acc + t);
    for (; n - t >= 2; t += 2) step_tokens(type, 2, w, r, first, blocks, token + t, acc + t);
    if (t < n) step_tokens(type, 1, w, r, first, blocks, token + t, acc + t);
}

#endif
