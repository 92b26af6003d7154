/* simd_neon.h: simd.h on four 128-bit registers (AArch64). Uses the dot-product instructions when compiled for them. */
#ifndef PI_SIMD_NEON_H
#define PI_SIMD_NEON_H

#include <arm_neon.h>

#define PI_REGISTERS 32
#define PI_DOT_US_WIDE 0

typedef struct {
    float32x4_t v[4];
} v16f;
typedef struct {
    int32x4_t v[4];
} v16i;
typedef struct {
    uint8x16_t v[4];
} v64b;
typedef v16i v16p;

#define PI_PARTS for (int k = 0; k < 4; k++)
#define PI_UNARY(out, in, name, expression) \
    PI_INLINE out name(in a) {              \
        out r;                              \
        PI_PARTS r.v[k] = expression;       \
        return r;                           \
    }
#define PI_BINARY(type, name, expression) \
    PI_INLINE type name(type a, type b) { \
        type r;                           \
        PI_PARTS r.v[k] = expression;     \
        return r;                         \
    }

PI_INLINE v16f v16f_set1(float x) {
    v16f r;
    PI_PARTS r.v[k] = vdupq_n_f32(x);
    return r;
}
PI_INLINE v16f v16f_zero(void) { return v16f_set1(0.0f); }
PI_INLINE v16f v16f_load(const float *p) {
    v16f r;
    PI_PARTS r.v[k] = vld1q_f32(p + 4 * k);
    return r;
}
PI_INLINE void v16f_store(float *p, v16f a) { PI_PARTS vst1q_f32(p + 4 * k, a.v[k]); }
PI_INLINE v16f v16f_load_n(const float *p, int n) {
    float lane[16] = {0};
    memcpy(lane, p, (size_t)n * 4);
    return v16f_load(lane);
}
PI_INLINE void v16f_store_n(float *p, v16f a, int n) {
    float lane[16];
    v16f_store(lane, a);
    memcpy(p, lane, (size_t)n * 4);
}
PI_BINARY(v16f, v16f_add, vaddq_f32(a.v[k], b.v[k]))
PI_BINARY(v16f, v16f_sub, vsubq_f32(a.v[k], b.v[k]))
PI_BINARY(v16f, v16f_mul, vmulq_f32(a.v[k], b.v[k]))
PI_BINARY(v16f, v16f_div, vdivq_f32(a.v[k], b.v[k]))
/* Not vminq/vmaxq: those return NaN where either operand is NaN, and order -0 below +0. */
PI_BINARY(v16f, v16f_min, vbslq_f32(vcltq_f32(a.v[k], b.v[k]), a.v[k], b.v[k]))
PI_BINARY(v16f, v16f_max, vbslq_f32(vcgtq_f32(a.v[k], b.v[k]), a.v[k], b.v[k]))
PI_UNARY(v16f, v16f, v16f_sqrt, vsqrtq_f32(a.v[k]))
PI_UNARY(v16f, v16f, v16f_neg, vnegq_f32(a.v[k]))
PI_UNARY(v16f, v16f, v16f_abs, vabsq_f32(a.v[k]))
PI_INLINE v16f v16f_fma(v16f a, v16f b, v16f c) {
    PI_PARTS c.v[k] = vfmaq_f32(c.v[k], a.v[k], b.v[k]);
    return c;
}
PI_INLINE v16f v16f_select_gt(v16f a, v16f b, v16f x, v16f y) {
    PI_PARTS y.v[k] = vbslq_f32(vcgtq_f32(a.v[k], b.v[k]), x.v[k], y.v[k]);
    return y;
}
PI_INLINE uint32_t v16f_mask_above(v16f a, v16f b) {
    static const uint32_t bit[4] = {1, 2, 4, 8};
    uint32_t mask = 0;
    PI_PARTS mask |= vaddvq_u32(vbicq_u32(vld1q_u32(bit), vcleq_f32(a.v[k], b.v[k]))) << (4 * k);
    return mask;
}
PI_INLINE v16f v16f_load_f16(const uint16_t *p) {
    v16f r;
    PI_PARTS r.v[k] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * k)));
    return r;
}
PI_INLINE v16f v16f_set1_f16(uint16_t x) {
    v16f r;
    PI_PARTS r.v[k] = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x)));
    return r;
}
PI_INLINE void v16f_store_f16(uint16_t *p, v16f a) {
    PI_PARTS vst1_u16(p + 4 * k, vreinterpret_u16_f16(vcvt_f16_f32(a.v[k])));
}
PI_INLINE v16f v16f_load_bf16(const uint16_t *p) {
    v16f r;
    PI_PARTS r.v[k] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * k), 16));
    return r;
}
PI_UNARY(v16f, v16i, v16f_from_i32, vcvtq_f32_s32(a.v[k]))
PI_INLINE float v16f_sum(v16f a) {
    const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
PI_INLINE float v16f_hmax(v16f a) {
    const v16f b = {{a.v[2], a.v[3], a.v[2], a.v[3]}}, eight = v16f_max(a, b);
    const v16f c = {{eight.v[1], eight.v[1], eight.v[1], eight.v[1]}}, four = v16f_max(eight, c);
    float m[4];
    vst1q_f32(m, four.v[0]);
    m[0] = m[0] > m[2] ? m[0] : m[2];
    m[1] = m[1] > m[3] ? m[1] : m[3];
    return m[0] > m[1] ? m[0] : m[1];
}

PI_INLINE v16i v16i_set1(int32_t x) {
    v16i r;
    PI_PARTS r.v[k] = vdupq_n_s32(x);
    return r;
}
PI_INLINE v16i v16i_zero(void) { return v16i_set1(0); }
PI_INLINE v16i v16i_load(const int32_t *p) {
    v16i r;
    PI_PARTS r.v[k] = vld1q_s32(p + 4 * k);
    return r;
}
PI_INLINE void v16i_store(int32_t *p, v16i a) { PI_PARTS vst1q_s32(p + 4 * k, a.v[k]); }
PI_BINARY(v16i, v16i_add, vaddq_s32(a.v[k], b.v[k]))
PI_BINARY(v16i, v16i_sub, vsubq_s32(a.v[k], b.v[k]))
PI_BINARY(v16i, v16i_mul, vmulq_s32(a.v[k], b.v[k]))
PI_BINARY(v16i, v16i_min, vminq_s32(a.v[k], b.v[k]))
PI_BINARY(v16i, v16i_max, vmaxq_s32(a.v[k], b.v[k]))
PI_BINARY(v16i, v16i_and, vandq_s32(a.v[k], b.v[k]))
PI_BINARY(v16i, v16i_or, vorrq_s32(a.v[k], b.v[k]))
PI_BINARY(v16i, v16i_xor, veorq_s32(a.v[k], b.v[k]))
PI_INLINE v16i v16i_slli(v16i a, int n) {
    PI_PARTS a.v[k] = vshlq_s32(a.v[k], vdupq_n_s32(n));
    return a;
}
PI_INLINE v16i v16i_srai(v16i a, int n) {
    PI_PARTS a.v[k] = vshlq_s32(a.v[k], vdupq_n_s32(-n));
    return a;
}
PI_INLINE v16i v16i_srli(v16i a, int n) {
    PI_PARTS a.v[k] = vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v[k]), vdupq_n_s32(-n)));
    return a;
}
/* The conversion itself saturates and turns NaN into 0; simd.h wants INT32_MIN for all of these. */
PI_INLINE v16i v16i_from_f32_rne(v16f a) {
    v16i r;
    PI_PARTS {
        const uint32x4_t fits = vcltq_f32(vabsq_f32(a.v[k]), vdupq_n_f32(0x1p31f));
        r.v[k] = vbslq_s32(fits, vcvtnq_s32_f32(a.v[k]), vdupq_n_s32(INT32_MIN));
    }
    return r;
}
PI_INLINE v16i v16i_from_i8(const int8_t *p) {
    const int8x16_t b = vld1q_s8(p);
    const int16x8_t lo = vmovl_s8(vget_low_s8(b)), hi = vmovl_s8(vget_high_s8(b));
    return (v16i){{vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)), vmovl_s16(vget_low_s16(hi)),
                   vmovl_s16(vget_high_s16(hi))}};
}
PI_INLINE v16i v16i_from_u8(const uint8_t *p) {
    const uint8x16_t b = vld1q_u8(p);
    const uint16x8_t lo = vmovl_u8(vget_low_u8(b)), hi = vmovl_u8(vget_high_u8(b));
    return (v16i){
        {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(lo))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(lo))),
         vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(hi))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(hi)))}};
}
PI_INLINE void v16i_store_i8(int8_t *p, v16i a) {
    const int16x8_t lo = vcombine_s16(vqmovn_s32(a.v[0]), vqmovn_s32(a.v[1]));
    const int16x8_t hi = vcombine_s16(vqmovn_s32(a.v[2]), vqmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(lo), vqmovn_s16(hi)));
}
PI_INLINE void v16i_store_i16(int16_t *p, v16i a) {
    for (int k = 0; k < 4; k++) vst1_s16(p + 4 * k, vqmovn_s32(a.v[k]));
}
PI_UNARY(v16f, v16i, v16i_as_f32, vreinterpretq_f32_s32(a.v[k]))
PI_UNARY(v16i, v16f, v16f_as_i32, vreinterpretq_s32_f32(a.v[k]))
PI_INLINE v16f v16f_pow2i(v16i n) { return v16i_as_f32(v16i_slli(v16i_add(n, v16i_set1(127)), 23)); }
PI_INLINE int32_t v16i_hmax(v16i a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}
PI_INLINE int32_t v16i_sum(v16i a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}

