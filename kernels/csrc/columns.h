/* columns.h: weights whose single columns can be left out, as the down projection of an FFN has a column for each
 * neuron. Portable C, no SIMD.
 *
 * A stored block of 32 or 256 columns is kept as it is, with the scales that all its columns share, but its codes lie
 * column by column. So nothing is rounded again, and a column that no activation needs is not read. Numbers of 16 rows
 * (a tile's) lie beside each other:
 *
 *   stored block   for each tile  d f16[16] [‖ m f16[16]]      then its blocks of 32 columns
 *   block          for each tile  K types: scale u8[16] ‖ minimum u8[16], Q6_K: scales i8[16] of both halves
 *                  then 32 columns, the codes of each as a sum row has them (bundle.h), of all rows
 */
#ifndef PI_COLUMNS_H
#define PI_COLUMNS_H

#include "bundle.h"

typedef struct {            /* bytes, but for `tiles` */
    int64_t tiles;          /* of 16 rows */
    int64_t header, packed; /* of one tile: in a stored block, and in a block of 32 columns */
    int64_t column;         /* the codes of one column */
    int64_t block, stored;  /* a block of 32 columns, and a stored block */
    pi_planar at;           /* where the codes of a column lie in it */
} pi_columns;

PI_DECODE pi_columns pi_columns_of(int32_t type, int64_t rows) {
    pi_columns c = {.tiles = (rows + PI_TILE - 1) / PI_TILE, .at = pi_planar_of(type, rows, 1)};
    c.header = pi_has_minimum(type) ? 64 : 32;
    c.packed = pi_is_super(type) ? 32 : 0;
    c.column = pi_round_up(c.at.bytes - c.at.high, 64);
    c.at.codes -= c.at.high;
    c.at.high = 0;
    c.block = pi_round_up(c.tiles * c.packed, 64) + PI_BLOCK * c.column;
    c.stored = pi_round_up(c.tiles * c.header, 64) + pi_subs(type) * c.block;
    return c;
}

/* Whether weights of that type and so many rows can be laid out like this. */
int pi_columns_possible(int32_t type, int64_t rows);
/* Stored blocks [first, last) of plain rows; `out`, the start of all, is zeroed. */
void pi_pack_columns(const uint8_t *source, int32_t type, int64_t rows, int64_t columns, int64_t first, int64_t last,
                     uint8_t *out);

#endif
