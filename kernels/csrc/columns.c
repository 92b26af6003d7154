/* columns.c: plain rows into columns (columns.h). */
#include "columns.h"

int pi_columns_possible(int32_t type, int64_t rows) {
#define PI_CASE(name) case PI_##name:
    switch (type) {
        PI_STORED_TYPES(PI_CASE)
        return rows % PI_BLOCK == 0;
    default: return 0;
    }
#undef PI_CASE
}

/* The scales of row `row` of a stored block at p. */
static void place_scales(const uint8_t *p, int32_t type, int64_t row, const pi_columns *c, uint8_t *stored) {
    const int64_t tile = row / PI_TILE, lane = row % PI_TILE;
    uint8_t *header = stored + tile * c->header, *block = stored + pi_round_up(c->tiles * c->header, 64);
    memcpy(header + 2 * lane, p + pi_layout_of(type).scales, 2);
    if (pi_has_minimum(type)) memcpy(header + 32 + 2 * lane, p + 2, 2);
    for (int sub = 0; sub < 8 && pi_is_super(type); sub++, block += c->block) {
        uint8_t *packed = block + tile * c->packed + lane;
        if (type == PI_Q6_K)
            packed[0] = p[192 + 2 * sub], packed[16] = p[193 + 2 * sub];
        else
            pi_sub_scale(p + 4, sub, packed, packed + 16);
    }
}

/* The codes of 32 rows from `row` on: those of a column go to its place, block of rows `row` / 32. */
static void place_codes(const uint8_t *p, int32_t type, int64_t row_bytes, int64_t row, int sub, const pi_columns *c,
                        uint8_t *columns) {
    uint8_t code[PI_BLOCK][PI_BLOCK], of_column[PI_BLOCK];
    for (int r = 0; r < PI_BLOCK; r++) pi_decode_codes(type, p + r * row_bytes, sub, code[r]);
    for (int k = 0; k < PI_BLOCK; k++) {
        for (int r = 0; r < PI_BLOCK; r++) of_column[r] = code[r][k];
        pi_place_sum(type, of_column, row / PI_BLOCK, &c->at, columns + k * c->column);
    }
}

void pi_pack_columns(const uint8_t *source, int32_t type, int64_t rows, int64_t columns, int64_t first, int64_t last,
                     uint8_t *out) {
    const pi_columns c = pi_columns_of(type, rows);
    const int64_t row_bytes = pi_row_bytes(type, columns), bytes = pi_layout_of(type).bytes;
    for (int64_t b = first; b < last; b++) {
        uint8_t *stored = out + b * c.stored, *block = stored + pi_round_up(c.tiles * c.header, 64);
        for (int64_t row = 0; row < rows; row++)
            place_scales(source + row * row_bytes + b * bytes, type, row, &c, stored);
        for (int sub = 0; sub < pi_subs(type); sub++, block += c.block)
            for (int64_t row = 0; row < rows; row += PI_BLOCK)
                place_codes(source + row * row_bytes + b * bytes, type, row_bytes, row, sub, &c,
                            block + pi_round_up(c.tiles * c.packed, 64));
    }
}
