/* simd_scalar.h: simd.h in portable C11. The definition the other instruction sets are checked against. */
#ifndef PI_SIMD_SCALAR_H
#define PI_SIMD_SCALAR_H

#define PI_REGISTERS 16
#define PI_DOT_US_WIDE 0

typedef struct {
    float l[16];
} v16f;
typedef struct {
    int32_t l[16];
} v16i;
typedef v16i v16p;
typedef struct {
    uint8_t l[64];
} v64b;

#define PI_LANES for (int i = 0; i < 16; i++)
#define PI_BYTES for (int i = 0; i < 64; i++)
#define PI_UNARY(type, name, expression) \
    PI_INLINE type name(type a) {        \
        type r;                          \
        PI_LANES r.l[i] = expression;    \
        return r;                        \
    }
#define PI_BINARY(type, name, expression) \
    PI_INLINE type name(type a, type b) { \
        type r;                           \
        PI_LANES r.l[i] = expression;     \
        return r;                         \
    }

PI_INLINE v16f v16f_set1(float x) {
    v16f r;
    PI_LANES r.l[i] = x;
    return r;
}
PI_INLINE v16f v16f_zero(void) { return v16f_set1(0.0f); }
PI_INLINE v16f v16f_load(const float *p) {
    v16f r;
    memcpy(r.l, p, 64);
    return r;
}
PI_INLINE void v16f_store(float *p, v16f a) { memcpy(p, a.l, 64); }
PI_INLINE v16f v16f_load_n(const float *p, int n) {
    v16f r = v16f_zero();
    memcpy(r.l, p, (size_t)n * 4);
    return r;
}
PI_INLINE void v16f_store_n(float *p, v16f a, int n) { memcpy(p, a.l, (size_t)n * 4); }
PI_BINARY(v16f, v16f_add, a.l[i] + b.l[i])
PI_BINARY(v16f, v16f_sub, a.l[i] - b.l[i])
PI_BINARY(v16f, v16f_mul, a.l[i] * b.l[i])
PI_BINARY(v16f, v16f_div, a.l[i] / b.l[i])
PI_BINARY(v16f, v16f_min, a.l[i] < b.l[i] ? a.l[i] : b.l[i])
PI_BINARY(v16f, v16f_max, a.l[i] > b.l[i] ? a.l[i] : b.l[i])
PI_UNARY(v16f, v16f_sqrt, sqrtf(a.l[i]))
PI_UNARY(v16f, v16f_neg, pi_f32_of_bits(pi_bits_of_f32(a.l[i]) ^ 0x80000000u))
PI_UNARY(v16f, v16f_abs, pi_f32_of_bits(pi_bits_of_f32(a.l[i]) & 0x7fffffffu))
PI_INLINE v16f v16f_fma(v16f a, v16f b, v16f c) {
    v16f r;
    PI_LANES r.l[i] = fmaf(a.l[i], b.l[i], c.l[i]);
    return r;
}
PI_INLINE v16f v16f_select_gt(v16f a, v16f b, v16f x, v16f y) {
    v16f r;
    PI_LANES r.l[i] = a.l[i] > b.l[i] ? x.l[i] : y.l[i];
    return r;
}
PI_INLINE uint32_t v16f_mask_above(v16f a, v16f b) {
    uint32_t mask = 0;
    PI_LANES mask |= (uint32_t)!(a.l[i] <= b.l[i]) << i;
    return mask;
}
PI_INLINE v16f v16f_load_f16(const uint16_t *p) {
    v16f r;
    PI_LANES r.l[i] = pi_f16_to_f32(p[i]);
    return r;
}
PI_INLINE v16f v16f_set1_f16(uint16_t x) { return v16f_set1(pi_f16_to_f32(x)); }
PI_INLINE void v16f_store_f16(uint16_t *p, v16f a) { PI_LANES p[i] = pi_f32_to_f16(a.l[i]); }
PI_INLINE v16f v16f_load_bf16(const uint16_t *p) {
    v16f r;
    PI_LANES r.l[i] = pi_bf16_to_f32(p[i]);
    return r;
}
PI_INLINE v16f v16f_from_i32(v16i a) {
    v16f r;
    PI_LANES r.l[i] = (float)a.l[i];
    return r;
}
PI_INLINE v16f v16f_pow2i(v16i a) {
    v16f r;
    PI_LANES r.l[i] = pi_f32_of_bits(((uint32_t)a.l[i] + 127u) << 23);
    return r;
}
PI_INLINE float v16f_sum(v16f a) {
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) a.l[i] = a.l[i] + a.l[i + step];
    return a.l[0];
}
PI_INLINE float v16f_hmax(v16f a) {
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) a.l[i] = a.l[i] > a.l[i + step] ? a.l[i] : a.l[i + step];
    return a.l[0];
}

