/* matmul_blocks.h: one 32-column block of an interleaved tile (layout: quantize_pack.c) times quantised activations.
 *
 * `type` is a constant wherever these are inlined, so each row type gets its own straight-line code.
 */
#ifndef PI_MATMUL_BLOCKS_H
#define PI_MATMUL_BLOCKS_H

#include "rows_decode.h"
#include "simd.h"

/* What a block's codes are worth. `sub`, for types with a scale for each half: integers that multiply the halves' sums
 * (MINIMUM_16: scales in the low nibbles, minima in the high ones; FLOAT8_16: the bits of floats). */
typedef struct {
    v16f scale, minimum;
    v16i sub[2];
} pi_scales;

PI_INLINE int pi_planes(int type) {
    return type == PI_Q6_K ? 2 : type == PI_Q5_0 || type == PI_Q5_1 || type == PI_Q5_K;
}
PI_INLINE int pi_largest_code(int type) { return type == PI_Q6_K ? 63 : pi_planes(type) ? 31 : 15; }
PI_INLINE int pi_code_bytes(int type) { return type == PI_Q8_0 ? 512 : 256 + 64 * pi_planes(type); }

/* Whether the sum over a block of 32 columns fits an accumulator (see v16p_dot_us); that over 16 columns always does. */
PI_INLINE int pi_fits_one_sum(int type) { return PI_DOT_US_WIDE || pi_is_bytes(type) || pi_largest_code(type) <= 15; }

/* Where the planes and lines of block `sub` start in the stored block at p. */
PI_INLINE const uint8_t *pi_tile_codes_at(int type, const uint8_t *p, int sub) {
    const int header = pi_layout_of(type).tile_bytes - pi_subs(type) * pi_code_bytes(type);
    return p + header + sub * pi_code_bytes(type);
}

/* Scales that are stored in a byte: pi_half_e8m0 and pi_half_e4m3 of 16 numbers. */
PI_INLINE v16f pi_half_e8m0s(v16i e) {
    const v16i small = v16i_slli(v16i_add(e, v16i_set1(1)), 21); /* 2^-128 and 2^-127 are subnormal */
    return v16i_as_f32(v16i_max(v16i_slli(v16i_sub(e, v16i_set1(1)), 23), small));
}
PI_INLINE v16f pi_half_e4m3s(v16i b) { return v16f_mul(v16i_as_f32(v16i_slli(b, 20)), v16f_set1(0x1p119f)); }

/* From d and m (or dmin) of 16 rows; `packed`: 16 scales and 16 minima of the block, or the 2 × 16 of halves, or 16
 * scales alone. */
PI_INLINE pi_scales pi_scales_of(int type, v16f d, v16f m, const uint8_t *packed) {
    pi_scales at = {d, m, {v16i_zero(), v16i_zero()}};
    if (type == PI_MXFP4) at.scale = pi_half_e8m0s(v16i_from_u8(packed));
    if (type == PI_TABLE_32) at.scale = v16f_mul(d, v16f_from_i32(v16i_from_i8((const int8_t *)packed)));
    if (type == PI_FLOAT8_16)
        for (int half = 0; half < 2; half++)
            at.sub[half] = v16f_as_i32(pi_half_e4m3s(v16i_from_u8(packed + 16 * half)));
    if (type == PI_MINIMUM_16)
        for (int half = 0; half < 2; half++) at.sub[half] = v16i_from_u8(packed + 16 * half);
    if (type == PI_Q4_K || type == PI_Q5_K) {
        at.scale = v16f_mul(d, v16f_from_i32(v16i_from_u8(packed)));
        at.minimum = v16f_mul(v16f_neg(m), v16f_from_i32(v16i_from_u8(packed + 16)));
    }
    if (type == PI_Q6_K || type == PI_SIGNED_16 || type == PI_TABLE_16) {
        at.sub[0] = v16i_from_i8((const int8_t *)packed);
        at.sub[1] = v16i_from_i8((const int8_t *)packed + 16);
    }
    return at;
}

