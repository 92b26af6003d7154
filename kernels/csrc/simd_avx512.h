/* simd_avx512.h: simd.h on one 512-bit register. Needs AVX512F, BW, DQ, VL, VNNI (Ice Lake, Zen 4 and later). */
#ifndef PI_SIMD_AVX512_H
#define PI_SIMD_AVX512_H

#include <immintrin.h>

#define PI_REGISTERS 32
#define PI_DOT_US_WIDE 1

typedef struct {
    __m512 v;
} v16f;
typedef struct {
    __m512i v;
} v16i;
typedef struct {
    __m512i v;
} v64b;
typedef v16i v16p;

#define PI_F(x) ((v16f){(x)})
#define PI_I(x) ((v16i){(x)})
#define PI_B(x) ((v64b){(x)})

PI_INLINE __mmask16 pi_first_lanes(int n) { return (__mmask16)((1u << n) - 1u); }

PI_INLINE v16f v16f_set1(float x) { return PI_F(_mm512_set1_ps(x)); }
PI_INLINE v16f v16f_zero(void) { return PI_F(_mm512_setzero_ps()); }
PI_INLINE v16f v16f_load(const float *p) { return PI_F(_mm512_loadu_ps(p)); }
PI_INLINE void v16f_store(float *p, v16f a) { _mm512_storeu_ps(p, a.v); }
PI_INLINE v16f v16f_load_n(const float *p, int n) { return PI_F(_mm512_maskz_loadu_ps(pi_first_lanes(n), p)); }
PI_INLINE void v16f_store_n(float *p, v16f a, int n) { _mm512_mask_storeu_ps(p, pi_first_lanes(n), a.v); }
PI_INLINE v16f v16f_add(v16f a, v16f b) { return PI_F(_mm512_add_ps(a.v, b.v)); }
PI_INLINE v16f v16f_sub(v16f a, v16f b) { return PI_F(_mm512_sub_ps(a.v, b.v)); }
PI_INLINE v16f v16f_mul(v16f a, v16f b) { return PI_F(_mm512_mul_ps(a.v, b.v)); }
PI_INLINE v16f v16f_div(v16f a, v16f b) { return PI_F(_mm512_div_ps(a.v, b.v)); }
PI_INLINE v16f v16f_min(v16f a, v16f b) { return PI_F(_mm512_min_ps(a.v, b.v)); }
PI_INLINE v16f v16f_max(v16f a, v16f b) { return PI_F(_mm512_max_ps(a.v, b.v)); }
PI_INLINE v16f v16f_sqrt(v16f a) { return PI_F(_mm512_sqrt_ps(a.v)); }
PI_INLINE v16f v16f_neg(v16f a) {
    return PI_F(_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN))));
}
PI_INLINE v16f v16f_abs(v16f a) {
    return PI_F(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MAX))));
}
PI_INLINE v16f v16f_fma(v16f a, v16f b, v16f c) { return PI_F(_mm512_fmadd_ps(a.v, b.v, c.v)); }
PI_INLINE v16f v16f_select_gt(v16f a, v16f b, v16f x, v16f y) {
    return PI_F(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v));
}
PI_INLINE uint32_t v16f_mask_above(v16f a, v16f b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
PI_INLINE v16f v16f_load_f16(const uint16_t *p) {
    return PI_F(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)));
}
PI_INLINE v16f v16f_set1_f16(uint16_t x) { return PI_F(_mm512_cvtph_ps(_mm256_set1_epi16((short)x))); }
PI_INLINE void v16f_store_f16(uint16_t *p, v16f a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
PI_INLINE v16f v16f_load_bf16(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return PI_F(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}
PI_INLINE v16f v16f_from_i32(v16i a) { return PI_F(_mm512_cvtepi32_ps(a.v)); }
PI_INLINE float v16f_sum(v16f a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
PI_INLINE float v16f_hmax(v16f a) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

PI_INLINE v16i v16i_set1(int32_t x) { return PI_I(_mm512_set1_epi32(x)); }
PI_INLINE v16i v16i_zero(void) { return PI_I(_mm512_setzero_si512()); }
PI_INLINE v16i v16i_load(const int32_t *p) { return PI_I(_mm512_loadu_si512(p)); }
PI_INLINE void v16i_store(int32_t *p, v16i a) { _mm512_storeu_si512(p, a.v); }
PI_INLINE v16i v16i_add(v16i a, v16i b) { return PI_I(_mm512_add_epi32(a.v, b.v)); }
PI_INLINE v16i v16i_sub(v16i a, v16i b) { return PI_I(_mm512_sub_epi32(a.v, b.v)); }
PI_INLINE v16i v16i_mul(v16i a, v16i b) { return PI_I(_mm512_mullo_epi32(a.v, b.v)); }
PI_INLINE v16i v16i_min(v16i a, v16i b) { return PI_I(_mm512_min_epi32(a.v, b.v)); }
PI_INLINE v16i v16i_max(v16i a, v16i b) { return PI_I(_mm512_max_epi32(a.v, b.v)); }
PI_INLINE v16i v16i_and(v16i a, v16i b) { return PI_I(_mm512_and_si512(a.v, b.v)); }
PI_INLINE v16i v16i_or(v16i a, v16i b) { return PI_I(_mm512_or_si512(a.v, b.v)); }
PI_INLINE v16i v16i_xor(v16i a, v16i b) { return PI_I(_mm512_xor_si512(a.v, b.v)); }
PI_INLINE v16i v16i_slli(v16i a, int n) { return PI_I(_mm512_slli_epi32(a.v, (unsigned)n)); }
PI_INLINE v16i v16i_srli(v16i a, int n) { return PI_I(_mm512_srli_epi32(a.v, (unsigned)n)); }
PI_INLINE v16i v16i_srai(v16i a, int n) { return PI_I(_mm512_srai_epi32(a.v, (unsigned)n)); }
PI_INLINE v16i v16i_from_f32_rne(v16f a) { return PI_I(_mm512_cvtps_epi32(a.v)); }
PI_INLINE v16i v16i_from_i8(const int8_t *p) { return PI_I(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
PI_INLINE v16i v16i_from_u8(const uint8_t *p) {
    return PI_I(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
PI_INLINE void v16i_store_i8(int8_t *p, v16i a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(a.v)); }
PI_INLINE void v16i_store_i16(int16_t *p, v16i a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(a.v)); }
PI_INLINE v16f v16i_as_f32(v16i a) { return PI_F(_mm512_castsi512_ps(a.v)); }
PI_INLINE v16i v16f_as_i32(v16f a) { return PI_I(_mm512_castps_si512(a.v)); }
PI_INLINE v16f v16f_pow2i(v16i n) { return v16i_as_f32(v16i_slli(v16i_add(n, v16i_set1(127)), 23)); }
PI_INLINE int32_t v16i_hmax(v16i a) { return _mm512_reduce_max_epi32(a.v); }
PI_INLINE int32_t v16i_sum(v16i a) { return _mm512_reduce_add_epi32(a.v); }

PI_INLINE v64b v64b_load(const void *p) { return PI_B(_mm512_loadu_si512(p)); }
PI_INLINE void v64b_store(void *p, v64b a) { _mm512_storeu_si512(p, a.v); }
PI_INLINE v64b v64b_set1(uint8_t x) { return PI_B(_mm512_set1_epi8((char)x)); }
PI_INLINE v64b v64b_quad(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return PI_B(_mm512_set1_epi32(four));
}
PI_INLINE v64b v64b_repeat16(const void *p) {
    return PI_B(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)));
}
PI_INLINE v64b v64b_lookup(v64b table, v64b a) { return PI_B(_mm512_shuffle_epi8(table.v, a.v)); }
PI_INLINE v64b v64b_and(v64b a, v64b b) { return PI_B(_mm512_and_si512(a.v, b.v)); }
PI_INLINE v64b v64b_or(v64b a, v64b b) { return PI_B(_mm512_or_si512(a.v, b.v)); }
PI_INLINE v64b v64b_xor(v64b a, v64b b) { return PI_B(_mm512_xor_si512(a.v, b.v)); }
PI_INLINE v64b v64b_sll16(v64b a, int n) { return PI_B(_mm512_slli_epi16(a.v, (unsigned)n)); }
PI_INLINE v64b v64b_srl16(v64b a, int n) { return PI_B(_mm512_srli_epi16(a.v, (unsigned)n)); }
PI_INLINE v64b v64b_srl4(v64b a) { return v64b_and(v64b_srl16(a, 4), v64b_set1(15)); }
/* Rows i, i+4, i+8, i+12 share a register, so that the in-lane 4 × 4 dword transposition leaves rows in order. */
PI_INLINE __m512i pi_four_rows(const uint8_t *const *rows, int64_t at) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + at)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(rows[4] + at)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(rows[8] + at)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(rows[12] + at)), 3);
}
PI_INLINE void v64b_transpose16(const uint8_t *const rows[16], int64_t at, v64b line[4]) {
    const __m512i r0 = pi_four_rows(rows, at), r1 = pi_four_rows(rows + 1, at);
    const __m512i r2 = pi_four_rows(rows + 2, at), r3 = pi_four_rows(rows + 3, at);
    const __m512i lo01 = _mm512_unpacklo_epi32(r0, r1), hi01 = _mm512_unpackhi_epi32(r0, r1);
    const __m512i lo23 = _mm512_unpacklo_epi32(r2, r3), hi23 = _mm512_unpackhi_epi32(r2, r3);
    line[0].v = _mm512_unpacklo_epi64(lo01, lo23);
    line[1].v = _mm512_unpackhi_epi64(lo01, lo23);
    line[2].v = _mm512_unpacklo_epi64(hi01, hi23);
    line[3].v = _mm512_unpackhi_epi64(hi01, hi23);
}