PI_INLINE v16i v16i_set1(int32_t x) {
    v16i r;
    PI_LANES r.l[i] = x;
    return r;
}
PI_INLINE v16i v16i_zero(void) { return v16i_set1(0); }
PI_INLINE v16i v16i_load(const int32_t *p) {
    v16i r;
    memcpy(r.l, p, 64);
    return r;
}
PI_INLINE void v16i_store(int32_t *p, v16i a) { memcpy(p, a.l, 64); }
PI_BINARY(v16i, v16i_add, (int32_t)((uint32_t)a.l[i] + (uint32_t)b.l[i]))
PI_BINARY(v16i, v16i_sub, (int32_t)((uint32_t)a.l[i] - (uint32_t)b.l[i]))
PI_BINARY(v16i, v16i_mul, (int32_t)((uint32_t)a.l[i] * (uint32_t)b.l[i]))
PI_BINARY(v16i, v16i_min, a.l[i] < b.l[i] ? a.l[i] : b.l[i])
PI_BINARY(v16i, v16i_max, a.l[i] > b.l[i] ? a.l[i] : b.l[i])
PI_BINARY(v16i, v16i_and, a.l[i] & b.l[i])
PI_BINARY(v16i, v16i_or, a.l[i] | b.l[i])
PI_BINARY(v16i, v16i_xor, a.l[i] ^ b.l[i])
PI_INLINE v16i v16i_slli(v16i a, int n) {
    PI_LANES a.l[i] = (int32_t)((uint32_t)a.l[i] << n);
    return a;
}
PI_INLINE v16i v16i_srli(v16i a, int n) {
    PI_LANES a.l[i] = (int32_t)((uint32_t)a.l[i] >> n);
    return a;
}
PI_INLINE v16i v16i_srai(v16i a, int n) {
    PI_LANES a.l[i] = a.l[i] >> n;
    return a;
}
PI_INLINE v16i v16i_from_f32_rne(v16f a) {
    v16i r;
    PI_LANES r.l[i] = fabsf(a.l[i]) < 0x1p31f ? (int32_t)lrintf(a.l[i]) : INT32_MIN;
    return r;
}
PI_INLINE v16i v16i_from_i8(const int8_t *p) {
    v16i r;
    PI_LANES r.l[i] = p[i];
    return r;
}
PI_INLINE v16i v16i_from_u8(const uint8_t *p) {
    v16i r;
    PI_LANES r.l[i] = p[i];
    return r;
}
PI_INLINE void v16i_store_i8(int8_t *p, v16i a) {
    PI_LANES p[i] = (int8_t)(a.l[i] > 127 ? 127 : a.l[i] < -128 ? -128 : a.l[i]);
}
PI_INLINE void v16i_store_i16(int16_t *p, v16i a) {
    PI_LANES p[i] = (int16_t)(a.l[i] < -32768 ? -32768 : a.l[i] > 32767 ? 32767 : a.l[i]);
}
PI_INLINE v16f v16i_as_f32(v16i a) {
    v16f r;
    memcpy(&r, &a, 64);
    return r;
}
PI_INLINE v16i v16f_as_i32(v16f a) {
    v16i r;
    memcpy(&r, &a, 64);
    return r;
}
PI_INLINE int32_t v16i_hmax(v16i a) {
    int32_t m = a.l[0];
    PI_LANES m = a.l[i] > m ? a.l[i] : m;
    return m;
}
PI_INLINE int32_t v16i_sum(v16i a) {
    uint32_t s = 0;
    PI_LANES s += (uint32_t)a.l[i];
    return (int32_t)s;
}