PI_INLINE pi_scales pi_tile_scales(int type, const uint8_t *p, int sub) {
    if (type == PI_MXFP4 || type == PI_FLOAT8_16) return pi_scales_of(type, v16f_set1(1.0f), v16f_zero(), p);
    if (pi_has_f32(type)) {
        const int dmin = type == PI_MINIMUM_16;
        const v16f d = v16f_load((const float *)(const void *)p);
        const v16f m = dmin ? v16f_neg(v16f_load((const float *)(const void *)(p + 64))) : v16f_zero();
        return pi_scales_of(type, d, m, p + (dmin ? 128 : 64) + (pi_has_halves(type) ? 32 : 16) * sub);
    }
    const v16f d = v16f_load_f16((const uint16_t *)p);
    const v16f m = pi_has_minimum(type) ? v16f_load_f16((const uint16_t *)(p + 32)) : v16f_zero();
    return pi_scales_of(type, d, m, p + (type == PI_Q6_K ? 32 : 64) + 32 * sub);
}

/* `width` bits that start at bit `from` of every byte, moved to bit 4. */
PI_INLINE v64b pi_high_bits(v64b plane, int from, int width) {
    const v64b mask = v64b_set1((uint8_t)(((1 << width) - 1) << 4));
    if (from < 4) return v64b_and(v64b_sll16(plane, 4 - from), mask);
    if (from > 4) return v64b_and(v64b_srl16(plane, from - 4), mask);
    return v64b_and(plane, mask);
}

/* Byte codes are unsigned where the multipliers take any unsigned byte: w + PI_BYTE_OFFSET. */
#if PI_DOT_US_WIDE
enum { PI_BYTE_OFFSET = 128 };
PI_INLINE v64b pi_byte_code(v64b w) { return v64b_xor(w, v64b_set1(PI_BYTE_OFFSET)); }
PI_INLINE v16i pi_dot_bytes(v16i acc, v64b code, v64b x) { return v16i_dot_us(acc, code, x); }
#else
enum { PI_BYTE_OFFSET = 0 };
PI_INLINE v64b pi_byte_code(v64b w) { return w; }
PI_INLINE v16i pi_dot_bytes(v16i acc, v64b code, v64b x) { return v16i_dot_ss(acc, code, x); }
#endif

/* The table that pi_quads_of takes: of byte codes. */
PI_INLINE v64b pi_code_table(int type, const int8_t *table) {
    return pi_has_table(type) ? pi_byte_code(v64b_repeat16(table)) : v64b_set1(0);
}

/* The codes of quads j and j + 4 (columns 4j.. and 16 + 4j..) of 16 lanes from their lines (4-bit codes: one) and
 * planes of high bits; byte codes where the type has bytes. */
PI_INLINE void pi_quads_of(int type, v64b table, const v64b line[2], const v64b plane[2], int j, v64b *low,
                           v64b *high) {
    if (type == PI_Q8_0) {
        *low = pi_byte_code(line[0]);
        *high = pi_byte_code(line[1]);
        return;
    }
    *low = v64b_and(line[0], v64b_set1(15));
    *high = v64b_srl4(line[0]);
    if (pi_has_table(type)) {
        *low = v64b_lookup(table, *low);
        *high = v64b_lookup(table, *high);
    }
    if (pi_planes(type) == 1) {
        *low = v64b_or(*low, pi_high_bits(plane[0], j, 1));
        *high = v64b_or(*high, pi_high_bits(plane[0], j + 4, 1));
    }
    if (pi_planes(type) == 2) {
        *low = v64b_or(*low, pi_high_bits(plane[0], 2 * j, 2));
        *high = v64b_or(*high, pi_high_bits(plane[1], 2 * j, 2));
    }
}

/* The same of the 16 rows of a tile. */
PI_INLINE void pi_tile_quads(int type, const uint8_t *p, v64b table, int j, v64b *low, v64b *high) {
    const uint8_t *codes = p + 64 * (pi_planes(type) + j);
    const v64b first = v64b_load(codes), line[2] = {first, type == PI_Q8_0 ? v64b_load(codes + 256) : first};
    const v64b plane[2] = {pi_planes(type) ? v64b_load(p) : first, pi_planes(type) == 2 ? v64b_load(p + 64) : first};
    pi_quads_of(type, table, line, plane, j, low, high);
}

/* The sums of the halves of a block times their scales, an exact integer. */
PI_INLINE v16f pi_scale_halves(int type, v16p low, v16p high, const v16i sub[2]) {
    const v16i nibble = v16i_set1(15);
    const v16i first = type == PI_MINIMUM_16 ? v16i_and(sub[0], nibble) : sub[0];
    const v16i second = type == PI_MINIMUM_16 ? v16i_and(sub[1], nibble) : sub[1];
    return v16f_from_i32(v16i_scale_pairs(v16i_scale_pairs(v16i_zero(), low, first), high, second));
}
PI_INLINE v16f pi_scale_byte_halves(int type, v16i low, v16i high, const v16i sub[2]) {
    if (type == PI_TABLE_16) return v16f_from_i32(v16i_add(v16i_mul(low, sub[0]), v16i_mul(high, sub[1])));
    const v16f first = v16f_mul(v16i_as_f32(sub[0]), v16f_from_i32(low)); /* exact: 4 and 15 bits */
    return v16f_fma(v16i_as_f32(sub[1]), v16f_from_i32(high), first);
}

