/* quantize_pack.c: sizes of the row formats, and the interleaving of 16 rows into a tile.
 *
 * A tile holds its stored blocks one after the other; every part of a block holds the 16 rows side by side.
 *   Q8_0        d f16[16] ‖ 8 lines                Q4_0   d ‖ 4 lines           Q5_0   d ‖ plane ‖ 4 lines
 *   Q4_1        d ‖ m f16[16] ‖ 4 lines            Q5_1   d ‖ m ‖ plane ‖ 4 lines
 *   Q4_K, Q5_K  d ‖ dmin ‖ 8 × (scale u8[16] ‖ minimum u8[16]) ‖ 8 × ([plane ‖] 4 lines)
 *   Q6_K        d ‖ 16 × scale i8[16] ‖ 8 × (plane 0 ‖ plane 1 ‖ 4 lines)
 *   IQ4_NL      d ‖ 4 lines      MXFP4   scale u8[16] ‖ 4 lines      FLOAT8_16   2 × scale u8[16] ‖ 4 lines
 *   TABLE_32    d f32[16] ‖ 8 × scale i8[16] ‖ 8 × 4 lines      TABLE_16, SIGNED_16   d ‖ 16 × scale ‖ 8 × 4 lines
 *   MINIMUM_16  d ‖ dmin ‖ 16 × u8[16] ‖ 8 × 4 lines
 *   F32, F16, BF16   one column after the other, 16 values each
 * A line has 64 bytes; byte 4r + c belongs to row r. Line j holds columns 4j + c of the block in its low nibbles
 * and columns 16 + 4j + c in its high nibbles (Q8_0: line j holds columns 4j + c as bytes). In the 5-bit plane,
 * bit b of byte 4r + c is bit 4 of column 4b + c. In the 6-bit planes, bits 2b and 2b + 1 are bits 4 and 5 of
 * column 4b + c (plane 0) or 16 + 4b + c (plane 1).
 */
#include "transcode.h"

int64_t pi_row_bytes(int32_t row_type, int64_t columns) {
    const pi_layout at = pi_layout_of(row_type);
    if (at.columns == 0 || columns <= 0 || columns % at.columns != 0) return 0;
    return columns / at.columns * at.bytes;
}

int64_t pi_tile_bytes(int32_t row_type, int64_t columns) {
    if (pi_row_bytes(row_type, columns) == 0) return 0;
    const pi_layout at = pi_layout_of(pi_form_of(row_type));
    return columns / at.columns * at.tile_bytes;
}

/* One row's 32 codes into its places in 4 lines, and its high bits into the planes before them. */
static void place_codes(int32_t row_type, const uint8_t code[32], int row, uint8_t *out) {
    const int planes = row_type == PI_Q6_K ? 2 : row_type == PI_Q5_0 || row_type == PI_Q5_1 || row_type == PI_Q5_K;
    uint8_t *line = out + 64 * planes;
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < 4; c++)
            line[64 * j + 4 * row + c] = (uint8_t)((code[4 * j + c] & 15) | (code[16 + 4 * j + c] & 15) << 4);
    for (int c = 0; c < 4 && planes == 1; c++) {
        unsigned bits = 0;
        for (int b = 0; b < 8; b++) bits |= (unsigned)(code[4 * b + c] >> 4) << b;
        out[4 * row + c] = (uint8_t)bits;
    }
    for (int c = 0; c < 4 && planes == 2; c++) {
        unsigned bits = 0;
        for (int b = 0; b < 8; b++) bits |= (unsigned)(code[4 * b + c] >> 4) << (2 * b);
        out[4 * row + c] = (uint8_t)bits;
        out[64 + 4 * row + c] = (uint8_t)(bits >> 8);
    }
}

/* The types whose bytes already lie as a line wants them: only dwords move. */
static void pack_bytes(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    const pi_layout at = pi_layout_of(row_type);
    const int lines = row_type == PI_Q8_0 ? 8 : 4;
    memcpy(out + 2 * row, source, 2);
    out += 32;
    if (pi_has_minimum(row_type)) {
        memcpy(out + 2 * row, source + 2, 2);
        out += 32;
    }
    for (int j = 0; j < lines; j++) memcpy(out + 64 * j + 4 * row, source + at.nibbles + 4 * j, 4);
}

static void pack_five_bits(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    uint8_t code[32];
    memcpy(out + 2 * row, source, 2);
    if (row_type == PI_Q5_1) memcpy(out + 32 + 2 * row, source + 2, 2);
    pi_decode_codes(row_type, source, 0, code);
    place_codes(row_type, code, row, out + (row_type == PI_Q5_1 ? 64 : 32));
}

