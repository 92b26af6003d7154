/* rows_decode.h: the plain GGUF block rows, read one 32-column block at a time. Portable C, no SIMD.
 *
 * A weight is worth   scale · (code - offset) + minimum   with an unsigned code of 4, 5 or 6 bits (Q8_0: a
 * signed byte and no offset; types with a table: table[code]). Blocks of the K types and of forms are the eight
 * sub-blocks of a 256-column super-block.
 */
#ifndef PI_ROWS_DECODE_H
#define PI_ROWS_DECODE_H

#include "kernels.h"
#include <string.h>

#define PI_DECODE static inline __attribute__((always_inline, unused))

typedef struct {
    int32_t columns;    /* per stored block: 1 for float types */
    int32_t bytes;      /* per stored block */
    int32_t tile_bytes; /* per stored block of 16 interleaved rows */
    int32_t offset;     /* subtracted from a code */
    int32_t scales;     /* offset of d (float types: 0) */
    int32_t nibbles;    /* offset of the low nibbles, or of the bytes of Q8_0 */
    int32_t high;       /* offset of the high bits, 0 when there are none */
} pi_layout;

/* Columns, bytes and the places of the parts: constant-folded where row_type is a constant. */
PI_DECODE pi_layout pi_layout_of(int32_t row_type) {
    switch (row_type) {
    case PI_F32: return (pi_layout){1, 4, 64, 0, 0, 0, 0};
    case PI_F16:
    case PI_BF16: return (pi_layout){1, 2, 32, 0, 0, 0, 0};
    case PI_Q8_0: return (pi_layout){32, 34, 544, 0, 0, 2, 0};
    case PI_Q4_0: return (pi_layout){32, 18, 288, 8, 0, 2, 0};
    case PI_Q4_1: return (pi_layout){32, 20, 320, 0, 0, 4, 0};
    case PI_Q5_0: return (pi_layout){32, 22, 352, 16, 0, 6, 2};
    case PI_Q5_1: return (pi_layout){32, 24, 384, 0, 0, 8, 4};
    case PI_Q4_K: return (pi_layout){256, 144, 2368, 0, 0, 16, 0};
    case PI_Q5_K: return (pi_layout){256, 176, 2880, 0, 0, 48, 16};
    case PI_Q6_K: return (pi_layout){256, 210, 3360, 32, 208, 0, 128};
    case PI_IQ4_NL: return (pi_layout){32, 18, 288, 0, 0, 2, 0};
    case PI_MXFP4: return (pi_layout){32, 17, 272, 0, 0, 1, 0};
    /* Forms; d or the scales come first. */
    case PI_FLOAT8_16: return (pi_layout){32, 18, 288, 0, 0, 2, 0};
    case PI_TABLE_32: return (pi_layout){256, 140, 2240, 0, 4, 12, 0};
    case PI_TABLE_16: return (pi_layout){256, 148, 2368, 0, 4, 20, 0};
    case PI_SIGNED_16: return (pi_layout){256, 148, 2368, 4, 4, 20, 0};
    case PI_MINIMUM_16: return (pi_layout){256, 152, 2432, 0, 8, 24, 0};
    /* Types that become forms: columns and bytes. */
    case PI_Q2_K: return (pi_layout){256, 84, 0, 0, 0, 0, 0};
    case PI_Q3_K: return (pi_layout){256, 110, 0, 0, 0, 0, 0};
    case PI_IQ4_XS: return (pi_layout){256, 136, 0, 0, 0, 0, 0};
    case PI_IQ3_XXS: return (pi_layout){256, 98, 0, 0, 0, 0, 0};
    case PI_IQ3_S: return (pi_layout){256, 110, 0, 0, 0, 0, 0};
    case PI_IQ2_XXS: return (pi_layout){256, 66, 0, 0, 0, 0, 0};
    case PI_IQ2_XS: return (pi_layout){256, 74, 0, 0, 0, 0, 0};
    case PI_IQ2_S: return (pi_layout){256, 82, 0, 0, 0, 0, 0};
    case PI_IQ1_S: return (pi_layout){256, 50, 0, 0, 0, 0, 0};
    case PI_IQ1_M: return (pi_layout){256, 56, 0, 0, 0, 0, 0};
    case PI_NVFP4: return (pi_layout){64, 36, 0, 0, 0, 0, 0};
    case PI_TQ1_0: return (pi_layout){256, 54, 0, 0, 52, 0, 0};
    case PI_TQ2_0: return (pi_layout){256, 66, 0, 0, 64, 0, 0};
    default: return (pi_layout){0, 0, 0, 0, 0, 0, 0};
    }
}

/* Quantised types whose codes are numbers, and all that are computed with: those, and forms (transcode.h). */
#define PI_STORED_TYPES(X) X(Q8_0) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q4_K) X(Q5_K) X(Q6_K)
#define PI_FORM_TYPES(X) X(IQ4_NL) X(MXFP4) X(FLOAT8_16) X(TABLE_32) X(TABLE_16) X(SIGNED_16) X(MINIMUM_16)
#define PI_QUANTIZED_TYPES(X) PI_STORED_TYPES(X) PI_FORM_TYPES(X)
#define PI_FLOAT_TYPES(X) X(F32) X(F16) X(BF16)