PI_INLINE v64b v64b_load(const void *p) {
    v64b r;
    PI_PARTS r.v[k] = vld1q_u8((const uint8_t *)p + 16 * k);
    return r;
}
PI_INLINE void v64b_store(void *p, v64b a) { PI_PARTS vst1q_u8((uint8_t *)p + 16 * k, a.v[k]); }
PI_INLINE v64b v64b_set1(uint8_t x) {
    v64b r;
    PI_PARTS r.v[k] = vdupq_n_u8(x);
    return r;
}
PI_INLINE v64b v64b_quad(const int8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    v64b r;
    PI_PARTS r.v[k] = vreinterpretq_u8_u32(vdupq_n_u32(four));
    return r;
}
PI_INLINE v64b v64b_repeat16(const void *p) {
    const uint8x16_t v = vld1q_u8((const uint8_t *)p);
    v64b r;
    PI_PARTS r.v[k] = v;
    return r;
}
PI_BINARY(v64b, v64b_lookup, vqtbl1q_u8(a.v[k], b.v[k]))
PI_BINARY(v64b, v64b_and, vandq_u8(a.v[k], b.v[k]))
PI_BINARY(v64b, v64b_or, vorrq_u8(a.v[k], b.v[k]))
PI_BINARY(v64b, v64b_xor, veorq_u8(a.v[k], b.v[k]))
PI_UNARY(v64b, v64b, v64b_srl4, vshrq_n_u8(a.v[k], 4))
PI_INLINE v64b v64b_sll16(v64b a, int n) {
    PI_PARTS a.v[k] = vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(a.v[k]), vdupq_n_s16((int16_t)n)));
    return a;
}
PI_INLINE v64b v64b_srl16(v64b a, int n) { return v64b_sll16(a, -n); }
PI_INLINE void v64b_transpose16(const uint8_t *const rows[16], int64_t at, v64b line[4]) {
    PI_PARTS {
        uint32x4_t r[4];
        for (int i = 0; i < 4; i++) r[i] = vreinterpretq_u32_u8(vld1q_u8(rows[4 * k + i] + at));
        const uint64x2_t a01 = vreinterpretq_u64_u32(vzip1q_u32(r[0], r[1]));
        const uint64x2_t b01 = vreinterpretq_u64_u32(vzip2q_u32(r[0], r[1]));
        const uint64x2_t a23 = vreinterpretq_u64_u32(vzip1q_u32(r[2], r[3]));
        const uint64x2_t b23 = vreinterpretq_u64_u32(vzip2q_u32(r[2], r[3]));
        line[0].v[k] = vreinterpretq_u8_u64(vzip1q_u64(a01, a23));
        line[1].v[k] = vreinterpretq_u8_u64(vzip2q_u64(a01, a23));
        line[2].v[k] = vreinterpretq_u8_u64(vzip1q_u64(b01, b23));
        line[3].v[k] = vreinterpretq_u8_u64(vzip2q_u64(b01, b23));
    }
}

