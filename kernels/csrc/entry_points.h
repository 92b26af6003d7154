/* Declares the entry points of the instruction set being compiled. Included by each body, so that a definition
 * that differs from its declaration does not compile. */
#ifndef PI_ENTRY_POINTS_H
#define PI_ENTRY_POINTS_H

#include "kernels.h"

void PI_FN(quantize_acts)(const float *x, int64_t columns, int8_t *q, float *d, float *s);
void PI_FN(matmul)(const pi_matrix *m, const float *x, const pi_acts *a, int64_t token0, int64_t tokens, int64_t tile0,
                   int64_t tile1, const float *bias, int accumulate, float *out, int64_t out_stride);
void PI_FN(product_rows)(const pi_rows *w, const int32_t *index, int64_t count, int64_t begin, int64_t end,
                         const pi_ahead *ahead, const float *x, const pi_acts *a, int64_t token, float *out);
void PI_FN(product_many_rows)(const pi_rows *w, const int32_t *index, int64_t count, int64_t tile0, int64_t tile1,
                              const float *x, const pi_acts *a, int64_t tokens, float *out, int64_t stride);
void PI_FN(sum_rows)(const pi_rows *r, const int32_t *index, const float *h, int64_t count, int64_t column0,
                     int64_t column1, void *scratch, float *y);
int PI_FN(sum_chunk)(const pi_rows *r, const int32_t *index, const float *h, int64_t count, const pi_ahead *ahead,
                     void *scratch, float *y, float *terms);
void PI_FN(add_terms)(const pi_rows *r, const float *terms, int64_t column0, int64_t column1, float *y);
void PI_FN(sum_all_rows)(const pi_rows *r, const float *h, int64_t tokens, int64_t column0, int64_t column1, float *y);
void PI_FN(sum_columns)(const pi_matrix *m, const int8_t *q, const float *d, const float *s, int64_t line0,
                        int64_t line1, float *y);
void PI_FN(dequantize_row)(const uint8_t *row, int32_t row_type, int64_t columns, float *out);
void PI_FN(rms_norm)(const float *x, const float *weight, float eps, int64_t width, float *out);
void PI_FN(layer_norm)(const float *x, const float *weight, const float *bias, float eps, int64_t width, float *out);
void PI_FN(rope)(float *x, const float *cos, const float *sin, int64_t heads, int64_t head_dim, int64_t half, int neox);
void PI_FN(add)(const float *x, int64_t count, float *out);
void PI_FN(scale)(float factor, int64_t count, float *x);
void PI_FN(activate)(int32_t kind, float cut, const float *gate, const float *up, int64_t count, float *out);
void PI_FN(multiply)(const float *x, int64_t repeat, int64_t first, int64_t count, float *out);
void PI_FN(add_scaled)(const float *x, float factor, int64_t count, float *out);
void PI_FN(map)(int32_t kind, const float constants[4], int64_t count, float *x);
void PI_FN(l2_norm)(const float *x, float eps, int64_t width, float *out);
void PI_FN(keep_top)(const float *x, float deviations, int64_t width, float *out);
int64_t PI_FN(list_active)(const float *value, const float *threshold, int64_t count, int32_t *index);
int64_t PI_FN(list_large)(const float *value, const float *threshold, int64_t count, int32_t *index);
void PI_FN(keep_large)(const float *value, const float *threshold, int64_t count, float *out);
void PI_FN(sign_code)(const float *x, int64_t width, uint32_t *code);
void PI_FN(sign_scores)(const uint32_t *signs, const uint32_t *code, int64_t width, int64_t rows, int64_t tile0,
                        int64_t tile1, float *out);
void PI_FN(store_kv)(const float *k, const float *v, const pi_cache *cache, int64_t position);
void PI_FN(attend)(const pi_query *queries, int64_t count, const pi_cache *cache, int64_t kv_head, float scale,
                   float softcap, float *scratch);
void PI_FN(convolve)(const float *x, const float *weight, const float *bias, int64_t length, int64_t width,
                     int64_t begin, int64_t end, int silu, float *state, float *out);
void PI_FN(scan_channels)(const float *x, const float *step, const float *decay, const float *in, const float *read,
                          const float *direct, int64_t size, int64_t width, int64_t begin, int64_t end, float *state,
                          float *out);
void PI_FN(scan_head)(const float *x, float step, float decay, const float *in, const float *read, float direct,
                      int64_t size, int64_t width, float *state, float *out);
void PI_FN(delta_head)(const float *q, const float *k, const float *v, const float *decay, int64_t decays, float rate,
                       float scale, int64_t size, int64_t width, float *state, float *out);
void PI_FN(general_delta_head)(const float *q, const float *k, const float *v, const float *decay, const float *unit,
                               const float *rate, int64_t size, int64_t width, float *state, float *out);
void PI_FN(observe)(const float *restrict act, const float *restrict factor, int64_t count, uint64_t *restrict counts,
                    double *restrict gate_squares, double *restrict up_squares, int32_t *restrict bins);
uint64_t PI_FN(read_memory)(const uint8_t *data, int64_t bytes);

#endif
