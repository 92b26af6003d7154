/* matmul_float.h: tiles of F32, F16 and BF16 (one column after the other, 16 rows each) times f32 activations.
 *
 * Per (row, token): four accumulators, column c goes to number c mod 4, result (a0 + a1) + (a2 + a3).
 */
#ifndef PI_MATMUL_FLOAT_H
#define PI_MATMUL_FLOAT_H

#include "rows_decode.h"
#include "simd.h"

enum {
    PI_FLOAT_STEP = 4, /* tokens that share a loaded column */
    PI_FLOAT_RUN = 128 /* columns that stay in L1 while each of the four accumulators takes its own */
};

PI_INLINE v16f pi_float_column(int type, const uint8_t *tile, int64_t column) {
    if (type == PI_F32) return v16f_load((const float *)tile + 16 * column);
    const uint16_t *p = (const uint16_t *)tile + 16 * column;
    return type == PI_F16 ? v16f_load_f16(p) : v16f_load_bf16(p);
}

PI_INLINE v16f pi_float_one(int type, const uint8_t *tile, const float *x, int64_t columns) {
    v16f acc[4] = {v16f_zero(), v16f_zero(), v16f_zero(), v16f_zero()};
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
        const int ahead = type == PI_F32 ? 4 : 2; /* lines of 64 bytes in four columns */
        for (int line = 0; line < ahead; line++) {
            pi_prefetch_l2(tile + (type == PI_F32 ? 64 : 32) * c + PI_FAR_AHEAD + 64 * line);
            pi_prefetch(tile + (type == PI_F32 ? 64 : 32) * c + PI_NEAR_AHEAD + 64 * line);
        }
        for (int i = 0; i < 4; i++) acc[i] = v16f_fma(pi_float_column(type, tile, c + i), v16f_set1(x[c + i]), acc[i]);
    }
    for (int i = 0; c + i < columns; i++)
        acc[i] = v16f_fma(pi_float_column(type, tile, c + i), v16f_set1(x[c + i]), acc[i]);
    return v16f_add(v16f_add(acc[0], acc[1]), v16f_add(acc[2], acc[3]));
}

/* With several tokens one accumulator of each is at work at a time: four of each would not fit the registers. */
PI_INLINE void pi_float_many(int type, const uint8_t *tile, const float *x, int64_t columns, v16f *out) {
    v16f acc[4][PI_FLOAT_STEP];
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < PI_FLOAT_STEP; t++) acc[i][t] = v16f_zero();
    for (int64_t run = 0; run < columns; run += PI_FLOAT_RUN) {
        const int64_t end = run + PI_FLOAT_RUN < columns ? run + PI_FLOAT_RUN : columns;
        for (int i = 0; i < 4; i++) {
            v16f a0 = acc[i][0], a1 = acc[i][1], a2 = acc[i][2], a3 = acc[i][3];
            for (int64_t c = run + i; c < end; c += 4) {
                const v16f w = pi_float_column(type, tile, c);
                a0 = v16f_fma(w, v16f_set1(x[c]), a0);
                a1 = v16f_fma(w, v16f_set1(x[columns + c]), a1);
                a2 = v16f_fma(w, v16f_set1(x[2 * columns + c]), a2);
                a3 = v16f_fma(w, v16f_set1(x[3 * columns + c]), a3);
            }
            acc[i][0] = a0, acc[i][1] = a1, acc[i][2] = a2, acc[i][3] = a3;
        }
    }
    for (int t = 0; t < PI_FLOAT_STEP; t++)
        out[t] = v16f_add(v16f_add(acc[0][t], acc[1][t]), v16f_add(acc[2][t], acc[3][t]));
}

PI_INLINE void pi_float_type(int type, int count, const uint8_t *tile, const float *x, int64_t columns, v16f *out) {
    if (count == 1)
        out[0] = pi_float_one(type, tile, x, columns);
    else
        pi_float_many(type, tile, x, columns, out);
}

/* `count` is 1 or PI_FLOAT_STEP tokens, whose activations are `columns` floats apart. */
static void pi_float_tile(int32_t type, int count, const uint8_t *tile, const float *x, int64_t columns, v16f *out) {
    if (type == PI_F32)
        pi_float_type(PI_F32, count, tile, x, columns, out);
    else if (type == PI_F16)
        pi_float_type(PI_F16, count, tile, x, columns, out);
    else
        pi_float_type(PI_BF16, count, tile, x, columns, out);
}

#endif
