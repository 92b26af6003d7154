/* simd_avx2.h: simd.h on two 256-bit registers. Needs AVX2, FMA, F16C; uses AVX-VNNI when compiled for it. */
#ifndef PI_SIMD_AVX2_H
#define PI_SIMD_AVX2_H

#include <immintrin.h>

#define PI_REGISTERS 16
#ifdef __AVXVNNI__
#define PI_DOT_US_WIDE 1
#else
#define PI_DOT_US_WIDE 0
#endif

typedef struct {
    __m256 a, b;
} v16f; /* lanes 0..7, 8..15 */
typedef struct {
    __m256i a, b;
} v16i;
typedef struct {
    __m256i a, b;
} v64b; /* bytes 0..31, 32..63 */
typedef struct {
    __m256i a, b;
} v16p; /* AVX2: int16 pairs, lane r in elements 2r, 2r+1; VNNI: int32 */

#define PI_F(x, y) ((v16f){(x), (y)})
#define PI_I(x, y) ((v16i){(x), (y)})
#define PI_B(x, y) ((v64b){(x), (y)})
#define PI_P(x, y) ((v16p){(x), (y)})

PI_INLINE v16f v16f_set1(float x) {
    const __m256 v = _mm256_set1_ps(x);
    return PI_F(v, v);
}
PI_INLINE v16f v16f_zero(void) { return v16f_set1(0.0f); }
PI_INLINE v16f v16f_load(const float *p) { return PI_F(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
PI_INLINE void v16f_store(float *p, v16f v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
PI_INLINE __m256i pi_first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PI_INLINE v16f v16f_load_n(const float *p, int n) {
    return PI_F(_mm256_maskload_ps(p, pi_first_lanes(n)), _mm256_maskload_ps(p + 8, pi_first_lanes(n - 8)));
}
PI_INLINE void v16f_store_n(float *p, v16f v, int n) {
    _mm256_maskstore_ps(p, pi_first_lanes(n), v.a);
    _mm256_maskstore_ps(p + 8, pi_first_lanes(n - 8), v.b);
}
PI_INLINE v16f v16f_add(v16f x, v16f y) { return PI_F(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
PI_INLINE v16f v16f_sub(v16f x, v16f y) { return PI_F(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
PI_INLINE v16f v16f_mul(v16f x, v16f y) { return PI_F(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
PI_INLINE v16f v16f_div(v16f x, v16f y) { return PI_F(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
PI_INLINE v16f v16f_min(v16f x, v16f y) { return PI_F(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
PI_INLINE v16f v16f_max(v16f x, v16f y) { return PI_F(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
PI_INLINE v16f v16f_sqrt(v16f x) { return PI_F(_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)); }
PI_INLINE v16f v16f_neg(v16f x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return PI_F(_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign));
}
PI_INLINE v16f v16f_abs(v16f x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return PI_F(_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}
PI_INLINE v16f v16f_fma(v16f x, v16f y, v16f z) {
    return PI_F(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
PI_INLINE v16f v16f_select_gt(v16f p, v16f q, v16f x, v16f y) {
    return PI_F(_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_GT_OQ)));
}
PI_INLINE uint32_t v16f_mask_above(v16f x, v16f y) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NLE_UQ)) |
           (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NLE_UQ)) << 8;
}
PI_INLINE v16f v16f_load_f16(const uint16_t *p) {
    return PI_F(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
PI_INLINE v16f v16f_set1_f16(uint16_t x) {
    const __m256 wide = _mm256_cvtph_ps(_mm_set1_epi16((short)x));
    return PI_F(wide, wide);
}
PI_INLINE void v16f_store_f16(uint16_t *p, v16f v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
PI_INLINE __m256 pi_widen_bf16(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
PI_INLINE v16f v16f_load_bf16(const uint16_t *p) {
    return PI_F(pi_widen_bf16(_mm_loadu_si128((const __m128i *)p)),
                pi_widen_bf16(_mm_loadu_si128((const __m128i *)(p + 8))));
}
PI_INLINE v16f v16f_from_i32(v16i x) { return PI_F(_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
PI_INLINE float v16f_sum(v16f v) {
    const __m256 eight = _mm256_add_ps(v.a, v.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
PI_INLINE float v16f_hmax(v16f v) {
    const __m256 eight = _mm256_max_ps(v.a, v.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

PI_INLINE v16i v16i_set1(int32_t x) {
    const __m256i v = _mm256_set1_epi32(x);
    return PI_I(v, v);
}
PI_INLINE v16i v16i_zero(void) { return v16i_set1(0); }
PI_INLINE v16i v16i_load(const int32_t *p) {
    return PI_I(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8)));
}
PI_INLINE void v16i_store(int32_t *p, v16i v) {
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)(p + 8), v.b);
}
PI_INLINE v16i v16i_add(v16i x, v16i y) { return PI_I(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
PI_INLINE v16i v16i_sub(v16i x, v16i y) { return PI_I(_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)); }
PI_INLINE v16i v16i_mul(v16i x, v16i y) { return PI_I(_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)); }
PI_INLINE v16i v16i_min(v16i x, v16i y) { return PI_I(_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)); }
PI_INLINE v16i v16i_max(v16i x, v16i y) { return PI_I(_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)); }
PI_INLINE v16i v16i_and(v16i x, v16i y) { return PI_I(_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
PI_INLINE v16i v16i_or(v16i x, v16i y) { return PI_I(_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
PI_INLINE v16i v16i_xor(v16i x, v16i y) { return PI_I(_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)); }
PI_INLINE v16i v16i_slli(v16i x, int n) { return PI_I(_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)); }
PI_INLINE v16i v16i_srli(v16i x, int n) { return PI_I(_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)); }
PI_INLINE v16i v16i_srai(v16i x, int n) { return PI_I(_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)); }
PI_INLINE v16i v16i_from_f32_rne(v16f x) { return PI_I(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
PI_INLINE v16i v16i_from_i8(const int8_t *p) {
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return PI_I(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(v, v)));
}
PI_INLINE v16i v16i_from_u8(const uint8_t *p) {
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return PI_I(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(v, v)));
}
PI_INLINE void v16i_store_i8(int8_t *p, v16i v) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}
PI_INLINE void v16i_store_i16(int16_t *p, v16i v) {
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8));
}
PI_INLINE v16f v16i_as_f32(v16i x) { return PI_F(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
PI_INLINE v16i v16f_as_i32(v16f x) { return PI_I(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
PI_INLINE v16f v16f_pow2i(v16i n) { return v16i_as_f32(v16i_slli(v16i_add(n, v16i_set1(127)), 23)); }
PI_INLINE int32_t v16i_hmax(v16i v) {
    const __m256i eight = _mm256_max_epi32(v.a, v.b);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
PI_INLINE int32_t v16i_sum(v16i v) {
    const __m256i eight = _mm256_add_epi32(v.a, v.b);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

PI_INLINE v64b v64b_load(const void *p) {
    return PI_B(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
PI_INLINE void v64b_store(void *p, v64b v) {
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)p + 1, v.b);
}
PI_INLINE v64b v64b_set1(uint8_t x) {
    const __m256i v = _mm256_set1_epi8((char)x);
    return PI_B(v, v);
}
PI_INLINE v64b v64b_quad(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    const __m256i v = _mm256_set1_epi32(four);
    return PI_B(v, v);
}
PI_INLINE v64b v64b_repeat16(const void *p) {
    const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return PI_B(v, v);
}
PI_INLINE v64b v64b_lookup(v64b table, v64b x) {
    return PI_B(_mm256_shuffle_epi8(table.a, x.a), _mm256_shuffle_epi8(table.b, x.b));
}
PI_INLINE v64b v64b_and(v64b x, v64b y) { return PI_B(_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
PI_INLINE v64b v64b_or(v64b x, v64b y) { return PI_B(_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
PI_INLINE v64b v64b_xor(v64b x, v64b y) { return PI_B(_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)); }
PI_INLINE v64b v64b_sll16(v64b x, int n) { return PI_B(_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)); }
PI_INLINE v64b v64b_srl16(v64b x, int n) { return PI_B(_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)); }
PI_INLINE v64b v64b_srl4(v64b x) { return v64b_and(v64b_srl16(x, 4), v64b_set1(15)); }
/* Rows i and i+4 share a register, so that the in-lane 4 × 4 dword transposition leaves rows 0..7 in order. */
PI_INLINE void pi_transpose_8_rows(const uint8_t *const *rows, int64_t at, __m256i *t0, __m256i *t1, __m256i *t2,
                                   __m256i *t3) {
#define PI_PAIR(i)                                                                                    \
    _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(rows[i] + at))), \
                            _mm_loadu_si128((const __m128i *)(rows[(i) + 4] + at)), 1)
    const __m256i r0 = PI_PAIR(0), r1 = PI_PAIR(1), r2 = PI_PAIR(2), r3 = PI_PAIR(3);
#undef PI_PAIR
    const __m256i lo01 = _mm256_unpacklo_epi32(r0, r1), hi01 = _mm256_unpackhi_epi32(r0, r1);
    const __m256i lo23 = _mm256_unpacklo_epi32(r2, r3), hi23 = _mm256_unpackhi_epi32(r2, r3);
    *t0 = _mm256_unpacklo_epi64(lo01, lo23);
    *t1 = _mm256_unpackhi_epi64(lo01, lo23);
    *t2 = _mm256_unpacklo_epi64(hi01, hi23);
    *t3 = _mm256_unpackhi_epi64(hi01, hi23);
}
PI_INLINE void v64b_transpose16(const uint8_t *const rows[16], int64_t at, v64b line[4]) {
    pi_transpose_8_rows(rows, at, &line[0].a, &line[1].a, &line[2].a, &line[3].a);
    pi_transpose_8_rows(rows + 8, at, &line[0].b, &line[1].b, &line[2].b, &line[3].b);
}

/* Ones of a nibble by table. */
PI_INLINE __m256i pi_add_ones(__m256i acc, __m256i a, __m256i table) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
    acc = _mm256_add_epi8(acc, _mm256_shuffle_epi8(table, _mm256_and_si256(a, low)));
    return _mm256_add_epi8(acc, _mm256_shuffle_epi8(table, high));
}
PI_INLINE v64b v64b_add_ones(v64b acc, v64b a, int n) {
    const __m256i ones = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                          2, 3, 2, 3, 3, 4);
    const __m256i table = _mm256_slli_epi16(ones, n); /* at most 4 · 2^4: no bit crosses into the next byte */
    return PI_B(pi_add_ones(acc.a, a.a, table), pi_add_ones(acc.b, a.b, table));
}
PI_INLINE v16i v64b_as_i32(v64b x) { return PI_I(x.a, x.b); }
PI_INLINE v64b v16i_as_bytes(v16i x) { return PI_B(x.a, x.b); }
PI_INLINE __m256 pi_two_rows_f32(const uint8_t *a, const uint8_t *b) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float *)a)), _mm_loadu_ps((const float *)b),
                                1);
}
PI_INLINE __m128i pi_two_rows_16(const uint8_t *a, const uint8_t *b) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)a), _mm_loadl_epi64((const __m128i *)b));
}
PI_INLINE v16f v16f_rows4_f32(const uint8_t *const rows[4], int64_t at) {
    return PI_F(pi_two_rows_f32(rows[0] + at, rows[1] + at), pi_two_rows_f32(rows[2] + at, rows[3] + at));
}
PI_INLINE v16f v16f_rows4_f16(const uint8_t *const rows[4], int64_t at) {
    return PI_F(_mm256_cvtph_ps(pi_two_rows_16(rows[0] + at, rows[1] + at)),
                _mm256_cvtph_ps(pi_two_rows_16(rows[2] + at, rows[3] + at)));
}
PI_INLINE v16f v16f_rows4_bf16(const uint8_t *const rows[4], int64_t at) {
    return PI_F(pi_widen_bf16(pi_two_rows_16(rows[0] + at, rows[1] + at)),
                pi_widen_bf16(pi_two_rows_16(rows[2] + at, rows[3] + at)));
}
PI_INLINE v16i v16i_low_words(v16i x, v16i y) {
    return PI_I(_mm256_blend_epi16(x.a, _mm256_slli_epi32(y.a, 16), 0xaa),
                _mm256_blend_epi16(x.b, _mm256_slli_epi32(y.b, 16), 0xaa));
}
PI_INLINE v16i v16i_zip_low(v16i x, v16i y) {
    return PI_I(_mm256_unpacklo_epi16(x.a, y.a), _mm256_unpacklo_epi16(x.b, y.b));
}
PI_INLINE v16i v16i_zip_high(v16i x, v16i y) {
    return PI_I(_mm256_unpackhi_epi16(x.a, y.a), _mm256_unpackhi_epi16(x.b, y.b));
}
PI_INLINE v16i v16i_sra16(v16i x, int n) { return PI_I(_mm256_srai_epi16(x.a, n), _mm256_srai_epi16(x.b, n)); }
PI_INLINE v16i v16i_repeat2(const int32_t *p) {
    int64_t two;
    memcpy(&two, p, 8);
    const __m256i v = _mm256_set1_epi64x(two);
    return PI_I(v, v);
}
/* Lanes of pairs of a and b in their order: what shuffles within 128 bits leave as 0 1 4 5 2 3 6 7. */
PI_INLINE __m256i pi_pick_lanes(__m256i a, __m256i b, int odd) {
    const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    const __m256 lanes = odd ? _mm256_shuffle_ps(x, y, 0xdd) : _mm256_shuffle_ps(x, y, 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(lanes), 0xd8);
}
PI_INLINE v16i v16i_evens(v16i x, v16i y) { return PI_I(pi_pick_lanes(x.a, x.b, 0), pi_pick_lanes(y.a, y.b, 0)); }
PI_INLINE v16i v16i_odds(v16i x, v16i y) { return PI_I(pi_pick_lanes(x.a, x.b, 1), pi_pick_lanes(y.a, y.b, 1)); }
#ifdef __AVXVNNI__
PI_INLINE v16i v16i_dot_words(v16i acc, v16i w, v16i x) {
    return PI_I(_mm256_dpwssd_avx_epi32(acc.a, w.a, x.a), _mm256_dpwssd_avx_epi32(acc.b, w.b, x.b));
}
#else
/* The empty asm keeps the compiler from turning the chain of additions into a tree that spills registers. */
PI_INLINE v16i v16i_dot_words(v16i acc, v16i w, v16i x) {
    __asm__("" : "+x"(acc.a), "+x"(acc.b));
    return PI_I(_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, x.a)),
                _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, x.b)));
}
#endif
PI_INLINE v64b v64b_rows2(const void *p, const void *q) {
    return PI_B(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)q));
}
PI_INLINE v64b v64b_two(const void *p) { return v64b_rows2(p, p); }
PI_INLINE v16f v16f_two(const float *p) { return PI_F(_mm256_loadu_ps(p), _mm256_loadu_ps(p)); }
PI_INLINE v16f v16f_two_f16(const uint8_t *p, const uint8_t *q) {
    return PI_F(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)q)));
}
PI_INLINE v16i v16i_two_i8(const uint8_t *p, const uint8_t *q) {
    return PI_I(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q)));
}
PI_INLINE v16i v16i_two_u8(const uint8_t *p, const uint8_t *q) {
    return PI_I(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)q)));
}
/* Columns 4h..4h+3 of 8 rows of 8: rows i and i + 4 share a register, as in pi_transpose_8_rows. */
PI_INLINE void pi_columns_of_8_rows(const float *p, __m256 out[4]) {
#define PI_PAIR(i) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 8 * (i))), _mm_loadu_ps(p + 8 * (i) + 32), 1)
    const __m256 r0 = PI_PAIR(0), r1 = PI_PAIR(1), r2 = PI_PAIR(2), r3 = PI_PAIR(3);
#undef PI_PAIR
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)), b = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)), d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}
PI_INLINE void v16f_columns8(const float *p, v16f out[8]) {
    for (int h = 0; h < 2; h++) {
        __m256 low[4], high[4];
        pi_columns_of_8_rows(p + 4 * h, low);
        pi_columns_of_8_rows(p + 64 + 4 * h, high);
        for (int i = 0; i < 4; i++) out[4 * h + i] = PI_F(low[i], high[i]);
    }
}
PI_INLINE v16f v16f_halves(float x, float y) { return PI_F(_mm256_set1_ps(x), _mm256_set1_ps(y)); }
PI_INLINE v16f v16f_halves_f16(uint16_t x, uint16_t y) {
    return PI_F(_mm256_cvtph_ps(_mm_set1_epi16((short)x)), _mm256_cvtph_ps(_mm_set1_epi16((short)y)));
}
PI_INLINE v16f v16f_repeat4(const float *p) {
    const __m256 v = _mm256_broadcast_ps((const __m128 *)p);
    return PI_F(v, v);
}