/* Σ (code - offset)·x of a block as f32, an exact integer, from Σ code·x. */
PI_INLINE v16f pi_finish_sum(int type, v16i sum, float s) {
    const float offset = (float)pi_layout_of(type).offset;
    if (offset == 0.0f) return v16f_from_i32(sum);
    return v16f_fma(v16f_set1(-offset), v16f_set1(s), v16f_from_i32(sum)); /* both terms are exact integers */
}

/* The same from the sums over its two halves of 16 columns. */
PI_INLINE v16f pi_finish(int type, v16p low, v16p high, const int8_t *x, float s, const v16i sub[2]) {
    if (pi_has_halves(type)) {
        if (pi_layout_of(type).offset) {
            low = v16p_sub(low, v16p_offset(x, pi_layout_of(type).offset));
            high = v16p_sub(high, v16p_offset(x + 16, pi_layout_of(type).offset));
        }
        return pi_scale_halves(type, low, high, sub);
    }
    return pi_finish_sum(type,
                         pi_largest_code(type) <= 15 ? v16i_from_pairs(v16p_add(low, high))
                                                     : v16i_add(v16i_from_pairs(low), v16i_from_pairs(high)),
                         s);
}

/* Σx of 16 activations, in every lane. */
PI_INLINE v16i pi_half_sum(const int8_t *x) { return v16i_from_pairs(v16p_offset(x, 1)); }

/* The same from the sums of byte codes: of the whole block, which are exact integers, or of its halves. */
PI_INLINE v16f pi_finish_bytes(v16i sum, float s) {
    if (PI_BYTE_OFFSET == 0) return v16f_from_i32(sum);
    return v16f_fma(v16f_set1(-(float)PI_BYTE_OFFSET), v16f_set1(s), v16f_from_i32(sum));
}
PI_INLINE v16f pi_finish_byte_halves(int type, v16i low, v16i high, const int8_t *x, const v16i sub[2]) {
    if (PI_BYTE_OFFSET) {
        low = v16i_sub(low, v16i_slli(pi_half_sum(x), 7));
        high = v16i_sub(high, v16i_slli(pi_half_sum(x + 16), 7));
    }
    return pi_scale_byte_halves(type, low, high, sub);
}

/* What multiplies the minimum of a block, over dx: Σx, or for minima of halves b₀Σx + b₁Σx, an exact integer. */
PI_INLINE v16f pi_minimum_sum(int type, const pi_scales *at, const int8_t *x, float s) {
    if (type != PI_MINIMUM_16) return v16f_set1(s);
    const v16i low = v16i_mul(v16i_srli(at->sub[0], 4), pi_half_sum(x));
    return v16f_from_i32(v16i_add(low, v16i_mul(v16i_srli(at->sub[1], 4), pi_half_sum(x + 16))));
}

typedef struct { /* sums over the two halves of a block, not yet scaled: of byte codes or of small codes */
    v16p codes[2];
    v16i bytes[2];
} pi_halves;

/* `count` tokens (a constant), `stride` bytes apart, straight from the tile. One token has two chains of sums; several
 * hide each other's latency, and registers are dear. */
PI_INLINE void pi_dot_tile(int type, int count, const uint8_t *p, v64b table, const int8_t *x, int64_t stride,
                           pi_halves *sum) {
    const int second = count == 1 || pi_has_halves(type) || !pi_fits_one_sum(type);
    PI_UNROLL for (int t = 0; t < count; t++) sum[t] =
        (pi_halves){{v16p_zero(), v16p_zero()}, {v16i_zero(), v16i_zero()}};
    PI_UNROLL for (int j = 0; j < 4; j++) {
        v64b low, high;
        pi_tile_quads(type, p, table, j, &low, &high);
        PI_UNROLL for (int t = 0; t < count; t++) {
            const v64b first = v64b_quad(x + t * stride + 4 * j), last = v64b_quad(x + t * stride + 16 + 4 * j);
            if (pi_is_bytes(type)) {
                sum[t].bytes[0] = pi_dot_bytes(sum[t].bytes[0], low, first);
                sum[t].bytes[second] = pi_dot_bytes(sum[t].bytes[second], high, last);
            } else {
                sum[t].codes[0] = v16p_dot_us(sum[t].codes[0], low, first);
                sum[t].codes[second] = v16p_dot_us(sum[t].codes[second], high, last);
            }
        }
    }
}

