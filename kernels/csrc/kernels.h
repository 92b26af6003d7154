/* Types and tables shared by every C file of the extension.
 *
 * A body `op.inc` is compiled once per instruction set (CMake generates the two-line files); it defines its
 * entry points as PI_FN(name), which carries the set's name, so that the linker can never mix two copies.
 * `table.inc` gathers the entry points of one set into its `pi_kernels` table, and the pool holds the table
 * that was chosen. boundary.c judges what comes from Python: nothing below checks sizes again.
 */
#ifndef PI_KERNELS_H
#define PI_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* numbers of the GGUF format */
enum pi_row_type {
    PI_F32 = 0,
    PI_F16 = 1,
    PI_Q4_0 = 2,
    PI_Q4_1 = 3,
    PI_Q5_0 = 6,
    PI_Q5_1 = 7,
    PI_Q8_0 = 8,
    PI_Q2_K = 10,
    PI_Q3_K = 11,
    PI_Q4_K = 12,
    PI_Q5_K = 13,
    PI_Q6_K = 14,
    PI_IQ2_XXS = 16,
    PI_IQ2_XS = 17,
    PI_IQ3_XXS = 18,
    PI_IQ1_S = 19,
    PI_IQ4_NL = 20,
    PI_IQ3_S = 21,
    PI_IQ2_S = 22,
    PI_IQ4_XS = 23,
    PI_IQ1_M = 29,
    PI_BF16 = 30,
    PI_TQ1_0 = 34,
    PI_TQ2_0 = 35,
    PI_MXFP4 = 39,
    PI_NVFP4 = 40,
    PI_TYPES = 64,
    /* Forms that have no number in files (transcode.h). */
    PI_SIGNED_16 = 64,
    PI_MINIMUM_16 = 65,
    PI_TABLE_32 = 66,
    PI_TABLE_16 = 67,
    PI_FLOAT8_16 = 68,
};

enum {
    PI_TILE = 16,  /* rows of an interleaved weight tile, key positions of a cache tile, lanes of v16f */
    PI_BLOCK = 32, /* activations that share one scale */
    PI_MAX_HEAD_DIM = 1024,
    PI_CACHE_READ_AHEAD = 32, /* bytes that attention may read past the last value of a cache */
    PI_QUERIES = 16,          /* most queries of one call of `attend` */
    PI_BINS = 128,            /* of a histogram of contributions */
    PI_CHUNK = 512,           /* neurons whose down rows are summed into one partial sum */
    /* The input of sign predictors as a code of words: Σ|q|, the step as a float, unused words up to the header's end,
     * then a plane of signs and one of each bit of |q|, a word for 32 columns; bits beyond the last column are 0. */
    PI_SIGN_HEADER = 16,
    PI_SIGN_PLANES = 4,
    PI_SIGN_LARGEST = (1 << PI_SIGN_PLANES) - 1,
};
#define PI_SIGN_RANGE 3.0f /* the largest |q| in root mean squares */

static inline int64_t pi_sign_code_words(int64_t width) {
    return PI_SIGN_HEADER + (PI_SIGN_PLANES + 1) * ((width + 31) / 32);
}

/* How weights lie in memory: interleaved 16-row tiles, padded with zeros to a whole one (quantize_pack.c); product rows
 * (bundle.h); columns of which some can be left out (columns.h). */
enum pi_weight_layout { PI_TILES, PI_PICKED_ROWS, PI_PICKED_COLUMNS, PI_LAYOUTS };

typedef struct {
    int32_t row_type; /* a form (transcode.h) */
    int32_t layout;
    const int8_t *table;                      /* what its codes stand for; NULL for most */
    int64_t rows, columns, tiles, tile_bytes; /* picked rows: groups of 16; picked columns: stored blocks */
    uint8_t *data;
} pi_matrix;

static inline int pi_row_is_float(int32_t row_type) {
    return row_type == PI_F32 || row_type == PI_F16 || row_type == PI_BF16;
}

