/* requantize.h: rows of one type into rows of another. Portable C, no SIMD of its own. */
#ifndef PI_REQUANTIZE_H
#define PI_REQUANTIZE_H

#include "kernels.h"

typedef struct { /* plain rows, one after the other */
    const uint8_t *data;
    int32_t row_type;
    int64_t rows, columns;
} pi_plain;

typedef struct { /* Σ of squares: of what rounding took from values, and of the values */
    double lost, norm;
} pi_squares;

/* Rows [begin, end) as rows of type `to`, which pi_quantize_row must write, `stride` bytes apart at `out`. */
pi_squares pi_requantize_rows(const pi_kernels *kernels, const pi_plain *from, int64_t begin, int64_t end, int32_t to,
                              uint8_t *out, int64_t stride);
/* Columns [begin, end), whole blocks of their type, as such rows. */
pi_squares pi_requantize_columns(const pi_kernels *kernels, const pi_plain *from, int64_t begin, int64_t end,
                                 int32_t to, uint8_t *out, int64_t stride);
/* The first row with a value that is not finite, or -1. */
int64_t pi_first_not_finite(const pi_kernels *kernels, const pi_plain *from);

#endif