PI_INLINE v64b v64b_add_ones(v64b acc, v64b a, int n) {
    const int8x16_t shift = vdupq_n_s8((int8_t)n);
    PI_PARTS acc.v[k] = vaddq_u8(acc.v[k], vshlq_u8(vcntq_u8(a.v[k]), shift));
    return acc;
}
PI_INLINE v16i v64b_as_i32(v64b a) {
    v16i r;
    PI_PARTS r.v[k] = vreinterpretq_s32_u8(a.v[k]);
    return r;
}
PI_INLINE v64b v16i_as_bytes(v16i a) {
    v64b r;
    PI_PARTS r.v[k] = vreinterpretq_u8_s32(a.v[k]);
    return r;
}
PI_INLINE v16f v16f_rows4_f32(const uint8_t *const rows[4], int64_t at) {
    v16f r;
    PI_PARTS r.v[k] = vreinterpretq_f32_u8(vld1q_u8(rows[k] + at));
    return r;
}
PI_INLINE v16f v16f_rows4_f16(const uint8_t *const rows[4], int64_t at) {
    v16f r;
    PI_PARTS r.v[k] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(rows[k] + at)));
    return r;
}
PI_INLINE v16f v16f_rows4_bf16(const uint8_t *const rows[4], int64_t at) {
    v16f r;
    PI_PARTS r.v[k] = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(rows[k] + at)), 16));
    return r;
}
PI_INLINE v16i v16i_low_words(v16i a, v16i b) {
    PI_PARTS a.v[k] = vsliq_n_s32(a.v[k], b.v[k], 16);
    return a;
}
PI_INLINE v16i v16i_zip_low(v16i a, v16i b) {
    PI_PARTS a.v[k] = vreinterpretq_s32_s16(vzip1q_s16(vreinterpretq_s16_s32(a.v[k]), vreinterpretq_s16_s32(b.v[k])));
    return a;
}
PI_INLINE v16i v16i_zip_high(v16i a, v16i b) {
    PI_PARTS a.v[k] = vreinterpretq_s32_s16(vzip2q_s16(vreinterpretq_s16_s32(a.v[k]), vreinterpretq_s16_s32(b.v[k])));
    return a;
}
PI_INLINE v16i v16i_sra16(v16i a, int n) {
    PI_PARTS a.v[k] = vreinterpretq_s32_s16(vshlq_s16(vreinterpretq_s16_s32(a.v[k]), vdupq_n_s16((int16_t)-n)));
    return a;
}
PI_INLINE v16i v16i_repeat2(const int32_t *p) {
    const int32x2_t two = vld1_s32(p);
    v16i r;
    PI_PARTS r.v[k] = vcombine_s32(two, two);
    return r;
}
PI_INLINE v16i v16i_evens(v16i a, v16i b) {
    return (v16i){{vuzp1q_s32(a.v[0], a.v[1]), vuzp1q_s32(a.v[2], a.v[3]), vuzp1q_s32(b.v[0], b.v[1]),
                   vuzp1q_s32(b.v[2], b.v[3])}};
}
PI_INLINE v16i v16i_odds(v16i a, v16i b) {
    return (v16i){{vuzp2q_s32(a.v[0], a.v[1]), vuzp2q_s32(a.v[2], a.v[3]), vuzp2q_s32(b.v[0], b.v[1]),
                   vuzp2q_s32(b.v[2], b.v[3])}};
}
PI_INLINE v16i v16i_dot_words(v16i acc, v16i w, v16i x) {
    PI_PARTS {
        const int16x8_t a = vreinterpretq_s16_s32(w.v[k]), b = vreinterpretq_s16_s32(x.v[k]);
        const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
        acc.v[k] = vaddq_s32(acc.v[k], vpaddq_s32(low, high));
    }
    return acc;
}
PI_INLINE v64b v64b_rows2(const void *p, const void *q) {
    v64b r;
    PI_PARTS r.v[k] = vld1q_u8((const uint8_t *)(k < 2 ? p : q) + 16 * (k % 2));
    return r;
}
PI_INLINE v64b v64b_two(const void *p) { return v64b_rows2(p, p); }
PI_INLINE v16f v16f_two(const float *p) {
    v16f r;
    PI_PARTS r.v[k] = vld1q_f32(p + 4 * (k % 2));
    return r;
}
PI_INLINE v16f v16f_two_f16(const uint8_t *p, const uint8_t *q) {
    v16f r;
    PI_PARTS r.v[k] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((k < 2 ? p : q) + 8 * (k % 2))));
    return r;
}
PI_INLINE v16i v16i_two_i8(const uint8_t *p, const uint8_t *q) {
    int8_t lane[16];
    memcpy(lane, p, 8);
    memcpy(lane + 8, q, 8);
    return v16i_from_i8(lane);
}
PI_INLINE v16i v16i_two_u8(const uint8_t *p, const uint8_t *q) {
    uint8_t lane[16];
    memcpy(lane, p, 8);
    memcpy(lane + 8, q, 8);
    return v16i_from_u8(lane);
}
PI_INLINE void v16f_columns8(const float *p, v16f out[8]) {
    PI_PARTS for (int h = 0; h < 2; h++) { /* rows 4k..4k+3, columns 4h..4h+3 */
        float32x4_t r[4];
        for (int i = 0; i < 4; i++) r[i] = vld1q_f32(p + 8 * (4 * k + i) + 4 * h);
        const float64x2_t a = vreinterpretq_f64_f32(vzip1q_f32(r[0], r[1]));
        const float64x2_t b = vreinterpretq_f64_f32(vzip2q_f32(r[0], r[1]));
        const float64x2_t c = vreinterpretq_f64_f32(vzip1q_f32(r[2], r[3]));
        const float64x2_t d = vreinterpretq_f64_f32(vzip2q_f32(r[2], r[3]));
        out[4 * h].v[k] = vreinterpretq_f32_f64(vzip1q_f64(a, c));
        out[4 * h + 1].v[k] = vreinterpretq_f32_f64(vzip2q_f64(a, c));
        out[4 * h + 2].v[k] = vreinterpretq_f32_f64(vzip1q_f64(b, d));
        out[4 * h + 3].v[k] = vreinterpretq_f32_f64(vzip2q_f64(b, d));
    }
}
PI_INLINE v16f v16f_halves(float x, float y) {
    v16f r;
    PI_PARTS r.v[k] = vdupq_n_f32(k < 2 ? x : y);
    return r;
}
PI_INLINE v16f v16f_halves_f16(uint16_t x, uint16_t y) { return v16f_halves(pi_f16_to_f32(x), pi_f16_to_f32(y)); }
PI_INLINE v16f v16f_repeat4(const float *p) {
    v16f r;
    PI_PARTS r.v[k] = vld1q_f32(p);
    return r;
}

