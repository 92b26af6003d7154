/* What each operation of a program holds; operations.h lists them, and boundary.c has judged every buffer and size
 * before an operation gets its own. */
#ifndef PI_OPERATION_TYPES_H
#define PI_OPERATION_TYPES_H

#include "kernels.h"
#include "operations.h"
#include "records.h"
#include "units.h"

#define PI_OPERATION_NUMBER(NAME, objects, integers, floats, condition) PI_OP_##NAME,
typedef enum { PI_OPERATIONS(PI_OPERATION_NUMBER) PI_OP_KINDS } pi_op_kind;

/* Vectors are [max_tokens, width] with the named width; token t starts at t · width. */
typedef struct {
    const int32_t *tokens;
    int32_t *ids; /* [max_tokens]: the ids of this run, copied and checked; of the program */
    pi_rows table;
    float *out;
    float scale;
} pi_embed;

typedef struct { /* A group is width / groups values; keep_top: eps is the number of standard deviations. */
    const float *src, *weight, *bias;
    float *out;
    int64_t width, groups;
    int64_t weight_step; /* of weight and bias, from group to group: 0 where all groups share them */
    float eps;
} pi_norm;

typedef struct {
    const float *src;
    pi_acts acts;
} pi_quantize;

typedef struct {
    const pi_matrix *matrix;
    const float *src; /* NULL: the activations */
    pi_acts acts;
    const float *bias;
    float *out;
    int accumulate;
    int64_t chunk;             /* tiles that a thread takes at once */
    int64_t first_tile, tiles; /* which rows of the matrix */
} pi_matmul;

typedef struct {
    float *x;
    const float *cos, *sin;                /* [capacity, half] */
    int64_t heads, head_dim, half, offset; /* the rotated values begin `offset` values into each head */
    int neox;
} pi_rope;

typedef struct { /* k, v: [max_tokens, kv_heads · head_dim] */
    const float *k, *v;
    int64_t slot, width, value_width;
} pi_store;

typedef struct {
    const float *q;
    float *out;
    const float *sinks, *slopes; /* [heads], or NULL */
    int64_t slot, heads, kv_heads, head_dim, value_dim, capacity, window;
    int64_t chunk; /* of positions, whose queries see no keys of other chunks; 0: none */
    float scale, softcap;
    int64_t q_values, out_values; /* of the buffers, checked when the slot is known */
} pi_attention;

typedef struct {
    int32_t kind;
    float cut;
    const float *gate, *up;
    float *out;
    int64_t width;
} pi_activate;

typedef struct {
    const float *src;
    float *out;
    int64_t width;
    int64_t src_stride; /* stride of src between tokens: the width, or 0 for one vector for all tokens */
    float factor;
} pi_add;

typedef struct { /* out *= src; each value of src multiplies `repeat` columns */
    const float *src;
    float *out;
    int64_t width, repeat, src_stride;
} pi_multiply;

typedef struct { /* a function of single values, in place: pi_map */
    int32_t kind;
    float constants[4];
    float *x;
    int64_t width;
} pi_map_op;

typedef struct { /* `count` columns of each of `heads`, which lie src_step and out_step columns apart */
    const float *src;
    float *out;
    int64_t src_width, out_width, src_first, out_first, heads, src_step, out_step, count;
} pi_copy;

typedef struct { /* out_b = Σ_a coefficient[b, a] src_a; src [max_tokens, count, width], out [.., made, width] */
    const float *src, *coefficients; /* coefficients: [max_tokens, made, count] */
    float *out;
    int64_t count, width, made;
} pi_combine;

typedef struct { /* x *= table[position] */
    float *x;
    const float *table;
    int64_t width;
} pi_scale_by_position;

typedef struct {
    const float *h;
    const pi_bundle *bundle;
    float *out;
    int accumulate;
} pi_sum;

/* Neurons of a sparse operation, added up over runs and tokens: `total` it looked at, `active` it selected, `confirmed`
 * are those whose rows were all read: a named neuron's gate may turn out to be zero. */
typedef struct {
    int64_t active, confirmed, total;
} pi_neurons;

/* What a sparse FFN selects neurons by: a predictor's scores or the gate, which have to be above the threshold; or the
 * known factor of the product, act(gate) or up, whose size has to be. */