typedef struct {         /* weights as rows, `stride` bytes apart: plain GGUF rows, or one part of bundles */
    int32_t row_type;    /* of bundles: a form */
    const int8_t *table; /* of bundles, as in pi_matrix */
    int64_t rows, columns, stride;
    const uint8_t *data;
} pi_rows;

enum { PI_GATE, PI_UP, PI_DOWN, PI_PARTS };

typedef struct { /* rows of neurons one after the other (bundle.h); `data` of a part that is not there: NULL */
    int64_t rows, columns;
    pi_rows part[PI_PARTS];
} pi_bundle;

typedef struct { /* rows to read next: prefetched while others are computed. `count` 0: none */
    const pi_rows *rows;
    const int32_t *index;
    int64_t count;
} pi_ahead;

typedef struct { /* quantised activations: q [T, columns], d and s [T, columns / PI_BLOCK]; s = Σq, an exact integer */
    int8_t *q;
    float *d;
    float *s;
    int64_t columns;
} pi_acts;

typedef struct {  /* one layer's keys and values: f16, or with scales int8 in blocks of PI_BLOCK values of a head */
    void *keys;   /* [kv_heads, ceil(capacity / 16), head_dim, 16]: the lane is the position in the tile */
    void *values; /* [kv_heads, capacity, value_dim], readable for 32 bytes past the end */
    uint16_t *key_scales;   /* f16 [kv_heads, ceil(capacity / 16), head_dim / PI_BLOCK, 16]; NULL: all is f16 */
    uint16_t *value_scales; /* f16 [kv_heads, capacity, value_dim / PI_BLOCK] */
    int64_t capacity, kv_heads, head_dim, value_dim;
} pi_cache;

typedef struct { /* one query vector of attention and the positions of its keys: [first, last) */
    const float *q;
    float *out;
    int64_t first, last;
    float slope; /* subtracted from a score for each position between the key and the query */
    float sink;  /* a score without key, only in the sum of the exponentials; -infinity: none */
} pi_query;

enum pi_activation {
    PI_SILU,
    PI_GELU_TANH,
    PI_GELU_ERF,
    PI_RELU,
    PI_RELU2,
    PI_DRELU,
    PI_FATRELU,
    PI_SIGMOID,
    PI_SOFTPLUS,
    PI_SWIGLU_OAI,
    PI_SWIGLU_CLAMPED,
    PI_CLAMPED_SILU,
    PI_ACTIVATIONS,
    PI_OAI_UP = PI_ACTIVATIONS, /* what PI_SWIGLU_OAI does to up */
    PI_CLAMPED_UP               /* and the two after it */
};

/* Functions of single values with up to four constants a, b, c, d. */
enum pi_map {
    PI_MAP_SCALE,   /* a x */
    PI_MAP_SOFTCAP, /* a tanh(x / a) */
    PI_MAP_CLAMP,   /* x within [a, b] */
    PI_MAP_XIELU,   /* x > 0: a x² + c x; else b (e^min(x, d) - 1 - x) + c x */
    PI_MAPS
};

