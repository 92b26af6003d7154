/* quantize.c: rows of floats to the row types that are written, bit for bit as the format's reference rounds. */
#include "rows_decode.h"

#include <math.h>

#define PI_ISA_SCALAR 1 /* only for the conversions of single values */
#include "simd.h"

enum { VALUES = 32 }; /* per block of Q8_0 and Q4_0 */

static float largest_magnitude(const float *x, int *where) {
    float largest = 0.0f;
    *where = 0;
    for (int i = 0; i < VALUES; i++)
        if (fabsf(x[i]) > largest) largest = fabsf(x[i]), *where = i;
    return largest;
}

static void write_u16(uint8_t *out, uint16_t u) { memcpy(out, &u, 2); }

/* A scale so small that its inverse overflows would turn codes into infinities; such a block is zero. */
static float inverse_of(float d) {
    const float inverse = d == 0.0f ? 0.0f : 1.0f / d;
    return isfinite(inverse) ? inverse : 0.0f;
}

static int clamp(float x, int low, int high) {
    if (!(x > (float)low)) return low; /* NaN too */
    return x < (float)high ? (int)x : high;
}

/* As bits, magnitudes compare like integers; a NaN counts as nothing. */
static float largest_of(const float *x) {
    int32_t largest = 0;
    for (int i = 0; i < VALUES; i++) {
        const int32_t bits = (int32_t)(pi_bits_of_f32(x[i]) & 0x7fffffffu);
        const int32_t known = bits > 0x7f800000 ? 0 : bits;
        largest = known > largest ? known : largest;
    }
    return pi_f32_of_bits((uint32_t)largest);
}

/* d = max|x| / 127, code = x/d rounded half away from zero. No branches and no calls, so that it becomes vectors. */
static void block_to_q8_0(const float *x, uint8_t *out) {
    const float d = largest_of(x) / 127.0f, inverse = inverse_of(d);
    write_u16(out, pi_f32_to_f16(d));
    for (int i = 0; i < VALUES; i++) {
        float y = x[i] * inverse;
        y = y > -128.0f ? y : -128.0f; /* NaN too */
        y = y < 127.0f ? y : 127.0f;
        const int whole = (int)y;
        const float rest = y - (float)whole;
        out[2 + i] = (uint8_t)(int8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
    }
}

/* d = x_m / -8 with x_m the first value of largest magnitude; code = ⌊x/d + 8.5⌋ limited to 0..15. */
static void block_to_q4_0(const float *x, uint8_t *out) {
    int where;
    largest_magnitude(x, &where);
    const float d = x[where] / -8.0f, inverse = inverse_of(d);
    write_u16(out, pi_f32_to_f16(d));
    for (int i = 0; i < VALUES / 2; i++) {
        const int low = clamp(x[i] * inverse + 8.5f, 0, 15), high = clamp(x[i + 16] * inverse + 8.5f, 0, 15);
        out[2 + i] = (uint8_t)(low | high << 4);
    }
}

int pi_quantize_row(const float *x, int32_t row_type, int64_t columns, uint8_t *out) {
    switch (row_type) {
    case PI_F32: memcpy(out, x, sizeof(float) * (size_t)columns); return 0;
    case PI_F16:
        for (int64_t c = 0; c < columns; c++) write_u16(out + 2 * c, pi_f32_to_f16(x[c]));
        return 0;
    case PI_BF16:
        for (int64_t c = 0; c < columns; c++) write_u16(out + 2 * c, pi_f32_to_bf16(x[c]));
        return 0;
    case PI_Q8_0:
        for (int64_t b = 0; b < columns / VALUES; b++) block_to_q8_0(x + b * VALUES, out + b * 34);
        return 0;
    case PI_Q4_0:
        for (int64_t b = 0; b < columns / VALUES; b++) block_to_q4_0(x + b * VALUES, out + b * 18);
        return 0;
    default: return -1;
    }
}
