/* transcode.c: rows of the GGUF types that are computed in another form, block by block, without loss (transcode.h). */
#include "transcode.h"

#define PI_ISA_SCALAR 1 /* only for the conversions of single values */
#include "simd.h"

#include <stdlib.h>

/* Values that 4-bit codes stand for. Non-uniform: the code book of IQ4_NL; E2M1 doubled; points of a grid (below) with
 * their signs in bit 3; and 8 · (point + delta) for points -1, 0, 1, with the sign of delta 1/8 in bit 2. */
static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t e2m1_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const int8_t iq2_values[16] = {8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43, 0, 0, 0, 0, 0};
static const int8_t iq3_xxs_values[16] = {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62};
static const int8_t iq3_s_values[16] = {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15};
static const int8_t iq1_values[16] = {-7, 1, 9, 0, -9, -1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0};

const int8_t *pi_table_of(int32_t row_type) {
    switch (row_type) {
    case PI_IQ4_NL:
    case PI_IQ4_XS: return iq4_values;
    case PI_MXFP4:
    case PI_NVFP4: return e2m1_values;
    case PI_IQ2_XXS:
    case PI_IQ2_XS:
    case PI_IQ2_S: return iq2_values;
    case PI_IQ3_XXS: return iq3_xxs_values;
    case PI_IQ3_S: return iq3_s_values;
    case PI_IQ1_S:
    case PI_IQ1_M: return iq1_values;
    default: return NULL;
    }
}

int32_t pi_form_of(int32_t row_type) {
    switch (row_type) {
    case PI_Q2_K: return PI_MINIMUM_16;
    case PI_Q3_K: return PI_SIGNED_16;
    case PI_IQ4_XS:
    case PI_IQ3_XXS:
    case PI_IQ3_S:
    case PI_IQ2_XXS:
    case PI_IQ1_S: return PI_TABLE_32;
    case PI_IQ2_XS:
    case PI_IQ2_S:
    case PI_IQ1_M: return PI_TABLE_16;
    case PI_NVFP4: return PI_FLOAT8_16;
    case PI_TQ1_0:
    case PI_TQ2_0: return PI_Q4_0;
    default: return row_type;
    }
}

/* ---- grids: [points, values of a point], as numbers of magnitudes ---- */

static uint8_t *grids[PI_TYPES];

/* IQ1_M uses the grid of IQ1_S. */
static int32_t grid_owner(int32_t row_type) { return row_type == PI_IQ1_M ? PI_IQ1_S : row_type; }

int64_t pi_grid_bytes(int32_t row_type) {
    switch (row_type) {
    case PI_IQ2_XXS: return 256 * 8;
    case PI_IQ2_XS: return 512 * 8;
    case PI_IQ2_S: return 1024 * 8;
    case PI_IQ3_XXS: return 256 * 4;
    case PI_IQ3_S: return 512 * 4;
    case PI_IQ1_S:
    case PI_IQ1_M: return 2048 * 8;
    default: return 0;
    }
}

int pi_has_grid(int32_t row_type) { return pi_grid_bytes(row_type) == 0 || grids[grid_owner(row_type)] != NULL; }

int pi_set_grid(int32_t row_type, const uint8_t *codes) {
    const int64_t bytes = pi_grid_bytes(row_type);
    const int32_t owner = grid_owner(row_type);
    if (bytes == 0 || grids[owner]) return 0;
    uint8_t *grid = malloc((size_t)bytes);
    if (!grid) return -1;
    for (int64_t i = 0; i < bytes; i++) grid[i] = codes[i] & 7;
    grids[owner] = grid;
    return 0;
}

/* ---- a block of 256 columns taken apart, and put together in one of the forms ---- */

typedef struct {
    float d, minimum;  /* of the block */
    uint8_t scale[16]; /* of 16 columns (TABLE_32: of 32, the first eight); int8, or scale and minimum in one byte */
    uint8_t code[256];
} block_256;

static void write_f32(uint8_t *out, float x) { memcpy(out, &x, 4); }

static void write_block(int32_t form, const block_256 *b, uint8_t *out) {
    const pi_layout to = pi_layout_of(form);
    write_f32(out, b->d);
    if (form == PI_MINIMUM_16) write_f32(out + 4, b->minimum);
    memcpy(out + to.scales, b->scale, (size_t)(to.nibbles - to.scales));
    for (int sub = 0; sub < 8; sub++)
        for (int i = 0; i < 16; i++)
            out[to.nibbles + 16 * sub + i] = (uint8_t)(b->code[32 * sub + i] | b->code[32 * sub + 16 + i] << 4);
}

static float read_f16(const uint8_t *p) { return pi_f16_to_f32(pi_read_u16(p)); }

