/* bundle.h: how the rows of one neuron lie in memory where single neurons are picked. Portable C, no SIMD.
 *
 * A bundle is the record of one neuron: a gate row, an up row and a down row, or some of them, one after the other.
 * Each row is planar: its scales first, then high bits, then the codes, so that a row is read as a few long runs.
 * Float rows stay as they are. Two forms of quantised rows differ in where the codes lie:
 *
 * Product rows (gate, up) are multiplied with activations: eight blocks of 32 columns are a group (the last one may have
 * fewer, n), whose codes lie as those of a tile (quantize_pack.c), with its blocks in place of rows. A line has a dword of
 * every block, so 4n bytes. Byte c of dword l belongs to block l of the group:
 *   4-bit codes   lines 0..3: columns 4j + c (low nibble) and 16 + 4j + c (high nibble) in line j
 *   Q8_0          lines 0..7: column 4j + c in line j
 *   5-bit plane   a line before those of the nibbles: bits j and j + 4 belong to columns 4j + c and 16 + 4j + c
 *   6-bit planes  two such lines: bits 2j and 2j + 1 of the first for column 4j + c, of the second for 16 + 4j + c
 * Kernels read whole lines of eight blocks, further than the last group goes, and leave out what they read there.
 *
 * Sum rows (down) are added up two neurons at a time, as 16-bit words. Zipping the lines of two rows (v16i_zip_low and
 * _high) gives 16 dwords twice, one per lane, with a word of each row. "Word l of half h" is the one that gets into lane
 * l of the h-th: word 8 (l / 4) + 4h + l mod 4 of the line. 64 columns are four vectors: lanes take turns in the units
 * that have a scale, so that the codes of a word have the same. Of 2 units (4 where 16 columns have a scale), lane l of
 * vector n is column 8n + l / 2 (4n + l / 4) of unit l mod 2 (l mod 4).
 *   4-bit codes   64 bytes per 128 columns: vector n of the h-th 64 is nibble n of the words of half h
 *   Q8_0          64 bytes per 64 columns: vectors 2h and 2h + 1 are the bytes of the words of half h
 * Codes of 5 or 6 bits, and those that stand for numbers of a table, become bytes in a kernel: vectors 0 and 1 from the
 * low nibbles of each word's bytes, 2 and 3 from the high ones. Their high bits (w = 1 or 2 of them) lie likewise:
 *   high bits     64 bytes per 512 / w columns: words of half h have those of the h-th half of these columns, the j-th
 *                 64 of them in bits 2wj.. (vectors 0 and 1) and 2wj + w.. (2 and 3) of each byte
 * Kernels do not take the codes of a word apart (bundle_sum.h): words are signed, so 8 is subtracted from the topmost
 * code of 4 bits, and a byte of Q8_0 that is not the topmost gets 128 added.
 * Columns are filled up with zeros to whole lines.
 *
 * Scales: f16 d per block, then m per block. Q4_K and Q5_K: d and dmin per super-block, then 8-bit scales, then
 * minima, per block. Q6_K: d per super-block, then 8-bit scales per 16 columns (product rows: those of all first
 * halves of blocks, then those of the second halves). Forms (transcode.h): d, and dmin, as f32 per 256 columns, then the
 * scales of a byte as of Q6_K, TABLE_32 one per block. MXFP4 and FLOAT8_16: scales of a byte alone.
 */
#ifndef PI_BUNDLE_H
#define PI_BUNDLE_H

#include "transcode.h"

enum { PI_LINE_COLUMNS = 128, PI_LINE_BLOCKS = 4, PI_GROUP_BLOCKS = 8 };

typedef struct {       /* of one row, in bytes from its start */
    int64_t minimum;   /* of the f16 minima (K types: dmin) */
    int64_t scales[2]; /* of the 8-bit scales, and of the minima or of the second halves' scales */
    int64_t high, codes, bytes;
} pi_planar;

