/* Plain GGUF rows into planar ones (bundle.h). */
#include "bundle.h"

static void pack_scales(const uint8_t *row, int32_t type, int64_t columns, int is_sum, const pi_planar *at,
                        uint8_t *out) {
    const pi_layout from = pi_layout_of(type);
    const int64_t stored = columns / from.columns;
    for (int64_t b = 0; b < stored; b++) {
        const uint8_t *p = row + b * from.bytes;
        memcpy(out + 2 * b, p + from.scales, 2);
        if (pi_has_minimum(type)) memcpy(out + at->minimum + 2 * b, p + 2, 2);
        for (int sub = 0; sub < 8 && pi_is_super(type); sub++) {
            const int64_t block = 8 * b + sub;
            uint8_t *first = out + at->scales[0], *second = out + at->scales[1];
            if (type != PI_Q6_K)
                pi_sub_scale(p + 4, sub, first + block, second + block);
            else if (is_sum)
                memcpy(first + 2 * block, p + 192 + 2 * sub, 2);
            else
                first[block] = p[192 + 2 * sub], second[block] = p[193 + 2 * sub];
        }
    }
}

/* The 32 codes of block `lane` of group `group` of a product row, which has `blocks` blocks in that group. */
static void place_product(int32_t type, const uint8_t code[32], int64_t group, int lane, int blocks,
                          const pi_planar *at, uint8_t *out) {
    const int planes = pi_plane_lines(type), line = 4 * blocks;
    uint8_t *plane = out + at->codes + 4 * PI_GROUP_BLOCKS * pi_group_lines(type) * group + 4 * lane;
    uint8_t *codes = plane + planes * line;
    for (int k = 0; k < 16; k++) {
        const int j = k / 4, c = k % 4, low = code[k], high = code[16 + k];
        if (type == PI_Q8_0) {
            codes[j * line + c] = (uint8_t)low;
            codes[(j + 4) * line + c] = (uint8_t)high;
            continue;
        }
        codes[j * line + c] = (uint8_t)((low & 15) | (high & 15) << 4);
        if (planes == 1) plane[c] = (uint8_t)(plane[c] | (low >> 4) << j | (high >> 4) << (j + 4));
        if (planes == 2) {
            plane[c] = (uint8_t)(plane[c] | (low >> 4) << 2 * j);
            plane[line + c] = (uint8_t)(plane[line + c] | (high >> 4) << 2 * j);
        }
    }
}

static void place_sum(int32_t type, const uint8_t code[32], int64_t block, const pi_planar *at, uint8_t *out) {
    for (int i = 0; i < 32; i++) {
        const int64_t column = block * 32 + i, lane = column % 16;
        if (type == PI_Q8_0) {
            out[at->codes + column / 64 * 64 + 4 * lane + column % 64 / 16] = code[i];
            continue;
        }
        const int64_t line = column / 128, n = column % 128 / 16, s = line % pi_lines_of_plane(type);
        uint8_t *to = out + at->codes + 64 * line + 4 * lane + n / 2;
        *to = (uint8_t)(*to | (code[i] & 15) << (4 * (n % 2)));
        const int width = pi_code_bits(type) - 4;
        if (width == 0) continue;
        const int64_t bit = width * (8 * s + n);
        to = out + at->high + 64 * (line / pi_lines_of_plane(type)) + 4 * lane + bit / 8;
        *to = (uint8_t)(*to | (code[i] >> 4) << (bit % 8));
    }
}

void pi_pack_planar(const uint8_t *row, int32_t type, int64_t columns, int is_sum, uint8_t *out) {
    const pi_planar at = pi_planar_of(type, columns, is_sum);
    if (pi_is_float(type)) {
        memcpy(out, row, (size_t)(columns * pi_layout_of(type).bytes));
        return;
    }
    const int64_t blocks = columns / PI_BLOCK;
    const int subs = pi_subs(type);
    pack_scales(row, type, columns, is_sum, &at, out);
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t code[32];
        const int64_t group = b / PI_GROUP_BLOCKS, left = blocks - group * PI_GROUP_BLOCKS;
        const int in_group = left < PI_GROUP_BLOCKS ? (int)left : PI_GROUP_BLOCKS;
        pi_decode_codes(type, row + b / subs * pi_layout_of(type).bytes, (int)(b % subs), code);
        if (is_sum)
            place_sum(type, code, b, &at, out);
        else
            place_product(type, code, group, (int)(b % PI_GROUP_BLOCKS), in_group, &at, out);
    }
}
