/* rows_codes.h: one 32-column block of one plain GGUF row as 2 × 16 integers and what they are worth. */
#ifndef PI_ROWS_CODES_H
#define PI_ROWS_CODES_H

#include "rows_decode.h"
#include "simd.h"

typedef struct { /* weight = scale[half] · code[half] + minimum */
    v16i code[2];
    float scale[2], minimum;
} pi_row_block;

/* Bit i of `bits`, as 16 or 0, in lane i. */
PI_INLINE v16i pi_lane_bits(uint32_t bits) {
    static const int32_t lane_bit[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                         1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const v16i picked = v16i_and(v16i_set1((int32_t)(bits & 0xffffu)), v16i_load(lane_bit));
    return v16i_slli(v16i_min(picked, v16i_set1(1)), 4);
}

PI_INLINE v16i pi_byte_bits(const uint8_t *p, int from, int mask) {
    return v16i_and(v16i_srli(v16i_from_u8(p), from), v16i_set1(mask));
}

/* Codes less their offset: the columns of a super-block lie as pi_decode_codes says. */
PI_INLINE void pi_row_codes(int type, const uint8_t *p, int sub, v16i code[2]) {
    const pi_layout at = pi_layout_of(type);
    const uint8_t *low = p + at.nibbles, *high = p + at.high;
    for (int half = 0; half < 2; half++) {
        const int i = 16 * half;
        if (type == PI_Q8_0)
            code[half] = v16i_from_i8((const int8_t *)low + i);
        else if (type == PI_Q4_K || type == PI_Q5_K)
            code[half] = pi_byte_bits(low + 32 * (sub / 2) + i, 4 * (sub % 2), 15);
        else if (type == PI_Q6_K)
            code[half] = pi_byte_bits(low + 64 * (sub / 4) + 32 * (sub % 2) + i, 4 * (sub / 2 % 2), 15);
        else
            code[half] = pi_byte_bits(low, 4 * half, 15);
        if (type == PI_Q5_0 || type == PI_Q5_1) code[half] = v16i_or(code[half], pi_lane_bits(pi_read_u32(high) >> i));
        if (type == PI_Q5_K) code[half] = v16i_or(code[half], v16i_slli(pi_byte_bits(high + i, sub, 1), 4));
        if (type == PI_Q6_K)
            code[half] = v16i_or(code[half], v16i_slli(pi_byte_bits(high + 32 * (sub / 4) + i, 2 * (sub % 4), 3), 4));
        if (at.offset) code[half] = v16i_sub(code[half], v16i_set1(at.offset));
    }
}

PI_INLINE pi_row_block pi_read_row_block(int type, const uint8_t *p, int sub) {
    pi_row_block b;
    const float d = pi_f16_to_f32(pi_read_u16(p + pi_layout_of(type).scales));
    pi_row_codes(type, p, sub, b.code);
    b.scale[0] = b.scale[1] = d;
    b.minimum = type == PI_Q4_1 || type == PI_Q5_1 ? pi_f16_to_f32(pi_read_u16(p + 2)) : 0.0f;
    if (type == PI_Q4_K || type == PI_Q5_K) {
        uint8_t scale, minimum;
        pi_sub_scale(p + 4, sub, &scale, &minimum);
        b.scale[0] = b.scale[1] = d * (float)scale;
        b.minimum = -(pi_f16_to_f32(pi_read_u16(p + 2)) * (float)minimum);
    }
    if (type == PI_Q6_K) {
        b.scale[0] = d * (float)(int8_t)p[192 + 2 * sub];
        b.scale[1] = d * (float)(int8_t)p[193 + 2 * sub];
    }
    return b;
}

#endif