PI_DECODE int pi_is_float(int32_t row_type) { return row_type == PI_F32 || row_type == PI_F16 || row_type == PI_BF16; }
PI_DECODE int pi_has_minimum(int32_t row_type) {
    return row_type == PI_Q4_1 || row_type == PI_Q5_1 || row_type == PI_Q4_K || row_type == PI_Q5_K;
}
/* f16 minima, or MINIMUM_16 with its own. */
PI_DECODE int pi_has_minima(int32_t row_type) { return pi_has_minimum(row_type) || row_type == PI_MINIMUM_16; }
/* 4-bit codes that stand for the bytes of a table. */
PI_DECODE int pi_has_table(int32_t row_type) {
    return row_type == PI_IQ4_NL || row_type == PI_MXFP4 || row_type == PI_FLOAT8_16 || row_type == PI_TABLE_32 ||
           row_type == PI_TABLE_16;
}
/* Sums of signed bytes, not of small unsigned codes. */
PI_DECODE int pi_is_bytes(int32_t row_type) { return row_type == PI_Q8_0 || pi_has_table(row_type); }
/* A scale for each half of a 32-column block. */
PI_DECODE int pi_has_halves(int32_t row_type) {
    return row_type == PI_Q6_K || row_type == PI_SIGNED_16 || row_type == PI_MINIMUM_16 || row_type == PI_TABLE_16 ||
           row_type == PI_FLOAT8_16;
}
/* Blocks of 256 columns with one f32 d. */
PI_DECODE int pi_has_f32(int32_t row_type) {
    return row_type == PI_TABLE_32 || row_type == PI_TABLE_16 || row_type == PI_SIGNED_16 || row_type == PI_MINIMUM_16;
}
PI_DECODE int pi_is_super(int32_t row_type) {
    return row_type == PI_Q4_K || row_type == PI_Q5_K || row_type == PI_Q6_K || pi_has_f32(row_type);
}
/* 32-column blocks per stored block of a quantised type. */
PI_DECODE int pi_subs(int32_t row_type) { return pi_is_super(row_type) ? 8 : 1; }

PI_DECODE uint16_t pi_read_u16(const uint8_t *p) {
    uint16_t u;
    memcpy(&u, p, 2);
    return u;
}
PI_DECODE uint32_t pi_read_u32(const uint8_t *p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return u;
}

/* The 6-bit scale and minimum of sub-block k of Q4_K and Q5_K: the first four are whole, the last four have
 * their upper two bits above the first four's. */
PI_DECODE void pi_sub_scale(const uint8_t packed[12], int k, uint8_t *scale, uint8_t *minimum) {
    if (k < 4) {
        *scale = packed[k] & 63;
        *minimum = packed[k + 4] & 63;
    } else {
        *scale = (uint8_t)((packed[k + 4] & 15) | (packed[k - 4] >> 6 << 4));
        *minimum = (uint8_t)((packed[k + 4] >> 4) | (packed[k] >> 6 << 4));
    }
}

/* Scales stored in one byte: 2^(e - 128), half of the E8M0 scale; and E4M3 without a sign. */
PI_DECODE float pi_half_e8m0(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
PI_DECODE float pi_half_e4m3(uint8_t b) {
    const uint32_t bits = (uint32_t)b << 20; /* the fields in place; the exponent's bias is 7, not 127 */
    float x;
    memcpy(&x, &bits, 4);
    return x * 0x1p119f;
}
PI_DECODE float pi_read_f32(const uint8_t *p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}

/* The 32 codes of block `sub` of the stored block at `p`, in column order (Q8_0: signed bytes). */
PI_DECODE void pi_decode_codes(int32_t row_type, const uint8_t *p, int sub, uint8_t code[32]) {
    const pi_layout at = pi_layout_of(row_type);
    const uint8_t *low = p + at.nibbles, *high = p + at.high;
    switch (row_type) {
    case PI_Q8_0: memcpy(code, low, 32); break;
    case PI_TABLE_32:
    case PI_TABLE_16:
    case PI_SIGNED_16:
    case PI_MINIMUM_16: low += 16 * sub; /* fall through */
    case PI_Q4_0:
    case PI_Q4_1:
    case PI_IQ4_NL:
    case PI_MXFP4:
    case PI_FLOAT8_16:
        for (int i = 0; i < 16; i++) code[i] = low[i] & 15, code[i + 16] = low[i] >> 4;
        break;
    case PI_Q5_0:
    case PI_Q5_1: {
        const uint32_t bits = pi_read_u32(high);
        for (int i = 0; i < 16; i++) {
            code[i] = (uint8_t)((low[i] & 15) | ((bits >> i & 1) << 4));
            code[i + 16] = (uint8_t)((low[i] >> 4) | ((bits >> (i + 16) & 1) << 4));
        }
        break;
    }
    case PI_Q4_K:
        for (int i = 0; i < 32; i++) code[i] = low[32 * (sub / 2) + i] >> (4 * (sub % 2)) & 15;
        break;
    case PI_Q5_K:
        for (int i = 0; i < 32; i++)
            code[i] = (uint8_t)((low[32 * (sub / 2) + i] >> (4 * (sub % 2)) & 15) | ((high[i] >> sub & 1) << 4));
        break;
    case PI_Q6_K:
        for (int i = 0; i < 32; i++)
            code[i] = (uint8_t)((low[64 * (sub / 4) + 32 * (sub % 2) + i] >> (4 * (sub / 2 % 2)) & 15) |
                                ((high[32 * (sub / 4) + i] >> (2 * (sub % 4)) & 3) << 4));
        break;
    default: break;
    }
}

#endif
