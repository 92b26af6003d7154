/* bundle_sum.h: how sum rows are added up, for one token and for many.
 *
 * Neurons are summed in chunks of PI_CHUNK by index. Within a chunk the coefficients h·d of each block (Q6_K: of 16
 * columns) are rounded to 16 bits with a scale of their own, S = max|h·d| / 32767, so that the sum over neurons is one
 * of integers, exact in any order; then  y = fma(S, Σ q·code, y)  once per chunk, chunks in ascending order. Minima are
 * coefficients of a constant column and are rounded in the same way. The rounding of a coefficient is at most S / 2,
 * 1.5e-5 of the chunk's largest; that of activations, for comparison, 4e-3.
 *
 * A word of 16 bits holds the codes of several columns, w = Σ code_n 2^(step n). They need not be taken apart: with
 * T_n = Σ q·(w >> step n), where a shift keeps the sign, Σ q·code_n is T_n - 2^step T_(n+1), and the last one T_n. All
 * of that may wrap around in 32 bits, since the sum of a column's codes fits: at most 512 · 32767 · 127.
 *
 * Float rows: fused multiply-adds in ascending order of neurons, one partial sum per chunk, added up in order.
 */
#ifndef PI_BUNDLE_SUM_H
#define PI_BUNDLE_SUM_H

#include "bundle.h"
#include "matmul_blocks.h"

enum {
    PAIRS = PI_CHUNK / 2, /* neurons are summed two at a time */
    PASS = 4,             /* pairs whose rows are added between a load and a store of a partial sum */
    HALF_LINE = 64,       /* columns of one step: four vectors */
    SCALES = 16,          /* units whose scales are read together */
};

/* Columns that share a coefficient. */
PI_INLINE int unit_columns(int type) { return pi_has_halves(type) ? 16 : PI_BLOCK; }

#define PI_TINY_SCALE 1e-30f /* below it, coefficients become zero: nothing divides by zero */

/* Scales of units [unit, unit + 16), unit a multiple of 16; what lies past the row's last unit is any number. */
PI_INLINE v16f scales_at(int type, const uint8_t *row, const pi_planar *p, int64_t unit) {
    const uint8_t *bytes = row + p->scales[0] + unit;
    if (type == PI_MXFP4) return pi_half_e8m0s(v16i_from_u8(bytes));
    if (type == PI_FLOAT8_16) return pi_half_e4m3s(v16i_from_u8(bytes));
    if (type == PI_TABLE_32) {
        const v16f both = v16f_halves(pi_read_f32(row + unit / 2), pi_read_f32(row + unit / 2 + 4));
        return v16f_mul(both, v16f_from_i32(v16i_from_i8((const int8_t *)bytes)));
    }
    if (pi_has_f32(type)) {
        const v16i scale =
            type == PI_MINIMUM_16 ? v16i_and(v16i_from_u8(bytes), v16i_set1(15)) : v16i_from_i8((const int8_t *)bytes);
        return v16f_mul(v16f_set1(pi_read_f32(row + unit / 4)), v16f_from_i32(scale));
    }
    if (!pi_is_super(type)) return v16f_load_f16((const uint16_t *)(const void *)row + unit);
    const uint16_t *d = (const uint16_t *)(const void *)row;
    if (type == PI_Q6_K)
        return v16f_mul(v16f_set1_f16(d[unit / 16]),
                        v16f_from_i32(v16i_from_i8((const int8_t *)row + p->scales[0] + unit)));
    const v16f both = v16f_halves_f16(d[unit / 8], d[unit / 8 + 1]);
    return v16f_mul(both, v16f_from_i32(v16i_from_u8(row + p->scales[0] + unit)));
}

PI_INLINE v16f minima_at(int type, const uint8_t *row, const pi_planar *p, int64_t unit) {
    if (type == PI_MINIMUM_16) {
        const v16i minimum = v16i_srli(v16i_from_u8(row + p->scales[0] + unit), 4);
        return v16f_mul(v16f_set1(-pi_read_f32(row + p->minimum + unit / 4)), v16f_from_i32(minimum));
    }
    const uint16_t *m = (const uint16_t *)(const void *)(row + p->minimum);
    if (!pi_is_super(type)) return v16f_load_f16(m + unit);
    const v16f both = v16f_neg(v16f_halves_f16(m[unit / 8], m[unit / 8 + 1]));
    return v16f_mul(both, v16f_from_i32(v16i_from_u8(row + p->scales[1] + unit)));
}

/* What rounds the coefficients of 16 units: q = round(v · inverse), v ≈ q · scale. NaN and infinity in h make the
 * scale NaN, so that they show in the sum. */
typedef struct {
    v16f inverse, scale;
} rounding;

PI_INLINE rounding rounding_of(v16f largest, int finite) {
    const v16f top = v16f_max(v16f_set1(PI_TINY_SCALE), largest), most = v16f_set1(32767.0f);
    return (rounding){v16f_div(most, top), finite ? v16f_div(top, most) : v16f_set1(NAN)};
}

PI_INLINE v16i round_to(v16f v, const rounding *r) { return v16i_from_f32_rne(v16f_mul(v, r->inverse)); }

/* What pair_codes takes: signed bytes. */
PI_INLINE v64b sum_table(int type, const pi_rows *r) {
    return pi_has_table(type) ? v64b_repeat16(r->table) : v64b_set1(0);
}

