/* transcode.h: the forms in which rows are computed.
 *
 * Most GGUF types are computed as they are stored. The others hold scales times one of at most 16 small integers, packed
 * for size; they are rewritten when they are packed, exactly, into one of these forms of 4-bit codes (pi_layout_of has
 * the places; nibbles as in Q4_0):
 *
 *   SIGNED_16    d f32 ‖ 16 × scale i8 ‖ codes      256 columns   d · scale · (code - 4)                  Q3_K
 *   MINIMUM_16   d, dmin f32 ‖ 16 × u8 ‖ codes      256 columns   d · (u8 & 15) · code - dmin · (u8 >> 4)  Q2_K
 *   TABLE_32     d f32 ‖ 8 × scale i8 ‖ codes       256 columns   d · scale · table[code]    IQ4_XS IQ3_* IQ2_XXS IQ1_S
 *   TABLE_16     d f32 ‖ 16 × scale i8 ‖ codes      256 columns   the same                             IQ2_XS IQ2_S IQ1_M
 *   FLOAT8_16    2 × scale E4M3 ‖ codes              32 columns   scale / 2 · table[code]                 NVFP4
 *   Q4_0                                                                                              TQ1_0 TQ2_0
 *
 * IQ4_NL and MXFP4 are blocks of 32 codes through a table as they are. Grids and signs of the IQ types are resolved; the
 * grids come from outside, once (pi_set_grid).
 */
#ifndef PI_TRANSCODE_H
#define PI_TRANSCODE_H

#include "rows_decode.h"

enum { PI_FORM_BYTES = 176 /* most bytes that a stored block becomes */ };

/* The form of a type: the type itself where it is computed as stored. */
int32_t pi_form_of(int32_t row_type);
/* What the 16 codes of a type stand for; NULL for types without a table. */
const int8_t *pi_table_of(int32_t row_type);
/* One stored block of `row_type` (with a form of its own, and its grid set) into blocks of its form. */
void pi_transcode_block(int32_t row_type, const uint8_t *p, uint8_t *out);

/* Bytes of the grid of a type: points × values of a point; 0 for types without. */
int64_t pi_grid_bytes(int32_t row_type);
int pi_has_grid(int32_t row_type);
/* Keeps a copy of a grid of numbers of magnitudes; -1 where there is no memory. */
int pi_set_grid(int32_t row_type, const uint8_t *codes);

#endif
