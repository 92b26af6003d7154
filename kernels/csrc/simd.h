/* simd.h: the 16-lane vocabulary in which every operation body (`op.inc`) is written once.
 *
 * A file that compiles a body for one instruction set defines exactly one of
 *   PI_ISA_SCALAR  PI_ISA_AVX2  PI_ISA_AVX512  PI_ISA_NEON
 * before it includes this header, and gets the types and functions below from `simd_<isa>.h`.
 * Everything is `static inline`: no two files can share a copy by accident of the linker.
 *
 * THE RULE: on every instruction set a function gives the same bits (only the sign and payload of a
 * NaN may differ). Floating-point work is rounded to nearest-even, never contracted by the compiler
 * (-ffp-contract=off), never flushed to zero; fused multiply-add happens in v16f_fma and nowhere else.
 *
 * Flags of the files:  AVX2    -mavx2 -mfma -mf16c
 *                      AVX512  -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c
 *                      NEON    -march=armv8.2-a+dotprod (without dotprod: widening multiplies)
 * PI_ISA_AVXVNNI stands beside PI_ISA_AVX2, compiled with -mavxvnni in addition: the same code with VNNI on
 * 256-bit registers (Intel's 12th generation and later, without AVX-512). Same functions, same bits.
 *
 * TYPES (lane i is element i in memory)
 *   v16f   16 floats             v16i   16 int32             v64b   64 bytes
 *   v16p   16 integer accumulators of which each may be kept as partial sums (AVX2: two int16 each)
 *
 * v16f
 *   v16f_zero()  v16f_set1(x)  v16f_load(p)  v16f_store(p, a)              unaligned pointers are fine
 *   v16f_load_n(p, n)  v16f_store_n(p, a, n)      0 ≤ n ≤ 16: the first n lanes; load zeroes the rest,
 *                                                 memory beyond n elements is not touched
 *   v16f_add/sub/mul/div(a, b)  v16f_sqrt(a)  v16f_neg(a)  v16f_abs(a)      IEEE, correctly rounded
 *   v16f_fma(a, b, c)             a·b + c, rounded once
 *   v16f_min(a, b) = a < b ? a : b    v16f_max(a, b) = a > b ? a : b        so b where either is NaN
 *   v16f_select_gt(a, b, x, y) = a > b ? x : y                              so y where either is NaN
 *   v16f_mask_above(a, b)         bit i: not a ≤ b in lane i; so set where either is NaN
 *   v16f_load_f16(p)  v16f_store_f16(p, a)  v16f_load_bf16(p)   p: uint16_t; store rounds half to even,
 *                                                               overflows to infinity
 *   v16f_set1_f16(x)              an f16 in every lane
 *   v16f_load_f16_n(p, n)  v16f_store_f16_n(p, a, n)            as load_n / store_n
 *   v16f_from_i32(i)              rounded half to even
 *   v16f_pow2i(i)                 2^i for -126 ≤ i ≤ 127 (other i: undefined value, no trap)
 *   v16f_sum(a), v16f_hmax(a)     float; the fixed tree: lane i with i+8, then i+4, i+2, i+1,
 *                                 each step f(a[i], a[i + step])
 * v16i
 *   v16i_zero()  v16i_set1(x)  v16i_load(p)  v16i_store(p, a)
 *   v16i_add/sub/mul(a, b)        wrap around; mul keeps the low 32 bits
 *   v16i_min/max(a, b)  v16i_and/or/xor(a, b)
 *   v16i_slli/srli/srai(a, n)     0 ≤ n ≤ 31; srli shifts in zeros, srai the sign
 *   v16i_from_f32_rne(a)          rounded half to even; NaN and |a| ≥ 2^31 give INT32_MIN
 *   v16i_from_i8(p)  v16i_from_u8(p)     16 bytes widened
 *   v16i_store_i8(p, a)           16 lanes narrowed to int8 with saturation
 *   v16i_store_i16(p, a)          16 lanes narrowed to int16 with saturation
 *   v16i_as_f32(a)  v16f_as_i32(a)       the same bits, other type
 *   v16i_repeat2(p)               the 2 dwords at p, 8 times
 *   v16i_evens(a, b)  v16i_odds(a, b)    lanes 0, 2, … 14 (1, 3, … 15) of a, then those of b
 *   v16i_hmax(a)                  int32, maximum of the lanes
 *   v16i_sum(a)                   int32, sum of the lanes, wraps around
 * v64b
 *   v64b_load(p)  v64b_store(p, a)  v64b_set1(byte)
 *   v64b_quad(p)                  the 4 bytes at p, 16 times
 *   v64b_repeat16(p)              the 16 bytes at p, 4 times
 *   v64b_lookup(table, a)         byte i: table[a[i]] with a table of 16 bytes, 4 times; a[i] < 16
 *   v64b_and/or/xor(a, b)
 *   v64b_srl4(a)                  every byte shifted right by 4 (high nibble, zero-extended)
 *   v64b_sll16(a, n) v64b_srl16(a, n)    shifts of 16-bit lanes: the caller masks what crosses bytes
 *   v64b_as_i32(a)  v16i_as_bytes(a)     the same bits, other type
 *   v64b_add_ones(acc, a, n)      every byte of acc + 2^n · (ones among the bits of that byte of a), wraps around;
 *                                 0 ≤ n ≤ 4
 * Reading several rows at once: `rows` are pointers, `at` an offset in bytes that is added to each
 *   v64b_transpose16(rows, at, line)     16 rows of 16 bytes; line[j] dword r = bytes 4j..4j+3 of row r
 *   v16f_rows4_f32/f16/bf16(rows, at)    4 rows of 4 values; lane 4r + c = value c of row r
 *   v16f_halves(x, y)  v16f_halves_f16(x, y)   x in lanes 0..7, y in lanes 8..15; numbers of half precision
 *   v16f_repeat4(p)                      the 4 floats at p, 4 times
 * Two rows in one vector: the first in the lower half
 *   v64b_rows2(p, q)                     32 bytes of each
 *   v64b_two(p)  v16f_two(p)             the 32 bytes, or 8 floats, at p, twice
 *   v16f_two_f16(p, q)  v16i_two_i8(p, q)  v16i_two_u8(p, q)     8 numbers of each, as floats or widened
 *   v16f_columns8(p, out)                p: 16 rows of 8 floats; out[c] lane r = column c of row r
 * Pairs of 16-bit numbers in a dword
 *   v16i_low_words(a, b)                 the low half of a, below the low half of b
 *   v16i_zip_low(a, b)  v16i_zip_high(a, b)       dword 4k + i: word 8k + i (high: 8k + 4 + i) of a, below that of b
 *   v16i_sra16(a, n)                     every word shifted right by n < 16, with its sign
 *   v16i_dot_words(acc, w, x)            acc + w.low·x.low + w.high·x.high, signed, wraps around
 * Dot products: 4 bytes per lane, lane r gets Σ_c w[4r+c]·x[4r+c]
 *   v16i_dot_us(acc, w, x)        w unsigned ≤ 127, x signed; exact in int32
 *   v16i_dot_ss(acc, w, x)        both signed, any w (-128 too), x ≥ -127; exact in int32
 *   v16p_zero()  v16p_dot_us(acc, w, x)   as v16i_dot_us, but the caller answers for the range: the final
 *                                 sum over columns 4k, 4k+1 and that over 4k+2, 4k+3 must each fit int16,
 *                                 and w[0]·x[0] + w[1]·x[1] of each step too (intermediate sums may wrap)
 *   v16p_add(a, b)  v16p_sub(a, b)
 *   v16p_offset(p, k)             every lane: k·Σ of the 16 int8 at p, 0 < k ≤ 32
 *   v16i_from_pairs(acc)          the finished sums
 *   v16i_scale_pairs(sum, acc, k) sum + finished sums · k, k in int16 range
 *   PI_REGISTERS                  defined to the number of vector registers
 *   PI_DOT_US_WIDE                defined to 1 where v16i_dot_us takes any unsigned byte (VNNI), else 0
 * Memory
 *   pi_prefetch(p)                ask for the line at p (T0); never faults
 *   pi_prefetch_l2(p)             the same into L2 (T1): for streams and rows read far ahead
 * Single values
 *   pi_f16_to_f32  pi_f32_to_f16  pi_bf16_to_f32  pi_f32_to_bf16  pi_fma(a, b, c)
 */