/* Two bits of column c, as Q2_K, Q3_K and TQ2_0 store 256 of them. */
static uint8_t two_bits(const uint8_t *codes, int c) { return codes[c / 128 * 32 + c % 32] >> (c % 128 / 32 * 2) & 3; }

static void read_q2_k(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p + 80);
    b->minimum = read_f16(p + 82);
    memcpy(b->scale, p, 16);
    for (int c = 0; c < 256; c++) b->code[c] = two_bits(p + 16, c);
}

static void read_q3_k(const uint8_t *p, block_256 *b) {
    const uint8_t *scales = p + 96;
    b->d = read_f16(p + 108);
    for (int k = 0; k < 16; k++) {
        const int low = k < 8 ? scales[k] & 15 : scales[k - 8] >> 4, high = scales[8 + k % 4] >> (k / 4 * 2) & 3;
        b->scale[k] = (uint8_t)((low | high << 4) - 32);
    }
    for (int c = 0; c < 256; c++) b->code[c] = (uint8_t)(two_bits(p + 32, c) | (p[c % 32] >> (c / 32) & 1) << 2);
}

static void read_iq4_xs(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p);
    for (int k = 0; k < 8; k++) {
        const int low = p[4 + k / 2] >> (4 * (k % 2)) & 15, high = pi_read_u16(p + 2) >> (2 * k) & 3;
        b->scale[k] = (uint8_t)((low | high << 4) - 32);
    }
    for (int c = 0; c < 256; c++) b->code[c] = p[8 + c / 32 * 16 + c % 16] >> (c % 32 / 16 * 4) & 15;
}

/* `width` values of a point of the grid; bit i of `signs` is the sign of value i. */
static void place_point(const uint8_t *grid, int width, int point, int signs, uint8_t *code) {
    for (int i = 0; i < width; i++) code[i] = (uint8_t)(grid[point * width + i] | (signs >> i & 1) << 3);
}

/* Seven signs are stored; the eighth makes the number of minus signs even. */
static int eight_signs(uint32_t seven) {
    int odd = 0;
    for (int i = 0; i < 7; i++) odd ^= (int)(seven >> i & 1);
    return (int)(seven & 127) | odd << 7;
}

static void read_iq2_xxs(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p) * 0.125f;
    for (int k = 0; k < 8; k++) {
        const uint8_t *points = p + 2 + 8 * k;
        const uint32_t rest = pi_read_u32(points + 4);
        b->scale[k] = (uint8_t)(2 * (rest >> 28) + 1);
        for (int l = 0; l < 4; l++)
            place_point(grids[PI_IQ2_XXS], 8, points[l], eight_signs(rest >> (7 * l)), b->code + 32 * k + 8 * l);
    }
}

/* Scales 2s + 1 with 4-bit s of 16 columns each. */
static void read_odd_scales(const uint8_t *p, block_256 *b) {
    for (int k = 0; k < 16; k++) b->scale[k] = (uint8_t)(2 * (p[k / 2] >> (4 * (k % 2)) & 15) + 1);
}

static void read_iq2_xs(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p) * 0.125f;
    read_odd_scales(p + 66, b);
    for (int l = 0; l < 32; l++) {
        const uint32_t of_eight = pi_read_u16(p + 2 + 2 * l);
        place_point(grids[PI_IQ2_XS], 8, of_eight & 511, eight_signs(of_eight >> 9), b->code + 8 * l);
    }
}

static void read_iq2_s(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p) * 0.125f;
    read_odd_scales(p + 74, b);
    for (int l = 0; l < 32; l++) {
        const int high = p[66 + l / 4] >> (2 * (l % 4)) & 3;
        place_point(grids[PI_IQ2_S], 8, p[2 + l] | high << 8, p[34 + l], b->code + 8 * l);
    }
}

static void read_iq3_xxs(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p) * 0.25f;
    for (int k = 0; k < 8; k++) {
        const uint32_t rest = pi_read_u32(p + 66 + 4 * k);
        b->scale[k] = (uint8_t)(2 * (rest >> 28) + 1);
        for (int l = 0; l < 8; l++)
            place_point(grids[PI_IQ3_XXS], 4, p[2 + 8 * k + l], eight_signs(rest >> (l / 2 * 7)) >> (l % 2 * 4),
                        b->code + 32 * k + 4 * l);
    }
}

static void read_iq3_s(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p);
    for (int k = 0; k < 8; k++) b->scale[k] = (uint8_t)(2 * (p[106 + k / 2] >> (4 * (k % 2)) & 15) + 1);
    for (int l = 0; l < 64; l++) {
        const int high = p[66 + l / 8] >> (l % 8) & 1;
        place_point(grids[PI_IQ3_S], 4, p[2 + l] | high << 8, p[74 + l / 2] >> (l % 2 * 4), b->code + 4 * l);
    }
}

