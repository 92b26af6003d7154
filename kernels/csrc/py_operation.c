/* What an operation was given, put into its struct. */
#include "boundary.h"

static pi_rows rows_of(void *data, const int64_t *i) {
    return (pi_rows){.row_type = (int32_t)i[0], .rows = i[1], .columns = i[2], .stride = i[3], .data = data};
}

static pi_acts acts_of(void *const *p, int64_t columns) {
    return (pi_acts){.q = p[0], .d = p[1], .s = p[2], .columns = columns};
}

/* Tiles that a thread takes at once: some 16 KiB, so that taking costs nothing and threads end together. */
static int64_t chunk_of(const pi_matrix *m) {
    int64_t tiles = (16 << 10) / m->tile_bytes;
    return tiles > 1 ? tiles : 1;
}

static pi_expert_choice choice_of(const void *chosen, const void *weights, const void *here, const int64_t *i) {
    return (pi_expert_choice){chosen, weights, here, i[0], i[1], i[2]};
}

static pi_op expert_matmul_of(void *const *p, const int64_t *i) {
    const pi_matrix *const *here = p[1], *first = NULL;
    for (int64_t e = 0; e < i[0] && !first; e++) first = here[e];
    pi_op op = {.kind = PI_OP_EXPERT_MATMUL, .independent = (int)i[4]};
    op.u.expert_matmul = (pi_expert_matmul){.choice = choice_of(p[0], NULL, p[1], i),
                                            .token_src = p[2],
                                            .token_acts = acts_of(p + 3, first->columns),
                                            .src = p[6],
                                            .acts = acts_of(p + 7, first->columns),
                                            .bias = p[10],
                                            .scales = p[11],
                                            .out = p[12],
                                            .tiles = first->tiles,
                                            .chunk = chunk_of(first),
                                            .of_tokens = (int)i[3]};
    return op;
}

/* Its `tiles` are rows: single ones are picked. */
static pi_op expert_rows_of(void *const *p, const int64_t *i, float cut) {
    void *const product[] = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], NULL, p[12]};
    const int64_t integers[] = {i[0], i[1], i[2], i[3], 0};
    const pi_op matmul = expert_matmul_of(product, integers);
    pi_op op = {.kind = PI_OP_EXPERT_ROWS};
    op.u.expert_rows = (pi_expert_rows){matmul.u.expert_matmul, p[11], cut};
    op.u.expert_rows.product.tiles = i[4];
    return op;
}