#ifndef PI_SIMD_H
#define PI_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PI_INLINE static inline __attribute__((always_inline, unused))

#if defined(PI_ISA_SCALAR) + defined(PI_ISA_AVX2) + defined(PI_ISA_AVX512) + defined(PI_ISA_NEON) != 1
#error "define exactly one PI_ISA_* before including simd.h"
#endif

#ifdef PI_ISA_SCALAR
#define PI_UNROLL /* 16 lanes of plain C would unroll into megabytes */
#else
#define PI_UNROLL _Pragma("GCC unroll 8")
#endif

PI_INLINE uint32_t pi_bits_of_f32(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
PI_INLINE float pi_f32_of_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* IEEE binary16 to binary32, exact; a signalling NaN comes out quiet, as the hardware does it. */
PI_INLINE float pi_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return pi_f32_of_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) |
                              (magnitude > 0x7c00u ? 0x400000u : 0));
    if (magnitude >= 0x400u) return pi_f32_of_bits(sign | ((magnitude << 13) + (112u << 23)));
    const float small = (float)magnitude * 0x1p-24f;
    return pi_f32_of_bits(sign | pi_bits_of_f32(small));
}

/* binary32 to binary16, round half to even, overflow to infinity, subnormals kept. */
PI_INLINE uint16_t pi_f32_to_f16(float x) {
    const uint32_t u = pi_bits_of_f32(x), magnitude = u & 0x7fffffffu;
    const uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: adding 0.5 rounds at 2^-24, the subnormal step */
        const float shifted = pi_f32_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (pi_bits_of_f32(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded >> 13) - (112u << 10)));
}

