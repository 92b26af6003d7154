/* simd_x86.h: what the AVX2 and the AVX-512 forms of simd.h share. */
#ifndef PI_SIMD_X86_H
#define PI_SIMD_X86_H

#include <immintrin.h>

/* 16 rows of four 16-bit numbers, `at` bytes in: out[g] = number g of every row. */
PI_INLINE void pi_gather_four_halves(const uint8_t *const rows[16], int64_t at, __m256i out[4]) {
    __m128i low[4], high[4]; /* rows 4k..4k+3: numbers 0 and 1, and 2 and 3 */
    for (int k = 0; k < 4; k++) {
#define PI_ROW(i) _mm_loadl_epi64((const __m128i *)(rows[4 * k + (i)] + at))
        const __m128i a = _mm_unpacklo_epi16(PI_ROW(0), PI_ROW(1)), b = _mm_unpacklo_epi16(PI_ROW(2), PI_ROW(3));
#undef PI_ROW
        low[k] = _mm_unpacklo_epi32(a, b);
        high[k] = _mm_unpackhi_epi32(a, b);
    }
#define PI_JOIN_ROWS(join, v) \
    _mm256_inserti128_si256(_mm256_castsi128_si256(join((v)[0], (v)[1])), join((v)[2], (v)[3]), 1)
    out[0] = PI_JOIN_ROWS(_mm_unpacklo_epi64, low);
    out[1] = PI_JOIN_ROWS(_mm_unpackhi_epi64, low);
    out[2] = PI_JOIN_ROWS(_mm_unpacklo_epi64, high);
    out[3] = PI_JOIN_ROWS(_mm_unpackhi_epi64, high);
#undef PI_JOIN_ROWS
}

#endif