enum { PI_BY_VALUE, PI_BY_GATE_SIZE, PI_BY_UP_SIZE };
enum { PI_FEW_TOKENS = 8 /* up to here only rows that some token selects are read, once; beyond, all are */ };

/* Whether a sparse FFN reads the rows of all its neurons, of which its tokens select `selected`. */
static inline int pi_reads_all(int64_t tokens, int64_t selected, int64_t neurons) {
    return tokens > PI_FEW_TOKENS || (tokens > 1 && selected * 4 > neurons * 3);
}

typedef struct { /* neurons whose `select` is above `threshold` (NULL: zero) */
    int32_t kind, rule;
    float cut; /* gates up to it contribute nothing */
    const float *select, *threshold;
    const float *src;        /* input of float rows */
    pi_acts acts;            /* input of quantised rows */
    const pi_bundle *bundle; /* without gate rows, `select` is the gate; without up rows, it is not gated */
    float *out, *h;
    float *gate;         /* scratch for gate rows, else NULL */
    const float *bias;   /* of gate rows, or NULL */
    pi_neurons *counted; /* of the program */
    int accumulate;
} pi_sparse_ffn;

typedef struct { /* out = 0 where |value| is not above the threshold [width] */
    const float *value, *threshold;
    float *out;
    int64_t width;
} pi_keep;

typedef struct { /* code [max_tokens, pi_sign_code_words(width)] of the input */
    const float *src;
    uint32_t *code;
    int64_t width;
} pi_sign_code;

typedef struct { /* signs [ceil(rows / 16), ceil(width / 32), 16] words; scores [max_tokens, rows] */
    const uint32_t *signs, *code;
    float *out;
    int64_t rows, width;
} pi_sign_scores;

typedef struct { /* counters of `width` neurons that each run adds to */
    int32_t kind;
    float cut;
    const float *gate, *up; /* up NULL: a factor of one */
    int64_t width;
    uint64_t *counts;                  /* [width] */
    uint32_t *histogram;               /* [width, PI_BINS], or NULL */
    double *gate_squares, *up_squares; /* [width] */
} pi_observe;

typedef struct { /* head h: src columns from src_first + h · src_step on, times matrix h, to out_first + h · out_step */
    const pi_matrix *const *matrices; /* [heads], all of one size and type */
    const float *src;
    float *out;
    int64_t heads, max_tokens, src_width, src_first, src_step, out_width, out_first, out_step;
} pi_head_matmul;

enum { PI_MAX_EXPERTS = 1024 };
enum { PI_ROUTE_SOFTMAX, PI_ROUTE_SIGMOID };

typedef struct {
    const float *scores, *bias; /* [max_tokens, experts]; [experts], for the choice only, not the weights; or NULL */
    int32_t *chosen;            /* [max_tokens, used], ascending */
    float *weights;             /* [max_tokens, used] */
    const float *shared_score;  /* [max_tokens, 1], or NULL */
    float *shared_weight;       /* its sigmoid */
    int64_t experts, used, groups, groups_used;
    int kind, normalized;
    float scale;
} pi_route;

typedef struct { /* a router's choice, and the experts of this part: NULL for the others */
    const int32_t *chosen;
    const float *weights;
    const pi_matrix *const *here;
    int64_t experts, used, max_tokens;
} pi_expert_choice;

/* Below, buffers of pairs are [max_tokens · used, width] (experts.c). */
typedef struct {
    pi_expert_choice choice;
    const float *src;
    pi_acts acts; /* of the tokens */
    float *out;
    pi_acts out_acts;
    int64_t width;
    int weigh, needs_floats;
} pi_expert_gather;

typedef struct {
    pi_expert_choice choice;
    const float *token_src, *src; /* of tokens (read for a single token if `of_tokens`), and of pairs */
    pi_acts token_acts, acts;
    const float *bias;   /* [experts, rows], or NULL */
    const float *scales; /* [experts], factors of the products before the bias; or NULL */
    float *out;
    int64_t tiles, chunk;
    int of_tokens;
} pi_expert_matmul;

typedef struct { /* the product of picked rows where the gate is above the cut, zero elsewhere */
    pi_expert_matmul product;
    const float *gate; /* [pairs, rows] */
    float cut;
} pi_expert_rows;

