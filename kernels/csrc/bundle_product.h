/* bundle_product.h: product rows (bundle.h), two at a time and eight blocks each: a block in every lane, the first row's
 * in lanes 0..7. The codes of a group of blocks lie as those of a tile, with blocks in place of rows. */
#ifndef PI_BUNDLE_PRODUCT_H
#define PI_BUNDLE_PRODUCT_H

#include "bundle.h"
#include "matmul_run.h"

enum { PAIRS_OF_ROWS = PI_TILE / 2 };

typedef struct { /* 16 rows; where fewer are left the last one fills up */
    const uint8_t *row[PI_TILE];
    const uint8_t *next[PI_TILE]; /* the rows after these, asked for while these are computed */
    const int8_t *table;          /* what codes stand for, where they do (transcode.h) */
    int present;
} row_group;

static inline const uint8_t *row_at(const pi_rows *w, const int32_t *index, int64_t k) {
    return w->data + (int64_t)(index ? index[k] : k) * w->stride;
}

/* Row k of the list; past its end those of `ahead`, and past that one's the last one again. */
static inline const uint8_t *next_row(const pi_rows *w, const int32_t *index, int64_t count, int64_t k,
                                      const pi_ahead *ahead) {
    if (k < count || !ahead || ahead->count == 0) return row_at(w, index, k < count ? k : count - 1);
    const int64_t beyond = k - count;
    return row_at(ahead->rows, ahead->index, beyond < ahead->count ? beyond : ahead->count - 1);
}

static __attribute__((unused)) row_group group_at(const pi_rows *w, const int32_t *index, int64_t count, int64_t first,
                                                  int64_t end, const pi_ahead *ahead) {
    row_group g = {.table = w->table};
    g.present = end - first < PI_TILE ? (int)(end - first) : PI_TILE;
    const int64_t then = first + PI_TILE, gap = then > count ? then - count : 0;
    for (int r = 0; r < PI_TILE; r++) {
        g.row[r] = row_at(w, index, first + (r < g.present ? r : g.present - 1));
        g.next[r] = next_row(w, index, count, then + r - gap, ahead);
    }
    return g;
}

/* Scales of a group of rows a and b, of a type with scales of a byte: see scales_of_pair. */
PI_INLINE pi_scales form_scales_of_pair(int type, const uint8_t *a, const uint8_t *b, const pi_planar *p,
                                        int64_t group) {
    const int64_t first = p->scales[0] + PI_GROUP_BLOCKS * group, second = p->scales[1] + PI_GROUP_BLOCKS * group;
    const int is_signed = type == PI_TABLE_32 || type == PI_TABLE_16 || type == PI_SIGNED_16;
    pi_scales at = {v16f_set1(1.0f), v16f_zero(), {v16i_zero(), v16i_zero()}};
    at.sub[0] = is_signed ? v16i_two_i8(a + first, b + first) : v16i_two_u8(a + first, b + first);
    if (pi_has_halves(type))
        at.sub[1] = is_signed ? v16i_two_i8(a + second, b + second) : v16i_two_u8(a + second, b + second);
    if (pi_has_f32(type)) at.scale = v16f_halves(pi_read_f32(a + 4 * group), pi_read_f32(b + 4 * group));
    if (type == PI_MINIMUM_16) {
        const int64_t dmin = p->minimum + 4 * group;
        at.minimum = v16f_neg(v16f_halves(pi_read_f32(a + dmin), pi_read_f32(b + dmin)));
    }
    if (type == PI_MXFP4) at.scale = pi_half_e8m0s(at.sub[0]);
    if (type == PI_TABLE_32) at.scale = v16f_mul(at.scale, v16f_from_i32(at.sub[0]));
    if (type == PI_FLOAT8_16)
        for (int half = 0; half < 2; half++) at.sub[half] = v16f_as_i32(pi_half_e4m3s(at.sub[half]));
    return at;
}

/* Scales of group `group` of rows a and b; lanes past the row's end are any numbers. */
PI_INLINE pi_scales scales_of_pair(int type, const uint8_t *a, const uint8_t *b, const pi_planar *p, int64_t group) {
    const int64_t first = p->scales[0] + PI_GROUP_BLOCKS * group, second = p->scales[1] + PI_GROUP_BLOCKS * group;
    pi_scales at = {v16f_zero(), v16f_zero(), {v16i_zero(), v16i_zero()}};
    if (type == PI_MXFP4 || type == PI_FLOAT8_16 || pi_has_f32(type)) return form_scales_of_pair(type, a, b, p, group);
    if (!pi_is_super(type)) {
        at.scale = v16f_two_f16(a + 16 * group, b + 16 * group);
        if (pi_has_minimum(type)) at.minimum = v16f_two_f16(a + p->minimum + 16 * group, b + p->minimum + 16 * group);
        return at;
    }
    const v16f d = v16f_halves_f16(pi_read_u16(a + 2 * group), pi_read_u16(b + 2 * group));
    if (type == PI_Q6_K) {
        at.scale = d;
        at.sub[0] = v16i_two_i8(a + first, b + first);
        at.sub[1] = v16i_two_i8(a + second, b + second);
        return at;
    }
    const v16f m = v16f_halves_f16(pi_read_u16(a + p->minimum + 2 * group), pi_read_u16(b + p->minimum + 2 * group));
    at.scale = v16f_mul(d, v16f_from_i32(v16i_two_u8(a + first, b + first)));
    at.minimum = v16f_mul(v16f_neg(m), v16f_from_i32(v16i_two_u8(a + second, b + second)));
    return at;
}

/* Bytes from one line of a group of `blocks` blocks to the next. */
PI_INLINE int64_t line_bytes(int blocks) { return 4 * blocks; }

/* The codes of quads j and j + 4 of a group of rows a and b, whose lines are `bytes` apart. */
PI_INLINE void pair_quads(int type, const uint8_t *a, const uint8_t *b, v64b table, int64_t bytes, int j, v64b *low,
                          v64b *high) {
    const int64_t at = bytes * (pi_planes(type) + j), second = at + 4 * bytes;
    const v64b first = v64b_rows2(a + at, b + at);
    const v64b line[2] = {first, type == PI_Q8_0 ? v64b_rows2(a + second, b + second) : first};
    const v64b plane[2] = {pi_planes(type) ? v64b_rows2(a, b) : first,
                           pi_planes(type) == 2 ? v64b_rows2(a + bytes, b + bytes) : first};
    pi_quads_of(type, table, line, plane, j, low, high);
}

#endif