PI_INLINE float pi_bf16_to_f32(uint16_t h) { return pi_f32_of_bits((uint32_t)h << 16); }

/* binary32 to bfloat16, round half to even; a NaN keeps its high payload bits and is made quiet. */
PI_INLINE uint16_t pi_f32_to_bf16(float x) {
    const uint32_t u = pi_bits_of_f32(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 64u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

PI_INLINE float pi_fma(float a, float b, float c) { return fmaf(a, b, c); }
/* Bytes of a stream of tiles between use and prefetch: into L2 and from there into L1, or in one step. */
enum { PI_FAR_AHEAD = 16384, PI_NEAR_AHEAD = 3072, PI_ONLY_AHEAD = 8192 };
PI_INLINE void pi_prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
PI_INLINE void pi_prefetch_l2(const void *p) { __builtin_prefetch(p, 0, 2); }

#if defined(PI_ISA_SCALAR)
#include "simd_scalar.h"
#elif defined(PI_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(PI_ISA_AVX512)
#include "simd_avx512.h"
#else
#include "simd_neon.h"
#endif

PI_INLINE v16f v16f_load_f16_n(const uint16_t *p, int n) {
    uint16_t lane[16] = {0};
    memcpy(lane, p, (size_t)n * 2);
    return v16f_load_f16(lane);
}
PI_INLINE void v16f_store_f16_n(uint16_t *p, v16f a, int n) {
    uint16_t lane[16];
    v16f_store_f16(lane, a);
    memcpy(p, lane, (size_t)n * 2);
}

#endif
