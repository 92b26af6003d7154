/* bundle_sum.h: how sum rows are added up, for one token and for many.
 *
 * Neurons are summed in chunks of PI_CHUNK by index. Within a chunk the coefficients h·d of each block (Q6_K: of 16
 * columns) are rounded to 16 bits with a scale of their own, S = max|h·d| / 32767, so that the sum over neurons is one
 * of integers, exact in any order; then  y = fma(S, Σ q·code, y)  once per chunk, chunks in ascending order. Minima are
 * coefficients of a constant column and are rounded in the same way. The rounding of a coefficient is at most S / 2,
 * 1.5e-5 of the chunk's largest; that of activations, for comparison, 4e-3.
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

/* Four vectors of 16 columns of one half of a line of two rows: the codes of a in the low words, of b in the high. */
PI_INLINE void pair_codes(int type, const uint8_t *a, const uint8_t *b, const pi_planar *p, v64b table, int64_t line,
                          int upper, v16i out[4]) {
#define PI_WORDS(at, upper)                                                        \
    (upper ? v16i_high_words(v16i_load((const int32_t *)(const void *)(a + (at))), \
                             v16i_load((const int32_t *)(const void *)(b + (at)))) \
           : v16i_low_words(v16i_load((const int32_t *)(const void *)(a + (at))),  \
                            v16i_load((const int32_t *)(const void *)(b + (at)))))
    if (type == PI_Q8_0) {
        const int64_t at = p->codes + 128 * line + 64 * upper;
        const v16i low = PI_WORDS(at, 0), high = PI_WORDS(at, 1);
        out[0] = v16i_low_bytes(low);
        out[1] = v16i_high_bytes(low);
        out[2] = v16i_low_bytes(high);
        out[3] = v16i_high_bytes(high);
        return;
    }
    const int width = pi_code_bits(type) - 4;
    const v16i codes = PI_WORDS(p->codes + 64 * line, upper);
    if (pi_has_table(type)) { /* nibbles 0 and 2 of a word are its bytes' low ones */
        const v64b nibbles = v16i_as_bytes(codes);
        const v16i low = v64b_as_i32(v64b_lookup(table, v64b_and(nibbles, v64b_set1(15))));
        const v16i high = v64b_as_i32(v64b_lookup(table, v64b_srl4(nibbles)));
        out[0] = v16i_low_bytes(low);
        out[1] = v16i_low_bytes(high);
        out[2] = v16i_high_bytes(low);
        out[3] = v16i_high_bytes(high);
        return;
    }
    PI_UNROLL for (int n = 0; n < 4; n++) out[n] = v16i_and(v16i_srli(codes, 4 * n), v16i_set1(0x000f000f));
    if (width == 0) return;
    const int group = pi_lines_of_plane(type), s = (int)(line % group);
    const int first = width * (8 * s + 4 * upper); /* bit of vector 0, in the dword */
    const v16i bits = PI_WORDS(p->high + 64 * (line / group), first >= 16);
    PI_UNROLL for (int n = 0; n < 4; n++) {
        const v16i high = v16i_and(v16i_srli(bits, first % 16 + width * n), v16i_set1(((1 << width) - 1) * 0x10001));
        out[n] = v16i_or(out[n], v16i_slli(high, 4));
    }
#undef PI_WORDS
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