#ifdef __ARM_FEATURE_DOTPROD
PI_INLINE int32x4_t pi_dot4(int32x4_t acc, int8x16_t w, int8x16_t x) { return vdotq_s32(acc, w, x); }
#else
PI_INLINE int32x4_t pi_dot4(int32x4_t acc, int8x16_t w, int8x16_t x) {
    const int32x4_t lo = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    const int32x4_t hi = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
    return vaddq_s32(acc, vpaddq_s32(lo, hi));
}
#endif
PI_INLINE v16i v16i_dot_ss(v16i acc, v64b w, v64b x) {
    PI_PARTS acc.v[k] = pi_dot4(acc.v[k], vreinterpretq_s8_u8(w.v[k]), vreinterpretq_s8_u8(x.v[k]));
    return acc;
}
/* w ≤ 127 is the same number as a signed byte. */
PI_INLINE v16i v16i_dot_us(v16i acc, v64b w, v64b x) { return v16i_dot_ss(acc, w, x); }
PI_INLINE v16p v16p_zero(void) { return v16i_zero(); }
PI_INLINE v16p v16p_dot_us(v16p acc, v64b w, v64b x) { return v16i_dot_us(acc, w, x); }
PI_INLINE v16p v16p_add(v16p a, v16p b) { return v16i_add(a, b); }
PI_INLINE v16p v16p_sub(v16p a, v16p b) { return v16i_sub(a, b); }
PI_INLINE v16p v16p_offset(const int8_t *p, int k) { return v16i_set1(k * vaddlvq_s8(vld1q_s8(p))); }
PI_INLINE v16i v16i_from_pairs(v16p acc) { return acc; }
PI_INLINE v16i v16i_scale_pairs(v16i sum, v16p acc, v16i k) { return v16i_add(sum, v16i_mul(acc, k)); }

#undef PI_PARTS
#undef PI_UNARY
#undef PI_BINARY
#endif