PI_INLINE v64b v64b_load(const void *p) {
    v64b r;
    memcpy(r.l, p, 64);
    return r;
}
PI_INLINE void v64b_store(void *p, v64b a) { memcpy(p, a.l, 64); }
PI_INLINE v64b v64b_set1(uint8_t x) {
    v64b r;
    memset(r.l, x, 64);
    return r;
}
PI_INLINE v64b v64b_quad(const int8_t *p) {
    v64b r;
    PI_LANES memcpy(r.l + 4 * i, p, 4);
    return r;
}
PI_INLINE v64b v64b_repeat16(const void *p) {
    v64b r;
    for (int i = 0; i < 4; i++) memcpy(r.l + 16 * i, p, 16);
    return r;
}
PI_INLINE v64b v64b_lookup(v64b table, v64b a) {
    PI_BYTES a.l[i] = table.l[a.l[i]];
    return a;
}
PI_INLINE v64b v64b_and(v64b a, v64b b) {
    PI_BYTES a.l[i] &= b.l[i];
    return a;
}
PI_INLINE v64b v64b_or(v64b a, v64b b) {
    PI_BYTES a.l[i] |= b.l[i];
    return a;
}
PI_INLINE v64b v64b_xor(v64b a, v64b b) {
    PI_BYTES a.l[i] ^= b.l[i];
    return a;
}
PI_INLINE v64b v64b_srl4(v64b a) {
    PI_BYTES a.l[i] >>= 4;
    return a;
}
PI_INLINE v64b v64b_sll16(v64b a, int n) {
    for (int i = 0; i < 64; i += 2) {
        const uint32_t u = (uint32_t)(a.l[i] | a.l[i + 1] << 8) << n;
        a.l[i] = (uint8_t)u, a.l[i + 1] = (uint8_t)(u >> 8);
    }
    return a;
}
PI_INLINE v64b v64b_srl16(v64b a, int n) {
    for (int i = 0; i < 64; i += 2) {
        const uint32_t u = (uint32_t)(a.l[i] | a.l[i + 1] << 8) >> n;
        a.l[i] = (uint8_t)u, a.l[i + 1] = (uint8_t)(u >> 8);
    }
    return a;
}
PI_INLINE void v64b_transpose16(const uint8_t *const rows[16], int64_t at, v64b line[4]) {
    for (int j = 0; j < 4; j++) PI_LANES memcpy(line[j].l + 4 * i, rows[i] + at + 4 * j, 4);
}