PI_INLINE v16f pi_finish_halves(int type, const pi_halves *sum, const int8_t *x, float s, const v16i sub[2]) {
    if (pi_is_bytes(type) && pi_has_halves(type))
        return pi_finish_byte_halves(type, sum->bytes[0], sum->bytes[1], x, sub);
    if (pi_is_bytes(type)) return pi_finish_bytes(v16i_add(sum->bytes[0], sum->bytes[1]), s);
    return pi_finish(type, sum->codes[0], sum->codes[1], x, s, sub);
}

/* The tile's codes as 8 lines of bytes, quad after quad, to be used for several tokens. */
PI_INLINE void pi_unpack_tile(int type, const uint8_t *p, v64b table, uint8_t *codes) {
    PI_UNROLL for (int j = 0; j < 4; j++) {
        v64b low, high;
        pi_tile_quads(type, p, table, j, &low, &high);
        v64b_store(codes + 64 * j, low);
        v64b_store(codes + 64 * (j + 4), high);
    }
}

/* `count` tokens (a constant), `stride` bytes apart, times unpacked codes. */
PI_INLINE void pi_dot_codes(int type, int count, const uint8_t *codes, const int8_t *x, int64_t stride, const float *s,
                            int64_t s_stride, const v16i sub[2], v16f *out) {
    if (pi_is_bytes(type) && pi_has_halves(type)) {
        v16i sum[2][8];
        PI_UNROLL for (int h = 0; h < 2; h++) {
            PI_UNROLL for (int t = 0; t < count; t++) sum[h][t] = v16i_zero();
            PI_UNROLL for (int j = 0; j < 4; j++) {
                const v64b code = v64b_load(codes + 64 * (4 * h + j));
                PI_UNROLL for (int t = 0; t < count; t++) sum[h][t] =
                    pi_dot_bytes(sum[h][t], code, v64b_quad(x + t * stride + 16 * h + 4 * j));
            }
        }
        PI_UNROLL for (int t = 0; t < count; t++) out[t] =
            pi_finish_byte_halves(type, sum[0][t], sum[1][t], x + t * stride, sub);
        return;
    }
    if (pi_is_bytes(type)) {
        v16i sum[8];
        PI_UNROLL for (int t = 0; t < count; t++) sum[t] = v16i_zero();
        PI_UNROLL for (int j = 0; j < 8; j++) {
            const v64b code = v64b_load(codes + 64 * j);
            PI_UNROLL for (int t = 0; t < count; t++) sum[t] =
                pi_dot_bytes(sum[t], code, v64b_quad(x + t * stride + 4 * j));
        }
        PI_UNROLL for (int t = 0; t < count; t++) out[t] = pi_finish_bytes(sum[t], s[t * s_stride]);
        return;
    }
    if (!pi_has_halves(type) && pi_fits_one_sum(type)) {
        v16p sum[8];
        PI_UNROLL for (int t = 0; t < count; t++) sum[t] = v16p_zero();
        PI_UNROLL for (int j = 0; j < 8; j++) {
            const v64b code = v64b_load(codes + 64 * j);
            PI_UNROLL for (int t = 0; t < count; t++) sum[t] =
                v16p_dot_us(sum[t], code, v64b_quad(x + t * stride + 4 * j));
        }
        PI_UNROLL for (int t = 0; t < count; t++) out[t] =
            pi_finish_sum(type, v16i_from_pairs(sum[t]), s[t * s_stride]);
        return;
    }
    v16p half[2][8];
    PI_UNROLL for (int h = 0; h < 2; h++) {
        PI_UNROLL for (int t = 0; t < count; t++) half[h][t] = v16p_zero();
        PI_UNROLL for (int j = 0; j < 4; j++) {
            const v64b code = v64b_load(codes + 64 * (4 * h + j));
            PI_UNROLL for (int t = 0; t < count; t++) half[h][t] =
                v16p_dot_us(half[h][t], code, v64b_quad(x + t * stride + 16 * h + 4 * j));
        }
    }
    PI_UNROLL for (int t = 0; t < count; t++) out[t] =
        pi_finish(type, half[0][t], half[1][t], x + t * stride, s[t * s_stride], sub);
}

#endif