typedef struct pi_kernels {
    const char *isa;

    /* Weights (quantize.inc, matmul.inc, rows.inc). */
    void (*quantize_acts)(const float *x, int64_t columns, int8_t *q, float *d, float *s);
    void (*matmul)(const pi_matrix *m, const float *x, const pi_acts *a, int64_t token0, int64_t tokens, int64_t tile0,
                   int64_t tile1, const float *bias, int accumulate, float *out, int64_t out_stride);
    /* out[k] = row index[k] of product rows · activations, k in [begin, end); rows up to `count` are asked for ahead, and
     * then those of `ahead`. */
    void (*product_rows)(const pi_rows *w, const int32_t *index, int64_t count, int64_t begin, int64_t end,
                         const pi_ahead *ahead, const float *x, const pi_acts *a, int64_t token, float *out);
    /* out[t · stride + k] of rows index[k] (NULL: row k) for tokens [0, tokens), k of tiles of 16 below `count`. */
    void (*product_many_rows)(const pi_rows *w, const int32_t *index, int64_t count, int64_t tile0, int64_t tile1,
                              const float *x, const pi_acts *a, int64_t tokens, float *out, int64_t stride);
    /* y[column0, column1) += Σ_k h[k] row index[k] of sum rows (`index` NULL: row k); scratch: pi_sum_scratch_bytes. */
    void (*sum_rows)(const pi_rows *r, const int32_t *index, const float *h, int64_t count, int64_t column0,
                     int64_t column1, void *scratch, float *y);
    /* As sum_rows over all columns for neurons of one chunk; `terms` not NULL: what would be added to y goes there,
     * pi_sum_terms numbers (bundle.h). 0: there is none. */
    int (*sum_chunk)(const pi_rows *r, const int32_t *index, const float *h, int64_t count, const pi_ahead *ahead,
                     void *scratch, float *y, float *terms);
    /* Adds terms of sum_chunk to y[column0, column1). */
    void (*add_terms)(const pi_rows *r, const float *terms, int64_t column0, int64_t column1, float *y);
    /* As sum_rows over all rows, for tokens [0, tokens) of h [tokens, rows] and y [tokens, columns]. */
    void (*sum_all_rows)(const pi_rows *r, const float *h, int64_t tokens, int64_t column0, int64_t column1, float *y);
    /* y[rows of lines of 128] += Σ columns · activations of one token, over picked columns; y as in matmul's order. */
    void (*sum_columns)(const pi_matrix *m, const int8_t *q, const float *d, const float *s, int64_t line0,
                        int64_t line1, float *y);
    void (*dequantize_row)(const uint8_t *row, int32_t row_type, int64_t columns, float *out);

    /* Vectors (normalize.inc, rope.inc, elementwise.inc, activate.inc); each call handles one token. */
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t width, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int64_t width, float *out);
    void (*rope)(float *x, const float *cos, const float *sin, int64_t heads, int64_t head_dim, int64_t half, int neox);
    void (*add)(const float *x, int64_t count, float *out);
    void (*scale)(float factor, int64_t count, float *x);
    /* `cut`: what a gate must be above with PI_FATRELU; the largest gate (PI_CLAMPED_SILU: silu of it) and |up| with the
     * clamped ones. */
    void (*activate)(int32_t kind, float cut, const float *gate, const float *up, int64_t count, float *out);
    /* out[i] *= x[(first + i) / repeat] */
    void (*multiply)(const float *x, int64_t repeat, int64_t first, int64_t count, float *out);
    void (*add_scaled)(const float *x, float factor, int64_t count, float *out);
    void (*map)(int32_t kind, const float constants[4], int64_t count, float *x);
    void (*l2_norm)(const float *x, float eps, int64_t width, float *out);
    /* out = max(x - mean - deviations · standard deviation, 0) */
    void (*keep_top)(const float *x, float deviations, int64_t width, float *out);
    /* Indexes of values above their thresholds (NULL: above zero), ascending; returns how many. */
    int64_t (*list_active)(const float *value, const float *threshold, int64_t count, int32_t *index);
    /* The same for magnitudes: indexes of values with |value| above their thresholds. */
    int64_t (*list_large)(const float *value, const float *threshold, int64_t count, int32_t *index);
    /* out = 0 where list_large would leave the value out. */
    void (*keep_large)(const float *value, const float *threshold, int64_t count, float *out);

    /* Sign predictors (signs.inc): the code of one input, and scores of rows whose signs lie as words of 32 columns,
     * 16 rows beside each other. */
    void (*sign_code)(const float *x, int64_t width, uint32_t *code);
    void (*sign_scores)(const uint32_t *signs, const uint32_t *code, int64_t width, int64_t rows, int64_t tile0,
                        int64_t tile1, float *out);

    /* Attention (attention.inc). */
    void (*store_kv)(const float *k, const float *v, const pi_cache *cache, int64_t position);
    /* `scratch`: count × (capacity rounded up to 16) + count × (value_dim rounded up to 16) floats. */
    void (*attend)(const pi_query *queries, int64_t count, const pi_cache *cache, int64_t kv_head, float scale,
                   float softcap, float *scratch);

    /* Recurrent blocks (recurrent.inc), one token each; states are changed in place. */
    /* Channels [begin, end) of a causal convolution: weight [length, width], state [length - 1, width]. */
    void (*convolve)(const float *x, const float *weight, const float *bias, int64_t length, int64_t width,
                     int64_t begin, int64_t end, int silu, float *state, float *out);
    /* S = e^(step · decay) S + step · x · in, out = read · S + direct · x: per channel, S and decay [size, width]. */
    void (*scan_channels)(const float *x, const float *step, const float *decay, const float *in, const float *read,
                          const float *direct, int64_t size, int64_t width, int64_t begin, int64_t end, float *state,
                          float *out);
    /* The same for one head, S [size, width]. */
    void (*scan_head)(const float *x, float step, float decay, const float *in, const float *read, float direct,
                      int64_t size, int64_t width, float *state, float *out);
    /* S = e^decay S; S += k (rate (v - Sᵀk))ᵀ; out = scale Sᵀq; S [size, width]. */
    void (*delta_head)(const float *q, const float *k, const float *v, const float *decay, int64_t decays, float rate,
                       float scale, int64_t size, int64_t width, float *state, float *out);

    /* S = diag(e^decay) S - (unit rate) (Sᵀunit)ᵀ + k vᵀ; out = Sᵀq; S [size, width]. */
    void (*general_delta_head)(const float *q, const float *k, const float *v, const float *decay, const float *unit,
                               const float *rate, int64_t size, int64_t width, float *state, float *out);

    /* Profiling: one token's activated gates and factors of `count` neurons. Adds to counts where both are not zero,
     * and to squares; bins (or NULL) of |act · factor|, four to an octave from 2^-16 to 2^16: the top bits of the
     * float. Zero and everything smaller: bin 0. NaN and everything larger: the last one. */
    void (*observe)(const float *restrict act, const float *restrict factor, int64_t count, uint64_t *restrict counts,
                    double *restrict gate_squares, double *restrict up_squares, int32_t *restrict bins);

    /* Reads memory at full width; returns a value that depends on every byte (so nothing is left out). */
    uint64_t (*read_memory)(const uint8_t *data, int64_t bytes);
} pi_kernels;

