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

enum { RUN_BYTES = 8 << 10 /* of a tile, which all its rows fill in turn: less than the fastest cache holds */ };

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

/* Everything below is inlined for a constant type: what is left of a block are loads, shifts and stores of four bytes. */
#define PI_BYTES(x) ((uint32_t)(x) * 0x01010101u) /* a byte, four times */

PI_DECODE void store_u32(uint8_t *p, uint32_t bytes) { memcpy(p, &bytes, 4); }

PI_DECODE uint64_t nibbles_of(const uint8_t *codes, int shift) {
    uint64_t eight;
    memcpy(&eight, codes, 8);
    return eight >> shift & 0x0f0f0f0f0f0f0f0fu;
}

/* The 4-bit codes of 32 columns, which lie `shift` bits up in 32 bytes, into the row's places in 4 lines. */
PI_DECODE void pack_nibbles(const uint8_t *codes, int shift, int row, uint8_t *lines) {
    for (int j = 0; j < 4; j += 2) {
        const uint64_t both = nibbles_of(codes + 4 * j, shift) | nibbles_of(codes + 16 + 4 * j, shift) << 4;
        store_u32(lines + 64 * j + 4 * row, (uint32_t)both);
        store_u32(lines + 64 * j + 64 + 4 * row, (uint32_t)(both >> 32));
    }
}

/* `count` groups of four bytes with `width` bits of a code each, `shift` bits up, into four bytes of a plane. */
PI_DECODE void pack_plane(const uint8_t *high, int count, int shift, int width, int row, uint8_t *plane) {
    uint32_t bits = 0;
    for (int b = 0; b < count; b++)
        bits |= (pi_read_u32(high + 4 * b) >> shift & PI_BYTES((1 << width) - 1)) << (width * b);
    store_u32(plane + 4 * row, bits);
}

/* Bits 0, 4, 8, … 28 beside each other. */
PI_DECODE uint8_t each_fourth_bit(uint32_t bits) {
    bits &= 0x11111111u;
    bits = (bits | bits >> 3) & 0x03030303u;
    bits = (bits | bits >> 6) & 0x000f000fu;
    return (uint8_t)((bits | bits >> 12) & 255u);
}

/* Scales, then codes that already lie as a line wants them: only dwords move. Of 5-bit codes, the fifth bits lie in
 * one word, that of column 4b + c at bit 4b + c. */
PI_DECODE void pack_bytes(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    const pi_layout at = pi_layout_of(row_type);
    const int lines = row_type == PI_Q8_0 ? 8 : 4;
    memcpy(out + 2 * row, source, 2);
    out += 32;
    if (pi_has_minimum(row_type)) {
        memcpy(out + 2 * row, source + 2, 2);
        out += 32;
    }
    if (at.high) {
        const uint32_t bits = pi_read_u32(source + at.high);
        for (int c = 0; c < 4; c++) out[4 * row + c] = each_fourth_bit(bits >> c);
        out += 64;
    }
    for (int j = 0; j < lines; j++) memcpy(out + 64 * j + 4 * row, source + at.nibbles + 4 * j, 4);
}

PI_DECODE void pack_q45_k(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    const pi_layout at = pi_layout_of(row_type);
    memcpy(out + 2 * row, source, 2);
    memcpy(out + 32 + 2 * row, source + 2, 2);
    for (int sub = 0; sub < 8; sub++) {
        uint8_t *scales = out + 64 + 32 * sub, *codes = out + 320 + sub * (row_type == PI_Q5_K ? 320 : 256);
        pi_sub_scale(source + 4, sub, scales + row, scales + 16 + row);
        if (row_type == PI_Q5_K) {
            pack_plane(source + at.high, 8, sub, 1, row, codes);
            codes += 64;
        }
        pack_nibbles(source + at.nibbles + 32 * (sub / 2), 4 * (sub % 2), row, codes);
    }
}

PI_DECODE void pack_q6_k(const uint8_t *source, int row, uint8_t *out) {
    const pi_layout at = pi_layout_of(PI_Q6_K);
    memcpy(out + 2 * row, source + at.scales, 2);
    for (int k = 0; k < 16; k++) out[32 + 16 * k + row] = source[192 + k];
    for (int sub = 0; sub < 8; sub++) {
        const uint8_t *high = source + at.high + 32 * (sub / 4);
        uint8_t *codes = out + 288 + 384 * sub;
        pack_plane(high, 4, 2 * (sub % 4), 2, row, codes);
        pack_plane(high + 16, 4, 2 * (sub % 4), 2, row, codes + 64);
        pack_nibbles(source + at.nibbles + 64 * (sub / 4) + 32 * (sub % 2), 4 * (sub / 2 % 2), row, codes + 128);
    }
}