PI_DECODE int64_t pi_round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
PI_DECODE int pi_code_bits(int32_t type) {
    return type == PI_Q8_0 ? 8 : type == PI_Q6_K ? 6 : type == PI_Q5_0 || type == PI_Q5_1 || type == PI_Q5_K ? 5 : 4;
}
/* Of sum rows: lines whose high bits share 64 bytes, if there are any. */
PI_DECODE int pi_lines_of_plane(int32_t type) { return type == PI_Q6_K ? 2 : 4; }
PI_DECODE int pi_has_plane(int32_t type) { return pi_code_bits(type) == 5 || pi_code_bits(type) == 6; }
/* Of product rows: lines of a group's high bits, and of its high bits and codes. */
PI_DECODE int pi_plane_lines(int32_t type) { return pi_code_bits(type) == 8 ? 0 : pi_code_bits(type) - 4; }
PI_DECODE int pi_group_lines(int32_t type) { return pi_code_bits(type); }

/* Of sum rows: how far the codes of a word lie apart where they are multiplied. */
PI_DECODE int pi_sum_step(int32_t type) { return pi_code_bits(type) == 4 && !pi_has_table(type) ? 4 : 8; }

PI_DECODE pi_planar pi_planar_of(int32_t type, int64_t columns, int is_sum) {
    pi_planar at = {0};
    if (pi_is_float(type)) {
        at.bytes = pi_round_up(columns * pi_layout_of(type).bytes, 8);
        return at;
    }
    const int64_t lines = pi_round_up(columns, PI_LINE_COLUMNS) / PI_LINE_COLUMNS;
    const int64_t blocks = columns / PI_BLOCK, padded = lines * PI_LINE_BLOCKS, supers = columns / 256;
    int64_t end;
    if (type == PI_MXFP4 || type == PI_FLOAT8_16 || pi_has_f32(type)) {
        at.minimum = 4 * supers;
        at.scales[0] = pi_has_f32(type) ? (type == PI_MINIMUM_16 ? 8 : 4) * supers : 0;
        at.scales[1] = at.scales[0] + padded;
        end = at.scales[0] + (pi_has_halves(type) ? 2 : 1) * padded;
    } else if (pi_is_super(type)) {
        at.minimum = 2 * supers;
        at.scales[0] = type == PI_Q6_K ? 2 * supers : 4 * supers;
        at.scales[1] = at.scales[0] + padded;
        end = at.scales[1] + padded;
    } else {
        at.minimum = 2 * padded;
        end = (pi_has_minimum(type) ? 4 : 2) * padded;
    }
    const int64_t unit = columns >= 2048 ? 64 : 8; /* long rows: whole cache lines */
    at.high = at.codes = pi_round_up(end, unit);
    if (is_sum && pi_has_plane(type))
        at.codes += 64 * (pi_round_up(lines, pi_lines_of_plane(type)) / pi_lines_of_plane(type));
    const int64_t code_bytes =
        is_sum ? padded * (pi_code_bits(type) == 8 ? 32 : 16) : blocks * 4 * pi_group_lines(type);
    at.bytes = pi_round_up(at.codes + code_bytes, unit);
    return at;
}

/* Scratch of one thread for sum_rows: per unit (32 or 16 columns, read 16 at a time) the coefficients of a chunk's pairs
 * and three numbers more, and a sum per column. */
PI_DECODE int64_t pi_sum_units(int64_t columns) { return pi_round_up(columns, 256) / 16 + 32; }
PI_DECODE int64_t pi_sum_scratch_bytes(int64_t columns) {
    return (pi_sum_units(columns) * (PI_CHUNK / 2 + 3) + pi_round_up(columns, PI_LINE_COLUMNS)) * 4;
}

/* Adds the 32 codes of block `block` to a sum row whose bytes were zero. */
void pi_place_sum(int32_t type, const uint8_t code[32], int64_t block, const pi_planar *at, uint8_t *out);
/* Floats of the terms of one chunk (kernels.h: sum_chunk): a sum per column, in whole lines, then a scale and a minimum
 * per unit. y = fma(scale, sum, y) + minimum; of float rows the sums alone are added. */
PI_DECODE int64_t pi_sum_terms(int64_t columns) {
    return pi_round_up(columns, PI_LINE_COLUMNS) + 2 * pi_sum_units(columns);
}
/* Writes one plain GGUF row in planar form; `out` has pi_planar_of(...).bytes zeroed bytes. */
void pi_pack_planar(const uint8_t *row, int32_t type, int64_t columns, int is_sum, uint8_t *out);

#endif