typedef struct { /* the product of picked columns */
    pi_expert_choice choice;
    pi_acts acts; /* of pairs */
    const float *bias;
    float *out;
    int64_t rows;
    pi_neurons *counted; /* of the program */
} pi_expert_columns;

typedef struct {
    pi_expert_choice choice;
    int32_t kind;
    float cut;
    const float *gate, *up;
    float *out;
    pi_acts acts;
    int64_t width;
} pi_expert_activate;

typedef struct {
    pi_expert_choice choice;
    const float *rows;
    float *out;
    int64_t width;
    int accumulate, weigh;
} pi_expert_sum;

typedef struct {
    pi_expert_choice choice;
    int64_t *totals;  /* sums of runs, and of experts that some token of a run took */
    uint64_t *counts; /* [experts], as are the squares; or NULL */
    double *gate_squares, *up_squares;
} pi_expert_count;

/* Recurrent blocks: what they keep from token to token lies in the slot. */
typedef struct {
    const float *src, *weight, *bias; /* [max_tokens, src_width]; [length, width]; [width], or NULL */
    float *out;
    int64_t slot, src_width, src_first, width, length;
    int silu;
} pi_convolve;

typedef struct {                                 /* scan_channels: `heads` channels, one head_dim wide */
    const float *x, *step, *decay, *in, *direct; /* `in` holds what enters and what is read, at in_first, read_first */
    float *out;
    int64_t slot, x_width, heads, head_dim, groups, size, in_width, in_first, read_first;
} pi_scan;

typedef struct {
    const float *qk, *v, *decay, *rate; /* qk: queries, then keys, [max_tokens, 2 · key_heads · size] */
    float *out;
    int64_t slot, heads, head_dim, key_heads, size, v_width, v_first;
    int interleaved; /* key head h / repeats, else h mod key_heads */
    int64_t decays;  /* of a head: one, or one for each of `size` channels */
    float scale;
} pi_delta_net;

typedef struct { /* [max_tokens, heads · size], but for v and out, which are [max_tokens, heads · head_dim] */
    const float *q, *k, *v, *decay, *unit, *rate;
    float *out;
    int64_t slot, heads, size, head_dim;
} pi_general_delta;

typedef struct {            /* units that the next operations read, and units of later layers */
    pi_units *const *units; /* NULL: closed meanwhile */
    pi_unit_demand now, next[PI_UNITS_AHEAD];
} pi_fetch;

enum { PI_NEEDED_NOW, PI_NEEDED_PERHAPS, PI_NEEDED_SOON, PI_NEEDED_WAYS };

typedef struct {                /* records of the neurons that a sparse FFN is going to read */
    pi_records *const *records; /* NULL: closed meanwhile */
    const float *select, *threshold;
    int64_t layer, neurons, first, count; /* of the layer's neurons, `count` from `first` on */
    int32_t rule;
    int ahead; /* PI_NEEDED_NOW, or nothing waits for them */
} pi_fetch_records;

typedef struct {
    pi_op_kind kind;
    int independent; /* the next operation, a matmul, neither reads nor writes what this one writes */
    int by_token;    /* vector operations: one of the consecutive vector operations needs whole tokens */
    union {
        pi_embed embed;
        pi_norm norm;
        pi_quantize quantize;
        pi_matmul matmul;
        pi_rope rope;
        pi_store store;
        pi_attention attention;
        pi_activate activate;
        pi_add add;
        pi_sum sum;
        pi_sparse_ffn sparse_ffn;
        pi_observe observe;
        pi_keep keep;
        pi_multiply multiply;
        pi_map_op map;
        pi_copy copy;
        pi_scale_by_position scale_by_position;
        pi_head_matmul head_matmul;
        pi_route route;
        pi_expert_gather expert_gather;
        pi_expert_matmul expert_matmul;
        pi_expert_rows expert_rows;
        pi_expert_columns expert_columns;
        pi_expert_activate expert_activate;
        pi_expert_sum expert_sum;
        pi_expert_count expert_count;
        pi_convolve convolve;
        pi_scan scan;
        pi_delta_net delta_net;
        pi_general_delta general_delta;
        pi_combine combine;
        pi_sign_code sign_code;
        pi_sign_scores sign_scores;
        pi_fetch fetch;
        pi_fetch_records fetch_records;
    } u;
} pi_op;

#endif
