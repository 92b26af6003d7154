/* Plain GGUF rows into planar ones (bundle.h). */
#include "bundle.h"

/* Scales of a byte of block `block`, two where the halves have their own. */
static void place_byte_scales(const uint8_t *scale, int32_t type, int64_t block, int is_sum, const pi_planar *at,
                              uint8_t *out) {
    uint8_t *first = out + at->scales[0], *second = out + at->scales[1];
    if (!pi_has_halves(type))
        first[block] = scale[0];
    else if (is_sum)
        memcpy(first + 2 * block, scale, 2);
    else
        first[block] = scale[0], second[block] = scale[1];
}

/* The scales of stored block b of a form, which lies at p. */
static void pack_form_scales(const uint8_t *p, int32_t type, int64_t b, int is_sum, const pi_planar *at, uint8_t *out) {
    const int subs = pi_subs(type), per_block = pi_has_halves(type) ? 2 : 1;
    if (pi_has_f32(type)) memcpy(out + 4 * b, p, 4);
    if (type == PI_MINIMUM_16) memcpy(out + at->minimum + 4 * b, p + 4, 4);
    for (int sub = 0; sub < subs; sub++)
        place_byte_scales(p + pi_layout_of(type).scales + per_block * sub, type, subs * b + sub, is_sum, at, out);
}