pi_op pi_op_of(pi_op_kind kind, const pi_given *a) {
    pi_op op = {.kind = kind};
    void *const *p = a->p;
    const int64_t *i = a->i;
    switch (kind) {
    case PI_OP_EMBED:
        op.u.embed = (pi_embed){.tokens = p[0], .table = rows_of(p[1], i), .out = p[2], .scale = a->f[0]};
        break;
    case PI_OP_RMS_NORM: op.u.norm = (pi_norm){p[0], p[1], NULL, p[2], i[0], i[1], i[2], a->f[0]}; break;
    case PI_OP_LAYER_NORM: op.u.norm = (pi_norm){p[0], p[1], p[2], p[3], i[0], i[1], i[2], a->f[0]}; break;
    case PI_OP_L2_NORM:
    case PI_OP_KEEP_TOP: op.u.norm = (pi_norm){p[0], NULL, NULL, p[1], i[0], i[1], 0, a->f[0]}; break;
    case PI_OP_QUANTIZE: op.u.quantize = (pi_quantize){p[0], acts_of(p + 1, i[0])}; break;
    case PI_OP_MATMUL: {
        const pi_matrix *m = p[0];
        op.u.matmul = (pi_matmul){.matrix = m,
                                  .src = p[1],
                                  .acts = acts_of(p + 2, m->columns),
                                  .bias = p[5],
                                  .out = p[6],
                                  .accumulate = (int)i[0],
                                  .chunk = chunk_of(m),
                                  .first_tile = i[2] / PI_TILE,
                                  .tiles = (i[2] + i[3] + PI_TILE - 1) / PI_TILE - i[2] / PI_TILE};
        op.independent = (int)i[1];
        break;
    }
    case PI_OP_ROPE: op.u.rope = (pi_rope){p[0], p[1], p[2], i[0], i[1], i[2], i[3], (int)i[4]}; break;
    case PI_OP_STORE_KV: op.u.store = (pi_store){p[0], p[1], i[0], i[1], i[2]}; break;
    case PI_OP_ATTENTION:
        op.u.attention = (pi_attention){.q = p[0],
                                        .out = p[1],
                                        .q_values = a->values[0],
                                        .out_values = a->values[1],
                                        .sinks = p[2],
                                        .slopes = p[3],
                                        .slot = i[0],
                                        .heads = i[1],
                                        .window = i[2],
                                        .chunk = i[3],
                                        .scale = a->f[0],
                                        .softcap = a->f[1]};
        break;
    case PI_OP_ACTIVATE: op.u.activate = (pi_activate){(int32_t)i[0], a->f[0], p[0], p[1], p[2], i[1]}; break;
    case PI_OP_ADD: op.u.add = (pi_add){p[0], p[1], i[0], i[1], a->f[0]}; break;
    case PI_OP_SUM_ROWS: op.u.sum = (pi_sum){p[0], p[1], p[2], (int)i[0]}; break;
    case PI_OP_OBSERVE:
        op.u.observe = (pi_observe){(int32_t)i[0], a->f[0], p[0], p[1], i[1], p[2], p[3], p[4], p[5]};
        break;
    case PI_OP_KEEP_LARGE: op.u.keep = (pi_keep){p[0], p[1], p[2], i[0]}; break;
    case PI_OP_SIGN_CODE: op.u.sign_code = (pi_sign_code){p[0], p[1], i[0]}; break;
    case PI_OP_SIGN_SCORES: op.u.sign_scores = (pi_sign_scores){p[0], p[1], p[2], i[0], i[1]}; break;
    case PI_OP_MULTIPLY: op.u.multiply = (pi_multiply){p[0], p[1], i[0], i[1], i[2]}; break;
    case PI_OP_MAP: op.u.map = (pi_map_op){(int32_t)i[0], {a->f[0], a->f[1], a->f[2], a->f[3]}, p[0], i[1]}; break;
    case PI_OP_COPY: op.u.copy = (pi_copy){p[0], p[1], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]}; break;
    case PI_OP_HEAD_MATMUL:
        op.u.head_matmul = (pi_head_matmul){p[0], p[1], p[2], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]};
        break;
    case PI_OP_ROUTE:
        op.u.route =
            (pi_route){p[0], p[1], p[2], p[3], p[4], p[5], i[0], i[1], i[2], i[3], (int)i[4], (int)i[5], a->f[0]};
        break;
    case PI_OP_EXPERT_GATHER:
        op.u.expert_gather = (pi_expert_gather){.choice = choice_of(p[0], p[1], p[2], i),
                                                .src = p[3],
                                                .acts = acts_of(p + 4, i[3]),
                                                .out = p[7],
                                                .out_acts = acts_of(p + 8, i[3]),
                                                .width = i[3],
                                                .weigh = (int)i[4],
                                                .needs_floats = (int)i[5]};
        break;
    case PI_OP_EXPERT_MATMUL: op = expert_matmul_of(p, i); break;
    case PI_OP_EXPERT_ROWS: op = expert_rows_of(p, i, a->f[0]); break;
    case PI_OP_EXPERT_COLUMNS:
        op.u.expert_columns = (pi_expert_columns){.choice = choice_of(p[0], NULL, p[1], i),
                                                  .acts = acts_of(p + 2, a->columns),
                                                  .bias = p[5],
                                                  .out = p[6],
                                                  .rows = a->rows};
        break;
    case PI_OP_EXPERT_ACTIVATE:
        op.u.expert_activate = (pi_expert_activate){
            choice_of(p[0], NULL, p[1], i), (int32_t)i[3], a->f[0], p[2], p[3], p[4], acts_of(p + 5, i[4]), i[4]};
        break;
    case PI_OP_EXPERT_SUM:
        op.u.expert_sum = (pi_expert_sum){choice_of(p[0], p[1], p[2], i), p[3], p[4], i[3], (int)i[4], (int)i[5]};
        break;
    case PI_OP_EXPERT_COUNT:
        op.u.expert_count = (pi_expert_count){choice_of(p[0], p[1], NULL, i), p[2], p[3], p[4], p[5]};
        break;
    case PI_OP_CONVOLVE:
        op.u.convolve = (pi_convolve){p[0], p[1], p[2], p[3], i[0], i[1], i[2], i[3], i[4], (int)i[5]};
        break;
    case PI_OP_SCAN_CHANNELS:
    case PI_OP_SCAN_HEADS:
        op.u.scan = (pi_scan){p[0], p[1], p[2], p[3], p[4], p[5], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8]};
        break;
    case PI_OP_DELTA_NET:
        op.u.delta_net = (pi_delta_net){p[0], p[1], p[2], p[3], p[4],      i[0], i[1],   i[2],
                                        i[3], i[4], i[5], i[6], (int)i[7], i[8], a->f[0]};
        break;
    case PI_OP_GENERAL_DELTA:
        op.u.general_delta = (pi_general_delta){p[0], p[1], p[2], p[3], p[4], p[5], p[6], i[0], i[1], i[2], i[3]};
        break;
    case PI_OP_COMBINE: op.u.combine = (pi_combine){p[0], p[1], p[2], i[0], i[1], i[2]}; break;
    case PI_OP_FETCH:
        op.u.fetch = (pi_fetch){p[0], {p[1], i[0], i[1], i[2]}, {{p[2], i[3], i[4], i[5]}, {p[3], i[6], i[7], i[8]}}};
        break;
    case PI_OP_FETCH_RECORDS:
        op.u.fetch_records = (pi_fetch_records){p[0], p[1], p[2], i[0], i[1], i[4], i[5], (int32_t)i[2], (int)i[3]};
        break;
    case PI_OP_SCALE_BY_POSITION: op.u.scale_by_position = (pi_scale_by_position){p[0], p[1], i[0]}; break;
    default: /* SPARSE_FFN */
        op.u.sparse_ffn = (pi_sparse_ffn){.kind = (int32_t)i[0],
                                          .cut = a->f[0],
                                          .select = p[0],
                                          .threshold = p[1],
                                          .src = p[2],
                                          .acts = acts_of(p + 3, ((const pi_bundle *)p[6])->columns),
                                          .bundle = p[6],
                                          .out = p[7],
                                          .h = p[8],
                                          .gate = p[9],
                                          .bias = p[10],
                                          .accumulate = (int)i[1],
                                          .rule = (int32_t)i[2]};
        break;
    }
    return op;
}
