/* rows_gather.h: the same block of 16 plain GGUF rows, brought into the form that tiles are unpacked to
 * (matmul_blocks.h), so that dot_rows shares the arithmetic of matmul and with it every bit.
 */
#ifndef PI_ROWS_GATHER_H
#define PI_ROWS_GATHER_H

#include "matmul_blocks.h"

typedef struct { /* one stored block of 16 rows: up to 8 blocks of 32 columns */
    _Alignas(64) uint8_t codes[8][512];
    pi_scales at[8];
} pi_gathered;

/* Bits 4b..4b+3 of each dword, one per byte, at bit 4 of the byte. */
PI_INLINE v64b pi_spread_bits(v16i bits, int b) {
    const v16i four = v16i_and(v16i_srli(bits, 4 * b), v16i_set1(15));
    const v16i spread = v16i_mul(four, v16i_set1(0x02040810));
    return v16i_as_bytes(v16i_and(spread, v16i_set1(0x10101010)));
}

/* Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: one block of 32 columns, `at` bytes into the rows. */
PI_INLINE void pi_gather_block(int type, const uint8_t *const rows[16], int64_t at, pi_gathered *out) {
    const pi_layout layout = pi_layout_of(type);
    const v16f m = pi_has_minimum(type) ? v16f_gather_f16(rows, at + 2) : v16f_zero();
    v64b line[8];
    out->at[0] = pi_scales_of(type, v16f_gather_f16(rows, at), m, NULL);
    v64b_transpose16(rows, at + layout.nibbles, line);
    if (type == PI_Q8_0) {
        v64b_transpose16(rows, at + layout.nibbles + 16, line + 4);
        PI_UNROLL for (int j = 0; j < 8; j++) v64b_store(out->codes[0] + 64 * j, pi_byte_code(line[j]));
        return;
    }
    const v16i high = pi_planes(type) ? v64b_as_i32(v64b_transpose4(rows, at + layout.high)) : v16i_zero();
    PI_UNROLL for (int j = 0; j < 8; j++) {
        v64b code = j < 4 ? v64b_and(line[j], v64b_set1(15)) : v64b_srl4(line[j - 4]);
        if (pi_planes(type)) code = v64b_or(code, pi_spread_bits(high, j));
        v64b_store(out->codes[0] + 64 * j, code);
    }
}

/* The 8-bit scales of a super-block, 32 bytes per block of 32 columns as pi_scales_of wants them. */
PI_INLINE void pi_gather_packed(int type, const uint8_t *const rows[16], int64_t at, uint8_t packed[8][32]) {
    for (int r = 0; r < 16; r++) {
        const uint8_t *p = rows[r] + at;
        for (int sub = 0; sub < 8; sub++) {
            if (type == PI_Q6_K) {
                packed[sub][r] = p[192 + 2 * sub];
                packed[sub][16 + r] = p[193 + 2 * sub];
            } else {
                pi_sub_scale(p + 4, sub, &packed[sub][r], &packed[sub][16 + r]);
            }
        }
    }
}

/* Q4_K, Q5_K, Q6_K: byte i of a part holds columns 32 apart at different bits (see pi_decode_codes). */
PI_INLINE void pi_gather_super(int type, const uint8_t *const rows[16], int64_t at, pi_gathered *out) {
    const pi_layout layout = pi_layout_of(type);
    const int high_lines = type == PI_Q6_K ? 16 : type == PI_Q5_K ? 8 : 0, width = type == PI_Q6_K ? 2 : 1;
    v64b low[32], high[16];
    uint8_t packed[8][32];
    for (int j = 0; j < 32; j += 4) v64b_transpose16(rows, at + layout.nibbles + 4 * j, low + j);
    for (int j = 0; j < high_lines; j += 4) v64b_transpose16(rows, at + layout.high + 4 * j, high + j);
    pi_gather_packed(type, rows, at, packed);
    const v16f d = v16f_gather_f16(rows, at + layout.scales);
    const v16f m = pi_has_minimum(type) ? v16f_gather_f16(rows, at + 2) : v16f_zero();
    PI_UNROLL for (int sub = 0; sub < 8; sub++) {
        const int from = type == PI_Q6_K ? 16 * (sub / 4) + 8 * (sub % 2) : 8 * (sub / 2);
        const int upper = type == PI_Q6_K ? sub / 2 % 2 : sub % 2;
        const int bit = type == PI_Q6_K ? 2 * (sub % 4) : sub, plane = type == PI_Q6_K ? 8 * (sub / 4) : 0;
        out->at[sub] = pi_scales_of(type, d, m, packed[sub]);
        for (int j = 0; j < 8; j++) {
            v64b code = upper ? v64b_srl4(low[from + j]) : v64b_and(low[from + j], v64b_set1(15));
            if (high_lines) code = v64b_or(code, pi_high_bits(high[plane + j], bit, width));
            v64b_store(out->codes[sub] + 64 * j, code);
        }
    }
}

#endif