/* The forms whose scales are f32 or bytes: numbers of 16 rows beside each other, in the order of the block. */
PI_DECODE void pack_form(int32_t form, const uint8_t *source, int row, uint8_t *out) {
    const pi_layout at = pi_layout_of(form);
    const int wide = pi_has_f32(form) ? at.scales : 0;
    for (int i = 0; i < wide; i += 4) memcpy(out + 16 * i + 4 * row, source + i, 4);
    for (int i = wide; i < at.nibbles; i++) out[16 * i + row] = source[i];
    for (int i = at.nibbles; i < at.bytes; i += 4) memcpy(out + 16 * i + 4 * row, source + i, 4);
}

PI_DECODE void pack_block(int32_t row_type, const uint8_t *source, int row, uint8_t *out) {
    switch (row_type) {
    case PI_F32: memcpy(out + 4 * row, source, 4); break;
    case PI_F16:
    case PI_BF16: memcpy(out + 2 * row, source, 2); break;
    case PI_Q8_0:
    case PI_Q4_0:
    case PI_IQ4_NL:
    case PI_Q4_1:
    case PI_Q5_0:
    case PI_Q5_1: pack_bytes(row_type, source, row, out); break;
    case PI_Q4_K:
    case PI_Q5_K: pack_q45_k(row_type, source, row, out); break;
    case PI_Q6_K: pack_q6_k(source, row, out); break;
    default: pack_form(row_type, source, row, out); break;
    }
}

/* Blocks beside each other of one row of one of the types that are computed as stored. */
PI_DECODE void pack_blocks(int32_t row_type, const uint8_t *source, int64_t count, int row, uint8_t *out) {
    const pi_layout at = pi_layout_of(row_type);
    for (int64_t b = 0; b < count; b++) pack_block(row_type, source + b * at.bytes, row, out + b * at.tile_bytes);
}

/* The same of a type that becomes another form: one stored block may become several blocks of it. */
static void pack_transcoded(int32_t row_type, const uint8_t *source, int64_t count, int row, uint8_t *out) {
    const int32_t form = pi_form_of(row_type);
    const pi_layout at = pi_layout_of(row_type), to = pi_layout_of(form);
    const int blocks = at.columns / to.columns;
    uint8_t block[PI_FORM_BYTES];
    for (int64_t b = 0; b < count; b++, source += at.bytes, out += blocks * to.tile_bytes) {
        pi_transcode_block(row_type, source, block);
        for (int i = 0; i < blocks; i++) {
            const uint8_t *made = block + i * to.bytes;
            if (form == PI_Q4_0) /* the one form that is a stored type, too: those of TQ1_0 and TQ2_0 */
                pack_bytes(PI_Q4_0, made, row, out + i * to.tile_bytes);
            else
                pack_form(form, made, row, out + i * to.tile_bytes);
        }
    }
}

static void pack_row(int32_t row_type, const uint8_t *source, int64_t count, int row, uint8_t *out) {
#define PI_PACK(type) \
    case PI_##type: pack_blocks(PI_##type, source, count, row, out); break;
    switch (row_type) {
        PI_QUANTIZED_TYPES(PI_PACK)
        PI_FLOAT_TYPES(PI_PACK)
    default: pack_transcoded(row_type, source, count, row, out); break;
    }
#undef PI_PACK
}

/* Columns advance in the outer loop of a run of blocks that stays in cache, so that both sides are read and
 * written in long pieces. */
void pi_pack_tiles(const uint8_t *source, int32_t row_type, int64_t rows, int64_t columns, int64_t tile0, int64_t tile1,
                   uint8_t *out) {
    const pi_layout at = pi_layout_of(row_type);
    const int64_t row_bytes = pi_row_bytes(row_type, columns), tile_bytes = pi_tile_bytes(row_type, columns);
    const int64_t blocks = columns / at.columns, block_bytes = tile_bytes / blocks;
    const int64_t run = block_bytes < RUN_BYTES ? RUN_BYTES / block_bytes : 1;
    for (int64_t tile = tile0; tile < tile1; tile++) {
        uint8_t *to = out + tile * tile_bytes;
        const int64_t first = tile * PI_TILE;
        const int present = rows - first < PI_TILE ? (int)(rows - first) : PI_TILE;
        if (present < PI_TILE) memset(to, 0, (size_t)tile_bytes);
        for (int64_t b = 0; b < blocks; b += run)
            for (int row = 0; row < present; row++)
                pack_row(row_type, source + (first + row) * row_bytes + b * at.bytes,
                         b + run < blocks ? run : blocks - b, row, to + b * block_bytes);
    }
}
