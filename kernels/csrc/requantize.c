/* requantize.c: see requantize.h. Pieces of 256 columns are whole blocks of every type. */
#include "requantize.h"
#include "transcode.h"

enum {
    WIDE = 256,
    ACROSS = 32,       /* rows of a tile: whole blocks of every type that is written */
    APART = WIDE + 16, /* so that the rows of a tile do not share the sets of a cache */
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* A few values at a time are added in single precision, in lanes that become vectors. */
static void add_squares(const float *made, const float *back, int64_t count, pi_squares *sums) {
    enum { LANES = 8, RUN = 64 };
    for (int64_t first = 0; first < count; first += RUN) {
        const int64_t end = min64(first + RUN, count);
        float lost[LANES] = {0}, norm[LANES] = {0};
        int64_t i = first;
        for (; i + LANES <= end; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                const float error = back[i + lane] - made[i + lane];
                lost[lane] += error * error;
                norm[lane] += made[i + lane] * made[i + lane];
            }
        for (; i < end; i++) {
            lost[0] += (back[i] - made[i]) * (back[i] - made[i]);
            norm[0] += made[i] * made[i];
        }
        for (int lane = 0; lane < LANES; lane++) sums->lost += (double)lost[lane], sums->norm += (double)norm[lane];
    }
}

/* `count` values, at most WIDE, into a row that begins at `out`. */
static void write_values(const pi_kernels *kernels, const float *values, int64_t count, int32_t to, uint8_t *out,
                         pi_squares *sums) {
    float back[WIDE];
    pi_quantize_row(values, to, count, out);
    kernels->dequantize_row(out, to, count, back);
    add_squares(values, back, count, sums);
}

static int64_t bytes_of(int32_t row_type, int64_t columns) {
    const pi_layout at = pi_layout_of(row_type);
    return columns / at.columns * at.bytes;
}

pi_squares pi_requantize_rows(const pi_kernels *kernels, const pi_plain *from, int64_t begin, int64_t end, int32_t to,
                              uint8_t *out, int64_t stride) {
    pi_squares sums = {0};
    const int64_t row_bytes = pi_row_bytes(from->row_type, from->columns);
    for (int64_t row = begin; row < end; row++)
        for (int64_t column = 0; column < from->columns; column += WIDE) {
            float values[WIDE];
            const int64_t count = min64(WIDE, from->columns - column);
            kernels->dequantize_row(from->data + row * row_bytes + bytes_of(from->row_type, column), from->row_type,
                                    count, values);
            write_values(kernels, values, count, to, out + (row - begin) * stride + bytes_of(to, column), &sums);
        }
    return sums;
}

pi_squares pi_requantize_columns(const pi_kernels *kernels, const pi_plain *from, int64_t begin, int64_t end,
                                 int32_t to, uint8_t *out, int64_t stride) {
    pi_squares sums = {0};
    float tile[ACROSS][APART], values[ACROSS];
    const int64_t row_bytes = pi_row_bytes(from->row_type, from->columns);
    for (int64_t row = 0; row < from->rows; row += ACROSS) {
        const int64_t across = min64(ACROSS, from->rows - row);
        for (int64_t column = begin; column < end; column += WIDE) {
            const int64_t count = min64(WIDE, end - column);
            const uint8_t *source = from->data + row * row_bytes + bytes_of(from->row_type, column);
            for (int64_t r = 0; r < across; r++)
                kernels->dequantize_row(source + r * row_bytes, from->row_type, count, tile[r]);
            for (int64_t c = 0; c < count; c++) {
                for (int64_t r = 0; r < across; r++) values[r] = tile[r][c];
                write_values(kernels, values, across, to, out + (column - begin + c) * stride + bytes_of(to, row),
                             &sums);
            }
        }
    }
    return sums;
}

/* Whether one of `count` halves of a word, `step` bytes apart, has all bits of `exponent` set. */
static int has_full(const uint8_t *p, int64_t count, int64_t step, uint16_t exponent) {
    int full = 0;
    for (int64_t i = 0; i < count; i++) full |= (pi_read_u16(p + i * step) & exponent) == exponent;
    return full;
}

static int values_finite(const pi_kernels *kernels, const uint8_t *row, int32_t row_type, int64_t columns) {
    float values[WIDE];
    for (int64_t column = 0; column < columns; column += WIDE) {
        const int64_t count = min64(WIDE, columns - column);
        kernels->dequantize_row(row + bytes_of(row_type, column), row_type, count, values);
        if (has_full((const uint8_t *)values + 2, count, 4, 0x7f80)) return 0;
    }
    return 1;
}

/* Codes are finite, so a block is as its scales of half precision are; other types are looked at value by value. */
static int row_finite(const pi_kernels *kernels, const uint8_t *row, int32_t row_type, int64_t columns) {
    const pi_layout at = pi_layout_of(row_type);
    const int64_t blocks = columns / at.columns;
#define PI_CASE(name) case PI_##name:
    switch (row_type) {
    case PI_F32: return !has_full(row + 2, columns, 4, 0x7f80);
    case PI_F16: return !has_full(row, columns, 2, 0x7c00);
    case PI_BF16: return !has_full(row, columns, 2, 0x7f80);
    case PI_IQ4_NL:
        PI_STORED_TYPES(PI_CASE)
        if (has_full(row + at.scales, blocks, at.bytes, 0x7c00)) return 0;
        return !pi_has_minimum(row_type) || !has_full(row + 2, blocks, at.bytes, 0x7c00);
    default: return values_finite(kernels, row, row_type, columns);
    }
#undef PI_CASE
}

int64_t pi_first_not_finite(const pi_kernels *kernels, const pi_plain *from) {
    const int64_t row_bytes = pi_row_bytes(from->row_type, from->columns);
    for (int64_t row = 0; row < from->rows; row++)
        if (!row_finite(kernels, from->data + row * row_bytes, from->row_type, from->columns)) return row;
    return -1;
}