PI_INLINE v64b v64b_add_ones(v64b acc, v64b a, int n) {
    PI_BYTES acc.l[i] = (uint8_t)(acc.l[i] + (__builtin_popcount(a.l[i]) << n));
    return acc;
}
PI_INLINE v16i v64b_as_i32(v64b a) {
    v16i r;
    memcpy(&r, &a, 64);
    return r;
}
PI_INLINE v64b v16i_as_bytes(v16i a) {
    v64b r;
    memcpy(&r, &a, 64);
    return r;
}
PI_INLINE v16f v16f_rows4_f32(const uint8_t *const rows[4], int64_t at) {
    v16f r;
    for (int i = 0; i < 4; i++) memcpy(r.l + 4 * i, rows[i] + at, 16);
    return r;
}
PI_INLINE v16f v16f_rows4_f16(const uint8_t *const rows[4], int64_t at) {
    uint16_t lane[16];
    for (int i = 0; i < 4; i++) memcpy(lane + 4 * i, rows[i] + at, 8);
    return v16f_load_f16(lane);
}
PI_INLINE v16f v16f_rows4_bf16(const uint8_t *const rows[4], int64_t at) {
    uint16_t lane[16];
    for (int i = 0; i < 4; i++) memcpy(lane + 4 * i, rows[i] + at, 8);
    return v16f_load_bf16(lane);
}
PI_INLINE int32_t pi_pair(uint32_t low, uint32_t high) { return (int32_t)((low & 0xffffu) | high << 16); }
PI_INLINE v16i v16i_low_words(v16i a, v16i b) {
    PI_LANES a.l[i] = pi_pair((uint32_t)a.l[i], (uint32_t)b.l[i]);
    return a;
}
PI_INLINE uint32_t pi_word(v16i a, int w) { return (uint32_t)a.l[w / 2] >> 16 * (w % 2); }
PI_INLINE v16i v16i_zip_low(v16i a, v16i b) {
    v16i r;
    PI_LANES r.l[i] = pi_pair(pi_word(a, i / 4 * 8 + i % 4), pi_word(b, i / 4 * 8 + i % 4));
    return r;
}
PI_INLINE v16i v16i_zip_high(v16i a, v16i b) {
    v16i r;
    PI_LANES r.l[i] = pi_pair(pi_word(a, i / 4 * 8 + 4 + i % 4), pi_word(b, i / 4 * 8 + 4 + i % 4));
    return r;
}
PI_INLINE v16i v16i_sra16(v16i a, int n) {
    PI_LANES a.l[i] = pi_pair((uint32_t)((int16_t)a.l[i] >> n), (uint32_t)((int16_t)(a.l[i] >> 16) >> n));
    return a;
}
PI_INLINE v16i v16i_repeat2(const int32_t *p) {
    v16i r;
    PI_LANES r.l[i] = p[i % 2];
    return r;
}
PI_INLINE v16i v16i_evens(v16i a, v16i b) {
    v16i r;
    PI_LANES r.l[i] = i < 8 ? a.l[2 * i] : b.l[2 * i - 16];
    return r;
}
PI_INLINE v16i v16i_odds(v16i a, v16i b) {
    v16i r;
    PI_LANES r.l[i] = i < 8 ? a.l[2 * i + 1] : b.l[2 * i - 15];
    return r;
}
PI_INLINE v16i v16i_dot_words(v16i acc, v16i w, v16i x) {
    PI_LANES {
        const int32_t low = (int16_t)w.l[i] * (int16_t)x.l[i], high = (w.l[i] >> 16) * (x.l[i] >> 16);
        acc.l[i] = (int32_t)((uint32_t)acc.l[i] + (uint32_t)low + (uint32_t)high);
    }
    return acc;
}
PI_INLINE v64b v64b_rows2(const void *p, const void *q) {
    v64b r;
    memcpy(r.l, p, 32);
    memcpy(r.l + 32, q, 32);
    return r;
}
PI_INLINE v64b v64b_two(const void *p) { return v64b_rows2(p, p); }
PI_INLINE v16f v16f_two(const float *p) {
    v16f r;
    PI_LANES r.l[i] = p[i % 8];
    return r;
}
PI_INLINE v16f v16f_two_f16(const uint8_t *p, const uint8_t *q) {
    uint16_t lane[16];
    memcpy(lane, p, 16);
    memcpy(lane + 8, q, 16);
    return v16f_load_f16(lane);
}
PI_INLINE v16i v16i_two_i8(const uint8_t *p, const uint8_t *q) {
    v16i r;
    PI_LANES r.l[i] = (int8_t)(i < 8 ? p[i] : q[i - 8]);
    return r;
}
PI_INLINE v16i v16i_two_u8(const uint8_t *p, const uint8_t *q) {
    v16i r;
    PI_LANES r.l[i] = i < 8 ? p[i] : q[i - 8];
    return r;
}
PI_INLINE void v16f_columns8(const float *p, v16f out[8]) {
    for (int c = 0; c < 8; c++) PI_LANES out[c].l[i] = p[8 * i + c];
}
PI_INLINE v16f v16f_halves(float x, float y) {
    v16f r;
    PI_LANES r.l[i] = i < 8 ? x : y;
    return r;
}
PI_INLINE v16f v16f_halves_f16(uint16_t x, uint16_t y) { return v16f_halves(pi_f16_to_f32(x), pi_f16_to_f32(y)); }
PI_INLINE v16f v16f_repeat4(const float *p) {
    v16f r;
    PI_LANES r.l[i] = p[i % 4];
    return r;
}

PI_INLINE v16i v16i_dot_us(v16i acc, v64b w, v64b x) {
    PI_LANES for (int c = 4 * i; c < 4 * i + 4; c++) acc.l[i] += w.l[c] * (int8_t)x.l[c];
    return acc;
}
PI_INLINE v16i v16i_dot_ss(v16i acc, v64b w, v64b x) {
    PI_LANES for (int c = 4 * i; c < 4 * i + 4; c++) acc.l[i] += (int8_t)w.l[c] * (int8_t)x.l[c];
    return acc;
}
PI_INLINE v16p v16p_zero(void) { return v16i_zero(); }
PI_INLINE v16p v16p_dot_us(v16p acc, v64b w, v64b x) { return v16i_dot_us(acc, w, x); }
PI_INLINE v16p v16p_add(v16p a, v16p b) { return v16i_add(a, b); }
PI_INLINE v16p v16p_sub(v16p a, v16p b) { return v16i_sub(a, b); }
PI_INLINE v16p v16p_offset(const int8_t *p, int k) { return v16i_set1(k * v16i_sum(v16i_from_i8(p))); }
PI_INLINE v16i v16i_from_pairs(v16p acc) { return acc; }
PI_INLINE v16i v16i_scale_pairs(v16i sum, v16p acc, v16i k) { return v16i_add(sum, v16i_mul(acc, k)); }

#undef PI_LANES
#undef PI_BYTES
#undef PI_UNARY
#undef PI_BINARY
#endif