/* The j-th high bits of a plane's words, in bits 4.. of their bytes; k: of vectors 2k and 2k + 1. */
PI_INLINE v16i high_bits(int width, v16i bits, int j, int k) {
    const int left = 4 - width * (2 * j + k);
    const v16i moved = left < 0 ? v16i_srli(bits, -left) : v16i_slli(bits, left);
    return v16i_and(moved, v16i_set1(((1 << width) - 1) * 0x10101010));
}

/* The four vectors of one half of a line of two rows: words of a in the low halves of lanes, of b in the high ones.
 * Above the code of its vector, a word has those of following ones. */
PI_INLINE void pair_words(int type, const uint8_t *a, const uint8_t *b, const pi_planar *p, v64b table, int64_t line,
                          int upper, v16i out[4]) {
#define PI_WORDS(at, upper)                                                      \
    (upper ? v16i_zip_high(v16i_load((const int32_t *)(const void *)(a + (at))), \
                           v16i_load((const int32_t *)(const void *)(b + (at)))) \
           : v16i_zip_low(v16i_load((const int32_t *)(const void *)(a + (at))),  \
                          v16i_load((const int32_t *)(const void *)(b + (at)))))
    if (type == PI_Q8_0) {
        out[0] = PI_WORDS(p->codes + 128 * line + 64 * upper, 0);
        out[2] = PI_WORDS(p->codes + 128 * line + 64 * upper, 1);
    } else {
        out[0] = PI_WORDS(p->codes + 64 * line, upper);
    }
    if (pi_sum_step(type) == 4) {
        PI_UNROLL for (int n = 1; n < 4; n++) out[n] = v16i_sra16(out[0], 4 * n);
        return;
    }
    if (type != PI_Q8_0) {
        const v64b nibbles = v16i_as_bytes(out[0]);
        out[0] = v64b_as_i32(v64b_and(nibbles, v64b_set1(15)));
        out[2] = v64b_as_i32(v64b_srl4(nibbles));
    }
    if (pi_has_plane(type)) {
        const int lines = pi_lines_of_plane(type), half = 2 * (int)(line % lines) + upper;
        const v16i bits = PI_WORDS(p->high + 64 * (line / lines), half >= lines);
        PI_UNROLL for (int k = 0; k < 2; k++) out[2 * k] =
            v16i_or(out[2 * k], high_bits(pi_code_bits(type) - 4, bits, half % lines, k));
    }
    if (pi_has_table(type))
        PI_UNROLL for (int k = 0; k < 2; k++) out[2 * k] =
            v16i_xor(v64b_as_i32(v64b_lookup(table, v16i_as_bytes(out[2 * k]))), v16i_set1(0x00800080));
    out[1] = v16i_sra16(out[0], 8);
    out[3] = v16i_sra16(out[2], 8);
#undef PI_WORDS
}

/* The numbers of the units of a half-line, in the lanes of their columns. */
PI_INLINE v16i in_lanes(int type, const int32_t *of_units) {
    return unit_columns(type) == 16 ? v64b_as_i32(v64b_repeat16(of_units)) : v16i_repeat2(of_units);
}

/* What is subtracted from the codes of vector n. */
PI_INLINE int sum_offset(int type, int n) {
    if (type == PI_Q8_0 || pi_has_table(type)) return n % 2 == 0 ? 128 : 0;
    return pi_layout_of(type).offset - (pi_sum_step(type) == 4 && n == 3 ? 8 : 0);
}

/* From the T of a half-line's vectors, Σ q·(code - offset) of its 64 columns in their order. `total`: Σ q of units. */
PI_INLINE void finish_half(int type, const int32_t *total, v16i sum[4]) {
    const int step = pi_sum_step(type), apart = unit_columns(type) == 16;
    const v16i totals = in_lanes(type, total);
    PI_UNROLL for (int n = 0; n < 4; n++) {
        const int is_last = step == 8 ? n % 2 == 1 : n == 3, offset = sum_offset(type, n);
        if (!is_last) sum[n] = v16i_sub(sum[n], v16i_slli(sum[n + 1], step));
        if (offset) sum[n] = v16i_sub(sum[n], v16i_mul(totals, v16i_set1(offset)));
    }
    const v16i evens[2] = {v16i_evens(sum[0], sum[1]), v16i_evens(sum[2], sum[3])};
    const v16i odds[2] = {v16i_odds(sum[0], sum[1]), v16i_odds(sum[2], sum[3])};
    sum[0] = apart ? v16i_evens(evens[0], evens[1]) : evens[0];
    sum[1] = apart ? v16i_evens(odds[0], odds[1]) : evens[1];
    sum[2] = apart ? v16i_odds(evens[0], evens[1]) : odds[0];
    sum[3] = apart ? v16i_odds(odds[0], odds[1]) : odds[1];
}

PI_INLINE v16f weights_at(int type, const uint8_t *row, int64_t column) {
    if (type == PI_F32) return v16f_load((const float *)(const void *)row + column);
    const uint16_t *p = (const uint16_t *)(const void *)row + column;
    return type == PI_F16 ? v16f_load_f16(p) : v16f_load_bf16(p);
}

PI_INLINE float weight_at(int type, const uint8_t *row, int64_t column) {
    if (type == PI_F32) return pi_f32_of_bits(pi_read_u32(row + 4 * column));
    const uint16_t half = pi_read_u16(row + 2 * column);
    return type == PI_F16 ? pi_f16_to_f32(half) : pi_bf16_to_f32(half);
}

#endif