static void pack_q45_k(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    uint8_t code[32];
    memcpy(out + 2 * row, source, 2);
    memcpy(out + 32 + 2 * row, source + 2, 2);
    for (int sub = 0; sub < 8; sub++) {
        uint8_t *scales = out + 64 + 32 * sub;
        pi_sub_scale(source + 4, sub, scales + row, scales + 16 + row);
        pi_decode_codes(row_type, source, sub, code);
        place_codes(row_type, code, row, out + 320 + sub * (row_type == PI_Q5_K ? 320 : 256));
    }
}

static void pack_q6_k(const uint8_t *source, int row, uint8_t *out) {
    uint8_t code[32];
    memcpy(out + 2 * row, source + 208, 2);
    for (int k = 0; k < 16; k++) out[32 + 16 * k + row] = source[192 + k];
    for (int sub = 0; sub < 8; sub++) {
        pi_decode_codes(PI_Q6_K, source, sub, code);
        place_codes(PI_Q6_K, code, row, out + 288 + 384 * sub);
    }
}

/* The forms whose scales are f32 or bytes: numbers of 16 rows beside each other, in the order of the block. */
static void pack_form(int32_t form, const uint8_t *source, int row, uint8_t *out) {
    const pi_layout at = pi_layout_of(form);
    const int wide = pi_has_f32(form) ? at.scales : 0;
    for (int i = 0; i < wide; i += 4) memcpy(out + 16 * i + 4 * row, source + i, 4);
    for (int i = wide; i < at.nibbles; i++) out[16 * i + row] = source[i];
    for (int i = at.nibbles; i < at.bytes; i += 4) memcpy(out + 16 * i + 4 * row, source + i, 4);
}

static void pack_block(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    switch (row_type) {
    case PI_F32: memcpy(out + 4 * row, source, 4); break;
    case PI_F16:
    case PI_BF16: memcpy(out + 2 * row, source, 2); break;
    case PI_Q8_0:
    case PI_Q4_0:
    case PI_IQ4_NL:
    case PI_Q4_1: pack_bytes(row_type, source, row, out); break;
    case PI_Q5_0:
    case PI_Q5_1: pack_five_bits(row_type, source, row, out); break;
    case PI_Q4_K:
    case PI_Q5_K: pack_q45_k(row_type, source, row, out); break;
    case PI_Q6_K: pack_q6_k(source, row, out); break;
    default: pack_form(row_type, source, row, out); break;
    }
}

/* One stored block of any type, which may become several blocks of its form. */
static void pack_stored(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    const int32_t form = pi_form_of(row_type);
    if (form == row_type) {
        pack_block(row_type, source, row, out);
        return;
    }
    uint8_t blocks[PI_FORM_BYTES];
    const pi_layout to = pi_layout_of(form);
    pi_transcode_block(row_type, source, blocks);
    for (int b = 0; b < pi_layout_of(row_type).columns / to.columns; b++)
        pack_block(form, blocks + b * to.bytes, row, out + b * to.tile_bytes);
}

/* Columns advance in the outer loop of a run of blocks that stays in cache, so that both sides are read and
 * written in long pieces. */
void pi_pack_tiles(const uint8_t *source, int32_t row_type, int64_t rows, int64_t columns, int64_t tile0, int64_t tile1,
                   uint8_t *out) {
    enum { RUN = 16 };
    const pi_layout at = pi_layout_of(row_type);
    const int64_t row_bytes = pi_row_bytes(row_type, columns), tile_bytes = pi_tile_bytes(row_type, columns);
    const int64_t blocks = columns / at.columns, block_bytes = tile_bytes / blocks;
    for (int64_t tile = tile0; tile < tile1; tile++) {
        uint8_t *to = out + tile * tile_bytes;
        const int64_t first = tile * PI_TILE;
        const int present = rows - first < PI_TILE ? (int)(rows - first) : PI_TILE;
        if (present < PI_TILE) memset(to, 0, (size_t)tile_bytes);
        for (int64_t run = 0; run < blocks; run += RUN) {
            const int64_t end = run + RUN < blocks ? run + RUN : blocks;
            for (int row = 0; row < present; row++)
                for (int64_t b = run; b < end; b++)
                    pack_stored(row_type, source + (first + row) * row_bytes + b * at.bytes, row, to + b * block_bytes);
        }
    }
}