/* Ones of a nibble by table. */
PI_INLINE v64b v64b_add_ones(v64b acc, v64b a, int n) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i ones = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i table = _mm512_slli_epi16(ones, (unsigned)n); /* at most 4 · 2^4: stays in its byte */
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(a.v, 4), low);
    const __m512i sum = _mm512_add_epi8(acc.v, _mm512_shuffle_epi8(table, _mm512_and_si512(a.v, low)));
    return PI_B(_mm512_add_epi8(sum, _mm512_shuffle_epi8(table, high)));
}
PI_INLINE v16i v64b_as_i32(v64b a) { return PI_I(a.v); }
PI_INLINE v64b v16i_as_bytes(v16i a) { return PI_B(a.v); }
PI_INLINE v16f v16f_rows4_f32(const uint8_t *const rows[4], int64_t at) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps((const float *)(rows[0] + at)));
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)(rows[1] + at)), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)(rows[2] + at)), 2);
    return PI_F(_mm512_insertf32x4(v, _mm_loadu_ps((const float *)(rows[3] + at)), 3));
}
PI_INLINE __m128i pi_two_rows_16(const uint8_t *a, const uint8_t *b) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)a), _mm_loadl_epi64((const __m128i *)b));
}
PI_INLINE __m256i pi_four_rows_16(const uint8_t *const *rows, int64_t at) {
    const __m256i low = _mm256_castsi128_si256(pi_two_rows_16(rows[0] + at, rows[1] + at));
    return _mm256_inserti128_si256(low, pi_two_rows_16(rows[2] + at, rows[3] + at), 1);
}
PI_INLINE v16f v16f_rows4_f16(const uint8_t *const rows[4], int64_t at) {
    return PI_F(_mm512_cvtph_ps(pi_four_rows_16(rows, at)));
}
PI_INLINE v16f v16f_rows4_bf16(const uint8_t *const rows[4], int64_t at) {
    const __m512i wide = _mm512_cvtepu16_epi32(pi_four_rows_16(rows, at));
    return PI_F(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}
PI_INLINE v16i v16i_low_words(v16i a, v16i b) {
    return PI_I(_mm512_mask_blend_epi16(0xaaaaaaaau, a.v, _mm512_slli_epi32(b.v, 16)));
}
PI_INLINE v16i v16i_zip_low(v16i a, v16i b) { return PI_I(_mm512_unpacklo_epi16(a.v, b.v)); }
PI_INLINE v16i v16i_zip_high(v16i a, v16i b) { return PI_I(_mm512_unpackhi_epi16(a.v, b.v)); }
PI_INLINE v16i v16i_sra16(v16i a, int n) { return PI_I(_mm512_srai_epi16(a.v, (unsigned)n)); }
PI_INLINE v16i v16i_repeat2(const int32_t *p) {
    int64_t two;
    memcpy(&two, p, 8);
    return PI_I(_mm512_set1_epi64(two));
}
PI_INLINE v16i v16i_evens(v16i a, v16i b) {
    const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return PI_I(_mm512_permutex2var_epi32(a.v, lanes, b.v));
}
PI_INLINE v16i v16i_odds(v16i a, v16i b) {
    const __m512i lanes = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return PI_I(_mm512_permutex2var_epi32(a.v, lanes, b.v));
}
PI_INLINE v16i v16i_dot_words(v16i acc, v16i w, v16i x) { return PI_I(_mm512_dpwssd_epi32(acc.v, w.v, x.v)); }
PI_INLINE v64b v64b_rows2(const void *p, const void *q) {
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    return PI_B(_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i *)q), 1));
}
PI_INLINE v64b v64b_two(const void *p) { return PI_B(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p))); }
PI_INLINE v16f v16f_two(const float *p) { return PI_F(_mm512_broadcast_f32x8(_mm256_loadu_ps(p))); }
PI_INLINE v16f v16f_two_f16(const uint8_t *p, const uint8_t *q) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return PI_F(_mm512_cvtph_ps(_mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i *)q), 1)));
}
PI_INLINE __m128i pi_two_eights(const uint8_t *p, const uint8_t *q) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)p), _mm_loadl_epi64((const __m128i *)q));
}
PI_INLINE v16i v16i_two_i8(const uint8_t *p, const uint8_t *q) {
    return PI_I(_mm512_cvtepi8_epi32(pi_two_eights(p, q)));
}
PI_INLINE v16i v16i_two_u8(const uint8_t *p, const uint8_t *q) {
    return PI_I(_mm512_cvtepu8_epi32(pi_two_eights(p, q)));
}
/* Every step doubles the rows that lie beside each other and halves the columns; lane = rows · column + row. */
PI_INLINE void v16f_columns8(const float *p, v16f out[8]) {
#define PI_INDEX(...) _mm512_setr_epi32(__VA_ARGS__)
    const __m512i two0 = PI_INDEX(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i two1 = PI_INDEX(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
    const __m512i four0 = PI_INDEX(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i four1 = PI_INDEX(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#undef PI_INDEX
    __m512 four[2][4], eight[4][2]; /* [columns / 4][rows / 4], [columns / 2][rows / 8] */
    for (int k = 0; k < 4; k++) {
        const __m512 a = _mm512_loadu_ps(p + 32 * k), b = _mm512_loadu_ps(p + 32 * k + 16);
        four[0][k] = _mm512_permutex2var_ps(a, two0, b);
        four[1][k] = _mm512_permutex2var_ps(a, two1, b);
    }
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < 2; k++) {
            eight[2 * h][k] = _mm512_permutex2var_ps(four[h][2 * k], four0, four[h][2 * k + 1]);
            eight[2 * h + 1][k] = _mm512_permutex2var_ps(four[h][2 * k], four1, four[h][2 * k + 1]);
        }
    for (int h = 0; h < 4; h++) {
        out[2 * h].v = _mm512_shuffle_f32x4(eight[h][0], eight[h][1], 0x44);
        out[2 * h + 1].v = _mm512_shuffle_f32x4(eight[h][0], eight[h][1], 0xee);
    }
}
PI_INLINE v16f v16f_halves(float x, float y) {
    return PI_F(_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(x), _mm512_set1_ps(y)));
}
PI_INLINE v16f v16f_halves_f16(uint16_t x, uint16_t y) {
    const __m256i low = _mm256_castsi128_si256(_mm_set1_epi16((short)x));
    return PI_F(_mm512_cvtph_ps(_mm256_inserti128_si256(low, _mm_set1_epi16((short)y), 1)));
}
PI_INLINE v16f v16f_repeat4(const float *p) { return PI_F(_mm512_broadcast_f32x4(_mm_loadu_ps(p))); }

PI_INLINE v16i v16i_dot_us(v16i acc, v64b w, v64b x) { return PI_I(_mm512_dpbusd_epi32(acc.v, w.v, x.v)); }
/* w + 128 is an unsigned byte; what that adds, 128·Σx, is subtracted again. */
PI_INLINE v16i v16i_dot_ss(v16i acc, v64b w, v64b x) {
    const v64b bias = v64b_set1(128);
    const v16i shifted = v16i_dot_us(acc, v64b_xor(w, bias), x);
    return v16i_sub(shifted, v16i_dot_us(v16i_zero(), bias, x));
}
PI_INLINE v16p v16p_zero(void) { return v16i_zero(); }
PI_INLINE v16p v16p_dot_us(v16p acc, v64b w, v64b x) { return v16i_dot_us(acc, w, x); }
PI_INLINE v16p v16p_add(v16p a, v16p b) { return v16i_add(a, b); }
PI_INLINE v16p v16p_sub(v16p a, v16p b) { return v16i_sub(a, b); }
PI_INLINE v16p v16p_offset(const int8_t *p, int k) {
    __m128i t = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8((char)k), _mm_loadu_si128((const __m128i *)p));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return PI_I(_mm512_broadcastd_epi32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1))));
}
PI_INLINE v16i v16i_from_pairs(v16p acc) { return acc; }
PI_INLINE v16i v16i_scale_pairs(v16i sum, v16p acc, v16i k) { return v16i_add(sum, v16i_mul(acc, k)); }

#undef PI_F
#undef PI_I
#undef PI_B
#endif
