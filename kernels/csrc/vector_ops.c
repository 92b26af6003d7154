/* Products, functions of single values, and copies of columns: what families put between their matrices. */
#include "program.h"

#include <string.h>

static void multiply(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_multiply *m = &op->u.multiply;
    const pi_part p = pi_part_of(op, run, worker);
    for (int64_t t = p.token0; t < p.token1; t++)
        run->kernels->multiply(m->src + t * m->src_stride, m->repeat, p.column0, p.column1 - p.column0,
                               m->out + t * m->width + p.column0);
}

static void map(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_map_op *m = &op->u.map;
    const pi_part p = pi_part_of(op, run, worker);
    for (int64_t t = p.token0; t < p.token1; t++)
        run->kernels->map(m->kind, m->constants, p.column1 - p.column0, m->x + t * m->width + p.column0);
}

static void copy(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_copy *c = &op->u.copy;
    const pi_part p = pi_part_of(op, run, worker);
    for (int64_t t = p.token0; t < p.token1; t++) {
        const float *src = c->src + t * c->src_width + c->src_first;
        float *out = c->out + t * c->out_width + c->out_first;
        for (int64_t head = 0; head < c->heads; head++, src += c->src_step, out += c->out_step)
            memcpy(out, src, sizeof(float) * (size_t)c->count);
    }
}

static void scale_by_position(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_scale_by_position *s = &op->u.scale_by_position;
    const pi_part p = pi_part_of(op, run, worker);
    for (int64_t t = p.token0; t < p.token1; t++)
        run->kernels->scale(s->table[run->places[t].position], s->width, s->x + t * s->width);
}

static void combine(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_combine *c = &op->u.combine;
    const pi_part p = pi_part_of(op, run, worker);
    for (int64_t t = p.token0; t < p.token1; t++)
        for (int64_t made = 0; made < c->made; made++) {
            const float *factors = c->coefficients + (t * c->made + made) * c->count;
            float *out = c->out + (t * c->made + made) * c->width;
            memset(out, 0, sizeof(float) * (size_t)c->width);
            for (int64_t k = 0; k < c->count; k++)
                run->kernels->add_scaled(c->src + (t * c->count + k) * c->width, factors[k], c->width, out);
        }
}

void pi_vector_execute(const pi_op *op, pi_run *run, pi_worker *worker) {
    switch (op->kind) {
    case PI_OP_MULTIPLY: multiply(op, run, worker); break;
    case PI_OP_MAP: map(op, run, worker); break;
    case PI_OP_COPY: copy(op, run, worker); break;
    case PI_OP_COMBINE: combine(op, run, worker); break;
    case PI_OP_SCALE_BY_POSITION: scale_by_position(op, run, worker); break;
    default: break;
    }
}
