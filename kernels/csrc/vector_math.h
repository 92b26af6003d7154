/* exp, tanh and the normal distribution on 16 lanes: our own polynomials, so that every instruction set gives the
 * same bits. Fitted by us (weighted minimax by iterated least squares in 64-bit arithmetic, then rounded to 32);
 * the ulp bounds below are those of the fits; tests/kernels/test_operations.py holds the activation functions
 * built on them to 16 ulp of float64. NaN in, NaN out.
 */
#ifndef PI_VECTOR_MATH_H
#define PI_VECTOR_MATH_H

#include "simd.h"

PI_INLINE v16f v16f_fma1(v16f a, v16f b, float c) { return v16f_fma(a, b, v16f_set1(c)); }

/* e^x within 1 ulp; 0 below -104, infinity above 88.72, subnormal results rounded once.
 * x = n ln 2 + r, |r| ≤ ln 2 / 2; e^r = 1 + (r + r² p(r)). The bounds keep n in the range of two exact powers, and
 * min and max take their second operand when it is NaN. */
PI_INLINE v16f v16f_exp(v16f x) {
    v16f bounded = v16f_min(v16f_set1(89.0f), v16f_max(v16f_set1(-104.0f), x));
    v16i n = v16i_from_f32_rne(v16f_mul(bounded, v16f_set1(0x1.715476p+0f)));
    v16f whole = v16f_from_i32(n);
    v16f r = v16f_fma(whole, v16f_set1(-0x1.62e430p-1f), bounded);
    r = v16f_fma(whole, v16f_set1(0x1.05c610p-29f), r);
    v16f p = v16f_set1(0x1.6a1f4ep-10f);
    p = v16f_fma1(p, r, 0x1.123cd6p-7f);
    p = v16f_fma1(p, r, 0x1.555904p-5f);
    p = v16f_fma1(p, r, 0x1.55548ep-3f);
    p = v16f_fma1(p, r, 0x1.fffffcp-2f);
    v16f e = v16f_add(v16f_set1(1.0f), v16f_fma(v16f_mul(r, r), p, r));
    v16i half = v16i_srai(n, 1);
    return v16f_mul(v16f_mul(e, v16f_pow2i(half)), v16f_pow2i(v16i_sub(n, half)));
}

/* tanh x within 2 ulp: x + x³ p(x²) for |x| < 0.625, else ±(1 - 2 / (e^2|x| + 1)). */
PI_INLINE v16f v16f_tanh(v16f x) {
    v16f size = v16f_abs(x), z = v16f_mul(x, x), one = v16f_set1(1.0f);
    v16f p = v16f_set1(-0x1.76ac14p-8f);
    p = v16f_fma1(p, z, 0x1.5256d6p-6f);
    p = v16f_fma1(p, z, -0x1.b84448p-5f);
    p = v16f_fma1(p, z, 0x1.110768p-3f);
    p = v16f_fma1(p, z, -0x1.555534p-2f);
    v16f small = v16f_fma(v16f_mul(p, z), x, x);
    v16f e = v16f_exp(v16f_add(size, size));
    v16f large = v16f_sub(one, v16f_div(v16f_set1(2.0f), v16f_add(e, one)));
    large = v16f_select_gt(v16f_zero(), x, v16f_neg(large), large);
    return v16f_select_gt(v16f_set1(0.625f), size, small, large);
}

/* 1 / (1 + e^-x) */
PI_INLINE v16f v16f_sigmoid(v16f x) {
    v16f one = v16f_set1(1.0f);
    return v16f_div(one, v16f_add(one, v16f_exp(v16f_neg(x))));
}

/* e^x - 1 = 2t / (1 - t), t = tanh(x / 2): no cancellation near 0. */
PI_INLINE v16f v16f_expm1(v16f x) {
    v16f t = v16f_tanh(v16f_mul(x, v16f_set1(0.5f)));
    return v16f_div(v16f_add(t, t), v16f_sub(v16f_set1(1.0f), t));
}

/* log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|; log(1 + y) = 2 atanh(s), s = y / (2 + y) ≤ 1/3, by its Taylor
 * series up to s^17. */
PI_INLINE v16f v16f_softplus(v16f x) {
    v16f y = v16f_exp(v16f_neg(v16f_min(v16f_abs(x), v16f_set1(104.0f)))); /* not NaN: that comes from the max */
    v16f s = v16f_div(y, v16f_add(y, v16f_set1(2.0f))), z = v16f_mul(s, s);
    v16f p = v16f_set1(2.0f / 17);
    p = v16f_fma1(p, z, 2.0f / 15);
    p = v16f_fma1(p, z, 2.0f / 13);
    p = v16f_fma1(p, z, 2.0f / 11);
    p = v16f_fma1(p, z, 2.0f / 9);
    p = v16f_fma1(p, z, 2.0f / 7);
    p = v16f_fma1(p, z, 2.0f / 5);
    p = v16f_fma1(p, z, 2.0f / 3);
    v16f log = v16f_fma(v16f_mul(z, s), p, v16f_add(s, s));
    return v16f_add(v16f_max(v16f_zero(), x), log);
}

/* Q(a) = (1 - erf(a / √2)) / 2 for a ≥ 0: the tail of the normal distribution, relative error below 8 ulp.
 * Q(a) = e^(-a²/2) u p(u), u = 1 / (1 + a / 4); what rounding takes from a² is put back by the second factor. */
PI_INLINE v16f v16f_normal_tail(v16f a) {
    v16f one = v16f_set1(1.0f);
    v16f u = v16f_div(one, v16f_fma(a, v16f_set1(0.25f), one));
    v16f p = v16f_set1(0x1.15bb8ep-6f);
    p = v16f_fma1(p, u, -0x1.09b0b2p-4f);
    p = v16f_fma1(p, u, 0x1.d0443cp-5f);
    p = v16f_fma1(p, u, 0x1.609902p-6f);
    p = v16f_fma1(p, u, 0x1.31e84ap-6f);
    p = v16f_fma1(p, u, 0x1.55524cp-4f);
    p = v16f_fma1(p, u, 0x1.2bd3c0p-4f);
    p = v16f_fma1(p, u, 0x1.8620acp-4f);
    p = v16f_fma1(p, u, 0x1.97a958p-4f);
    p = v16f_fma1(p, u, 0x1.988f4ep-4f);
    v16f square = v16f_mul(a, a), lost = v16f_fma(a, a, v16f_neg(square));
    v16f e = v16f_exp(v16f_mul(square, v16f_set1(-0.5f)));
    e = v16f_fma(v16f_mul(lost, v16f_set1(-0.5f)), e, e);
    return v16f_mul(e, v16f_mul(u, p));
}

#endif