static void pack_scales(const uint8_t *p, int32_t type, int64_t b, int is_sum, const pi_planar *at, uint8_t *out) {
    memcpy(out + 2 * b, p + pi_layout_of(type).scales, 2);
    if (pi_has_minimum(type)) memcpy(out + at->minimum + 2 * b, p + 2, 2);
    for (int sub = 0; sub < 8 && pi_is_super(type); sub++) {
        const int64_t block = 8 * b + sub;
        if (type == PI_Q6_K)
            place_byte_scales(p + 192 + 2 * sub, type, block, is_sum, at, out);
        else
            pi_sub_scale(p + 4, sub, out + at->scales[0] + block, out + at->scales[1] + block);
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

/* Bytes of a line of sum rows before word `lane` of a half. */
static int64_t sum_word(int64_t half, int64_t lane) { return 2 * (lane / 4 * 8 + 4 * half + lane % 4); }

void pi_place_sum(int32_t type, const uint8_t code[32], int64_t block, const pi_planar *at, uint8_t *out) {
    const int64_t half = block / 2, in_plane = half % (2 * pi_lines_of_plane(type));
    const int units = pi_has_halves(type) ? 4 : 2, in_vector = 16 / units, width = pi_code_bits(type) - 4;
    for (int i = 0; i < 32; i++) {
        const int64_t column = block % 2 * 32 + i, unit = column / (64 / units), p = column % (64 / units);
        const int64_t n = p / in_vector, lane = p % in_vector * units + unit;
        if (type == PI_Q8_0) {
            out[at->codes + 64 * half + sum_word(n / 2, lane) + n % 2] = code[i] ^ (n % 2 ? 0 : 128);
            continue;
        }
        const int by_byte = pi_sum_step(type) == 8, flip = !by_byte && n == 3 ? 8 : 0;
        uint8_t *to = out + at->codes + 32 * (half - half % 2) + sum_word(half % 2, lane) + (by_byte ? n % 2 : n / 2);
        *to = (uint8_t)(*to | ((code[i] & 15) ^ flip) << 4 * (by_byte ? n / 2 : n % 2));
        if (!pi_has_plane(type)) continue;
        const int64_t in_word = pi_lines_of_plane(type), bit = width * (in_plane % in_word * 2 + n / 2);
        to = out + at->high + 32 * (half - in_plane) / in_word + sum_word(in_plane / in_word, lane) + n % 2;
        *to = (uint8_t)(*to | (code[i] >> 4) << bit);
    }
}

/* The same as pi_decode_codes and then place_product or pi_place_sum, word by word, for types whose bytes have the order
 * in which they are wanted: `low` are those of one block. 1 where that was so. */
static int place_words(int32_t type, const uint8_t *low, int64_t block, int64_t blocks, int is_sum, const pi_planar *at,
                       uint8_t *out) {
    if (type != PI_Q4_0 && type != PI_Q4_1 && type != PI_Q8_0) return 0;
    if (is_sum) {
        const int64_t half = block / 2, unit = block % 2;
        uint8_t *to = out + at->codes;
        for (int c = 0; c < 8; c++) {
            const int64_t lane = 2 * c + unit;
            if (type == PI_Q8_0) {
                const uint8_t words[2][2] = {{(uint8_t)(low[c] ^ 128), low[8 + c]},
                                             {(uint8_t)(low[16 + c] ^ 128), low[24 + c]}};
                memcpy(to + 64 * half + sum_word(0, lane), words[0], 2);
                memcpy(to + 64 * half + sum_word(1, lane), words[1], 2);
                continue;
            }
            const int first = low[c], second = low[8 + c];
            const uint8_t word[2] = {(uint8_t)((first & 15) | (second & 15) << 4),
                                     (uint8_t)((first >> 4) | ((second >> 4) ^ 8) << 4)};
            memcpy(to + 32 * (half - half % 2) + sum_word(half % 2, lane), word, 2);
        }
        return 1;
    }
    const int64_t group = block / PI_GROUP_BLOCKS, left = blocks - group * PI_GROUP_BLOCKS;
    const int64_t line = 4 * (left < PI_GROUP_BLOCKS ? left : PI_GROUP_BLOCKS);
    const int lines = pi_group_lines(type);
    uint8_t *to = out + at->codes + 4 * PI_GROUP_BLOCKS * lines * group + 4 * (block % PI_GROUP_BLOCKS);
    for (int j = 0; j < lines; j++) memcpy(to + j * line, low + 4 * j, 4);
    return 1;
}

/* Stored block b of a row in its form. */
static void pack_block(const uint8_t *p, int32_t type, int64_t b, int64_t blocks, int is_sum, const pi_planar *at,
                       uint8_t *out) {
    const int subs = pi_subs(type);
    if (pi_has_f32(type) || type == PI_MXFP4 || type == PI_FLOAT8_16)
        pack_form_scales(p, type, b, is_sum, at, out);
    else
        pack_scales(p, type, b, is_sum, at, out);
    for (int sub = 0; sub < subs; sub++) {
        uint8_t code[32];
        const int64_t block = b * subs + sub, group = block / PI_GROUP_BLOCKS;
        const int64_t left = blocks - group * PI_GROUP_BLOCKS;
        const int in_group = left < PI_GROUP_BLOCKS ? (int)left : PI_GROUP_BLOCKS;
        if (place_words(type, p + pi_layout_of(type).nibbles, block, blocks, is_sum, at, out)) continue;
        pi_decode_codes(type, p, sub, code);
        if (is_sum)
            pi_place_sum(type, code, block, at, out);
        else
            place_product(type, code, group, (int)(block % PI_GROUP_BLOCKS), in_group, at, out);
    }
}

void pi_pack_planar(const uint8_t *row, int32_t type, int64_t columns, int is_sum, uint8_t *out) {
    const int32_t form = pi_form_of(type);
    const pi_planar at = pi_planar_of(form, columns, is_sum);
    const pi_layout from = pi_layout_of(type), to = pi_layout_of(form);
    if (pi_is_float(type)) {
        memcpy(out, row, (size_t)(columns * from.bytes));
        return;
    }
    const int64_t stored = columns / from.columns, blocks = columns / PI_BLOCK;
    const int pieces = from.columns / to.columns;
    for (int64_t b = 0; b < stored; b++, row += from.bytes) {
        uint8_t transcoded[PI_FORM_BYTES];
        if (form != type) pi_transcode_block(type, row, transcoded);
        for (int i = 0; i < pieces; i++)
            pack_block(form == type ? row : transcoded + i * to.bytes, form, b * pieces + i, blocks, is_sum, &at, out);
    }
}