/* The table of each instruction set that was compiled; NULL-terminated list, best first. */
const pi_kernels *const *pi_available_kernels(void);

/* Row formats (quantize*.c): sizes in bytes, 0 for an unknown type or columns that are not whole blocks. */
int64_t pi_row_bytes(int32_t row_type, int64_t columns);
int64_t pi_tile_bytes(int32_t row_type, int64_t columns);
/* Interleaves tiles [tile0, tile1) of plain rows; `out` is the start of the whole packed matrix. */
void pi_pack_tiles(const uint8_t *source, int32_t row_type, int64_t rows, int64_t columns, int64_t tile0, int64_t tile1,
                   uint8_t *out);
/* Rounds one row of floats to F32, F16, BF16, Q8_0 or Q4_0 as the format's reference does; 0, or -1 when the
 * type is none of these. */
int pi_quantize_row(const float *x, int32_t row_type, int64_t columns, uint8_t *out);

#if defined(PI_ISA_AVX512)
#define PI_ISA_SUFFIX avx512
#elif defined(PI_ISA_AVXVNNI) /* with PI_ISA_AVX2, whose code it is */
#define PI_ISA_SUFFIX avxvnni
#elif defined(PI_ISA_AVX2)
#define PI_ISA_SUFFIX avx2
#elif defined(PI_ISA_NEON)
#define PI_ISA_SUFFIX neon
#elif defined(PI_ISA_SCALAR)
#define PI_ISA_SUFFIX scalar
#endif

#ifdef PI_ISA_SUFFIX
#define PI_JOIN_(name, suffix) pi_##name##_##suffix
#define PI_JOIN(name, suffix) PI_JOIN_(name, suffix)
#define PI_STRING_(text) #text
#define PI_STRING(text) PI_STRING_(text)
/* The name of an entry point in the instruction set that is being compiled: PI_FN(matmul) = pi_matmul_avx2. */
#define PI_FN(name) PI_JOIN(name, PI_ISA_SUFFIX)
#endif

#endif