/* Eight ternary values of a point and the sign of their delta. */
static void place_ternary(int point, int minus, uint8_t *code) {
    for (int i = 0; i < 8; i++) code[i] = (uint8_t)(grids[PI_IQ1_S][8 * point + i] | minus << 2);
}

static void read_iq1_s(const uint8_t *p, block_256 *b) {
    b->d = read_f16(p) * 0.125f;
    for (int k = 0; k < 8; k++) {
        const int high = pi_read_u16(p + 34 + 2 * k);
        b->scale[k] = (uint8_t)(2 * (high >> 12 & 7) + 1);
        for (int l = 0; l < 4; l++)
            place_ternary(p[2 + 4 * k + l] | (high >> (3 * l) & 7) << 8, high >> 15, b->code + 32 * k + 8 * l);
    }
}

/* The f16 lies in the upper nibbles of the four words of scales. */
static void read_iq1_m(const uint8_t *p, block_256 *b) {
    uint16_t d = 0;
    for (int k = 0; k < 4; k++) d |= (uint16_t)(pi_read_u16(p + 48 + 2 * k) >> 12 << (4 * k));
    b->d = pi_f16_to_f32(d) * 0.125f;
    for (int k = 0; k < 16; k++)
        b->scale[k] = (uint8_t)(2 * (pi_read_u16(p + 48 + k / 4 * 2) >> (3 * (k % 4)) & 7) + 1);
    for (int l = 0; l < 32; l++) {
        const int high = p[32 + l / 2] >> (4 * (l % 2)) & 15;
        place_ternary(p[l] | (high & 7) << 8, high >> 3, b->code + 8 * l);
    }
}

/* ---- the others ---- */

/* Four groups of 16 columns, eight bytes of codes each: two blocks of 32. 0x7f is zero, the sign bit nothing. */
static void transcode_nvfp4(const uint8_t *p, uint8_t *out) {
    for (int group = 0; group < 4; group++) {
        uint8_t *to = out + 18 * (group / 2);
        to[group % 2] = p[group] == 0x7f ? 0 : p[group] & 0x7f;
        for (int i = 0; i < 16; i++) {
            const int code = p[4 + 8 * group + i % 8] >> (i / 8 * 4) & 15;
            if (group % 2)
                to[2 + i] = (uint8_t)(to[2 + i] | code << 4);
            else
                to[2 + i] = (uint8_t)code;
        }
    }
}

/* Ternary digit n of a byte that holds a number below 3^5 as a fraction of 256. */
static int ternary_digit(uint8_t packed, int n) {
    for (; n > 0; n--) packed = (uint8_t)(3 * packed);
    return packed * 3 >> 8;
}

static int tq1_digit(const uint8_t *p, int c) {
    if (c < 160) return ternary_digit(p[c % 32], c / 32);
    if (c < 240) return ternary_digit(p[32 + (c - 160) % 16], (c - 160) / 16);
    return ternary_digit(p[48 + (c - 240) % 4], (c - 240) / 4);
}

/* Codes -1, 0, 1 (TQ2_0: 2) under one scale become codes of Q4_0. */
static void transcode_ternary(int32_t row_type, const uint8_t *p, uint8_t *out) {
    const uint8_t *d = p + pi_layout_of(row_type).scales;
    for (int sub = 0; sub < 8; sub++, out += 18) {
        memcpy(out, d, 2);
        for (int i = 0; i < 16; i++) {
            const int c = 32 * sub + i;
            const int low = row_type == PI_TQ1_0 ? tq1_digit(p, c) : two_bits(p, c);
            const int high = row_type == PI_TQ1_0 ? tq1_digit(p, c + 16) : two_bits(p, c + 16);
            out[2 + i] = (uint8_t)((low + 7) | (high + 7) << 4);
        }
    }
}

void pi_transcode_block(int32_t row_type, const uint8_t *p, uint8_t *out) {
    block_256 b = {.minimum = 0.0f};
    switch (row_type) {
    case PI_NVFP4: transcode_nvfp4(p, out); return;
    case PI_TQ1_0:
    case PI_TQ2_0: transcode_ternary(row_type, p, out); return;
    case PI_Q2_K: read_q2_k(p, &b); break;
    case PI_Q3_K: read_q3_k(p, &b); break;
    case PI_IQ4_XS: read_iq4_xs(p, &b); break;
    case PI_IQ3_XXS: read_iq3_xxs(p, &b); break;
    case PI_IQ3_S: read_iq3_s(p, &b); break;
    case PI_IQ2_XXS: read_iq2_xxs(p, &b); break;
    case PI_IQ2_XS: read_iq2_xs(p, &b); break;
    case PI_IQ2_S: read_iq2_s(p, &b); break;
    case PI_IQ1_S: read_iq1_s(p, &b); break;
    case PI_IQ1_M: read_iq1_m(p, &b); break;
    default: return;
    }
    write_block(pi_form_of(row_type), &b, out);
}