PI_INLINE __m256i pi_sum_pairs(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

#ifdef __AVXVNNI__
PI_INLINE v16i v16i_dot_us(v16i acc, v64b w, v64b x) {
    return PI_I(_mm256_dpbusd_avx_epi32(acc.a, w.a, x.a), _mm256_dpbusd_avx_epi32(acc.b, w.b, x.b));
}
PI_INLINE v16i v16i_dot_ss(v16i acc, v64b w, v64b x) {
    return PI_I(_mm256_dpbusd_avx_epi32(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(x.a, w.a)),
                _mm256_dpbusd_avx_epi32(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(x.b, w.b)));
}
PI_INLINE v16p v16p_zero(void) { return PI_P(_mm256_setzero_si256(), _mm256_setzero_si256()); }
PI_INLINE v16p v16p_dot_us(v16p acc, v64b w, v64b x) {
    return PI_P(_mm256_dpbusd_avx_epi32(acc.a, w.a, x.a), _mm256_dpbusd_avx_epi32(acc.b, w.b, x.b));
}
PI_INLINE v16p v16p_add(v16p x, v16p y) { return PI_P(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
PI_INLINE v16p v16p_sub(v16p x, v16p y) { return PI_P(_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)); }
PI_INLINE v16i v16i_from_pairs(v16p acc) { return PI_I(acc.a, acc.b); }
PI_INLINE v16i v16i_scale_pairs(v16i sum, v16p acc, v16i k) { return v16i_add(sum, v16i_mul(PI_I(acc.a, acc.b), k)); }
#else
/* |w| fits an unsigned byte even for -128, and two products reach at most 2·128·127 = 32512: no saturation. */
PI_INLINE __m256i pi_dot_us_pairs(__m256i w, __m256i x) { return _mm256_maddubs_epi16(w, x); }
PI_INLINE __m256i pi_dot_ss_pairs(__m256i w, __m256i x) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
PI_INLINE v16i v16i_dot_us(v16i acc, v64b w, v64b x) {
    return PI_I(_mm256_add_epi32(acc.a, pi_sum_pairs(pi_dot_us_pairs(w.a, x.a))),
                _mm256_add_epi32(acc.b, pi_sum_pairs(pi_dot_us_pairs(w.b, x.b))));
}
PI_INLINE v16i v16i_dot_ss(v16i acc, v64b w, v64b x) {
    return PI_I(_mm256_add_epi32(acc.a, pi_sum_pairs(pi_dot_ss_pairs(w.a, x.a))),
                _mm256_add_epi32(acc.b, pi_sum_pairs(pi_dot_ss_pairs(w.b, x.b))));
}
PI_INLINE v16p v16p_zero(void) { return PI_P(_mm256_setzero_si256(), _mm256_setzero_si256()); }
/* The empty asm: as in v16i_dot_words. */
PI_INLINE v16p v16p_dot_us(v16p acc, v64b w, v64b x) {
    __asm__("" : "+x"(acc.a), "+x"(acc.b));
    return PI_P(_mm256_add_epi16(acc.a, pi_dot_us_pairs(w.a, x.a)), _mm256_add_epi16(acc.b, pi_dot_us_pairs(w.b, x.b)));
}
PI_INLINE v16p v16p_add(v16p x, v16p y) { return PI_P(_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)); }
PI_INLINE v16p v16p_sub(v16p x, v16p y) { return PI_P(_mm256_sub_epi16(x.a, y.a), _mm256_sub_epi16(x.b, y.b)); }
PI_INLINE v16i v16i_from_pairs(v16p acc) { return PI_I(pi_sum_pairs(acc.a), pi_sum_pairs(acc.b)); }
PI_INLINE __m256i pi_twice_i16(__m256i k) { return _mm256_blend_epi16(k, _mm256_slli_epi32(k, 16), 0xaa); }
PI_INLINE v16i v16i_scale_pairs(v16i sum, v16p acc, v16i k) {
    return PI_I(_mm256_add_epi32(sum.a, _mm256_madd_epi16(acc.a, pi_twice_i16(k.a))),
                _mm256_add_epi32(sum.b, _mm256_madd_epi16(acc.b, pi_twice_i16(k.b))));
}
#endif

/* In int16 pairs each half of the sum is at most 32·16·127/2 = 32512. */
PI_INLINE v16p v16p_offset(const int8_t *p, int k) {
    __m128i t = _mm_maddubs_epi16(_mm_set1_epi8((char)k), _mm_loadu_si128((const __m128i *)p));
#ifdef __AVXVNNI__
    t = _mm_madd_epi16(t, _mm_set1_epi16(1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
#else
    t = _mm_add_epi16(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_add_epi16(t, _mm_shuffle_epi32(t, 0xb1));
#endif
    const __m256i v = _mm256_broadcastsi128_si256(t);
    return PI_P(v, v);
}

#undef PI_F
#undef PI_I
#undef PI_B
#undef PI_P
#endif
